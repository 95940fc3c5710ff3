"""Engines of a bundle: what is asked for, building them, and what the manifest and the report say of them."""

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from obsdiff.families.table import FAMILIES
from obsdiff.measurements import BuiltEngine
from obsdiff.recipe import Sampling
from obsdiff.settings import Settings, given_as
from obsdiff_export import pattern
from obsdiff_export.build import Engine, choose_builder
from obsdiff_export.build import build as build_one
from obsdiff_export.builders.request import REFITS, Builder, Flags, Refit
from obsdiff_export.caches import Cache, open_cache
from obsdiff_export.contest import build_faster
from obsdiff_export.formats import NEEDS, targets_for
from obsdiff_export.ports import Port, read_ports
from obsdiff_export.profiles import Size, Sizes, profiles_for
from obsdiff_export.proof import receipt
from obsdiff_export.proof.judging import IGNORES
from obsdiff_export.proof.receipt import Receipt
from obsdiff_export.requested import (
    IMAGES,
    Served,
    ShapeBounds,
    SizeProfile,
    in_tiles,
    parse_profiles,
    parse_shapes,
    tables,
)
from obsdiff_export.versus import BUILDS, Versus
from obsdiff_runtime.autoencoder import tile_side
from obsdiff_runtime.bundle import AUTOENCODER, DECODER, Bundle, EngineEntry, open_bundle, write_manifest
from obsdiff_runtime.conditioning import KINDS
from obsdiff_runtime.errors import CompatibilityError, ConfigError, SparsityProofError
from obsdiff_runtime.progress import Progress, silent
from obsdiff_runtime.references import TOKENS
from obsdiff_runtime.seeing import TOKENS as SEEN
from obsdiff_runtime.shapes import Profile, Symbols, words

HARDWARE: Final = (2, 4)
"""The pattern that sparse tensor cores take, whatever the model was pruned to: 2 of every 4 are zero."""

CONTEST_SECONDS: Final = 3600.0
"""No further engine is built after this only to be timed."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is asked of every engine, checked: no work is needed to say that it can be served.

    Attributes:
        builder: that makes them.
        targets: compute capabilities, as the builder resolved them.
        flags: but for `sparse`, which is the denoiser's alone.
        profiles: sizes; none: the served size.
        bounds: shapes by input instead.
        cache: None where none is to be used.
        require_sparse: whether sparsity must be proven.
        builds: of the denoiser with and without sparse kernels, to be timed by turns; 0: the one with them alone.
    """

    builder: Builder
    targets: tuple[str, ...]
    flags: Flags
    profiles: tuple[SizeProfile, ...]
    bounds: ShapeBounds
    cache: Cache | None
    require_sparse: bool
    builds: int


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


def order_of(settings: Settings) -> Order:
    """Cheap: ask before any work is done.

    Raises:
        ConfigError: a flag that is none, or two that exclude each other.
        CompatibilityError: what is asked for cannot be built here.
        SparsityProofError: sparsity is to be proven of a builder that never has it.
    """
    builder = choose_builder(settings.builder)
    targets = builder.targets([target for text in settings.targets or () for target in text.split(",")])
    flags = _flags(settings)
    builder.check(flags, targets)
    bounds = ShapeBounds(
        min=parse_shapes("--min-shapes", settings.min_shapes),
        opt=parse_shapes("--opt-shapes", settings.opt_shapes),
        max=parse_shapes("--max-shapes", settings.max_shapes),
    )
    if bounds and settings.profile:
        raise ConfigError("--profile and --min-shapes, --opt-shapes or --max-shapes say the same; give one of them")
    if settings.no_cache and settings.cache_dir is not None:
        raise ConfigError("--cache-dir names a cache and --no-cache wants none; give one of them")
    if settings.require_sparse and builder.name in IGNORES:
        raise SparsityProofError(
            f"--require-sparse: {IGNORES[builder.name]}; build with TensorRT on the GPU that serves"
        )
    return Order(
        builder=builder,
        targets=targets,
        flags=flags,
        profiles=parse_profiles(settings.profile or ()),
        bounds=bounds,
        cache=None if settings.no_cache else open_cache(settings.cache_dir),
        require_sparse=bool(settings.require_sparse),
        builds=_builds(settings.builds),
    )


