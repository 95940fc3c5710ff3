"""SparseGPT is OBS-Diff's sweep on grams in which every step weighs alike: bit for bit, from the running pipeline."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from obsdiff import pruning
from obsdiff.job import given
from obsdiff.pruning import Pruned
from obsdiff.resolving import resolve
from obsdiff.settings import Settings


@pytest.fixture
def prune(build_pipeline: Callable[..., DiffusionPipeline]) -> Callable[..., Pruned]:
    """prune(sparsity, **settings): a tiny SD3, pruned over three steps."""

    def run(sparsity: str, **settings: Any) -> Pruned:
        pipeline = build_pipeline("sd3")
        loaded = given(pipeline)
        asked = Settings(sparsity=sparsity, steps=3, height=32, width=32, max_sequence_length=2, align=1, **settings)
        recipe = resolve(
            asked, model="tiny", family=loaded.family, defaults=loaded.defaults, prompts=["a red circle", "a dog"]
        )
        return pruning.prune(pipeline, loaded.family, recipe)

    return run


def same(left: Pruned, right: Pruned) -> bool:
    old, new = left.denoiser.state_dict(), right.denoiser.state_dict()
    return old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize("sparsity", ["2:4", "0.5", "structured:0.25"])
def test_obsdiff_with_uniform_weights_in_one_package_is_sparsegpt(sparsity: str, prune: Callable[..., Pruned]) -> None:
    paper = prune(sparsity, method="obsdiff", packages=1)
    uniform = prune(sparsity, method="obsdiff", packages=1, time_weights="uniform")
    sparsegpt = prune(sparsity, method="sparsegpt", packages=1)
    assert same(uniform, sparsegpt)
    assert not same(paper, sparsegpt)
    assert same(paper, prune(sparsity, method="sparsegpt", packages=1, time_weights="log-decrease"))
