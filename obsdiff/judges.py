"""Who judges pictures: the shipped pipeline's obedience check, a CLIP model, LPIPS, a function of the user's.

Nothing is fetched or computed that was not asked for; what was asked for and is absent is an error before the work.
"""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from obsdiff.metrics import Picture
from obsdiff.perceptual import load_lpips
from obsdiff.recipe import PICTURES
from obsdiff.settings import Settings
from obsdiff_runtime.errors import ConfigError, MissingPackageError, first_line

Score = Callable[[Picture, str], bool]
Judge = Callable[[Picture, str], float]
Distance = Callable[[Picture, Picture], float]

OBEDIENCE: Final = "obedience"
CLIP_SCORE: Final = "clip_score"


@dataclass(frozen=True, kw_only=True)
class Judges:
    """What looks at the pictures, beside PSNR and SSIM.

    Attributes:
        obeys: whether a picture obeys its prompt.
        scores: how good a picture is for its prompt, more is better, by name.
        lpips: how different two pictures look.
        embed: features of a picture, (d,), for the distance to `reference`.
        reference: features of the reference pictures, (n, d).
    """

    obeys: Score | None = None
    scores: Mapping[str, Judge] = field(default_factory=dict)
    lpips: Distance | None = None
    embed: Callable[[Picture], Tensor] | None = None
    reference: Tensor | None = None

    @property
    def first(self) -> tuple[str, Judge] | None:
        """The one that decides between guidance scales: obedience, else the first score."""
        if self.obeys is not None:
            obeys = self.obeys
            return OBEDIENCE, lambda picture, prompt: float(obeys(picture, prompt))
        return next(iter(self.scores.items()), None)


class Clip:
    """A CLIP model, or one of the same class that was trained on people's choices, such as PickScore."""

    def __init__(self, source: str, device: torch.device) -> None:
        """`source`: a folder or Hub id with model, tokenizer and image processor.

        Raises:
            ConfigError: there is none.
        """
        try:
            self._model = CLIPModel.from_pretrained(source).to(device).eval()
            self._tokenizer = AutoTokenizer.from_pretrained(source)
            self._processor = AutoImageProcessor.from_pretrained(source, use_fast=False)
        except (OSError, ValueError) as error:
            said = first_line(error)
            raise ConfigError(f"--clip-model {source}: no CLIP model could be loaded from there: {said}") from None

    @torch.no_grad()
    def embed(self, picture: Picture) -> Tensor:
        """The projected features of a picture, (d,), of length 1."""
        pixels = self._processor(images=[Image.fromarray(picture)], return_tensors="pt")["pixel_values"]
        return self._unit(self._model.get_image_features(pixels.to(self._model.device)))

    @torch.no_grad()
    def score(self, picture: Picture, prompt: str) -> float:
        """100 max(cos, 0) of picture and prompt: Hessel et al. 2021, with the usual factor; long prompts are cut."""
        longest = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer([prompt], truncation=True, max_length=longest, return_tensors="pt")
        text = self._unit(self._model.get_text_features(**tokens.to(self._model.device)))
        return 100 * max(float(self.embed(picture) @ text), 0.0)

    @staticmethod
    def _unit(output: Any) -> Tensor:
        features = getattr(output, "pooler_output", output)[0].double().cpu()
        return features / features.norm()  # type: ignore[no-any-return]


def judges_of(
    settings: Settings, *, obeys: Score | None, device: torch.device, judges: Mapping[str, Judge] | None = None
) -> Judges:
    """Everybody that the settings call.

    Args:
        settings: clip_model, lpips, fid_reference and judge are read.
        obeys: the model's own check of obedience, where it has one.
        device: of the CLIP model.
        judges: further functions, by name.

    Raises:
        ConfigError: somebody cannot come; says what to give.
        MissingPackageError: a package is absent; says what to install.
    """
    clip = None if settings.clip_model is None else Clip(settings.clip_model, device)
    scores: dict[str, Judge] = {} if clip is None else {CLIP_SCORE: clip.score}
    scores |= dict(judges or {})
    for text in settings.judge or ():
        name, judge = _named(text)
        scores[name] = judge
    reference = None
    if settings.fid_reference is not None:
        if clip is None:
            raise ConfigError("--fid-reference needs the features of a CLIP model; name one with --clip-model")
        reference = torch.stack([clip.embed(picture) for picture in _pictures(Path(settings.fid_reference))])
    return Judges(
        obeys=obeys,
        scores=scores,
        lpips=None if settings.lpips is None else load_lpips(Path(settings.lpips)).distance,
        embed=clip.embed if clip is not None and reference is not None else None,
        reference=reference,
    )


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Between Gaussians with the means and covariances of two sets of features, (n, d) and (m, d); at least two each.

    Heusel et al. 2017, eq. 6; through torchmetrics.
    """
    fid = _torchmetrics_fid()(feature=_Given(a.shape[1]))
    fid.set_dtype(torch.float64)
    fid.update(a.double(), real=True)
    fid.update(b.double(), real=False)
    return float(fid.compute())


class _Given(nn.Module):
    """Stands where torchmetrics wants a network: what it is given are features already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def _torchmetrics_fid() -> Any:
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError:
        raise MissingPackageError("--fid-reference needs torchmetrics: pip install 'obsdiff[eval]'") from None
    return FrechetInceptionDistance


def _pictures(folder: Path) -> Sequence[Picture]:
    _torchmetrics_fid()
    files = sorted(path for path in folder.glob("*") if path.suffix.lower() in PICTURES)
    if len(files) < 2:
        raise ConfigError(f"--fid-reference {folder}: needs a folder of at least two pictures, found {len(files)}")
    return [np.asarray(Image.open(path).convert("RGB")) for path in files]


def _named(text: str) -> tuple[str, Judge]:
    """`name=module:function`, imported; modules of the working directory are found."""
    name, _, place = text.partition("=")
    module, _, function = place.partition(":")
    if not (name.isidentifier() and module and function):
        raise ConfigError(f"--judge {text}: expected name=module:function")
    sys.path.insert(0, str(Path.cwd()))
    try:
        judge = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"--judge {text}: {error}") from None
    finally:
        sys.path.pop(0)
    if not callable(judge):
        raise ConfigError(f"--judge {text}: {function} is no function")
    return name, judge
