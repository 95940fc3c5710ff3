import copy
import json
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn

from kinds import prompts_of
from obsdiff.evaluation import Evaluation, ImagePair, evaluate, figure_names
from obsdiff.families.table import FAMILIES
from obsdiff.judges import Judges
from obsdiff.recipe import Sampling
from obsdiff_runtime.errors import CalibrationError, ConfigError, QualityError

PROMPTS = ["a red circle", "a blue square", "a green cross", "a small yellow triangle", "a black circle"]
SIZE = 32


class FakeText:
    """A family whose text embeddings are noise seeded by the prompt."""

    name = "sd3"
    denoiser = "transformer"
    classes = ("SD3Transformer2DModel",)
    pipeline = "StableDiffusion3Pipeline"
    negatives = True

    def linears(self, denoiser: nn.Module) -> Any:
        return FAMILIES["sd3"].linears(denoiser)

    def encode(self, _: Any, prompts: Sequence[str], negative: Sequence[str], **options: Any) -> dict[str, Tensor]:
        def stack(texts: Sequence[str], *shape: int) -> Tensor:
            generators = [torch.Generator().manual_seed(zlib.crc32(text.encode())) for text in texts]
            return torch.stack([torch.randn(*shape, generator=generator) for generator in generators])

        embeddings = {"prompt_embeds": stack(prompts, 4, 16), "pooled_prompt_embeds": stack(prompts, 12)}
        if negative:
            embeddings["negative_prompt_embeds"] = stack(negative, 4, 16)
            embeddings["negative_pooled_prompt_embeds"] = stack(negative, 12)
        return embeddings


def tiny_pipeline(scheduler: Any = FlowMatchEulerDiscreteScheduler) -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        out_channels=4,
        pos_embed_max_size=16,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    encoders = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer.eval(), vae=vae.eval(), scheduler=scheduler(shift=1.0), **dict.fromkeys(encoders)
    )
    pipeline.set_progress_bar_config(leave=False)
    return pipeline


def scaled(denoiser: nn.Module, factor: float, last: str = "proj_out") -> nn.Module:
    """A copy whose every velocity is `factor` times the original's."""
    scaled = copy.deepcopy(denoiser)
    with torch.no_grad():
        for parameter in scaled.get_submodule(last).parameters():
            parameter.mul_(factor)
    return scaled


def disturbed(denoiser: nn.Module) -> nn.Module:
    disturbed = copy.deepcopy(denoiser)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in disturbed.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return disturbed


def measure(
    pipeline: StableDiffusion3Pipeline, pruned: nn.Module, **changes: Any
) -> tuple[Evaluation, tuple[ImagePair, ...]]:
    settings: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 3.0, "seed": 7, "batch_size": 2}
    settings |= {"height": SIZE, "width": SIZE, "max_sequence_length": None}
    settings |= {key: changes.pop(key) for key in settings.keys() & changes.keys()}
    asked: dict[str, Any] = {"dense": pipeline.transformer, "prompts": PROMPTS, **changes}
    return evaluate(pipeline, FakeText(), pruned=pruned, sampling=Sampling(**settings), **asked)  # type: ignore[arg-type]


def test_a_model_compared_with_its_copy_differs_in_nothing() -> None:
    pipeline = tiny_pipeline()
    evaluation, pairs = measure(pipeline, copy.deepcopy(pipeline.transformer))
    assert evaluation.velocity_error == evaluation.latents_mse == evaluation.image_mse == 0
    assert evaluation.psnr_db is None
    assert evaluation.identical_images == len(PROMPTS)
    assert evaluation.ssim == pytest.approx(1)
    assert all((pair.dense == pair.pruned).all() for pair in pairs)
    assert pairs[0].dense.shape == (SIZE, SIZE, 3)
    assert pairs[0].dense.std() > 0


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_velocities_scaled_by_1_1_have_an_error_of_0_01_at_every_step(guidance_scale: float) -> None:
    pipeline = tiny_pipeline()
    evaluation, _ = measure(pipeline, scaled(pipeline.transformer, 1.1), guidance_scale=guidance_scale)
    # float32 weights and outputs: 0.1 is met to 1e-6, its square to about 2e-5.
    assert evaluation.velocity_error_per_step == pytest.approx([0.01] * 3, rel=1e-4)
    assert evaluation.velocity_error == pytest.approx(0.01, rel=1e-4)


