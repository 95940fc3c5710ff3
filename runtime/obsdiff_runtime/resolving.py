"""What a call of a bundle may ask for, and what it resolves to."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Final

import numpy as np

from obsdiff_runtime.autoencoder import Autoencoder, Pixels, film_frames
from obsdiff_runtime.bundle import ENCODER, IMAGE_ENCODER
from obsdiff_runtime.choices import Choices
from obsdiff_runtime.controls import MOST_SCALE, Control
from obsdiff_runtime.errors import ConfigError, require_count
from obsdiff_runtime.kinds import IS_DISTILLED, Kind, Settings
from obsdiff_runtime.kinds.scales import told_scale
from obsdiff_runtime.labels import read_labels
from obsdiff_runtime.networks import Networks
from obsdiff_runtime.references import Reference, References, Sides
from obsdiff_runtime.turns import require_taken

MAX_SEQUENCE_LENGTH: Final = 256  # diffusers' default for T5
STRENGTH: Final = 0.8  # diffusers' default for Stable Diffusion
MASKED_STRENGTH: Final = 1.0  # likewise, where a part of the image stays


class Resolver:
    """What calls of a bundle may ask for, and its defaults where they ask for nothing."""

    def __init__(self, networks: Networks, kind: Kind, vae: Autoencoder) -> None:
        self._networks, self._kind, self._vae = networks, kind, vae
        self._bundle = networks.bundle
        self._config: dict[str, Any] = self._bundle.config(kind.denoiser)
        self._distilled = bool(self._bundle.index().get(IS_DISTILLED))

    @property
    def opens(self) -> bool:
        """Whether films begin with a picture, or can."""
        return self._kind.opens or self._kind.masks

    @property
    def ends(self) -> bool:
        """Whether films can end with a picture, too: not where an image encoder sees the one that they begin with."""
        return self.must_end or (self._kind.opens and not self._networks.has(IMAGE_ENCODER))

    @property
    def must_end(self) -> bool:
        """Whether films have to."""
        return self._kind.ends(self._config)

    @property
    def changes(self) -> bool:
        """Whether a picture beside the prompt is one to change: the denoiser is told none, and no film is drawn."""
        told = self.opens or self._kind.references is not None
        return not told and self._bundle.manifest.defaults.num_frames is None and self._networks.has(ENCODER)

    @property
    def size_step(self) -> int:
        """Height and width are multiples of this."""
        return self._vae.scale * self._kind.patch(self._config)

    @cached_property
    def choices(self) -> Choices:
        """What calls can choose."""
        kind, manifest = self._kind, self._bundle.manifest
        guided = (
            not self._distilled
            if kind.negatives
            else bool(told_scale(self._bundle.component(kind.denoiser).inputs, 1.0))
        )
        fixed = [self._fixed_size(axis) for axis in (-2, -1)]
        pictures: tuple[int, int | None] = (0, 0)
        if self._networks.has(ENCODER):
            if self.opens:
                pictures = (kind.opens + self.must_end, 2 if self.ends else 1)
            elif kind.references is not None:
                pictures = (kind.references.least, kind.references.most)
            elif self.changes:
                pictures = (0, 1)
        return Choices(
            negative_prompt=guided and kind.negatives and not kind.draws_classes,
            guidance_scale=guided,
            guidance_scale_2=guided and bool(manifest.turns),
            size_step=self.size_step if None in fixed else None,
            frame_step=None if manifest.defaults.num_frames is None else self._vae.frame_scale,
            pictures=pictures,
            changes=self.changes,
            control=kind.controls,
            classes=read_labels(self._bundle.index(), self._config).titles() if kind.draws_classes else None,
        )

    def resolve(
        self,
        steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        max_sequence_length: int | None = None,
        *,
        guidance_scale_2: float | None = None,
        num_frames: int | None = None,
        image: Pixels | None = None,
        last_image: Pixels | None = None,
        mask: bool = False,
        control: Control | None = None,
        strength: float | None = None,
        eta: float = 0.0,
        references: Sequence[Reference] = (),
    ) -> Settings:
        """What a call will use; the bundle's defaults where it is told nothing. `mask` is whether there is one.

        Raises:
            ConfigError: a value that the pipeline cannot take; says what it can.
        """
        defaults = self._bundle.manifest.defaults
        if control is not None:
            height, width = self._steered_size(control, height, width)
        if image is not None:
            height, width = _size_of(image, height, width)
        length = defaults.max_sequence_length if max_sequence_length is None else max_sequence_length
        scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
        settings = Settings(
            height=defaults.height if height is None else height,
            width=defaults.width if width is None else width,
            num_frames=film_frames(num_frames, defaults.num_frames, self._vae.frame_scale),
            num_inference_steps=defaults.num_inference_steps if steps is None else steps,
            guidance_scale=scale,
            guidance_scale_2=self._later_scale(guidance_scale, guidance_scale_2),
            guided=self._kind.negatives and self._kind.usual_scale(scale) > 1,
            max_sequence_length=MAX_SEQUENCE_LENGTH if length is None else length,
            references=self._sides(references),
            eta=eta,
        )
        require_count("num_inference_steps", settings.num_inference_steps)
        require_count("max_sequence_length", settings.max_sequence_length)
        for name in ("guidance_scale", "guidance_scale_2"):
            if not np.isfinite(getattr(settings, name) or 0):
                raise ConfigError(f"{name} should be a finite number, not {getattr(settings, name)}")
        if scale > 1 and self._distilled:
            raise ConfigError(f"guidance_scale should be at most 1, not {scale:g}: this pipeline's steps are distilled")
        for name, axis, pixels in (("height", -2, settings.height), ("width", -1, settings.width)):
            self._check_size(name, axis, pixels)
        self._vae.check_tiles(settings.height, settings.width, settings.num_frames)
        if last_image is not None:
            self._check_last(image, last_image, settings)
        told = "strength says how much" if strength is not None else "a mask says which part" if mask else None
        if image is None:
            if told is not None:
                raise ConfigError(f"{told} of an image is changed, and there is no image")
            return settings
        if references:
            raise ConfigError("an image is changed, or a reference is told to the denoiser; give one of them")
        self._vae.check_encodes()
        if self.opens:
            if told is not None:
                raise ConfigError(f"{told} of an image is changed, and here a film begins with it")
            return settings
        usual = MASKED_STRENGTH if mask else STRENGTH
        return self._changing(settings, usual if strength is None else strength)

    def _steered_size(self, control: Control, height: int | None, width: int | None) -> tuple[int, int]:
        if not self._kind.controls:
            raise ConfigError(
                "nothing steers this bundle's denoiser; a ControlNet does in bundles that were exported with one"
            )
        if not 0 <= control.scale <= MOST_SCALE:
            raise ConfigError(f"control_scale should be from 0 to {MOST_SCALE}, not {control.scale:g}")
        return _size_of(control.pixels, height, width, "control")

    def check_pictures(self) -> None:
        """Raises ConfigError if it can do nothing with pictures, CompatibilityError if there is no VAE encoder."""
        self._vae.check_encodes()
        if not self.opens and not self.changes:
            self.referring()

    def referring(self) -> References:
        """How the denoiser is told pictures; ConfigError where it is told none."""
        if self.opens:
            raise ConfigError("films of this pipeline begin with a picture, and no other is told; give it as the image")
        if self._kind.references is None:
            raise ConfigError(
                "this bundle's denoiser is told no pictures; those of FLUX.1 Kontext, FLUX.2 and Qwen-Image-Edit are, "
                "in bundles of this version or a later one"
            )
        return self._kind.references

    def _sides(self, references: Sequence[Reference]) -> tuple[Sides, ...]:
        """Tokens of each of these pictures."""
        if not references:
            return ()
        most, step = self.referring().most, self.size_step
        if most is not None and len(references) > most:
            raise ConfigError(f"{len(references)} reference pictures; this pipeline takes {most}")
        self._vae.check_encodes()
        sizes = [_size_of(picture.pixels, None, None, "reference") for picture in references]
        for height, width in sizes:
            if height % step or width % step or 0 in (height, width):
                raise ConfigError(f"a reference of {width} x {height} pixels; its sides should be multiples of {step}")
        return tuple((height // step, width // step) for height, width in sizes)

    def _check_last(self, image: Pixels | None, last_image: Pixels, settings: Settings) -> None:
        if not self.ends:
            raise ConfigError("no film of this pipeline ends with a picture; those of Wan 2.2 I2V can")
        if image is None or settings.num_frames == 1:
            raise ConfigError("a film that ends with a picture begins with another; give it both, and frames between")
        _size_of(last_image, settings.height, settings.width, "last_image")

    def _later_scale(self, first: float | None, given: float | None) -> float | None:
        """The guidance scale of the denoisers behind the first, None where it is as the first one's."""
        require_taken(given, bool(self._bundle.manifest.turns), "of this pipeline")
        return self._bundle.manifest.defaults.guidance_scale_2 if first is None and given is None else given

    def _changing(self, settings: Settings, strength: float) -> Settings:
        """Those of a call that changes an image."""
        if not 0 < strength <= 1:
            raise ConfigError(f"strength should be above 0 and at most 1, not {strength:g}")
        if self._kind.skipped is None:
            return replace(settings, strength=strength)
        steps = settings.num_inference_steps
        skipped = self._kind.skipped(steps, strength)
        if skipped >= steps:
            raise ConfigError(
                f"strength {strength:g} of {steps} steps is none; give {1 / steps:.2g} or more, or more steps"
            )
        return replace(settings, skipped_steps=skipped)

    def _check_size(self, name: str, axis: int, pixels: int) -> None:
        step = self.size_step
        largest = self._kind.largest(self._config)
        most = None if largest is None else largest * self._vae.scale
        fixed = self._fixed_size(axis)
        if fixed is not None and pixels != fixed * self._vae.scale:
            raise ConfigError(f"{name} is fixed to {fixed * self._vae.scale} in this bundle's graph, not {pixels}")
        if pixels < 1 or pixels % step:
            below = max(pixels // step * step, step)
            raise ConfigError(f"{name} should be a multiple of {step}, not {pixels}; near are {below}, {below + step}")
        if most is not None and pixels > most:
            raise ConfigError(f"{name} should be at most {most} for this model, not {pixels}")

    def _fixed_size(self, axis: int) -> int | None:
        """The denoiser's latent size along an axis where its graph allows one only."""
        for entry in self._bundle.component(self._kind.denoiser).inputs:
            if entry.name == self._kind.noisy and isinstance(size := entry.shape[axis], int):
                return size
        return None


def each_prompt(
    prompt: str | Sequence[str], negative_prompt: str | Sequence[str], num_images: int
) -> tuple[list[str], list[str]]:
    """(n,) each: every prompt num_images times in a row, and its negative one."""
    require_count("num_images", num_images)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise ConfigError("there is no prompt")
    negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
    if len(negatives) != len(prompts):
        raise ConfigError(f"{len(negatives)} negative prompts for {len(prompts)} prompts; give one, or one for each")
    for text in (*prompts, *negatives):
        if not isinstance(text, str):
            raise ConfigError(f"a prompt should be text, not {type(text).__name__}")
    repeated = range(num_images)
    return [text for text in prompts for _ in repeated], [text for text in negatives for _ in repeated]


def _size_of(image: Pixels, height: int | None, width: int | None, name: str = "image") -> tuple[int, int]:
    """(height, width) of an image; ConfigError if it is none, or is not of the size that is asked for."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ConfigError(f"{name} should be (height, width, 3) of uint8, not {image.shape} of {image.dtype}")
    for side, asked, own in (("height", height, image.shape[0]), ("width", width, image.shape[1])):
        if asked not in (None, own):
            raise ConfigError(f"{side} {asked} is not that of the {name}, {own}; resize it before")
    return int(image.shape[0]), int(image.shape[1])
