"""Where noise comes from: one source per image, chosen by name. A source is a function and a line in SOURCES.

An image's source gives its first latents, then what a stochastic sampler asks for, and knows nothing of the batch in
which it is drawn.
"""

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.torch_normal import TorchGenerator

Noise = Callable[[tuple[int, ...]], NDArray[np.float32]]
"""Standard normal numbers of a shape; each call goes on where the last one ended."""


def numpy_noise(seed: int, image: int, images: int) -> Noise:
    """PCG64 seeded by (seed, image): an image has the same noise among however many."""
    generator = np.random.Generator(np.random.PCG64([seed, image]))
    return lambda shape: generator.standard_normal(shape, dtype=np.float32)


def torch_noise(seed: int, image: int, images: int) -> Noise:
    """Row `image` of what torch.Generator().manual_seed(seed) draws on the CPU, in float32, for `images` at once."""
    generator = TorchGenerator(seed)
    return lambda shape: generator.rows((images, *shape), image, image + 1)[0]


SOURCES: Final[dict[str, Callable[[int, int, int], Noise]]] = {"numpy": numpy_noise, "torch": torch_noise}


def noise_sources(name: str, seed: int | Sequence[int], images: int) -> list[Noise]:
    """A source for each image of a call.

    Args:
        name: one of SOURCES.
        seed: one for the call, whose images differ by their index; or one for each image, which then has the noise of
            an image drawn alone. With "torch" that is diffusers given one generator, or a list of them.
        images: of the call.

    Raises:
        ConfigError: an unknown name, a negative seed, or not one seed per image.
    """
    if name not in SOURCES:
        raise ConfigError(f"no noise {name!r}; there is {', '.join(SOURCES)}")
    seeds = list(seed) if isinstance(seed, Sequence) else [seed] * images
    if len(seeds) != images:
        raise ConfigError(f"{len(seeds)} seeds for {images} images; give one, or one for each")
    if any(number < 0 for number in seeds):
        raise ConfigError(f"seed should not be negative: {min(seeds)}")
    if isinstance(seed, Sequence):
        return [SOURCES[name](number, 0, 1) for number in seeds]
    return [SOURCES[name](seed, image, images) for image in range(images)]