def test_several_calls_per_step_are_counted_in_their_step() -> None:
    pipeline = tiny_pipeline(FlowMatchHeunDiscreteScheduler)
    evaluation, _ = measure(pipeline, scaled(pipeline.transformer, 1.1), num_inference_steps=4)
    assert evaluation.velocity_error_per_step == pytest.approx([0.01] * 4, rel=1e-4)
    assert evaluation.scheduler == "FlowMatchHeunDiscreteScheduler"


def test_the_velocity_error_is_that_of_the_dense_trajectory() -> None:
    """Oracle: the sampler written out: plain Euler over the pipeline's sigmas, guidance by hand."""
    pipeline = tiny_pipeline()
    dense, pruned = pipeline.transformer, disturbed(pipeline.transformer)
    evaluation, _ = measure(pipeline, pruned, prompts=PROMPTS[:1], num_inference_steps=3)
    text = FakeText().encode(None, PROMPTS[:1], [""])
    both = torch.cat([text["negative_prompt_embeds"], text["prompt_embeds"]])
    pooled = torch.cat([text["negative_pooled_prompt_embeds"], text["pooled_prompt_embeds"]])
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    pipeline.scheduler.set_timesteps(3)
    errors = []
    for i, timestep in enumerate(pipeline.scheduler.timesteps):
        rows = {"encoder_hidden_states": both, "pooled_projections": pooled, "timestep": timestep.expand(2)}
        with torch.no_grad():
            v, w = (model(hidden_states=torch.cat([latents] * 2), **rows).sample for model in (dense, pruned))
        errors.append(float((w - v).square().sum() / v.square().sum()))
        guided = v[:1] + 3.0 * (v[1:] - v[:1])
        latents = latents + (pipeline.scheduler.sigmas[i + 1] - pipeline.scheduler.sigmas[i]) * guided
    assert evaluation.velocity_error_per_step == pytest.approx(errors, rel=1e-4)


def test_blocks_before_a_change_have_no_error_and_those_after_it_do() -> None:
    """Oracle of the changed block: hooks of our own around one call of each denoiser on the first step's inputs."""
    pipeline = tiny_pipeline()
    dense, pruned = pipeline.transformer, copy.deepcopy(pipeline.transformer)
    with torch.no_grad():
        pruned.transformer_blocks[1].ff.net[2].weight.mul_(3)
    evaluation, _ = measure(pipeline, pruned, prompts=PROMPTS[:1], num_inference_steps=1, guidance_scale=1.0)
    text = FakeText().encode(None, PROMPTS[:1], [])
    pipeline.scheduler.set_timesteps(1)
    inputs = {
        "hidden_states": torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(7)),
        "encoder_hidden_states": text["prompt_embeds"],
        "pooled_projections": text["pooled_prompt_embeds"],
        "timestep": pipeline.scheduler.timesteps[:1],
    }
    seen: list[Tensor] = []
    for model in (dense, pruned):
        handle = model.transformer_blocks[1].register_forward_hook(lambda _, __, output: seen.append(output[1]))
        with torch.no_grad():
            model(**inputs)
        handle.remove()
    expected = float((seen[1] - seen[0]).square().sum() / seen[0].square().sum())
    assert evaluation.blocks == ("transformer_blocks.0", "transformer_blocks.1")
    assert evaluation.block_errors[0] == 0
    assert evaluation.block_errors[1] == evaluation.block_error == pytest.approx(expected, rel=1e-4)
    assert evaluation.block_errors_per_step == ((0.0,), (evaluation.block_error,))


