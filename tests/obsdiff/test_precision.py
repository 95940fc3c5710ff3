"""`--precision`: its grammar, the ranges it finds, and the weights it leaves."""

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from obsdiff import precision, ranges, trajectories
from obsdiff.defaults import Defaults
from obsdiff.families.table import family_of
from obsdiff.precision import fitting, format_of, note, quantizable, quantize, round_weights, separate
from obsdiff.recipe import Recipe
from obsdiff.resolving import resolve
from obsdiff.settings import Settings
from obsdiff_export.formats import FORMATS
from obsdiff_export.quantizing import imitated
from obsdiff_runtime.errors import CalibrationError, ConfigError

PROMPTS = ("a red circle", "a blue square")


def recipe_for(pipeline: DiffusionPipeline, **settings: object) -> Recipe:
    defaults = Defaults(height=32, width=32, num_inference_steps=2, guidance_scale=2.0, max_sequence_length=None)
    asked = separate(Settings(**{"sparsity": "structured:0", **settings}))
    family = family_of(pipeline.components.get("transformer") or pipeline.components["unet"])
    return resolve(asked, model="tiny", family=family, defaults=defaults, prompts=PROMPTS)


def denoiser_of(pipeline: DiffusionPipeline) -> nn.Module:
    return getattr(pipeline, "transformer", None) or pipeline.unet


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("fp8+2:4", ("fp8", None, "2:4")),
        ("int8+bf16", ("int8", "bf16", None)),
        ("fp16", (None, "fp16", None)),
        ("structured:0.2+2:4+int8", ("int8", None, "structured:0.2+2:4")),
        ("0.5+fp32", (None, "fp32", "0.5")),
    ],
)
def test_a_precision_may_carry_a_dtype_and_a_sparsity(text, wanted):
    found = separate(Settings(precision=text))
    assert (found.precision, found.dtype, found.sparsity) == wanted
    assert separate(found) == found


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "fp9"}, "'fp9' is no precision; did you mean fp8"),
        ({"precision": "int8+fp8"}, "int8 and fp8 are both a format"),
        ({"precision": "fp16+bf16"}, "fp16 and bf16 are both a dtype"),
        ({"precision": ""}, "'' is no precision; there are fp32"),
        ({"precision": "fp8+2:4", "sparsity": "4:8"}, "--precision fp8.2:4 says 2:4, and --sparsity says 4:8"),
        ({"precision": "bf16", "dtype": "fp16"}, "says bf16, and --dtype says fp16"),
    ],
)
def test_a_precision_that_contradicts_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        separate(Settings(**settings))


def test_saying_the_same_twice_is_no_contradiction():
    assert separate(Settings(precision="fp8+2:4", sparsity="2:4")).sparsity == "2:4"


def test_flags_of_eight_bits_need_eight_bits():
    assert format_of(separate(Settings(precision="fp16"))) is None
    with pytest.raises(ConfigError, match=r"--keep-float .*add --precision int8"):
        format_of(Settings(keep_float=["*"]))


def test_no_order_for_engines_stays_none():
    assert fitting(None, Settings(precision="fp8")) is None


def test_keep_float_must_match_something_and_leave_something(build_denoiser):
    denoiser = build_denoiser("sd3")
    linears = family_of(denoiser).linears(denoiser)
    assert len(quantizable(linears, ["*.ff.*"])) == len(linears) - 6
    with pytest.raises(ConfigError, match=r"--keep-float 'attn' matches no linear of the blocks; one is called trans"):
        quantizable(linears, ["attn"])
    with pytest.raises(ConfigError, match="leaves no linear to quantise"):
        quantizable(linears, ["*"])


