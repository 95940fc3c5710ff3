"""The kit for authors of families: right ones pass, and each way of being wrong is found and named."""

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kinds import EVERY
from obsdiff.families import sd3
from obsdiff.families.checking import problems
from obsdiff.families.table import family_of
from obsdiff.groups import Group, LinearSpec

KINDS = [kind for kind in EVERY if kind not in ("pixart_sigma", "auraflow")]


def sd3_but(**changes: Any) -> Any:
    """The family sd3 that says something else in places."""
    names = [name for name in vars(sd3) if not name.startswith("_")]
    return SimpleNamespace(**{name: getattr(sd3, name) for name in names} | changes)


def linears_but(name: str, **changes: Any) -> Callable[[Any], tuple[LinearSpec, ...]]:
    return lambda denoiser: tuple(
        replace(linear, **changes) if linear.name.endswith(name) else linear for linear in sd3.linears(denoiser)
    )


def groups_but(change: Callable[[Group], Group]) -> Callable[[Any], tuple[Group, ...]]:
    return lambda denoiser: tuple(change(group) for group in sd3.groups(denoiser))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_wrong_with_a_family_of_ours(kind: str, build_denoiser: Callable[..., Any]) -> None:
    denoiser = build_denoiser(kind)
    assert problems(family_of(denoiser), denoiser, onnx=False) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"interpolation_scale": 2.0},
        {"qk_norm": "rms_norm_across_heads"},
        {"patch_size": 2, "attention_bias": True, "norm_elementwise_affine": True, "mlp_ratio": 3.0},
    ],
)
def test_nothing_is_wrong_with_other_sanas(changes: dict[str, Any], build_denoiser: Callable[..., Any]) -> None:
    """Of 2048 pixels and more; Sana 1.5, whose heads are no units; with what no published one has."""
    denoiser = build_denoiser("sana", num_layers=2, **changes)
    assert problems(family_of(denoiser), denoiser, onnx=False) == []


@pytest.mark.parametrize(
    "changes", [{"num_refiner_layers": 2}, {"num_kv_heads": 6}, {"num_kv_heads": 1}, {"patch_size": 1}]
)
def test_nothing_is_wrong_with_other_lumina2s(changes: dict[str, Any], build_denoiser: Callable[..., Any]) -> None:
    """Keys and values of their own for every head, or the same for all."""
    denoiser = build_denoiser("lumina2", **changes)
    assert problems(family_of(denoiser), denoiser, onnx=False) == []


@pytest.mark.parametrize(
    "changes", [{"use_style_cond_and_image_meta_size": False}, {"activation_fn": "geglu", "mlp_ratio": 3.0}]
)
def test_nothing_is_wrong_with_other_hunyuans(changes: dict[str, Any], build_denoiser: Callable[..., Any]) -> None:
    """Two skips; of version 1.2, and with what no published one has."""
    denoiser = build_denoiser("hunyuan", num_layers=6, **changes)
    assert problems(family_of(denoiser), denoiser, onnx=False) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"linears": linears_but("0.attn.to_k", reads="mine")}, "attn.to_k: reads the tensor of"),
        ({"linears": linears_but("0.ff.net.2", reads="transformer_blocks.0.norm1")}, "reads another tensor than"),
        ({"linears": linears_but("0.ff.net.2", tokens="text")}, "tokens, but `tokens` says 11 of text"),
        ({"linears": linears_but("0.ff.net.2", tier=2)}, "reads what another linear of its tier gives"),
        ({"linears": linears_but("1.ff.net.2", block=0)}, "blocks: run in the order"),
        (
            {"groups": groups_but(lambda group: replace(group, consumers=group.consumers[:1]))},
            "cut, the denoiser does not run",
        ),
        (
            {"groups": groups_but(lambda group: replace(group, sizes=()))},
            "cut, the denoiser",
        ),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], sentence: str, build_denoiser: Callable[..., Any]) -> None:
    found = problems(sd3_but(**changes), build_denoiser("sd3"), onnx=False)
    assert any(sentence in problem for problem in found), found


@pytest.mark.parametrize(
    ("mask", "sentence"),
    [("mask", "text_mask: mask is no argument"), ("padding", "looks at tokens that padding masks out")],
)
def test_a_mask_that_masks_nothing_is_named(
    mask: str, sentence: str, build_denoiser: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = build_denoiser("sd3")
    forward = denoiser.forward

    def deaf(*args: Any, padding: Any = None, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    monkeypatch.setattr(denoiser, "forward", deaf)
    padded = {"padding": torch.tensor([[1] * 10 + [0], [1] * 11])}
    told = sd3_but(text_mask=mask, arguments=lambda inputs: {**sd3.arguments(inputs), **padded})
    found = problems(told, denoiser, onnx=False)
    assert any(sentence in problem for problem in found), found


def test_a_group_that_forgets_columns_is_named(build_denoiser: Callable[..., Any]) -> None:
    def halved(group: Group) -> Group:
        return replace(group, units=group.units // 2) if group.kind == "ffn" else group

    denoiser = build_denoiser("sd3")
    found = problems(sd3_but(groups=groups_but(halved)), denoiser, onnx=False)
    assert any("rows, not" in problem for problem in found), found
    assert any("columns of" in problem for problem in found), found


def test_the_page_s_lines_run() -> None:
    page = (Path(__file__).parents[3] / "docs" / "add-a-family.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert code is not None
    exec(code[1], {})


def test_the_denoiser_is_as_before(build_denoiser: Callable[..., Any]) -> None:
    denoiser = build_denoiser("sd3")
    before = copy.deepcopy(denoiser.state_dict())
    problems(sd3, denoiser, onnx=False)
    after = denoiser.state_dict()
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in denoiser.modules())
