"""Linears, groups and token counts of the families, against what a running model does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from torch import nn

from kinds import EVERY
from obsdiff.defaults import Defaults
from obsdiff.families import layers
from obsdiff.families.table import FAMILIES, family_of
from obsdiff.recipe import select
from obsdiff.resolving import resolve
from obsdiff.settings import Settings
from obsdiff.shrinking import shrink
from obsdiff_runtime.errors import ConfigError, ModelError

KINDS = [kind for kind in EVERY if kind != "auraflow"]


def test_an_sd3_block_has_eight_inputs_and_the_last_one_five(build_denoiser: Callable[..., Any]) -> None:
    denoiser = build_denoiser("sd3")
    linears = FAMILIES["sd3"].linears(denoiser)
    inputs = [len({linear.reads for linear in linears if linear.block == block}) for block in range(3)]
    assert inputs == [8, 8, 5]


def test_the_last_sd3_block_has_one_consumer_of_heads_and_six_producers(build_denoiser: Callable[..., Any]) -> None:
    groups = {group.name: group for group in FAMILIES["sd3"].groups(build_denoiser("sd3"))}
    last = groups["transformer_blocks.2.attn.heads"]
    assert len(last.consumers) == 1
    assert len(last.producers) == 6
    assert len(groups["transformer_blocks.1.attn.heads"].consumers) == 2
    assert "transformer_blocks.2.ff_context.neurons" not in groups


def test_the_second_attention_of_sd35_medium_is_a_group_of_its_own(build_denoiser: Callable[..., Any]) -> None:
    names = [group.name for group in FAMILIES["sd3"].groups(build_denoiser("sd35"))]
    assert [name for name in names if "attn2" in name] == [
        "transformer_blocks.0.attn2.heads",
        "transformer_blocks.1.attn2.heads",
    ]


def test_a_single_flux_block_reads_heads_and_neurons_side_by_side(build_denoiser: Callable[..., Any]) -> None:
    denoiser = build_denoiser("flux")
    out = "single_transformer_blocks.0.proj_out"
    starts = {group.name: group.start(out) for group in FAMILIES["flux"].groups(denoiser) if out in group.readers}
    assert starts == {
        "single_transformer_blocks.0.attn.heads": 0,
        "single_transformer_blocks.0.mlp.neurons": denoiser.config.num_attention_heads * 8,
    }


def test_a_single_flux2_block_gives_heads_and_neurons_by_one_linear(build_denoiser: Callable[..., Any]) -> None:
    """Queries and keys, which must stay in their places, then values, then both halves of the neurons."""
    denoiser = build_denoiser("flux2")
    into, out = (f"single_transformer_blocks.0.attn.{name}" for name in ("to_qkv_mlp_proj", "to_out"))
    heads, neurons = (group for group in FAMILIES["flux2"].groups(denoiser) if out in group.readers)
    assert [(each.name, each.start, each.parts, each.free) for each in (*heads.producers, *neurons.producers)] == [
        (into, 0, 2, False),
        (into, 64, 1, True),
        (into, 96, 2, True),
    ]
    assert (heads.start(out), neurons.start(out)) == (0, 32)
    shrink(denoiser, FAMILIES["flux2"], {heads.name: [1, 3], neurons.name: list(range(10))})
    attention = denoiser.get_submodule("single_transformer_blocks.0.attn")
    assert (attention.heads, attention.inner_dim, attention.mlp_hidden_dim) == (2, 16, 10)
    assert attention.to_qkv_mlp_proj._tp_packed_col_blocks == [16, 16, 16, 10, 10]
    assert attention.to_out._tp_packed_row_blocks == [16, 10]


def test_a_hunyuan_skip_reads_what_an_earlier_block_gave(build_denoiser: Callable[..., Any]) -> None:
    denoiser = build_denoiser("hunyuan", num_layers=6)
    linears, given, read = FAMILIES["hunyuan"].linears(denoiser), {}, {}
    for index, block in enumerate(denoiser.blocks):
        block.register_forward_hook(lambda _, __, output, index=index: given.__setitem__(index, output))
        if block.skip_linear is not None:
            block.skip_norm.register_forward_pre_hook(lambda _, args, index=index: read.__setitem__(index, args[0]))
    inputs = FAMILIES["hunyuan"].example(denoiser, batch=1, size=(4, 4), text_tokens=7, pixels=(32, 32))
    denoiser(**FAMILIES["hunyuan"].arguments(inputs))
    since = {linear.block: linear.since for linear in linears if linear.since is not None}
    assert since == {4: 1, 5: 0}
    for block, earlier in since.items():
        assert torch.equal(read[block], torch.cat([given[block - 1], given[earlier]], dim=-1))


def test_a_sana_neuron_takes_two_filters_with_it(build_denoiser: Callable[..., Any]) -> None:
    denoiser = build_denoiser("sana")
    group = next(group for group in FAMILIES["sana"].groups(denoiser) if group.kind == "ffn")
    assert {producer.name.rpartition(".")[2]: producer.parts for producer in group.producers} == {
        "conv_inverted": 2,
        "conv_depth": 2,
    }
    shrink(denoiser, FAMILIES["sana"], {group.name: [3, 5, 8]})
    filters = denoiser.get_submodule("transformer_blocks.0.ff.conv_depth")
    assert (filters.groups, filters.in_channels, filters.out_channels) == (6, 6, 6)
    assert filters.weight.shape == (6, 1, 3, 3)


def test_heads_whose_queries_are_normalised_together_are_no_units(build_denoiser: Callable[..., Any]) -> None:
    """One that goes would change the norm of the others: Sana 1.5, and Sana-Sprint."""
    sana, denoiser = FAMILIES["sana"], build_denoiser("sana_sprint")
    assert {group.kind for group in sana.groups(denoiser)} == {"ffn"}
    defaults = Defaults(height=32, width=32, num_inference_steps=2, guidance_scale=1.0)
    recipe = resolve(Settings(sparsity="structured:0.25"), model="", family=sana, defaults=defaults, prompts=["a cat"])
    with pytest.raises(ConfigError, match=r"no head of this denoiser can go.*ffn:0\.25 removes"):
        select(recipe, sana.linears(denoiser), sana.groups(denoiser))


def test_the_last_block_of_qwen_image_loses_only_neurons_of_the_image(build_denoiser: Callable[..., Any]) -> None:
    """What it makes of the text is read by no one: in no graph, so nothing that the pattern could be looked for in."""
    qwen, denoiser = FAMILIES["qwen"], build_denoiser("qwen", num_layers=2)
    units = [group.name.removeprefix("transformer_blocks.") for group in qwen.groups(denoiser)]
    assert units == ["0.attn.heads", "0.img_mlp.neurons", "0.txt_mlp.neurons", "1.img_mlp.neurons"]
    named = [linear.name for linear in qwen.linears(denoiser)]
    dead = {f"transformer_blocks.1.{name}" for name in ("attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")}
    assert not dead & set(named)
    assert len(named) == 12 + 9
    for name in dead:
        denoiser.get_submodule(name).register_forward_hook(lambda _, __, output: output + 1)
    inputs = qwen.arguments(qwen.component(denoiser, height=32, width=32).inputs)
    with torch.no_grad():
        expected = build_denoiser("qwen", num_layers=2)(**inputs).sample
        assert torch.equal(denoiser(**inputs).sample, expected)


def test_a_z_image_that_reads_images_is_refused(build_denoiser: Callable[..., Any]) -> None:
    with pytest.raises(ModelError, match="siglip_feat_dim: this denoiser is told images"):
        FAMILIES["zimage"].linears(build_denoiser("zimage", n_layers=1, siglip_feat_dim=8))


@pytest.mark.parametrize("option", ["guidance_embeds", "use_additional_t_cond", "use_layer3d_rope"])
def test_a_qwen_image_of_another_kind_is_refused(option: str, build_denoiser: Callable[..., Any]) -> None:
    denoiser = build_denoiser("qwen", num_layers=1, **{option: True})
    with pytest.raises(ModelError, match=f"has {option}, which those of Qwen-Image and Qwen-Image-Edit have not"):
        FAMILIES["qwen"].linears(denoiser)


def test_heads_that_share_keys_and_values_go_with_them(build_denoiser: Callable[..., Any]) -> None:
    """Of 6 heads of 8 channels two read each of 3 keys."""
    denoiser = build_denoiser("lumina2")
    attention = denoiser.layers[0].attn
    keys, queries = attention.to_k.weight.clone(), attention.to_q.weight.clone()
    shrink(denoiser, FAMILIES["lumina2"], {"layers.0.attn.heads": [0, 2]})
    assert attention.heads == 4
    assert torch.equal(attention.to_k.weight, torch.cat([keys[:8], keys[16:]]))
    assert torch.equal(attention.to_q.weight, torch.cat([queries[:16], queries[32:]]))
    assert attention.to_out[0].weight.shape == (48, 32)


def test_geglu_holds_a_neuron_twice(build_denoiser: Callable[..., Any]) -> None:
    groups = FAMILIES["unet"].groups(build_denoiser("sd15"))
    assert {producer.parts for group in groups if group.kind == "ffn" for producer in group.producers} == {2}


def test_all_text_keys_and_values_of_a_unet_share_one_input(build_denoiser: Callable[..., Any]) -> None:
    linears = FAMILIES["unet"].linears(build_denoiser("sdxl"))
    text = [linear for linear in linears if linear.reads == "encoder_hidden_states"]
    blocks = 1 + max(linear.block for linear in linears)
    assert len(text) == 2 * blocks


def test_a_block_of_sd35_large_has_the_papers_macs_per_token_on_the_meta_device() -> None:
    with torch.device("meta"):
        denoiser = SD3Transformer2DModel(num_layers=2, num_attention_heads=38, caption_projection_dim=2432)
    linears = FAMILIES["sd3"].linears(denoiser)
    image = [linear for linear in linears if linear.block == 0 and linear.tokens == "image"]
    # METHOD 2.7: 70.975 M per stream and block
    assert sum(linear.in_features * linear.out_features for linear in image) / 1e6 == pytest.approx(70.975, abs=1e-3)
    assert FAMILIES["sd3"].tokens(denoiser.config, height=1024, width=1024, text_tokens=77)["image"] == 4096


def test_sdxl_has_the_papers_seventy_blocks_and_parameters() -> None:
    with torch.device("meta"):
        denoiser = UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=[1, 2, 10],
            attention_head_dim=[5, 10, 20],
            cross_attention_dim=2048,
            use_linear_projection=True,
        )
    linears = FAMILIES["unet"].linears(denoiser)
    assert max(linear.block for linear in linears) == 69
    # METHOD 1.6: 2.184 B
    assert sum(linear.in_features * linear.out_features for linear in linears) / 1e9 == pytest.approx(2.184, abs=1e-3)
    assert {group.width for group in FAMILIES["unet"].groups(denoiser) if group.kind == "heads"} == {64}


def test_an_unknown_denoiser_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ModelError, match=r"SomeTransformer2DModel.*sd3 \(SD3Transformer2DModel\); unet"):
        family_of("SomeTransformer2DModel")


def test_a_unet_without_transformer_blocks_is_an_error() -> None:
    plain = UNet2DConditionModel(
        down_block_types=("DownBlock2D",),
        mid_block_type="UNetMidBlock2D",
        up_block_types=("UpBlock2D",),
        block_out_channels=(8,),
        norm_num_groups=4,
    )
    with pytest.raises(ModelError, match="no transformer blocks"):
        FAMILIES["unet"].linears(plain)


def test_a_wrapped_linear_is_an_error_that_names_it() -> None:
    class Adapter(nn.Linear):
        pass

    with pytest.raises(ModelError, match="0 is a Adapter, not a plain linear"):
        layers.linear(nn.Sequential(Adapter(4, 4)), "0", block=0, tier=0, reads="x", tokens="image")
