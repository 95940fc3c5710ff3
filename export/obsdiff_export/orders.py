"""What is asked of engines, checked before any work: builder, targets, flags, and the sizes they are for."""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from obsdiff_export.build import choose_builder
from obsdiff_export.builders.request import REFITS, Builder, Flags, Refit
from obsdiff_export.caches import Cache, open_cache
from obsdiff_export.capabilities import targets_for
from obsdiff_export.profiles import Size, Sizes
from obsdiff_export.proof.judging import IGNORES
from obsdiff_export.requested import (
    Served,
    ShapeBounds,
    SizeProfile,
    parse_profiles,
    parse_shapes,
    tables,
)
from obsdiff_export.settings import EngineSettings
from obsdiff_export.versus import BUILDS
from obsdiff_runtime.autoencoder import pixel_patch
from obsdiff_runtime.errors import ConfigError, SparsityProofError
from obsdiff_runtime.kinds.table import KINDS


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


def order_of(settings: EngineSettings) -> Order:
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


def fitting(order: Order, formats: Collection[str], settings: EngineSettings) -> Order:
    """The order for those of its targets that compute in these formats, such as "fp8" and "bf16".

    Raises:
        CompatibilityError: a target that the user named does not, or none does.
    """
    asked = order.targets if settings.targets else ()
    return dataclasses.replace(order, targets=targets_for(asked, order.targets, formats))


def served(
    sizes: Sizes, pipeline: str, config: Mapping[str, Any], *, vae: Mapping[str, Any], tile: int | None = None
) -> Served:
    """What engines are for.

    Args:
        sizes: from `sizes_of`.
        pipeline: diffusers class; of one that the runtime does not know, only whole latent pixels are asked for.
        config: of the denoiser.
        vae: configuration of the autoencoder.
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
        read_times=pixel_patch(vae),
    )


def require_drawable(order: Order, what: Served) -> None:
    """Raises ConfigError for a profile that the denoiser cannot draw; to be called before any work."""
    tables(order.profiles, what, denoiser=True)


def _flags(settings: EngineSettings) -> Flags:
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


def range_of(size: Size) -> tuple[int, int, int]:
    """Least, best and most of an axis."""
    return (size, size, size) if isinstance(size, int) else size


def _one(size: Size) -> int:
    return range_of(size)[1]
