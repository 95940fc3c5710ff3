"""Fixtures of tiny random denoisers and pipelines; tests/networks/whole builds them."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    DiffusionPipeline,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from torch import nn

from networks.whole.denoisers import DENOISERS
from networks.whole.pipelines import PIPELINES, UNDESCRIBED, dit_pipeline, sd3_pipeline, sd15_pipeline
from obsdiff import hub, verbs
from obsdiff.families import flux
from obsdiff.families.table import family_of
from obsdiff.sampling import velocity_of
from obsdiff.settings import Settings
from obsdiff_runtime.pipeline import Pipeline


@pytest.fixture(autouse=True)
def _quiet_and_single_threaded() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    diffusers_logging.disable_progress_bar()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test takes engines from the user's cache, nor leaves any there."""
    monkeypatch.setenv("OBSDIFF_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def build_undescribed() -> Callable[[str], DiffusionPipeline]:
    """build_undescribed("cogview3"): a pipeline whose denoiser no family describes.

    T5 reads the prompts of all of them, whatever the real one has.
    """

    def build(kind: str) -> DiffusionPipeline:
        torch.manual_seed(0)
        pipeline = UNDESCRIBED[kind]()
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return build


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], list[dict[str, Any]]]:
    """stand_in(folder): the Hub knows one model, whatever it is called; gives what diffusers is asked to fetch."""

    def begin(folder: Path) -> list[dict[str, Any]]:
        asked: list[dict[str, Any]] = []

        def download(model: str, **options: Any) -> str:
            asked.append({"model": model, **options})
            return str(folder)

        def hf_hub_download(model: str, name: str, **_: Any) -> str:
            if not (folder / name).exists():
                raise huggingface_hub.errors.EntryNotFoundError(name)
            return str(folder / name)

        monkeypatch.setattr(DiffusionPipeline, "download", download)
        monkeypatch.setattr(hub, "hf_hub_download", hf_hub_download)
        return asked

    return begin


@pytest.fixture
def build_denoiser() -> Callable[..., nn.Module]:
    """build_denoiser(a key of DENOISERS, **config): a seeded random denoiser in eval mode."""

    def build(kind: str, **changes: Any) -> nn.Module:
        torch.manual_seed(0)
        return DENOISERS[kind](**changes).eval()

    return build


@pytest.fixture
def build_pipeline() -> Callable[..., DiffusionPipeline]:
    """build_pipeline(a key of PIPELINES, **config): a seeded random pipeline; sd3 takes with_t5=True."""

    def build(kind: str, **changes: Any) -> DiffusionPipeline:
        pipeline = PIPELINES[kind](**changes)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return build


@pytest.fixture
def exported(
    build_pipeline: Callable[..., DiffusionPipeline], picture_folder: Path, tmp_path: Path
) -> Callable[[str, str], Pipeline]:
    """exported(kind, note): a bundle, by a folder, pruned on pictures; a plan without them has the note."""

    def run(kind: str, note: str) -> Pipeline:
        build_pipeline(kind).save_pretrained(tmp_path / "dense")
        (tmp_path / "prompts.txt").write_text("a red circle\na blue square\na star")
        files = {"model": str(tmp_path / "dense"), "prompts_file": str(tmp_path / "prompts.txt")}
        settings = Settings(sparsity="2:4", steps=2, draws=1, eval_prompts=1, height=32, width=48, **files)
        assert any(note in each for each in verbs.plan(settings).notes)
        verbs.export(replace(settings, references=str(picture_folder)), tmp_path / "out")
        return Pipeline(tmp_path / "out", threads=1)

    return run


@pytest.fixture
def denoise() -> Callable[[nn.Module], torch.Tensor]:
    """denoise(denoiser): its output on a fixed input of batch 2, 12 x 16 latents and 7 text tokens."""

    def run(denoiser: Any) -> torch.Tensor:
        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(denoiser.dtype)

        config = denoiser.config
        sample, time = noise(2, config.in_channels, 12, 16), torch.tensor([900.0, 300.0])
        with torch.no_grad():
            if isinstance(denoiser, SD3Transformer2DModel):
                text, pooled = noise(2, 7, config.joint_attention_dim), noise(2, config.pooled_projection_dim)
                return denoiser(sample, text, pooled, time, return_dict=False)[0]
            if isinstance(denoiser, FluxTransformer2DModel):
                inputs = {
                    "hidden_states": noise(2, config.in_channels // 4, 12, 16),
                    "encoder_hidden_states": noise(2, 7, config.joint_attention_dim),
                    "pooled_projections": noise(2, config.pooled_projection_dim),
                    "timestep": time,
                    "guidance": torch.tensor([3.5, 2.0]),
                }
                return denoiser(**flux.arguments(inputs), return_dict=False)[0]
            if isinstance(denoiser, AuraFlowTransformer2DModel):
                return denoiser(sample, noise(2, 7, config.joint_attention_dim), time / 1000, return_dict=False)[0]
            if isinstance(denoiser, DiTTransformer2DModel):  # draws squares alone
                labels = torch.tensor([207, 1000])
                return denoiser(noise(2, config.in_channels, 16, 16), time, labels, return_dict=False)[0]
            if not isinstance(denoiser, UNet2DConditionModel):
                family = family_of(denoiser)
                shape = {"batch": 2, "size": (12, 16), "text_tokens": 7, "pixels": (24, 32)}
                told = family.arguments(family.example(denoiser, **shape))
                return velocity_of(denoiser, denoiser(**told, return_dict=False), told)
            added = {"text_embeds": noise(2, 16), "time_ids": torch.ones(2, 6)}
            text = noise(2, 7, config.cross_attention_dim)
            return denoiser(sample, time, text, added_cond_kwargs=added, return_dict=False)[0]

    return run


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures of shapes of their own, and a file that is none."""
    place = tmp_path_factory.mktemp("pictures")
    for name, size in {"b.png": (90, 70, 3), "a.jpg": (96, 128, 3)}.items():
        pixels = np.random.default_rng(len(name)).integers(0, 255, size, dtype=np.uint8)
        Image.fromarray(pixels).resize((size[1] // 8, size[0] // 8)).resize((size[1], size[0])).save(place / name)
    (place / "notes.txt").write_text("no picture")
    return place


@pytest.fixture(scope="session")
def sd3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD3 pipeline without T5, saved by diffusers. Not to be changed: copy it."""
    folder = tmp_path_factory.mktemp("models") / "sd3"
    sd3_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sd3_t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD3 pipeline with T5, saved by diffusers. Not to be changed: copy it."""
    folder = tmp_path_factory.mktemp("models") / "sd3-t5"
    sd3_pipeline(with_t5=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DiT pipeline as published: its index has the names of classes, which diffusers does not write."""
    folder = tmp_path_factory.mktemp("models") / "dit"
    dit_pipeline().save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"] = {"0": "tench, Tinca tinca", "207": "golden retriever", "208": "Labrador retriever"}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="session")
def sd15_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion 1.5 pipeline, saved by diffusers. Not to be changed: copy it."""
    folder = tmp_path_factory.mktemp("models") / "sd15"
    sd15_pipeline().save_pretrained(folder)
    return folder
