"""Do a pipeline's pictures obey their captions?

    python benchmarks/obedience.py obsdiff/assets/shapes --prompts 200

Generates with diffusers, one seed a prompt, and scores with `obsdiff.shapes.obeys`. The prompts are unseen in
training; those of the row "held-out pairs" moreover name a (colour, shape) pair that training never showed.
"""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from obsdiff import shapes
from obsdiff.defaults import Defaults
from obsdiff.loading import load_pipeline
from obsdiff.metrics import wilson

ATTRIBUTES = ("count", "colour", "shape", "size", "position")


def generate(
    pipe: DiffusionPipeline, prompts: list[str], defaults: Defaults, guidance: float, seed: int, batch: int = 25
) -> list[shapes.Image]:
    """One picture a prompt; prompt i starts from the noise of seed + i."""
    pictures: list[shapes.Image] = []
    for start in range(0, len(prompts), batch):
        chunk = prompts[start : start + batch]
        output = pipe(
            chunk,
            height=defaults.height,
            width=defaults.width,
            num_inference_steps=defaults.num_inference_steps,
            guidance_scale=guidance,
            max_sequence_length=defaults.max_sequence_length,
            generator=[torch.Generator().manual_seed(seed + start + i) for i in range(len(chunk))],
        )
        pictures += [np.asarray(picture) for picture in output.images]
    return pictures


def row(name: str, verdicts: Iterable[shapes.Obedience]) -> str:
    found = [asdict(v) | {"all": v.all} for v in verdicts]
    if not found:
        return f"| {name} | 0 | | | " + "| " * len(ATTRIBUTES)
    obeyed = sum(v["all"] for v in found)
    low, high = (100 * end for end in wilson(obeyed, len(found)))
    shares = " | ".join(f"{100 * sum(v[a] for v in found) / len(found):.0f}" for a in ATTRIBUTES)
    return f"| {name} | {len(found)} | {100 * obeyed / len(found):.1f} | {low:.0f} to {high:.0f} | {shares} |"


def save_grid(pictures: list[shapes.Image], path: Path, columns: int = 10) -> None:
    rows = [np.concatenate(pictures[i : i + columns], axis=1) for i in range(0, len(pictures), columns)]
    whole = [r for r in rows if r.shape == rows[0].shape]
    grid = Image.fromarray(np.concatenate(whole, axis=0))
    grid.resize((grid.width * 2, grid.height * 2), Image.Resampling.NEAREST).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Score how well a shapes pipeline obeys its prompts.")
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--prompts", type=int, default=200, help="prompts in each of the two sets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="denoising steps instead of the pipeline's default")
    parser.add_argument("--guidance", type=float, nargs="+", help="guidance scales instead of 1 and the default")
    parser.add_argument("--grid", type=Path, help="also write the first hundred pictures of the last set here, as PNG")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    loaded = load_pipeline(given.pipeline, dtype=torch.float32)
    pipe, defaults = loaded.pipeline, loaded.defaults
    if given.steps:
        defaults = replace(defaults, num_inference_steps=given.steps)
    pipe.set_progress_bar_config(disable=True)
    unseen = shapes.evaluation_captions(given.prompts, given.seed)
    held_out = shapes.evaluation_captions(given.prompts, given.seed, held_out=True)
    print(f"{defaults.num_inference_steps} steps, seed {given.seed}, percent of prompts obeyed\n")
    print("| guidance, prompts | n | obeyed | 95 % | " + " | ".join(ATTRIBUTES) + " |")
    print("|---" * (4 + len(ATTRIBUTES)) + "|")
    two: Callable[[str], bool] = lambda prompt: len(shapes.parse(prompt).items) == 2  # noqa: E731
    for guidance in given.guidance or (1.0, defaults.guidance_scale):
        pictures = generate(pipe, unseen, defaults, guidance, given.seed)
        verdicts = [shapes.obeys(picture, prompt) for picture, prompt in zip(pictures, unseen, strict=True)]
        pairs = list(zip(unseen, verdicts, strict=True))
        print(row(f"{guidance:g}, all", verdicts))
        print(row(f"{guidance:g}, one object", [v for prompt, v in pairs if not two(prompt)]))
        print(row(f"{guidance:g}, two objects", [v for prompt, v in pairs if two(prompt)]))
        if given.grid:
            save_grid(pictures[:100], given.grid)
        pictures = generate(pipe, held_out, defaults, guidance, given.seed)
        verdicts = [shapes.obeys(picture, prompt) for picture, prompt in zip(pictures, held_out, strict=True)]
        print(row(f"{guidance:g}, held-out pairs", verdicts), flush=True)


if __name__ == "__main__":
    main()
