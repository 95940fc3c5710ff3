"""What the runtime makes of a denoiser of some size, on the CPU: beside diffusers, pruned, and by OpenVINO.

    python benchmarks/runtime.py                    8 blocks of 768, 256 x 256 pixels; a quarter of an hour
    python benchmarks/runtime.py --size 4x512x256   depth, width and pixels of one's own

An SD3 pipeline of random weights, exported as it is and without three tenths of its units, is timed by turns by
`obsdiff bench`. Prints its table, and beside the speed-up the multiply-accumulates that were saved; asserts nothing.
"""

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import scale
import typer

SIZE = "8x768x256"
SPARSITY = "structured:0.3"


def main(
    size: Annotated[str, typer.Option(help="DEPTHxWIDTHxPIXELS.")] = SIZE,
    iterations: Annotated[int, typer.Option(help="Rounds that count.")] = 9,
    steps: Annotated[int, typer.Option(help="Of an image.")] = 3,
    threads: Annotated[int, typer.Option(help="Of the host.")] = 2,
) -> None:
    import torch

    from obsdiff import verbs
    from obsdiff.candidates import Terms, open_candidates
    from obsdiff.display import quiet_libraries
    from obsdiff_runtime.backends import BACKENDS
    from obsdiff_runtime.benchmark import bench, table
    from obsdiff_runtime.errors import CompatibilityError, MissingPackageError

    quiet_libraries()
    torch.set_num_threads(threads)
    depth, width, pixels = scale.parsed(size)
    with tempfile.TemporaryDirectory(prefix="obsdiff-") as name:
        folder = Path(name)
        scale.random_pipeline(depth, width, pixels).save_pretrained(folder / "model")
        common: dict[str, Any] = {"height": pixels, "width": pixels, "steps": steps, "eval_prompts": 0}
        dense = verbs.export(folder / "model", folder / "dense", **common)
        cut = verbs.export(folder / "model", folder / "cut", sparsity=SPARSITY, method="magnitude", **common)
        names = [str(folder / "cut"), f"diffusers:{folder / 'model'}"]
        for backend in ("openvino", "openvino_bf16"):
            try:
                BACKENDS[backend].versions()
            except (CompatibilityError, MissingPackageError) as error:
                print(f"without {backend}: {error}")
            else:
                names.append(f"{folder / 'dense'}@{backend}")
        terms = Terms(backend="onnxruntime", dtype=None, device="cpu", threads=threads)
        runners = open_candidates([*names, str(folder / "dense")], terms)
        report = bench(
            *runners[:-1],
            against=runners[-1],
            iterations=iterations,
            warmup=1,
            num_inference_steps=steps,
            threads=threads,
        )
        print(table(report))
        before, after = dense.report.pruned.macs, cut.report.pruned.macs
        print(json.dumps({"macs": {"dense": before, "cut": after}}))


if __name__ == "__main__":
    typer.run(main)
