"""Components for the export: names, sizes, and the numbers the pipeline itself would see."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid
from torch import Tensor

from obsdiff import costs
from obsdiff.families import exporting, parts, reading
from obsdiff.families.places import rotations
from obsdiff.families.table import FAMILIES
from obsdiff.recipe import Sampling
from obsdiff.shrinking import shrink
from obsdiff.sizes import sizes_of
from obsdiff_export.component import Component
from obsdiff_runtime.errors import ModelError

CASES = [("sd3", {"with_t5": True}), ("sd15", {}), ("sdxl", {}), ("flux", {}), ("flux", {"guidance_embeds": False})]
CASES += [
    ("sd15", {"time_cond_proj_dim": 16}),
    ("sdxl", {"time_cond_proj_dim": 16}),
    ("chroma", {}),
    ("flux2", {}),
    ("flux2", {"guidance_embeds": True}),
    ("pixart", {}),
    ("pixart", {"sigma": True}),
    ("auraflow", {}),
    ("sana", {}),
    ("qwen", {}),
    ("lumina2", {}),
    ("zimage", {}),
    ("hunyuan", {}),
    ("dit", {}),
]
NAMES = {
    "sd3": ["text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae_decoder", "vae_encoder"],
    "sd15": ["text_encoder", "unet", "vae_decoder", "vae_encoder"],
    "sdxl": ["text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder"],
    "flux": ["text_encoder", "text_encoder_2", "transformer", "vae_decoder", "vae_encoder"],
    "chroma": ["text_encoder", "transformer", "vae_decoder", "vae_encoder"],
    "flux2": ["text_encoder", "transformer", "vae_decoder", "vae_encoder"],
    "pixart": ["text_encoder", "transformer", "vae_decoder", "vae_encoder"],
    "auraflow": ["text_encoder", "transformer", "vae_decoder", "vae_encoder"],
    "sana": ["text_encoder", "transformer", "vae_decoder", "vae_encoder"],
    "qwen": ["text_encoder", "transformer", "vae_decoder", "vae_encoder"],
    "lumina2": ["text_encoder", "transformer", "vae_decoder", "vae_encoder"],
    "zimage": ["text_encoder", "transformer", "vae_decoder", "vae_encoder"],
    "hunyuan": ["text_encoder", "text_encoder_2", "transformer", "vae_decoder", "vae_encoder"],
    "dit": ["transformer", "vae_decoder", "vae_encoder"],
}


def of(pipeline: Any, kind: str) -> dict[str, Component]:
    family = FAMILIES.get(kind, FAMILIES["unet"])
    return {component.name: component for component in exporting.components(family, pipeline, height=32, width=48)}


def run(component: Component, inputs: Any) -> tuple[Tensor, ...]:
    with torch.no_grad():
        found = component.module(**inputs)
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize(("kind", "changes"), CASES)
def test_every_component_runs_on_all_its_examples(
    kind: str, changes: dict[str, Any], build_pipeline: Callable[..., Any]
) -> None:
    components = of(build_pipeline(kind, **changes), kind)
    assert list(components) == NAMES[kind]
    for component in components.values():
        assert len(component.more_inputs) == 2
        assert not component.module.training
        assert component.config
        assert "_name_or_path" not in component.config
        for inputs in (component.inputs, *component.more_inputs):
            found = run(component, inputs)
            assert len(found) == len(component.outputs)
            assert all(torch.isfinite(tensor).all() for tensor in found)


@pytest.mark.parametrize(("kind", "changes"), CASES)
def test_dynamic_sizes_are_distinct_in_the_traced_example_and_change_in_the_others(
    kind: str, changes: dict[str, Any], build_pipeline: Callable[..., Any]
) -> None:
    for component in of(build_pipeline(kind, **changes), kind).values():
        seen: list[dict[str, int]] = []
        for inputs in (component.inputs, *component.more_inputs):
            sizes: dict[str, int] = {}
            for name, axes in component.dynamic_axes.items():
                for axis, symbol in axes.items():
                    assert sizes.setdefault(symbol, inputs[name].shape[axis]) == inputs[name].shape[axis]
            seen.append(sizes)
        assert min(seen[0].values()) >= 2
        assert len(set(seen[0].values())) == len(seen[0])
        for symbol in seen[0]:
            assert len({sizes[symbol] for sizes in seen}) > 1, (component.name, symbol)


@pytest.mark.parametrize(("kind", "changes"), CASES)
def test_weights_are_shared_and_keep_their_names(
    kind: str, changes: dict[str, Any], build_pipeline: Callable[..., Any]
) -> None:
    pipeline = build_pipeline(kind, **changes)
    for component in of(pipeline, kind).values():
        source = pipeline.vae if component.name.startswith("vae") else getattr(pipeline, component.name)
        weights = dict(source.named_parameters())
        own = dict(component.module.named_parameters())
        assert all(weights[name] is parameter for name, parameter in own.items())
        if source is not pipeline.vae:
            language = {name for name in weights if name.startswith("model.language_model.")}  # of Qwen2.5-VL
            assert own.keys() == (language or weights.keys())


@pytest.mark.parametrize(("kind", "changes"), CASES)
def test_a_copy_in_another_precision_computes_with_its_own_weights(
    kind: str, changes: dict[str, Any], build_pipeline: Callable[..., Any]
) -> None:
    for component in of(build_pipeline(kind, **changes), kind).values():
        double = copy.deepcopy(component.module).double()
        assert not {id(weight) for weight in double.parameters()} & {
            id(weight) for weight in component.module.parameters()
        }
        assert {weight.dtype for weight in component.module.parameters()} == {torch.float32}
        inputs = {
            name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in component.inputs.items()
        }
        with torch.no_grad():
            found = double(**inputs)
        found = found if isinstance(found, tuple) else (found,)
        for precise, expected in zip(found, run(component, component.inputs), strict=True):
            assert precise.dtype == torch.float64
            assert (precise - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_clip_gives_what_the_pipelines_read(build_pipeline: Callable[..., Any]) -> None:
    pipeline = build_pipeline("sdxl")
    components = of(pipeline, "sdxl")
    for name, pooled in (("text_encoder", "pooler_output"), ("text_encoder_2", "text_embeds")):
        component, model = components[name], getattr(pipeline, name)
        found = dict(zip(component.outputs, run(component, component.inputs), strict=True))
        with torch.no_grad():
            expected = model(component.inputs["input_ids"], output_hidden_states=True)
        assert component.outputs[0] == pooled
        assert torch.equal(found[pooled], expected[pooled])
        assert torch.equal(found["last_hidden_state"], expected.last_hidden_state)
        layers = model.config.num_hidden_layers
        assert len(expected.hidden_states) == layers + 1
        assert torch.equal(found[f"hidden_states.{layers - 1}"], expected.hidden_states[-2])


def test_the_vae_halves_are_those_of_diffusers(build_pipeline: Callable[..., Any]) -> None:
    pipeline = build_pipeline("sd15")
    components = of(pipeline, "sd15")
    decoder, encoder = components["vae_decoder"], components["vae_encoder"]
    with torch.no_grad():
        pixels = pipeline.vae.decode(decoder.inputs["latent_sample"]).sample
        posterior = pipeline.vae.encode(encoder.inputs["sample"]).latent_dist
    assert torch.equal(run(decoder, decoder.inputs)[0], pixels)
    assert torch.equal(run(encoder, encoder.inputs)[0], posterior.parameters)


def test_the_halves_of_a_deep_autoencoder_are_those_of_diffusers(build_pipeline: Callable[..., Any]) -> None:
    pipeline = build_pipeline("sana")
    components = of(pipeline, "sana")
    decoder, encoder = components["vae_decoder"], components["vae_encoder"]
    with torch.no_grad():
        pixels = pipeline.vae.decode(decoder.inputs["latent_sample"]).sample
        latents = pipeline.vae.encode(encoder.inputs["sample"]).latent
    assert torch.equal(run(decoder, decoder.inputs)[0], pixels)
    assert torch.equal(run(encoder, encoder.inputs)[0], latents)


def test_the_last_example_has_the_asked_size_up_to_256_pixels() -> None:
    sizes = parts.latent_sizes(1024, 192, vae_scale=8, multiple=2, limit=192)
    assert sizes[-1] == (32, 24)
    assert parts.latent_sizes(1024, 1024, vae_scale=8, multiple=2, limit=10)[-1] == (20, 20)


@pytest.mark.parametrize("guidance", [True, False])
def test_flux_on_latents_is_diffusers_on_packed_ones(guidance: bool, build_pipeline: Callable[..., Any]) -> None:
    pipeline = build_pipeline("flux", guidance_embeds=guidance)
    component = of(pipeline, "flux")["transformer"]
    told = dict(component.inputs)
    latents, time = told.pop("hidden_states"), told.pop("timestep")
    batch, channels, rows, columns = latents.shape
    with torch.no_grad():
        packed = pipeline.transformer(
            **told,
            hidden_states=pipeline._pack_latents(latents, *latents.shape),
            timestep=time / 1000,
            img_ids=pipeline._prepare_latent_image_ids(batch, rows // 2, columns // 2, "cpu", torch.float32),
            txt_ids=torch.zeros(told["encoder_hidden_states"].shape[1], 3),
        ).sample
    expected = pipeline._unpack_latents(packed, rows * 2, columns * 2, 2)
    assert expected.shape == (batch, channels, rows, columns)
    assert torch.equal(run(component, component.inputs)[0], expected)


@pytest.mark.parametrize("sigma", [False, True])
@pytest.mark.parametrize("size", [(8, 12), (128, 128), (40, 24)])
def test_pixart_at_any_size_is_diffusers_noise_without_its_variance(
    size: tuple[int, int], sigma: bool, build_pipeline: Callable[..., Any]
) -> None:
    """(128, 128) is the size that diffusers keeps its places of."""
    pipeline = build_pipeline("pixart", sigma=sigma)
    component, family = of(pipeline, "pixart")["transformer"], FAMILIES["pixart"]
    inputs = family.example(pipeline.transformer, batch=2, size=size, text_tokens=7, pixels=(size[0] * 8, size[1] * 8))
    assert ("resolution" in inputs) == (not sigma)
    with torch.no_grad():
        expected = pipeline.transformer(**family.arguments(inputs)).sample
    assert expected.shape == (2, 8, *size)
    # the places are float32 sines of float32 angles up to 32: good to 4e-6, where diffusers' are of float64 ones
    torch.testing.assert_close(run(component, inputs)[0], expected[:, :4], rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", [11, 12])
@pytest.mark.parametrize("size", [(2, 22), (6, 14), (22, 22)])
def test_auraflow_takes_the_places_from_the_middle_as_diffusers_does(
    side: int, size: tuple[int, int], build_denoiser: Callable[..., Any]
) -> None:
    family, denoiser = FAMILIES["auraflow"], build_denoiser("auraflow", pos_embed_max_size=side**2)
    inputs = family.example(denoiser, batch=2, size=size, text_tokens=7, pixels=(size[0] * 8, size[1] * 8))
    with torch.no_grad():
        expected = denoiser(**family.arguments(inputs)).sample
    assert torch.equal(run(family.component(denoiser, height=64, width=64), inputs)[0], expected)


@pytest.mark.parametrize("scale", [None, 2.0])
def test_a_shrunk_sana_takes_any_size(scale: float | None, build_pipeline: Callable[..., Any]) -> None:
    """With sines of places, as of 2048 and 4096 pixels, or without."""
    pipeline, family = build_pipeline("sana", num_layers=1, interpolation_scale=scale), FAMILIES["sana"]
    shrink(pipeline.transformer, family, {"transformer_blocks.0.ff.neurons": [1, 4, 6]})
    others = [
        family.example(pipeline.transformer, batch=batch, size=size, text_tokens=length, pixels=(64, 96))
        for batch, length, size in ((1, 1, (2, 2)), (3, 9, (64, 64)), (2, 5, (6, 50)))
    ]
    with torch.no_grad():
        for inputs in others:
            expected = pipeline.transformer(**family.arguments(inputs)).sample
            found = run(of(pipeline, "sana")["transformer"], inputs)[0]
            # the places are float32 sines: see PixArt's
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_shrunk_lumina2_packs_texts_of_any_length_as_diffusers_does(build_denoiser: Callable[..., Any]) -> None:
    """A batch has texts of 1 to 9 tokens, which diffusers cuts apart and obsdiff masks."""
    denoiser, family = build_denoiser("lumina2", num_layers=1), FAMILIES["lumina2"]
    shrink(denoiser, family, {"context_refiner.0.attn.heads": [0, 2], "layers.0.feed_forward.neurons": [1, 4, 6]})
    others = []
    for lengths, size in (([1], (2, 2)), ([9, 1, 4], (6, 20)), ([5, 5], (128, 4)), ([2, 7], (8, 8))):
        inputs = family.example(denoiser, batch=len(lengths), size=size, text_tokens=9, pixels=(64, 96))
        shown = (torch.arange(9) < torch.tensor(lengths)[:, None]).float()
        others.append({**inputs, "encoder_attention_mask": shown})
    component = family.component(denoiser, height=64, width=64)
    with torch.no_grad():
        for inputs in others:
            expected = -denoiser(**family.arguments(inputs)).sample
            # places are float32 sines here and float64 ones there
            torch.testing.assert_close(run(component, inputs)[0], expected, rtol=0, atol=1e-5)


def test_a_shrunk_z_image_fills_up_text_and_image_as_diffusers_does(build_denoiser: Callable[..., Any]) -> None:
    """A batch has texts of 1 to 65 tokens; images have a multiple of 32 patches, or nearly one."""
    denoiser, family = build_denoiser("zimage", n_layers=1), FAMILIES["zimage"]
    shrink(denoiser, family, {"context_refiner.0.attention.heads": [0, 2], "layers.0.feed_forward.neurons": [1, 4, 6]})
    others = []
    for lengths, size in (([1], (2, 2)), ([64, 1, 33], (6, 22)), ([31, 32], (128, 4)), ([65, 7], (16, 16))):
        inputs = family.example(denoiser, batch=len(lengths), size=size, text_tokens=max(lengths), pixels=(64, 96))
        shown = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).float()
        others.append({**inputs, "encoder_attention_mask": shown})
    component = family.component(denoiser, height=64, width=64)
    with torch.no_grad():
        for inputs in others:
            expected = -torch.cat(denoiser(**family.arguments(inputs)).sample, dim=1).transpose(0, 1)
            # places are float32 sines here and float64 ones there
            torch.testing.assert_close(run(component, inputs)[0], expected, rtol=0, atol=1e-5)


def test_lumina2_reads_gemma_in_front_of_its_last_layer_behind_a_system_prompt(
    build_pipeline: Callable[..., Any],
) -> None:
    pipeline = build_pipeline("lumina2")
    component = of(pipeline, "lumina2")["text_encoder"]
    assert component.config["system_prompt"] == "draw"
    assert component.outputs == ("hidden_states.1",)  # of 2 layers
    with torch.no_grad():
        expected = pipeline.text_encoder(**component.inputs, output_hidden_states=True).hidden_states[-2]
    assert torch.equal(run(component, component.inputs)[0], expected)


def test_sana_on_the_scheduler_s_timesteps_is_diffusers_on_scaled_ones(build_pipeline: Callable[..., Any]) -> None:
    pipeline, family = build_pipeline("sana", timestep_scale=0.25, out_channels=8), FAMILIES["sana"]
    component = of(pipeline, "sana")["transformer"]
    inputs = dict(component.inputs)
    found = run(component, inputs)[0]
    inputs["timestep"] = inputs["timestep"] * 0.25
    with torch.no_grad():
        expected = pipeline.transformer(**family.arguments(inputs)).sample
    assert torch.equal(found, expected[:, :4])  # the other half is a variance, which no sampler reads


@pytest.mark.parametrize("size", [(2, 2), (2, 22), (16, 16), (46, 14), (128, 96), (96, 160)])
def test_hunyuan_turns_queries_and_keys_as_its_pipeline_does_at_any_size(size: tuple[int, int]) -> None:
    grid = (size[0] // 2, size[1] // 2)
    expected = get_2d_rotary_pos_embed(12, get_resize_crop_region_for_grid(grid, 32), grid, device="cpu")
    found = rotations(*grid, width=12, span=32, device=torch.device("cpu"))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)  # of angles up to 32 in float32


def test_a_shrunk_hunyuan_takes_any_size(build_denoiser: Callable[..., Any]) -> None:
    """Of version 1.2, which is told no sizes; it gives diffusers' noise, without its variance."""
    family, denoiser = FAMILIES["hunyuan"], build_denoiser("hunyuan", use_style_cond_and_image_meta_size=False)
    shrink(denoiser, family, {"blocks.0.attn1.heads": [1], "blocks.3.attn2.heads": [0, 2], "blocks.3.ff.neurons": [5]})
    component = family.component(denoiser, height=64, width=64)
    others = [
        family.example(denoiser, batch=batch, size=size, text_tokens=7, pixels=(size[0] * 8, size[1] * 8))
        for batch, size in ((1, (2, 2)), (3, (64, 64)), (2, (6, 50)))
    ]
    for inputs in others:
        grid = tuple(side // 2 for side in inputs["hidden_states"].shape[-2:])
        turns = get_2d_rotary_pos_embed(8, get_resize_crop_region_for_grid(grid, 32), grid, device="cpu")
        with torch.no_grad():
            expected = denoiser(**family.arguments(inputs), image_rotary_emb=turns, return_dict=False)[0]
        torch.testing.assert_close(run(component, inputs)[0], expected[:, :4], rtol=0, atol=1e-5)


def test_bert_always_reads_the_length_that_the_pipeline_gives_it(build_pipeline: Callable[..., Any]) -> None:
    pipeline = build_pipeline("hunyuan")
    component = of(pipeline, "hunyuan")["text_encoder"]
    assert all("sequence" not in axes.values() for axes in component.dynamic_axes.values())
    inputs = pipeline.tokenizer("a red box", padding="max_length", max_length=77, return_tensors="pt")
    told = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask}
    with torch.no_grad():
        expected = pipeline.text_encoder(**told)[0]
    assert component.inputs["input_ids"].shape[1] == expected.shape[1]
    assert torch.equal(run(component, told)[0], expected)


