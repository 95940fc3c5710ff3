"""Our builders and the installed Polygraphy run against modules that have what each version has, and nothing else.

What the walker of test_calls_of_tensorrt cannot see, because it is behind names or inside Polygraphy, fails here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from vendor_calls import Surface, surfaces

pytest.importorskip("polygraphy")

SHAPES = {"x": {"min": [1, 64], "opt": [2, 64], "max": [4, 64]}}
FLAGS: dict[str, dict[str, Any]] = {
    "sparse": {"sparse": True},
    "refit": {"refit": "yes"},
    "stripped": {"refit": "stripped"},
    "streaming": {"weight_streaming": True, "optimization_level": 3},
    "tf32": {"tf32": True},
}


def build(surface: Surface, folder: Path, package: str, builder: str, targets: list[str]) -> dict[str, dict[str, Any]]:
    """What was called for each of FLAGS."""
    (folder / "cache").write_bytes(b"timings")
    request = {
        "builder": builder,
        "onnx": "model.onnx",
        "plan": "plan",
        "answer": "answer.json",
        "layers": "layers.json",
        "data": "data",
        "timing_cache": "cache",
        "profiles": [SHAPES, SHAPES],
        "targets": targets,
    }
    (folder / "requests.json").write_text(json.dumps([{**request, "flags": flags} for flags in FLAGS.values()]))
    script = Path(__file__).with_name("fake_vendor.py")
    environment = {**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1" if package == "tensorrt_rtx" else "0"}
    command = [sys.executable, str(script), surface.name, package, builder, "requests.json"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return dict(zip(FLAGS, json.loads(ran.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("surface", surfaces("tensorrt"), ids=str)
def test_tensorrt_builds_with_every_flag(surface: Surface, tmp_path: Path) -> None:
    told = build(surface, tmp_path, "tensorrt", "obsdiff_export.builders.tensorrt:TensorRt", ["9.0"])
    assert {one["plan"] for one in told.values()} == {"a plan"}
    flags = {name: _flags(one["calls"]) for name, one in told.items()}
    assert "SPARSE_WEIGHTS" in flags["sparse"]
    assert "SPARSE_WEIGHTS" not in flags["tf32"]
    assert flags["refit"] >= {"REFIT"}
    assert flags["stripped"] >= {"REFIT", "STRIP_PLAN"}
    assert flags["streaming"] >= {"WEIGHT_STREAMING"}
    assert "TF32" in flags["tf32"]
    assert all("TF32" not in flags[name] for name in FLAGS if name != "tf32")
    assert _values(told["streaming"]["calls"], "IBuilderConfig.builder_optimization_level =") == ["3"]
    assert _strongly_typed(surface) & _network_flags(told["sparse"]["calls"])
    assert len(_values(told["sparse"]["calls"], "IBuilderConfig.add_optimization_profile")) == 2
    assert (tmp_path / "layers.json").read_text() == '{"Layers": []}'


@pytest.mark.parametrize("surface", surfaces("tensorrt_rtx"), ids=str)
def test_rtx_builds_for_every_target(surface: Surface, tmp_path: Path) -> None:
    told = build(surface, tmp_path, "tensorrt_rtx", "obsdiff_export.builders.rtx:Rtx", ["8.6", "12.0"])
    targets = [call for call in told["sparse"]["calls"] if call[0] == "IBuilderConfig.set_compute_capability"]
    assert [call[2:] for call in targets][-2:] == [["SM86", "0"], ["SM120", "1"]]
    assert "SPARSE_WEIGHTS" in _flags(told["sparse"]["calls"])


def _flags(calls: list[list[str]]) -> set[str]:
    """Builder flags that are set at the end."""
    found: set[str] = set()
    for name, *arguments in calls:
        if name == "IBuilderConfig.set_flag":
            found.add(arguments[-1])
        elif name == "IBuilderConfig.clear_flag":
            found.discard(arguments[-1])
    return found


def _values(calls: list[list[str]], name: str) -> list[str]:
    return [call[-1] for call in calls if call[0] == name]


def _network_flags(calls: list[list[str]]) -> int:
    (flags,) = _values(calls, "Builder.create_network")
    return int(flags.removeprefix("flags="))


def _strongly_typed(surface: Surface) -> int:
    """The bit that the fake gives this flag."""
    members = surface.names["NetworkDefinitionCreationFlag"]
    names = sorted(name for name, kind in members.items() if kind == "NetworkDefinitionCreationFlag")
    return 1 << names.index("STRONGLY_TYPED")
