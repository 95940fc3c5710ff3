"""What `whatif` asks about: the linears of a denoiser, the shapes they run at, and the widths they could be cut to.

m, k, n   tokens (over all images of a call), inputs and outputs of a linear
group     units that are removed together; producers lose outputs, consumers lose inputs
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

import diffusers

from obsdiff import turns
from obsdiff.families import require_described
from obsdiff.groups import Group
from obsdiff.job import Job, open_job
from obsdiff.recipe import select
from obsdiff.settings import Settings
from obsdiff_export.linears import Shape, grouped, weights_of
from obsdiff_runtime.bundle import MANIFEST, Bundle, open_bundle
from obsdiff_runtime.errors import ConfigError

Rounding = Literal["aligned", "paper", "whole"]

CUTS: Final = (0.15, 0.20, 0.25, 0.30)
"""Shares of units whose widths are timed, each as the paper rounds it and aligned."""

DEEP_CUTS: Final = (0.5, 0.75)
"""Shares timed aligned only, so that an allocation knows what groups that lose much gain."""


@dataclass(frozen=True, kw_only=True)
class CutPlan:
    """Every group of a kind cut alike.

    Attributes:
        kind: "heads" or "ffn".
        share: of the kind's units that go, after rounding.
        rounding: "aligned" to kernels' widths, "paper" for the nearest number of neurons, "whole" for heads.
        shapes: linear -> what it runs then, of the linears that change.
    """

    kind: str
    share: float
    rounding: Rounding
    shapes: Mapping[str, Shape]


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear that can be pruned.

    Attributes:
        shape: what it runs.
        often: how many times in a call; less than once where that is the mean of calls of several denoisers.
    """

    name: str
    shape: Shape
    often: float = 1


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A denoiser at a size.

    Attributes:
        model: what it is called.
        family: of it.
        components: its folder in a bundle, or in the pipeline, and its linears; of denoisers that take turns each
            whose widths are its own, since what is alike is timed once.
        cuts: what could be cut, and what the linears would run then.
        call: height, width, rows and text_tokens of a call.
        job: the model by its configurations.
        bundle: where the subject is one.
        notes: what a call is, where denoisers take turns.
    """

    model: str
    family: str
    components: Mapping[str, tuple[Linear, ...]]
    cuts: tuple[CutPlan, ...]
    call: Mapping[str, int]
    job: Job = field(repr=False)
    bundle: Bundle | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Of all components."""
        return turns.told_apart(self.components)

    @property
    def shapes(self) -> dict[str, Shape]:
        """Linear -> what it runs."""
        return {linear.name: linear.shape for linear in self.linears}

    def count(self, shape: Shape) -> float:
        """How many linears run it in a call."""
        return round(sum(linear.often for linear in self.linears if linear.shape == shape), 9)

    @property
    def grouped(self) -> dict[Shape, tuple[str, ...]]:
        """The linears of each distinct shape, what costs most first."""
        return grouped(self.shapes)

    @property
    def narrower(self) -> dict[Shape, tuple[Shape, ...]]:
        """Full shape -> the distinct narrower ones that it could become, the widest first."""
        found: dict[Shape, set[Shape]] = {}
        for cut in self.cuts:
            for name, narrow in cut.shapes.items():
                found.setdefault(self.shapes[name], set()).add(narrow)
        return {shape: tuple(sorted(cuts, reverse=True)) for shape, cuts in found.items()}


def subject_of(settings: Settings) -> Subject:
    """The subject that the settings name: a bundle, or a model by its configurations alone.

    Raises:
        ConfigError, ModelError, BundleError: there is no such model or bundle, or a selection that leaves nothing.
    """
    bundle = _bundle(settings.model)
    if bundle is not None:
        settings = _served(settings, bundle)
    job = open_job(settings, sparsity_required=False, steered=True)
    require_described(job.family, "obsdiff whatif")
    linears, groups = select(
        replace(job.recipe, protect_first=0, protect_last=0),
        job.family.linears(job.denoiser),
        job.family.groups(job.denoiser),
    )
    rows = job.rows
    positions = job.positions(job.denoiser)
    widths = _widths(job, [linear.name for linear in linears])
    stored = {
        each.family.denoiser: _widths(each, widths)
        if bundle is None
        else _as_in_bundle(bundle, each.family.denoiser, widths)
        for each in job.turns
    }
    if any(each != widths for each in stored.values()):
        groups = ()  # of cut ones the units are not known
    often, notes = _often(stored, bundle)
    components = {
        component: tuple(
            Linear(name=name, shape=Shape(rows * positions[name], k, n), often=share)
            for name, (k, n) in stored[component].items()
            if name in positions
        )
        for component, share in often.items()
    }
    shapes = {linear.name: linear.shape for linear in components[job.family.denoiser]}
    sampling = job.recipe.sampling
    return Subject(
        model=job.model,
        family=job.family.name,
        components=components,
        cuts=_plans(groups, shapes, job.recipe.align),
        call={
            "height": sampling.height,
            "width": sampling.width,
            "rows": rows,
            "text_tokens": job.text_tokens,
        },
        job=job,
        bundle=bundle,
        notes=notes,
    )


