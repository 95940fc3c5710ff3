"""Engines of a bundle: building what orders.py says, and what the manifest and the report say of them."""

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from obsdiff_export import pattern
from obsdiff_export.build import Engine
from obsdiff_export.build import build as build_one
from obsdiff_export.capabilities import NEEDS
from obsdiff_export.contest import build_faster
from obsdiff_export.orders import Order, fitting, order_of, range_of, served
from obsdiff_export.ports import Port, read_ports
from obsdiff_export.profiles import Size, Sizes, profiles_for
from obsdiff_export.proof import receipt
from obsdiff_export.proof.judging import IGNORES
from obsdiff_export.proof.receipt import Receipt
from obsdiff_export.requested import Served, in_tiles, tables
from obsdiff_export.settings import EngineSettings
from obsdiff_export.versus import Versus
from obsdiff_runtime.autoencoder import tile_side
from obsdiff_runtime.bundle import AUTOENCODER, DECODER, DENOISERS, Bundle, EngineEntry, open_bundle, write_manifest
from obsdiff_runtime.errors import BundleError, ConfigError
from obsdiff_runtime.progress import Progress, silent
from obsdiff_runtime.shapes import Profile, Symbols, words

HARDWARE: Final = (2, 4)
"""The pattern that sparse tensor cores take, whatever the model was pruned to: 2 of every 4 are zero."""

CONTEST_SECONDS: Final = 3600.0
"""No further engine is built after this only to be timed."""


@dataclass(frozen=True, kw_only=True)
class Engines:
    """Engines by component.

    Attributes:
        contests: by denoiser, why its engine is the one it is; without those that were built once, as they are for a
            builder that ignores the sparse flag.
    """

    built: Mapping[str, Engine]
    contests: Mapping[str, Versus[Engine]]

    def choice(self, engine: Engine) -> str:
        """Why this engine and no other, "" where there was nothing to choose from."""
        found = (contest.decision.why for contest in self.contests.values() if engine == contest.shipped)
        return next(found, "")


@dataclass(frozen=True, kw_only=True)
class Built:
    """What `build` added to a bundle.

    Attributes:
        folder: the bundle.
        engines: by component.
        contests: see Engines.
        entries: their lines in its manifest, in the same order.
        symbols: component -> input -> its axes as the graph names them.
        required: the receipts that are to prove sparsity, None where none is to be proven.
    """

    folder: Path
    engines: Mapping[str, Engine]
    contests: Mapping[str, Versus[Engine]]
    entries: tuple[EngineEntry, ...]
    symbols: Mapping[str, Symbols]
    required: tuple[Receipt, ...] | None = None

    def hold(self) -> None:
        """Raises SparsityProofError where it must; the engines stay, so that their receipts can be looked at."""
        if self.required is not None:
            receipt.require_sparse(self.required)

    def to_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "engines": [
                {
                    "component": name,
                    **dataclasses.asdict(entry),
                    "bytes": engine.bytes,
                    "seconds": engine.seconds,
                    "reused": engine.reused,
                    "notes": list(engine.notes),
                }
                for (name, engine), entry in zip(self.engines.items(), self.entries, strict=True)
            ],
            "contests": {name: contest.to_json() for name, contest in self.contests.items()},
        }