def test_the_pictures_are_those_the_pipelines_draw_by_themselves() -> None:
    pipeline = tiny_pipeline()
    pruned = disturbed(pipeline.transformer)
    _, pairs = measure(pipeline, pruned)
    for index in (0, 4):
        for transformer, drawn in ((pipeline.transformer, pairs[index].dense), (pruned, pairs[index].pruned)):
            alone = StableDiffusion3Pipeline(**{**pipeline.components, "transformer": transformer})
            alone.set_progress_bar_config(disable=True)
            image = alone(
                **FakeText().encode(None, [PROMPTS[index]], [""]),
                num_inference_steps=3,
                guidance_scale=3.0,
                height=SIZE,
                width=SIZE,
                generator=torch.Generator().manual_seed(7 + index),
                output_type="np",
            ).images[0]
            # Rounding to 8 bits may fall either way where a batch changes the last bits of a float.
            assert np.abs(image * 255 - drawn).max() < 0.51


def test_the_batch_size_changes_nothing_but_rounding() -> None:
    pipeline = tiny_pipeline()
    pruned = disturbed(pipeline.transformer)
    one, one_by_one = measure(pipeline, pruned, batch_size=1)
    four, by_fours = measure(pipeline, pruned, batch_size=4)
    assert one.velocity_error_per_step == pytest.approx(four.velocity_error_per_step, rel=1e-4)
    for a, b in zip(one.per_prompt, four.per_prompt, strict=True):
        assert (a.prompt, a.seed) == (b.prompt, b.seed)
        assert a.latents_mse == pytest.approx(b.latents_mse, rel=1e-3)
    for x, y in zip(one_by_one, by_fours, strict=True):
        assert np.abs(x.dense.astype(int) - y.dense).max() <= 1
    assert len({pair.dense.tobytes() for pair in one_by_one}) == len(PROMPTS)


def test_the_pipeline_is_left_as_it_was() -> None:
    pipeline = tiny_pipeline()
    transformer = pipeline.transformer
    state = torch.get_rng_state()
    measure(pipeline, disturbed(transformer))
    assert pipeline.transformer is transformer
    assert not transformer._forward_hooks
    assert pipeline._progress_bar_config == {"leave": False}
    assert torch.equal(torch.get_rng_state(), state)


def test_the_pipeline_may_hold_either_denoiser_or_none_of_them() -> None:
    pipeline = tiny_pipeline()
    dense, pruned = pipeline.transformer, disturbed(pipeline.transformer)
    before, _ = measure(pipeline, pruned)
    pipeline.transformer = pruned
    after, _ = measure(pipeline, pruned, dense=dense)
    assert before == after
    assert pipeline.transformer is pruned


def test_obedience_is_counted_with_its_interval() -> None:
    pipeline = tiny_pipeline()
    scored: list[str] = []

    def score(image: Any, prompt: str) -> bool:
        assert image.dtype == np.uint8
        scored.append(prompt)
        return "circle" in prompt

    evaluation, _ = measure(pipeline, disturbed(pipeline.transformer), judges=Judges(obeys=score))
    assert sorted(scored) == sorted(PROMPTS * 2)
    share = evaluation.dense_obedience
    assert share is not None
    assert (share.obeyed, share.prompts) == (2, 5)
    assert share.low < share.share < share.high
    assert [result.pruned_obeys for result in evaluation.per_prompt] == [True, False, False, False, True]


def test_without_a_judge_obedience_is_absent_not_zero() -> None:
    pipeline = tiny_pipeline()
    evaluation, _ = measure(pipeline, disturbed(pipeline.transformer))
    assert evaluation.dense_obedience is None
    assert evaluation.per_prompt[0].dense_obeys is None


def test_judges_see_both_pictures_of_every_prompt() -> None:
    pipeline = tiny_pipeline()
    judges = Judges(
        scores={"red": lambda picture, prompt: float(picture[..., 0].mean())},
        lpips=lambda a, b: float(np.abs(a.astype(float) - b).max()),
        embed=lambda picture: torch.from_numpy(picture.reshape(-1)[:3].astype(float)),
        reference=torch.eye(3, dtype=torch.float64),
    )
    evaluation, pairs = measure(pipeline, disturbed(pipeline.transformer), judges=judges)
    assert evaluation.scores["red"].pruned == pytest.approx(np.mean([pair.pruned[..., 0].mean() for pair in pairs]))
    assert evaluation.per_prompt[1].scores["red"].dense == pytest.approx(pairs[1].dense[..., 0].mean())
    assert evaluation.per_prompt[0].lpips == np.abs(pairs[0].dense.astype(float) - pairs[0].pruned).max()
    assert evaluation.fid_clip is not None
    assert evaluation.fid_clip.dense != evaluation.fid_clip.pruned