def test_gemma_is_told_the_instruction_of_the_pipelines_call(build_pipeline: Callable[..., Any]) -> None:
    pipeline = build_pipeline("sana")
    lines = of(pipeline, "sana")["text_encoder"].config["complex_human_instruction"]
    assert lines[-1] == "User Prompt: "
    assert reading.instruction_tokens(pipeline) == len(pipeline.tokenizer.encode("\n".join(lines))) - 2
    assert reading.instruction_tokens(build_pipeline("pixart")) == 0


@pytest.mark.parametrize("kind", ["pixart", "sana", "qwen"])
def test_padding_changes_nothing_where_the_networks_are_told_of_it(
    kind: str, build_pipeline: Callable[..., Any]
) -> None:
    components = of(build_pipeline(kind), kind)
    for name, changed in (("text_encoder", "input_ids"), ("transformer", "encoder_hidden_states")):
        component = components[name]
        mask = "attention_mask" if name == "text_encoder" else str(FAMILIES[kind].text_mask)
        told = component.inputs[mask].bool()
        other = dict(component.inputs)
        other[changed] = (
            other[changed].flip(1).where(~told.view(*told.shape, *[1] * (other[changed].ndim - 2)), other[changed])
        )
        assert not torch.equal(other[changed], component.inputs[changed])
        before, after = run(component, component.inputs)[0], run(component, other)[0]
        assert torch.equal(before, after) if name == "transformer" else torch.equal(before[told], after[told])


