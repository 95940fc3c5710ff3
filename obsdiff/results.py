"""What a pruning run leaves behind: records of layers, and of the parts it can go on from."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, Self

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LayerResult:
    """What became of one linear.

    Attributes:
        pattern: "2:4", "0.5", "heads 18/24", "ffn 768/1024", both of these, or "dense".
        loss: tr(dW G dW^T) / tr(W G W^T) on the calibration tokens; None where no gram was taken.
        zeros: share of weights that are zero, among those that are stored.
        reason: why it stayed dense, where it did.
    """

    name: str
    pattern: str
    loss: float | None
    zeros: float
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What one change costs in an otherwise dense denoiser, measured.

    Attributes:
        name: of the group, or of the linears that read one tensor.
        change: "heads 3/4", "ffn 64/512", "2:4".
        ratio: share of the units or weights that go.
        error: |v - v_dense|^2 / |v_dense|^2 of the denoiser's output.
        macs: multiply-accumulates of one image that go; of a pattern those with weights that become zero.
    """

    name: str
    change: str
    ratio: float
    error: float
    macs: int


@dataclass(frozen=True, kw_only=True)
class QuantizedLinear:
    """What `--precision` made of one linear.

    Attributes:
        precision: "int8", "fp8" or "float".
        weight_error, input_error: shares of the output's energy that rounding weights and inputs loses, on the
            calibration tokens, taking inputs for uncorrelated; None where nothing was rounded.
        reason: why it stayed in float, where it did.
    """

    name: str
    precision: str
    weight_error: float | None = None
    input_error: float | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class PackageResult:
    """What a package or a block changed: new tensors by parameter name, kept units by group, and the record.

    Attributes:
        orders: of groups whose channels changed places: which channel is at each place now, of those that stay.
        errors: of what was only measured, by its key.
    """

    weights: Mapping[str, Tensor] = field(default_factory=dict)
    kept: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    orders: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    layers: tuple[LayerResult, ...] = ()
    errors: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All but the weights."""
        layers = [asdict(layer) for layer in self.layers]
        return {
            "kept": dict(self.kept),
            "orders": dict(self.orders),
            "layers": layers,
            "errors": dict(self.errors),
        }

    @classmethod
    def of_json(cls, record: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Self:
        """From what `to_json` gave, and the weights.

        Raises:
            KeyError: something is missing.
        """
        return cls(
            weights=weights,
            kept={name: tuple(units) for name, units in record["kept"].items()},
            orders={name: tuple(order) for name, order in record["orders"].items()},
            layers=tuple(LayerResult(**layer) for layer in record["layers"]),
            errors=record["errors"],
        )


def merged(parts: Iterable[PackageResult]) -> PackageResult:
    """One result of several that changed different things."""
    weights: dict[str, Tensor] = {}
    kept: dict[str, tuple[int, ...]] = {}
    orders: dict[str, tuple[int, ...]] = {}
    errors: dict[str, float] = {}
    layers: list[LayerResult] = []
    for part in parts:
        weights.update(part.weights)
        kept.update(part.kept)
        orders.update(part.orders)
        errors.update(part.errors)
        layers += part.layers
    return PackageResult(weights=weights, kept=kept, orders=orders, layers=tuple(layers), errors=errors)


class Journal(Protocol):
    """Keeps finished packages, so that a killed run can go on behind the last one."""

    def read(self, package: str) -> PackageResult | None: ...

    def write(self, package: str, result: PackageResult) -> None: ...


@dataclass(frozen=True)
class Within:
    """A journal's part for one denoiser of several."""

    journal: Journal
    denoiser: str

    def read(self, package: str) -> PackageResult | None:
        return self.journal.read(f"{self.denoiser}-{package}")

    def write(self, package: str, result: PackageResult) -> None:
        self.journal.write(f"{self.denoiser}-{package}", result)
