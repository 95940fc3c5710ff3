"""Models on the Hub, fetched whole or as configurations alone."""

import contextlib
import errno
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from obsdiff import turns
from obsdiff.checkpoint import DEFAULTS, INDEX
from obsdiff.configs import read_index
from obsdiff.families.table import FAMILIES
from obsdiff.folders import MANIFEST
from obsdiff.weights import CONVERT
from obsdiff_runtime.errors import ModelError, ResourceError, first_line


def fetch_pipeline(
    model: str, *, revision: str | None, variant: str | None, local_files_only: bool, without: Collection[str] = ()
) -> Path:
    """The folder that a pipeline was fetched to, without the components that the caller has.

    Raises:
        ModelError: it cannot be fetched.
        ResourceError: the disk is full.
    """
    try:
        folder = DiffusionPipeline.download(
            model,
            revision=revision,
            variant=variant,
            use_safetensors=True,
            local_files_only=local_files_only,
            **dict.fromkeys(without),
        )
        _fetch_extras(model, read_index(Path(folder)), revision, local_files_only)
    except (OSError, ValueError) as error:
        raise _unreachable(model, error) from error
    return Path(folder)


def fetch_configs(model: str, *, revision: str | None, local_files_only: bool) -> Path:
    """The same of its configurations, without weights."""
    try:
        folder = _fetch(model, INDEX, revision, local_files_only).parent
        index = read_index(folder)
        for name, entry in index.items():
            if isinstance(entry, list) and entry[0] is not None and "tokenizer" not in name:
                file = "scheduler_config.json" if name == "scheduler" else "config.json"
                with contextlib.suppress(EntryNotFoundError):  # feature extractors have none
                    _fetch(model, f"{name}/{file}", revision, local_files_only)
        _fetch_extras(model, index, revision, local_files_only)
    except (OSError, ValueError) as error:
        raise _unreachable(model, error) from error
    return folder


def _fetch_extras(model: str, index: Mapping[str, Any], revision: str | None, local_files_only: bool) -> None:
    """Our own files, which diffusers does not know of; most models have none."""
    denoisers = dict.fromkeys(name for family in FAMILIES.values() for name in turns.names(index, family))
    for name in (DEFAULTS, *(f"{denoiser}/{MANIFEST}" for denoiser in denoisers)):
        with contextlib.suppress(EntryNotFoundError):
            _fetch(model, name, revision, local_files_only)


def _fetch(model: str, name: str, revision: str | None, local_files_only: bool) -> Path:
    return Path(str(hf_hub_download(model, name, revision=revision, local_files_only=local_files_only)))


def _unreachable(model: str, error: Exception) -> Exception:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return ResourceError(f"{model}: the disk is full; set HF_HOME to a larger one")
    if "necessary `safetensors` weights" in str(error):  # diffusers'
        return ModelError(f"{model} has no weights as safetensors on the Hub; {CONVERT}")
    return ModelError(
        f"{model} is neither a folder here nor a model that can be fetched from the Hub: {first_line(error)}; "
        "check the spelling and the network, log in with `hf auth login` if it is gated, "
        "and unset HF_HUB_OFFLINE if it was never fetched"
    )
