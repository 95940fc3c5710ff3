"""How long a pruning run will take and how much memory it will hold: estimates, from sizes and a measured speed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from torch import nn

from obsdiff import costs
from obsdiff.core.gram import BYTES_PER_ENTRY
from obsdiff.groups import LinearSpec
from obsdiff_runtime.errors import ResourceError

SOLVER_COPIES: Final = 6
"""Matrices of a gram's size that a factorisation holds at its peak."""

ACTIVATION_COPIES: Final = 4
"""Tensors of the widest layer's input and output that a forward pass holds at its peak."""

WORKSPACE_BYTES: Final = 100_000_000
"""Held beside all tensors: workspaces of matrix libraries, and what the allocator keeps of what was freed."""

NETWORK_SLOWDOWN: Final = 2.0
"""A denoiser call against as many operations of a large matrix product: attention, norms, small matrices."""

MODULE_SECONDS: Final = 1e-4
"""Fixed cost of a layer's call and hook."""

COLUMN_SECONDS: Final = 3e-4
"""Fixed cost of one column of the sweep."""


@dataclass(frozen=True, kw_only=True)
class Streams:
    """How much a streamed method looks at; see recipe.Recipe.

    Attributes:
        draws: pictures drawn of each prompt.
        trajectory_steps: sampler steps at which the denoiser computes for them.
        kept_steps: steps of each batch whose calls are kept.
        tokens: of a row that count, at most.
        metric: whether errors of outputs count by what they cost, which takes gradients.
        replay: whether what parts of a block gave is held.
        measuring_calls: denoiser calls' worth of block calls that measuring the units takes, at most.
    """

    draws: int
    trajectory_steps: int
    kept_steps: int
    tokens: int
    metric: bool = True
    replay: bool = True
    measuring_calls: int = 0


