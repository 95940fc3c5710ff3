"""Pictures to latents and back, and latents to films, as the denoiser counts latents.

Shapes: c latent channels, h w latent height and width; a picture is `scale` times as high and wide. f latent frames of
a film, of which the first stands for one frame and each of the others for FRAME_SCALE.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from obsdiff_runtime.errors import CompatibilityError, ConfigError
from obsdiff_runtime.networks import Array, Networks
from obsdiff_runtime.noise import Noise
from obsdiff_runtime.progress import Progress, silent

Pixels = NDArray[np.uint8]
VAE_SCALE: Final = 8  # pixels per side of a latent pixel of most autoencoders
FRAME_SCALE: Final = 4  # frames of a film in a latent frame, of which the first has one alone
DECODER: Final = "vae_decoder"  # component; of a film's first latent frame
NEXT_DECODER: Final = "vae_decoder_next"  # of each of the others
LOG_VARIANCES: Final = (-30.0, 20.0)  # diffusers' DiagonalGaussianDistribution


def vae_scale(config: Mapping[str, Any]) -> int:
    """Pixels per side of a latent pixel, from an autoencoder's configuration; VAE_SCALE where it does not say."""
    if "temperal_downsample" in config:  # of video autoencoders, spelled so: those of Qwen-Image and Wan
        return int(2 ** len(config["temperal_downsample"]))
    levels = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    patch = config.get("patch_size") or (1,)  # of FLUX.2's, whose latents are patches
    return VAE_SCALE if levels is None else int(2 ** (len(levels) - 1) * patch[0])


def latent_channels(config: Mapping[str, Any]) -> int:
    """Channels of the latents, from an autoencoder's configuration."""
    return int(config["z_dim"] if "z_dim" in config else config["latent_channels"])


def latent_frames(num_frames: int, name: str = "num_frames") -> int:
    """Frames of the latents of a film of so many frames.

    Raises:
        ConfigError: there is no film of so many; says which are near, and `name` is what it is called.
    """
    if num_frames < 1 or (num_frames - 1) % FRAME_SCALE:
        below = max((num_frames - 1) // FRAME_SCALE, 0) * FRAME_SCALE + 1
        raise ConfigError(
            f"{name} {num_frames}: a film has one frame and a multiple of {FRAME_SCALE} behind it; "
            f"near are {below} and {below + FRAME_SCALE}"
        )
    return (num_frames - 1) // FRAME_SCALE + 1


def film_frames(asked: int | None, own: int | None, name: str = "num_frames", who: str = "this pipeline") -> int | None:
    """Frames of the film to draw; None where pictures are drawn.

    Args:
        asked: None for its own.
        own: what the pipeline draws by default, None where that is pictures.
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
    latent_frames(frames, name)
    return frames


def cached(index: int, *, given: bool = False) -> str:
    """Name of what a film's decoder is told of the frames before, or gives for those behind."""
    return f"{'new_' if given else ''}cache_{index}"


def _pixels(decoded: Array) -> Pixels:
    """(3, height, width) -> (height, width, 3)."""
    unit = np.clip(decoded / 2 + 0.5, 0, 1).transpose(1, 2, 0)
    picture: Pixels = (unit * 255).round().astype(np.uint8)
    return picture


class Autoencoder:
    """The VAE of a bundle, whose encoder need not be there.

    Attributes:
        scale: pixels along a side of a latent pixel.
    """

    def __init__(self, networks: Networks, config: Mapping[str, Any]) -> None:
        self._networks, self._config = networks, config
        self.scale = vae_scale(config)

    def decode(self, sample: Array, progress: Progress = silent) -> Pixels:
        """(c, h, w) -> (height, width, 3); of a film (c, f, h, w) -> (frames, height, width, 3).

        Args:
            sample: latents, as the denoiser wants them.
            progress: told of stage "decode" after each latent frame of a film.

        Raises:
            RunError: it was not finite.
        """
        factor, shift = self._affine()
        if sample.ndim == 3:
            latent = (sample * factor + shift)[None]
            return _pixels(self._networks.run(DECODER, {"latent_sample": latent}, ["sample"])["sample"][0])
        frames: list[Pixels] = []
        caches: dict[str, Array] = {}
        given = [port.name for port in self._networks.bundle.component(DECODER).outputs]
        for index in range(sample.shape[1]):
            told = {"latent_sample": (sample[:, index] * factor + shift)[None], **caches}
            name = NEXT_DECODER if caches else DECODER
            found = self._networks.run(name, told, given, finite=False)
            pixels = found.pop("sample")
            if not np.isfinite(pixels).all():
                raise self._networks.not_finite(name, "sample", pixels)
            frames += [_pixels(frame) for frame in pixels[0].swapaxes(0, 1)]
            caches = {cached(cache): found[cached(cache, given=True)] for cache in range(len(found))}
            progress("decode", index + 1, sample.shape[1])
        return np.stack(frames)

    def check_encodes(self) -> None:
        """CompatibilityError if there is no encoder."""
        if not self._networks.has("vae_encoder"):
            raise CompatibilityError("this bundle has no VAE encoder, so that it reads no images")

    def encode(self, picture: Pixels) -> tuple[Array, Array]:
        """Mean and standard deviation, (c, h, w) each, of the latents of a picture (height, width, 3).

        AutoencoderDC and FLUX.2's give the latents themselves.

        Raises:
            RunError: they were not finite.
        """
        pixels = (picture.transpose(2, 0, 1).astype(np.float32) / np.float32(127.5) - np.float32(1))[None]
        found = self._networks.run("vae_encoder", {"sample": pixels}, ["latent_parameters"])["latent_parameters"][0]
        if len(found) != 2 * latent_channels(self._config):
            return found, np.zeros_like(found)
        mean, log_variance = np.split(found, 2)
        return mean, np.exp(np.float32(0.5) * np.clip(log_variance, *LOG_VARIANCES))

    def sample(self, encoded: tuple[Array, Array], noise: Noise) -> Array:
        """(c, h, w): latents drawn from what `encode` gave, as the denoiser wants them."""
        mean, deviation = encoded
        factor, shift = self._affine()
        drawn = mean + deviation * noise(mean.shape) if deviation.any() else mean  # then diffusers asks for no noise
        latents: Array = (drawn - shift) / factor
        return latents

    def _affine(self) -> tuple[Array, Array]:
        """(factor, shift), which take the denoiser's latents to the decoder's; they broadcast over (c, h, w)."""
        factor = np.float32(1) / np.float32(self._config.get("scaling_factor", 1))
        mean, deviation = self._config.get("latents_mean"), self._config.get("latents_std")
        if mean is not None and deviation is not None:
            deviations, means = (np.array(values, np.float32).reshape(-1, 1, 1) for values in (deviation, mean))
            return factor * deviations, means
        return np.asarray(factor), np.asarray(self._config.get("shift_factor") or 0, np.float32)
