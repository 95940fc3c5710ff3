"""Asks a server for a picture, with the standard library alone.

    python client.py "a large red circle above a small blue square" --seed 7 -o circle.png
    python client.py "a large red circle above a small blue square" --triton sd35m --url http://127.0.0.1:8000

The first asks `obsdiff serve`, `obsdiff-runtime serve` or Ray Serve, by OpenAI's images API; the second asks Triton, by
the KServe protocol, for a model that `obsdiff triton` wrote. Each may be called with its own number of `--steps`.
"""

import argparse
import base64
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any


def post(url: str, asked: dict[str, Any], key: str | None = None) -> dict[str, Any]:
    """The JSON that comes back; ends the program with what the server says is wrong."""
    headers = {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
    request = urllib.request.Request(url, json.dumps(asked).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            found: dict[str, Any] = json.load(answer)
            return found
    except urllib.error.HTTPError as refusal:
        sys.exit(f"{url}: {refusal.code}: {refusal.read().decode()}")
    except urllib.error.URLError as error:
        sys.exit(f"{url}: {error.reason}; is the server there?")


def draw(url: str, prompt: str, seed: int, steps: int | None, key: str | None) -> bytes:
    """A PNG file, by OpenAI's API; fields that OpenAI has not are obsdiff's."""
    asked = {"prompt": prompt, "seed": seed} | ({} if steps is None else {"num_inference_steps": steps})
    answer = post(f"{url}/v1/images/generations", asked, key)
    return base64.b64decode(answer["data"][0]["b64_json"])


def draw_by_triton(url: str, model: str, prompt: str, seed: int, steps: int | None) -> bytes:
    """A PPM file, whose pixels Triton sends as JSON."""
    columns = [("prompt", "BYTES", prompt), ("seed", "INT64", seed)]
    columns += [] if steps is None else [("num_inference_steps", "INT32", steps)]
    inputs = [{"name": name, "datatype": kind, "shape": [1, 1], "data": [value]} for name, kind, value in columns]
    answer = post(f"{url}/v2/models/{model}/infer", {"inputs": inputs, "outputs": [{"name": "image"}]})
    (image,) = answer["outputs"]
    _, height, width, _ = image["shape"]
    return f"P6 {width} {height} 255\n".encode() + bytes(image["data"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Asks a server for a picture.")
    parser.add_argument("prompt")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="default: the model's")
    parser.add_argument("--key", help="API key, where the server wants one")
    parser.add_argument("--triton", metavar="MODEL", help="ask Triton for this model")
    parser.add_argument("-o", "--output", type=Path, help="default: picture.png, or picture.ppm from Triton")
    asked = parser.parse_args()
    if asked.triton is None:
        picture = draw(asked.url, asked.prompt, asked.seed, asked.steps, asked.key)
    else:
        picture = draw_by_triton(asked.url, asked.triton, asked.prompt, asked.seed, asked.steps)
    output = asked.output or Path("picture.png" if asked.triton is None else "picture.ppm")
    output.write_bytes(picture)
    print(output)


if __name__ == "__main__":
    main()
