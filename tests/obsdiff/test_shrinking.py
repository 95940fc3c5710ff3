"""Shrunk models against masked ones."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kinds import EVERY, Keep, uneven
from obsdiff import pointwise
from obsdiff.families.table import family_of
from obsdiff.shrinking import columns, shrink

KINDS = EVERY


def masked(denoiser: nn.Module, keep: Keep) -> nn.Module:
    denoiser = copy.deepcopy(denoiser)
    for group in family_of(denoiser).groups(denoiser):
        removed = sorted(set(range(group.units)) - set(keep.get(group.name, range(group.units))))
        for consumer in group.consumers:
            weight = denoiser.get_submodule(consumer.name).weight
            assert isinstance(weight, nn.Parameter)
            weight.data[:, columns(group, removed, consumer.start)] = 0
    return denoiser


@pytest.mark.parametrize("kind", KINDS)
def test_a_shrunk_model_computes_what_the_masked_one_does(
    kind: str, build_denoiser: Callable[..., Any], denoise: Callable[[nn.Module], Tensor]
) -> None:
    denoiser = build_denoiser(kind)
    keep = uneven(denoiser)
    expected = denoise(masked(denoiser, keep))
    shrink(denoiser, family_of(denoiser), keep)
    # float32 sums over fewer terms in another order: a few ulp
    assert (denoise(denoiser) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_the_groups_of_a_shrunk_model_are_what_was_kept(kind: str, build_denoiser: Callable[..., Any]) -> None:
    denoiser = build_denoiser(kind)
    family = family_of(denoiser)
    before, keep = family.groups(denoiser), uneven(denoiser)
    shrink(denoiser, family, keep)
    after = family.groups(denoiser)
    expected = [(group.name, len(keep.get(group.name, range(group.units))), group.width) for group in before]
    assert [(group.name, group.units, group.width) for group in after] == expected
    for linear in family.linears(denoiser):
        weight = pointwise.matrix(denoiser.get_submodule(linear.name).weight)
        assert weight.shape == (linear.out_features, linear.in_features)


@pytest.mark.parametrize("kind", ["sd35", "sdxl"])
def test_shrinking_twice_is_shrinking_once(
    kind: str, build_denoiser: Callable[..., Any], denoise: Callable[[nn.Module], Tensor]
) -> None:
    once, twice = build_denoiser(kind), build_denoiser(kind)
    family = family_of(once)
    halves = {group.name: list(range(0, group.units, 2)) for group in family.groups(once)}
    shrink(twice, family, halves)
    shrink(twice, family, {group.name: [0] for group in family.groups(twice)})
    shrink(once, family, {name: units[:1] for name, units in halves.items()})
    assert torch.equal(denoise(once), denoise(twice))


@pytest.mark.parametrize("kind", KINDS)
def test_on_the_meta_device_the_same_shapes_come_out(kind: str, build_denoiser: Callable[..., Any]) -> None:
    real = build_denoiser(kind)
    with torch.device("meta"):
        empty = build_denoiser(kind)
    keep = uneven(real)
    shrink(real, family_of(real), keep)
    shrink(empty, family_of(empty), keep)
    shapes = {name: tensor.shape for name, tensor in real.state_dict().items()}
    assert {name: tensor.shape for name, tensor in empty.state_dict().items()} == shapes
    assert family_of(empty).groups(empty) == family_of(real).groups(real)


@pytest.mark.parametrize("kind", KINDS)
def test_keeping_everything_changes_no_bit_and_no_parameter_object(
    kind: str, build_denoiser: Callable[..., Any]
) -> None:
    denoiser = build_denoiser(kind)
    before = dict(denoiser.named_parameters())
    copies = {name: parameter.detach().clone() for name, parameter in before.items()}
    groups = family_of(denoiser).groups(denoiser)
    shrink(denoiser, family_of(denoiser), {group.name: range(group.units) for group in groups})
    for name, parameter in denoiser.named_parameters():
        assert parameter is before[name]
        assert torch.equal(parameter, copies[name])


def test_what_is_left_is_contiguous_and_keeps_its_values_bit_by_bit(build_denoiser: Callable[..., Any]) -> None:
    denoiser = build_denoiser("sd15")
    group = family_of(denoiser).groups(denoiser)[-1]
    into, out = group.producers[0].name, group.readers[0]
    weight, columns_before = denoiser.get_submodule(into).weight.detach(), denoiser.get_submodule(out).weight.detach()
    bias = denoiser.get_submodule(into).bias.detach()
    kept = [1, 4, group.units - 1]
    both_halves = [*kept, *(unit + group.units for unit in kept)]
    shrink(denoiser, family_of(denoiser), {group.name: kept})
    assert torch.equal(denoiser.get_submodule(into).weight, weight[both_halves])
    assert torch.equal(denoiser.get_submodule(into).bias, bias[both_halves])
    assert torch.equal(denoiser.get_submodule(out).weight, columns_before[:, kept])
    assert all(parameter.is_contiguous() for parameter in denoiser.parameters())


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"transformer_blocks.9.attn.heads": [0]}, "no such group"),
        ({"transformer_blocks.0.attn.heads": []}, "no unit is kept"),
        ({"transformer_blocks.0.attn.heads": [0, 4]}, "not all among its 4"),
        ({"transformer_blocks.0.attn.heads": [-1, 0]}, "not all among its 4"),
        ({"transformer_blocks.0.attn.heads": [1, 0]}, "not ascending"),
        ({"transformer_blocks.0.attn.heads": [1, 1]}, "not ascending"),
    ],
)
def test_an_impossible_cut_is_an_error_before_anything_changes(
    keep: Keep, message: str, build_denoiser: Callable[..., Any]
) -> None:
    denoiser = build_denoiser("sd3")
    before = {name: tensor.shape for name, tensor in denoiser.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        shrink(denoiser, family_of(denoiser), {"transformer_blocks.0.ff.neurons": [0], **keep})
    assert {name: tensor.shape for name, tensor in denoiser.state_dict().items()} == before
