"""What is in a bundle."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from obsdiff_export.inspection import engines
from obsdiff_export.inspection.engines import EngineContent
from obsdiff_runtime.bundle import Defaults, TensorEntry, open_bundle
from obsdiff_runtime.turns import Turns


@dataclass(frozen=True, kw_only=True)
class Network:
    """A component of a bundle; `precision` is what its linears compute in, `bytes` all that lies in its folder."""

    name: str
    dtype: str
    precision: str
    bytes: int
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]


@dataclass(frozen=True, kw_only=True)
class BundleContent:
    """A bundle whose files are those of its manifest.

    Attributes:
        path: the folder.
        created_by, family, pipeline_class, sparsity, defaults: as the manifest says.
        files: how many were compared with their sha256 in the manifest.
        bytes: of these files.
        networks: the components.
        turns: of denoisers, by the timesteps they begin at; empty where one takes all steps.
        engines: component -> its engines.
        recipe: the resolved configuration of the run.
        measurements: what was measured, and on what.
    """

    path: str
    created_by: str
    family: str
    pipeline_class: str
    sparsity: str
    defaults: Defaults
    files: int
    bytes: int
    networks: tuple[Network, ...]
    engines: Mapping[str, tuple[EngineContent, ...]]
    recipe: Mapping[str, object]
    measurements: Mapping[str, object]
    turns: Turns = field(default_factory=dict)
    kind: Literal["bundle"] = "bundle"


def read(path: Path) -> BundleContent:
    """Reads a bundle after comparing every file with the manifest.

    Raises:
        BundleError: a file is missing, truncated or altered; names it.
        CompatibilityError: it was written by a newer obsdiff.
    """
    bundle = open_bundle(path)
    manifest = bundle.manifest
    return BundleContent(
        path=str(path),
        created_by=manifest.created_by,
        family=manifest.family,
        pipeline_class=manifest.pipeline_class,
        sparsity=manifest.sparsity,
        defaults=manifest.defaults,
        turns=manifest.turns,
        files=len(manifest.files),
        bytes=bundle.total_bytes(),
        networks=tuple(
            Network(
                name=name,
                dtype=component.dtype,
                precision=component.precision or component.dtype,
                bytes=sum(file.bytes for place, file in manifest.files.items() if place.startswith(f"{name}/")),
                inputs=component.inputs,
                outputs=component.outputs,
            )
            for name, component in manifest.components.items()
        ),
        engines={
            name: tuple(engines.read(bundle.path(engine.path)) for engine in component.engines)
            for name, component in manifest.components.items()
            if component.engines
        },
        recipe=manifest.recipe,
        measurements=manifest.measurements,
    )
