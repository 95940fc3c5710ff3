"""Text, or text and an image, to image or film, over sessions: what diffusers computes, without torch.

Shapes: n images, c latent channels, h w latent height and width. What is said of images is said of films, whose latents
have frames: (n, c, f, h, w).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from obsdiff_runtime import openings
from obsdiff_runtime.autoencoder import FRAME_SCALE, Autoencoder, Pixels, film_frames, latent_frames, tile_side
from obsdiff_runtime.backends import Backend
from obsdiff_runtime.bundle import DECODER, ENCODER, IMAGE_ENCODER, Bundle, open_bundle
from obsdiff_runtime.choices import Choices
from obsdiff_runtime.conditioning import IS_DISTILLED, Conditions, Kind, Settings, kind_of, told_scale
from obsdiff_runtime.drawing import Drawing, Stepper
from obsdiff_runtime.errors import CancelledError, ConfigError
from obsdiff_runtime.labels import read_labels
from obsdiff_runtime.networks import Array, Networks
from obsdiff_runtime.noise import Noise, noise_sources
from obsdiff_runtime.progress import Progress, silent
from obsdiff_runtime.references import STATES, Reference, References, Sides, packed, reference_of
from obsdiff_runtime.schedulers import Scheduler, make_scheduler
from obsdiff_runtime.seeing import Seen, look
from obsdiff_runtime.turns import require_taken

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_SEQUENCE_LENGTH: Final = 256  # diffusers' default for T5
STRENGTH: Final = 0.8  # diffusers' default for Stable Diffusion

OnStep = Callable[[int, int, Array], bool | None]
"""(steps done, steps in all, latents (n, c, h, w)); where it gives False the call is cancelled."""


@dataclass(frozen=True, kw_only=True)
class Images:
    """What a call gives.

    Attributes:
        arrays: (n, height, width, 3), uint8; the images of one prompt follow each other. Of films
            (n, frames, height, width, 3).
        latents: (n, c, h, w), float32, before decoding.
        seconds: time of each stage: "text", "denoise", "decode".
        load_seconds: loading that happened within this call, by component.
    """

    arrays: NDArray[np.uint8]
    latents: Array
    seconds: Mapping[str, float]
    load_seconds: Mapping[str, float]

    def __len__(self) -> int:
        return len(self.arrays)

    def pil(self) -> "list[Image]":
        """The images as Pillow's; of films the frames, one film after another."""
        from PIL import Image

        return [Image.fromarray(array) for array in self.arrays.reshape(-1, *self.arrays.shape[-3:])]


