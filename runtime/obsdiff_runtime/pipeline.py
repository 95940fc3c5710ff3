"""Text, or text and an image, to image or film, over sessions: what diffusers computes, without torch.

Shapes: n images, c latent channels, h w latent height and width. What is said of images is said of films, whose latents
have frames: (n, c, f, h, w).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from obsdiff_runtime import fills, openings
from obsdiff_runtime.autoencoder import Autoencoder, Pixels, latent_frames, tile_side
from obsdiff_runtime.backends import Backend
from obsdiff_runtime.bundle import DECODER, Bundle, open_bundle
from obsdiff_runtime.conditions import Conditioner
from obsdiff_runtime.controls import PICTURE, steering
from obsdiff_runtime.drawing import Drawing, Kept, Stepper
from obsdiff_runtime.errors import CancelledError, ConfigError
from obsdiff_runtime.fills import Fill
from obsdiff_runtime.kinds import Kind, Settings
from obsdiff_runtime.kinds.scales import told_scale
from obsdiff_runtime.kinds.table import kind_of
from obsdiff_runtime.masks import Mask, is_redrawn, on_latents
from obsdiff_runtime.networks import Array, Networks
from obsdiff_runtime.noise import Noise, noise_sources
from obsdiff_runtime.progress import Progress, silent
from obsdiff_runtime.references import STATES, Reference, reference_of
from obsdiff_runtime.resolving import MASKED_STRENGTH, Resolver, each_prompt
from obsdiff_runtime.schedulers import Scheduler, make_scheduler

if TYPE_CHECKING:
    from PIL.Image import Image

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
        resolver: what calls can ask for.
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
        self._channels = self._kind.channels(self.bundle.config(self._kind.denoiser))
        self._stepper = Stepper(self.networks, self._kind)
        config = self.bundle.config(DECODER)
        tile = tile_side(vae_tiling, self.bundle.manifest.defaults.vae_tile, config)
        self._vae = Autoencoder(self.networks, config, tile)
        self._conditioner = Conditioner(self.networks, self._kind, self._vae)
        self.resolver = Resolver(self.networks, self._kind, self._vae)

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
        last_image: Pixels | None = None,
        mask: Mask | None = None,
        control: Pixels | None = None,
        control_scale: float | None = None,
        strength: float | None = None,
        eta: float = 0.0,
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
            last_image: the same of one that films end with, where they can.
            mask: (height, width), which part of that image is drawn anew, in bool, or white in uint8; the rest stays
                but for what the VAE loses. All of it if None.
            control: (height, width, 3), a picture by which the bundle's ControlNet steers what is drawn, such as edges;
                its size is the default one.
            control_scale: how much it counts; 1 if None.
            strength: of that change, above 0 and up to 1, the share of the steps that is taken; STRENGTH of
                resolving.py if None, and 1 where there is a mask.
            eta: how much noise the sampler adds at each step, from 0 to 1; of DDIM's and TCD's.
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
            last_image=last_image,
            mask=mask,
            control=control,
            control_scale=control_scale,
            strength=strength,
            eta=eta,
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
        last_image: Pixels | None = None,
        mask: Mask | None = None,
        control: Pixels | None = None,
        control_scale: float | None = None,
        strength: float | None = None,
        eta: float = 0.0,
        reference: Pixels | Reference | Sequence[Pixels | Reference] = (),
    ) -> list[Drawing]:
        """The images of a call before their first step, for whoever takes the steps; see `__call__`, `step`, `decode`.

        Raises:
            ConfigError, CompatibilityError, RunError: as `__call__`.
        """
        given = [reference] if isinstance(reference, (np.ndarray, Reference)) else reference
        references = [each if isinstance(each, Reference) else Reference(pixels=each) for each in given]
        steered = steering(control, control_scale)
        settings = self.resolver.resolve(
            num_inference_steps,
            guidance_scale,
            height,
            width,
            max_sequence_length,
            guidance_scale_2=guidance_scale_2,
            num_frames=num_frames,
            image=image,
            last_image=last_image,
            mask=mask is not None,
            control=steered,
            strength=strength,
            eta=eta,
            references=references,
        )
        if self._kind.references is not None and len(references) < self._kind.references.least:
            raise ConfigError("this pipeline edits pictures and draws nothing without one; give it a reference picture")
        if image is None and self._kind.opens:
            raise ConfigError("films of this pipeline begin with a picture; give it one (image, or --image FILE)")
        if last_image is None and self.resolver.must_end:
            raise ConfigError(
                "films of this pipeline end with a picture, too; give it one (last_image, or --last-image FILE)"
            )
        prompts, negatives = each_prompt(prompt, negative_prompt, num_images)
        if any(negatives) and not self._kind.negatives:
            raise ConfigError("this pipeline takes no negative prompt: its denoiser is told the guidance scale instead")
        if any(negatives) and self._kind.draws_classes:
            raise ConfigError("this pipeline takes no negative prompt: it is guided away from the picture of no class")
        sources = noise_sources(noise_source, seed, len(prompts))
        # before any work is done, for they refuse what they cannot do
        schedulers = [self._scheduler(settings, source) for source in sources]
        redrawn = None if mask is None else on_latents(mask, self._vae.scale, settings.height, settings.width)
        anew = mask is not None and strength in (None, MASKED_STRENGTH)
        reads = not anew or self._kind.fills is None or self._kind.fills.reads_all
        cleans = self._cleans(image if reads else None, sources)
        drawn_before = self._kind.given.drawn == "before"
        begun = self._openings(image, sources) if drawn_before else []
        starts = self._starts(sources, settings, latents)
        begun = begun or self._openings(image, sources)
        conditions = self._conditioner.conditions(prompts, negatives, settings, references, image, last_image, steered)
        rows = [{name: value[index] for name, value in conditions.items()} for index in range(len(prompts))]
        turns = self.bundle.manifest.turns
        if self._kind.fills is None:
            kept = self._kept(redrawn, cleans, sources)
        else:
            kept = [None] * len(cleans)
            for row, states in zip(rows, self._filled(self._kind.fills, image, mask, settings, sources), strict=True):
                row[fills.STATES] = states
        if anew:
            cleans = [None] * len(cleans)  # what is drawn anew is so from noise alone, as in diffusers
        return [
            Drawing(self._kind, settings, row, scheduler, start, clean, turns, opening, stays, source)
            for row, scheduler, start, clean, opening, stays, source in zip(
                rows, schedulers, starts, cleans, begun, kept, sources, strict=True
            )
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
            return {"image": grey, **({"last_image": grey} if self.resolver.must_end else {})}
        return {} if kind is None or not kind.least else {"reference": [grey] * kind.least}

    @property
    def fps(self) -> float:
        """Frames a second of its films."""
        return self._kind.fps

    @property
    def size_step(self) -> int:
        """Height and width are multiples of this."""
        return self.resolver.size_step

    def fit(self, image: "Image", *, own_size: bool = False) -> Reference:
        """A picture as `reference` takes it, at the size that diffusers gives it, or its own in whole tokens.

        What a text encoder looks at has the size that diffusers gives it in any case.

        Raises:
            ConfigError: the denoiser is told no pictures, or this one is smaller than a token, or too slender.
        """
        return reference_of(image, self.size_step, self.resolver.referring(), own_size=own_size)

    def _starts(self, sources: Sequence[Noise], settings: Settings, latents: Array | None) -> Array:
        """(n, c, h, w), what each image begins with, of unit variance."""
        sides = (settings.height // self._vae.scale, settings.width // self._vae.scale)
        frames = () if settings.num_frames is None else (latent_frames(settings.num_frames, self._vae.frame_scale),)
        shape = (self._channels, *frames, *sides)
        if latents is None:
            return np.stack([source(shape) for source in sources])
        if latents.shape != (len(sources), *shape):
            raise ConfigError(f"latents should be {(len(sources), *shape)} for this call, not {latents.shape}")
        return latents.astype(np.float32)

    def _cleans(self, image: Pixels | None, sources: Sequence[Noise]) -> Sequence[Array | None]:
        """(c, h, w) each: latents of the image to change, drawn anew for each."""
        if image is None or self.resolver.opens:
            return [None] * len(sources)
        encoded = self._vae.encode(image)
        return [self._vae.sample(encoded, source) for source in sources]

    def _openings(self, image: Pixels | None, sources: Sequence[Noise]) -> Sequence[Array | None]:
        """(c, 1, h, w) each: what stands in place of a film's first latents, where it begins with a picture so."""
        if image is None or not self._kind.masks:
            return [None] * len(sources)
        if self._kind.given.drawn is None:
            return [self._vae.open(image, 1)] * len(sources)
        encoded = self._vae.encode(image)
        return [self._vae.sample(encoded, source)[:, None] for source in sources]

    def _filled(
        self, fill: Fill, image: Pixels | None, mask: Mask | None, settings: Settings, sources: Sequence[Noise]
    ) -> list[Array]:
        """(r, ...): what the denoiser is told of what stays of each image: nothing without one, or without a mask."""
        size = (settings.height, settings.width)
        redrawn = np.ones(size, dtype=bool) if mask is None else is_redrawn(mask)
        encoded = self._vae.encode(np.zeros((*size, 3), np.uint8) if image is None else image, redrawn)
        rows = 2 if settings.guided else 1
        return [
            np.tile(fill.states(redrawn, self._vae.sample(encoded, source), self._vae.scale), (rows, 1, 1, 1))
            for source in sources
        ]

    def _kept(
        self, redrawn: NDArray[np.bool_] | None, cleans: Sequence[Array | None], sources: Sequence[Noise]
    ) -> list[Kept | None]:
        """What stays of each image; diffusers draws noise for latents of that alone, too, which some denoisers read."""
        kept: list[Kept | None] = []
        for clean, source in zip(cleans, sources, strict=True):
            if clean is None or redrawn is None:
                kept.append(None)
            else:
                source(clean.shape)
                kept.append(Kept(clean=clean, redrawn=redrawn))
        return kept

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
        if settings.num_frames is not None:
            tokens *= latent_frames(settings.num_frames, self._vae.frame_scale)
        tokens = self._kind.counted(self._channels, tokens)
        shift = self._kind.shift
        return make_scheduler(
            self.bundle.scheduler(),
            settings.num_inference_steps,
            tokens,
            noise,
            even_sigmas=self._kind.even_sigmas,
            levels=None if self._kind.levels is None else self._kind.levels(settings.num_inference_steps),
            mu=None if shift is None else shift(tokens, settings.num_inference_steps),
            only=self._kind.scheduler,
            strength=settings.strength,
            eta=settings.eta,
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


def _kind_of(bundle: Bundle) -> Kind:
    """How the bundle's pipeline samples; which pictures the denoiser can be told, and its scale, its graph says."""
    kind = kind_of(bundle.manifest.pipeline_class)
    inputs = bundle.component(kind.denoiser).inputs
    told = {port.name for port in inputs}
    return replace(
        kind,
        negatives=kind.negatives and not told_scale(inputs, 1.0),
        references=kind.references if STATES in told else None,
        fills=kind.fills if fills.STATES in told else None,
        controls=kind.controls and PICTURE in told,
        masks=openings.MASK in told,
    )
