"""From what the user gave, and what the pipeline says of itself, to a recipe with no field left open."""

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Final

from obsdiff import latencies
from obsdiff.core.timesteps import SCHEDULES
from obsdiff.defaults import Defaults
from obsdiff.families import Family, require_described
from obsdiff.methods.table import METHODS
from obsdiff.recipe import (
    Recipe,
    Sampling,
    calibration_prompts,
    frames_of,
    list_references,
    parse_blocks,
    parse_bytes,
    require_classes,
)
from obsdiff.settings import Settings
from obsdiff.sparsity import Sparsity, Unstructured, parse
from obsdiff_runtime.autoencoder import film_frames
from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.turns import require_taken

ALLOCATIONS: Final = ("measured", "uniform", f"{latencies.PREFIX}FILE")

METHOD_OPTIONS: Final = {
    "block": 128.0,
    "repair": 0.7,
    "guided": 0.3,
    "permute": 1.0,
    "dense_targets": 1.0,
    "metric": 1.0,
    "replay": 1.0,
    "joint": 1.0,
}
"""Knobs of the methods and their defaults; `benchmarks/quality.py --rows ablations` shows what each is worth."""

PICTURES: Final = 72
"""Drawn for a streamed calibration, where there are fewer prompts: content is what small sets lack most."""

MOST_DRAWS: Final = 3
"""Of a prompt, unless more are asked for."""

FEW_STEPS: Final = 8
"""The denoiser computes at so many at least, or at all there are: of few steps none can be spared."""

MOST_BATCHED: Final = 4
"""Prompts of a denoiser call."""

BATCH_PIXELS: Final = 1024 * 1024
"""Of a call's pictures, or latent frames: more rows of large ones take memory and save no time."""

MOST_TEXT_TOKENS: Final = 512
"""Of T5: diffusers' own limit."""

LARGEST_SEED: Final = 2**62
"""Leaves room for the prompts' indices below torch's limit."""


