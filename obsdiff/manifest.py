"""What was cut, moved and masked in a pruned denoiser: its obsdiff.json."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError
from torch import Tensor

from obsdiff.families.table import FAMILIES
from obsdiff.folders import MANIFEST
from obsdiff.groups import Group, Producer
from obsdiff.shrinking import columns, places
from obsdiff_runtime.errors import BundleError, CompatibilityError, ObsdiffError
from obsdiff_runtime.version import __version__

SCHEMA: Final = 1


def _none_for_nan(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(value: object) -> object:
    return value.split() if isinstance(value, str) else value


Order = Annotated[
    tuple[int, ...],
    BeforeValidator(_numbers),
    PlainSerializer(lambda order: " ".join(map(str, order)), when_used="json"),
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GroupCut(_Strict):
    """Which of a group's units are left, by their index in the dense model."""

    units: int = Field(ge=1)
    kept: tuple[int, ...] = Field(min_length=1)


class LinearRecord(_Strict):
    """What became of a linear.

    Attributes:
        pattern: of its zeros: "2:4", "0.5"; "dense" where it has none.
        loss: tr(dW G dW^T) / tr(W G W^T) on the calibration tokens; None where no gram was taken.
        zeros: share of its stored weights that are zero.
        reason: why it stayed dense, where it did.
    """

    pattern: str
    loss: Annotated[float | None, BeforeValidator(_none_for_nan)] = None
    zeros: float = Field(default=0.0, ge=0, le=1)
    reason: str | None = None


class PrunedManifest(_Strict):
    """The content of a denoiser's obsdiff.json.

    Attributes:
        schema_version: of this layout.
        created_by: program and version.
        family: a key of FAMILIES.
        sparsity: as on the command line.
        groups: by name, for the groups that lost units.
        orders: by name, for the groups whose channels changed places: the dense model's channel at each place. Written
            as one string of numbers.
        linears: by name, for the linears that were considered.
        recipe: the resolved configuration of the run.
        prompts_sha256: of the calibration prompts, joined by line feeds; empty where there were none.
    """

    schema_version: int = SCHEMA
    created_by: str = f"obsdiff {__version__}"
    family: str
    sparsity: str
    groups: dict[str, GroupCut] = {}
    orders: dict[str, Order] = {}
    linears: dict[str, LinearRecord] = {}
    recipe: dict[str, Any] = {}
    prompts_sha256: str = ""

    @property
    def keep(self) -> dict[str, tuple[int, ...]]:
        """As `shrink` takes it."""
        return {name: cut.kept for name, cut in self.groups.items()}

    def channels(self, group: Group) -> Tensor | None:
        """Which of a group's channels in the dense model is at each place now: (width * kept units,), int64.

        Args:
            group: of the dense model.

        Returns:
            None where all are where they were.
        """
        if group.name in self.orders:
            return torch.tensor(self.orders[group.name])
        return columns(group, self.groups[group.name].kept) if group.name in self.groups else None

    def kept_channels(self, group: Group, producer: Producer) -> Tensor:
        """`channels` of what loses units, and does not follow when channels change places inside of them."""
        cut = self.groups.get(group.name)
        return places(range(group.units) if cut is None else cut.kept, group.height(producer))

    def after(self, previous: "PrunedManifest | None") -> "PrunedManifest":
        """This manifest, of a model that had been pruned before, told from the dense model on."""
        if previous is None:
            return self
        groups, orders = dict(previous.groups), dict(previous.orders)
        for name in self.groups.keys() | self.orders.keys():
            channels = self._channels_after(name, previous)
            cut, before = self.groups.get(name), groups.get(name)
            if cut is not None and channels is not None and len(channels) == len(cut.kept):  # neurons that had moved
                units = cut.units if before is None else before.units
                groups[name] = GroupCut(units=units, kept=tuple(sorted(channels)))
            elif cut is not None and before is not None:
                groups[name] = GroupCut(units=before.units, kept=tuple(before.kept[unit] for unit in cut.kept))
            elif cut is not None:
                groups[name] = cut
            if channels is not None:
                orders[name] = channels
        return self.model_copy(
            update={"groups": groups, "orders": orders, "linears": {**previous.linears, **self.linears}}
        )

    def _channels_after(self, name: str, previous: "PrunedManifest") -> tuple[int, ...] | None:
        """The dense model's channel at each place of a group; None where none ever changed places."""
        order, moved = self.orders.get(name), previous.orders.get(name)
        cut, before = self.groups.get(name), previous.groups.get(name)
        if order is None and moved is None:
            return None
        if moved is None and before is not None:
            units = before.kept if cut is None else cut.kept
            moved = _spread(before.kept, len(order or ()) // len(units))
        if moved is not None and cut is not None and order is None:
            moved = tuple(moved[channel] for channel in _spread(cut.kept, len(moved) // cut.units))
        if moved is None or order is None:
            return order or moved
        return tuple(moved[channel] for channel in order)


def read_manifest(folder: Path) -> PrunedManifest:
    """The manifest in a denoiser's folder.

    Raises:
        BundleError: it is missing, is no manifest or names a family that does not exist.
        CompatibilityError: it is of a newer schema.
    """
    path = folder / MANIFEST
    data = read_json(path)
    version = data.get("schema_version")
    if isinstance(version, int) and version > SCHEMA:
        raise CompatibilityError(
            f"{path} is of schema {version}, and this obsdiff {__version__} reads up to {SCHEMA}; update obsdiff"
        )
    try:
        manifest = PrunedManifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BundleError(f"{path}: {where}: {first['msg']}") from None
    if manifest.family not in FAMILIES:
        raise BundleError(f"{path}: unknown family {manifest.family}; known are {', '.join(FAMILIES)}")
    return manifest


def read_json(path: Path, error: type[ObsdiffError] = BundleError) -> dict[str, Any]:
    """A JSON object; where the file holds none, such an error that names it."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as reason:
        raise error(f"{path} is unreadable: {reason}") from None
    if not isinstance(data, dict):
        raise error(f"{path} is no JSON object")
    return data


def _spread(units: Sequence[int], width: int) -> tuple[int, ...]:
    """The channels of units."""
    return tuple(unit * width + channel for unit in units for channel in range(width))