class Pipeline:
    """A bundle that can be called with a prompt.

    Attributes:
        bundle: what runs.
        networks: its sessions.
    """

    def __init__(
        self,
        bundle: Bundle | Path | str,
        *,
        backend: str | Backend = "onnxruntime",
        threads: int | None = None,
        vae_tiling: bool | int = False,
    ) -> None:
        """Checks the bundle; components are loaded when they are first needed.

        Args:
            bundle: an opened bundle, or a folder, whose every file is then compared with its sha256.
            backend: one of `backends.BACKENDS` by name, or another one.
            threads: of the host to use, all if None.
            vae_tiling: put pictures through the VAE in tiles, which takes less memory: True for diffusers' size of a
                tile, or pixels a side. A bundle that has a size of its own does so anyway.

        Raises:
            ConfigError: there is no such tile.
            BundleError: the folder is no bundle, or not as it was exported.
            CompatibilityError: the runtime cannot run this pipeline, or its schema is newer.
        """
        self.bundle = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
        self.networks = Networks(self.bundle, backend, threads)
        self._kind = _kind_of(self.bundle)
        self._stepper = Stepper(self.networks, self._kind)
        self._denoiser: dict[str, Any] = self.bundle.config(self._kind.denoiser)
        self._distilled = bool(self.bundle.index().get(IS_DISTILLED))
        config = self.bundle.config(DECODER)
        tile = tile_side(vae_tiling, self.bundle.manifest.defaults.vae_tile, config)
        self._vae = Autoencoder(self.networks, config, tile)

    @property
    def vae_tile(self) -> int | None:
        """Pixels along a side of the tiles that the VAE works in, None where pictures go through it whole."""
        return self._vae.tile

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] = "",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_scale_2: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        seed: int | Sequence[int] = 0,
        noise_source: str = "numpy",
        num_images: int = 1,
        max_sequence_length: int | None = None,
        latents: Array | None = None,
        image: Pixels | None = None,
        strength: float | None = None,
        reference: Pixels | Reference | Sequence[Pixels | Reference] = (),
        progress: Progress = silent,
        on_step: OnStep | None = None,
    ) -> Images:
        """Draws images.

        Args:
            prompt: one, or several drawn in one batch.
            negative_prompt: one for all, or one for each; only where guidance makes use of it.
            num_inference_steps: the bundle's default if None; so are the next six.
            guidance_scale: guidance by negative prompts is off up to 1, of Z-Image up to 0.
            guidance_scale_2: of the denoisers behind the first, where some take turns; as the first one's if only that
                is given.
            height: in pixels.
            width: in pixels.
            num_frames: of a film: 1, 5, 9 and so on.
            max_sequence_length: text tokens of T5, or of the zeros in its place.
            seed: image i of a call has noise of its own, drawn for (seed, i) whatever the batch; or one seed for each
                image.
            noise_source: one of `noise.SOURCES`; "torch" draws what diffusers draws for the seed.
            num_images: per prompt.
            latents: (n, c, h, w), the noise to start from instead, of unit variance.
            image: (height, width, 3), one to change rather than to draw from nothing, or that films begin with where
                the pipeline's do; its size is the default one.
            strength: of that change, above 0 and up to 1, STRENGTH if None; the share of the steps that is taken.
            reference: a picture that the denoiser is told beside the text, or several, for all images: what `fit` makes
                of a file's, as diffusers does; or (height, width, 3), of any size in multiples of `size_step`.
            progress: told of each stage: "text", "denoise" step by step, "decode" image by image, or by latent frames.
            on_step: called after each step.

        Raises:
            ConfigError: an argument the pipeline cannot take; says what it can.
            CompatibilityError: the scheduler or a component cannot run here; there is a picture and no VAE encoder.
            RunError: a component's output was not finite.
            CancelledError: `on_step` gave False.
        """
        loaded, clock = set(self.networks.load_seconds), _Clock(self.networks)
        progress("text", 0, 1)
        drawings = self.begin(
            prompt,
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_scale_2=guidance_scale_2,
            height=height,
            width=width,
            num_frames=num_frames,
            seed=seed,
            noise_source=noise_source,
            num_images=num_images,
            max_sequence_length=max_sequence_length,
            latents=latents,
            image=image,
            strength=strength,
            reference=reference,
        )
        progress("text", 1, 1)
        clock.lap("text")
        self._denoise(drawings, progress, on_step)
        clock.lap("denoise")
        arrays = []
        for index, drawing in enumerate(drawings):  # one at a time, since decoding needs the most memory of all
            films = drawing.settings.num_frames is not None
            arrays.append(self._vae.decode(drawing.sample, progress if films else silent))
            progress("decode", index + 1, len(drawings))
        clock.lap("decode")
        load_seconds = {name: took for name, took in self.networks.load_seconds.items() if name not in loaded}
        latents = np.stack([drawing.sample for drawing in drawings])
        return Images(arrays=np.stack(arrays), latents=latents, seconds=clock.seconds, load_seconds=load_seconds)

    def begin(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] = "",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_scale_2: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        seed: int | Sequence[int] = 0,
        noise_source: str = "numpy",
        num_images: int = 1,
        max_sequence_length: int | None = None,
        latents: Array | None = None,
        image: Pixels | None = None,
        strength: float | None = None,
        reference: Pixels | Reference | Sequence[Pixels | Reference] = (),
    ) -> list[Drawing]:
        """The images of a call before their first step, for whoever takes the steps; see `__call__`, `step`, `decode`.

        Raises:
            ConfigError, CompatibilityError, RunError: as `__call__`.
        """
        given = [reference] if isinstance(reference, (np.ndarray, Reference)) else reference
        references = [each if isinstance(each, Reference) else Reference(pixels=each) for each in given]
        settings = self.resolve(
            num_inference_steps,
            guidance_scale,
            height,
            width,
            max_sequence_length,
            guidance_scale_2=guidance_scale_2,
            num_frames=num_frames,
            image=image,
            strength=strength,
            references=references,
        )
        if self._kind.references is not None and len(references) < self._kind.references.least:
            raise ConfigError("this pipeline edits pictures and draws nothing without one; give it a reference picture")
        prompts, negatives = _prompts(prompt, negative_prompt, num_images)
        if any(negatives) and not self._kind.negatives:
            raise ConfigError("this pipeline takes no negative prompt: its denoiser is told the guidance scale instead")
        if any(negatives) and self._kind.draws_classes:
            raise ConfigError("this pipeline takes no negative prompt: it is guided away from the picture of no class")
        sources = noise_sources(noise_source, seed, len(prompts))
        settings = replace(settings, seen=self._seen(references))
        cleans = self._cleans(image, sources)
        starts = self._starts(sources, settings, latents)
        told = self._told(references, len(prompts), settings) | self._opening(image, len(prompts), settings)
        opening = None if image is None or not self._kind.masks else self._vae.open(image, 1)
        conditions = self._conditions(prompts, negatives, settings) | told
        rows = [{name: value[index] for name, value in conditions.items()} for index in range(len(prompts))]
        turns = self.bundle.manifest.turns
        return [
            Drawing(self._kind, settings, row, self._scheduler(settings, source), start, clean, turns, opening)
            for row, source, start, clean in zip(rows, sources, starts, cleans, strict=True)
        ]

    def step(self, drawings: Sequence[Drawing]) -> None:
        """One step of each of these, in one run of the denoiser; see `Stepper.step`."""
        self._stepper.step(drawings)

    def decode(self, sample: Array) -> Pixels:
        """The picture of some latents: (c, h, w) -> (height, width, 3); or the film: see `Autoencoder.decode`.

        Raises:
            RunError: it was not finite.
        """
        return self._vae.decode(sample)

    @property
    def example(self) -> str:
        """A prompt that it can draw."""
        return self._kind.example

    def example_pictures(self, height: int | None = None, width: int | None = None) -> dict[str, Any]:
        """What `begin` is told beside the example: a grey picture of such a size where it draws nothing without."""
        kind, defaults = self._kind.references, self.bundle.manifest.defaults
        grey = np.full((height or defaults.height, width or defaults.width, 3), 127, np.uint8)
        if self._kind.opens:
            return {"image": grey}
        return {} if kind is None or not kind.least else {"reference": [grey] * kind.least}

    @property
    def opens(self) -> bool:
        """Whether films begin with a picture, or can."""
        return self._kind.opens or self._kind.masks

    @property
    def size_step(self) -> int:
        """Height and width are multiples of this."""
        return self._vae.scale * self._kind.patch(self._denoiser)

    @cached_property
    def choices(self) -> Choices:
        """What calls can choose."""
        kind, manifest = self._kind, self.bundle.manifest
        guided = not self._distilled if kind.negatives else bool(self._told_scale(1.0))
        fixed = [_fixed_size(self.bundle, kind, axis) for axis in (-2, -1)]
        pictures: tuple[int, int | None] = (0, 0)
        if self.networks.has(ENCODER):
            if self.opens:
                pictures = (int(kind.opens), 1)
            elif kind.references is not None:
                pictures = (kind.references.least, kind.references.most)
        return Choices(
            negative_prompt=guided and kind.negatives and not kind.draws_classes,
            guidance_scale=guided,
            guidance_scale_2=guided and bool(manifest.turns),
            size_step=self.size_step if None in fixed else None,
            frame_step=None if manifest.defaults.num_frames is None else FRAME_SCALE,
            pictures=pictures,
            classes=read_labels(self.bundle.index(), self._denoiser).titles() if kind.draws_classes else None,
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
        strength: float | None = None,
        references: Sequence[Reference] = (),
    ) -> Settings:
        """What a call will use; the bundle's defaults where it is told nothing.

        Raises:
            ConfigError: a value that the pipeline cannot take; says what it can.
        """
        defaults = self.bundle.manifest.defaults
        if image is not None:
            height, width = _size_of(image, height, width)
        length = defaults.max_sequence_length if max_sequence_length is None else max_sequence_length
        scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
        settings = Settings(
            height=defaults.height if height is None else height,
            width=defaults.width if width is None else width,
            num_frames=film_frames(num_frames, defaults.num_frames),
            num_inference_steps=defaults.num_inference_steps if steps is None else steps,
            guidance_scale=scale,
            guidance_scale_2=self._later_scale(guidance_scale, guidance_scale_2),
            guided=self._kind.negatives and self._kind.usual_scale(scale) > 1,
            max_sequence_length=MAX_SEQUENCE_LENGTH if length is None else length,
            references=self._sides(references),
        )
        if settings.num_inference_steps < 1:
            raise ConfigError(f"num_inference_steps should be at least 1, not {settings.num_inference_steps}")
        if settings.max_sequence_length < 1:
            raise ConfigError(f"max_sequence_length should be at least 1, not {settings.max_sequence_length}")
        for name in ("guidance_scale", "guidance_scale_2"):
            if not np.isfinite(getattr(settings, name) or 0):
                raise ConfigError(f"{name} should be a finite number, not {getattr(settings, name)}")
        if scale > 1 and self._distilled:
            raise ConfigError(f"guidance_scale should be at most 1, not {scale:g}: this pipeline's steps are distilled")
        for name, axis, pixels in (("height", -2, settings.height), ("width", -1, settings.width)):
            self._check_size(name, axis, pixels)
        self._vae.check_tiles(settings.height, settings.width)
        if image is None:
            if strength is not None:
                raise ConfigError("strength says how much an image is changed, and there is no image")
            return settings
        if references:
            raise ConfigError("an image is changed, or a reference is told to the denoiser; give one of them")
        self._vae.check_encodes()
        if self.opens:
            if strength is not None:
                raise ConfigError("strength says how much an image is changed, and here a film begins with it")
            return settings
        return self._changing(settings, STRENGTH if strength is None else strength)

    def fit(self, image: "Image", *, own_size: bool = False) -> Reference:
        """A picture as `reference` takes it, at the size that diffusers gives it, or its own in whole tokens.

        What a text encoder looks at has the size that diffusers gives it in any case.

        Raises:
            ConfigError: the denoiser is told no pictures, or this one is smaller than a token, or too slender.
        """
        return reference_of(image, self.size_step, self._referring(), own_size=own_size)

    def check_pictures(self) -> None:
        """Raises ConfigError if the denoiser is told no pictures, CompatibilityError if there is no VAE encoder."""
        if not self.opens:
            self._referring()
        self._vae.check_encodes()

    def _referring(self) -> References:
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
        most, step = self._referring().most, self.size_step
        if most is not None and len(references) > most:
            raise ConfigError(f"{len(references)} reference pictures; this pipeline takes {most}")
        self._vae.check_encodes()
        sizes = [_size_of(picture.pixels, None, None, "reference") for picture in references]
        for height, width in sizes:
            if height % step or width % step or 0 in (height, width):
                raise ConfigError(f"a reference of {width} x {height} pixels; its sides should be multiples of {step}")
        return tuple((height // step, width // step) for height, width in sizes)

    def _seen(self, references: Sequence[Reference]) -> tuple[Seen, ...]:
        """What the text encoder's vision makes of these pictures; nothing where it reads text alone."""
        pixels = None if self._kind.references is None else self._kind.references.seen
        return () if pixels is None else look(self.networks, [each.looked_at(pixels) for each in references])

    def _told(self, references: Sequence[Reference], images: int, settings: Settings) -> Conditions:
        """(n, r, tokens, ...): latents of the pictures that the denoiser is told, which all images have in common."""
        if self._kind.references is None:
            return {}
        patch, channels = self._kind.patch(self._denoiser), self._kind.channels(self._denoiser)
        found = [np.zeros((0, channels * patch**2), np.float32)]
        for picture in references:
            latents = self._vae.sample(self._vae.encode(picture.pixels), lambda shape: np.zeros(shape, np.float32))
            found.append(packed(latents, patch))
        rows = (images, 2 if settings.guided else 1, 1, 1)
        return {STATES: np.tile(np.concatenate(found), rows)}

    def _opening(self, image: Pixels | None, films: int, settings: Settings) -> Conditions:
        """(n, r, ...): what the denoiser is told of the picture that films begin with, all with the same one."""
        if not self.opens or settings.num_frames is None:
            return {}
        if image is None and self._kind.opens:
            raise ConfigError("films of this pipeline begin with a picture; give it one (image, or --image FILE)")
        frames, found = latent_frames(settings.num_frames), {}
        if self._kind.masks:
            found[openings.MASK] = openings.frame_mask(frames, given=image is not None)
        elif image is not None:
            found[openings.STATES] = openings.states(self._vae.open(image, frames))
        if image is not None and self.networks.has(IMAGE_ENCODER):
            pixels = openings.pixel_values(image, self.bundle.json(openings.PROCESSOR))
            found[openings.SEEN] = self.networks.run(IMAGE_ENCODER, {"pixel_values": pixels}, ["states"])["states"][0]
        rows = (films, 2 if settings.guided else 1)
        return {name: np.broadcast_to(value, (*rows, *value.shape)) for name, value in found.items()}

    def _later_scale(self, first: float | None, given: float | None) -> float | None:
        """The guidance scale of the denoisers behind the first, None where it is as the first one's."""
        require_taken(given, bool(self.bundle.manifest.turns), "of this pipeline")
        return self.bundle.manifest.defaults.guidance_scale_2 if first is None and given is None else given

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
        largest = self._kind.largest(self._denoiser)
        most = None if largest is None else largest * self._vae.scale
        fixed = _fixed_size(self.bundle, self._kind, axis)
        if fixed is not None and pixels != fixed * self._vae.scale:
            raise ConfigError(f"{name} is fixed to {fixed * self._vae.scale} in this bundle's graph, not {pixels}")
        if pixels < 1 or pixels % step:
            below = max(pixels // step * step, step)
            raise ConfigError(f"{name} should be a multiple of {step}, not {pixels}; near are {below}, {below + step}")
        if most is not None and pixels > most:
            raise ConfigError(f"{name} should be at most {most} for this model, not {pixels}")

    def _starts(self, sources: Sequence[Noise], settings: Settings, latents: Array | None) -> Array:
        """(n, c, h, w), what each image begins with, of unit variance."""
        sides = (settings.height // self._vae.scale, settings.width // self._vae.scale)
        frames = () if settings.num_frames is None else (latent_frames(settings.num_frames),)
        shape = (self._kind.channels(self._denoiser), *frames, *sides)
        if latents is None:
            return np.stack([source(shape) for source in sources])
        if latents.shape != (len(sources), *shape):
            raise ConfigError(f"latents should be {(len(sources), *shape)} for this call, not {latents.shape}")
        return latents.astype(np.float32)

    def _cleans(self, image: Pixels | None, sources: Sequence[Noise]) -> Sequence[Array | None]:
        """(c, h, w) each: latents of the image to change, drawn anew for each."""
        if image is None or self.opens:
            return [None] * len(sources)
        encoded = self._vae.encode(image)
        return [self._vae.sample(encoded, source) for source in sources]

    def _conditions(self, prompts: list[str], negatives: list[str], settings: Settings) -> Conditions:
        """(n, r, ...) each: what the denoiser is told of each image; under guidance r = 2, the negative one first."""
        encode = self._kind.encode
        wanted = _encoded_once(prompts, lambda unique: encode(self.networks, unique, False, settings))
        if not settings.guided:
            scale = self._told_scale(settings.guidance_scale)
            wanted |= {name: np.stack([value] * len(prompts)) for name, value in scale.items()}
            return {name: value[:, None] for name, value in wanted.items()}
        unwanted = _encoded_once(negatives, lambda unique: encode(self.networks, unique, True, settings))
        return {name: np.stack([unwanted[name], wanted[name]], axis=1) for name in wanted}

    def _told_scale(self, scale: float) -> Conditions:
        return told_scale(self.bundle.component(self._kind.denoiser).inputs, scale)

    def _denoise(self, drawings: Sequence[Drawing], progress: Progress, on_step: OnStep | None) -> None:
        """All steps of images that began together."""
        calls = drawings[0].calls
        for index in range(1, calls + 1):
            self.step(drawings)
            for drawing in drawings:
                if drawing.error is not None:
                    raise drawing.error
            progress("denoise", index, calls)
            if on_step is not None and on_step(index, calls, np.stack([each.sample for each in drawings])) is False:
                raise CancelledError(f"cancelled after step {index} of {calls}")

    def _scheduler(self, settings: Settings, noise: Noise) -> Scheduler:
        tokens = (settings.height // self.size_step) * (settings.width // self.size_step)
        tokens = self._kind.counted(self._kind.channels(self._denoiser), tokens)
        shift = self._kind.shift
        return make_scheduler(
            self.bundle.scheduler(),
            settings.num_inference_steps,
            tokens,
            noise,
            even_sigmas=self._kind.even_sigmas,
            mu=None if shift is None else shift(tokens, settings.num_inference_steps),
            only=self._kind.scheduler,
            strength=settings.strength,
        )


class _Clock:
    """Seconds of each stage without the loading that happened in it."""

    def __init__(self, networks: Networks) -> None:
        self._networks = networks
        self._last = self._now()
        self.seconds: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        now = self._now()
        self.seconds[stage] = now - self._last
        self._last = now

    def _now(self) -> float:
        return time.perf_counter() - sum(self._networks.load_seconds.values())


def _prompts(
    prompt: str | Sequence[str], negative_prompt: str | Sequence[str], num_images: int
) -> tuple[list[str], list[str]]:
    """(n,) each: every prompt num_images times in a row, and its negative one."""
    if num_images < 1:
        raise ConfigError(f"num_images should be at least 1, not {num_images}")
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


def _kind_of(bundle: Bundle) -> Kind:
    """How the bundle's pipeline samples; which pictures the denoiser can be told, and its scale, its graph says."""
    kind = kind_of(bundle.manifest.pipeline_class)
    inputs = bundle.component(kind.denoiser).inputs
    told = {port.name for port in inputs}
    return replace(
        kind,
        negatives=kind.negatives and not told_scale(inputs, 1.0),
        references=kind.references if STATES in told else None,
        masks=openings.MASK in told,
    )


def _size_of(image: Pixels, height: int | None, width: int | None, name: str = "image") -> tuple[int, int]:
    """(height, width) of an image; ConfigError if it is none, or is not of the size that is asked for."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ConfigError(f"{name} should be (height, width, 3) of uint8, not {image.shape} of {image.dtype}")
    for side, asked, own in (("height", height, image.shape[0]), ("width", width, image.shape[1])):
        if asked not in (None, own):
            raise ConfigError(f"{side} {asked} is not that of the image, {own}; resize it before")
    return int(image.shape[0]), int(image.shape[1])


def _encoded_once(prompts: list[str], encode: Callable[[list[str]], Conditions]) -> Conditions:
    """Conditions of all prompts, with each distinct one encoded once."""
    distinct = list(dict.fromkeys(prompts))
    rows = [distinct.index(text) for text in prompts]
    return {name: array[rows] for name, array in encode(distinct).items()}


def _fixed_size(bundle: Bundle, kind: Kind, axis: int) -> int | None:
    """The denoiser's latent size along an axis where its graph allows one only."""
    for entry in bundle.component(kind.denoiser).inputs:
        if entry.name == kind.noisy and isinstance(size := entry.shape[axis], int):
            return size
    return None
