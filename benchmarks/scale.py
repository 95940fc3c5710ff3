"""What `plan` says of a run against what the run takes, and how both grow with depth, width and tokens.

    python benchmarks/scale.py                       SD3 models of several sizes, on the CPU; half an hour
    python benchmarks/scale.py --sizes small         the smallest one alone
    python benchmarks/scale.py --size 24x1536x512    depth, width and pixels of one's own: SD3-medium at 512 x 512

Models have random weights, which cost the time and memory of trained ones. Each run has a process of its own; its peak
is counted from before the pipeline is there; `plan` counts the same. Prints a table; asserts nothing.
"""

import dataclasses
import json
import multiprocessing
import re
import resource
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

SIZES: dict[str, str] = {"small": "4x512x256", "deeper": "8x512x256", "wider": "4x1024x256", "larger": "4x512x512"}
"""DEPTHxWIDTHxPIXELS; a head has 64 channels and a latent pixel 8 x 8 pixels, as in SD3."""

TINY = "2x64x64"

METHODS: dict[str, dict[str, Any]] = {"streamed": {"draws": 1}, "obsdiff": {"method": "obsdiff"}}
STAGES = ("export", *METHODS)
PROMPTS = ("a large red circle", "a small blue square", "a green triangle", "two yellow stars")
LATENT_PIXEL = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One stage of one model.

    Attributes:
        parameters: of the denoiser.
        planned_bytes, planned_seconds: what `plan` said, None where it says nothing.
        peak_bytes: most that the process held, less what it held before the pipeline was there.
    """

    size: str
    stage: str
    parameters: int
    planned_bytes: int | None
    peak_bytes: int
    planned_seconds: float | None
    seconds: float


def main(
    sizes: Annotated[str, typer.Option(help="Names, separated by commas.")] = ",".join(SIZES),
    size: Annotated[list[str] | None, typer.Option(help="DEPTHxWIDTHxPIXELS instead.")] = None,
    stages: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(STAGES),
    steps: Annotated[int, typer.Option(help="Of the sampler.")] = 5,
    threads: Annotated[int, typer.Option(help="Of the host.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Where the runs go as JSON, one a line.")] = None,
) -> None:
    wanted = [
        (text, stage, steps, threads)
        for text in (size or [SIZES[name] for name in sizes.split(",")])
        for stage in stages.split(",")
    ]
    runs = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for run in track(pool.imap(_measured, wanted), total=len(wanted), console=Console(stderr=True)):
            runs.append(run)
            if out is not None:
                with out.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(dataclasses.asdict(run)) + "\n")
    Console(width=130).print(_table(runs))


def _measured(wanted: tuple[str, str, int, int]) -> Run:
    """Runs a stage, in this process; a tiny model first, after which libraries are loaded."""
    text, stage, steps, threads = wanted
    import torch

    from obsdiff.display import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(threads)
    _once(TINY, stage, steps)
    before = _resident_bytes()
    run = _once(text, stage, steps)
    return dataclasses.replace(run, peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)


def _once(text: str, stage: str, steps: int) -> Run:
    """The stage, its peak not yet measured."""
    from obsdiff import pruning
    from obsdiff.job import computable, given

    depth, width, pixels = parsed(text)
    with tempfile.TemporaryDirectory() as folder:
        job = None if stage == "export" else _job(Path(folder), depth, width, pixels, steps, METHODS[stage])
        planned = None if job is None else job.plan().estimates
        pipeline = random_pipeline(depth, width, pixels)
        parameters = sum(parameter.numel() for parameter in pipeline.transformer.parameters())
        started = time.perf_counter()
        if job is None:
            _export(pipeline, pixels, Path(folder))
        else:
            loaded = given(pipeline)
            pruning.prune(pipeline, loaded.family, job.recipe, stored=computable(loaded))
        seconds = time.perf_counter() - started
    return Run(
        size=text,
        stage=stage,
        parameters=parameters,
        planned_bytes=None if planned is None else planned.memory_bytes,
        peak_bytes=0,
        planned_seconds=None if planned is None else planned.calibration_seconds + planned.solver_seconds,
        seconds=seconds,
    )


def parsed(text: str) -> tuple[int, int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    if match is None:
        raise typer.BadParameter(f"{text}: not DEPTHxWIDTHxPIXELS")
    depth, width, pixels = map(int, match.groups())
    return depth, width, pixels


def _resident_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def _denoiser(depth: int, width: int, pixels: int) -> dict[str, Any]:
    return {
        "sample_size": pixels // LATENT_PIXEL,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": depth,
        "attention_head_dim": 64,
        "num_attention_heads": width // 64,
        "joint_attention_dim": 4096,
        "caption_projection_dim": width,
        "pooled_projection_dim": 256,
        "pos_embed_max_size": pixels // LATENT_PIXEL,
    }


def _vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        latent_channels=16, block_out_channels=(8, 8, 8, 8), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0,
    )  # fmt: skip


def _job(folder: Path, depth: int, width: int, pixels: int, steps: int, asked: dict[str, Any]) -> Any:
    """Of configurations alone."""
    import torch
    from diffusers import SD3Transformer2DModel

    from obsdiff.job import open_job
    from obsdiff.settings import Settings

    with torch.device("meta"):
        parts = {"transformer": SD3Transformer2DModel.from_config(_denoiser(depth, width, pixels)), "vae": _vae()}
    index: dict[str, Any] = {"_class_name": "StableDiffusion3Pipeline"}
    for name, part in parts.items():
        index[name] = ["diffusers", type(part).__name__]
        part.save_config(folder / name)
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    common: dict[str, Any] = {"sparsity": "2:4", "steps": steps, "batch_size": 2, "height": pixels, "width": pixels}
    return open_job(Settings(model=str(folder), prompts_file=str(folder / "prompts.txt"), **common, **asked))


def random_pipeline(depth: int, width: int, pixels: int) -> Any:
    """Random weights behind the shipped tokenizers, small text encoders and no T5."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    from obsdiff.loading import shipped_pipeline

    torch.manual_seed(0)
    encoders: dict[str, Any] = {"text_encoder_3": None, "tokenizer_3": None}
    for suffix in ("", "_2"):
        tokenizer = CLIPTokenizer.from_pretrained(shipped_pipeline() / f"tokenizer{suffix}")
        config = CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=tokenizer.model_max_length, projection_dim=128,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        encoders |= {
            f"text_encoder{suffix}": CLIPTextModelWithProjection(config).eval(),
            f"tokenizer{suffix}": tokenizer,
        }
    denoiser = SD3Transformer2DModel.from_config(_denoiser(depth, width, pixels)).eval().requires_grad_(False)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return StableDiffusion3Pipeline(transformer=denoiser, scheduler=scheduler, vae=_vae(), **encoders)


def _export(pipeline: Any, pixels: int, folder: Path) -> None:
    """The denoiser to ONNX, in float16."""
    import torch

    from obsdiff.families.table import family_of
    from obsdiff_export.onnx import export

    component = family_of(pipeline.transformer).component(pipeline.transformer, height=pixels, width=pixels)
    export(component, folder / "onnx", dtype=torch.float16)


def _table(runs: list[Run]) -> Table:
    table = Table("depth x width x pixels", "stage", "parameters", "planned GB", "peak GB", "ratio", "planned s", "s")
    for run in runs:
        table.add_row(
            run.size,
            run.stage,
            f"{run.parameters / 1e6:.0f} M",
            "" if run.planned_bytes is None else f"{run.planned_bytes / 1e9:.2f}",
            f"{run.peak_bytes / 1e9:.2f}",
            "" if run.planned_bytes is None else f"{run.planned_bytes / run.peak_bytes:.2f}",
            "" if run.planned_seconds is None else f"{run.planned_seconds:.0f}",
            f"{run.seconds:.0f}",
        )
    return table


if __name__ == "__main__":
    typer.run(main)
