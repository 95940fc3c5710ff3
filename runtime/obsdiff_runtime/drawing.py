"""One image on its way from noise or another image: what the denoiser is asked next, and what its answer does.

A drawing has a scheduler and a step of its own, so that drawings that began at different times, with other steps or
guidance, can share a run of the denoiser wherever their shapes agree.

Shapes: c latent channels, h w latent height and width, behind the frames of a film; r rows of a drawing: 2 under
guidance, the negative one first.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from obsdiff_runtime.kinds import Conditions, Kind, Settings
from obsdiff_runtime.networks import Array, Networks
from obsdiff_runtime.noise import Noise
from obsdiff_runtime.references import PLACES
from obsdiff_runtime.schedulers import Scheduler
from obsdiff_runtime.turns import Turns, denoiser_at

TRAIN_TIMESTEPS: Final = 1000


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What stays of a picture that is drawn anew in part.

    Attributes:
        clean: (c, h, w), its latents.
        redrawn: (h, w), where it is drawn anew.
    """

    clean: Array
    redrawn: NDArray[np.bool_]


class Drawing:
    """An image that is being drawn.

    Attributes:
        settings: of the call that it belongs to.
        sample: (c, h, w), float32: the latents so far.
        index: calls of the denoiser that are done.
        calls: that it takes in all.
        error: why it cannot go on; None where it can.
    """

    def __init__(
        self,
        kind: Kind,
        settings: Settings,
        conditions: Conditions,
        scheduler: Scheduler,
        noise: Array,
        clean: Array | None = None,
        turns: Turns | None = None,
        opening: Array | None = None,
        kept: Kept | None = None,
        source: Noise | None = None,
    ) -> None:
        """Begins.

        Args:
            kind: of the pipeline.
            settings: of the call; `skipped_steps` of them are left out.
            conditions: what the denoiser is told of the prompt, (r, ...) each.
            scheduler: its own.
            noise: (c, h, w), of unit variance.
            clean: (c, h, w), latents of the image that is changed; None where one is drawn from nothing.
            turns: of the denoisers; None or empty where the kind's takes all steps.
            opening: (c, frames, h, w), latents that stand in place of the first ones of a film at every step.
            kept: what of an image stands in place of what is drawn after every step, with the same noise at its level.
            source: of the noise that is put on an opening; see `Given`.
        """
        self.settings, self.conditions = settings, conditions
        self._kind, self._scheduler = kind, scheduler
        self._turns = turns or {kind.denoiser: 0.0}
        self._opening, self._kept, self._noise, self._source = opening, kept, noise, source
        self._skipped = settings.skipped_steps * scheduler.order
        self.index, self.calls = 0, len(scheduler.timesteps) - self._skipped
        if clean is None:
            self.sample: Array = noise * np.float32(scheduler.initial_sigma)
        else:
            self.sample = self._noised(clean)
        self.error: Exception | None = None
        self._stirred = self._stir()

    @property
    def rows(self) -> int:
        return 2 if self.settings.guided else 1

    @property
    def is_over(self) -> bool:
        return self.index == self.calls or self.error is not None

    @property
    def shapes(self) -> tuple[Any, ...]:
        """Drawings for which this is equal can share a run of the denoiser."""
        told = sorted((name, value.shape[1:]) for name, value in self.conditions.items())
        return (self.denoiser, self.sample.shape, self.settings.references, *told)

    @property
    def denoiser(self) -> str:
        """The component that is called next."""
        return denoiser_at(self._turns, self._timestep)

    @property
    def _timestep(self) -> float:
        return float(self._scheduler.timesteps[self._skipped + self.index])

    def asked(self) -> tuple[Array, float]:
        """The sample as the denoiser wants it, (c, h, w), and the timestep."""
        return self._opened(self._scheduler.scale(self.sample, self._skipped + self.index)), self._timestep

    def advance(self, output: Array) -> None:
        """Takes the denoiser's answer, (r, c, h, w), and goes on to the next step."""
        guided = output[0]
        if self.settings.guided:
            scale = self._kind.usual_scale(self.settings.scale_of(first=self.denoiser == self._kind.denoiser))
            guided = output[0] + np.float32(scale) * (output[1] - output[0])
            lengths = self._kind.kept_lengths
            if lengths is not None:
                guided = guided * (lengths(output[1]) / lengths(guided))
        self.sample = self._scheduler.step(guided, self._skipped + self.index, self.sample).astype(
            np.float32, copy=False
        )
        self.index += 1
        if self.index < self.calls:
            self._stirred = self._stir()
        if self._kept is not None:
            self.sample = np.where(self._kept.redrawn, self.sample, self._noised(self._kept.clean))
        if self.index == self.calls:
            self.sample = self._opened(self.sample)

    def _noised(self, clean: Array) -> Array:
        """Latents with the noise of the next step, with none behind the last one."""
        if self.index == self.calls:
            return clean
        return self._scheduler.noised(clean, self._noise, self._skipped + self.index).astype(np.float32, copy=False)

    def _stir(self) -> Array | None:
        """The opening with the noise of this step; diffusers draws that for all tokens, (tokens, c), of a film."""
        share = self._kind.given.stirred
        if self._opening is None or self._source is None or not share:
            return self._opening
        channels, *sides = self._opening.shape
        noise = self._source((math.prod(self.sample.shape[1:]), channels))[: math.prod(sides)]
        level = self._timestep / TRAIN_TIMESTEPS
        return self._opening + np.float32(share * level**2) * noise.T.reshape(self._opening.shape)

    def _opened(self, sample: Array) -> Array:
        if self._stirred is None:
            return sample
        return np.concatenate([self._stirred, sample[:, self._stirred.shape[1] :]], axis=1)