def build_engines(
    graphs: Mapping[str, Path],
    folder: Path,
    what: Served,
    order: Order,
    *,
    denoisers: Mapping[str, Path | None],
    progress: Progress = silent,
) -> Engines:
    """One engine for each component; the denoiser's is the faster of those with and without sparse kernels.

    Args:
        graphs: component -> its ONNX file.
        folder: the bundle; engines go to engines/<component>/.
        what: they are for.
        order: what is asked for.
        denoisers: the components that may use sparse tactics, whose weights are looked at for the receipt; of each the
            graph before pruning, to be timed beside it.
        progress: told component by component.

    Raises:
        ConfigError: profiles that cannot be; before anything is built.
        ObsdiffError: see `obsdiff_export.build.build`.
    """
    profiles = _profiles(graphs, what, order, denoisers)
    engines: dict[str, Engine] = {}
    contests: dict[str, Versus[Engine]] = {}
    for index, (name, graph) in enumerate(graphs.items()):
        progress("build", index, len(graphs), name)
        same: Any = {
            "builder": order.builder,
            "profiles": profiles[name],
            "targets": order.targets,
            "patterns": pattern.check(graph, *HARDWARE) if name in denoisers else (),
            "cache": order.cache,
        }
        place = folder / "engines" / name
        if name in denoisers and order.builds and order.builder.name not in IGNORES:
            contests[name] = build_faster(
                graph,
                place,
                flags=order.flags,
                dense=denoisers[name],
                builds=order.builds,
                budget_seconds=CONTEST_SECONDS,
                progress=progress,
                **same,
            )
            engines[name] = contests[name].shipped
        else:
            flags = dataclasses.replace(order.flags, sparse=name in denoisers)
            engines[name] = build_one(graph, place, flags=flags, **same)
    progress("build", len(graphs), len(graphs))
    return Engines(built=engines, contests=contests)


def build(
    bundle: Path | str,
    settings: EngineSettings,
    *,
    components: Sequence[str] = (),
    progress: Progress = silent,
) -> Built:
    """Engines for this machine from a bundle's ONNX; its manifest lists them.

    Args:
        bundle: the folder.
        settings: what is asked of them.
        components: only these; all of them if none are named.
        progress: told component by component.

    Raises:
        ObsdiffError: one of its kinds; the manifest is as before. `Built.hold` asks for the proof of sparsity.
    """
    order = order_of(settings)
    opened = open_bundle(bundle)
    entries = opened.manifest.components.values()
    formats = {entry.precision for entry in entries if entry.precision in NEEDS}
    formats |= {"bf16" for entry in entries if entry.dtype == "bfloat16"}
    order = fitting(order, formats, settings)
    names = _components(opened, components)
    denoisers = opened.manifest.denoisers
    if not denoisers:
        raise BundleError(f"{bundle} has neither {' nor '.join(DENOISERS)}, so there is nothing that draws")
    what = _served_by(opened, denoisers[0], settings.vae_tile)
    found = build_engines(
        {name: opened.onnx(name) for name in names},
        opened.root,
        what,
        order,
        denoisers=dict.fromkeys(denoisers),
        progress=progress,
    )
    return Built(
        folder=opened.root,
        engines=found.built,
        contests=found.contests,
        entries=_listed(opened, found, what.tile),
        symbols={name: {port.name: port.shape for port in opened.component(name).inputs} for name in names},
        required=receipts(found.built.values()) if order.require_sparse else None,
    )


def lines(done: Built) -> Iterator[str]:
    """What was built, in lines for a person."""
    for (name, engine), entry in zip(done.engines.items(), done.entries, strict=True):
        how = "taken from an equal build" if engine.reused else f"built in {engine.seconds:.1f} s"
        for_what = ", ".join(engine.targets)
        size = f"{engine.bytes / 1e6:.1f} MB"
        yield f"{entry.path}  {entry.backend} {entry.backend_version} for {for_what}, {size}, {how}"
        symbols = done.symbols.get(name, {})
        for profile in engine.profiles:
            yield f"    takes {words(profile, symbols)}"
        yield f"    {entry.sparsity}"
        if name in done.contests:
            yield f"    {done.contests[name].decision.why}"
        for note in engine.notes:
            yield f"    note: {note}"


def receipts(engines: Iterable[Engine]) -> tuple[Receipt, ...]:
    """Those of these engines."""
    return tuple(receipt.load(engine.receipt_path) for engine in engines)


