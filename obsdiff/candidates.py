"""What `obsdiff bench` is told to measure, and what measures it: a kind is a line in KINDS. Imports no torch itself.

FOLDER              a bundle
FOLDER@BACKEND      a bundle on another backend than --backend
KIND:MODEL          a pipeline run by torch: a diffusers folder, a pruned one or a Hub id
KIND:               the shipped pipeline
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Protocol

from obsdiff_runtime.benchmark.runner import DEFAULT_BACKEND, Runner, open_runner
from obsdiff_runtime.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Terms:
    """How candidates are run, where it is not in their names.

    Attributes:
        backend: of bundles that name none.
        dtype: of pipelines in torch: fp32, fp16 or bf16; None: as stored, but fp32 on a CPU.
        device: of those; None: cuda where there is one.
        threads: of the host, all if None.
        vae_tiling: see the runtime's `Pipeline`.
    """

    backend: str = DEFAULT_BACKEND
    dtype: str | None = None
    device: str | None = None
    threads: int | None = None
    vae_tiling: bool | int = False


class Open(Protocol):
    def __call__(self, model: str | None, terms: Terms) -> Runner: ...


def _in_torch(model: str | None, terms: Terms, *, compiled: bool) -> Runner:
    from obsdiff.pipeline_runner import PipelineRunner

    return PipelineRunner(
        model,
        compiled=compiled,
        dtype=terms.dtype,
        device=terms.device,
        threads=terms.threads,
        vae_tiling=terms.vae_tiling,
    )


KINDS: Final[dict[str, Open]] = {
    "diffusers": partial(_in_torch, compiled=False),
    "compiled": partial(_in_torch, compiled=True),
}


def open_candidates(texts: Sequence[str], terms: Terms) -> list[Runner]:
    """The candidates that the texts name, in order.

    Raises:
        ConfigError: one names no kind, no backend, no bundle or no pipeline; a flag that none of them has a use for.
    """
    if not any(_kind_and_model(text) for text in texts):
        for flag, value in (("--dtype", terms.dtype), ("--device", terms.device)):
            if value is not None:
                raise ConfigError(f"{flag} {value} is for pipelines in torch, and none is named; a bundle has its own")
    return [_open(text, terms) for text in texts]


def _open(text: str, terms: Terms) -> Runner:
    named = _kind_and_model(text)
    if named is None:
        return open_runner(text, backend=terms.backend, threads=terms.threads, vae_tiling=terms.vae_tiling)
    kind, model = named
    if kind not in KINDS:
        raise ConfigError(f"{text}: there is no kind {kind!r}; there are {', '.join(KINDS)}, and bundles by folder")
    return KINDS[kind](model or None, terms)


def _kind_and_model(text: str) -> tuple[str, str] | None:
    """None where the text names a folder."""
    kind, colon, model = text.partition(":")
    return (kind, model) if colon and not Path(text).exists() else None