@dataclass(frozen=True, kw_only=True)
class Workload:
    """How much calibration there is, and what it runs on.

    Attributes:
        prompts: how many.
        batch_size: prompts per denoiser call.
        steps: sampler steps.
        guided: conditional and unconditional rows are both run.
        calibrates: whether the method does at all.
        packages: calibration passes, where `budget_bytes` is None.
        flops_per_second: costs.matmul_speed of the device.
        budget_bytes: most bytes of grams in one pass; None: no limit.
        calls_per_step: denoiser calls of the scheduler per step (Heun: 2).
        other_bytes: memory held by what else is loaded (the VAE, denoisers that take other turns).
        streams: where the method is streamed; it has no packages then.
    """

    prompts: int
    batch_size: int
    steps: int
    guided: bool
    calibrates: bool
    packages: int
    flops_per_second: float
    budget_bytes: int | None = None
    calls_per_step: int = 1
    other_bytes: int = 0
    streams: Streams | None = None

    @property
    def pictures(self) -> int:
        """Pictures drawn in one calibration pass."""
        return self.prompts * (1 if self.streams is None else self.streams.draws)

    @property
    def rows(self) -> int:
        """Rows of the largest denoiser call."""
        return min(self.batch_size, self.pictures) * (2 if self.guided else 1)

    @property
    def calls(self) -> int:
        """Denoiser calls of one calibration pass, or of the trajectories of a streamed method."""
        return self._batches * self._steps * self.calls_per_step

    @property
    def evaluations(self) -> int:
        """Rows of all these calls."""
        return self.pictures * (2 if self.guided else 1) * self._steps * self.calls_per_step

    @property
    def kept_calls(self) -> int:
        """Those of them that a streamed method looks at."""
        kept = 0 if self.streams is None else min(self.streams.kept_steps, self._steps)
        return self._batches * kept * self.calls_per_step

    @property
    def kept_share(self) -> float:
        return self.kept_calls / self.calls

    @property
    def _batches(self) -> int:
        return -(-self.pictures // self.batch_size)

    @property
    def _steps(self) -> int:
        return self.steps if self.streams is None else self.streams.trajectory_steps


@dataclass(frozen=True, kw_only=True)
class Estimates:
    """Neither measured nor promised: numbers to decide by.

    Attributes:
        memory_bytes: peak where the pruning runs: weights, grams, workspaces, and the larger of activations and solver
            with the pruned weights that are not yet in the model; without the interpreter and its libraries.
        checkpoint_bytes: the pruned denoiser on disk, in the dtype it has now.
        scratch_bytes: on a disk meanwhile, or in the host's memory where a GPU prunes.
        host_bytes: of a model that is offloaded: what the host holds beside the GPU, whose memory `memory_bytes` is
            then; 0 of others.
        calibration_seconds, solver_seconds: at the device's matrix-product speed.
    """

    memory_bytes: int
    checkpoint_bytes: int
    scratch_bytes: int = 0
    host_bytes: int = 0
    calibration_seconds: float
    solver_seconds: float


def estimate(
    denoiser: nn.Module,
    workload: Workload,
    *,
    packages: Sequence[Sequence[LinearSpec]],
    gram_bytes: int,
    positions: Mapping[str, int],
    macs: int,
    parameters_after: int,
) -> Estimates:
    """Estimates of a run.

    Args:
        denoiser: for its sizes.
        workload: how much calibration there is.
        packages: the linears of each calibration pass.
        gram_bytes: of the largest package.
        positions: costs.positions.
        macs: of one call on one image.
        parameters_after: of the pruned denoiser.
    """
    linears = [linear for package in packages for linear in package]
    widest = max((width for width in gram_widths(linears).values()), default=0)
    element = max((parameter.element_size() for parameter in denoiser.parameters()), default=4)
    wide = max((positions[linear.name] * (linear.in_features + linear.out_features) for linear in linears), default=0)
    activations = ACTIVATION_COPIES * element * workload.rows * wide
    weights = costs.weight_bytes(denoiser)
    solver = SOLVER_COPIES * BYTES_PER_ENTRY * widest * widest
    if workload.streams is None:  # a streamed method writes them tier by tier
        pruned = (sum(linear.in_features * linear.out_features for linear in package) for package in packages)
        solver += element * max(pruned, default=0)
    return Estimates(
        memory_bytes=WORKSPACE_BYTES + weights + workload.other_bytes + gram_bytes + max(activations, solver),
        checkpoint_bytes=parameters_after * element,
        calibration_seconds=sum(_calibration_seconds(package, workload, positions, macs) for package in packages),
        solver_seconds=sum(_solver_seconds(package, workload) for package in packages),
    )


def gram_widths(linears: Sequence[LinearSpec]) -> dict[str, int]:
    """Width of each distinct input, by its key."""
    return {linear.reads: linear.in_features for linear in linears}


def check_fits(tier: Sequence[LinearSpec], taken_bytes: int, budget_bytes: int) -> None:
    """Raises ResourceError where a tier's sums take more than the budget."""
    if taken_bytes > budget_bytes:
        raise ResourceError(
            f"the grams of {tier[0].name} and its tier take {taken_bytes / 2**20:.1f} MiB, more than the "
            f"budget of {budget_bytes / 2**20:.1f} MiB; raise --gram-budget"
        )


def _calibration_seconds(
    package: Sequence[LinearSpec], workload: Workload, positions: Mapping[str, int], macs: int
) -> float:
    readers = {linear.reads: linear for linear in package}.values()
    products = sum(2 * positions[linear.name] * linear.in_features**2 for linear in readers)
    operations = workload.evaluations * (NETWORK_SLOWDOWN * 2 * macs + products)
    return operations / workload.flops_per_second + workload.calls * len(positions) * MODULE_SECONDS


def _solver_seconds(package: Sequence[LinearSpec], workload: Workload) -> float:
    """Float64 operations count twice. Factor and inverse: 8/3 d^3; sweep: out d^2; loss, in float64: 8 out d^2."""
    factors = sum(8 / 3 * width**3 for width in gram_widths(package).values())
    sweeps = sum(9 * linear.out_features * linear.in_features**2 for linear in package)
    columns = sum(linear.in_features for linear in package)
    return (factors + sweeps) / workload.flops_per_second + columns * COLUMN_SECONDS
