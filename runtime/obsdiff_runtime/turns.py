"""Denoisers that draw one picture in turn, each at its own timesteps: first those for much noise.

Turns say of each component from which timestep on it is called; it is, up to where the one before it begins.
"""

from collections.abc import Mapping

Turns = Mapping[str, float]


def denoiser_at(turns: Turns, timestep: float) -> str:
    """The component that is called at a timestep; the last one has all that is below."""
    return next((name for name, begins in turns.items() if timestep >= begins), list(turns)[-1])
