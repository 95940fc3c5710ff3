"""What the schedulers share: options, betas, spacing of timesteps, spacing of sigmas."""

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from obsdiff_runtime.errors import CompatibilityError, ConfigError

Floats = NDArray[np.floating[Any]]
KARRAS_RHO: Final = 7.0
BETA: Final = 0.6
_TERMS: Final = 53  # halves of a double


def options(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`defaults` overridden by config; what a scheduler does not know is another scheduler's and is left out."""
    return {name: config.get(name, default) for name, default in defaults.items()}


def refuse(config: Mapping[str, Any], *names: str) -> None:
    """CompatibilityError if one of these options is switched on."""
    for name in names:
        if config.get(name):
            raise CompatibilityError(f"{config.get('_class_name')}: {name}={config[name]!r} is not supported")


def choose(config: Mapping[str, Any], name: str, value: object, *known: object) -> None:
    """CompatibilityError if an option has a value that is not known."""
    if value not in known:
        supported = ", ".join(map(str, known))
        raise CompatibilityError(
            f"{config.get('_class_name')}: {name}={value!r} is not supported; supported are {supported}"
        )


def alphas_cumprod(config: Mapping[str, Any], *, rescale: bool = False) -> Floats:
    """(train timesteps,), the product of 1 - beta up to each timestep."""
    betas = _betas(config)
    if rescale:
        betas = _rescale_zero_terminal_snr(betas)
    return np.asarray(np.cumprod(1 - betas, dtype=np.float64), dtype=np.float32)


def noised(clean: Floats, noise: Floats, alpha: float) -> Floats:
    """Ho et al. 2020 (arXiv 2006.11239), eq. 4, at a cumulative product of alphas."""
    return math.sqrt(alpha) * clean + math.sqrt(1 - alpha) * noise


def parted(output: Floats, sample: Floats, alpha: float, prediction_type: str) -> tuple[Floats, Floats]:
    """The clean sample and the noise that the denoiser takes the sample for, at a cumulative product of alphas."""
    root, noise_root = math.sqrt(alpha), math.sqrt(1 - alpha)
    if prediction_type == "epsilon":
        return (sample - noise_root * output) / root, output
    if prediction_type == "v_prediction":
        return root * sample - noise_root * output, root * output + noise_root * sample
    return output, (sample - root * output) / noise_root


def _betas(config: Mapping[str, Any]) -> Floats:
    given = options(
        config,
        {
            "num_train_timesteps": 1000,
            "beta_start": 0.0001,
            "beta_end": 0.02,
            "beta_schedule": "linear",
            "trained_betas": None,
        },
    )
    if given["trained_betas"] is not None:
        return np.asarray(given["trained_betas"], dtype=np.float32)
    count, start, end = given["num_train_timesteps"], given["beta_start"], given["beta_end"]
    kind = given["beta_schedule"]
    choose(config, "beta_schedule", kind, "linear", "scaled_linear", "squaredcos_cap_v2")
    if kind == "linear":
        return _linspace(start, end, count)
    if kind == "scaled_linear":
        return _linspace(start**0.5, end**0.5, count) ** 2
    # Nichol & Dhariwal 2021, eq. 17
    bars = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.asarray(np.minimum(1 - bars[1:] / bars[:-1], 0.999), dtype=np.float32)


def _linspace(start: float, end: float, count: int) -> NDArray[np.float32]:
    """As torch has it, to the bit: a float32 step, taken from the nearer end and rounded once."""
    low, high = np.float32(start), np.float32(end)
    step = float((high - low) / np.float32(count - 1))
    index = np.arange(count)
    values = np.where(index < count // 2, float(low) + step * index, float(high) - step * index[::-1])
    return values.astype(np.float32)


def _rescale_zero_terminal_snr(betas: Floats) -> Floats:
    """Lin et al. 2023 (arXiv 2305.08891), algorithm 1."""
    root = np.sqrt(np.cumprod(1 - betas, dtype=np.float64).astype(np.float32))
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    bars = root**2
    alphas = np.concatenate([bars[:1], bars[1:] / bars[:-1]])
    return np.asarray(1 - alphas, dtype=np.float32)


def spaced_timesteps(config: Mapping[str, Any], steps: int, spacing: str) -> Floats:
    """(steps,), descending; the spacings of arXiv 2305.08891, table 2, not yet rounded where "linspace"."""
    choose(config, "timestep_spacing", spacing, "linspace", "leading", "trailing")
    train = int(config.get("num_train_timesteps", 1000))
    if steps > train:
        raise ConfigError(f"{steps} steps are more than the {train} that the scheduler was trained with")
    if spacing == "linspace":
        return np.linspace(0, train - 1, steps)[::-1]
    if spacing == "leading":
        return (np.arange(steps) * (train // steps))[::-1] + float(config.get("steps_offset", 0))
    return np.round(np.arange(train, 0, -train / steps)) - 1


def respaced(config: Mapping[str, Any], sigmas: Floats, steps: int) -> Floats | None:
    """(steps,), between the ends of `sigmas`, or sigma_max and sigma_min, by use_karras_sigmas and its like, if set."""
    low, high = (
        float(sigmas[place]) if config.get(end) is None else float(config[end])
        for end, place in (("sigma_min", -1), ("sigma_max", 0))
    )
    for option, spread in (
        ("use_karras_sigmas", _karras),
        ("use_exponential_sigmas", _exponential),
        ("use_beta_sigmas", _beta),
    ):
        if config.get(option):
            return spread(high, low, steps)
    return None


def _karras(high: float, low: float, steps: int) -> Floats:
    """Karras et al. 2022 (arXiv 2206.00364), eq. 5."""
    roots = np.linspace(high ** (1 / KARRAS_RHO), low ** (1 / KARRAS_RHO), steps)
    return np.asarray(roots**KARRAS_RHO)


def _exponential(high: float, low: float, steps: int) -> Floats:
    """Evenly spaced in the logarithm."""
    return np.exp(np.linspace(math.log(high), math.log(low), steps))


def _beta(high: float, low: float, steps: int) -> Floats:
    """Lee et al. 2024 (arXiv 2407.12173): even quantiles of a symmetric beta distribution, so denser at both ends."""
    shares = np.linspace(1, 0, steps)
    below = _beta_quantile(np.minimum(shares, 1 - shares))
    return low + (high - low) * np.where(shares > 0.5, 1 - below, below)


def _beta_quantile(shares: Floats) -> Floats:
    """Where the beta distribution of BETA and BETA has these shares of itself below, which are at most a half.

    By bisection of the incomplete beta function as a power series (Abramowitz and Stegun, 26.5.4 and 15.1.1).
    """
    powers = np.arange(_TERMS)
    weights = np.cumprod(np.append(1, (powers[1:] - BETA) / powers[1:])) / (BETA + powers)
    whole = math.gamma(BETA) ** 2 / math.gamma(2 * BETA)
    low, high = np.zeros_like(shares), np.full_like(shares, 0.5)
    for _ in range(_TERMS):
        middle = (low + high) / 2
        less = middle**BETA * (middle[:, None] ** powers @ weights) / whole < shares
        low, high = np.where(less, middle, low), np.where(less, high, middle)
    return np.asarray(low)
