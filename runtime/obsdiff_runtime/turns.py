"""Denoisers that draw one picture in turn, each at its own timesteps: first those for much noise.

Turns say of each component from which timestep on it is called; it is, up to where the one before it begins.
"""

from collections.abc import Mapping
from typing import Final

from obsdiff_runtime.errors import ConfigError

Turns = Mapping[str, float]

BEHIND: Final = "_2"
"""What diffusers adds to a denoiser's name for the one that takes its turn behind it."""


def denoiser_at(turns: Turns, timestep: float) -> str:
    """The component that is called at a timestep; the last one has all that is below."""
    return next((name for name, begins in turns.items() if timestep >= begins), list(turns)[-1])


def require_taken(scale: float | None, several: bool, where: str, *, name: str = "guidance_scale_2") -> None:
    """Raises ConfigError where a guidance scale is given for denoisers behind the first, and there are none."""
    if scale is not None and not several:
        raise ConfigError(f"{name} {scale:g}: one denoiser takes all steps {where}; leave it out")


def turns_in_words(turns: Turns, scale: float | None) -> str:
    """For a person; "" where no denoisers take turns. `scale` is the guidance of those behind the first."""
    begins = ", ".join(f"{name} from timestep {timestep:g} on" for name, timestep in turns.items())
    return begins if scale is None or not turns else f"{begins} at guidance {scale:g}"