def test_convolutions_stay_in_float(build_pipeline):
    pipeline = build_pipeline("sana")
    family, denoiser = family_of(denoiser_of(pipeline)), denoiser_of(pipeline)
    convolutions = {linear.name for linear in family.linears(denoiser) if ".ff." in linear.name}
    before = copy.deepcopy(denoiser)
    found = quantize(pipeline, family, recipe_for(pipeline), FORMATS["int8"], dtype=torch.float16)
    left = {linear.name: linear.reason for linear in found.linears if linear.precision == "float"}
    assert left == dict.fromkeys(convolutions, "is a convolution")
    for name in convolutions:
        assert torch.equal(denoiser.get_submodule(name).weight, before.get_submodule(name).weight)
    attention = dataclasses.replace(recipe_for(pipeline), keep_float=("*.attn*",))
    with pytest.raises(ConfigError, match="leaves convolutions alone to quantise"):
        quantize(pipeline, family, attention, FORMATS["int8"], dtype=torch.float16)


@pytest.mark.parametrize(("kind", "format"), [("sd3", FORMATS["int8"]), ("sd15", FORMATS["fp8"])])
def test_weights_are_codes_times_scales_and_zeros_stay(build_pipeline, kind, format):
    pipeline = build_pipeline(kind)
    denoiser = denoiser_of(pipeline)
    family = family_of(denoiser)
    linears = family.linears(denoiser)
    for linear in linears:
        denoiser.get_submodule(linear.name).weight.data.view(-1, 4)[:, 1:3] = 0
    before = copy.deepcopy(denoiser)
    found = quantize(pipeline, family, recipe_for(pipeline), format, dtype=torch.float16)
    assert set(found.quantization.linears) == {linear.name for linear in linears}
    for linear in linears:
        scales = found.quantization.linears[linear.name]
        weight = denoiser.get_submodule(linear.name).weight.detach()
        old = before.get_submodule(linear.name).weight.detach()
        along = scales.weight[:, None] if format.per_output else scales.weight
        assert torch.equal(weight, format.rounded(old, along))
        assert torch.equal(scales.weight, scales.weight.half().float())
        assert not weight[old == 0].any()
    others = {
        name: value
        for name, value in before.state_dict().items()
        if name.removesuffix(".weight") not in found.quantization.linears
    }
    assert all(torch.equal(denoiser.state_dict()[name], value) for name, value in others.items())


@pytest.mark.parametrize("rule", ["error", "percentile", "largest"])
def test_what_is_computed_stays_close(calls, denoise, rule):
    pipeline, family, recorded = calls
    before = denoise(pipeline.transformer)
    linears, int8 = family.linears(pipeline.transformer), FORMATS["int8"]
    streams = ranges.observe(pipeline.transformer, linears, recorded, format=int8, dtype=torch.float16)
    found = round_weights(pipeline.transformer, linears, streams, int8, dtype=torch.float16, rule=rule)
    with imitated(pipeline.transformer, found.quantization):
        error = (denoise(pipeline.transformer) - before).norm() / before.norm()
    assert 0 < error < 0.05  # on noise, which calibration did not see


def test_outputs_and_linears_kept_in_float_are_as_asked(build_pipeline):
    pipeline = build_pipeline("sd3")
    recipe = recipe_for(pipeline, precision="int8", keep_float=["*.ff.net.2"], quantize_outputs=True)
    found = quantize(pipeline, family_of(pipeline.transformer), recipe, FORMATS["int8"], dtype=torch.float32)
    assert all(scales.output is not None for scales in found.quantization.linears.values())
    kept = [linear for linear in found.linears if linear.precision == "float"]
    assert [linear.name for linear in kept] == [f"transformer_blocks.{block}.ff.net.2" for block in range(3)]
    assert {linear.reason for linear in kept} == {"matches --keep-float"}
    assert f"{len(found.linears) - 3} of the {len(found.linears)} linears" in note({"transformer": found})


