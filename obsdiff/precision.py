"""`--precision`: what the denoiser computes in, alone or together with a sparsity; and its linears in eight bits.

    precision   = part ("+" part)*
    part        = "fp32" | "fp16" | "bf16" | "int8" | "fp8" | a part of --sparsity

`fp8+2:4` is `--precision fp8 --sparsity 2:4`; `int8+bf16` computes in bfloat16 around the int8 linears. Quantised are
the linears that can be pruned: those inside the blocks. Embeddings, modulations and the last layer stay as they are.
"""

import dataclasses
import difflib
import fnmatch
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from diffusers import DiffusionPipeline
from torch import nn

from obsdiff import ranges, streaming, turns
from obsdiff.core import scales
from obsdiff.families import Family
from obsdiff.groups import LinearSpec
from obsdiff.ranges import Rule, Stream, Streams
from obsdiff.recipe import Recipe
from obsdiff.results import QuantizedLinear
from obsdiff.settings import Settings
from obsdiff_export import orders
from obsdiff_export.capabilities import NEEDS
from obsdiff_export.formats import FORMATS, Format, stored_scale
from obsdiff_export.orders import Order
from obsdiff_export.quantizing import LinearScales, Quantization
from obsdiff_runtime.errors import CalibrationError, ConfigError
from obsdiff_runtime.progress import Progress, silent

log = logging.getLogger(__name__)

DTYPES: Final = ("fp32", "fp16", "bf16")
RULE: Final[Rule] = "error"
"""How far activations reach, unless told: benchmarks/precision.py compares."""


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """The scales of a denoiser whose weights are rounded, and a record for each linear."""

    quantization: Quantization
    linears: tuple[QuantizedLinear, ...]


def note(found: Mapping[str, Quantized]) -> str:
    """One sentence for the report; `found` is from `quantize_turns`."""
    counted = " and ".join(
        f"{len(each.quantization.linears)} of the {len(each.linears)} linears inside the blocks"
        + (f" of {name}" if len(found) > 1 else "")
        for name, each in found.items()
    )
    format = next(iter(found.values())).quantization.format.name
    return (
        f"{counted} compute in {format}; what is compared here is the model as it ships, rounded, with the dense one "
        "in float."
    )


def separate(settings: Settings) -> Settings:
    """The settings with `precision` taken apart: "int8", "fp8" or none, and its parts under `dtype` and `sparsity`.

    Raises:
        ConfigError: a part that is none, or that contradicts another setting.
    """
    if settings.precision is None:
        return settings
    text = settings.precision
    parts = [part.strip() for part in text.split("+")]
    known = {"dtype": [part for part in parts if part in DTYPES], "format": [part for part in parts if part in FORMATS]}
    rest = [part for part in parts if part not in DTYPES and part not in FORMATS]
    for what, found in known.items():
        if len(found) > 1:
            raise ConfigError(f"--precision {text}: {' and '.join(found)} are both a {what}; choose one")
    for part in rest:
        _check_part(part, text)
    dtype = _agreed("--dtype", settings.dtype, next(iter(known["dtype"]), None), text)
    sparsity = _agreed("--sparsity", settings.sparsity, "+".join(rest) or None, text)
    precision = next(iter(known["format"]), None)
    return dataclasses.replace(settings, precision=precision, dtype=dtype, sparsity=sparsity)


def format_of(settings: Settings) -> Format | None:
    """The eight-bit format of settings that are `separate`."""
    if settings.precision is not None:
        return FORMATS[settings.precision]
    for flag, given in (("--keep-float", settings.keep_float), ("--quantize-outputs", settings.quantize_outputs)):
        if given:
            raise ConfigError(f"{flag} says what {' or '.join(FORMATS)} is used for; add --precision int8")
    return None


def fitting(order: Order | None, settings: Settings) -> Order | None:
    """The order for engines, for those of its targets that compute in what the settings ask for.

    Raises:
        CompatibilityError: a target that the user named does not, or none does.
    """
    formats = [name for name in (settings.precision, settings.dtype) if name in NEEDS]
    return None if order is None else orders.fitting(order, formats, settings)