def test_every_figure_that_a_gate_can_name_is_a_key_of_the_json() -> None:
    pipeline = tiny_pipeline()
    judges = Judges(obeys=lambda picture, prompt: True, scores={"red": lambda picture, prompt: 1.0})
    evaluation, _ = measure(pipeline, disturbed(pipeline.transformer), judges=judges)
    figures, data = evaluation.figures(), evaluation.to_json()
    assert tuple(figures) == figure_names(["red"])
    for name, value in figures.items():
        found = data
        for key in name.split("."):
            found = None if found is None else found[key]
        assert found == value, name


def test_identical_pictures_are_infinitely_alike_for_a_gate() -> None:
    pipeline = tiny_pipeline()
    evaluation, _ = measure(pipeline, copy.deepcopy(pipeline.transformer), prompts=PROMPTS[:1])
    assert evaluation.figures()["psnr_db"] == float("inf")


def test_an_evaluation_is_json() -> None:
    pipeline = tiny_pipeline()
    evaluation, _ = measure(pipeline, disturbed(pipeline.transformer), prompts=PROMPTS[:2])
    data = json.loads(json.dumps(evaluation.to_json(), allow_nan=False))
    assert data["per_prompt"][1]["prompt"] == PROMPTS[1]
    assert data["velocity_error"] == evaluation.velocity_error


def test_only_so_many_pictures_are_kept() -> None:
    pipeline = tiny_pipeline()
    evaluation, pairs = measure(pipeline, disturbed(pipeline.transformer), keep_images=3)
    assert [pair.prompt for pair in pairs] == PROMPTS[:3]
    assert len(evaluation.per_prompt) == 5


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_progress_runs_to_its_end(scheduler: Any) -> None:
    pipeline = tiny_pipeline(scheduler)
    told: list[tuple[int, int]] = []

    def listen(stage: str, done: int, total: int, note: str = "") -> None:
        told.append((done, total))

    measure(pipeline, disturbed(pipeline.transformer), progress=listen)
    assert told == sorted(told)
    assert told[-1] == (18, 18)


class NanAt(nn.Module):
    """A denoiser that gives NaN for one row at one call."""

    def __init__(self, inner: nn.Module, call: int, row: int) -> None:
        super().__init__()
        self.inner, self.call, self.row, self.calls = copy.deepcopy(inner), call, row, 0
        self.config = inner.config

    def get_submodule(self, target: str) -> nn.Module:
        return self.inner.get_submodule(target)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.inner(*args, **kwargs)[0].clone()
        if self.calls == self.call:
            output[self.row] = torch.nan
        self.calls += 1
        return (output,)


def test_a_nan_of_the_pruned_model_names_step_and_prompt() -> None:
    pipeline = tiny_pipeline()
    # Rows of two prompts under guidance: negative, negative, positive, positive.
    with pytest.raises(QualityError, match=r"pruned .* step 2, prompt 'a blue square'"):
        measure(pipeline, NanAt(pipeline.transformer, call=1, row=3))


def test_a_nan_of_the_dense_model_is_no_fault_of_the_pruned_one() -> None:
    pipeline = tiny_pipeline()
    pruned = copy.deepcopy(pipeline.transformer)
    with torch.no_grad():
        pipeline.transformer.proj_out.bias.fill_(torch.nan)
    with pytest.raises(CalibrationError, match=r"dense .* step 1, prompt 'a red circle'"):
        measure(pipeline, pruned)
    assert not pipeline.transformer._forward_hooks


def test_a_nan_of_the_decoder_is_an_error_not_a_black_picture() -> None:
    pipeline = tiny_pipeline()
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.bias.fill_(torch.nan)
    with pytest.raises(CalibrationError, match="decoded picture"):
        measure(pipeline, disturbed(pipeline.transformer))


