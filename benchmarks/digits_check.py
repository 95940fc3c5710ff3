"""Does a pipeline of `digits.py` write what its captions say?

    python benchmarks/digits_check.py digits --prompts 100 --grid digits.png

Takes any folder that obsdiff loads, pruned ones too. The captions were never trained on and are not those of
`evaluation_prompts.txt`; the reader knows scikit-learn's digits as the pen draws them.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from digits import COLOURS, HEIGHT, NUMBERS, PLACES, Pen, captions, parse
from numpy.typing import NDArray
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from obsdiff.loading import load_pipeline
from obsdiff.metrics import wilson


class Reader:
    """Reads pictures back: digits by their nearest neighbours in ink, colours by direction, shades by strength."""

    def __init__(self, pen: Pen) -> None:
        rng, digits = np.random.default_rng(0), np.repeat(np.arange(10), 600)
        squares = [pen.draw(f"a bright white {NUMBERS[digit]} on the left", rng)[0, :, :HEIGHT] for digit in digits]
        self.neighbours = KNeighborsClassifier(3).fit(self.features(np.stack(squares)), digits)

    @staticmethod
    def features(ink: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n, h, h) to (n, h / 2 * h / 2), free of shade."""
        pooled = ink.reshape(-1, HEIGHT // 2, 2, HEIGHT // 2, 2).mean((2, 4)).reshape(len(ink), -1)
        return np.asarray(pooled / (np.linalg.norm(pooled, axis=1, keepdims=True) + 1e-6))

    def obeys(self, picture: NDArray[np.uint8], caption: str) -> dict[str, bool]:
        """Whether a picture (h, w, 3) has the digits, colours and shades of its caption, and nothing else."""
        light = picture.astype(np.float32) / 255
        outside = light.max(-1)  # (h, w)
        held = {"digit": True, "colour": True, "shade": True}
        for item in parse(caption):
            here = slice(PLACES[item.place], PLACES[item.place] + HEIGHT)
            ink = light[:, here].max(-1)
            outside[:, here] = 0
            mean = light[:, here][ink >= 0.7 * ink.max()].mean(0)  # (3,)
            colour = max(COLOURS, key=lambda c: float(mean @ np.array(COLOURS[c]) / np.linalg.norm(COLOURS[c])))
            shade = "bright" if mean.max() > 0.68 * max(COLOURS[colour]) / 255 else "dim"
            held["digit"] &= bool(self.neighbours.predict(self.features(ink[None]))[0] == item.digit)
            held["colour"] &= item.colour in (None, colour)
            held["shade"] &= item.shade in (None, shade)
        return held | {"nothing else": bool(outside.mean() < 0.02)}


def generate(folder: Path, lines: list[str], guidance: float | None) -> list[NDArray[np.uint8]]:
    """One picture a caption; caption i starts from the noise of seed i."""
    loaded = load_pipeline(folder, dtype=torch.float32)
    loaded.pipeline.set_progress_bar_config(disable=True)
    pictures = []
    for start in range(0, len(lines), 20):
        some = lines[start : start + 20]
        images = loaded.pipeline(
            some,
            height=loaded.defaults.height,
            width=loaded.defaults.width,
            num_inference_steps=loaded.defaults.num_inference_steps,
            guidance_scale=loaded.defaults.guidance_scale if guidance is None else guidance,
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(some))],
        ).images
        pictures += [np.asarray(image) for image in images]
    return pictures


def row(name: str, held: list[dict[str, bool]]) -> str:
    """Percent of the pictures that hold each, and all of them with its interval of 95 %."""
    obeyed = sum(all(h.values()) for h in held)
    shares = [sum(h[key] for h in held) / len(held) for key in held[0]]
    low, high = wilson(obeyed, len(held))
    cells = [f"{100 * share:.0f}" for share in (*shares, obeyed / len(held))]
    return "| " + " | ".join((name, *cells, f"{100 * low:.0f} to {100 * high:.0f}")) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Read the digits that a pipeline writes.")
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--guidance", type=float, help="default: the pipeline's")
    parser.add_argument("--grid", type=Path, help="also write the pictures here, ten a row, as PNG")
    given = parser.parse_args()
    pen, rng = Pen(), np.random.default_rng(1)
    lines, reader = captions(given.prompts, 1, "evaluation"), Reader(pen)
    written = [np.rint(255 * pen.draw(line, rng).transpose(1, 2, 0)).astype(np.uint8) for line in lines]
    generated = generate(given.pipeline, lines, given.guidance)
    print(f"percent of {given.prompts} prompts\n\n| pictures | digit | colour | shade | nothing else | all | 95 % |")
    print("|---" * 7 + "|")
    for name, pictures in (("generated", generated), ("drawn", written)):
        print(row(name, [reader.obeys(picture, line) for picture, line in zip(pictures, lines, strict=True)]))
    if given.grid is not None:
        rows = [np.concatenate(generated[i : i + 10], axis=1) for i in range(0, given.prompts - 9, 10)]
        grid = Image.fromarray(np.concatenate(rows))
        grid.resize((2 * grid.width, 2 * grid.height)).save(given.grid)


if __name__ == "__main__":
    main()
