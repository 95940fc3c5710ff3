import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from obsdiff.card import licence_of, render, write_card
from obsdiff.measurements import NotMeasured, Report

MakeReport = Callable[..., Report]

INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusion3Pipeline",
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": [None, None],
    "tokenizer_3": [None, None],
    "image_encoder": [None, None],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
}


def split(card: str) -> tuple[dict[str, Any], str]:
    """Front matter as data, and the text below."""
    opening, front, text = card.split("---\n", 2)
    assert opening == ""
    return yaml.safe_load(front), text


def code_of(card: str) -> str:
    return card.partition("```python\n")[2].partition("\n```")[0]


def test_the_front_matter_is_what_the_hub_reads(make_report: MakeReport) -> None:
    licence = {"license": "other", "license_name": "stabilityai-ai-community", "license_link": "LICENSE.md"}
    front, _ = split(render(make_report(licence=licence), INDEX, "checkpoint", base_model="stabilityai/sd: x"))
    assert front["library_name"] == "diffusers"
    assert front["base_model"] == "stabilityai/sd: x"
    assert {"obsdiff", "pruned", "sparsity", "sd3"} <= set(front["tags"])
    assert {key: front[key] for key in licence} == licence


def test_no_base_and_no_licence_are_not_invented(make_report: MakeReport) -> None:
    front, text = split(render(make_report(), INDEX, "bundle"))
    assert "base_model" not in front
    assert "license" not in front
    assert "licence of the dense model was not found" in text


@pytest.mark.parametrize("kind", ["checkpoint", "bundle"])
@pytest.mark.parametrize("sparsity", ["2:4", "0.5", "structured:0.25"])
def test_three_lines_load_it(make_report: MakeReport, kind: Any, sparsity: str) -> None:
    code = code_of(render(make_report(sparsity=sparsity), INDEX, kind))
    compile(code, "card", "exec")
    assert len(code.splitlines()) == 3
    if kind == "bundle":
        assert "from obsdiff_runtime import Pipeline" in code
    elif sparsity.startswith("structured"):
        assert "obsdiff.load(" in code
    else:
        assert "text_encoder_3=None, tokenizer_3=None)" in code
        assert "image_encoder" not in code
        assert "max_sequence_length=1" in code


@pytest.mark.parametrize(
    ("pipeline", "kind", "told"),
    [
        ("StableDiffusionXLControlNetPipeline", "checkpoint", 'image=load_image("edges.png"), '),
        ("StableDiffusionXLControlNetPipeline", "bundle", "control=read_picture("),
        ("FluxFillPipeline", "checkpoint", 'image=load_image("picture.png"), mask_image=load_image('),
        ("FluxFillPipeline", "bundle", '", seed=1)'),
        ("QwenImageEditPlusPipeline", "checkpoint", 'image=load_image("picture.png"), '),
        ("QwenImageEditPlusPipeline", "bundle", "reference=pipeline.fit(open_picture("),
    ],
)
def test_pictures_stand_beside_the_prompt_where_they_are_needed(
    make_report: MakeReport, pipeline: str, kind: Any, told: str
) -> None:
    code = code_of(render(make_report(), INDEX | {"_class_name": pipeline}, kind))
    compile(code, "card", "exec")
    assert told in code
    for reader in ("load_image", "read_picture", "open_picture"):
        assert (f"{reader}(" in code) == (f"import {reader}" in code)


@pytest.mark.parametrize(
    ("pipeline", "told"),
    [
        ("StableDiffusion3Pipeline", "guidance_scale=3.5"),
        ("FluxPipeline", "guidance_scale=3.5"),
        ("ZImagePipeline", "guidance_scale=3.5"),
        ("QwenImagePipeline", 'true_cfg_scale=3.5, negative_prompt=""'),
        ("SanaSprintPipeline", "intermediate_timesteps=None, guidance_scale=3.5"),
    ],
)
def test_guidance_is_told_as_the_pipeline_calls_it(make_report: MakeReport, pipeline: str, told: str) -> None:
    code = code_of(render(make_report(), {**INDEX, "_class_name": pipeline}, "checkpoint"))
    assert f", {told}, max_sequence_length" in code


def test_a_prompt_with_quotes_stays_valid_python(make_report: MakeReport) -> None:
    report = make_report()
    object.__setattr__(report.evaluation.per_prompt[0], "prompt", 'say "hi"\\')  # type: ignore[union-attr]
    compile(code_of(render(report, INDEX, "checkpoint")), "card", "exec")


def test_the_table_has_four_cells_in_every_line(make_report: MakeReport) -> None:
    _, text = split(render(make_report(), INDEX, "checkpoint"))
    table = text.partition("## Before and after\n\n")[2].partition("\n\n")[0].splitlines()
    assert len(table) > 6
    assert {line.count("|") for line in table} == {5}


def test_limits_are_those_of_the_sparsity(make_report: MakeReport) -> None:
    def limits(sparsity: str) -> str:
        return render(make_report(sparsity=sparsity), INDEX, "checkpoint").partition("## Limits")[2]

    assert "TensorRT-RTX" in limits("2:4")
    assert "study of quality" in limits("50%")
    assert "obsdiff.load" in limits("structured:0.25")
    assert "obsdiff.load" not in limits("2:4")


def test_what_was_not_measured_is_said(make_report: MakeReport) -> None:
    absent = NotMeasured(why="`obsdiff prune` stops before the comparison")
    report = make_report(latency=absent, evaluation=absent, components=absent, engines=absent)
    text = render(report, INDEX, "checkpoint")
    assert "quality: not measured, `obsdiff prune` stops before the comparison" in text
    assert '"a prompt"' in code_of(text)
    assert "nan" not in text


def test_the_card_is_written_beside_model_index(make_report: MakeReport, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps(INDEX), encoding="utf-8")
    write_card(make_report(), tmp_path, "bundle", base_model="someone/model")
    assert (tmp_path / "README.md").read_text(encoding="utf-8").startswith("---\n")


def test_the_licence_comes_from_the_dense_models_card(tmp_path: Path) -> None:
    assert licence_of(tmp_path) == {}
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: openrail++\nlicense_link: LICENSE\ntags: [a]\n---\ntext", encoding="utf-8")
    assert licence_of(tmp_path) == {"license": "openrail++", "license_link": "LICENSE"}
    for broken in ("no front matter", "---\n[unclosed\n---\n", "---\n- a list\n---\n", "---\nlicense: [a, b]\n---\n"):
        card.write_text(broken, encoding="utf-8")
        assert licence_of(tmp_path) == {}
