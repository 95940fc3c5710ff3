"""What eight bits cost beside 2:4, on the shipped pipeline: velocity error on held-out prompts and noise.

    python benchmarks/precision.py --eval-prompts 8

Every row replays the dense model's own calls and compares outputs, |v - v_dense|^2 / |v_dense|^2, mean over prompts and
steps. Ranges are found on the calibration prompts; scales are those of float16 graphs.
"""

import argparse
import copy
import dataclasses
import fnmatch
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

import obsdiff
from obsdiff import calibration, precision, ranges, streaming, trajectories
from obsdiff.bundling import EVALUATION_SEED
from obsdiff.families import Family
from obsdiff.groups import LinearSpec
from obsdiff.job import computable, load
from obsdiff.ranges import Rule, Streams
from obsdiff.recipe import Recipe, evaluation_prompts
from obsdiff.resolving import resolve
from obsdiff.settings import Settings
from obsdiff.trajectories import Call
from obsdiff_export.formats import FORMATS, Format
from obsdiff_export.quantizing import imitated

RULES: Final[tuple[Rule, ...]] = ("error", "percentile", "largest")
DTYPE: Final = torch.float16
GROUPS: Final = ("*attn*.to_out*", "*attn*.*_q*", "*ff*.net.0.proj", "*ff*.net.2", "*ff_context*", "*.0.*")
"""Left in float one at a time, with --sensitive."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """A model's calls and what the dense one answered."""

    family: Family
    calls: Sequence[Call]
    answers: Sequence[Tensor]

    def error(self, denoiser: nn.Module) -> float:
        """Mean over calls and rows of |v - v_dense|^2 / |v_dense|^2."""
        found = []
        for call, answer in zip(self.calls, self.answers, strict=True):
            lost = (velocity(denoiser, call) - answer).double().flatten(1).square().sum(1)
            found.append(lost / answer.double().flatten(1).square().sum(1))
        return float(torch.cat(found).mean())


def velocity(denoiser: nn.Module, call: Call) -> Tensor:
    args, kwargs = call.arguments
    with torch.no_grad():
        output: Any = denoiser(*args, **kwargs)
    answer: Tensor = output[0] if isinstance(output, tuple) else output.sample
    return answer


def bench_of(pipeline: Any, family: Family, recipe: Recipe, prompts: Sequence[str]) -> Bench:
    sampling = dataclasses.replace(recipe.sampling, seed=recipe.sampling.seed + EVALUATION_SEED)
    encoded = calibration.encode(pipeline, family, prompts, sampling)
    steps = sampling.num_inference_steps
    calls = trajectories.record(pipeline, family, encoded, sampling, computed_steps=steps, kept_steps=steps)
    denoiser: nn.Module = getattr(pipeline, family.denoiser)
    return Bench(family=family, calls=calls, answers=[velocity(denoiser, call) for call in calls])


def quantized_error(
    bench: Bench, denoiser: nn.Module, streams: Streams, format: Format, *, rule: Rule, keep: str = "", outputs: bool
) -> float:
    """The error of a copy of the denoiser with its linears in eight bits, all but those that match `keep`."""
    twin = copy.deepcopy(denoiser)
    chosen = [linear for linear in bench.family.linears(twin) if not fnmatch.fnmatchcase(linear.name, keep)]
    seen = streams if outputs else dataclasses.replace(streams, outputs={})
    found = precision.round_weights(twin, chosen, seen, format, dtype=DTYPE, rule=rule)
    with imitated(twin, found.quantization):
        return bench.error(twin)


def rows_of(
    bench: Bench, pipeline: Any, recipe: Recipe, sparsity: str, *, sensitive: bool
) -> list[dict[str, str | float]]:
    denoiser: nn.Module = getattr(pipeline, bench.family.denoiser)
    linears: tuple[LinearSpec, ...] = bench.family.linears(denoiser)
    rows = [row(sparsity, "float", "", "", bench.error(denoiser))]
    show(rows[-1])
    calls = streaming.record(pipeline, bench.family, dataclasses.replace(recipe, draws=1), lambda *_: None)
    for format in FORMATS.values():
        streams = ranges.observe(denoiser, linears, calls, format=format, dtype=DTYPE, outputs=True)
        variants: list[tuple[Rule, str, bool]] = [(rule, "", False) for rule in RULES]
        variants.append((precision.RULE, "", True))
        variants += [(precision.RULE, keep, False) for keep in GROUPS if sensitive]
        for rule, keep, outputs in variants:
            error = quantized_error(bench, denoiser, streams, format, rule=rule, keep=keep, outputs=outputs)
            rows.append(row(sparsity, format.name + (" and outputs" if outputs else ""), rule, keep, error))
            show(rows[-1])
    return rows


def row(sparsity: str, precision: str, rule: str, keep: str, error: float) -> dict[str, str | float]:
    return {"sparsity": sparsity, "precision": precision, "reach": rule, "in float": keep, "velocity_error": error}


def show(entry: dict[str, str | float]) -> None:
    cells = [str(value) if isinstance(value, str) else f"{value:.5f}" for value in entry.values()]
    sys.stdout.write("| " + " | ".join(cells) + " |\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eval-prompts", type=int, default=8)
    parser.add_argument("--sensitive", action="store_true", help="leave groups of linears in float, one at a time")
    parser.add_argument("--fast", action="store_true", help="prune with streamed --fast")
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    asked = parser.parse_args()
    settings = Settings(sparsity="2:4", eval_prompts=asked.eval_prompts, fast=asked.fast or None)
    loaded = load(settings)
    computable(loaded)
    recipe = resolve(settings, model="the shipped pipeline", family=loaded.family, defaults=loaded.defaults)
    held_out = evaluation_prompts(settings, loaded.defaults.prompts, loaded.defaults.labels)
    bench = bench_of(loaded.pipeline, loaded.family, recipe, held_out)
    sys.stdout.write("| sparsity | precision | reach | in float | velocity error |\n|---|---|---|---|---|\n")
    rows = rows_of(bench, loaded.pipeline, recipe, "dense", sensitive=asked.sensitive)
    pruned = obsdiff.prune(loaded.pipeline, sparsity="2:4", fast=asked.fast or None)
    rows += rows_of(bench, pruned.pipeline, recipe, "2:4", sensitive=False)
    if asked.json is not None:
        asked.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
