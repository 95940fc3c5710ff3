"""Reference pictures in calibration, comparison and plans: FLUX.1 Kontext and FLUX.2."""

import copy
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from PIL import Image, ImageOps

import obsdiff
from kinds import masked_before_the_cut
from obsdiff import calibration, pictures, trajectories, verbs
from obsdiff.evaluation import evaluate
from obsdiff.families import references
from obsdiff.families.exporting import components
from obsdiff.families.table import family_of
from obsdiff.recipe import Sampling
from obsdiff.sampling import velocity_of
from obsdiff.settings import Settings
from obsdiff.sizes import sizes_of
from obsdiff_export.build import BUILDERS, build
from obsdiff_export.onnx import export
from obsdiff_export.profiles import profiles_for
from obsdiff_runtime.errors import ConfigError, ModelError
from obsdiff_runtime.references import PLACES, STATES, TOKENS
from obsdiff_runtime.seeing import TOKENS as SEEN
from obsdiff_runtime.seeing import WINDOWS, grid_of, windows_of

PROMPTS = ["a red circle", "a blue square", "a star"]
SIZES = {"height": 64, "width": 80}
STEPS = 2
Build = Callable[..., Any]


def sampling(picture_folder: Path | None, **changes: Any) -> Sampling:
    files = () if picture_folder is None else (str(picture_folder / "a.jpg"), str(picture_folder / "b.png"))
    given = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "max_sequence_length": 30, "batch_size": 3, "seed": 0}
    return Sampling(**{**given, **SIZES, "references": files, **changes})