def test_a_dense_model_that_predicts_nothing_is_an_error() -> None:
    pipeline = tiny_pipeline()
    pruned = copy.deepcopy(pipeline.transformer)
    with torch.no_grad():
        for parameter in pipeline.transformer.proj_out.parameters():
            parameter.zero_()
    with pytest.raises(CalibrationError, match="exactly zero"):
        measure(pipeline, pruned)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "at least one prompt"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"height": 8}, "too small"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_work(changes: dict[str, Any], message: str) -> None:
    pipeline = tiny_pipeline()
    with pytest.raises(ConfigError, match=message):
        measure(pipeline, disturbed(pipeline.transformer), **changes)


def test_a_model_is_not_compared_with_itself_or_in_another_precision() -> None:
    pipeline = tiny_pipeline()
    with pytest.raises(ConfigError, match="dense one itself"):
        measure(pipeline, pipeline.transformer)
    with pytest.raises(ConfigError, match="float16"):
        measure(pipeline, copy.deepcopy(pipeline.transformer).half())


@pytest.mark.parametrize(
    ("kind", "family", "last", "scheduler"),
    [
        ("sd3", "sd3", "proj_out", None),
        ("sd15", "unet", "conv_out", PNDMScheduler),
        ("sdxl", "unet", "conv_out", None),
        ("flux", "flux", "proj_out", None),
        ("chroma", "chroma", "proj_out", None),
        ("flux2", "flux2", "proj_out", None),
        ("pixart", "pixart", "proj_out", None),
        ("auraflow", "auraflow", "proj_out", None),
        ("sana", "sana", "proj_out", None),
        ("qwen", "qwen", "proj_out", None),
        ("lumina2", "lumina2", "norm_out.linear_2", None),
        ("zimage", "zimage", "all_final_layer.2-1.linear", None),
        ("hunyuan", "hunyuan", "proj_out", None),
        ("dit", "dit", "proj_out_2", PNDMScheduler),
        pytest.param(
            *("pixart_sigma", "pixart", "proj_out", HeunDiscreteScheduler),
            # diffusers' Heun hands torch tensors to numpy functions
            marks=pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),
        ),
    ],
)
def test_every_family_is_measured_on_its_own_pipeline(
    build_pipeline: Any, kind: str, family: str, last: str, scheduler: Any
) -> None:
    pipeline = build_pipeline(kind)
    pipeline.vae.register_to_config(shift_factor=0.0)
    if scheduler is not None:
        pipeline.scheduler = scheduler(**({"skip_prk_steps": True} if scheduler is PNDMScheduler else {}))
    dense = getattr(pipeline, FAMILIES[family].denoiser)
    sampling = Sampling(
        num_inference_steps=3,
        guidance_scale=3.0,
        height=32,
        width=32,
        max_sequence_length=None if family in ("unet", "hunyuan", "dit") else 8,
        batch_size=2,
        seed=0,
    )
    evaluation, pairs = evaluate(
        pipeline,
        FAMILIES[family],
        dense=dense,
        pruned=scaled(dense, 1.1, last),
        prompts=prompts_of(family, ["a red dog", "a cat", "a"]),
        sampling=sampling,
    )
    assert evaluation.velocity_error_per_step == pytest.approx([0.01] * 3, rel=1e-3)
    assert pairs[2].dense.shape == (32, 32, 3)
    assert evaluation.latents_mse > 0


def test_an_error_of_the_variance_that_no_sampler_reads_is_none(build_pipeline: Any) -> None:
    pipeline = build_pipeline("pixart")
    pruned = copy.deepcopy(pipeline.transformer)
    for parameter in pruned.proj_out.parameters():
        parameter.data.unflatten(0, (4, 8))[:, 4:] *= 2  # (pixels of a patch, channels)
    evaluation, _ = evaluate(
        pipeline,
        FAMILIES["pixart"],
        dense=pipeline.transformer,
        pruned=pruned,
        prompts=["a red dog", "a cat"],
        sampling=Sampling(
            num_inference_steps=2, guidance_scale=3.0, height=32, width=32, max_sequence_length=8, batch_size=2, seed=0
        ),
    )
    assert evaluation.velocity_error_per_step == (0.0, 0.0)
    assert evaluation.latents_mse == 0
