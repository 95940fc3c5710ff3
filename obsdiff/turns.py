"""Pipelines whose denoisers draw in turn: which ones they have, and which steps each of them takes.

Most have one, for all steps. Where there are two, as in Wan 2.2, the first takes the steps of much noise; it counts as
the pipeline's denoiser in names and calls, and the one behind it is treated like it, as that of a pipeline of its own:
for this there is the family that looks for it in its place (`placed`). Both are of one configuration.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Final, cast

from diffusers import DiffusionPipeline
from torch import nn

from obsdiff.families import Family
from obsdiff.recipe import Sampling
from obsdiff_runtime.turns import BEHIND, Turns, denoiser_at

BOUNDARY: Final = "boundary_ratio"
"""In a pipeline's configuration: the timestep up to which it does, as a share of those of training."""


class _Placed:
    """A family whose denoiser lies under another name in the pipeline."""

    def __init__(self, family: Family, denoiser: str) -> None:
        self._family, self.denoiser = family, denoiser

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)


def placed(family: Family, denoiser: str) -> Family:
    """The family of a denoiser that lies under this name in the pipeline."""
    return family if denoiser == family.denoiser else cast("Family", _Placed(family, denoiser))


def names(index: Mapping[str, Any], family: Family) -> tuple[str, ...]:
    """The denoisers of a pipeline in their order.

    Args:
        index: its configuration, as in model_index.json; that of a denoiser on its own is empty.
        family: of any of them.
    """
    first = family.denoiser.removesuffix(BEHIND)
    entry = index.get(f"{first}{BEHIND}")
    return (first, f"{first}{BEHIND}") if entry and entry[1] is not None else (first,)


def families(pipeline: DiffusionPipeline, family: Family) -> tuple[Family, ...]:
    """That of each denoiser of a pipeline, in their order."""
    return tuple(placed(family, name) for name in names(pipeline.config, family))


def modules(pipeline: DiffusionPipeline, family: Family) -> dict[str, nn.Module]:
    """The denoisers themselves, by name."""
    return {name: getattr(pipeline, name) for name in names(pipeline.config, family)}


def of(pipeline: DiffusionPipeline, family: Family) -> Turns:
    """From which timestep on each denoiser of a pipeline is called; `family` is that of any of them."""
    denoisers = names(pipeline.config, family)
    if len(denoisers) == 1:
        return {family.denoiser: 0.0}
    boundary = pipeline.config[BOUNDARY] * pipeline.scheduler.config.num_train_timesteps
    return dict(zip(denoisers, (float(boundary), 0.0), strict=True))


def steps_of(turns: Turns, timesteps: Iterable[float], steps: int) -> dict[str, range]:
    """Which of so many steps each denoiser takes.

    Args:
        turns: from `of`.
        timesteps: that the sampler visits; some visit more than there are steps, one after another in a step.
        steps: of the sampler.
    """
    visited = list(dict.fromkeys(timesteps))
    denoisers = [denoiser_at(turns, timestep) for timestep in visited]
    found, start = {}, 0
    for name in turns:
        stop = start + denoisers.count(name) * steps // max(len(visited), steps)
        found[name] = range(start, stop)
        start = stop
    return {**found, name: range(found[name].start, steps)}


def told_apart(records: Mapping[str, Iterable[Any]]) -> tuple[Any, ...]:
    """The records of each denoiser in one list; where there are several, with whose it is before each one's name."""
    if len(records) == 1:
        return tuple(*records.values())
    return tuple(
        dataclasses.replace(record, name=f"{denoiser}.{record.name}")
        for denoiser, own in records.items()
        for record in own
    )


def guidance_scale(sampling: Sampling, family: Family) -> float:
    """Of the denoiser that this is the family of."""
    behind = sampling.guidance_scale_2 if family.denoiser.endswith(BEHIND) else None
    return sampling.guidance_scale if behind is None else behind
