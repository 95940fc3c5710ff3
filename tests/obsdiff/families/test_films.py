"""Pipelines that draw films (Wan): pruned and compared like the others, and what of them is refused and how."""

import copy
import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from PIL import Image

import obsdiff
from obsdiff import calls, verbs
from obsdiff.defaults import Defaults
from obsdiff.evaluation import Evaluation, evaluate
from obsdiff.families import films, wan
from obsdiff.families.autoencoders import use_tiles
from obsdiff.pipeline_runner import PipelineRunner
from obsdiff.recipe import Sampling, select
from obsdiff.resolving import resolve
from obsdiff.settings import Settings
from obsdiff.shrinking import shrink
from obsdiff_runtime.autoencoder import cached
from obsdiff_runtime.benchmark.runner import Request
from obsdiff_runtime.bundle import DECODER, NEXT_DECODER, open_bundle
from obsdiff_runtime.errors import ConfigError, ModelError
from obsdiff_runtime.pipeline import Pipeline

PROMPTS = ["a red dog", "a cat"]
SMALL: dict[str, Any] = {"steps": 2, "height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 8}
SMALL_LTX: dict[str, Any] = SMALL | {"height": 64, "width": 64}

Build = Callable[..., Any]


@pytest.fixture
def folder(build_pipeline: Build, tmp_path: Path) -> Path:
    build_pipeline("wan").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def test_a_film_has_the_frames_that_its_pipeline_draws() -> None:
    pixels = inspect.signature(WanPipeline.__call__).parameters["num_frames"].default
    assert (pixels - 1) // 4 + 1 == wan.FRAMES


@torch.no_grad()
def test_a_shrunk_wan_takes_any_size_and_length(build_denoiser: Build) -> None:
    denoiser = build_denoiser("wan", num_layers=1, cross_attn_norm=False)
    shrink(denoiser, wan, {"blocks.0.ffn.neurons": [1, *range(5, 12)]})
    component = wan.component(denoiser, height=64, width=64)
    others = [
        wan.example(denoiser, batch=batch, size=size, text_tokens=length, pixels=(64, 64))
        for batch, length, size in ((1, 1, (1, 2, 2)), (3, 20, (3, 6, 14)), (2, 5, (9, 10, 4)))
    ]
    for inputs in others:
        torch.testing.assert_close(component.module(**inputs), denoiser(**inputs).sample, rtol=0, atol=1e-5)


def test_a_folder_is_pruned_and_compared_and_its_card_makes_a_film(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    prompts = str(tmp_path / "prompts.txt")
    settings = Settings(
        model=str(folder),
        sparsity="ffn:0.25+2:4",
        allocation="uniform",
        prompts_file=prompts,
        protect_first=0,
        protect_last=0,
        align=4,
        **SMALL,
    )
    verbs.prune_to_folder(settings, tmp_path / "pruned")
    card = (tmp_path / "pruned" / "README.md").read_text()
    assert "pipeline_tag: text-to-video" in card
    assert 'export_to_video(pipeline("a prompt").frames[0], "film.mp4")' in card
    report = verbs.evaluate(tmp_path / "pruned", str(folder), Settings(eval_prompts=1, **SMALL)).reports[0]
    assert isinstance(report.evaluation, Evaluation)
    assert 0 < report.evaluation.velocity_error < 10
    assert report.pruned.parameters < report.dense.parameters


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.stage("engine", kind="wan22")
def test_the_main_job_leaves_a_bundle_that_draws_the_film_of_the_pruned_pipeline(
    build_pipeline: Build, tmp_path: Path
) -> None:
    """Of two denoisers that take turns."""
    names = ("transformer", "transformer_2")
    build_pipeline("wan22", num_layers=1).save_pretrained(tmp_path / "dense")
    small = {**SMALL, "steps": 4, "guidance_scale": 4.0, "guidance_scale_2": 3.0}
    how = {
        "sparsity": "ffn:0.25+2:4",
        "method": "magnitude",
        "align": 4,
        "protect_first": 0,
        "eval_prompts": 0,
        **small,
    }
    verbs.prune_to_folder(Settings(model=str(tmp_path / "dense"), **how), tmp_path / "pruned")
    told = {"trt": True, "targets": ["8.9"], "dtype": "fp32", "no_cache": True, "vae_tile": 16}
    exported = obsdiff.export(tmp_path / "dense", tmp_path / "out", **told, **how)
    bundle = open_bundle(tmp_path / "out")
    following = bundle.component(NEXT_DECODER)
    assert bundle.component(DECODER).engines
    last = following.inputs[-1]  # of what it is told of the frames before, sides follow those of the latents
    limits = following.engines[0].profiles[0][last.name]
    assert (limits.min[-2:], limits.max[-2:]) == ((4, 4), (16, 16))  # a tile or a part of it, though a film has 32
    for name in names:
        engine = bundle.component(name).engines[0]
        assert engine.sparse_requested
        assert engine.receipt
    assert bundle.manifest.turns == {"transformer": 875.0, "transformer_2": 0.0}
    assert bundle.manifest.defaults.guidance_scale_2 == 3.0
    assert [pair.what for pair in exported.report.latency] == [f"one call of {name}" for name in names]
    assert exported.report.recipe["sampling"]["num_frames"] == 9
    assert (
        'films.write(pipeline("a prompt", seed=1).arrays[0], "film.webp")' in (tmp_path / "out/README.md").read_text()
    )
    drawn = Pipeline(tmp_path / "out", threads=1)("a cat", seed=3, noise_source="torch")
    pipeline = obsdiff.load(tmp_path / "pruned")
    pipeline.set_progress_bar_config(disable=True)
    use_tiles(pipeline.vae, 16)  # as the bundle does of itself
    film = pipeline(
        prompt="a cat",
        num_inference_steps=4,
        guidance_scale=4.0,
        guidance_scale_2=3.0,
        height=32,
        width=32,
        num_frames=9,
        max_sequence_length=8,
        generator=torch.Generator().manual_seed(3),
    ).frames
    assert drawn.arrays.shape == film.shape == (1, 9, 32, 32, 3)
    assert np.mean((film - drawn.arrays / 255) ** 2) < 10**-5.8  # 58 dB


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.stage("engine", kind="ltx")
@pytest.mark.parametrize("version", ["ltx", "ltx_condition"])
def test_the_main_job_on_ltx_leaves_a_bundle_that_draws_the_film_of_the_pruned_pipeline(
    version: str, build_pipeline: Build, tmp_path: Path
) -> None:
    build_pipeline(version).save_pretrained(tmp_path / "dense")
    how = {"sparsity": "ffn:0.25+2:4", "align": 4, "protect_first": 0, "eval_prompts": 1, **SMALL_LTX}
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    how["prompts_file"] = str(tmp_path / "prompts.txt")
    verbs.prune_to_folder(Settings(model=str(tmp_path / "dense"), **how), tmp_path / "pruned")
    named = "" if version == "ltx" else "prompt="  # which is not the first argument of the other's call
    assert f'export_to_video(pipeline({named}"a prompt")' in (tmp_path / "pruned" / "README.md").read_text()
    told = {"trt": True, "targets": ["8.9"], "dtype": "fp32", "no_cache": True}
    exported = obsdiff.export(tmp_path / "dense", tmp_path / "out", **told, **how)
    assert isinstance(exported.report.evaluation, Evaluation)
    assert exported.report.recipe["sampling"]["frame_scale"] == 8
    bundle = open_bundle(tmp_path / "out")
    assert bundle.component("transformer").engines[0].sparse_requested
    (profile,) = bundle.component(DECODER).engines[0].profiles
    assert profile["latent_sample"].opt == (1, 4, 2, 2, 2)
    drawn = Pipeline(tmp_path / "out", threads=1)("a cat", seed=3, noise_source="torch")
    pipeline = obsdiff.load(tmp_path / "pruned")
    pipeline.set_progress_bar_config(disable=True)
    film = pipeline(
        prompt="a cat",
        num_inference_steps=2,
        height=64,
        width=64,
        num_frames=9,
        max_sequence_length=8,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).frames
    assert drawn.arrays.shape == film.shape == (1, 9, 64, 64, 3)
    assert np.mean((film - drawn.arrays / 255) ** 2) < 10**-5.8  # 58 dB


def test_ltx_of_the_first_version_has_its_published_size_and_reads_all_frames_at_once(tmp_path: Path) -> None:
    """A film of 161 frames, 512 x 704: 21 latent frames of 16 x 22 pixels. Only neurons can go."""
    for name, billions in (("ltx_video_2b", 1.9), ("ltx_video_13b", 13.0)):
        config = json.loads((Path(__file__).parent.parent / "configs" / f"{name}.json").read_text())
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        plan = verbs.plan(Settings(model=str(tmp_path / name), sparsity="2:4", method="magnitude"))
        assert round(plan.parameters_before / 1e9, 1) == billions
        assert plan.layers[0].positions == 21 * 16 * 22
        short = verbs.plan(Settings(model=str(tmp_path / name), sparsity="2:4", method="magnitude", num_frames=9))
        assert short.layers[0].positions == 2 * 16 * 22
    asked = Settings(model=str(tmp_path / "ltx_video_2b"), sparsity="heads:0.25")
    with pytest.raises(ConfigError, match="no head of this denoiser can go"):
        verbs.plan(asked)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_inject_noise": (True, False, False, False, False)}, r"adds noise .* 0\.9\.1"),
        ({"spatial_compression_ratio": 16}, "a latent pixel of 16 pixels a side, and a latent frame of 8 frames"),
    ],
)
def test_autoencoders_of_other_versions_of_ltx_are_refused(
    changes: dict[str, Any], message: str, build_pipeline: Build
) -> None:
    vae = build_pipeline("ltx").vae
    vae.register_to_config(**changes)
    with pytest.raises(ModelError, match=message):
        films.whole_decoder(vae, height=64, width=64)