def _often(
    widths: Mapping[str, Mapping[str, tuple[int, int]]], bundle: Bundle | None
) -> tuple[dict[str, float], tuple[str, ...]]:
    """How many of a mean call each denoiser is, of those that have to be timed; and in words what such a call is."""
    first, *others = widths
    if not others:
        return {first: 1}, ()
    if all(widths[name] == widths[first] for name in others):
        return {first: 1}, (f"a call is one of {' or of '.join(widths)}: they take turns and have the same widths",)
    if bundle is None:
        raise ConfigError(
            f"{' and '.join(widths)} of this model were cut to other widths, and obsdiff whatif knows such denoisers "
            "in bundles alone; export it and give the bundle, or give the dense model"
        )
    config, steps = bundle.scheduler(), bundle.manifest.defaults.num_inference_steps
    scheduler = getattr(diffusers, str(config["_class_name"])).from_config(config)
    scheduler.set_timesteps(steps)
    taken = turns.steps_of(bundle.manifest.turns, scheduler.timesteps.tolist(), steps)
    told = " and ".join(f"{len(own)} of {name}" for name, own in taken.items())
    return (
        {name: len(own) / steps for name, own in taken.items()},
        (f"a call is the mean of those of {steps} steps, {told}, which take turns and differ in widths",),
    )


def kept_units(group: Group, share: float, align: int) -> int:
    """The units left of a group that loses this share: at least one, and neurons to the nearest multiple of `align`."""
    exact = group.units - round(group.units * share)
    if group.kind == "heads":
        return max(exact, 1)
    return min(max((exact + align // 2) // align, 1) * align, group.units)


def _plans(groups: Sequence[Group], shapes: Mapping[str, Shape], align: int) -> tuple[CutPlan, ...]:
    """The cuts worth timing; those in which nothing changes, or the same as in the one before, are left out."""
    found: list[CutPlan] = []
    for kind in ("heads", "ffn"):
        of_kind = [group for group in groups if group.kind == kind]
        for share in (*CUTS, *DEEP_CUTS):
            roundings: dict[Rounding, int] = {"whole": 1} if kind == "heads" else {"aligned": align}
            if kind == "ffn" and share in CUTS:
                roundings["paper"] = 1
            for rounding, to in roundings.items():
                narrow = _cut(of_kind, shapes, share, to)
                if narrow and all(narrow != other.shapes for other in found):
                    gone = sum(group.units - kept_units(group, share, to) for group in of_kind)
                    real = gone / sum(group.units for group in of_kind)
                    found.append(CutPlan(kind=kind, share=real, rounding=rounding, shapes=narrow))
    return tuple(sorted(found, key=lambda cut: (cut.kind, cut.share)))


def _cut(groups: Sequence[Group], shapes: Mapping[str, Shape], share: float, align: int) -> dict[str, Shape]:
    """Linear -> what it runs once the groups lost the share; linears that stay as they are left out."""
    rows: Counter[str] = Counter()
    columns: Counter[str] = Counter()
    for group in groups:
        lost = group.units - kept_units(group, share, align)
        for producer in group.producers:
            rows[producer.name] += lost * group.height(producer) * producer.parts
        for reader in group.readers:
            columns[reader] += lost * group.width
    return {
        name: Shape(shape.m, shape.k - columns[name], shape.n - rows[name])
        for name, shape in shapes.items()
        if rows[name] or columns[name]
    }


def _bundle(model: str | None) -> Bundle | None:
    folder = None if model is None else Path(model).expanduser()
    if folder is None or not (folder / MANIFEST).is_file():
        return None
    return open_bundle(folder, verify="sizes")


def _served(settings: Settings, bundle: Bundle) -> Settings:
    """The size that the bundle is served at, where no other is given."""
    defaults = bundle.manifest.defaults
    names = ("height", "width", "num_frames", "guidance_scale", "max_sequence_length")
    own = {name: getattr(defaults, name) for name in names}
    return replace(settings, **{name: value for name, value in own.items() if getattr(settings, name) is None})


def _widths(job: Job, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of some linears."""
    found = {linear.name: (linear.in_features, linear.out_features) for linear in job.family.linears(job.denoiser)}
    return {name: found[name] for name in names}


def _as_in_bundle(bundle: Bundle, component: str, widths: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """The widths in the bundle's graph, which may have been cut."""
    stored = weights_of(bundle.onnx(component))
    absent = [name for name in widths if name not in stored]
    if absent:
        raise ConfigError(
            f"{bundle.root}: its {component} has no weight of {absent[0]} under that name; was its ONNX exported by "
            "another program? Give the model instead of the bundle"
        )
    return {name: (stored[name].k, stored[name].n) for name in widths}
