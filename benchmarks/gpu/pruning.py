"""Whole prunings on the GPU: the shipped pipeline beside the CPU, and a model of SD3-medium's shapes.

The large one has random weights, which cost the time and memory of trained ones and say nothing of quality.
"""

import copy
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedModel

from gpu import models
from gpu.rows import Options, Row, Sheet
from obsdiff import pruning
from obsdiff.bundling import compare
from obsdiff.job import Job, computable, given, load, open_job
from obsdiff.loading import shipped_pipeline
from obsdiff.measurements import NotMeasured
from obsdiff.recipe import evaluation_prompts
from obsdiff.settings import Settings
from obsdiff_runtime.progress import silent

RUNS: tuple[dict[str, Any], ...] = ({"fast": True}, {}, {"method": "obsdiff"})
"""Of the shipped pipeline at 2:4; the first one on the CPU too."""

EVAL_PROMPTS = 16
PROMPTS = tuple(
    f"a large {colour} {shape}" for colour in ("red", "blue", "green", "yellow") for shape in ("circle", "star")
)
LARGE: tuple[dict[str, Any], ...] = ({}, {"method": "obsdiff", "steps": 5}, {"fast": True})
"""Of SD3-medium's shapes at 2:4; the paper's method looks at every step, so its pictures are drawn in few."""


def run(sheet: Sheet, options: Options) -> None:
    few = 1 if options.tiny or options.quick else None
    cases = [("SD3-medium's shapes", _large, asked) for asked in LARGE[:few]]
    cases += [("shipped", _small, {**asked, "device": options.device}) for asked in RUNS[:few]]
    cases += [] if options.quick or options.tiny else [("shipped", _small, {"device": "cpu", "fast": True})]
    for place, (model, measure, asked) in enumerate(cases):
        if sheet.left() < 0:
            sheet.not_reached(len(cases) - place)
            break
        with sheet.case(model=model, sparsity="2:4", **_words(asked)) as row:
            measure(row, asked, options)


def _words(asked: dict[str, Any]) -> dict[str, Any]:
    return {"method": "streamed", **{name: str(value) for name, value in asked.items()}}


def _small(row: Row, asked: dict[str, Any], options: Options) -> None:
    """Prunes, and compares with the dense model on held-out prompts."""
    few = {"num_samples": 2, "steps": 2, "eval_prompts": 1} if options.tiny else {"eval_prompts": EVAL_PROMPTS}
    settings = Settings(sparsity="2:4", **{**asked, **few})
    job, loaded = open_job(settings), load(settings)
    stored, dense = computable(loaded), copy.deepcopy(loaded.denoisers)
    started = time.perf_counter()
    pruned = pruning.prune(loaded.pipeline, loaded.family, job.recipe, stored=stored)
    row.figures["seconds"] = time.perf_counter() - started
    held_out = evaluation_prompts(settings, job.defaults.prompts, job.defaults.labels)
    found, _ = compare(job, pruned, dense, held_out, silent, keep_images=0)
    if not isinstance(found, NotMeasured):
        row.figures["velocity_error"] = found.velocity_error


def _large(row: Row, asked: dict[str, Any], options: Options) -> None:
    """Prunes; says nothing of quality."""
    pipeline = large(options)
    pixels = 64 if options.tiny else 512
    common: dict[str, Any] = {"sparsity": "2:4", "height": pixels, "width": pixels, "batch_size": 4, "draws": 1}
    prompts = PROMPTS[:2] if options.tiny else PROMPTS
    if options.tiny:
        common |= {"steps": 2}
    settings = {**common, **asked}
    if asked.get("method") == "obsdiff":
        del settings["draws"]
    job = job_of(pipeline, settings, prompts)
    planned = job.plan()
    clock = Stages(time.perf_counter())
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    loaded = given(pipeline)
    pruned = pruning.prune(pipeline, loaded.family, job.recipe, stored=computable(loaded), progress=clock)
    row.figures |= clock.seconds() | {"planned_bytes": planned.estimates.memory_bytes, "linears": len(pruned.layers)}
    row.figures |= {"mean_loss": sum(layer.loss or 0 for layer in pruned.layers) / len(pruned.layers)}
    if options.device == "cuda":
        row.figures["peak_bytes"] = torch.cuda.max_memory_allocated()


def job_of(pipeline: DiffusionPipeline, settings: dict[str, Any], prompts: Sequence[str]) -> Job:
    """Of a pipeline in memory."""
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "prompts.txt"
        listed.write_text("\n".join(prompts) + "\n", encoding="utf-8")
        index: dict[str, Any] = {"_class_name": type(pipeline).__name__}
        for name in ("transformer", "vae"):
            component = getattr(pipeline, name)
            index[name] = ["diffusers", type(component).__name__]
            component.save_config(Path(folder) / name)
        (Path(folder) / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
        return open_job(Settings(model=folder, prompts_file=str(listed), **settings))


class Stages:
    """A progress that notes how long each stage took."""

    def __init__(self, now: float) -> None:
        self._last = now
        self._seconds: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        now = time.perf_counter()
        self._seconds[stage] = self._seconds.get(stage, 0.0) + now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        """By stage, "calibrate_seconds", and of all."""
        found = {f"{stage.replace(' ', '_')}_seconds": seconds for stage, seconds in self._seconds.items()}
        return {"seconds": sum(self._seconds.values()), **found}


def large(options: Options) -> DiffusionPipeline:
    """SD3-medium's denoiser with random weights in bfloat16, behind the shipped tokenizers and small encoders."""
    widths = (16, 16) if options.tiny else (768, 1280)
    first, second = (
        clip(CLIPTextModelWithProjection, name, width)
        for name, width in zip(("tokenizer", "tokenizer_2"), widths, strict=True)
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=models.dense(options),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=small_vae(),
        text_encoder=first[0],
        tokenizer=first[1],
        text_encoder_2=second[0],
        tokenizer_2=second[1],
        text_encoder_3=None,
        tokenizer_3=None,
    )
    return pipeline.to(options.device, torch.bfloat16 if options.device == "cuda" else torch.float32)


def clip(kind: type[PreTrainedModel], name: str, width: int) -> tuple[PreTrainedModel, CLIPTokenizer]:
    """A small text encoder with random weights, and the shipped tokenizer of that name."""
    tokenizer = CLIPTokenizer.from_pretrained(shipped_pipeline() / name)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    return kind(config).eval(), tokenizer


def small_vae() -> AutoencoderKL:
    """Of sixteen channels and eight times fewer pixels a side; pruning decodes nothing."""
    return AutoencoderKL(
        latent_channels=16, block_out_channels=(8, 8, 8, 8), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