def test_a_pipeline_in_torch_is_measured_by_its_films(folder: Path) -> None:
    runner = PipelineRunner(folder, vae_tiling=16)
    told = {"prompt": "a cat", "num_inference_steps": 2, "guidance_scale": 5.0, "max_sequence_length": 8, "seed": 3}
    request = Request(height=32, width=32, num_images=1, num_frames=5, **told)  # type: ignore[arg-type]
    runner.check(request)
    runner.load(request)
    drawn = runner.draw(request)
    assert drawn.pictures.shape == (1, 5, 32, 32, 3)
    assert len(drawn.components["vae_decoder"]) == 2 * 3**2  # latent frames, tiles
    assert runner.subject.vae_tile == 16
    assert runner.defaults.num_frames == 81
    with pytest.raises(ConfigError, match="num_frames 6: a film has"):
        runner.check(replace(request, num_frames=6))


@torch.no_grad()
def test_the_pictures_that_are_compared_are_four_frames_of_the_film(build_pipeline: Build) -> None:
    pipeline = build_pipeline("wan")
    sampling = Sampling(
        num_inference_steps=2,
        guidance_scale=3.0,
        height=32,
        width=48,
        max_sequence_length=8,
        batch_size=2,
        seed=0,
    )
    pruned = copy.deepcopy(pipeline.transformer)
    pruned.proj_out.weight.mul_(1.1)
    pruned.proj_out.bias.mul_(1.1)
    evaluation, pairs = evaluate(
        pipeline, wan, dense=pipeline.transformer, pruned=pruned, prompts=PROMPTS, sampling=sampling
    )
    assert evaluation.velocity_error_per_step == pytest.approx([0.01] * 2, rel=1e-3)
    film = pipeline(
        prompt=PROMPTS,
        num_inference_steps=2,
        guidance_scale=3.0,
        height=32,
        width=48,
        max_sequence_length=8,
        generator=[torch.Generator().manual_seed(seed) for seed in range(2)],
    ).frames[1]
    assert film.shape == (81, 32, 48, 3)
    expected = np.rint(film[[0, 27, 53, 80]].reshape(4 * 32, 48, 3) * 255)
    assert np.array_equal(pairs[1].dense, expected)
    assert evaluation.image_mse > 0


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 2, 6])
@pytest.mark.parametrize("patch", [None, 2])
def test_the_two_decoders_make_a_film_of_any_length_as_the_autoencoder_does(
    build_pipeline: Build, frames: int, patch: int | None
) -> None:
    vae = build_pipeline("wan", patch=patch).vae
    first, following = films.decoders(vae, height=32, width=48)
    latents = torch.randn(2, 4, frames, 6, 5, generator=torch.Generator().manual_seed(0))
    pixels, *caches = first.module(latents[:, :, 0])
    for frame in latents.unbind(2)[1:]:
        told = {cached(index): cache for index, cache in enumerate(caches)}
        more, *caches = following.module(frame, **told)
        pixels = torch.cat([pixels, more], dim=2)
    assert torch.equal(pixels.clamp(-1, 1), vae.decode(latents).sample)