def companies(drawings: Sequence[Drawing], max_rows: int) -> Iterator[list[Drawing]]:
    """Drawings that are not over, as those that go through the denoiser together, up to so many rows at once."""
    alike: dict[object, list[Drawing]] = {}
    for drawing in drawings:
        if not drawing.is_over:
            alike.setdefault(drawing.shapes, []).append(drawing)
    for same in alike.values():
        company: list[Drawing] = []
        for drawing in same:
            if company and sum(each.rows for each in company) + drawing.rows > max_rows:
                yield company
                company = []
            company.append(drawing)
        yield company


def step_together(company: Sequence[Drawing], step: Callable[[Sequence[Drawing]], object]) -> None:
    """One step of each; where a run fails, each is run alone, so that one cannot take the others with it.

    Args:
        company: drawings that go through the denoiser together; one that fails alone gets its `error`.
        step: takes the step of so many.
    """
    try:
        step(company)
    except Exception as error:
        if len(company) == 1:
            company[0].error = error
        else:
            for drawing in company:
                step_together([drawing], step)


class Stepper:
    """Runs the denoiser for drawings; what it is told of their prompts is put together once for each company."""

    def __init__(self, networks: Networks, kind: Kind) -> None:
        self._networks, self._kind = networks, kind
        self._company: tuple[Drawing, ...] = ()
        self._told: dict[str, Array] = {}

    def step(self, drawings: Sequence[Drawing]) -> None:
        """One step of each, in one run.

        A drawing whose part of the output is not finite gets an `error`, and the others go on.

        Args:
            drawings: none of them over; `Drawing.shapes` are equal.

        Raises:
            ConfigError: the denoiser does not take these shapes.
        """
        denoiser = drawings[0].denoiser
        output = self._networks.run(denoiser, self._inputs(drawings), [self._kind.predicted], finite=False)
        start = 0
        for drawing in drawings:
            own = output[self._kind.predicted][start : start + drawing.rows]
            start += drawing.rows
            if np.isfinite(own).all():
                drawing.advance(own)
            else:
                drawing.error = self._networks.not_finite(denoiser, self._kind.predicted, own)

    def _inputs(self, drawings: Sequence[Drawing]) -> Mapping[str, Array]:
        if self._company != tuple(drawings):
            self._company = tuple(drawings)
            self._told = {
                name: np.concatenate([drawing.conditions[name] for drawing in drawings])
                for name in drawings[0].conditions
            }
            if self._kind.references is not None:
                self._told[PLACES] = self._kind.references.places(drawings[0].settings.references)
        samples, timesteps = [], []
        for drawing in drawings:
            sample, timestep = drawing.asked()
            samples += [sample] * drawing.rows
            timesteps += [timestep] * drawing.rows
        noisy: Array = np.stack(samples).astype(np.float32, copy=False)
        return {self._kind.noisy: noisy, "timestep": np.array(timesteps, np.float32), **self._told}
