"""A made-up report: every number in it is invented for the layout, none was measured."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from obsdiff import shapes
from obsdiff.evaluation import Evaluation, ImagePair, PromptResult, Share
from obsdiff.measurements import (
    BuiltEngine,
    Counts,
    Environment,
    ExportedComponent,
    LatencyPair,
    NotMeasured,
    Report,
    Stage,
)
from obsdiff.metrics import mean_squared_error, psnr_db, ssim
from obsdiff.recipe import Sampling
from obsdiff.results import LayerResult
from obsdiff_runtime.timing import Timings, compare, latency

PROMPTS = tuple(shapes.evaluation_captions(8, seed=3))


def image_pairs() -> tuple[ImagePair, ...]:
    return tuple(
        ImagePair(
            prompt=prompt,
            seed=1000 + i,
            dense=shapes.draw(shapes.parse(prompt), seed=i),
            pruned=shapes.draw(shapes.parse(prompt if i != 3 else PROMPTS[0]), seed=i if i < 2 else i + 10),
        )
        for i, prompt in enumerate(PROMPTS)
    )


def evaluation(pairs: tuple[ImagePair, ...], *, judged: bool = True) -> Evaluation:
    results = tuple(
        PromptResult(
            prompt=pair.prompt,
            seed=pair.seed,
            velocity_error=0.01 + i / 1000,
            latents_mse=0.02,
            latents_relative=0.03,
            image_mse=mean_squared_error(pair.dense, pair.pruned),
            psnr_db=psnr_db(pair.dense, pair.pruned),
            ssim=ssim(pair.dense, pair.pruned),
            dense_obeys=shapes.obeys(pair.dense, pair.prompt).all if judged else None,
            pruned_obeys=shapes.obeys(pair.pruned, pair.prompt).all if judged else None,
        )
        for i, pair in enumerate(pairs)
    )
    curve = tuple(0.004 * 1.13**step for step in range(20))
    blocks = tuple(tuple(0.002 * 1.4**block * 1.05**step for step in range(20)) for block in range(8))
    ratios = [result.psnr_db for result in results if result.psnr_db is not None]
    return Evaluation(
        velocity_error=float(np.mean(curve)),
        velocity_error_per_step=curve,
        blocks=tuple(f"transformer_blocks.{block}" for block in range(8)),
        block_error=float(np.mean(blocks[-1])),
        block_errors=tuple(float(np.mean(row)) for row in blocks),
        block_errors_per_step=blocks,
        latents_mse=0.02,
        latents_relative=0.03,
        image_mse=float(np.mean([result.image_mse for result in results])),
        psnr_db=float(np.mean(ratios)) if ratios else None,
        ssim=float(np.mean([result.ssim for result in results])),
        identical_images=len(results) - len(ratios),
        dense_obedience=Share.of([bool(result.dense_obeys) for result in results]) if judged else None,
        pruned_obedience=Share.of([bool(result.pruned_obeys) for result in results]) if judged else None,
        per_prompt=results,
        sampling=Sampling(
            num_inference_steps=20,
            guidance_scale=3.5,
            height=64,
            width=64,
            max_sequence_length=1,
            batch_size=4,
            seed=1000,
        ),
        negative="",
        scheduler="FlowMatchEulerDiscreteScheduler",
    )


def layers() -> tuple[LayerResult, ...]:
    rng = np.random.default_rng(0)
    names = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "ff.net.0.proj", "ff.net.2")
    found = [
        LayerResult(name=f"transformer_blocks.{block}.{name}", pattern="2:4", loss=float(loss), zeros=0.5)
        for block in range(8)
        for name, loss in zip(names, 10 ** rng.uniform(-3.5, -1, len(names)), strict=True)
    ]
    dense = LayerResult(name="proj_in", pattern="dense", loss=None, zeros=0.0, reason="6 inputs are no multiple of 4")
    return (*found, dense)


def timings(dense_ms: list[float], pruned_ms: list[float]) -> Timings:
    dense, pruned = ([value / 1000 for value in values] for values in (dense_ms, pruned_ms))
    return Timings(
        latencies={"dense": latency(dense), "pruned": latency(pruned)},
        comparisons=(compare("pruned", pruned, "dense", dense),),
    )


@pytest.fixture
def make_timings() -> Callable[[list[float], list[float]], Timings]:
    """make_timings(dense_ms, pruned_ms): as time_interleaved would give them."""
    return timings


@pytest.fixture
def pairs() -> tuple[ImagePair, ...]:
    return image_pairs()


@pytest.fixture
def make_report(pairs: tuple[ImagePair, ...]) -> Callable[..., Report]:
    """make_report(**changes): a full report; `judged=False` for one without obedience."""

    def make(*, judged: bool = True, **changes: Any) -> Report:
        rng = np.random.default_rng(1)
        values: dict[str, Any] = {
            "obsdiff_version": "0.1.0",
            "model": "shapes",
            "family": "sd3",
            "sparsity": "2:4",
            "method": "obsdiff",
            "recipe": {"model": "shapes", "sparsity": "2:4", "damp": 0.01, "sampling": {"seed": 0}},
            "environment": Environment(
                date="2026-01-02T03:04:05+00:00",
                python="3.11.2",
                platform="Linux x86_64",
                cpu="Example CPU 3000",
                cores=2,
                threads=2,
                memory_bytes=24 * 2**30,
                gpu=None,
                packages={"torch": "2.13.0", "onnxruntime": "1.32.0", "diffusers": "0.42.1"},
            ),
            "dense": Counts(parameters=2_345_678, nonzero=2_345_600, macs=150_000_000, bytes_on_disk=9_400_000),
            "pruned": Counts(parameters=2_345_678, nonzero=1_345_600, macs=150_000_000, bytes_on_disk=9_400_000),
            "layers": layers(),
            "components": (
                ExportedComponent(name="transformer", dtype="fp32", bytes_on_disk=9_450_000, max_error=2.3e-6),
                ExportedComponent(name="vae_decoder", dtype="fp32", bytes_on_disk=1_200_000, max_error=8.1e-7),
                ExportedComponent(
                    name="text_encoder",
                    dtype="fp16",
                    bytes_on_disk=99_000,
                    max_error=NotMeasured(why="the day is short"),
                ),
            ),
            "engines": (
                BuiltEngine(
                    component="transformer",
                    backend="tensorrt_rtx 1.7.1",
                    targets=("8.6", "8.9", "12.0"),
                    sparsity="not supported by this backend: it ignores the sparse flag",
                    bytes_on_disk=14_000_000,
                    seconds=8.25,
                    verdicts={"active": 40, "not chosen": 12, "unknown": 4},
                ),
                *(
                    BuiltEngine(
                        component=name,
                        backend="tensorrt_rtx 1.7.1",
                        targets=("8.6", "8.9", "12.0"),
                        sparsity="The engine was built without the sparse flag and runs dense kernels.",
                        bytes_on_disk=2_000_000,
                        seconds=1.5,
                    )
                    for name in ("vae_decoder", "text_encoder")
                ),
            ),
            "latency": (
                LatencyPair.of(
                    timings(list(rng.normal(12.3, 0.4, 40)), list(rng.normal(12.3, 0.4, 40))),
                    what="one denoiser call",
                    backend="ONNX Runtime on the CPU",
                    shape="2 rows of 64x64 pixels",
                ),
            ),
            "evaluation": evaluation(pairs, judged=judged),
            "stages": (
                Stage(name="calibrate", seconds=42.1),
                Stage(name="prune", seconds=12.0),
                Stage(name="export", seconds=31.5),
                Stage(name="compare", seconds=64.2),
            ),
            "notes": ("The last step of the run was skipped on request.",),
            "command": "obsdiff export --sparsity 2:4 --trt -o out",
        }
        return Report(**values | changes)

    return make
