"""The flags of the commands, for whichever parser reads them: `obsdiff` has one, `obsdiff-runtime` another.

Imports nothing heavy. A default of None means that the bundle, or the machine, decides.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from obsdiff_runtime.server.options import DEFAULT_BOUNDS, DEFAULT_LIMITS


@dataclass(frozen=True, kw_only=True)
class Flag:
    """Attributes:
    name: as it is typed: "--max-rows".
    text: its help.
    kind: of its value; bool for a flag without one.
    short: "-o".
    many: whether it can be repeated.
    """

    name: str
    text: str
    kind: type
    default: Any = None
    short: str | None = None
    many: bool = False

    @property
    def key(self) -> str:
        """What its value is called: "max_rows"."""
        return self.name.removeprefix("--").replace("-", "_")


def hyphenated(arguments: Sequence[str]) -> list[str]:
    """Arguments with `--max-rows` for `--max_rows`, up to a lone `--`."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    found = []
    for argument in arguments[:end]:
        name, equals, value = argument.partition("=")
        found.append(name.replace("_", "-") + equals + value if name.startswith("--") else argument)
    return [*found, *arguments[end:]]


BACKEND: Final = Flag(
    name="--backend",
    kind=str,
    text="What runs it: onnxruntime, onnxruntime_cuda, openvino, openvino_bf16, or the engines of tensorrt or "
    "tensorrt_rtx.",
    default="onnxruntime",
)
THREADS: Final = Flag(name="--threads", kind=int, text="Threads of the host; default: all cores.")
TILING: Final = (
    Flag(
        name="--vae-tiling",
        kind=bool,
        text="Put larger pictures through the VAE in tiles of diffusers' size, which takes less memory.",
        default=False,
    ),
    Flag(name="--vae-tile", kind=int, text="The same in tiles of so many pixels a side."),
)

SAMPLING: Final = (
    Flag(name="--steps", kind=int, text="Denoising steps of an image; default: the bundle's."),
    Flag(name="--guidance-scale", kind=float, text="Classifier-free guidance; default: the bundle's."),
    Flag(name="--guidance-scale-2", kind=float, text="Of a second denoiser (Wan 2.2); default: as the first one's."),
    Flag(name="--height", kind=int, text="Height in pixels; default: the bundle's."),
    Flag(name="--width", kind=int, text="Width in pixels; default: the bundle's."),
    Flag(name="--num-frames", kind=int, text="Frames of a film: 1, 5, 9, ...; default: the bundle's."),
    Flag(name="--max-sequence-length", kind=int, text="Text tokens that T5 is given; default: the bundle's."),
    Flag(name="--seed", kind=int, text="Of the noise.", default=0),
)
"""What `obsdiff` reads from its settings, which files can hold too."""

GENERATE: Final = (
    Flag(
        name="--output",
        short="-o",
        kind=Path,
        text="Image file; of a film .webp, .gif, .png, .npy or a folder.",
        default=Path("image.png"),
    ),
    Flag(name="--fps", kind=float, text="Frames a second of a film; default: the model's."),
    Flag(name="--negative-prompt", kind=str, text="What not to draw.", default=""),
    Flag(
        name="--image",
        kind=Path,
        text="Image to change instead of drawing one from nothing, or that a film begins with.",
    ),
    Flag(name="--last-image", kind=Path, text="Image that a film of Wan 2.2 I2V ends with."),
    Flag(
        name="--mask",
        kind=Path,
        text="Which part of the image to draw anew: what is transparent in this file, or else white.",
    ),
    Flag(name="--strength", kind=float, text="How much of it to change, up to 1; default: 0.8, of a part of it 1."),
    Flag(name="--control", kind=Path, text="Picture that the bundle's ControlNet steers by, such as edges."),
    Flag(name="--control-scale", kind=float, text="How much that picture counts; default: 1."),
    Flag(
        name="--reference",
        kind=Path,
        text="Picture that FLUX.1 Kontext, FLUX.2 or Qwen-Image-Edit is told; repeat it where several are.",
        many=True,
    ),
    Flag(
        name="--own-size",
        kind=bool,
        text="Leave references at their own sizes, instead of those that the model was trained on.",
        default=False,
    ),
    Flag(name="--eta", kind=float, text="Noise that DDIM's or TCD's sampler adds at each step, up to 1.", default=0.0),
    Flag(
        name="--noise", kind=str, text="numpy, or torch: the noise that diffusers draws for the seed.", default="numpy"
    ),
    BACKEND,
    THREADS,
    *TILING,
)

ROUNDS: Final = (
    Flag(name="--against", kind=str, text="What each is compared with; default: the first."),
    Flag(name="--iterations", kind=int, text="Measured rounds; each candidate draws once in each.", default=10),
    Flag(name="--warmup", kind=int, text="Rounds before measuring.", default=2),
    Flag(name="--num-images", kind=int, text="Images drawn in one call.", default=1),
)

LIMITS: Final = (
    Flag(name="--max-rows", kind=int, text="Rows of one denoiser run; two an image.", default=DEFAULT_LIMITS.max_rows),
    Flag(name="--max-queue", kind=int, text="Requests that may wait.", default=DEFAULT_LIMITS.max_waiting),
)

BOUNDS: Final = (
    Flag(name="--max-steps", kind=int, text="Most steps of a request.", default=DEFAULT_BOUNDS.steps),
    Flag(name="--max-pixels", kind=int, text="Most pixels of an image; default: 4 times the model's own."),
    Flag(name="--max-prompt", kind=int, text="Most characters of a prompt.", default=DEFAULT_BOUNDS.prompt_characters),
)

SERVE: Final = (
    Flag(name="--host", kind=str, text="Address to listen at; 0.0.0.0 for all.", default="127.0.0.1"),
    Flag(name="--port", kind=int, text="0 takes a free one.", default=8000),
    BACKEND,
    THREADS,
    *TILING,
    *LIMITS,
    *BOUNDS,
    Flag(name="--deadline", kind=float, text="Seconds that a request may take.", default=DEFAULT_BOUNDS.deadline_s),
    Flag(name="--drain", kind=float, text="Seconds for accepted requests after SIGTERM.", default=120.0),
    Flag(name="--api-keys", kind=Path, text="File of API keys, one a line; one must come with each request."),
)

COMMON: Final = (
    Flag(name="--json", kind=bool, text="One JSON object on stdout and nothing else.", default=False),
    Flag(name="--verbose", short="-v", kind=bool, text="Log what happens on stderr.", default=False),
    Flag(name="--quiet", short="-q", kind=bool, text="No progress on stderr.", default=False),
)