def test_an_input_that_is_always_zero_leaves_its_linear_in_float(build_pipeline):
    pipeline = build_pipeline("sd3")
    block = pipeline.transformer.transformer_blocks[1]
    block.attn.to_v.weight.data.zero_()
    block.attn.to_v.bias.data.zero_()
    block.attn.add_v_proj.weight.data.zero_()
    block.attn.add_v_proj.bias.data.zero_()
    family = family_of(pipeline.transformer)
    found = quantize(pipeline, family, recipe_for(pipeline), FORMATS["fp8"], dtype=torch.float16)
    left = {linear.name: linear.reason for linear in found.linears if linear.precision == "float"}
    assert set(left) == {"transformer_blocks.1.attn.to_out.0", "transformer_blocks.1.attn.to_add_out"}
    assert all("zero on every calibration token" in str(reason) for reason in left.values())
    assert float(found.quantization.linears["transformer_blocks.1.attn.to_v"].weight) == 1.0


def test_a_weight_that_is_not_finite_is_an_error(build_pipeline):
    pipeline = build_pipeline("sd3")
    pipeline.transformer.transformer_blocks[2].ff.net[2].weight.data[0, 0] = float("inf")
    with pytest.raises(CalibrationError, match=r"transformer_blocks\.2\.ff\.net\.2: a weight is not finite"):
        quantize(pipeline, family_of(pipeline.transformer), recipe_for(pipeline), FORMATS["int8"], dtype=torch.float16)


@pytest.fixture
def calls(build_pipeline: Callable[..., DiffusionPipeline]):
    """A tiny SD3 pipeline and its denoiser's calls."""
    pipeline = build_pipeline("sd3")
    family = family_of(pipeline.transformer)
    recipe = recipe_for(pipeline)
    prompts = precision.streaming.calibration.encode(pipeline, family, PROMPTS, recipe.sampling)
    return (
        pipeline,
        family,
        trajectories.record(pipeline, family, prompts, recipe.sampling, computed_steps=2, kept_steps=2),
    )


def test_ranges_are_those_of_every_token(calls):
    pipeline, family, recorded = calls
    linears = family.linears(pipeline.transformer)
    seen: dict[str, list[torch.Tensor]] = {}
    handles = [
        pipeline.transformer.get_submodule(linear.name).register_forward_pre_hook(
            lambda _, args, name=linear.name: seen.setdefault(name, []).append(args[0].flatten(0, -2))
        )
        for linear in linears
    ]
    streams = ranges.observe(pipeline.transformer, linears, recorded, format=FORMATS["int8"], dtype=torch.float32)
    for handle in handles:
        handle.remove()
    for linear in linears:
        stream, tokens = streams.inputs[linear.reads], torch.cat(seen[linear.name]).double()  # two rounds of the same
        assert stream.largest == pytest.approx(float(tokens.abs().max()))
        assert 2 * stream.tokens == len(tokens)
        assert torch.allclose(2 * stream.moment, tokens.square().sum(0))
        assert stream.loss(stream.scale("error", FORMATS["int8"], torch.float32)) <= stream.loss(stream.candidates[0])


def test_an_activation_that_is_not_finite_is_an_error_that_says_where(calls):
    pipeline, family, recorded = calls
    linears = family.linears(pipeline.transformer)
    pipeline.transformer.transformer_blocks[1].attn.to_q.bias.data[0] = float("nan")
    with pytest.raises(CalibrationError, match=r"transformer_blocks\.1\.attn\.to_out\.0: step 1, prompts 1 to 2"):
        ranges.observe(pipeline.transformer, linears, recorded, format=FORMATS["fp8"], dtype=torch.float16)


def test_a_linear_that_saw_no_token_is_an_error(calls):
    pipeline, family, _ = calls
    linears = family.linears(pipeline.transformer)
    with pytest.raises(CalibrationError, match="no token reached this layer in 0 calls"):
        ranges.observe(pipeline.transformer, linears, [], format=FORMATS["fp8"], dtype=torch.float16)


def test_a_recipe_says_what_it_computes_in(build_pipeline):
    pipeline = build_pipeline("sd15")
    recipe = recipe_for(pipeline, precision="fp8+bf16")
    assert (recipe.precision, recipe.dtype) == ("fp8", "bf16")
    assert dataclasses.asdict(recipe_for(pipeline))["precision"] == "float"
