"""Text encoders that lie in their files while their pipeline's denoiser is pruned."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import obsdiff
from obsdiff import costs, encoders, verbs
from obsdiff.families.table import FAMILIES
from obsdiff.job import open_job
from obsdiff.loading import load_pipeline
from obsdiff.settings import Settings
from obsdiff_export.stored import is_stored

PROMPTS = ["a red dog", "a cat"]
KINDS = (
    "sd3",
    "sd15",
    "sdxl",
    "flux",
    "flux2",
    "auraflow",
    "sana",
    "qwen",
    "lumina2",
    "zimage",
    "hunyuan",
    "wan",
    "ltx",
)
Build = Callable[..., Any]


@pytest.fixture(autouse=True)
def small_ones_rest_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "LEAST", 0)


def readers(pipeline: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipeline.components.items() if encoders.reads(name) and part is not None}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_they_read_as_if_they_were_there(kind: str, build_pipeline: Build, tmp_path: Path) -> None:
    build_pipeline(kind, **({"with_t5": True} if kind == "sd3" else {})).save_pretrained(tmp_path / "model")
    whole, settled = (load_pipeline(tmp_path / "model", settle=settle) for settle in (False, True))
    family = settled.family
    assert settled.pipeline.device.type == "cpu"
    assert readers(settled.pipeline)
    assert all(is_stored(part) for part in readers(settled.pipeline).values())
    unwanted = ["", "ugly"] if family.negatives else []
    expected = family.encode(whole.pipeline, PROMPTS, unwanted)
    for _ in range(2):
        found = family.encode(settled.pipeline, PROMPTS, unwanted)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert all(is_stored(part) for part in readers(settled.pipeline).values())


@torch.no_grad()
def test_a_block_goes_back_to_its_file_where_it_fails(build_pipeline: Build, tmp_path: Path) -> None:
    build_pipeline("wan").save_pretrained(tmp_path / "model")
    encoder = load_pipeline(tmp_path / "model", settle=True).pipeline.text_encoder
    block = encoder.encoder.block[1]
    before = [type(parameter) for parameter in block.parameters()]
    with pytest.raises(TypeError):
        block(no_such_argument=1)
    assert [type(parameter) for parameter in block.parameters()] == before


@torch.no_grad()
@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_half_precision_is_read_in_float32(variant: str, build_pipeline: Build, tmp_path: Path) -> None:
    """As a pipeline that is widened reads it."""
    half = build_pipeline("flux").to({"fp16": torch.float16, "bf16": torch.bfloat16}[variant])
    half.save_pretrained(tmp_path / "model")
    expected = FAMILIES["flux"].encode(half.to(torch.float32), PROMPTS, [])
    found = FAMILIES["flux"].encode(load_pipeline(tmp_path / "model", settle=True).pipeline, PROMPTS, [])
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_is_pruned_is_the_same(build_pipeline: Build, tmp_path: Path) -> None:
    """From a folder, where they settle, and in memory, where they do not; they are handed on as they were."""
    how: dict[str, Any] = {"steps": 2, "height": 32, "width": 32, "max_sequence_length": 6, "draws": 1, "align": 4}
    build_pipeline("sd3", with_t5=True).save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    asked = {"sparsity": "2:4", "prompts_file": str(tmp_path / "prompts.txt"), **how}
    verbs.prune_to_folder(Settings(model=str(tmp_path / "model"), **asked), tmp_path / "pruned")
    pruned = obsdiff.prune(tmp_path / "model", **asked)
    assert not is_stored(pruned.pipeline.text_encoder_3)
    loaded: Any = obsdiff.load(tmp_path / "pruned")
    for name, weight in pruned.denoiser.named_parameters():
        assert torch.equal(weight, loaded.transformer.get_parameter(name)), name
    for name, weight in pruned.pipeline.text_encoder_3.named_parameters():
        assert torch.equal(weight, loaded.text_encoder_3.get_parameter(name)), name


def test_small_ones_are_read_once(build_pipeline: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    build_pipeline("flux").save_pretrained(tmp_path / "model")
    assert not any(map(is_stored, readers(load_pipeline(tmp_path / "model", settle=True).pipeline).values()))


def test_a_plan_counts_what_is_there_beside_the_denoiser(build_pipeline: Build, tmp_path: Path) -> None:
    pipeline = build_pipeline("flux")
    pipeline.save_pretrained(tmp_path / "model")
    asked: dict[str, Any] = {"model": str(tmp_path / "model"), "sparsity": "2:4", "height": 32, "width": 32}
    job = open_job(Settings(**asked))
    vae, clip, t5 = map(costs.weight_bytes, (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2))
    blocks = pipeline.text_encoder_2.encoder.block, pipeline.text_encoder.encoder.layers
    gone = sum(costs.weight_bytes(each) for block in blocks for each in block[1:])
    assert job.beside_bytes == vae + clip + t5 - gone
    (tmp_path / "model" / "text_encoder_2" / "config.json").write_text('{"d_model": "?"}')
    assert open_job(Settings(**asked)).beside_bytes < job.beside_bytes  # of what makes no network nothing is known


@pytest.mark.parametrize("kind", ["flux", "qwen"])
def test_their_graphs_are_compared_with_torch_in_the_dtype_that_is_asked_for(
    kind: str, build_pipeline: Build, tmp_path: Path
) -> None:
    build_pipeline(kind).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    name = {"flux": "text_encoder_2", "qwen": "text_encoder"}[kind]
    for dtype, allowed in (("fp32", 1e-4), ("fp16", 0.05)):
        small: dict[str, Any] = {"height": 32, "width": 32, "eval_prompts": 0, "steps": 2, "dtype": dtype}
        obsdiff.export(tmp_path / "model", tmp_path / dtype, **small)
        report = json.loads((tmp_path / dtype / "report.json").read_text())
        (encoder,) = (each for each in report["components"] if each["name"] == name)
        assert encoder["dtype"] == {"fp32": "float32", "fp16": "float16"}[dtype]
        assert 0 < encoder["max_error"] < allowed