def resolve(
    settings: Settings,
    *,
    model: str,
    family: Family,
    defaults: Defaults,
    prompts: Sequence[str] | None = None,
) -> Recipe:
    """The recipe of a run.

    Args:
        settings: as given.
        model: name of the model, for the record.
        family: of its denoiser.
        defaults: of its pipeline.
        prompts: to calibrate on, instead of those the settings name.

    Raises:
        ConfigError: a value that makes no sense, or a choice that does not exist (names the nearest).
    """
    if settings.sparsity is None:
        raise ConfigError("--sparsity is missing; for example --sparsity 2:4")
    if prompts is None:
        texts, source = calibration_prompts(settings, defaults.prompts, defaults.labels)
    else:
        texts, source = tuple(prompts), "given"
        require_classes(texts, defaults.labels)
    if not texts:
        raise ConfigError("there is no prompt to calibrate on; give some with --prompts-file")
    options = _options(({"replay": 0.0} if settings.offload else {}) | (settings.method_options or {}))
    first, last = family.protect
    sparsity = parse(settings.sparsity)
    if sparsity.structured:
        require_described(family, f"--sparsity {sparsity}, which removes units,")
    method = _method(settings.method, sparsity)
    dense_share = _dense_share(settings.dense_share, sparsity)
    allocation = _allocation(settings.allocation, method, sparsity, dense_share)
    runs = sampling(settings, defaults)
    steps = runs.num_inference_steps
    fast = _fast(settings.fast, method)
    computes = -(-steps // 2) if allocation == "uniform" and not fast else -(-2 * steps // 5)
    computes = max(computes, min(steps, FEW_STEPS))
    trajectory_steps = _at_least("--trajectory-steps", 1, settings.trajectory_steps, computes, most=steps)
    return Recipe(
        model=model,
        revision=settings.revision,
        variant=settings.variant,
        family=family.name,
        sparsity=sparsity,
        method=method,
        include=tuple(settings.include or ()),
        exclude=tuple(settings.exclude or ()),
        blocks=parse_blocks(settings.blocks or ()),
        protect_first=_at_least("--protect-first", 0, settings.protect_first, first),
        protect_last=_at_least("--protect-last", 0, settings.protect_last, last),
        spared=(settings.protect_first or 0, settings.protect_last or 0),
        allocation=allocation,
        dense_share=dense_share,
        align=_at_least("--align", 1, settings.align, 64),
        damp=_positive("--damp", settings.damp, 0.01),
        block_columns=_at_least("method_options.block", 1, int(options["block"]), 128),
        prompts=texts,
        prompts_source=source,
        sampling=runs,
        time_weights=_choice(
            "--time-weights",
            METHODS[method].time_weights if settings.time_weights is None else settings.time_weights,
            SCHEDULES,
        ),
        packages=_at_least("--packages", 1, settings.packages, 4),
        draws=_at_least(
            "--draws", 1, settings.draws, 1 if fast else min(max(1, round(PICTURES / len(texts))), MOST_DRAWS)
        ),
        trajectory_steps=trajectory_steps,
        kept_steps=_at_least("--kept-steps", 1, settings.kept_steps, 2),
        fast=fast,
        repair=options["repair"],
        guided=options["guided"],
        permute=bool(options["permute"]),
        dense_targets=bool(options["dense_targets"]),
        metric=bool(options["metric"]),
        replay=bool(options["replay"]),
        joint=bool(options["joint"]),
        dtype=settings.dtype or "auto",
        precision=settings.precision or "float",
        keep_float=tuple(settings.keep_float or ()),
        quantize_outputs=bool(settings.quantize_outputs),
        gram_budget_bytes=None if settings.gram_budget is None else parse_bytes(settings.gram_budget, "--gram-budget"),
    )


def sampling(settings: Settings, defaults: Defaults) -> Sampling:
    """How the pipeline is to be run: what is given, else its own defaults."""
    guidance = defaults.guidance_scale if settings.guidance_scale is None else settings.guidance_scale
    if not 0 <= guidance < math.inf:
        raise ConfigError(f"--guidance-scale {guidance:g}: must be a finite number and not negative")
    if guidance > 1 and not defaults.takes_guidance:
        raise ConfigError(f"--guidance-scale {guidance:g}: this pipeline's steps are distilled; give 1 or leave it out")
    if settings.max_sequence_length is not None and defaults.max_sequence_length is None:
        raise ConfigError(f"--max-sequence-length {settings.max_sequence_length}: this pipeline has no such length")
    height = _at_least("--height", 1, settings.height, defaults.height)
    width = _at_least("--width", 1, settings.width, defaults.width)
    num_frames = film_frames(settings.num_frames, defaults.num_frames, defaults.frame_scale, "--num-frames")
    large = height * width * (1 if num_frames is None else frames_of(num_frames, defaults.frame_scale))
    return Sampling(
        num_inference_steps=_at_least("--steps", 1, settings.steps, defaults.num_inference_steps),
        guidance_scale=guidance,
        guidance_scale_2=_guidance_behind(settings.guidance_scale_2, guidance, defaults),
        height=height,
        width=width,
        max_sequence_length=_text_tokens(settings.max_sequence_length, defaults.max_sequence_length),
        batch_size=_at_least("--batch-size", 1, settings.batch_size, min(max(BATCH_PIXELS // large, 1), MOST_BATCHED)),
        seed=_at_least("--seed", 0, settings.seed, 0, most=LARGEST_SEED),
        num_frames=num_frames,
        frame_scale=defaults.frame_scale,
        references=_references(settings.references, defaults),
    )


def _guidance_behind(asked: float | None, first: float, defaults: Defaults) -> float | None:
    require_taken(asked, defaults.takes_turns, "here", name="--guidance-scale-2")
    if not defaults.takes_turns:
        return None
    scale = first if asked is None else asked
    if not 0 <= scale < math.inf:
        raise ConfigError(f"--guidance-scale-2 {scale:g}: must be a finite number and not negative")
    return scale


def _references(folder: str | None, defaults: Defaults) -> tuple[str, ...]:
    if folder is None:
        return ()
    if not defaults.takes_references:
        raise ConfigError(f"--references {folder}: this pipeline's denoiser is told no pictures; leave it out")
    return list_references(folder)


def _method(asked: str | None, sparsity: Sparsity) -> str:
    name = _choice("--method", "streamed" if asked is None else asked, METHODS)
    if sparsity.structured and not METHODS[name].removes_units:
        others = ", ".join(other for other, method in METHODS.items() if method.removes_units)
        raise ConfigError(
            f"--method {name}: removes single weights only, and --sparsity {sparsity} asks for heads or FFN neurons; "
            f"methods that remove them: {others}"
        )
    return name


def _options(given: Mapping[str, float]) -> dict[str, float]:
    for key in given:
        if key not in METHOD_OPTIONS:
            raise ConfigError(f"method_options.{key}: no such option; there are {', '.join(METHOD_OPTIONS)}")
    return {**METHOD_OPTIONS, **given}


def _fast(asked: bool | None, method: str) -> bool:
    if asked and not METHODS[method].streams:
        able = ", ".join(name for name, each in METHODS.items() if each.streams)
        raise ConfigError(f"--fast: --method {method} has no fast form; use {able}")
    return bool(asked)


def _dense_share(asked: float | None, sparsity: Sparsity) -> float:
    if not asked:
        return 0.0
    if not 0 <= asked < 1:
        raise ConfigError(f"--dense-share {asked:g}: must be in [0, 1)")
    if sparsity.pattern is None:
        raise ConfigError(
            f"--dense-share {asked:g}: --sparsity {sparsity} has no pattern, such as 2:4, to leave layers dense under"
        )
    return asked


def _allocation(asked: str | None, method: str, sparsity: Sparsity, dense_share: float) -> str:
    streams = METHODS[method].streams
    useful = sparsity.structured or dense_share > 0 or isinstance(sparsity.pattern, Unstructured)
    name = "measured" if streams and useful else "uniform"
    if asked is not None:
        name = latencies.named(asked) if latencies.is_latency(asked) else _choice("--allocation", asked, ALLOCATIONS)
    if name != "uniform" and not streams:
        able = ", ".join(other for other, each in METHODS.items() if each.streams)
        raise ConfigError(f"--allocation {asked}: --method {method} takes the same share everywhere; use {able}")
    if latencies.is_latency(name) and not sparsity.structured:
        raise ConfigError(
            f"--allocation {asked}: --sparsity {sparsity} removes no units, whose time a table could tell; remove some "
            "(structured:0.25), or leave --allocation out"
        )
    if name == "measured" and not useful:
        raise ConfigError(
            f"--allocation measured: --sparsity {sparsity} leaves nothing to choose; remove units (structured:0.25), "
            "or leave some layers dense with --dense-share 0.25"
        )
    if name == "uniform" and dense_share:
        raise ConfigError(
            f"--dense-share {dense_share:g}: which layers to leave dense is measured; use --method streamed without "
            "--allocation uniform"
        )
    return name


def _text_tokens(asked: int | None, default: int | None) -> int | None:
    return default if asked is None else _at_least("--max-sequence-length", 1, asked, 1, most=MOST_TEXT_TOKENS)


def _choice(flag: str, value: str, table: object) -> str:
    names = list(table)  # type: ignore[call-overload]
    if value not in names:
        near = difflib.get_close_matches(value, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{flag} {value}: unknown; there are {', '.join(names)}{hint}")
    return value


def _at_least(flag: str, least: int, value: int | None, default: int, *, most: int | None = None) -> int:
    if value is None:
        return default
    if value < least:
        raise ConfigError(f"{flag} {value}: must be at least {least}")
    if most is not None and value > most:
        raise ConfigError(f"{flag} {value}: must be at most {most}")
    return value


def _positive(flag: str, value: float | None, default: float) -> float:
    if value is None:
        return default
    if not 0 < value < float("inf"):
        raise ConfigError(f"{flag} {value:g}: must be positive")
    return value