@torch.no_grad()
def test_a_shrunk_qwen_image_is_diffusers_on_packed_latents_at_any_size(build_pipeline: Callable[..., Any]) -> None:
    """Odd rows and columns of tokens, text of one token, and more text than image."""
    pipeline, family = build_pipeline("qwen", num_layers=2), FAMILIES["qwen"]
    kept = {"transformer_blocks.0.attn.heads": [1, 3], "transformer_blocks.1.img_mlp.neurons": list(range(9))}
    shrink(pipeline.transformer, family, kept)
    component = of(pipeline, "qwen")["transformer"]
    others = [
        family.example(pipeline.transformer, batch=batch, size=size, text_tokens=length, pixels=(64, 96))
        for batch, length, size in ((1, 1, (2, 2)), (3, 90, (6, 14)), (2, 5, (62, 10)))
    ]
    for inputs in others:
        told = dict(inputs)
        latents, time = told.pop("hidden_states"), told.pop("timestep")
        batch, _, rows, columns = latents.shape
        packed = pipeline.transformer(
            **told,
            hidden_states=pipeline._pack_latents(latents, *latents.shape),
            timestep=time / 1000,
            img_shapes=[[(1, rows // 2, columns // 2)]] * batch,
        ).sample
        expected = pipeline._unpack_latents(packed, rows * 2, columns * 2, pipeline.vae_scale_factor)[:, :, 0]
        torch.testing.assert_close(run(component, inputs)[0], expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_halves_of_an_autoencoder_of_films_are_those_of_diffusers_on_a_frame(
    build_pipeline: Callable[..., Any],
) -> None:
    pipeline = build_pipeline("qwen")
    components = of(pipeline, "qwen")
    decoder, encoder = components["vae_decoder"], components["vae_encoder"]
    pixels = pipeline.vae.decode(decoder.inputs["latent_sample"][:, :, None]).sample[:, :, 0]
    posterior = pipeline.vae.encode(encoder.inputs["sample"][:, :, None]).latent_dist
    assert torch.equal(run(decoder, decoder.inputs)[0].clamp(-1, 1), pixels)
    assert torch.equal(run(encoder, encoder.inputs)[0], posterior.parameters[:, :, 0])


def test_every_prompt_of_qwen_image_stands_in_the_template_of_its_pipeline(build_pipeline: Callable[..., Any]) -> None:
    pipeline = build_pipeline("qwen")
    config = of(pipeline, "qwen")["text_encoder"].config
    assert config["prompt_template_encode"] == pipeline.prompt_template_encode
    assert config["prompt_template_encode_start_idx"] == reading.template_tokens(pipeline) == 34
    assert reading.template_tokens(build_pipeline("sana")) == 0
    sampling = Sampling(
        num_inference_steps=1,
        guidance_scale=4.0,
        height=32,
        width=32,
        max_sequence_length=512,
        batch_size=1,
        seed=0,
    )
    sizes = sizes_of(sampling, "QwenImagePipeline", {}, rows=2, text_tokens=512, vae_scale=8, template_tokens=34)
    assert (sizes["sequence"], sizes["text_tokens"]) == (546, 512)


def test_a_z_image_runs_as_before_after_its_tokens_were_counted_on_shapes(build_denoiser: Callable[..., Any]) -> None:
    """It keeps the waves of its places where they were computed last."""
    denoiser, family = build_denoiser("zimage"), FAMILIES["zimage"]
    inputs = family.arguments(family.component(denoiser, height=32, width=32).inputs)
    counted = costs.positions(denoiser, inputs)
    assert counted["layers.0.attention.to_q"] == 2 * (32 + 64)
    assert denoiser(**inputs).sample[0].isfinite().all()


def test_absent_components_are_left_out(build_pipeline: Callable[..., Any]) -> None:
    pipeline = build_pipeline("sd3")
    pipeline.vae = None
    assert list(of(pipeline, "sd3")) == ["text_encoder", "text_encoder_2", "transformer"]


def test_a_unet_with_further_inputs_is_an_error_that_names_them(build_pipeline: Callable[..., Any]) -> None:
    with pytest.raises(ModelError, match="num_class_embeds=8"):
        of(build_pipeline("sd15", num_class_embeds=8), "sd15")
