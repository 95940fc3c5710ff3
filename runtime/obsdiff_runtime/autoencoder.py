"""Pictures to latents and back, and latents to films, as the denoiser counts latents.

Shapes: c latent channels, h w latent height and width; a picture is `scale` times as high and wide. f latent frames of
a film, of which the first stands for one frame and each of the others for `frame_scale`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from obsdiff_runtime.bundle import DECODER, ENCODER, NEXT_DECODER, NEXT_ENCODER, TensorEntry
from obsdiff_runtime.errors import CompatibilityError, ConfigError, ResourceError
from obsdiff_runtime.networks import Array, Networks
from obsdiff_runtime.noise import Noise
from obsdiff_runtime.progress import Progress, silent
from obsdiff_runtime.shapes import choose, refusal
from obsdiff_runtime.tiling import Seams, Tile, tiles

Pixels = NDArray[np.uint8]
VAE_SCALE: Final = 8  # pixels per side of a latent pixel of most autoencoders
FRAME_SCALE: Final = 4  # frames of a film in a latent frame of most, of which the first has one alone
LATENTS: Final = "latent_sample"  # their input
_SCALING: Final = "spatio_temporal_scaling"  # in the configuration of LTX-Video's: levels that halve all sides
LOG_VARIANCES: Final = (-30.0, 20.0)  # diffusers' DiagonalGaussianDistribution
TILE: Final = {
    "AutoencoderDC": 512,
    "AutoencoderKLLTXVideo": 512,
    "AutoencoderKLQwenImage": 256,
    "AutoencoderKLWan": 256,
}
"""Pixels per side of a tile in diffusers, by class; of others it is the size of picture that they were trained on."""
OVERLAP: Final = {"AutoencoderDC": 8, "AutoencoderKLLTXVideo": 8}
"""Neighbours overlap by one part in so many of a tile, in diffusers; of others one in OVERLAP_OF_OTHERS."""
OVERLAP_OF_OTHERS: Final = 4


def vae_scale(config: Mapping[str, Any]) -> int:
    """Pixels per side of a latent pixel, from an autoencoder's configuration; VAE_SCALE where it does not say."""
    if "temperal_downsample" in config:  # of video autoencoders, spelled so: those of Qwen-Image and Wan
        return int(2 ** len(config["temperal_downsample"]) * pixel_patch(config))
    if _SCALING in config:
        return _said(config, "spatial_compression_ratio", "patch_size")
    levels = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    return VAE_SCALE if levels is None else int(2 ** (len(levels) - 1) * _patch(config))


def frame_scale(config: Mapping[str, Any]) -> int:
    """Frames of a film in a latent frame, from an autoencoder's configuration; FRAME_SCALE where it does not say."""
    return _said(config, "temporal_compression_ratio", "patch_size_t") if _SCALING in config else FRAME_SCALE


def _said(config: Mapping[str, Any], ratio: str, patch: str) -> int:
    """What LTX-Video's says, or what its levels come to."""
    return int(config.get(ratio) or config[patch] * 2 ** sum(config[_SCALING]))


def pixel_patch(config: Mapping[str, Any]) -> int:
    """Pixels per side of what counts as one: an autoencoder of films can take patches of them, as Wan 2.2 TI2V's."""
    return int(config.get("patch_size") or 1) if "temperal_downsample" in config else 1


def _patch(config: Mapping[str, Any]) -> int:
    """Latent pixels per side of what counts as one: those of FLUX.2's autoencoder are patches."""
    found = config.get("patch_size")
    return int(found[0]) if isinstance(found, (list, tuple)) else 1  # a number says how pixels are patched


def latent_channels(config: Mapping[str, Any]) -> int:
    """Channels of the latents, from an autoencoder's configuration."""
    return int(config["z_dim"] if "z_dim" in config else config["latent_channels"])