def test_another_autoencoder_is_refused(build_pipeline: Build) -> None:
    vae = build_pipeline("wan").vae
    vae.register_to_config(temperal_downsample=[False, True])
    with pytest.raises(ModelError, match="another number of frames than 4"):
        films.decoders(vae, height=32, width=32)


@pytest.mark.parametrize(
    ("frames", "near"), [(32, "29 and 33"), (2, "1 and 5"), (0, "1 and 5"), (-5, "1 and 5"), (84, "81 and 85")]
)
def test_a_number_of_frames_that_no_film_has_is_refused(folder: Path, frames: int, near: str) -> None:
    with pytest.raises(ConfigError, match=rf"--num-frames {frames}: .* multiple of 4 behind it; near are {near}"):
        verbs.plan(Settings(model=str(folder), sparsity="2:4", num_frames=frames))


def test_pictures_have_no_frames(build_pipeline: Build) -> None:
    with pytest.raises(ConfigError, match="--num-frames 5: this pipeline draws pictures; leave it out"):
        obsdiff.prune(build_pipeline("sana"), prompts=PROMPTS, sparsity="2:4", num_frames=5)


def test_a_shorter_film_is_planned_and_drawn_as_long_as_it_is(folder: Path, build_pipeline: Build) -> None:
    """One latent frame in place of 21, and attention that grows with the square of them."""
    whole, short = (
        verbs.plan(Settings(model=str(folder), sparsity="2:4", num_frames=frames)).macs_before for frames in (None, 1)
    )
    assert whole > 20 * short
    pipeline, seen = build_pipeline("wan"), []
    pipeline.transformer.register_forward_pre_hook(
        lambda _, __, told: seen.append(told["hidden_states"].shape[2]), with_kwargs=True
    )
    obsdiff.prune(pipeline, prompts=PROMPTS, sparsity="2:4", **SMALL)
    assert set(seen) == {3}


