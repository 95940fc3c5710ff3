"""The resolved configuration of a run: no field is left open, and the same recipe gives the same bytes."""

import dataclasses
import difflib
import fnmatch
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from obsdiff.groups import Group, LinearSpec
from obsdiff.settings import Settings
from obsdiff.sparsity import Sparsity
from obsdiff_runtime.autoencoder import FRAME_SCALE, latent_frames
from obsdiff_runtime.errors import ConfigError, require_count
from obsdiff_runtime.labels import Labels

ASSETS = Path(__file__).parent / "assets"
BlockRange = tuple[int, int]

PICTURES: Final = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""Names of files that are looked at where a folder of pictures is given."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the pipeline is run, for calibration and for comparison alike.

    Attributes:
        num_frames: of a film, in pixels; None where pictures are drawn.
        frame_scale: how many of them a latent frame stands for, the first one apart; None where nobody knows.
        references: files of the pictures that drawings are told, in turn; see pictures.py.
        guidance_scale_2: of the denoiser behind the first, where they take turns; None where one takes all steps.
    """

    num_inference_steps: int
    guidance_scale: float
    height: int
    width: int
    max_sequence_length: int | None
    batch_size: int
    seed: int
    num_frames: int | None = None
    frame_scale: int | None = FRAME_SCALE
    references: tuple[str, ...] = ()
    guidance_scale_2: float | None = None

    def latents(self, vae_scale: int) -> tuple[int, ...]:
        """Sides of the latents: (height, width), of a film (frames, height, width)."""
        sides = (self.height // vae_scale, self.width // vae_scale)
        return sides if self.num_frames is None else (frames_of(self.num_frames, self.frame_scale), *sides)


def frames_of(num_frames: int, frame_scale: int | None) -> int:
    """Frames of a film's latents; an estimate where nobody knows how many frames one stands for."""
    return -(-num_frames // FRAME_SCALE) if frame_scale is None else latent_frames(num_frames, frame_scale)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides which weights come out of a pruning run.

    Attributes:
        blocks: inclusive ranges of block indices; empty means all.
        protect_first, protect_last: blocks that keep all their units in structured mode.
        spared: blocks at the start and at the end that keep all their units under a measured allocation too: those
            that the user protects, where the family's own protection is a rule for uniform shares.
        allocation: "uniform"; "measured": the same MACs go where it costs least; or "latency:FILE#SHA256": as much
            time by that table goes there.
        dense_share: share of the selected linears' MACs that a pattern leaves dense, where it would cost most.
        align: kept FFN widths are rounded to a multiple of this.
        damp: added to a gram's diagonal, as a fraction of its mean.
        block_columns: columns per lazy update of the OBS sweep.
        gram_budget_bytes: where given, packages are split by this instead of by count.
        draws: pictures that a streamed method draws of each prompt, each from noise of its own.
        trajectory_steps: sampler steps at which the denoiser computes for them.
        kept_steps: steps of each batch of prompts whose denoiser calls a streamed method looks at.
        repair: of a streamed method: of what the linears that write to a residual stream could make up of its error,
            the share that they are to.
        guided: of a streamed method: weight of the guided combination of two rows, beside the rows themselves.
        permute: of a streamed method: whether channels may change places where N:M then costs less.
        dense_targets: of a streamed method: whether layers are fitted to the dense model's outputs, or to what they
            make of their own inputs.
        metric: of a streamed method: whether errors of a layer's output count by what they cost the velocity.
        replay: of a streamed method: whether what parts of a block gave is held until the block is done, so that they
            need not run again.
        joint: of a streamed method: whether ADMM looks for the support, or the OBS sweep.
        fast: of a streamed method: whether ADMM looks less long.
        dtype: as asked for: "auto", "fp32", "fp16" or "bf16".
        precision: "int8" or "fp8" where the denoiser's linears are to compute in it, else "float".
        keep_float: globs of linears that stay in float.
        quantize_outputs: whether what they give is rounded too.
    """

    model: str
    revision: str | None
    variant: str | None
    family: str
    sparsity: Sparsity
    method: str
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    blocks: tuple[BlockRange, ...]
    protect_first: int
    protect_last: int
    spared: tuple[int, int]
    allocation: str
    dense_share: float
    align: int
    damp: float
    block_columns: int
    prompts: tuple[str, ...]
    prompts_source: str
    sampling: Sampling
    time_weights: str
    packages: int
    gram_budget_bytes: int | None
    draws: int
    trajectory_steps: int
    kept_steps: int
    repair: float
    guided: float
    permute: bool
    dense_targets: bool
    metric: bool
    replay: bool
    joint: bool
    fast: bool
    dtype: str
    precision: str
    keep_float: tuple[str, ...]
    quantize_outputs: bool

    def to_json(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        data["sparsity"] = str(self.sparsity)
        data["prompts"] = len(self.prompts)
        data["prompts_sha256"] = prompts_digest(self.prompts)
        files = self.sampling.references
        data["sampling"]["references"] = len(files)
        if files:
            data["references_sha256"] = files_digest(files)
        return data

    def digest(self) -> str:
        """A hash that changes with anything that can change the result."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


def prompts_digest(prompts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()


def files_digest(files: Sequence[str]) -> str:
    """A hash of what is in the files, in their order."""
    found = hashlib.sha256()
    for file in files:
        found.update(hashlib.sha256(Path(file).read_bytes()).digest())
    return found.hexdigest()


def list_references(folder: str | Path) -> tuple[str, ...]:
    """The pictures of a folder, by name.

    Raises:
        ConfigError: there is no such folder, or no picture in it.
    """
    place = Path(folder)
    if not place.is_dir():
        raise ConfigError(f"--references {folder}: there is no such folder")
    found = tuple(str(path) for path in sorted(place.iterdir()) if path.suffix.lower() in PICTURES)
    if not found:
        raise ConfigError(f"--references {folder}: holds no picture, such as a .png or .jpg")
    return found


def read_prompts(path: str | Path, flag: str = "--prompts-file") -> tuple[str, ...]:
    """The non-empty lines of a UTF-8 file.

    Raises:
        ConfigError: the file is missing, unreadable or holds no prompt.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{flag} {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{flag} {path}: is not UTF-8 text") from None
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ConfigError(f"{flag} {path}: holds no prompt; one prompt a line is expected")
    return prompts


def calibration_prompts(
    settings: Settings, kind: str | None, labels: Labels | None = None
) -> tuple[tuple[str, ...], str]:
    """The prompts to calibrate on, and where they come from.

    Args:
        settings: as given.
        kind: the pipeline's own set, "shapes" or None.
        labels: the classes that it draws, where a prompt is one.

    Raises:
        ConfigError: there are not so many, or the file that is named holds none, or what is no class.
    """
    wanted = settings.num_samples
    if wanted is not None:
        require_count("--num-samples", wanted)
    if settings.prompts_file is not None:
        prompts = read_prompts(settings.prompts_file)[:wanted]
        require_classes(prompts, labels)
        return prompts, str(settings.prompts_file)
    if kind == "shapes":
        from obsdiff import shapes

        return tuple(shapes.calibration_captions(wanted or 24, seed=0)), "shapes"
    prompts = read_prompts(ASSETS / "prompts.txt")
    if labels is not None:
        prompts = labels.spread(wanted or len(prompts), first=0)
    if wanted is not None and wanted > len(prompts):
        raise ConfigError(
            f"--num-samples {wanted}: the built-in set has {len(prompts)} prompts; give more with --prompts-file"
        )
    return prompts[:wanted], "built-in"


def evaluation_prompts(settings: Settings, kind: str | None, labels: Labels | None = None) -> tuple[str, ...]:
    """Prompts that calibration never sees, for comparing the pruned with the dense model; see calibration_prompts."""
    wanted = settings.eval_prompts
    if wanted is not None and wanted < 0:
        raise ConfigError(f"--eval-prompts {wanted}: must not be negative; 0 compares nothing")
    if wanted:
        require_count("--eval-prompts", wanted)
    if settings.eval_prompts_file is not None:
        prompts = read_prompts(settings.eval_prompts_file, "--eval-prompts-file")[:wanted]
        require_classes(prompts, labels)
        return prompts
    if kind == "shapes":
        from obsdiff import shapes

        return tuple(shapes.evaluation_captions(32 if wanted is None else wanted, seed=0))
    wanted = 16 if wanted is None else wanted
    if labels is not None:
        return labels.spread(wanted, first=1)
    return read_prompts(ASSETS / "evaluation_prompts.txt")[:wanted]


def require_classes(prompts: Iterable[str], labels: Labels | None) -> None:
    """Raises ConfigError for a prompt that is none of the classes, where the model draws classes."""
    if labels is not None:
        for prompt in prompts:
            labels.number(prompt)


def parse_blocks(texts: Iterable[str]) -> tuple[BlockRange, ...]:
    """Inclusive ranges from "3", "2-24", "5-" and "-3".

    Raises:
        ConfigError: a text is no range.
    """
    ranges = []
    for text in texts:
        match = re.fullmatch(r"(\d*)(-?)(\d*)", text.strip())
        if match is None or not (match[1] or match[3]):
            raise ConfigError(f"--blocks {text}: expected 3, 2-24, 5- or -3")
        first = int(match[1] or 0)
        last = int(match[3]) if match[3] else (1 << 30 if match[2] else first)
        if last < first:
            raise ConfigError(f"--blocks {text}: ends before it starts")
        ranges.append((first, last))
    return tuple(ranges)


def parse_bytes(text: str, flag: str) -> int:
    """A number of bytes from "8GiB", "500 MB" or "1e9"."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?(?:e\d{1,2})?)\s*([KMGT]?)(i?)B?", text.strip(), flags=re.IGNORECASE)
    if match is None:
        raise ConfigError(f"{flag} {text}: expected a size such as 8GiB")
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def select(
    recipe: Recipe, linears: Sequence[LinearSpec], groups: Sequence[Group]
) -> tuple[tuple[LinearSpec, ...], tuple[Group, ...]]:
    """The linears and groups that the recipe's patterns and block ranges leave in.

    A group stays where all its consumers stay and none of its producers is excluded.

    Raises:
        ConfigError: a pattern or a range that matches nothing, or nothing left; or heads are to go, and none can.
    """
    if recipe.sparsity.heads and groups and all(group.kind != "heads" for group in groups):
        raise ConfigError(
            f"--sparsity {recipe.sparsity}: no head of this denoiser can go without changing the others (its queries "
            "and keys are normalised over all heads at once); ffn:0.25 removes FFN neurons alone"
        )
    names = [linear.name for linear in linears]
    for flag, patterns in (("--include", recipe.include), ("--exclude", recipe.exclude)):
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.3) or names[:1]
                raise ConfigError(f"{flag} '{pattern}' matches no linear of {recipe.family}; one is called {near[0]}")
    last = max(linear.block for linear in linears)
    for low, high in recipe.blocks:
        if low > last:
            raise ConfigError(f"--blocks {low}-{high}: the denoiser has blocks 0 to {last}")

    def excluded(name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in recipe.exclude)

    def included(linear: LinearSpec) -> bool:
        inside = not recipe.blocks or any(low <= linear.block <= high for low, high in recipe.blocks)
        wanted = not recipe.include or any(fnmatch.fnmatchcase(linear.name, pattern) for pattern in recipe.include)
        return inside and wanted and not excluded(linear.name)

    chosen = tuple(linear for linear in linears if included(linear))
    if not chosen:
        raise ConfigError("--include, --exclude and --blocks together leave no linear to prune")
    kept = {linear.name for linear in chosen}
    first_block, last_block = recipe.protect_first, last - recipe.protect_last
    return chosen, tuple(
        group
        for group in groups
        if kept.issuperset(group.readers)
        and not any(excluded(producer.name) for producer in group.producers)
        and first_block <= group.block <= last_block
    )
