"""Films of LTX-Video that begin with a picture, which stands in place of the first frame: calibrated and compared."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LTXImageToVideoPipeline
from diffusers.pipelines.ltx import pipeline_ltx_condition, pipeline_ltx_image2video
from PIL import Image, ImageOps

import obsdiff
from obsdiff import calibration, glances, trajectories, verbs
from obsdiff.card import write_card
from obsdiff.evaluation import Evaluation
from obsdiff.families import films, ltx, parts
from obsdiff.families.exporting import components
from obsdiff.families.references import masked
from obsdiff.recipe import Sampling
from obsdiff.sampling import velocity_of
from obsdiff.settings import Settings
from obsdiff.sizes import sizes_of
from obsdiff_export.ports import Port
from obsdiff_export.profiles import profiles_for

PROMPTS = ["a red dog", "a cat", "a star"]
VERSIONS = ("ltx", "ltx_condition", "ltx_i2v")
SIZES: dict[str, Any] = {"height": 64, "width": 96, "num_frames": 17}
Build = Callable[..., Any]


def asked(files: tuple[str, ...], **changes: Any) -> Sampling:
    given = {"num_inference_steps": 3, "guidance_scale": 3.0, "batch_size": 3, "seed": 0, "max_sequence_length": 12}
    return Sampling(references=files, frame_scale=8, **{**given, **SIZES, **changes})


@pytest.fixture
def files(picture_folder: Path) -> tuple[str, ...]:
    return str(picture_folder / "a.jpg"), str(picture_folder / "b.png")


@torch.no_grad()
@pytest.mark.parametrize("version", VERSIONS)
def test_calibration_draws_what_diffusers_draws_of_prompt_and_picture(
    version: str, build_pipeline: Build, files: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a batch whose prompts have pictures of their own, beside diffusers given them one at a time, and the mean."""
    pipeline, sampling = build_pipeline(version), asked(files)
    for module in (pipeline_ltx_condition, pipeline_ltx_image2video):
        monkeypatch.setattr(module, "retrieve_latents", lambda encoded, *_, **__: encoded.latent_dist.mode())
    shown = [ImageOps.fit(Image.open(file).convert("RGB"), (96, 64), Image.Resampling.LANCZOS) for file in files]
    found = calibration.sample(pipeline, calibration.encode(pipeline, ltx, PROMPTS, sampling), range(3), sampling)
    theirs = pipeline if version == "ltx_condition" else parts.again(pipeline, LTXImageToVideoPipeline)
    alone = [
        theirs(
            image=shown[row % 2],
            prompt=prompt,
            generator=torch.Generator().manual_seed(row),
            output_type="latent",
            num_inference_steps=3,
            guidance_scale=3.0,
            max_sequence_length=12,
            **SIZES,
        )[0]
        for row, prompt in enumerate(PROMPTS)
    ]
    expected = torch.cat(alone)
    torch.testing.assert_close(found.reshape(expected.shape), expected, atol=1e-4, rtol=1e-4)
    without = calibration.sample(pipeline, calibration.encode(pipeline, ltx, PROMPTS, asked(())), range(3), asked(()))
    assert (without - found).abs().max() > 1e-3
    others = asked(files[::-1])
    swapped = calibration.sample(pipeline, calibration.encode(pipeline, ltx, PROMPTS, others), range(3), others)
    assert (swapped - found).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("method", ["streamed", "obsdiff"])
def test_what_was_pruned_on_pictures_comes_back_and_is_compared_on_pictures(
    version: str, method: str, build_pipeline: Build, picture_folder: Path, tmp_path: Path
) -> None:
    pipeline = build_pipeline(version)
    pipeline.save_pretrained(tmp_path / "dense")
    block = type(pipeline.transformer.transformer_blocks[0])
    small: dict[str, Any] = {"references": str(picture_folder), "steps": 3, "max_sequence_length": 8, **SIZES}
    pruned = obsdiff.prune(
        pipeline,
        sparsity="ffn:0.25+2:4",
        prompts=PROMPTS[:2],
        method=method,
        protect_first=0,
        protect_last=0,
        align=4,
        allocation="uniform",
        **small,
    )
    assert pruned.kept
    assert type(pipeline.transformer.transformer_blocks[0]) is block
    obsdiff.save(pruned, tmp_path / "pruned")
    report = verbs.evaluate(tmp_path / "pruned", str(tmp_path / "dense"), Settings(eval_prompts=1, **small)).reports[0]
    assert isinstance(report.evaluation, Evaluation)
    assert all(0 < error < 10 for error in report.evaluation.velocity_error_per_step)
    assert not any("--references" in note for note in report.notes)
    write_card(report, tmp_path / "pruned", "checkpoint")
    text = (tmp_path / "pruned" / "README.md").read_text()
    assert ('pipeline(load_image("picture.png"), "' in text) == (version == "ltx_i2v"), "which diffusers' call wants"
    without = verbs.plan(Settings(model=str(tmp_path / "dense"), sparsity="2:4", **{**small, "references": None}))
    assert any("can begin with a picture" in note for note in without.notes)


