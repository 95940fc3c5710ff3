"""Denoisers that are told what stays of a picture of which a part is drawn anew; see fills.py of the runtime.

Outside of the family they take latents, and the rest of their channels as an input of its own. Calibration draws
pictures anew in a box of their own each, or all of one, where it is given none.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from obsdiff_export.component import Component
from obsdiff_runtime.fills import STATES
from obsdiff_runtime.kinds import Kind, drawn_channels
from obsdiff_runtime.kinds.table import KINDS

MASK: Final = "mask_image"
"""Argument of the calls of their pipelines."""


def keeps(pipeline_class: str) -> bool:
    """Whether a pipeline draws a part of a picture anew, and keeps the rest."""
    kind = KINDS.get(pipeline_class)
    return kind is not None and kind.fills is not None


def of(pipeline_class: str, config: Mapping[str, Any]) -> Kind | None:
    """How the runtime draws by a pipeline whose denoiser, of that configuration, is told what stays; None where not."""
    told = keeps(pipeline_class) and drawn_channels(config) < config["in_channels"]
    return KINDS[pipeline_class] if told else None


def component(found: Component, pipeline_class: str) -> Component:
    """A denoiser's component with what it is told of what stays as an input of its own, where it is told that."""
    kind = of(pipeline_class, found.config)
    if kind is None:
        return found
    return replace(
        found,
        inputs=split(found.inputs, kind, found.config),
        dynamic_axes={**found.dynamic_axes, STATES: found.dynamic_axes[kind.noisy]},
        more_inputs=tuple(split(inputs, kind, found.config) for inputs in found.more_inputs),
    )


def split(inputs: Mapping[str, Tensor], kind: Kind, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """`Family.example` as the graph takes it."""
    own, told = inputs[kind.noisy].tensor_split([kind.channels(config)], dim=1)
    return {**inputs, kind.noisy: own, STATES: told}


def boxes(rows: range, height: int, width: int) -> Tensor:
    """(rows, 1, height, width): 1 in a box of each row's own, of a quarter to three quarters of the sides."""
    masks = torch.zeros(len(rows), 1, height, width)
    for mask, row in zip(masks, rows, strict=True):
        size, place = torch.rand(2, 2, generator=torch.Generator().manual_seed(row)).tolist()
        sides = [round(side * (0.25 + share / 2)) for side, share in zip((height, width), size, strict=True)]
        top, left = (
            round(share * (side - own)) for share, side, own in zip(place, (height, width), sides, strict=True)
        )
        mask[:, top : top + sides[0], left : left + sides[1]] = 1
    return masks


def draw(pipeline: Any, *, image: Any = None, mask_image: Any = None, **told: Any) -> Any:
    """Draws; all of a picture anew where none is given."""
    if image is None:
        size = (1, told["height"], told["width"])
        image, mask_image = torch.full((1, 3, *size[1:]), 0.5), torch.ones(1, *size)
    return pipeline(image=image, mask_image=mask_image, strength=1.0, **told)