def engine_entry(engine: Engine, root: Path) -> EngineEntry:
    return EngineEntry(
        path=engine.path.relative_to(root).as_posix(),
        key=engine.key,
        backend=engine.backend,
        backend_version=engine.backend_version,
        targets=engine.targets,
        device=engine.device,
        profiles=engine.profiles,
        sparse_requested=engine.sparse_requested,
        refit=engine.flags.refit,
        weight_streaming=engine.flags.weight_streaming,
        sparsity=receipt.sparsity_statement(receipt.load(engine.receipt_path)),
        receipt=engine.receipt_path.relative_to(root).as_posix(),
    )


def measurements(contests: Mapping[str, Versus[Engine]]) -> dict[str, object]:
    """What a manifest keeps of them: nothing where nothing was measured."""
    measured = ((name, each) for name, each in contests.items() if each.decision.outcome != "not measured")
    return {f"engines/{name}": each.to_json() for name, each in measured}


def _profiles(
    graphs: Mapping[str, Path], what: Served, order: Order, denoisers: Collection[str]
) -> dict[str, tuple[Profile, ...]]:
    """By component. Shapes that are given by input say for all components what the axes are that they share."""
    ports: dict[str, Sequence[Port]] = {name: read_ports(graph)[0] for name, graph in graphs.items()}
    order.bounds.require_known([port.name for inputs in ports.values() for port in inputs])
    shared: dict[str, Size] = {}
    own = {name: order.bounds.sizes(inputs) for name, inputs in ports.items()}
    for sizes in own.values():
        shared.update({symbol: size for symbol, size in sizes.items() if symbol != "batch"})
    for side in ("height", "width"):
        if side in shared:
            low, best, high = range_of(shared[side])
            shared[f"image_{side}"] = (low * what.scale, best * what.scale, high * what.scale)
    asked = order.profiles or (what.own(),)
    found: dict[str, tuple[Profile, ...]] = {}
    for name, inputs in ports.items():
        wanted = [{**table, **shared} for table in tables(asked, what, denoiser=name in denoisers)]
        if name in AUTOENCODER:
            wanted = [dict(in_tiles(table, what)) for table in wanted]
        found[name] = profiles_for(inputs, [{**table, **own[name]} for table in wanted])
    return found


def _components(opened: Bundle, asked: Sequence[str]) -> list[str]:
    there = opened.manifest.components
    for name in asked:
        if name not in there:
            raise ConfigError(f"--component {name}: the bundle has {', '.join(there)}")
    return [name for name in there if not asked or name in asked]


def _served_by(opened: Bundle, denoiser: str, tile: int | None) -> Served:
    sizes = opened.manifest.recipe.get("sizes")
    if not isinstance(sizes, dict):
        raise ConfigError(f"{opened.root}: the manifest says nothing of the sizes it was exported for; export it again")
    table: Sizes = {name: tuple(size) if isinstance(size, list) else size for name, size in sizes.items()}
    decoder = opened.config(DECODER) if DECODER in opened.manifest.components else {}
    side = tile_side(tile, opened.manifest.defaults.vae_tile, decoder)
    return served(table, opened.manifest.pipeline_class, opened.config(denoiser), vae=decoder, tile=side)


def _listed(opened: Bundle, found: Engines, tile: int | None) -> tuple[EngineEntry, ...]:
    """Writes the manifest anew, with these engines behind the others of their components."""
    entries = {name: engine_entry(engine, opened.root) for name, engine in found.built.items()}
    components = dict(opened.manifest.components)
    for name, entry in entries.items():
        earlier = [old for old in components[name].engines if old.key != entry.key]
        components[name] = dataclasses.replace(components[name], engines=(*earlier, entry))
    measured = {**opened.manifest.measurements, **measurements(found.contests)}
    defaults = dataclasses.replace(opened.manifest.defaults, vae_tile=tile)
    write_manifest(
        opened.root,
        dataclasses.replace(opened.manifest, defaults=defaults, components=components, measurements=measured),
    )
    return tuple(entries.values())
