from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from obsdiff.defaults import Defaults
from obsdiff.families.table import FAMILIES
from obsdiff.groups import Consumer, Group, LinearSpec, Producer
from obsdiff.recipe import (
    Recipe,
    calibration_prompts,
    evaluation_prompts,
    parse_blocks,
    parse_bytes,
    read_prompts,
    select,
)
from obsdiff.resolving import resolve
from obsdiff.settings import Settings
from obsdiff.sparsity import parse
from obsdiff_runtime.errors import ConfigError


def recipe(**changes: Any) -> Recipe:
    defaults = Defaults(
        num_inference_steps=2, guidance_scale=1.0, height=8, width=8, max_sequence_length=None, prompts=None
    )
    settings = Settings(sparsity="2:4", protect_first=0, protect_last=0)
    resolved = resolve(settings, model="m", family=FAMILIES["sd3"], defaults=defaults, prompts=("a", "b"))
    return replace(resolved, **changes)


LINEARS = tuple(
    LinearSpec(
        name=f"blocks.{block}.{name}", block=block, tier=tier, reads=f"{block}{tier}",
        in_features=8, out_features=8, tokens="image",
    )
    for block in range(4)
    for tier, name in enumerate(("ff.in", "ff.out"))
)  # fmt: skip
GROUPS = tuple(
    Group(
        name=f"blocks.{block}.ff", kind="ffn", block=block, units=8, width=1,
        producers=(Producer(name=f"blocks.{block}.ff.in"),), consumers=(Consumer(name=f"blocks.{block}.ff.out"),),
    )
    for block in range(4)
)  # fmt: skip


def names(**changes: Any) -> tuple[list[str], list[str]]:
    linears, groups = select(recipe(**changes), LINEARS, GROUPS)
    return [linear.name for linear in linears], [group.name for group in groups]


def test_globs_and_block_ranges_select_linears_and_whole_groups() -> None:
    assert len(names()[0]) == 8
    assert names(include=("*.0.*",))[0] == ["blocks.0.ff.in", "blocks.0.ff.out"]
    assert names(exclude=("*.ff.in",)) == ([f"blocks.{block}.ff.out" for block in range(4)], [])
    assert names(blocks=((1, 2),))[1] == ["blocks.1.ff", "blocks.2.ff"]


def test_protected_blocks_keep_their_units_but_not_their_weights() -> None:
    linears, groups = names(protect_first=1, protect_last=1)
    assert len(linears) == 8
    assert groups == ["blocks.1.ff", "blocks.2.ff"]


def test_a_pattern_that_matches_nothing_names_a_linear_that_exists() -> None:
    with pytest.raises(ConfigError, match=r"--exclude 'blocks.0.attn' matches no linear.*blocks.0.ff"):
        names(exclude=("blocks.0.attn",))
    with pytest.raises(ConfigError, match="--blocks 7-9: the denoiser has blocks 0 to 3"):
        names(blocks=((7, 9),))
    with pytest.raises(ConfigError, match="leave no linear"):
        names(include=("*.0.*",), exclude=("*.0.*",))


def test_block_ranges_are_inclusive() -> None:
    assert parse_blocks(["3", "2-24", "-3"]) == ((3, 3), (2, 24), (0, 3))
    assert parse_blocks(["5-"])[0][0] == 5
    for text in ("", "-", "a", "5-2"):
        with pytest.raises(ConfigError, match="--blocks"):
            parse_blocks([text])


def test_sizes_are_read_in_powers_of_1000_and_1024() -> None:
    assert parse_bytes("8GiB", "--x") == 8 * 2**30
    assert parse_bytes("500 MB", "--x") == 500_000_000
    with pytest.raises(ConfigError, match="--x lots"):
        parse_bytes("lots", "--x")


def test_an_empty_or_missing_prompts_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name, message in (("empty", "holds no prompt"), ("binary", "not UTF-8"), ("none", "No such file")):
        with pytest.raises(ConfigError, match=message):
            read_prompts(tmp_path / f"{name}.txt")


@pytest.mark.parametrize("wanted", [-1, 0, 2**40])
def test_no_prompts_and_more_than_anybody_has_are_an_error_at_once(wanted: int) -> None:
    with pytest.raises(ConfigError, match=rf"--num-samples should be at (least 1|most 100000), not {wanted}"):
        calibration_prompts(Settings(num_samples=wanted), "shapes")
    if wanted:  # 0 compares nothing
        with pytest.raises(ConfigError, match="--eval-prompts"):
            evaluation_prompts(Settings(eval_prompts=wanted), "shapes")


def test_the_digest_changes_with_anything_that_changes_the_result() -> None:
    assert recipe().digest() == recipe().digest()
    for change in ({"damp": 0.02}, {"prompts": ("a",)}, {"sparsity": parse("4:8")}, {"packages": 5}, {"draws": 7}):
        assert recipe(**change).digest() != recipe().digest()
