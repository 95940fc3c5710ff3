import dataclasses
from pathlib import Path

import pytest

from obsdiff.settings import FIELDS, Settings, gather, save, validate
from obsdiff_runtime.errors import ConfigError


def test_flags_win_over_the_file_and_assignments_over_flags(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text('sparsity = "2:4"\nsteps = 10\nseed = 1\n')
    settings = gather({"steps": 12, "seed": None}, config=config, assignments=["seed=7"])
    assert (settings.sparsity, settings.steps, settings.seed) == ("2:4", 12, 7)


@pytest.mark.parametrize("suffix", [".toml", ".yaml"])
def test_saved_settings_read_back_equal(tmp_path: Path, suffix: str) -> None:
    settings = Settings(
        model='a "quoted" \\ path',
        sparsity="2:4",
        include=["*.ff.*"],
        damp=0.02,
        trt=True,
        method_options={"block": 64},
    )
    save(settings, tmp_path / f"run{suffix}")
    assert gather({}, config=tmp_path / f"run{suffix}") == settings


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="sparsty: no such setting; did you mean sparsity"):
        validate({"sparsty": "2:4"})


def test_a_value_of_the_wrong_type_names_the_setting() -> None:
    with pytest.raises(ConfigError, match=r"steps: .*integer.* 'many'"):
        validate({"steps": "many"})


def test_assignments_reach_into_tables() -> None:
    assert gather({}, assignments=["method_options.block=64"]).method_options == {"block": 64}
    with pytest.raises(ConfigError, match="expected key=value"):
        gather({}, assignments=["steps"])


@pytest.mark.parametrize(("name", "text"), [("a.toml", "x = ["), ("a.yaml", "x: ["), ("a.toml", ""), ("b.yaml", "- 1")])
def test_a_broken_file_is_one_line(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    if not text:
        assert gather({}, config=tmp_path / name) == Settings()
        return
    with pytest.raises(ConfigError, match="--config") as caught:
        gather({}, config=tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: No such file"):
        gather({}, config=tmp_path / "none.toml")


def test_every_setting_has_a_help_text_and_no_value_by_default() -> None:
    for field in FIELDS.values():
        assert len(field.type.__metadata__[0]) > 10
    assert all(getattr(Settings(), field.name) is None for field in dataclasses.fields(Settings))