@torch.no_grad()
def test_frames_are_modulated_as_their_tokens_are(build_denoiser: Build) -> None:
    """Blocks are told what takes the memory of a few tokens, and the gates of every token are seen all the same."""
    denoiser = build_denoiser("ltx")
    inputs = masked(ltx.example(denoiser, batch=2, size=(5, 3, 4), text_tokens=7, pixels=(96, 128)))
    mask, times = inputs.pop("frame_mask"), inputs["timestep"]
    told = ltx.arguments(inputs) | {"timestep": (times[:, None] * mask).repeat_interleave(12, dim=1)}
    block = denoiser.transformer_blocks[1]
    linears = [each for each in ltx.linears(denoiser) if each.block == 1 and each.writes]
    seen: list[Any] = []
    block.register_forward_pre_hook(lambda _, __, given: seen.append(given), with_kwargs=True)
    plain = denoiser(**told).sample
    with ltx.by_frames(denoiser):
        torch.testing.assert_close(denoiser(**told).sample, plain, rtol=0, atol=1e-5)
        assert [each["temb"].shape for each in seen] == [(2, 60, 6 * 32), (2, 5, 6 * 32)]
        for linear in linears:
            gates = [
                glances.glance(block, "transformer_blocks.1", [linear], ((), given), want="outputs", streams=True)[
                    0
                ].gates
                for given in seen[:2]
            ]
            if linear.writes.gate is not None:
                assert gates[0][linear.name].shape == (2, 60, 32)
                torch.testing.assert_close(gates[1][linear.name], gates[0][linear.name], rtol=0, atol=1e-5)
    torch.testing.assert_close(denoiser(**told).sample, plain, rtol=0, atol=0)
    component = ltx.component(denoiser, height=64, width=64)
    found = component.module(**inputs, frame_mask=mask)
    torch.testing.assert_close(found.flatten(2).mT, plain, rtol=0, atol=1e-5)


def test_a_call_that_begins_with_a_picture_is_of_the_step_of_what_it_draws(
    build_pipeline: Build, files: tuple[str, ...]
) -> None:
    """Its first frame, whose timestep is 0 throughout, is no part of the velocity."""
    pipeline, sampling = build_pipeline("ltx", num_layers=1), asked(files, batch_size=1, num_inference_steps=4)
    prompts = calibration.encode(pipeline, ltx, PROMPTS[:1], sampling)
    calls = trajectories.record(pipeline, ltx, prompts, sampling, computed_steps=4, kept_steps=4)
    assert sorted({call.step for call in calls}) == [0, 1, 2, 3]
    args, kwargs = calls[0].arguments
    with torch.no_grad():
        velocity = velocity_of(pipeline.transformer, pipeline.transformer(*args, **kwargs), kwargs)
    assert velocity.shape[1:] == (2 * 2 * 3, 4)


@pytest.mark.parametrize("version", VERSIONS)
def test_engines_are_told_the_size_of_every_axis(version: str, build_pipeline: Build) -> None:
    pipeline = build_pipeline(version, num_layers=1)
    config = dict(pipeline.transformer.config)
    sizes = sizes_of(asked(()), type(pipeline).__name__, config, rows=2, text_tokens=12, vae_scale=32)
    found = {}
    for component in components(ltx, pipeline, height=64, width=96):
        ports = [
            Port(name=port, dtype="float", shape=tuple(axes.get(axis, side) for axis, side in enumerate(example.shape)))
            for port, example in component.inputs.items()
            for axes in [component.dynamic_axes[port]]
        ]
        (found[component.name],) = profiles_for(ports, [sizes])
    assert found["vae_encoder"]["sample"].opt == (2, 3, 64, 96)
    assert found["vae_decoder"]["latent_sample"].opt == (2, 4, 3, 2, 3)
    assert found["transformer"]["frame_mask"].opt == found["transformer"]["frame_times"].opt == (2, 3)


@torch.no_grad()
def test_its_encoder_reads_a_picture_as_the_autoencoder_does(build_pipeline: Build) -> None:
    vae = build_pipeline("ltx").vae
    component = films.picture_encoder(vae, height=64, width=96)
    pixels = torch.randn(2, 3, 96, 160, generator=torch.Generator().manual_seed(0))
    expected = vae._encode(pixels[:, :, None])[:, :, 0]
    torch.testing.assert_close(component.module(pixels), expected, rtol=0, atol=1e-6)
