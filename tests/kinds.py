"""Denoisers that the tests of families run on: one of each kind that a family describes, by its name in DENOISERS."""

import copy
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Final

import pytest

EVERY: Final = (
    "sd3",
    "sd35",
    "sd15",
    "sdxl",
    "flux",
    "chroma",
    "flux2",
    "pixart",
    "pixart_sigma",
    "auraflow",
    "sana",
    "sana_sprint",
    "qwen",
    "lumina2",
    "zimage",
    "hunyuan",
    "wan",
    "ltx",
    "dit",
)

CLASSES: Final = ("golden retriever", "tench", "208")
"""Prompts of the models that draw classes."""


def prompts_of(family: str, prompts: Sequence[str]) -> Sequence[str]:
    """The prompts, or as many classes where a prompt is one."""
    return CLASSES[: len(prompts)] if family == "dit" else prompts


def latents_of(family: str) -> tuple[int, int]:
    """Sides of latents that its denoiser takes: lopsided where it takes any."""
    return (16, 16) if family == "dit" else (12, 16)


@contextmanager
def no_ftfy() -> Iterator[None]:
    """Until the end, diffusers' `WanImageToVideoPipeline` needs no ftfy, which `WanPipeline` goes without."""
    from diffusers.pipelines.wan import pipeline_wan_i2v

    with pytest.MonkeyPatch.context() as patch:
        stand_in = SimpleNamespace(fix_text=lambda text: text)
        patch.setattr(pipeline_wan_i2v, "ftfy", stand_in, raising=False)
        yield


def masking(pipeline: Any) -> Any:
    """A Chroma pipeline that masks padded text out, as the model was trained: told numbers, attention adds them."""
    prepare = pipeline._prepare_attention_mask

    def booleans(*, attention_mask: Any = None, **told: Any) -> Any:
        return prepare(attention_mask=None if attention_mask is None else attention_mask.bool(), **told)

    pipeline._prepare_attention_mask = booleans
    return pipeline


@contextmanager
def never_traced_again() -> Iterator[None]:
    """Until the end, an export fails that translates its network a second time, for which torch traces it again."""
    import torch

    def traced(*_: object) -> None:
        raise AssertionError("traced again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.export.ExportedProgram, "run_decompositions", traced)
        yield


Keep = dict[str, list[int]]


def uneven(denoiser: Any, seed: int = 0) -> Keep:
    """Some units of most groups, different counts everywhere."""
    from obsdiff.families.table import family_of

    chance = random.Random(seed)
    return {
        group.name: sorted(chance.sample(range(group.units), chance.randint(1, group.units)))
        for group in family_of(denoiser).groups(denoiser)
        if chance.random() < 0.9
    }


def masked_before_the_cut(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Copies of the denoisers that are shrunk from here on, as they are before."""
    from obsdiff import pruning

    copies: list[Any] = []
    shrink = pruning.shrink

    def keep(denoiser: Any, *args: Any) -> None:
        copies.append(copy.deepcopy(denoiser))
        shrink(denoiser, *args)

    monkeypatch.setattr(pruning, "shrink", keep)
    return copies