@pytest.mark.parametrize("kind", ["kontext", "flux2"])
def test_calibration_draws_what_diffusers_draws_of_prompt_and_picture(
    kind: str, build_pipeline: Build, picture_folder: Path
) -> None:
    """Of a batch whose prompts have pictures of their own, beside diffusers given them one at a time."""
    pipeline = build_pipeline(kind)
    asked = sampling(picture_folder)
    prompts = calibration.encode(pipeline, family_of(pipeline.transformer), PROMPTS, asked)
    seen: list[Any] = []
    hook = pipeline.transformer.register_forward_pre_hook(lambda _, __, told: seen.append(told), with_kwargs=True)
    found = calibration.sample(pipeline, prompts, range(3), asked)
    hook.remove()
    alone = []
    for row, prompt in enumerate(PROMPTS):
        image = Image.open(asked.references[row % 2]).convert("RGB")
        image = ImageOps.fit(image, (SIZES["width"], SIZES["height"]), Image.Resampling.LANCZOS)
        own = {"_auto_resize": False, "max_area": SIZES["width"] * SIZES["height"]} if kind == "kontext" else {}
        with torch.no_grad():
            alone.append(
                pipeline(
                    image=image if kind == "kontext" else [image],
                    prompt=prompt,
                    generator=torch.Generator().manual_seed(row),
                    num_inference_steps=STEPS,
                    guidance_scale=3.0,
                    max_sequence_length=30,
                    output_type="latent",
                    **SIZES,
                    **own,
                )[0]
            )
    torch.testing.assert_close(found, torch.cat(alone), atol=1e-4, rtol=1e-4)
    plain = calibration.encode(pipeline, family_of(pipeline.transformer), PROMPTS, sampling(None))
    assert (calibration.sample(pipeline, plain, range(3), sampling(None)) - found).abs().max() > 1e-2
    drawn = pictures.drawn(seen[0])
    assert drawn is not None
    assert len(drawn) == 2 * int(drawn.sum())  # as many tokens of a picture as of what is drawn
    assert bool(drawn[: len(drawn) // 2].all())


@pytest.mark.parametrize("kind", ["kontext", "flux2"])
def test_what_nobody_reads_is_not_measured(kind: str, build_pipeline: Build, picture_folder: Path) -> None:
    """Of velocities tokens of pictures count nothing; of blocks they do."""
    pipeline = build_pipeline(kind)
    family = family_of(pipeline.transformer)
    asked = sampling(picture_folder, guidance_scale=1.0)
    prompts = calibration.encode(pipeline, family, PROMPTS, asked)
    calls = trajectories.record(pipeline, family, prompts, asked, computed_steps=1, kept_steps=1)
    (call,) = calls
    half = call.arguments[1]["hidden_states"].shape[1] // 2
    assert not call.masks
    whole = torch.randn(3, 2 * half, 16)
    assert torch.equal(velocity_of(pipeline.transformer, (whole,), call.arguments[1]), whole[:, :half])


def test_grams_count_tokens_of_pictures_as_those_of_what_is_drawn(build_pipeline: Build, picture_folder: Path) -> None:
    pipeline = build_pipeline("kontext")
    family = family_of(pipeline.transformer)
    (linear,) = (each for each in family.linears(pipeline.transformer) if each.name == "transformer_blocks.1.attn.to_q")
    asked = sampling(picture_folder)
    prompts = calibration.encode(pipeline, family, PROMPTS, asked)
    seen: list[torch.Tensor] = []
    hook = pipeline.transformer.get_submodule(linear.name).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].double().flatten(0, 1))
    )
    grams = calibration.calibrate(pipeline, family, [linear], prompts, asked, time_weights="uniform")
    hook.remove()
    assert {len(each) for each in seen} == {3 * 2 * (64 * 80 // 4**2)}
    counted = torch.cat(seen)
    assert grams[linear.reads].tokens == len(counted)
    torch.testing.assert_close(grams[linear.reads].matrix, counted.T @ counted / len(counted), atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return {}


@pytest.fixture
def editor(picture_folder: Path, build_pipeline: Build, made: dict[str, Any]) -> tuple[Any, torch.nn.Module]:
    """FLUX.1 Kontext pruned on pictures by the default method, and its denoiser before it was cut; made once."""
    if "editor" not in made:
        made["editor"] = pruned_on(picture_folder, build_pipeline("kontext"))
    found: tuple[Any, torch.nn.Module] = made["editor"]
    return found


def pruned_on(picture_folder: Path, pipeline: Any, max_sequence_length: int = 6) -> tuple[Any, torch.nn.Module]:
    with pytest.MonkeyPatch.context() as patch:
        masked = masked_before_the_cut(patch)
        pruned = obsdiff.prune(
            pipeline,
            sparsity="structured:0.25+2:4",
            prompts=PROMPTS,
            references=str(picture_folder),
            steps=STEPS,
            draws=1,
            max_sequence_length=max_sequence_length,
            protect_first=0,
            protect_last=0,
            align=4,
            allocation="uniform",
            height=32,
            width=32,
        )
    return pruned, masked[0]


def told(denoiser: Any, pipeline_class: str = "FluxKontextPipeline") -> dict[str, Any]:
    """Arguments of a call with 12 tokens of a picture."""
    family = family_of(denoiser)
    inputs = family.example(denoiser, batch=2, size=(12, 16), text_tokens=7, pixels=(24, 32))
    inputs |= references.example(denoiser, pipeline_class, batch=2, tokens=12)
    return family.arguments(inputs)


@pytest.mark.stage("weights", "structured", "saved", kind="kontext")
def test_an_editor_that_was_pruned_on_pictures_is_cut_and_comes_back(
    editor: tuple[Any, torch.nn.Module], tmp_path: Path
) -> None:
    pruned, masked = editor
    check_cut(pruned, masked, tmp_path, "FluxKontextPipeline")
    recipe = pruned.to_json()["recipe"]
    assert recipe["sampling"]["references"] == 2
    assert recipe["references_sha256"]


def check_cut(pruned: Any, masked: torch.nn.Module, folder: Path, pipeline_class: str) -> None:
    """The cut denoiser is the masked one, holds the pattern and comes back from a folder."""
    given = told(masked, pipeline_class)
    with torch.no_grad():
        expected = masked(**given, return_dict=False)[0]
        found = pruned.denoiser(**given, return_dict=False)[0]
    assert pruned.kept
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()  # sums over fewer terms in another order
    for layer in pruned.layers:
        if layer.pattern.endswith("2:4"):
            weight = pruned.denoiser.get_submodule(layer.name).weight
            assert bool(((weight.unflatten(1, (-1, 4)) == 0).sum(-1) >= 2).all()), layer.name
    obsdiff.save(pruned, folder / "out")
    loaded = obsdiff.load(folder / "out")
    assert type(loaded).__name__ == pipeline_class
    with torch.no_grad():
        assert torch.equal(loaded.transformer(**given, return_dict=False)[0], found)


@pytest.mark.stage("weights", "structured", "saved", kind="qwen_edit")
def test_qwen_image_edit_is_pruned_on_what_diffusers_draws_of_pictures(
    build_pipeline: Build, picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its text encoder looks at the picture of each prompt, and is told where that is, as the model was trained."""
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 64 * 96)
    pipeline = build_pipeline("qwen_edit", num_layers=2)
    family = family_of(pipeline.transformer)
    asked = sampling(picture_folder, height=64, width=96, max_sequence_length=100)
    with pytest.raises(ConfigError, match="draws nothing without one; give some: --references"):
        calibration.encode(pipeline, family, PROMPTS, sampling(None))
    found = calibration.sample(pipeline, calibration.encode(pipeline, family, PROMPTS, asked), range(3), asked)

    def tell(_: Any, args: Any, given: dict[str, Any]) -> Any:  # diffusers 0.42 does not
        types = pipeline.processor.create_mm_token_type_ids(given["input_ids"])
        return args, {**given, "mm_token_type_ids": torch.tensor(types)}

    hook = pipeline.text_encoder.register_forward_pre_hook(tell, with_kwargs=True)
    for row, prompt in enumerate(PROMPTS):
        image = ImageOps.fit(Image.open(asked.references[row % 2]), (96, 64), Image.Resampling.LANCZOS)
        generator = torch.Generator().manual_seed(row)
        given = {"num_inference_steps": STEPS, "true_cfg_scale": 3.0, "negative_prompt": "", "generator": generator}
        with torch.no_grad():
            alone = pipeline(image=[image], prompt=prompt, height=64, width=96, output_type="latent", **given)[0]
        torch.testing.assert_close(found[row], alone[0], atol=1e-4, rtol=1e-4)
    hook.remove()
    pruned, masked = pruned_on(picture_folder, pipeline, max_sequence_length=100)
    check_cut(pruned, masked, tmp_path, "QwenImageEditPlusPipeline")


@pytest.mark.slow
@pytest.mark.stage("engine", kind="kontext")
def test_the_real_builder_takes_a_graph_that_is_told_pictures_or_none(build_pipeline: Build, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    denoiser = build_pipeline("kontext", num_layers=1, num_single_layers=1).transformer
    family = family_of(denoiser)
    component = references.component(family, denoiser, "FluxKontextPipeline", height=32, width=32, vae_scale=2)
    model = export(component, tmp_path / "transformer", dtype=torch.float16)
    ports = {port.name: (port.dtype, port.shape) for port in model.inputs}
    assert ports[PLACES] == ("float", (TOKENS, 3))  # places are counted, and float16 ends at 2048
    sizes = {"batch": (1, 1, 4), "height": 16, "width": 16, "text_tokens": (6, 6, 20), TOKENS: (0, 64, 128)}
    engine = build(
        model.path,
        tmp_path / "engines",
        builder=BUILDERS["tensorrt_rtx"],
        profiles=profiles_for(model.inputs, [sizes]),
        targets=("8.9",),
    )
    limits = engine.profiles[0][STATES]
    assert (limits.min[1], limits.opt[1], limits.max[1]) == (0, 64, 128)


def test_engines_of_a_text_encoder_that_looks_at_pictures_take_longer_text(picture_folder: Path) -> None:
    """A picture of the served shape at best, two of any at most; its windows are those of one, square or slender."""
    asked, same = sampling(picture_folder, height=1024, width=1024), {"rows": 2, "vae_scale": 8, "template_tokens": 64}
    sizes = sizes_of(asked, "QwenImageEditPlusPipeline", {}, text_tokens=30 + 196, **same)
    most = max(math.prod(grid_of(width, 100, 384 * 384)) for width in range(100, 400))
    windows = max(windows_of(width, 100, 384 * 384) for width in range(100, 400))
    assert sizes[SEEN] == (1, 196, 470)
    assert 2 * most <= 470
    assert sizes["text_tokens"] == (31, 226, 500)
    assert sizes["sequence"] == (95, 290, 564)
    assert sizes[WINDOWS] == (1, 16, 24)
    assert windows <= 24
    assert sizes[TOKENS] == (0, 4096, 8192)


@pytest.mark.slow
@pytest.mark.stage("engine", kind="qwen_edit")
@pytest.mark.parametrize("name", ["vision_encoder", "transformer"])
def test_the_real_builder_takes_what_looks_at_pictures(name: str, build_pipeline: Build, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    pipeline = build_pipeline("qwen_edit", num_layers=1)
    parts = components(family_of(pipeline.transformer), pipeline, height=32, width=32)
    (component,) = (each for each in parts if each.name == name)
    model = export(component, tmp_path / name, dtype=torch.float16)
    sizes = {"batch": (1, 1, 4), "height": 16, "width": 16, "text_tokens": (6, 6, 20), TOKENS: (0, 64, 128)}
    builder, profiles = BUILDERS["tensorrt_rtx"], profiles_for(model.inputs, [sizes | {WINDOWS: (1, 16, 24)}])
    engine = build(model.path, tmp_path / "engines", builder=builder, profiles=profiles, targets=("8.9",))
    limits = engine.profiles[0]["pixel_values" if name == "vision_encoder" else STATES]
    assert (limits.min[0], limits.max[0]) == (1, 24 if name == "vision_encoder" else 4)


def test_a_plan_counts_one_picture_where_some_are_given_and_says_so_where_not(
    build_pipeline: Build, picture_folder: Path, tmp_path: Path
) -> None:
    build_pipeline("kontext").save_pretrained(tmp_path / "model")
    asked = {"model": str(tmp_path / "model"), "sparsity": "2:4", "height": 32, "width": 32, "max_sequence_length": 6}
    plans = {name: verbs.plan(Settings(**asked, references=name)) for name in (None, str(picture_folder))}
    for name, plan in plans.items():
        tokens = {layer.name: layer.positions for layer in plan.layers}
        pictures_of_image = 1 if name is None else 2
        assert tokens["transformer_blocks.0.attn.to_q"] == pictures_of_image * 64
        assert tokens["single_transformer_blocks.0.proj_mlp"] == pictures_of_image * 64 + 6
        assert any("calibration told it none" in note for note in plan.notes) == (name is None)


@pytest.mark.parametrize(
    ("name", "scale", "expected"),
    [
        ("FluxKontextPipeline", 8, (0, 512 * 512 // 256, 800 * 1328 // 256)),
        ("Flux2KleinPipeline", 16, (0, 512 * 512 // 256, 2 * 1024 * 1024 // 256)),
        ("FluxPipeline", 8, None),
    ],
)
def test_engines_hold_pictures_as_large_as_they_are_fitted(name: str, scale: int, expected: Any) -> None:
    asked = sampling(None, height=512, width=512)
    sizes = sizes_of(asked, name, {"in_channels": 64}, rows=1, text_tokens=6, vae_scale=scale)
    assert sizes.get(TOKENS) == expected


def test_comparison_tells_both_models_pictures(build_pipeline: Build, picture_folder: Path) -> None:
    """A pruned model that is the dense one has no error, whatever it is told; told others it draws others."""
    pipeline = build_pipeline("flux2")
    drawn = []
    for files in (picture_folder, None):
        asked = sampling(files, height=32, width=32)
        evaluation, images = evaluate(
            pipeline,
            family_of(pipeline.transformer),
            dense=pipeline.transformer,
            pruned=copy.deepcopy(pipeline.transformer),
            prompts=PROMPTS,
            sampling=asked,
        )
        assert evaluation.velocity_error == 0
        drawn.append(np.stack([each.dense for each in images]).astype(int))
    assert np.abs(drawn[0] - drawn[1]).max() > 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("FluxControlPipeline", "flux"),
        ("Flux2KleinKVPipeline", "flux2"),
        ("QwenImageEditInpaintPipeline", "qwen"),
        ("ZImageOmniPipeline", "zimage"),
        ("SanaSprintImg2ImgPipeline", "sana_sprint"),
    ],
)
def test_a_pipeline_that_tells_the_networks_other_things_is_refused(
    name: str, kind: str, build_pipeline: Build, tmp_path: Path
) -> None:
    parts = build_pipeline(kind).components
    known = inspect.signature(getattr(diffusers, name).__init__).parameters
    pipeline = getattr(diffusers, name)(**{part: parts.get(part) for part in known if part != "self"})
    with pytest.raises(ModelError, match=f"of pipelines with this denoiser .*, not {name}"):
        obsdiff.prune(pipeline, sparsity="2:4", prompts=PROMPTS)
    pipeline.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=f"not {name}"):
        verbs.plan(Settings(model=str(tmp_path / "model"), sparsity="2:4"))


def test_a_folder_of_pictures_is_listed_and_refused_where_there_are_none(
    build_pipeline: Build, picture_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"--references .*: holds no picture"):
        obsdiff.prune(build_pipeline("kontext"), sparsity="2:4", prompts=PROMPTS, references=str(tmp_path))
    with pytest.raises(ConfigError, match="this pipeline's denoiser is told no pictures"):
        obsdiff.prune(build_pipeline("flux"), sparsity="2:4", prompts=PROMPTS, references=str(picture_folder))