def _check_part(part: str, text: str) -> None:
    names = (*DTYPES, *FORMATS)
    if part and (part[0].isdigit() or part[0] == "." or ":" in part):
        return  # the grammar of --sparsity will say
    near = difflib.get_close_matches(part, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(
        f"--precision {text}: '{part}' is no precision{hint}; there are {', '.join(names)}, and a sparsity can be "
        "joined: fp8+2:4"
    )


def _agreed(flag: str, given: str | None, part: str | None, text: str) -> str | None:
    if given is not None and part is not None and given != part:
        raise ConfigError(f"--precision {text} says {part}, and {flag} says {given}; leave one of them out")
    return given if part is None else part


def quantize_turns(
    pipeline: DiffusionPipeline,
    family: Family,
    recipe: Recipe,
    format: Format,
    *,
    dtype: torch.dtype,
    progress: Progress = silent,
) -> dict[str, Quantized]:
    """`quantize` of each denoiser, by name: the last first, so that ranges come from films drawn in float."""
    found = {
        each.denoiser: quantize(pipeline, each, recipe, format, dtype=dtype, progress=progress)
        for each in reversed(turns.families(pipeline, family))
    }
    return dict(reversed(found.items()))


def quantize(
    pipeline: DiffusionPipeline,
    family: Family,
    recipe: Recipe,
    format: Format,
    *,
    dtype: torch.dtype,
    rule: Rule = RULE,
    progress: Progress = silent,
) -> Quantized:
    """Finds the scales of the denoiser's linears on the recipe's prompts, and rounds their weights in place.

    Ranges come from the denoiser as it is, pruned, on trajectories of its own over the prompts and steps that pruning
    was calibrated with. Convolutions stay in float.

    Args:
        pipeline: with the pruned denoiser, in eval mode.
        family: of it.
        recipe: prompts, sampling, steps, and which linears stay in float.
        format: of weights and activations.
        dtype: of the graph.
        rule: how far the codes of activations reach.
        progress: told of denoiser calls.

    Raises:
        ConfigError: a pattern of --keep-float matches nothing, or nothing is left.
        CalibrationError: an activation or a weight is not finite, or no token reached a linear.
    """
    denoiser: nn.Module = getattr(pipeline, family.denoiser)
    every = family.linears(denoiser)
    named = quantizable(every, recipe.keep_float)
    chosen = tuple(linear for linear in named if isinstance(denoiser.get_submodule(linear.name), nn.Linear))
    if not chosen:
        raise ConfigError("--keep-float leaves convolutions alone to quantise, and those stay in float")
    _check_weights(denoiser, chosen)
    calls = streaming.record(pipeline, family, dataclasses.replace(recipe, draws=1), progress)
    streams = ranges.observe(
        denoiser, chosen, calls, format=format, dtype=dtype, outputs=recipe.quantize_outputs, progress=progress
    )
    found = round_weights(denoiser, chosen, streams, format, dtype=dtype, rule=rule)
    records = {record.name: record for record in found.linears}
    convolved = {linear.name for linear in named} - records.keys()
    return dataclasses.replace(
        found,
        linears=tuple(
            records.get(linear.name)
            or QuantizedLinear(
                name=linear.name,
                precision="float",
                reason="is a convolution" if linear.name in convolved else "matches --keep-float",
            )
            for linear in every
        ),
    )


def round_weights(
    denoiser: nn.Module,
    linears: Sequence[LinearSpec],
    streams: Streams,
    format: Format,
    *,
    dtype: torch.dtype,
    rule: Rule = RULE,
) -> Quantized:
    """Chooses the scales of the linears from what was observed, and rounds their weights in place."""
    rounding = _Rounding(denoiser, streams, format, dtype, rule)
    records = tuple(rounding.linear(linear) for linear in linears)
    return Quantized(quantization=Quantization(format=format, linears=rounding.scales), linears=records)


def quantizable(linears: Sequence[LinearSpec], patterns: Iterable[str]) -> tuple[LinearSpec, ...]:
    """The linears that no pattern of --keep-float leaves out.

    Raises:
        ConfigError: a pattern matches nothing, or nothing is left.
    """
    names = [linear.name for linear in linears]
    kept: set[str] = set()
    for pattern in patterns:
        found = fnmatch.filter(names, pattern)
        if not found:
            near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.3) or names[:1]
            raise ConfigError(f"--keep-float '{pattern}' matches no linear of the blocks; one is called {near[0]}")
        kept.update(found)
    chosen = tuple(linear for linear in linears if linear.name not in kept)
    if not chosen:
        raise ConfigError("--keep-float leaves no linear to quantise")
    return chosen


def _check_weights(denoiser: nn.Module, linears: Sequence[LinearSpec]) -> None:
    for linear in linears:
        weight: Any = denoiser.get_submodule(linear.name).weight
        if not bool(weight.isfinite().all()):
            raise CalibrationError(f"{linear.name}: a weight is not finite, and cannot be rounded to eight bits")


class _Rounding:
    """Chooses scales and rounds weights, linear by linear."""

    def __init__(self, denoiser: nn.Module, streams: Streams, format: Format, dtype: torch.dtype, rule: Rule) -> None:
        self._denoiser, self._streams = denoiser, streams
        self._format, self._dtype, self._rule = format, dtype, rule
        self.scales: dict[str, LinearScales] = {}

    def linear(self, linear: LinearSpec) -> QuantizedLinear:
        source = self._streams.inputs[linear.reads]
        if not source.largest:
            reason = "its input was zero on every calibration token: nothing is known of its range"
            log.warning("%s stays in float: %s", linear.name, reason)
            return QuantizedLinear(name=linear.name, precision="float", reason=reason)
        entering = source.scale(self._rule, self._format, self._dtype)
        weight, weight_error = self._weight(linear.name, source)
        self.scales[linear.name] = LinearScales(weight=weight, input=entering, output=self._output(linear.name))
        return QuantizedLinear(
            name=linear.name,
            precision=self._format.name,
            weight_error=weight_error,
            input_error=source.loss(entering),
        )

    def _weight(self, name: str, source: Stream) -> tuple[torch.Tensor, float]:
        """Rounds the weight in place; its scales (n,) or (), and the share of the output's energy that this loses."""
        parameter: Any = self._denoiser.get_submodule(name).weight
        values: torch.Tensor = parameter.data
        magnitudes = values.abs().float()
        largest = magnitudes.amax(1) if self._format.per_output else magnitudes.amax()
        tried = scales.candidates(largest, self._format.largest, lambda scale: stored_scale(scale, self._dtype))
        importance = (source.moment / source.tokens).to(values.device)
        chosen, error = scales.weight_scales(values, importance, tried, self._format.rounded)
        along = chosen[:, None] if self._format.per_output else chosen
        values.copy_(self._format.rounded(values, along))
        return chosen.cpu(), error

    def _output(self, name: str) -> torch.Tensor | None:
        stream = self._streams.outputs.get(name)
        if stream is None or not stream.largest:
            return None
        return stream.scale(self._rule, self._format, self._dtype)
