"""What the denoiser is told of each image that is drawn: its prompt, the guidance scale, pictures.

Shapes: n images; r rows of each, 2 under guidance, the negative one first.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from obsdiff_runtime import controls, openings
from obsdiff_runtime.autoencoder import Autoencoder, Pixels, latent_frames
from obsdiff_runtime.bundle import IMAGE_ENCODER
from obsdiff_runtime.controls import Control
from obsdiff_runtime.kinds import Conditions, Kind, Settings
from obsdiff_runtime.kinds.scales import told_scale
from obsdiff_runtime.networks import Networks
from obsdiff_runtime.references import STATES, Reference, packed
from obsdiff_runtime.seeing import Seen, look


class Conditioner:
    """Puts together what the denoiser is told, by running encoders."""

    def __init__(self, networks: Networks, kind: Kind, vae: Autoencoder) -> None:
        self._networks, self._kind, self._vae = networks, kind, vae

    def conditions(
        self,
        prompts: Sequence[str],
        negatives: Sequence[str],
        settings: Settings,
        references: Sequence[Reference] = (),
        image: Pixels | None = None,
        last_image: Pixels | None = None,
        control: Control | None = None,
    ) -> Conditions:
        """(n, r, ...) each, by input of the denoiser.

        Args:
            prompts: (n,).
            negatives: (n,), which count under guidance alone.
            settings: of the call.
            references: pictures that all images are told.
            image: the one that films begin with, where they do; that which is changed otherwise.
            last_image: the one that they end with.
            control: what a ControlNet steers all images by.

        Raises:
            ConfigError: a prompt cannot be read.
            RunError: what an encoder gave was not finite.
        """
        settings = replace(settings, seen=self._seen(references))
        return {
            **self._of_prompts(prompts, negatives, settings),
            **self._of_references(references, len(prompts), settings),
            **self._of_opening(image, last_image, len(prompts), settings),
            **self._of_control(control, len(prompts), settings),
            **self._of_frames(len(prompts), settings),
        }

    def _of_prompts(self, prompts: Sequence[str], negatives: Sequence[str], settings: Settings) -> Conditions:
        """(n, r, ...) each: what the denoiser is told of each image; under guidance r = 2, the negative one first."""
        encode = self._kind.encode
        wanted = _encoded_once(prompts, lambda unique: encode(self._networks, unique, False, settings))
        if not settings.guided:
            inputs = self._networks.bundle.component(self._kind.denoiser).inputs
            scale = told_scale(inputs, settings.guidance_scale)
            wanted |= {name: np.stack([value] * len(prompts)) for name, value in scale.items()}
            return {name: value[:, None] for name, value in wanted.items()}
        unwanted = _encoded_once(negatives, lambda unique: encode(self._networks, unique, True, settings))
        return {name: np.stack([unwanted[name], wanted[name]], axis=1) for name in wanted}

    def _seen(self, references: Sequence[Reference]) -> tuple[Seen, ...]:
        """What the text encoder's vision makes of these pictures; nothing where it reads text alone."""
        pixels = None if self._kind.references is None else self._kind.references.seen
        return () if pixels is None else look(self._networks, [each.looked_at(pixels) for each in references])

    def _of_references(self, references: Sequence[Reference], images: int, settings: Settings) -> Conditions:
        """(n, r, tokens, ...): latents of the pictures that the denoiser is told, which all images have in common."""
        if self._kind.references is None:
            return {}
        config = self._networks.bundle.config(self._kind.denoiser)
        patch, channels = self._kind.patch(config), self._kind.channels(config)
        found = [np.zeros((0, channels * patch**2), np.float32)]
        for picture in references:
            latents = self._vae.sample(self._vae.encode(picture.pixels), lambda shape: np.zeros(shape, np.float32))
            found.append(packed(latents, patch))
        return _alike({STATES: np.concatenate(found)}, images, settings)

    def _of_opening(
        self, image: Pixels | None, last_image: Pixels | None, films: int, settings: Settings
    ) -> Conditions:
        """(n, r, ...): what the denoiser is told of the pictures that films begin and end with, all with the same."""
        if not (self._kind.opens or self._kind.masks) or settings.num_frames is None:
            return {}
        frames, found = latent_frames(settings.num_frames, self._vae.frame_scale), {}
        if self._kind.masks:
            found[openings.MASK] = openings.frame_mask(frames, given=image is not None)
        elif image is not None:
            latents = self._vae.open(image, frames, last_image)
            found[openings.STATES] = openings.states(latents, closed=last_image is not None)
        if image is not None and self._networks.has(IMAGE_ENCODER):
            processor = self._networks.bundle.json(openings.PROCESSOR)
            shown = [openings.pixel_values(each, processor) for each in (image, last_image) if each is not None]
            told = {"pixel_values": np.concatenate(shown)}
            seen = self._networks.run(IMAGE_ENCODER, told, ["states"])["states"]  # (pictures, tokens, width)
            found[openings.SEEN] = seen[0] if last_image is None else seen
        return _alike(found, films, settings)

    def _of_frames(self, films: int, settings: Settings) -> Conditions:
        """(n, r, f, ...): what the denoiser is told of a film's latent frames, all films the same."""
        if settings.num_frames is None:
            return {}
        frames = latent_frames(settings.num_frames, self._vae.frame_scale)
        return _alike({name: tell(frames) for name, tell in self._kind.told_of_frames.items()}, films, settings)

    def _of_control(self, control: Control | None, images: int, settings: Settings) -> Conditions:
        """(n, r, ...): what steers the denoiser; a scale of 0 where nothing does."""
        if not self._kind.controls:
            return {}
        scale = self._vae.scale
        if control is None:
            sides = (settings.height // scale, settings.width // scale)
            picture = np.zeros((controls.channels(scale), *sides), np.float32)
        else:
            picture = controls.packed(control.pixels, scale)
        strength = np.asarray(0 if control is None else control.scale, np.float32)
        return _alike({controls.PICTURE: picture, controls.SCALE: strength}, images, settings)


def _alike(told: Conditions, images: int, settings: Settings) -> Conditions:
    """(n, r, ...) each of what all rows of all images are told."""
    rows = (images, 2 if settings.guided else 1)
    return {name: np.broadcast_to(value, (*rows, *value.shape)) for name, value in told.items()}


def _encoded_once(prompts: Sequence[str], encode: Callable[[list[str]], Conditions]) -> Conditions:
    """Conditions of all prompts, with each distinct one encoded once."""
    distinct = list(dict.fromkeys(prompts))
    rows = [distinct.index(text) for text in prompts]
    return {name: array[rows] for name, array in encode(distinct).items()}
