"""Denoisers that no family describes: what can be done with them, and what is refused and how."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

import obsdiff
from obsdiff import verbs
from obsdiff.evaluation import Evaluation
from obsdiff.families import generic
from obsdiff.families.table import FAMILIES, family_of
from obsdiff.settings import Settings
from obsdiff_runtime.errors import ConfigError, ModelError

PROMPTS = ["a cat", "a dog"]
SMALL: dict[str, Any] = {
    "steps": 3,
    "height": 64,
    "width": 64,
    "max_sequence_length": 8,
    "batch_size": 2,
}
FILMS: dict[str, dict[str, Any]] = {"cogvideox": {"num_frames": 9}, "mochi": {"num_frames": 7}}


def zeros_of_four(weight: torch.Tensor) -> torch.Tensor:
    return (weight.unflatten(1, (-1, 4)) == 0).sum(-1)


def test_it_is_the_family_of_what_no_other_one_describes(build_undescribed: Callable[[str], DiffusionPipeline]) -> None:
    assert family_of("CogView3PlusTransformer2DModel") is FAMILIES["generic"]
    assert family_of(build_undescribed("cogview3").transformer) is FAMILIES["generic"]
    assert family_of("SD3Transformer2DModel") is FAMILIES["sd3"]


@pytest.mark.stage("weights")
@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("cogview3", "streamed"),
        ("cogview3", "obsdiff"),
        ("cogview3", "wanda"),
        ("cogvideox", "streamed"),
        ("cogvideox", "obsdiff"),
        ("mochi", "streamed"),
    ],
)
def test_every_linear_of_its_blocks_gets_the_pattern_and_nothing_else_changes(
    kind: str, method: str, build_undescribed: Callable[[str], DiffusionPipeline]
) -> None:
    pipeline, own = build_undescribed(kind), SMALL | FILMS.get(kind, {})
    before = {name: weight.clone() for name, weight in pipeline.transformer.named_parameters()}
    pruned = obsdiff.prune(pipeline, prompts=PROMPTS, sparsity="2:4", method=method, protect_first=0, **own)
    linears = {linear.name for linear in generic.linears(pipeline.transformer)}
    assert {layer.name for layer in pruned.layers} == linears
    for name, weight in pipeline.transformer.named_parameters():
        module, _, leaf = name.rpartition(".")
        if module not in linears:
            assert torch.equal(weight, before[name]), name
        elif leaf == "weight":
            assert (zeros_of_four(weight) >= 2).all(), name


def test_linears_that_read_the_timestep_are_left_alone(
    build_undescribed: Callable[[str], DiffusionPipeline],
) -> None:
    transformer = build_undescribed("cogview3").transformer
    names = [linear.name for linear in generic.linears(transformer)]
    assert not any("norm" in name for name in names)
    inside = [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and re.match(r"(single_)?transformer_blocks\.", name) and "norm" not in name
    ]
    assert sorted(names) == sorted(inside)


@pytest.mark.stage("saved", kind="cogview3")
def test_a_pruned_folder_loads_with_obsdiff_and_with_plain_diffusers(
    build_undescribed: Callable[[str], DiffusionPipeline], tmp_path: Path
) -> None:
    build_undescribed("cogview3").save_pretrained(tmp_path / "dense")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    prompts = str(tmp_path / "prompts.txt")
    settings = Settings(model=str(tmp_path / "dense"), sparsity="0.5", prompts_file=prompts, **SMALL)
    verbs.prune_to_folder(settings, tmp_path / "pruned")
    assert json.loads((tmp_path / "pruned" / "transformer" / "obsdiff.json").read_text())["family"] == "generic"
    ours, theirs = obsdiff.load(tmp_path / "pruned"), DiffusionPipeline.from_pretrained(tmp_path / "pruned")
    pairs = zip(ours.transformer.named_parameters(), theirs.transformer.named_parameters(), strict=True)
    for (name, one), (_, other) in pairs:
        assert torch.equal(one, other), name
    linears = generic.linears(ours.transformer)
    zeros = [int((ours.transformer.get_parameter(f"{linear.name}.weight") == 0).sum()) for linear in linears]
    assert sum(zeros) / sum(linear.in_features * linear.out_features for linear in linears) == pytest.approx(
        0.5, abs=0.02
    )


@pytest.mark.stage("saved")
@pytest.mark.parametrize("kind", ["cogview3", "cogvideox", "mochi"])
def test_eval_compares_it_with_the_dense_one(
    kind: str, build_undescribed: Callable[[str], DiffusionPipeline], tmp_path: Path
) -> None:
    pipeline, own = build_undescribed(kind), SMALL | FILMS.get(kind, {})
    pipeline.save_pretrained(tmp_path / "dense")
    obsdiff.save(obsdiff.prune(pipeline, prompts=PROMPTS, sparsity="2:4", **own), tmp_path / "pruned")
    settings = Settings(eval_prompts=1, **own)
    report = verbs.evaluate(tmp_path / "pruned", str(tmp_path / "dense"), settings).reports[0]
    assert isinstance(report.evaluation, Evaluation)
    assert 0 < report.evaluation.velocity_error < 10


def test_plan_says_that_its_macs_are_an_estimate(
    build_undescribed: Callable[[str], DiffusionPipeline], tmp_path: Path
) -> None:
    build_undescribed("cogview3").save_pretrained(tmp_path / "dense")
    plan = verbs.plan(Settings(model=str(tmp_path / "dense"), sparsity="2:4", height=64, width=64))
    assert any("MACs are an estimate" in note for note in plan.notes)
    assert plan.macs_before > 0


def test_a_plan_counts_the_frames_of_a_film_in_its_estimate(
    build_undescribed: Callable[[str], DiffusionPipeline], tmp_path: Path
) -> None:
    """As many as the denoiser says where nothing else is said."""
    build_undescribed("cogvideox").save_pretrained(tmp_path / "dense")
    settings = Settings(model=str(tmp_path / "dense"), sparsity="2:4", height=64, width=64)
    whole, one = verbs.plan(settings), verbs.plan(dataclasses.replace(settings, num_frames=1))
    assert whole.layers[0].positions == 3 * one.layers[0].positions


@pytest.mark.stage("structured", refused=True)
@pytest.mark.parametrize(
    ("kind", "sparsity"),
    [
        ("cogview3", "structured:0.2+2:4"),
        ("cogview3", "heads:0.5"),
        ("cogview3", "ffn:0.3"),
        ("cogvideox", "ffn:0.3"),
        ("mochi", "ffn:0.3"),
    ],
)
def test_units_are_refused_and_the_page_is_named(
    kind: str, sparsity: str, build_undescribed: Callable[[str], DiffusionPipeline]
) -> None:
    with pytest.raises(ConfigError, match=r"removes units.*no family describes.*docs/add-a-family\.md"):
        obsdiff.prune(build_undescribed(kind), prompts=PROMPTS, sparsity=sparsity, **SMALL)


@pytest.mark.stage("engine", "runtime", refused=True)
@pytest.mark.parametrize("kind", ["cogview3", "cogvideox", "mochi"])
def test_export_refuses_before_anything_runs(
    kind: str, build_undescribed: Callable[[str], DiffusionPipeline], tmp_path: Path
) -> None:
    build_undescribed(kind).save_pretrained(tmp_path / "dense")
    with pytest.raises(ConfigError, match=r"obsdiff export needs to know.*docs/add-a-family\.md"):
        obsdiff.export(tmp_path / "dense", tmp_path / "out", sparsity="2:4")


def test_a_denoiser_without_lists_of_blocks_is_an_error() -> None:
    with pytest.raises(ModelError, match="no lists of blocks"):
        generic.linears(nn.Sequential(nn.Linear(4, 4)))


def test_its_configuration_alone_is_not_enough_for_a_plan(
    build_undescribed: Callable[[str], DiffusionPipeline], tmp_path: Path
) -> None:
    build_undescribed("cogview3").transformer.save_config(tmp_path)
    with pytest.raises(ModelError, match="name its pipeline's folder"):
        verbs.plan(Settings(model=str(tmp_path), sparsity="2:4"))
