"""What the commands do, whichever program was asked; a function a verb. None prints anything."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from obsdiff_runtime import films
from obsdiff_runtime.autoencoder import Pixels
from obsdiff_runtime.bundle import Bundle, open_bundle
from obsdiff_runtime.decoding import encode
from obsdiff_runtime.errors import ConfigError, require_file
from obsdiff_runtime.kinds.table import kind_of
from obsdiff_runtime.progress import Progress, silent
from obsdiff_runtime.shapes import words
from obsdiff_runtime.turns import turns_in_words


def generate(
    bundle: Bundle | Path,
    prompt: str,
    output: Path,
    *,
    image: Path | None = None,
    last_image: Path | None = None,
    mask: Path | None = None,
    control: Path | None = None,
    references: Sequence[Path] = (),
    own_size: bool = False,
    height: int | None = None,
    width: int | None = None,
    fps: float | None = None,
    backend: str = "onnxruntime",
    threads: int | None = None,
    vae_tiling: bool | int = False,
    progress: Progress = silent,
    **call: Any,
) -> Mapping[str, float]:
    """Draws one image, or one film, into a file.

    Args:
        bundle: opened, or a folder.
        prompt: what to draw.
        output: the file; its name says the format. Folders above it are created. Of films see `films.WRITERS`.
        image: file of one to change, or that a film begins with, in any format that Pillow reads; see
            `pictures.read_picture`. What it is changed to has its own size by default, a film the bundle's.
        last_image: likewise of one that a film ends with.
        mask: file of which part of the image is drawn anew; see `masks.mask_of`.
        control: file of one that a ControlNet steers by, at the size that is drawn.
        references: files of pictures that the denoiser is told.
        own_size: see `Pipeline.fit`.
        height: in pixels.
        width: in pixels.
        fps: frames a second of a film, the model's own if None.
        backend: one of `backends.BACKENDS`.
        threads: of the host, all if None.
        vae_tiling: see `Pipeline`.
        progress: see `Pipeline.__call__`.
        **call: other arguments of `Pipeline.__call__`.

    Returns:
        Seconds of each stage.

    Raises:
        ConfigError: `output` names no format, or an argument is none that the pipeline takes.
        ObsdiffError: the bundle cannot be loaded, or cannot draw.
    """
    from obsdiff_runtime.masks import mask_of
    from obsdiff_runtime.pictures import open_picture, read_picture
    from obsdiff_runtime.pipeline import Pipeline

    if mask is not None and image is None:
        raise ConfigError(f"--mask {mask}: it says which part of an image is drawn anew; give --image FILE, too")
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    write = _writer(opened, output, fps)
    pipeline = Pipeline(opened, backend=backend, threads=threads, vae_tiling=vae_tiling)
    if pipeline.resolver.opens:
        own = opened.manifest.defaults
        height, width = own.height if height is None else height, own.width if width is None else width
    start, end, steering = (
        None if path is None else read_picture(path, pipeline.size_step, height, width)
        for path in (image, last_image, control)
    )
    redrawn = None if mask is None or start is None else mask_of(open_picture(mask, mode=None), *start.shape[1::-1])
    told = [pipeline.fit(open_picture(path), own_size=own_size) for path in references]
    shown: dict[str, Any] = {"image": start, "last_image": end, "mask": redrawn, "control": steering, "reference": told}
    images = pipeline(prompt, height=height, width=width, progress=progress, **shown, **call)
    output.parent.mkdir(parents=True, exist_ok=True)
    write(images.arrays[0])
    return images.seconds


def _writer(bundle: Bundle, output: Path, fps: float | None) -> Callable[[Pixels], None]:
    """What writes what the bundle draws to `output`."""
    from PIL import Image

    if bundle.manifest.defaults.num_frames is not None:
        rate = kind_of(bundle.manifest.pipeline_class).fps if fps is None else fps
        films.check(output, rate)
        return lambda film: films.write(film, output, rate)
    if fps is not None:
        raise ConfigError(f"--fps {fps:g}: this bundle draws pictures; leave it out")
    if output.suffix.lower() not in Image.registered_extensions():
        raise ConfigError(f"-o {output}: no image format of that name; use .png or .jpg")
    require_file("-o", output)
    return lambda picture: Image.fromarray(picture).save(output)


def contents(bundle: Bundle) -> dict[str, Any]:
    """What is in a bundle, as JSON has it: its manifest, without the list of files."""
    manifest: dict[str, Any] = encode(bundle.manifest)
    files = manifest.pop("files")
    return {"kind": "bundle", "path": str(bundle.root), "files": len(files), "bytes": bundle.total_bytes(), **manifest}


def drawing(bundle: Bundle) -> str:
    """Arguments of `generate` that draw from it, with those files that it draws nothing without."""
    manifest = bundle.manifest
    kind = kind_of(manifest.pipeline_class)
    files = ["--reference FILE"] * (0 if kind.references is None else kind.references.least)
    if kind.opens:
        files = ["--image FILE", *(["--last-image FILE"] if kind.ends(bundle.config(kind.denoiser)) else [])]
    output = "a.png" if manifest.defaults.num_frames is None else "a.webp"
    return " ".join([str(bundle.root), "'...'", *files, "-o", output])


def describe(bundle: Bundle) -> str:
    """What is in a bundle, for a person: a line on each of its networks and engines."""
    manifest, defaults = bundle.manifest, bundle.manifest.defaults
    frames = "" if defaults.num_frames is None else f" x {defaults.num_frames} frames"
    tiles = "" if defaults.vae_tile is None else f", decoded in tiles of {defaults.vae_tile}"
    lines = [
        f"{bundle.root}: {manifest.pipeline_class}, {manifest.sparsity}, by {manifest.created_by}",
        f"  {len(manifest.files)} files as their sha256 says, {bundle.total_bytes() / 2**20:.1f} MiB",
        f"  draws {defaults.width} x {defaults.height}{frames} in {defaults.num_inference_steps} steps "
        f"at guidance {defaults.guidance_scale:g}{tiles}",
        *([f"  {turns_in_words(manifest.turns, defaults.guidance_scale_2)}"] if manifest.turns else []),
    ]
    for name, component in manifest.components.items():
        size = sum(file.bytes for path, file in manifest.files.items() if path.startswith(f"{name}/"))
        lines.append(f"{name}: {component.precision or component.dtype}, {size / 2**20:.1f} MiB")
        symbols = {port.name: port.shape for port in component.inputs}
        for way, ports in (("takes", component.inputs), ("gives", component.outputs)):
            shapes = (f"{port.name} {port.dtype} ({', '.join(str(size) for size in port.shape)})" for port in ports)
            lines.append(f"  {way} {'; '.join(shapes)}")
        for engine in component.engines:
            where = ", ".join(filter(None, [*engine.targets, engine.device]))
            lines.append(f"  {engine.path}: {engine.backend} {engine.backend_version} for {where or 'any GPU'}")
            lines += [f"    {words(profile, symbols)}" for profile in engine.profiles]
            lines += [f"    sparse kernels: {engine.sparsity}"] if engine.sparsity else []
    return "\n".join(lines)