def test_a_size_that_its_pipeline_would_round_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"--width 36: must be a multiple of 8; near are 32 and 40"):
        verbs.plan(Settings(model=str(folder), sparsity="2:4", height=32, width=36))


@pytest.mark.parametrize("sparsity", ["heads:0.25", "structured:0.25+2:4"])
def test_heads_stay_because_they_are_normalised_together(sparsity: str, build_denoiser: Build) -> None:
    denoiser = build_denoiser("wan")
    defaults = Defaults(height=32, width=32, num_inference_steps=2, guidance_scale=1.0)
    recipe = resolve(Settings(sparsity=sparsity), model="", family=wan, defaults=defaults, prompts=["a cat"])
    with pytest.raises(ConfigError, match=r"no head of this denoiser can go.*ffn:0\.25 removes"):
        select(recipe, wan.linears(denoiser), wan.groups(denoiser))


def test_fused_projections_are_refused(build_denoiser: Build) -> None:
    denoiser = build_denoiser("wan")
    denoiser.blocks[1].attn2.fuse_projections()
    with pytest.raises(ModelError, match=r"blocks\.1\.attn2: its projections are fused; call unfuse"):
        wan.linears(denoiser)


def test_patches_of_the_autoencoder_count_in_what_a_latent_pixel_is(tmp_path: Path) -> None:
    """Of the size that Wan 2.2 TI2V 5B is made for; widths and strides as its own repository has them."""
    config = json.loads((Path(__file__).parent.parent / "configs" / "wan22_ti2v_5b.json").read_text())
    vae = {"_class_name": "AutoencoderKLWan", "temperal_downsample": [False, True, True], "patch_size": 2, "z_dim": 48}
    vae |= {"in_channels": 12, "out_channels": 12, "base_dim": 160, "decoder_base_dim": 256, "is_residual": True}
    index = {"_class_name": "WanPipeline", "expand_timesteps": True}
    for name, own in (("transformer", config), ("vae", vae)):
        index[name] = ["diffusers", own["_class_name"]]
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(own))
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    asked: dict[str, Any] = {"model": str(tmp_path), "sparsity": "2:4", "method": "magnitude"}
    plan = verbs.plan(Settings(**asked, height=704, width=1280, num_frames=121))
    assert 4.9e9 < plan.parameters_before < 5.1e9  # 5 B, says the model's card
    assert plan.layers[0].positions == 31 * (704 // 32) * (1280 // 32)
    assert plan.decoding is not None
    with pytest.raises(ConfigError, match="--height 720: must be a multiple of 32; near are 704 and 736"):
        verbs.plan(Settings(**asked, height=720, width=1280))
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    told = verbs.plan(Settings(**asked, height=704, width=1280, num_frames=121, references=str(tmp_path)))
    assert told.macs_before == plan.macs_before  # the picture is one of the film's frames


@torch.no_grad()
@pytest.mark.stage("weights", "structured", "saved", kind="wan_ti2v")
def test_one_timestep_stands_for_equal_ones_of_all_tokens(build_pipeline: Build, tmp_path: Path) -> None:
    """Calibration and comparison tell the denoiser one; what was pruned draws the same by diffusers' own calls."""
    pipeline, told = build_pipeline("wan", patch=2), []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda _, __, given: told.append(given["timestep"].ndim), with_kwargs=True
    )
    size = {**SMALL, "align": 4, "draws": 1, "protect_first": 0, "protect_last": 0, "allocation": "uniform"}
    pruned = obsdiff.prune(pipeline, prompts=PROMPTS, sparsity="ffn:0.25+2:4", **size)
    assert pruned.kept
    assert set(told) == {1}
    obsdiff.save(pruned, tmp_path / "out")
    loaded: Any = obsdiff.load(tmp_path / "out")
    loaded.set_progress_bar_config(disable=True)
    assert loaded.config.expand_timesteps
    films = [
        draw(
            prompt="a cat",
            num_inference_steps=2,
            height=32,
            width=32,
            num_frames=9,
            generator=torch.Generator().manual_seed(3),
            output_type="latent",
        )[0]
        for draw in (calls.call(pipeline), pipeline, loaded)
    ]
    hook.remove()
    assert set(told) == {1, 2}
    assert torch.equal(films[1], films[2])
    torch.testing.assert_close(films[0], films[1], rtol=0, atol=1e-5)


def test_what_diffusers_keeps_in_float32_stays_in_float32(folder: Path, tmp_path: Path) -> None:
    """The first parameter of a Wan is one of these, and says nothing of the others."""
    mixed = WanPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    mixed.save_pretrained(tmp_path / "mixed")
    settings = Settings(model=str(tmp_path / "mixed"), sparsity="2:4", method="magnitude", **SMALL)
    verbs.prune_to_folder(settings, tmp_path / "pruned")
    expected = {name: parameter.dtype for name, parameter in mixed.transformer.named_parameters()}
    assert set(expected.values()) == {torch.float32, torch.bfloat16}
    for loaded in (obsdiff.load(tmp_path / "pruned"), obsdiff.load(tmp_path / "pruned", dtype=torch.bfloat16)):
        assert {name: each.dtype for name, each in loaded.transformer.named_parameters()} == expected
        assert loaded.text_encoder.dtype == torch.bfloat16
