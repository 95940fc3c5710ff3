"""Tiny random diffusers pipelines and the bundles made of them; everything heavy is imported when it is used.

Pipelines share networks, and a network is exported once. Its weights depend on nothing but what it is, so that the
processes of pytest-xdist share bundles too.
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from networks.cut.bundles import write_bundle
from networks.cut.pipelines import FILMS, LIKE, OTHERS, OWN, PIPELINES
from networks.cut.readers import clip_tokenizer, llama_tokenizer, t5_tokenizer


@pytest.fixture(scope="session", params=[name for name in PIPELINES if name not in FILMS])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A tiny random diffusers pipeline of pictures and its bundle, one pair for each way of sampling."""
    return _pair(request.param, tmp_path_factory)


@pytest.fixture(scope="session")
def sd_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("sd", tmp_path_factory)


@pytest.fixture(scope="session")
def lcm_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("lcm", tmp_path_factory)


@pytest.fixture(scope="session")
def pixart_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("pixart_alpha", tmp_path_factory)


@pytest.fixture(scope="session")
def sana_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("sana", tmp_path_factory)


@pytest.fixture(scope="session")
def sana_sprint_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("sana_sprint", tmp_path_factory)


@pytest.fixture(scope="session")
def controlnet_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("controlnet", tmp_path_factory)


@pytest.fixture(scope="session")
def chroma_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("chroma", tmp_path_factory)


@pytest.fixture(scope="session")
def flux2_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("flux2", tmp_path_factory)


@pytest.fixture(scope="session")
def flux2_dev_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("flux2_dev", tmp_path_factory)


@pytest.fixture(scope="session")
def qwen_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("qwen", tmp_path_factory)


@pytest.fixture(scope="session")
def qwen_edit_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("qwen_edit", tmp_path_factory)


@pytest.fixture(scope="session")
def qwen_edit_first_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("qwen_edit_first", tmp_path_factory)


@pytest.fixture(scope="session")
def lumina2_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("lumina2", tmp_path_factory)


@pytest.fixture(scope="session")
def zimage_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("zimage", tmp_path_factory)


@pytest.fixture(scope="session")
def auraflow_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("auraflow", tmp_path_factory)


@pytest.fixture(scope="session")
def hunyuan_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("hunyuan", tmp_path_factory)


@pytest.fixture(scope="session")
def dit_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("dit", tmp_path_factory)


@pytest.fixture(scope="session")
def kontext_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("kontext", tmp_path_factory)


@pytest.fixture(scope="session")
def wan_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("wan", tmp_path_factory)


@pytest.fixture(scope="session")
def ltx_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("ltx", tmp_path_factory)


@pytest.fixture(scope="session")
def ltx_condition_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("ltx_condition", tmp_path_factory)


@pytest.fixture(scope="session")
def wan_ti2v_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("wan_ti2v", tmp_path_factory)


@pytest.fixture(scope="session")
def wan22_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("wan22", tmp_path_factory)


@pytest.fixture(scope="session")
def wan_flf2v_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("wan_flf2v", tmp_path_factory)


@pytest.fixture(scope="session")
def wan22_i2v_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return _pair("wan22_i2v", tmp_path_factory)


@pytest.fixture(scope="session")
def sd3_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _pair("sd3", tmp_path_factory)[1]


@pytest.fixture
def make_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """make_bundle(a key of PIPELINES): its bundle."""
    return lambda name: _pair(name, tmp_path_factory)[1]


@pytest.fixture
def make_pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """make_pair(a key of PIPELINES): it and its bundle."""
    return lambda name: _pair(name, tmp_path_factory)


_PAIRS: dict[str, tuple[Any, Path]] = {}


def _pair(name: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    import torch

    if name not in _PAIRS:
        torch.set_num_threads(1)
        pipeline = {**PIPELINES, **OTHERS}[name]()
        pipeline.set_progress_bar_config(disable=True)
        place = _shared(tmp_path_factory) / name
        folder = place / "bundle"
        with _only_here(place):
            if not (folder / "obsdiff.json").exists():
                shutil.rmtree(folder, ignore_errors=True)
                like = _pair(LIKE[name], tmp_path_factory)[1] if name in LIKE else None
                write_bundle(pipeline, folder, like=like, own=OWN.get(name, ()))
        _PAIRS[name] = pipeline, folder
    return _PAIRS[name]


def _shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run of the tests, whichever of its processes asks."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "bundles"
    folder.mkdir(exist_ok=True)
    return folder


@contextmanager
def _only_here(place: Path) -> Iterator[None]:
    """No other process is in such a block with the same place meanwhile."""
    with place.with_name(f"{place.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture
def make_clip_tokenizer() -> Callable[..., Any]:
    return clip_tokenizer


@pytest.fixture
def make_t5_tokenizer() -> Callable[[], Any]:
    return t5_tokenizer


@pytest.fixture
def make_llama_tokenizer() -> Callable[[], Any]:
    return llama_tokenizer
