"""Result folders: whole or absent."""

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from obsdiff.folders import copy, new_folder, partial_of
from obsdiff_runtime.errors import ConfigError


def finish(path: Path, text: str, *, force: bool = False) -> None:
    with new_folder(path, force=force) as partial:
        (partial / "obsdiff.json").write_text(text)


def test_a_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a" / "out"
    with new_folder(path) as partial:
        (partial / "file").write_text("x")
        assert not path.exists()
    assert (path / "file").read_text() == "x"
    assert [entry.name for entry in path.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o027, 0o640)])
def test_weights_can_be_read_by_whom_the_umask_lets(mask: int, expected: int, tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    blob.touch(0o600)
    before = os.umask(mask)
    try:
        with new_folder(tmp_path / "out") as partial:
            save_file({"a": torch.zeros(1)}, partial / "model.safetensors")
            os.link(blob, partial / "linked.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out" / "model.safetensors").stat().st_mode) == expected
    assert stat.S_IMODE(blob.stat().st_mode) == 0o600


def fail(path: Path, error: type[BaseException], *, keep_partial: bool = False) -> None:
    with new_folder(path, keep_partial=keep_partial) as partial:
        (partial / "first").write_text("x")
        raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_after_an_error_or_ctrl_c(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error):
        fail(tmp_path / "out", error)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_attempt_can_be_gone_on_with(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        fail(tmp_path / "out", RuntimeError, keep_partial=True)
    assert not (tmp_path / "out").exists()
    with new_folder(tmp_path / "out", keep_partial=True) as partial:
        assert (partial / "first").exists()
    assert (tmp_path / "out" / "first").exists()


def test_what_a_killed_run_left_is_not_mixed_in(tmp_path: Path) -> None:
    partial_of(tmp_path / "out").mkdir()
    (partial_of(tmp_path / "out") / "stale").touch()
    finish(tmp_path / "out", "new")
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["obsdiff.json"]


def test_an_existing_folder_is_an_error_before_any_work(tmp_path: Path) -> None:
    finish(tmp_path / "out", "old")
    with pytest.raises(ConfigError, match=r"out exists; .*--force"), new_folder(tmp_path / "out"):
        pytest.fail("the block ran")
    assert not partial_of(tmp_path / "out").exists()


def test_force_replaces_a_result_only_at_the_end(tmp_path: Path) -> None:
    finish(tmp_path / "out", "old")
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out", force=True):
        raise RuntimeError
    assert (tmp_path / "out" / "obsdiff.json").read_text() == "old"
    finish(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out" / "obsdiff.json").read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_force_leaves_alone_what_obsdiff_did_not_write(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    with pytest.raises(ConfigError, match="was not written by obsdiff"), new_folder(tmp_path / "thesis", force=True):
        pytest.fail("the block ran")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is no plain folder"), new_folder(tmp_path / "file", force=True):
        pytest.fail("the block ran")


def test_blobs_of_the_hubs_cache_are_linked_and_all_else_is_copied(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / "0123"
    blob.parent.mkdir()
    blob.write_text("x")
    (tmp_path / "model.safetensors").symlink_to(blob)
    copy(tmp_path / "model.safetensors", tmp_path / "linked")
    assert (tmp_path / "linked").samefile(blob)
    copy(blob, tmp_path / "copied")
    assert not (tmp_path / "copied").samefile(blob)
    assert (tmp_path / "copied").read_text() == "x"