def sizes_of(
    sampling: Sampling,
    pipeline: str,
    config: Mapping[str, Any],
    *,
    rows: int,
    text_tokens: int,
    vae_scale: int,
    instruction_tokens: int = 0,
    template_tokens: int = 0,
) -> dict[str, Size]:
    """What every dynamic axis is at the served size: one image, of so many rows of the denoiser, or up to four.

    Prompts, not negative ones, may stand behind an instruction, and all of them in a template. A denoiser that is told
    pictures is told none, best one of the served size, and at most as many as `References.served` says, of that size or
    as large as they are fitted. Those that the text encoder looks at make the text longer. `pipeline` and `config` are
    as for `served`.
    """
    length = (sampling.max_sequence_length or 256) + template_tokens
    longest = length + instruction_tokens
    *frames, height, width = sampling.latents(vae_scale)
    kind, pictures = KINDS.get(pipeline), {}
    texts: dict[str, Size] = {"text_tokens": text_tokens} if text_tokens else {}
    sequence: Size = (length, longest, longest) if instruction_tokens else length
    if kind is not None and kind.references is not None:
        step = vae_scale * kind.patch(config)
        own = (sampling.height // step) * (sampling.width // step)
        pictures = {TOKENS: (0, own, kind.references.served * max(own, kind.references.pixels // step**2))}
        if kind.references.seen is not None:
            seen = kind.references.seen_sizes(sampling.width, sampling.height)
            pictures |= seen
            words = text_tokens - kind.references.seen_tokens(1, 1)
            texts, sequence = {"text_tokens": _longer(words, seen[SEEN])}, _longer(length, seen[SEEN])
    return {
        "batch": (1, rows, IMAGES[1] * rows),
        **({"frames": frames[0]} if frames else {}),
        "height": height,
        "width": width,
        "image_height": sampling.height,
        "image_width": sampling.width,
        **texts,
        **pictures,
        "sequence": sequence,
    }


def _longer(length: int, more: tuple[int, int, int]) -> Size:
    low, best, high = (length + each for each in more)
    return low, best, high


def served(sizes: Sizes, pipeline: str, config: Mapping[str, Any], tile: int | None = None) -> Served:
    """What engines are for.

    Args:
        sizes: from `sizes_of`.
        pipeline: diffusers class; of one that the runtime does not know, only whole latent pixels are asked for.
        config: of the denoiser.
        tile: see `Served`.
    """
    batch, kind = sizes["batch"], KINDS.get(pipeline)
    scale = _one(sizes["image_height"]) // _one(sizes["height"])
    only = None if kind is None else kind.only(config)
    largest = None if kind is None else only or kind.largest(config)
    return Served(
        sizes=sizes,
        rows=batch if isinstance(batch, int) else batch[1],
        scale=scale,
        step=scale * (1 if kind is None else only or kind.patch(config)),
        largest=None if largest is None else largest * scale,
        tile=tile,
    )


def require_drawable(order: Order, what: Served) -> None:
    """Raises ConfigError for a profile that the denoiser cannot draw; to be called before any work."""
    tables(order.profiles, what, denoiser=True)


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
    settings: Settings | None = None,
    *,
    components: Sequence[str] = (),
    progress: Progress = silent,
    **more: Any,
) -> Built:
    """Engines for this machine from a bundle's ONNX; its manifest lists them: `build("sd35m", profile="512,1024@1-4")`.

    Args:
        bundle: the folder.
        settings: of the command line.
        components: only these; all of them if none are named.
        progress: told component by component.
        **more: the flags of `obsdiff build`.

    Raises:
        ObsdiffError: one of its kinds; the manifest is as before. `Built.hold` asks for the proof of sparsity.
    """
    asked = given_as(settings, more)
    order = order_of(asked)
    opened = open_bundle(bundle)
    entries = opened.manifest.components.values()
    formats = {entry.precision for entry in entries if entry.precision in NEEDS}
    formats |= {"bf16" for entry in entries if entry.dtype == "bfloat16"}
    order = fitting(order, formats, asked)
    names = _components(opened, components)
    family = FAMILIES.get(opened.manifest.family)
    if family is None:
        raise CompatibilityError(
            f"{bundle}: family {opened.manifest.family} is unknown here; there are {', '.join(FAMILIES)}"
        )
    what = _served_by(opened, family.denoiser, asked.vae_tile)
    found = build_engines(
        {name: opened.onnx(name) for name in names},
        opened.root,
        what,
        order,
        denoisers=dict.fromkeys(opened.manifest.turns or (family.denoiser,)),
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


def fitting(order: Order, formats: Collection[str], settings: Settings) -> Order:
    """The order for those of its targets that compute in these formats, such as "fp8" and "bf16".

    Raises:
        CompatibilityError: a target that the user named does not, or none does.
    """
    asked = order.targets if settings.targets else ()
    return dataclasses.replace(order, targets=targets_for(asked, order.targets, formats))


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


def built(name: str, engine: Engine, choice: str = "") -> BuiltEngine:
    proven = receipt.load(engine.receipt_path)
    return BuiltEngine(
        component=name,
        backend=f"{engine.backend} {engine.backend_version}",
        targets=engine.targets,
        sparsity=receipt.sparsity_statement(proven),
        bytes_on_disk=engine.bytes,
        seconds=engine.seconds,
        verdicts=proven.proof.counts(),
        choice=choice,
    )


def measurements(contests: Mapping[str, Versus[Engine]]) -> dict[str, object]:
    """What a manifest keeps of them: nothing where nothing was measured."""
    measured = ((name, each) for name, each in contests.items() if each.decision.outcome != "not measured")
    return {f"engines/{name}": each.to_json() for name, each in measured}


def _flags(settings: Settings) -> Flags:
    refit: dict[str, Refit] = {name: name for name in REFITS}
    asked = settings.refit or "no"
    if asked not in refit:
        raise ConfigError(f"--refit {asked}: there are {', '.join(refit)}")
    level = settings.optimization_level
    if level is not None and not 0 <= level <= 5:
        raise ConfigError(f"--optimization-level {level}: levels are 0 (quickest build) to 5 (quickest engine)")
    return Flags(refit=refit[asked], weight_streaming=bool(settings.weight_streaming), optimization_level=level)


def _builds(asked: int | None) -> int:
    if asked is not None and asked < 0:
        raise ConfigError(f"--builds {asked}: must be 0 (build once, time nothing) or more")
    return BUILDS if asked is None else asked


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
            low, best, high = _range(shared[side])
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
    return served(table, opened.manifest.pipeline_class, opened.config(denoiser), side)


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


def _range(size: Size) -> tuple[int, int, int]:
    return (size, size, size) if isinstance(size, int) else size


def _one(size: Size) -> int:
    return _range(size)[1]
