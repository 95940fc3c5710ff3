"""The engine of a pruned network: built with and without the sparse flag if both can be timed; the faster is kept."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from obsdiff_export.build import Engine, build
from obsdiff_export.builders.request import Builder, Flags
from obsdiff_export.caches import Cache
from obsdiff_export.pattern import PatternReport
from obsdiff_export.ports import Port, read_ports
from obsdiff_export.versus import BUILDS, VARIANTS, TimeEngines, Variant, Versus, compare_engines, timing_here
from obsdiff_runtime.progress import Progress, silent
from obsdiff_runtime.shapes import Profile


def build_faster(
    graph: Path,
    out_folder: Path,
    *,
    builder: Builder,
    profiles: Sequence[Profile],
    flags: Flags,
    targets: Sequence[str] = (),
    patterns: Sequence[PatternReport] = (),
    dense: Path | None = None,
    builds: int = BUILDS,
    budget_seconds: float | None = None,
    cache: Cache | None = None,
    progress: Progress = silent,
) -> Versus[Engine]:
    """The engine to ship, and why that one. The others are deleted, but for those that were in the folder before.

    A contest that is interrupted leaves what it has built, and the next one goes on with it. Where no weight holds 2:4,
    the flag changes nothing and the engine is compared with the dense model's alone. Where nothing can be timed here,
    or there is nothing to compare with, the engine with the flag is built alone, as `build` would.

    Args:
        graph: of the pruned network.
        out_folder: as for `build`.
        builder: as for `build`; so are the next ones.
        profiles: the first one's best shapes are timed.
        flags: but for `sparse`.
        targets: compute capabilities.
        patterns: the 2:4 verdicts of the graph's weights.
        dense: the graph of the network before pruning, to be timed beside; it takes the same shapes.
        builds: of each variant.
        budget_seconds: see `compare_engines`.
        cache: as for `build`.
        progress: told of stage "compare" build by build.

    Raises:
        ObsdiffError: no engine could be built; see `build`.
    """
    holds = any(report.holds for report in patterns)
    timing: TimeEngines[Engine] | str = "no weight holds 2:4, so that the sparse flag changes nothing"
    variants: tuple[Variant, ...] = ("sparse", "pruned") if dense is None else VARIANTS
    if holds or dense is not None:
        ports, _ = read_ports(graph)
        here: TimeEngines[Engine] | str = timing_here(builder.name, example_inputs(ports, profiles[0]))
        if holds:
            timing = here
        elif not isinstance(here, str):
            timing, variants = here, ("pruned", "dense")
    before = {path.stem for path in out_folder.glob("*.plan")}

    def build_variant(variant: Variant, repeat: int) -> Engine:
        return build(
            dense if variant == "dense" and dense is not None else graph,
            out_folder,
            builder=builder,
            profiles=profiles,
            flags=dataclasses.replace(flags, sparse=variant == "sparse"),
            targets=targets,
            patterns=() if variant == "dense" else patterns,
            repeat=repeat,
            cache=cache,
        )

    found = compare_engines(
        build_variant, timing, variants=variants, builds=builds, budget_seconds=budget_seconds, progress=progress
    )
    for engine in found.others():
        if engine.key not in before:
            for file in out_folder.glob(f"{engine.key}.*"):
                file.unlink()
    return found


def example_inputs(ports: Sequence[Port], profile: Profile) -> dict[str, np.ndarray[Any, Any]]:
    """Something to run an engine on at a profile's best shapes: noise, and zeros where integers are wanted."""
    generator = np.random.default_rng(0)
    return {
        port.name: generator.standard_normal(profile[port.name].opt, dtype=np.float32)
        if "float" in port.dtype
        else np.zeros(profile[port.name].opt, np.dtype(port.dtype))
        for port in ports
    }
