"""What can be asked of engines. Nothing heavy is imported here, because every `--help` reads this module."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Final

from obsdiff_runtime.flags import Flag


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What can be asked of engines; the text beside each field is its `--help`, and None means "not given"."""

    targets: Annotated[
        list[str] | None,
        "what engines run on: compute capabilities (TensorRT-RTX: 8.6 8.9 12.0; TensorRT: the GPU here), "
        "or cpu or cuda (onnxruntime)",
    ] = None
    builder: Annotated[
        str | None, "tensorrt, tensorrt_rtx, onnxruntime or onnxruntime_tensorrt; default: the TensorRT that is here"
    ] = None
    profile: Annotated[
        list[str] | None, "sizes that engines take, such as 512,768x512,1024@1-4 (pixels@images); default: the served"
    ] = None
    min_shapes: Annotated[str | None, "smallest shapes by input instead, as trtexec spells them: name:1x16x64x64"] = (
        None
    )
    opt_shapes: Annotated[str | None, "shapes that kernels are timed at; default: the largest"] = None
    max_shapes: Annotated[str | None, "largest shapes"] = None
    vae_tile: Annotated[
        int | None,
        "pictures go through the VAE in tiles of so many pixels a side, and its engines take no more; default: whole",
    ] = None
    refit: Annotated[
        str | None, "yes: weights can be swapped without a rebuild; stripped: and the plan holds none; default: no"
    ] = None
    weight_streaming: Annotated[bool | None, "let weights stay in host memory, for a GPU that is too small"] = None
    optimization_level: Annotated[int | None, "0 (quickest build) to 5 (quickest engine); default: the builder's"] = (
        None
    )
    builds: Annotated[
        int | None,
        "builds of the denoiser's engine with and without sparse kernels, timed by turns; the faster is kept; 0 builds "
        "the one with them alone; default: 3",
    ] = None
    require_sparse: Annotated[bool | None, "exit with 6 unless sparse kernels are proven to run"] = None
    cache_dir: Annotated[str | None, "engines are kept here for other bundles; default: OBSDIFF_CACHE or ~/.cache"] = (
        None
    )
    no_cache: Annotated[bool | None, "neither take engines from the cache nor keep them there"] = None


FIELDS: Final = {field.name: field for field in dataclasses.fields(EngineSettings)}

ENGINES: Final = tuple(name for name in FIELDS if name != "vae_tile")
"""What says something of engines alone."""

INSPECT: Final = (
    Flag(name="--layers", kind=bool, text="A row for each linear, weight and engine layer.", default=False),
    Flag(
        name="--require-sparse",
        kind=bool,
        text="Exit with 6 unless sparse kernels are proven to run.",
        default=False,
    ),
)
"""The flags of inspections."""
