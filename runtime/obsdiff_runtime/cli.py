"""`obsdiff-runtime`: draws, measures, serves and shows bundles where nothing but this package is installed.

A verb is a function and a line in VERBS. Nothing heavy is imported until one runs.
"""

from typing import Final

from obsdiff_runtime.command import BUNDLE, Argument, Command, Given, Verb, print_result
from obsdiff_runtime.flags import BACKEND, GENERATE, ROUNDS, SAMPLING, SERVE, THREADS, TILING
from obsdiff_runtime.progress import Progress
from obsdiff_runtime.server.options import read_options, read_tiling


def generate(given: Given, progress: Progress) -> None:
    """An image from a prompt, or a film."""
    from obsdiff_runtime import verbs

    seconds = verbs.generate(
        given["bundle"],
        given["prompt"],
        given["output"],
        image=given["image"],
        last_image=given["last_image"],
        mask=given["mask"],
        control=given["control"],
        control_scale=given["control_scale"],
        references=given["reference"] or (),
        own_size=given["own_size"],
        height=given["height"],
        width=given["width"],
        num_frames=given["num_frames"],
        fps=given["fps"],
        backend=given["backend"],
        threads=given["threads"],
        vae_tiling=read_tiling(given),
        progress=progress,
        negative_prompt=given["negative_prompt"],
        strength=given["strength"],
        eta=given["eta"],
        noise_source=given["noise"],
        num_inference_steps=given["steps"],
        guidance_scale=given["guidance_scale"],
        guidance_scale_2=given["guidance_scale_2"],
        max_sequence_length=given["max_sequence_length"],
        seed=given["seed"],
    )
    print_result(given, {"image": str(given["output"]), "seconds": dict(seconds)}, lambda: print(given["output"]))


def bench(given: Given, progress: Progress) -> None:
    """Time, throughput and memory of bundles, by turns; what is noise is called so."""
    from obsdiff_runtime import benchmark

    report = benchmark.bench(
        *given["bundles"],
        against=given["against"],
        **{name: given[name] for name in ("iterations", "warmup", "num_images", "threads", "backend", "seed")},
        **{name: given[name] for name in ("height", "width", "num_frames", "guidance_scale", "guidance_scale_2")},
        max_sequence_length=given["max_sequence_length"],
        num_inference_steps=given["steps"],
        vae_tiling=read_tiling(given),
        progress=progress,
    )
    print_result(given, report.to_json(), lambda: print(benchmark.table(report)))


def serve(given: Given, progress: Progress) -> None:
    """OpenAI's images API, health, metrics and a page."""
    from obsdiff_runtime.server.run import serve

    def show(url: str) -> None:
        print_result(given, {"url": url}, lambda: print(f"serving at {url}", flush=True))

    serve(given["bundles"], read_options(given), show)


def inspect(given: Given, progress: Progress) -> None:
    """What is in a bundle, after every file was compared with its sha256."""
    from obsdiff_runtime import verbs
    from obsdiff_runtime.bundle import open_bundle

    bundle = open_bundle(given["bundle"])
    print_result(given, verbs.contents(bundle), lambda: print(verbs.describe(bundle)))


VERBS: Final = {
    "generate": Verb(
        work=generate,
        arguments=[BUNDLE, Argument(name="prompt", text="What to draw.")],
        flags=[*GENERATE, *SAMPLING],
    ),
    "bench": Verb(
        work=bench,
        arguments=[Argument(name="bundles", text="FOLDER or FOLDER@BACKEND.", many=True)],
        flags=[*ROUNDS, BACKEND, THREADS, *TILING, *SAMPLING],
    ),
    "serve": Verb(
        work=serve,
        arguments=[Argument(name="bundles", text="Bundles, or NAME=BUNDLE; the first one is the default.", many=True)],
        flags=SERVE,
    ),
    "inspect": Verb(work=inspect, arguments=[BUNDLE]),
}

COMMAND: Final = Command(
    program="obsdiff-runtime",
    description="Runs obsdiff bundles, without torch.",
    verbs=VERBS,
    codes="Exit codes: 0 done; 1 failed; 2 usage or configuration; 4 not enough memory or disk; "
    "5 engine or environment incompatible; 130 interrupted.",
)
main = COMMAND.main
run = COMMAND.run
