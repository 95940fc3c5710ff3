"""Samplers in numpy, equal to diffusers' step by step. One is a module here and a line in SCHEDULERS.

An object serves one image, or a batch whose images take every step together: it is made from scheduler_config.json, a
number of steps and a source of noise, and forgotten afterwards. Calls are counted, not looked up by timestep: `index`
runs over `timesteps` one by one, from 0 or, where an image is changed rather than drawn, from any multiple of `order`.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

from numpy.typing import NDArray

from obsdiff_runtime.errors import CompatibilityError, ConfigError
from obsdiff_runtime.noise import Noise
from obsdiff_runtime.schedulers.ddim import Ddim
from obsdiff_runtime.schedulers.ddpm import Ddpm
from obsdiff_runtime.schedulers.distilled import Lcm, Tcd
from obsdiff_runtime.schedulers.dpm_multistep import DpmMultistep
from obsdiff_runtime.schedulers.euler import Euler
from obsdiff_runtime.schedulers.euler_ancestral import EulerAncestral
from obsdiff_runtime.schedulers.flow_match_euler import FlowMatchEuler
from obsdiff_runtime.schedulers.flow_match_heun import FlowMatchHeun
from obsdiff_runtime.schedulers.heun import Heun
from obsdiff_runtime.schedulers.pndm import Pndm
from obsdiff_runtime.schedulers.schedule import Floats
from obsdiff_runtime.schedulers.scm import Scm
from obsdiff_runtime.schedulers.unipc import UniPc


class Scheduler(Protocol):
    @property
    def timesteps(self) -> NDArray[Any]:
        """(calls,), what the denoiser is told at each call."""
        ...

    @property
    def order(self) -> int:
        """Calls of the denoiser per step: step k begins at call k * order."""
        ...

    @property
    def initial_sigma(self) -> float:
        """Standard deviation of the noise to start from."""
        ...

    def scale(self, sample: Floats, index: int) -> Floats:
        """The sample as the denoiser wants it, same shape."""
        ...

    def noised(self, clean: Floats, noise: Floats, index: int) -> Floats:
        """A clean sample with as much of the noise as call `index` expects, same shape."""
        ...

    def step(self, output: Floats, index: int, sample: Floats) -> Floats:
        """The sample after the denoiser's output of call `index`, same shape; a stochastic sampler draws that shape."""
        ...


SCHEDULERS: Final[dict[str, Callable[[Mapping[str, Any], int, int, Noise], Scheduler]]] = {
    "FlowMatchEulerDiscreteScheduler": FlowMatchEuler,
    "FlowMatchHeunDiscreteScheduler": FlowMatchHeun,
    "EulerDiscreteScheduler": Euler,
    "EulerAncestralDiscreteScheduler": EulerAncestral,
    "HeunDiscreteScheduler": Heun,
    "DPMSolverMultistepScheduler": DpmMultistep,
    "UniPCMultistepScheduler": UniPc,
    "DDIMScheduler": Ddim,
    "DDPMScheduler": Ddpm,
    "PNDMScheduler": Pndm,
    "SCMScheduler": Scm,
    "LCMScheduler": Lcm,
    "TCDScheduler": Tcd,
}

NOISY: Final[dict[str, Callable[..., Scheduler]]] = {"DDIMScheduler": Ddim, "TCDScheduler": Tcd}
"""Those that can add noise at each step, as much as eta says."""


def make_scheduler(
    config: Mapping[str, Any],
    steps: int,
    image_tokens: int,
    noise: Noise,
    *,
    even_sigmas: bool = False,
    levels: Floats | None = None,
    mu: float | None = None,
    only: str | None = None,
    strength: float = 1.0,
    eta: float = 0.0,
) -> Scheduler:
    """A scheduler ready for one call.

    Args:
        config: scheduler_config.json; `_class_name` decides which.
        steps: inference steps, at least 1.
        image_tokens: tokens of the denoiser's image sequence, for schedules that depend on it.
        noise: asked once per call by stochastic samplers, never by others.
        even_sigmas: whether the pipeline gives the noise levels before shifting: even steps from 1 to 1 / steps.
        levels: the noise levels, (steps,), where the pipeline gives all of them, so that none is shifted.
        mu: of a shift that depends on the image's size, where the pipeline gives it; only with even_sigmas.
        only: the one class that the pipeline draws by; None where there are others.
        strength: share of the noise levels that the steps are spaced over, those of least noise; of LCMScheduler.
        eta: how much noise is added at each step, of those in NOISY.

    Raises:
        CompatibilityError: a class or an option that is not supported; names it.
        ConfigError: more steps than the schedule has, or an eta that it does not take.
    """
    name = str(config.get("_class_name", ""))
    if name not in SCHEDULERS:
        raise CompatibilityError(
            f"scheduler {name or 'without _class_name'} is not supported; supported are {', '.join(SCHEDULERS)}: "
            "give the pipeline one of these and export again"
        )
    only = "FlowMatchEulerDiscreteScheduler" if even_sigmas or levels is not None else only
    if only not in (None, name):
        raise CompatibilityError(f"scheduler {name} is not supported with this pipeline; supported is {only}")
    if eta:
        if name not in NOISY:
            raise ConfigError(f"eta is for {' and '.join(NOISY)}, and this pipeline draws by {name}; leave it out")
        if not 0 < eta <= 1:
            raise ConfigError(f"eta should be from 0 to 1, not {eta:g}")
        return NOISY[name](config, steps, image_tokens, noise, eta=eta)
    if name == "LCMScheduler":
        return Lcm(config, steps, image_tokens, noise, strength=strength)
    if not even_sigmas and levels is None:
        return SCHEDULERS[name](config, steps, image_tokens, noise)
    return FlowMatchEuler(config, steps, image_tokens, noise, even_sigmas=even_sigmas, levels=levels, mu=mu)