def latent_frames(num_frames: int, scale: int, name: str = "num_frames") -> int:
    """Frames of the latents of a film of so many frames.

    Args:
        num_frames: of the film.
        scale: see `frame_scale`.
        name: what the number is called.

    Raises:
        ConfigError: there is no film of so many; says which are near.
    """
    if num_frames < 1 or (num_frames - 1) % scale:
        below = max((num_frames - 1) // scale, 0) * scale + 1
        raise ConfigError(
            f"{name} {num_frames}: a film has one frame and a multiple of {scale} behind it; "
            f"near are {below} and {below + scale}"
        )
    return (num_frames - 1) // scale + 1


def film_frames(
    asked: int | None, own: int | None, scale: int | None, name: str = "num_frames", who: str = "this pipeline"
) -> int | None:
    """Frames of the film to draw; None where pictures are drawn.

    Args:
        asked: None for its own.
        own: what the pipeline draws by default, None where that is pictures.
        scale: see `frame_scale`; None where nobody knows which numbers there are.
        name: what the number is called.
        who: draws.

    Raises:
        ConfigError: a film is asked for where pictures are drawn, or there is none of so many frames.
    """
    frames = own if asked is None else asked
    if frames is None:
        return None
    if own is None:
        raise ConfigError(f"{name} {frames}: {who} draws pictures; leave it out")
    if scale is not None:
        latent_frames(frames, scale, name)
    return frames


def tile_side(asked: bool | int | None, own: int | None, config: Mapping[str, Any]) -> int | None:
    """Pixels per side of the tiles that pictures go through an autoencoder in; None where they go whole.

    Args:
        asked: so many; True: as the bundle says, or as diffusers has them; False or None: as the bundle says.
        own: what the bundle says, None where it says nothing.
        config: of the autoencoder.

    Raises:
        ConfigError: there is no tile of so many; says which are near.
    """
    scale, parts = vae_scale(config), _overlap(config)
    side = own if asked is None or isinstance(asked, bool) else asked
    if side is None:
        if not asked:
            return None
        trained = config.get("sample_size") or VAE_SCALE
        usual = TILE.get(config.get("_class_name", ""), trained if isinstance(trained, int) else trained[0])
        return nearest_tile(int(usual), config)
    if side % scale:
        below = nearest_tile(side, config)
        raise ConfigError(f"tiles of {side} pixels: should be a multiple of {scale}; near are {below}, {below + scale}")
    if side < parts * scale:
        raise ConfigError(f"tiles of {side} pixels do not overlap; give {parts * scale} or more")
    return side


def nearest_tile(side: int, config: Mapping[str, Any]) -> int:
    """Pixels per side of the largest tile that is no larger; of the least one where there is none."""
    scale = vae_scale(config)
    return max(side // scale, _overlap(config)) * scale


def tile_overlap(side: int, config: Mapping[str, Any]) -> int:
    """Pixels that neighbours of such tiles have in common: whole latent pixels."""
    scale = vae_scale(config)
    return side // scale // _overlap(config) * scale


def _overlap(config: Mapping[str, Any]) -> int:
    return OVERLAP.get(config.get("_class_name", ""), OVERLAP_OF_OTHERS)


def cached(index: int, *, given: bool = False) -> str:
    """Name of what a film's decoder is told of the frames before, or gives for those behind."""
    return f"{'new_' if given else ''}cache_{index}"


def _pixels(decoded: Array) -> Pixels:
    """(3, n, height, width) -> (n, height, width, 3)."""
    unit = np.clip(decoded / 2 + 0.5, 0, 1).transpose(1, 2, 3, 0)
    pictures: Pixels = (unit * 255).round().astype(np.uint8)
    return pictures


def _signed(picture: Pixels) -> Array:
    """(height, width, 3) -> (1, 3, height, width), in -1..1."""
    return (picture.transpose(2, 0, 1).astype(np.float32) / np.float32(127.5) - np.float32(1))[None]


def _unpatched(latents: Array, patch: int) -> Array:
    """(c patch patch, h, w) -> (c, h patch, w patch)."""
    _, height, width = latents.shape
    split = latents.reshape(-1, patch, patch, height, width)
    return split.transpose(0, 3, 1, 4, 2).reshape(-1, height * patch, width * patch)


def _patched(latents: Array, patch: int) -> Array:
    """What `_unpatched` took apart."""
    channels, height, width = latents.shape
    split = latents.reshape(channels, height // patch, patch, width // patch, patch)
    return split.transpose(0, 2, 4, 1, 3).reshape(-1, height // patch, width // patch)


class Autoencoder:
    """The VAE of a bundle, whose encoder need not be there.

    Attributes:
        scale: pixels along a side of a latent pixel.
        frame_scale: frames of a film in a latent frame behind the first.
        tile: pixels along a side of the tiles that pictures go through it in; None where they go whole.
    """

    def __init__(self, networks: Networks, config: Mapping[str, Any], tile: int | None = None) -> None:
        self._networks, self._config = networks, config
        self.scale, self.frame_scale, self.tile = vae_scale(config), frame_scale(config), tile

    def decode(self, sample: Array, progress: Progress = silent) -> Pixels:
        """(c, h, w) -> (height, width, 3); of a film (c, f, h, w) -> (frames, height, width, 3).

        A tile goes through all frames before the next one begins: the decoder knows of the frames before, or, where it
        decodes films whole, of all.

        Args:
            sample: latents, as the denoiser wants them.
            progress: told of stage "decode" after each call of the decoder.

        Raises:
            RunError: it was not finite.
            ResourceError: memory is too small.
        """
        latents = sample if sample.ndim == 4 else sample[:, None]
        _, frames, height, width = latents.shape
        cut, calls = self._cut(height, width), 1 if self._decodes_whole() else frames
        seams = [Seams(pixel_patch(self._config)) for _ in range(calls)]
        shape = ((frames - 1) * self.frame_scale + 1, height * self.scale, width * self.scale, 3)
        found: Pixels = np.empty(shape, np.uint8)
        for done, tile in enumerate(cut):
            high, wide = tile.settles(self.scale)
            end = 0
            for index, made in enumerate(self._decoded(latents[:, :, tile.height, tile.width])):
                begin, end = end, end + made.shape[1]
                found[begin:end, high, wide] = _pixels(seams[index].settled(tile, made))
                progress("decode", done * calls + index + 1, len(cut) * calls)
        return found if sample.ndim == 4 else found[0]

    def _port(self) -> TensorEntry:
        (port,) = (port for port in self._networks.bundle.component(DECODER).inputs if port.name == LATENTS)
        return port

    def _decodes_whole(self) -> bool:
        """Whether all frames of a film go through the decoder at once."""
        return len(self._port().shape) == 5

    def check_tiles(self, height: int, width: int, num_frames: int | None = None) -> None:
        """ConfigError if the decoder's engines take no tile of a picture, or film; see `Networks.profiles`.

        Args:
            height: in pixels.
            width: in pixels.
            num_frames: of a film.
        """
        profiles = self._networks.profiles(DECODER)
        if self.tile is None or not profiles:
            return
        port = self._port()
        frames = (latent_frames(num_frames or 1, self.frame_scale),) if self._decodes_whole() else ()
        for tile in self._cut(height // self.scale, width // self.scale):
            shapes = {LATENTS: (1, int(port.shape[1]), *frames, *tile.size)}
            if choose(profiles, shapes) is None:
                units = {"height": self.scale, "width": self.scale}
                told = refusal(profiles, shapes, {LATENTS: port.shape}, units)
                raise ConfigError(
                    f"tiles of {self.tile} pixels: {told}; give --vae-tile that it takes, or build one that takes "
                    f"these: obsdiff build BUNDLE --vae-tile {self.tile}"
                )

    def _cut(self, height: int, width: int, times: int = 1) -> list[Tile]:
        """Of latents of that size, in tiles so many times as high and wide."""
        if self.tile is None:
            return list(tiles(height, width, max(height, width), 0))
        side, overlap = (times * pixels // self.scale for pixels in (self.tile, tile_overlap(self.tile, self._config)))
        return list(tiles(height, width, side, overlap))

    def _decoded(self, latents: Array) -> Iterator[Array]:
        """(c, f, h, w) -> (3, n, height, width) for each latent frame in turn: one frame, and then `frame_scale`.

        Or all frames at once.
        """
        factor, shift = self._affine()
        if self._decodes_whole():
            told = {LATENTS: (latents * factor[..., None] + shift[..., None])[None]}
            yield self._run(DECODER, told, ["sample"])["sample"][0]
            return
        given = [port.name for port in self._networks.bundle.component(DECODER).outputs]
        caches: dict[str, Array] = {}
        for index in range(latents.shape[1]):
            told = {LATENTS: (latents[:, index] * factor + shift)[None], **caches}
            name = NEXT_DECODER if caches else DECODER
            found = self._run(name, told, given, finite=False)
            pixels = found.pop("sample")
            if not np.isfinite(pixels).all():
                raise self._networks.not_finite(name, "sample", pixels)
            caches = {cached(cache): found[cached(cache, given=True)] for cache in range(len(found))}
            yield pixels[0] if pixels.ndim == 5 else pixels[0][:, None]

    def check_encodes(self) -> None:
        """CompatibilityError if there is no encoder."""
        if not self._networks.has(ENCODER):
            raise CompatibilityError("this bundle has no VAE encoder, so that it reads no images")

    def encode(self, picture: Pixels, hidden: NDArray[np.bool_] | None = None) -> tuple[Array, Array]:
        """Mean and standard deviation, (c, h, w) each, of the latents of a picture (height, width, 3).

        What is hidden of it, (height, width), is grey, the zeros of its pixels.
        AutoencoderDC and FLUX.2's give the latents themselves. In tiles means and logarithms of variances are blended.

        Raises:
            RunError: they were not finite.
        """
        (found,) = self._parameters(picture, 1, hidden=hidden)
        if len(found) != 2 * latent_channels(self._config):
            return found, np.zeros_like(found)
        mean, log_variance = np.split(found, 2)
        return mean, np.exp(np.float32(0.5) * np.clip(log_variance, *LOG_VARIANCES))

    def open(self, picture: Pixels, frames: int, last: Pixels | None = None) -> Array:
        """(c, f, h, w): latents of a film of so many latent frames, as the denoiser wants them.

        Its first frame is the picture, (height, width, 3), and the others are grey, the zeros of its pixels, but for
        the `last` where that is given.

        Raises:
            RunError: they were not finite.
        """
        factor, shift = self._affine()
        means = (np.split(found, 2)[0] for found in self._parameters(picture, frames, last))
        return np.stack([(mean - shift) / factor for mean in means], axis=1)

    def _parameters(
        self, picture: Pixels, frames: int, last: Pixels | None = None, hidden: NDArray[np.bool_] | None = None
    ) -> list[Array]:
        """What the encoder makes of a picture, (channels, h, w), and of each further latent frame of a film behind it.

        As in `decode` a tile goes through all frames before the next one begins. Diffusers counts patches of pixels
        here, so that tiles are larger than in `decode`.
        """
        pixels, ending = _signed(picture), None if last is None else _signed(last)
        pixels = pixels if hidden is None else np.where(hidden, np.float32(0), pixels)
        height, width = (side // self.scale for side in pixels.shape[-2:])
        patch, seams = _patch(self._config), [Seams() for _ in range(frames)]
        rows: list[list[list[Array]]] = [[] for _ in range(frames)]
        for tile in self._cut(height, width, pixel_patch(self._config)):
            high, wide = tile.covers(self.scale)
            for frame, made in enumerate(
                self._encoded(pixels[:, :, high, wide], frames, None if ending is None else ending[:, :, high, wide])
            ):
                rows[frame] += [] if tile.column else [[]]
                rows[frame][-1].append(seams[frame].settled(tile, _unpatched(made, patch)))
        return [_patched(np.concatenate([np.concatenate(row, -1) for row in own], -2), patch) for own in rows]

    def _encoded(self, pixels: Array, frames: int, last: Array | None) -> Iterator[Array]:
        """(1, 3, height, width) -> (channels, h, w) for each latent frame in turn.

        What is behind the first frame is of zeros, but for the `last`, of the same shape, where that is given.
        """
        told, name = {"sample": pixels}, ENCODER
        given = [port.name for port in self._networks.bundle.component(name).outputs]
        behind = np.zeros((1, 3, self.frame_scale, *pixels.shape[-2:]), np.float32)
        for index in range(frames):
            if index and index == frames - 1 and last is not None:
                told["sample"] = np.concatenate([behind[:, :, 1:], last[:, :, None]], axis=2)
            found = self._run(name, told, given)
            yield found.pop("latent_parameters")[0]
            caches = {cached(cache): found[cached(cache, given=True)] for cache in range(len(found))}
            told, name = {"sample": behind, **caches}, NEXT_ENCODER

    def sample(self, encoded: tuple[Array, Array], noise: Noise) -> Array:
        """(c, h, w): latents drawn from what `encode` gave, as the denoiser wants them."""
        mean, deviation = encoded
        factor, shift = self._affine()
        drawn = mean + deviation * noise(mean.shape) if deviation.any() else mean  # then diffusers asks for no noise
        latents: Array = (drawn - shift) / factor
        return latents

    def _run(
        self, component: str, inputs: Mapping[str, Array], outputs: Sequence[str], *, finite: bool = True
    ) -> dict[str, Array]:
        """See `Networks.run`; where memory is too small, tiles are told of."""
        try:
            return self._networks.run(component, inputs, outputs, finite=finite)
        except ResourceError as error:
            which = "tiles" if self.tile is None else "smaller tiles"
            raise ResourceError(
                f"{error}; it needs less in {which}: --vae-tile, of obsdiff build too where there are engines"
            ) from error

    def _affine(self) -> tuple[Array, Array]:
        """(factor, shift), which take the denoiser's latents to the decoder's; they broadcast over (c, h, w)."""
        factor = np.float32(1) / np.float32(self._config.get("scaling_factor", 1))
        mean, deviation = self._config.get("latents_mean"), self._config.get("latents_std")
        if mean is not None and deviation is not None:
            deviations, means = (np.array(values, np.float32).reshape(-1, 1, 1) for values in (deviation, mean))
            return factor * deviations, means
        return np.asarray(factor), np.asarray(self._config.get("shift_factor") or 0, np.float32)
