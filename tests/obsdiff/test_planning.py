"""Plans from configurations alone, on the meta device, against the paper's tables.

The printed digits are those of arXiv 2510.06751, tables 3, 4 and 9, at 1024 x 1024 pixels and 77 text tokens.
"""

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from obsdiff import costs, packages, planning, stream_costs, unit_costs
from obsdiff.estimates import WORKSPACE_BYTES, Streams, Workload
from obsdiff.families import Family
from obsdiff.families.table import family_of
from obsdiff.groups import Consumer, Group, LinearSpec, Producer
from obsdiff.sparsity import Sparsity, parse
from obsdiff_runtime.errors import ResourceError

CONFIGS = Path(__file__).parent / "configs"
WORKLOAD = Workload(
    prompts=100, batch_size=4, steps=25, guided=True, calibrates=True, packages=4, flops_per_second=1e14
)


STREAMED = Workload(**{**vars(WORKLOAD), "streams": Streams(draws=3, trajectory_steps=13, kept_steps=2, tokens=256)})


def nothing(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


INPUTS: dict[str, dict[str, Any]] = {
    "sd3": {
        "hidden_states": nothing(1, 16, 128, 128),
        "encoder_hidden_states": nothing(1, 77, 4096),
        "pooled_projections": nothing(1, 2048),
        "timestep": nothing(1),
    },
    "unet": {
        "sample": nothing(1, 4, 128, 128),
        "timestep": nothing(1),
        "encoder_hidden_states": nothing(1, 77, 2048),
        "added_cond_kwargs": {"text_embeds": nothing(1, 1280), "time_ids": nothing(1, 6)},
    },
    "flux": {
        "hidden_states": nothing(1, 4096, 64),
        "encoder_hidden_states": nothing(1, 512, 4096),
        "pooled_projections": nothing(1, 768),
        "timestep": nothing(1),
        "img_ids": nothing(4096, 3),
        "txt_ids": nothing(512, 3),
    },
    "chroma": {
        "hidden_states": nothing(1, 4096, 64),
        "encoder_hidden_states": nothing(1, 512, 4096),
        "attention_mask": nothing(1, 512 + 4096).bool(),
        "timestep": nothing(1),
        "img_ids": nothing(4096, 3),
        "txt_ids": nothing(512, 3),
    },
    "pixart": {
        "hidden_states": nothing(1, 4, 128, 128),
        "encoder_hidden_states": nothing(1, 120, 4096),
        "encoder_attention_mask": nothing(1, 120),
        "timestep": nothing(1),
        "added_cond_kwargs": {"resolution": nothing(1, 2), "aspect_ratio": nothing(1, 1)},
    },
    "auraflow": {
        "hidden_states": nothing(1, 4, 128, 128),
        "encoder_hidden_states": nothing(1, 256, 2048),
        "timestep": nothing(1),
    },
    "sana": {
        "hidden_states": nothing(1, 32, 32, 32),
        "encoder_hidden_states": nothing(1, 300, 2304),
        "encoder_attention_mask": nothing(1, 300),
        "timestep": nothing(1),
    },
    "qwen": {
        "hidden_states": nothing(1, 4096, 64),
        "encoder_hidden_states": nothing(1, 512, 3584),
        "encoder_hidden_states_mask": nothing(1, 512),
        "timestep": nothing(1),
        "img_shapes": [[(1, 64, 64)]],
    },
    "lumina2": {
        "hidden_states": nothing(1, 16, 128, 128),
        "encoder_hidden_states": nothing(1, 256, 2304),
        "encoder_attention_mask": nothing(1, 256).long(),
        "timestep": nothing(1),
    },
    "hunyuan": {
        "hidden_states": nothing(1, 4, 128, 128),
        "timestep": nothing(1),
        "encoder_hidden_states": nothing(1, 77, 1024),
        "text_embedding_mask": nothing(1, 77),
        "encoder_hidden_states_t5": nothing(1, 256, 2048),
        "text_embedding_mask_t5": nothing(1, 256),
        "image_meta_size": nothing(1, 6),
        "style": torch.zeros(1, dtype=torch.int64, device="meta"),
    },
    "zimage": {"x": [nothing(16, 1, 128, 128)], "t": nothing(1), "cap_feats": [nothing(512, 2560)]},
    "ltx": {
        "hidden_states": nothing(1, 21 * 16 * 22, 128),
        "encoder_hidden_states": nothing(1, 128, 4096),
        "timestep": nothing(1),
        "encoder_attention_mask": nothing(1, 128),
        "video_coords": nothing(1, 3, 21 * 16 * 22),
    },
    "wan": {
        "hidden_states": nothing(1, 16, 21, 60, 104),
        "encoder_hidden_states": nothing(1, 512, 4096),
        "timestep": nothing(1),
    },
}


def _inputs(family: Family, config: dict[str, Any]) -> dict[str, Any]:
    """Widths of text differ between the models of FLUX.2, and sizes between those of DiT."""
    if family.name == "dit":
        sides = (config["sample_size"],) * 2
        label = torch.zeros(1, dtype=torch.int64, device="meta")
        return {"hidden_states": nothing(1, 4, *sides), "timestep": nothing(1), "class_labels": label}
    if family.name != "flux2":
        return INPUTS[family.name]
    return {
        "hidden_states": nothing(1, 4096, 128),
        "encoder_hidden_states": nothing(1, 512, config["joint_attention_dim"]),
        "timestep": nothing(1),
        "img_ids": nothing(4096, 4),
        "txt_ids": nothing(512, 4),
    }


@functools.cache
def model(name: str) -> tuple[nn.Module, Family, dict[str, int]]:
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    with torch.device("meta"):
        denoiser: nn.Module = getattr(diffusers, config["_class_name"]).from_config(config)
    family = family_of(denoiser)
    inputs = _inputs(family, config) | ({"guidance": nothing(1)} if config.get("guidance_embeds") else {})
    return denoiser, family, costs.positions(denoiser, inputs)


def planned(
    name: str, sparsity: str, *, protect: int = 0, align: int = 1, workload: Workload = WORKLOAD
) -> planning.Plan:
    denoiser, family, positions = model(name)
    linears, groups = family.linears(denoiser), family.groups(denoiser)
    last = max(linear.block for linear in linears) - protect
    return planning.plan(
        denoiser,
        family,
        parse(sparsity),
        linears=linears,
        groups=[group for group in groups if protect <= group.block <= last],
        positions=positions,
        align=align,
        workload=workload,
    )


@pytest.mark.parametrize(
    ("name", "share", "heads", "ffn", "billions", "tera"),
    [
        ("sd35_large", "15%", 6, 8269, 7.28, 9.63),
        ("sd35_large", "20%", 8, 7782, 7.02, 9.09),
        ("sd35_large", "25%", 10, 7296, 6.76, 8.55),
        ("sd35_large", "30%", 11, 6810, 6.54, 8.10),
        ("sd3_medium", "10%", 2, 5530, 1.91, 2.59),
        ("sd3_medium", "15%", 4, 5222, 1.83, 2.43),
        ("sd3_medium", "20%", 5, 4915, 1.78, 2.31),
        ("sd3_medium", "25%", 6, 4608, 1.72, 2.19),
    ],
)
def test_structured_sd3_comes_out_as_printed(
    name: str, share: str, heads: int, ffn: int, billions: float, tera: float
) -> None:
    plan = planned(name, f"structured:{share}", protect=1)
    assert {cut.units - cut.kept for cut in plan.cuts if cut.kind == "heads"} == {heads}
    assert {cut.kept for cut in plan.cuts if cut.kind == "ffn"} == {ffn}
    assert round(plan.parameters_after / 1e9, 2) == billions
    assert round(plan.macs_after / 1e12, 2) == tera


@pytest.mark.parametrize(
    ("name", "parameters", "beside"),
    [
        ("flux1_dev", 11_901_408_320, 0.001),
        ("flux1_schnell", 11_891_178_560, 0.001),
        ("chroma1_hd", 8_899_983_424, 0.005),  # 8.9 B, says the model's card; modulations are 344 tokens of their own
    ],
)
def test_flux_has_its_published_size_and_twelve_squares_a_token_in_each_block(
    name: str, parameters: int, beside: float
) -> None:
    """Both streams of a joint block and a single block: 4 projections of attention, 8 of the feed-forward."""
    plan = planned(name, "structured:25%")
    assert plan.parameters_before == parameters
    weights, tokens = 12 * 3072**2, 4096 + 512
    blocks = (19 + 38) * weights * tokens
    assert (
        blocks < plan.macs_before < (1 + beside) * blocks
    )  # beside them biases, embeddings, and what a row needs once
    lost = (weights + (3 + 4) * 3072) // 4  # the biases are those of q, k, v and of the neurons
    assert plan.parameters_before - plan.parameters_after == (19 * 2 + 38) * lost
    assert plan.macs_before - plan.macs_after == (19 + 38) * lost * tokens


@pytest.mark.parametrize(
    ("name", "billions", "width", "double", "single"),
    [
        ("flux2_klein_4b", 3.9, 3072, 5, 20),
        ("flux2_klein_9b", 9.1, 4096, 8, 24),
        ("flux2_dev", 32.2, 6144, 8, 48),
    ],
)
def test_flux2_has_its_published_size_and_thirteen_squares_a_token_in_each_block(
    name: str, billions: float, width: int, double: int, single: int
) -> None:
    """Both streams of a joint block and a single block: 4 of attention, 9 of the gated feed-forward; no biases."""
    plan = planned(name, "structured:25%")
    assert round(plan.parameters_before / 1e9, 1) == billions  # 4, 9 and 32 B, say the model cards
    weights, tokens = 13 * width**2, 4096 + 512
    blocks = (double + single) * weights * tokens
    assert blocks < plan.macs_before < 1.01 * blocks  # beside them embeddings, and what a row needs once
    lost = weights // 4
    assert plan.parameters_before - plan.parameters_after == (double * 2 + single) * lost
    assert plan.macs_before - plan.macs_after == (double + single) * lost * tokens


@pytest.mark.parametrize(
    ("name", "parameters"), [("pixart_alpha_1024", 611_349_152), ("pixart_sigma_1024", 610_856_096)]
)
def test_pixart_has_its_published_size_and_fourteen_squares_a_patch_in_each_block(name: str, parameters: int) -> None:
    """Self-attention 4, queries and output of the other 2, the feed-forward 8; keys and values 2 a text token."""
    plan = planned(name, "structured:25%")
    assert plan.parameters_before == parameters  # 0.6 B, says the paper
    width, image, text = 1152, 4096, 120
    blocks = 28 * width**2 * (14 * image + 2 * text)
    assert blocks < plan.macs_before < 1.002 * blocks  # beside them biases, embeddings, and what a row needs once
    lost = [(14 * width**2 + (4 + 4) * width) // 4, (2 * width**2 + 2 * width) // 4]  # a patch, a text token
    assert plan.parameters_before - plan.parameters_after == 28 * sum(lost)
    assert plan.macs_before - plan.macs_after == 28 * (lost[0] * image + lost[1] * text)


def test_auraflow_has_its_published_size_and_twelve_squares_a_token_in_each_block() -> None:
    """As FLUX's, but that neurons are 8/3 of the width, of three matrices; without biases."""
    plan = planned("auraflow_v03", "structured:25%")
    assert round(plan.parameters_before / 1e9, 1) == 6.9  # 6.8 B, says the model's card, of its first version
    width, neurons, image, text = 3072, 8192, 4096, 256 + 8
    weights = 4 * width**2 + 3 * width * neurons
    blocks = (4 + 32) * weights * (image + text)
    assert blocks < plan.macs_before < 1.003 * blocks
    lost = weights // 4
    assert plan.parameters_before - plan.parameters_after == (4 * 2 + 32) * lost
    assert plan.macs_before - plan.macs_after == (4 + 32) * lost * (image + text)


@pytest.mark.parametrize(
    ("name", "parameters", "width", "blocks", "heads"),
    [
        ("sana_600m_1024", 591_747_872, 1152, 28, (9 * 32, 4 * 72)),
        ("sana_1600m_1024", 1_604_462_752, 2240, 20, (18 * 32, 5 * 112)),  # 17.5 of 70 heads are 18
    ],
)
def test_sana_has_its_published_size_and_thirteen_squares_and_a_half_a_pixel_in_each_block(
    name: str, parameters: int, width: int, blocks: int, heads: tuple[int, int]
) -> None:
    """Self-attention 4, queries and output of the other 2, the feed-forward 7.5; keys and values 2 a text token."""
    plan = planned(name, "structured:25%")
    assert plan.parameters_before == parameters  # 592 M and 1604 M, says the paper
    image, text = 1024, 300
    products = blocks * width**2 * (13.5 * image + 2 * text)
    assert products < plan.macs_before < 1.02 * products  # beside them filters of 3 x 3, embeddings, once a row
    own, other = heads
    neurons = 5 * width // 8  # a quarter of 2.5 widths
    a_pixel = 4 * width * own + (2 * width + 1) * other + (3 * width + 2 + 2 * (9 + 1)) * neurons
    a_token = 2 * (width + 1) * other
    assert plan.parameters_before - plan.parameters_after == blocks * (a_pixel + a_token)
    assert plan.macs_before - plan.macs_after == blocks * (a_pixel * image + a_token * text)


@pytest.mark.parametrize(
    ("name", "dense", "width", "blocks"),
    [
        ("sana_sprint_600m_1024", "sana_600m_1024", 1152, 28),
        ("sana_sprint_1600m_1024", "sana_1600m_1024", 2240, 20),
    ],
)
def test_sana_sprint_is_sana_told_its_guidance_and_loses_neurons_alone(
    name: str, dense: str, width: int, blocks: int
) -> None:
    """Its configurations are those that diffusers' script for converting Sana writes, and the two norms of Sana 1.5.

    Beside Sana's weights it has norms of queries and keys in both attentions, and a network of 256 waves for guidance.
    """
    plan, sana = planned(name, "ffn:25%"), planned(dense, "ffn:25%")
    more = blocks * 4 * width + (256 + 1) * width + (width + 1) * width
    assert plan.parameters_before == sana.parameters_before + more
    assert plan.parameters_before - plan.parameters_after == sana.parameters_before - sana.parameters_after > 0
    assert plan.macs_before - plan.macs_after == sana.macs_before - sana.macs_after
    assert {cut.kind for cut in plan.cuts} == {"ffn"}


def test_qwen_image_has_its_published_size_and_twelve_squares_a_token_in_each_block() -> None:
    """A quarter of it is cut: biases too; in the last block only neurons of the image."""
    plan = planned("qwen_image", "structured:25%")
    assert plan.parameters_before == 20_430_401_088  # 20 B, says the paper; its files hold twice as many bytes
    width, image, text = 3072, 4096, 512
    weights = 12 * width**2  # of a stream in a block, beside 6 that are read once an image
    blocks = 60 * weights * (image + text)
    assert blocks < plan.macs_before < 1.003 * blocks
    neurons = (2 * width + 1) * width  # that a stream loses in a block: a quarter
    lost = (width + 3 / 4) * width + neurons
    assert plan.parameters_before - plan.parameters_after == 59 * 2 * lost + neurons
    assert plan.macs_before - plan.macs_after == 59 * lost * (image + text) + neurons * image


def test_lumina2_has_its_published_size_and_a_third_of_keys_and_values() -> None:
    """In a block queries and output are a square of the width each, keys and values 2/3, the feed-forward 12."""
    plan = planned("lumina_image_2", "structured:25%")
    assert plan.parameters_before == 2_609_769_152  # 2.6 B, says the paper
    width, image, text = 2304, 64 * 64, 256
    weights = 2 * width**2 + 2 * width * (8 * 96) + 3 * width * 4 * width
    tokens = 26 * (text + image) + 2 * image + 2 * text
    assert weights * tokens < plan.macs_before < 1.01 * weights * tokens  # beside them embeddings, and the output
    lost = weights // 4  # 2 of 8 keys with 6 of 24 heads that read them; a quarter of the neurons
    assert plan.parameters_before - plan.parameters_after == 30 * lost
    assert plan.macs_before - plan.macs_after == lost * tokens


def test_z_image_has_its_published_size_and_twelve_squares_a_token_in_each_block() -> None:
    """Of the published transformer/config.json, as others quote it: those of Turbo and of Z-Image are the same."""
    plan = planned("z_image_turbo", "structured:20%")
    assert plan.parameters_before == 6_154_908_736  # 6 B, says the model's card
    width, image, text = 3840, 64 * 64, 512
    weights = 4 * width**2 + 3 * width * (8 * width // 3)
    tokens = 30 * (text + image) + 2 * image + 2 * text
    assert weights * tokens < plan.macs_before < 1.01 * weights * tokens  # beside them embeddings, and the output
    lost = weights // 5  # 6 of 30 heads, and a fifth of the neurons
    assert plan.parameters_before - plan.parameters_after == 34 * lost
    assert plan.macs_before - plan.macs_after == lost * tokens


@pytest.mark.parametrize(("name", "parameters"), [("hunyuan_v11", 1_516_534_048), ("hunyuan_v12", 1_499_952_032)])
def test_hunyuan_has_its_published_size_and_its_skips_read_two_streams(name: str, parameters: int) -> None:
    """Self-attention 4, queries and output of the other 2, the neurons 2 times 4.3637; a skip 2."""
    plan = planned(name, "structured:25%")
    assert plan.parameters_before == parameters  # 1.5 B, says the model's card
    width, neurons, text_width, image, text = 1408, 6144, 1024, 4096, 77 + 256
    a_patch, a_token = 6 * width**2 + 2 * width * neurons, 2 * width * text_width
    products = 40 * (a_patch * image + a_token * text) + 19 * 2 * width**2 * image
    assert products < plan.macs_before < 1.01 * products  # beside them biases, embeddings, and what a row needs once
    heads = 4 * 88  # of 16 heads, in each of two attentions
    patch = 4 * width * heads + 3 * heads + (2 * width + 1) * heads + (2 * width + 1) * neurons // 4
    token = 2 * (text_width + 1) * heads
    assert plan.parameters_before - plan.parameters_after == 40 * (patch + token)
    assert plan.macs_before - plan.macs_after == 40 * (patch * image + token * text)


def test_wan_has_its_published_size_and_reads_all_frames_at_once() -> None:
    """A film of 81 frames, 480 x 832: 21 latent frames of 30 x 52 patches. Only neurons can go."""
    plan = planned("wan21_1_3b", "ffn:0.25")
    assert plan.parameters_before == 1_418_996_800  # 1.3 B, says the model's card
    width, neurons, image, text = 1536, 8960, 21 * 30 * 52, 512
    products = 30 * ((6 * width**2 + 2 * width * neurons) * image + 2 * width**2 * text)
    assert products < plan.macs_before < 1.01 * products  # beside them biases, embeddings, and what a film needs once
    lost = 30 * (2 * width + 1) * neurons // 4
    assert plan.parameters_before - plan.parameters_after == lost
    assert plan.macs_before - plan.macs_after == pytest.approx(lost * image, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "side", "published"), [("dit_xl_2_256", 16, 118.64e9), ("dit_xl_2_512", 32, 524.60e9)]
)
def test_dit_has_its_published_size_and_work(name: str, side: int, published: float) -> None:
    """diffusers has tables of timesteps and classes in each block, and none of places, which the paper counts."""
    plan = planned(name, "structured:25%")
    width, neurons, image, places = 1152, 4608, side**2, 256 * 1152
    tables = 1001 * width + (256 + 1) * width + (width + 1) * width
    assert plan.parameters_before - 27 * tables == 675_129_632 - places
    attention = 28 * 2 * width * image**2  # which the paper counts and a plan does not
    assert plan.macs_before + attention == pytest.approx(published, rel=5e-3)
    heads = 4 * 72  # of 16
    lost = 4 * width * heads + 3 * heads + (2 * width + 1) * neurons // 4
    assert plan.parameters_before - plan.parameters_after == 28 * lost
    assert plan.macs_before - plan.macs_after == 28 * lost * image


def test_hunyuan_holds_nineteen_skips_in_both_streams_at_its_middle() -> None:
    plan = planned("hunyuan_v12", "2:4", workload=STREAMED)
    assert plan.streams is not None
    image, text = 4096 * 1408, (77 + 256) * 1024
    parts = 2 * 2 * 1408 * 4096  # what both attentions gave, in both streams
    rows = round(STREAMED.evaluations * STREAMED.kept_share)
    assert plan.streams.waiting_bytes == 4 * rows * (2 * (image + text) + 2 * 19 * image + parts)


@pytest.mark.parametrize(("share", "billions", "tera"), [("15%", 2.24, 5.33), ("20%", 2.13, 5.12), ("30%", 1.91, 4.70)])
def test_structured_sdxl_comes_out_as_printed(share: str, billions: float, tera: float) -> None:
    """All 70 blocks; "TFLOPs" are two per MAC here."""
    plan = planned("sdxl", f"structured:{share}")
    assert round(plan.parameters_after / 1e9, 2) == billions
    assert round(2 * plan.macs_after / 1e12, 2) == tera


@pytest.mark.parametrize(
    ("name", "billions", "tera"), [("sd35_large", 8.06, 11.26), ("sd3_medium", 2.03, 2.84), ("sdxl", 2.57, 5.98)]
)
def test_the_dense_models_cost_what_is_printed(name: str, billions: float, tera: float) -> None:
    plan = planned(name, "2:4")
    assert round(plan.parameters_before / 1e9, 2) == billions
    assert round((2 if name == "sdxl" else 1) * plan.macs_before / 1e12, 2) == tera
    assert plan.parameters_after == plan.parameters_before
    assert plan.macs_after == plan.macs_before


def test_savings_follow_the_closed_form() -> None:
    """Per block with r heads and n neurons out, both streams: -2 (4 d 64 r + 3 * 64 r + 2 d n + n) parameters."""
    plan = planned("sd35_large", "structured:0.2", protect=1)
    d, r, n = 2432, 8, 1946
    assert plan.parameters_before - plan.parameters_after == 36 * 2 * (4 * d * 64 * r + 3 * 64 * r + 2 * d * n + n)


def test_a_loaded_shrunk_model_costs_what_was_planned() -> None:
    """A small model with real weights, and one built narrower: costs of the one after the cut are the other's."""

    def small(heads: int, ffn: int) -> nn.Module:
        block = nn.Sequential(
            nn.Linear(16, heads * 4), nn.Linear(heads * 4, 16), nn.Linear(16, ffn), nn.Linear(ffn, 16)
        )
        return block.half()

    before, after = small(4, 64), small(3, 48)
    into, out = (Producer(name="0"), Producer(name="2")), (Consumer(name="1"), Consumer(name="3"))
    heads = Group(name="h", units=4, width=4, producers=into[:1], consumers=out[:1], block=0, kind="heads")
    ffn = Group(name="f", units=64, width=1, producers=into[1:], consumers=out[1:], block=0, kind="ffn")
    positions = costs.positions(before, {"input": torch.ones(1, 7, 16)})
    assert positions == {"0": 7, "1": 7, "2": 7, "3": 7}
    specs = tuple(spec(name, *module.weight.shape[::-1]) for name, module in before.named_children())
    plan = planning.plan(
        before,
        FakeFamily(specs),  # type: ignore[arg-type]
        Sparsity(heads=0.25, ffn=0.25),
        linears=specs,
        groups=[heads, ffn],
        positions=positions,
        align=1,
        workload=WORKLOAD,
    )
    assert plan.parameters_after == costs.parameters(after)
    assert plan.macs_after == costs.macs(after, costs.positions(after, {"input": torch.ones(1, 7, 16)}))
    assert plan.estimates.checkpoint_bytes == 2 * plan.parameters_after
    assert next(before.parameters()).device.type == "cpu"


class FakeFamily:
    described = True

    def __init__(self, specs: tuple[LinearSpec, ...]) -> None:
        self._specs = specs

    def linears(self, denoiser: nn.Module) -> tuple[LinearSpec, ...]:
        return self._specs


def spec(
    name: str, inputs: int, outputs: int, *, block: int = 0, tier: int = 0, reads: str | None = None
) -> LinearSpec:
    return LinearSpec(
        name=name,
        block=block,
        tier=tier,
        reads=reads or name,
        in_features=inputs,
        out_features=outputs,
        tokens="image",
    )


def group_of(units: int, kind: str) -> Group:
    return Group(name="g", kind=kind, block=0, units=units, width=1, producers=(), consumers=())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("units", "ratio", "align", "kept"),
    [
        (9728, 0.15, 1, 8269),
        (9728, 0.15, 64, 8256),
        (9728, 0.30, 64, 6784),
        (256, 0.25, 64, 192),
        (256, 0.10, 64, 256),
        (256, 0.99, 64, 64),
        (48, 0.5, 64, 48),
        (160, 0.0, 64, 160),
        (160, 0.05, 64, 128),
        (100, 0.999, 1, 1),
    ],
)
def test_ffn_widths_are_rounded_to_what_kernels_like(units: int, ratio: float, align: int, kept: int) -> None:
    removed = unit_costs.removals([group_of(units, "ffn")], Sparsity(ffn=ratio, heads=0.9), align=align)
    assert units - removed["g"] == kept


@pytest.mark.parametrize(
    ("units", "ratio", "kept"), [(38, 0.25, 28), (10, 0.15, 8), (10, 0.25, 8), (2, 0.9, 1), (1, 0.9, 1)]
)
def test_heads_stay_whole_and_one_is_kept(units: int, ratio: float, kept: int) -> None:
    """Halves go to even: 9.5, 1.5 and 2.5 heads are 10, 2 and 2."""
    removed = unit_costs.removals([group_of(units, "heads")], Sparsity(heads=ratio), align=64)
    assert units - removed["g"] == kept


def test_q_k_and_v_share_a_gram_so_a_block_has_eight() -> None:
    plan = planned("sd3_medium", "2:4")
    assert sum(package.grams for package in plan.packages) == 23 * 8 + 5
    assert sum(package.linears for package in plan.packages) == len(plan.layers) == 23 * 12 + 9
    assert {layer.pattern for layer in plan.layers} == {"2:4"}
    assert plan.zeros == sum(layer.inputs * layer.outputs for layer in plan.layers) // 2


def test_calls_are_counted_over_all_passes() -> None:
    assert planned("sd3_medium", "2:4").denoiser_calls == 4 * 25 * 25
    structured = planned("sd3_medium", "structured:0.2+2:4", protect=1)
    assert [package.kind for package in structured.packages] == ["units"] * 4 + ["weights"] * 4
    assert structured.denoiser_calls == 8 * 25 * 25
    silent = Workload(**{**vars(WORKLOAD), "calibrates": False})
    assert planned("sd3_medium", "2:4", workload=silent).denoiser_calls == 0


def test_pruned_weights_that_wait_for_the_end_of_their_package_are_counted() -> None:
    one = Workload(**{**vars(WORKLOAD), "packages": 1})
    plan = planned("sd3_medium", "2:4", workload=one)
    pruned = sum(layer.inputs * layer.outputs for layer in plan.layers)
    solver = 6 * 8 * (4 * 1536) ** 2
    held = plan.estimates.memory_bytes - plan.gram_bytes
    assert held == 4 * (plan.parameters_before + pruned) + solver + WORKSPACE_BYTES


def test_a_pattern_after_a_cut_is_checked_at_the_width_that_is_left() -> None:
    plan = planned("sd3_medium", "structured:0.15+2:4", protect=1)
    out = next(layer for layer in plan.layers if layer.name == "transformer_blocks.1.ff.net.2")
    assert (out.kept_inputs, out.pattern, out.reason) == (5222, None, "5222 inputs are no multiple of 4")
    assert plan.notes == (
        "44 linears stay dense, such as transformer_blocks.1.ff.net.2: 5222 inputs are no multiple of 4",
    )
    aligned = planned("sd3_medium", "structured:0.15+2:4", protect=1, align=64)
    assert not aligned.notes
    assert all(layer.pattern == "2:4" for layer in aligned.layers)


def test_a_share_that_rounds_to_nothing_is_noted() -> None:
    plan = planned("sd3_medium", "structured:0.5%", protect=1, align=64)
    assert len(plan.notes) == 2
    assert "heads:0.005 rounds to nothing in 22 groups" in plan.notes[0]
    assert "lower --align 64" in plan.notes[1]


def test_nothing_asked_costs_and_changes_nothing() -> None:
    plan = planned("sd3_medium", "structured:0")
    assert plan.parameters_after == plan.parameters_before
    assert not plan.packages
    assert not plan.layers
    assert not plan.notes


def tiers(count: int, width: int = 8) -> list[LinearSpec]:
    return [
        spec(f"{block}.{tier}.{name}", width, 4, block=block, tier=tier, reads=f"{block}.{tier}")
        for block in range(count)
        for tier in range(2)
        for name in "qk"
    ]


def test_packages_are_contiguous_near_equal_and_tear_no_tier_apart() -> None:
    linears = tiers(5)
    parts = packages.split_packages(linears[::-1], packages=4)
    assert [len({(linear.block, linear.tier) for linear in part}) for part in parts] == [3, 3, 2, 2]
    assert sorted(linear.name for part in parts for linear in part) == sorted(linear.name for linear in linears)
    places = [(linear.block, linear.tier) for part in parts for linear in part]
    assert places == sorted(places)


def test_fewer_tiers_than_packages_give_one_package_each() -> None:
    assert len(packages.split_packages(tiers(1), packages=4)) == 2
    assert packages.split_packages([], packages=4) == []


def test_a_byte_budget_fills_packages_and_counts_shared_inputs_once() -> None:
    one = packages.gram_bytes(tiers(1)[:2])
    assert one == 8 * 8 * 8
    parts = packages.split_packages(tiers(4), packages=1, budget_bytes=3 * one)
    assert [len(part) for part in parts] == [6, 6, 4]
    with pytest.raises(ResourceError, match=r"0\.0\.q.*--gram-budget"):
        packages.split_packages(tiers(4), packages=1, budget_bytes=one - 1)


def test_a_streamed_plan_has_no_packages_and_counts_blocks() -> None:
    """100 prompts drawn three times in batches of 4: 75 batches, of 13 steps each, 2 of them kept."""
    plan = planned("sd3_medium", "2:4", workload=STREAMED)
    streams = plan.streams
    assert streams is not None
    assert not plan.packages
    assert plan.denoiser_calls == 75 * 13
    assert streams.kept_calls == 75 * 2
    assert streams.blocks == 24
    assert streams.linears == 23 * 12 + 9
    assert streams.grams == 23 * 8 + 5
    assert streams.block_calls == 150 * 24 * (2 * 4 + 1)  # a dense and a pruned run a tier, and one past it
    assert streams.gradient_calls == 90  # a fifth of the calls, each forwards, again block by block, and backwards
    walk = (3 + 4 + 4 + 8) + (0 + 3 + 4 + 4 + 8)  # of a block's 12 squares of its width; see replays
    assert streams.denoiser_calls == pytest.approx(75 * 13 + 90 + 150 * walk / 12, rel=1e-3)
    lean = Workload(**{**vars(STREAMED), "streams": replace(STREAMED.streams, replay=False)})
    again = planned("sd3_medium", "2:4", workload=lean).streams
    assert again is not None
    walk = (3 + 4 + 8 + 12) + (0 + 3 + 4 + 8 + 12)
    assert again.denoiser_calls == pytest.approx(75 * 13 + 90 + 150 * walk / 12, rel=1e-3)
    assert again.waiting_bytes < streams.waiting_bytes


def test_a_streamed_plan_counts_what_gradients_hold() -> None:
    plan, streams = planned("sd3_medium", "2:4", workload=STREAMED), STREAMED.streams
    assert plan.streams is not None
    assert streams is not None
    width = 1536
    narrow, wide = 24 * 8 - 1 + 23 + 24, 23 + 24  # q, k, v, out of both streams; down; up
    assert plan.streams.metric_bytes == sum(
        count * (4 * out * 128 + 8 * (out + 128)) for count, out in ((narrow, width), (wide, 4 * width))
    )
    sums = 8 * 257 * width * (narrow + 4 * wide)
    read = given = 5 * width + 4 * width  # by six linears of a stream
    block = (4096 + 77) * (width + 4 * (read + given))
    assert plan.streams.gradient_bytes == sums + 4 * 8 * block
    plain = Workload(**{**vars(STREAMED), "streams": replace(streams, metric=False)})
    without = planned("sd3_medium", "2:4", workload=plain)
    assert without.streams is not None
    assert without.streams.gradient_bytes == without.streams.metric_bytes == without.streams.gradient_calls == 0
    assert without.estimates.memory_bytes < plan.estimates.memory_bytes - plan.streams.metric_bytes


def test_measuring_units_is_counted() -> None:
    measuring = Workload(
        **{
            **vars(WORKLOAD),
            "streams": Streams(draws=3, trajectory_steps=13, kept_steps=2, tokens=256, measuring_calls=100),
        }
    )
    without = planned("sd3_medium", "structured:0.25", workload=STREAMED)
    plan = planned("sd3_medium", "structured:0.25", workload=measuring)
    assert plan.streams is not None
    assert without.streams is not None
    assert plan.streams.denoiser_calls == without.streams.denoiser_calls + 100
    assert plan.streams.waiting_bytes >= 4 * 4 * 8 * 24 * (4096 + 77) * 1536  # what 24 blocks gave four probes
    assert plan.estimates.calibration_seconds > without.estimates.calibration_seconds


def test_blocks_in_which_nothing_goes_are_only_passed() -> None:
    """Units of 22 blocks: out of the heads and out of the neurons, two tiers each."""
    plan = planned("sd3_medium", "structured:0.25", protect=1, workload=STREAMED)
    assert plan.streams is not None
    assert plan.streams.block_calls == 150 * (22 * (2 * 2 + 1) + 2 * 2)
    assert plan.streams.linears == 22 * 4


def test_a_streamed_run_holds_one_tiers_sums_and_the_hidden_states_of_one_call() -> None:
    plan = planned("sd3_medium", "2:4", workload=STREAMED)
    streams, width = plan.streams, 1536
    assert streams is not None
    out = 2 * 8 * ((4 * width) ** 2 + 2 * 4 * width * width)  # two streams' gram, product and the gap's product
    assert plan.gram_bytes == streams.moment_bytes == out
    rows = 150 * 8  # guided
    held = 2 * (4096 + 77) * width  # two streams
    parts = 2 * (4096 + 77) * width  # what the attention gave, in both
    assert plan.estimates.scratch_bytes == streams.waiting_bytes == 4 * rows * (held + parts)
    assert streams.call_bytes == 4 * (8 * (held + parts) + rows * 77 * width)  # one call's, and the texts of all
    assert 4 * plan.parameters_before < plan.estimates.memory_bytes < streams.waiting_bytes


def test_the_last_batch_of_a_streamed_run_may_be_smaller() -> None:
    few = Workload(**{**vars(STREAMED), "prompts": 3})
    plan = planned("sd3_medium", "2:4", workload=few)
    assert plan.denoiser_calls == 3 * 13  # 9 pictures in batches of 4
    assert few.kept_calls == 6


def test_nothing_asked_of_a_streamed_run_costs_nothing() -> None:
    for sparsity in ("structured:0", "0%"):
        plan = planned("sd3_medium", sparsity, workload=STREAMED)
        assert plan.streams is None
        assert (plan.denoiser_calls, plan.gram_bytes, plan.packages) == (0, 0, ())


def test_a_budget_below_a_tiers_sums_stops_a_streamed_run_too() -> None:
    tight = Workload(**{**vars(STREAMED), "budget_bytes": 2**20})
    with pytest.raises(ResourceError, match=r"grams of transformer_blocks\.0\.\S+ .*--gram-budget"):
        planned("sd3_medium", "2:4", workload=tight)
    wide = Workload(**{**vars(STREAMED), "budget_bytes": 2**40})
    assert planned("sd3_medium", "2:4", workload=wide) == planned("sd3_medium", "2:4", workload=STREAMED)


def test_linears_that_share_an_input_share_a_gram_but_no_product() -> None:
    shared = [spec("q", 8, 4, reads="x"), spec("k", 8, 4, reads="x")]
    assert stream_costs.moment_bytes(shared) == 8 * (8 * 8 + 2 * 4 * 8)


def test_a_plan_is_json() -> None:
    data = json.loads(json.dumps(planned("sd3_medium", "structured:0.2+2:4", protect=1).to_json()))
    assert data["estimates"]["memory_bytes"] > data["parameters_before"] * 4
    assert data["gram_bytes"] == max(package["gram_bytes"] for package in data["packages"])


def test_tokens_of_the_family_agree_with_those_of_a_call() -> None:
    texts = {"sd3_medium": 77, "sdxl": 77, "flux1_dev": 512, "pixart_alpha_1024": 120}
    texts |= {"flux2_klein_4b": 512, "auraflow_v03": 256, "sana_600m_1024": 300, "qwen_image": 512}
    texts |= {"lumina_image_2": 256, "z_image_turbo": 512, "wan21_1_3b": 512}
    texts |= {"auraflow_v03": 256, "sana_600m_1024": 300, "sana_sprint_600m_1024": 300, "hunyuan_v12": 77 + 256}
    texts |= {"dit_xl_2_512": 0, "chroma1_hd": 512, "ltx_video_2b": 128}
    for name, text in texts.items():
        denoiser, family, positions = model(name)
        config: Any = denoiser.config
        sizes = {"wan": (480, 832), "ltx": (512, 704), "dit": (512, 512)}
        height, width = sizes.get(family.name, (1024, 1024))
        tokens = family.tokens(config, height=height, width=width, text_tokens=text, vae_scale=family.vae_scale)
        for linear in family.linears(denoiser):
            assert positions[linear.name] == tokens[linear.tokens], linear.name


def test_the_speed_of_a_device_is_measured() -> None:
    assert costs.matmul_speed("cpu", size=64, seconds=0.01) > 1e6
