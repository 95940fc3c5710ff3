"""The files of machines, laid out in a folder."""

import os
from pathlib import Path

import pytest

from obsdiff_export.doctor.host import hub_folder, read_host

RELEASE = (
    "# R36 (release), REVISION: 4.0, GCID: 37537400, BOARD: generic, EABI: aarch64, DATE: Fri Sep 13 04:36:44 UTC\n"
)


def lay(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_jetson_is_known_by_its_release_file(tmp_path: Path) -> None:
    root = lay(
        tmp_path,
        {
            "etc/nv_tegra_release": RELEASE,
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano\0",
            "usr/lib/python3.10/dist-packages/tensorrt/__init__.py": "",
            "usr/local/cuda/version.json": '{"cuda" : {"name" : "CUDA SDK", "version" : "12.6.11"}}',
        },
    )
    host = read_host(tmp_path, root=root, environment={})
    assert host.jetson is not None
    assert (host.jetson.model, host.jetson.l4t, host.jetson.jetpack) == ("NVIDIA Jetson Orin Nano", "36.4.0", 6)
    assert host.jetson.tensorrt_pythons == ("3.10",)
    assert host.cuda_toolkit == "12.6.11"
    assert not host.wsl


@pytest.mark.parametrize(
    ("files", "environment", "kind"),
    [
        ({".dockerenv": ""}, {}, "docker"),
        ({"run/.containerenv": ""}, {}, "podman"),
        ({}, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "kubernetes"),
        ({}, {"container": "lxc"}, "lxc"),
        ({}, {}, ""),
    ],
)
def test_containers_are_told_apart(
    tmp_path: Path, files: dict[str, str], environment: dict[str, str], kind: str
) -> None:
    assert read_host(tmp_path, root=lay(tmp_path, files), environment=environment).container == kind


def test_the_control_groups_limits_count(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/cpu.max": "150000 100000\n",
        "sys/fs/cgroup/memory.max": "1000000000\n",
        "sys/fs/cgroup/memory.current": "400000000\n",
    }
    host = read_host(tmp_path, root=lay(tmp_path, files), environment={})
    assert (host.quota, host.memory_bytes, host.available_bytes) == (1.5, 1_000_000_000, 600_000_000)


def test_no_limit_is_no_limit(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/cpu.max": "max 100000\n", "sys/fs/cgroup/memory.max": "max\n"}
    host = read_host(tmp_path, root=lay(tmp_path, files), environment={})
    assert host.quota is None
    assert host.memory_bytes > 0


def test_wsl_is_known_by_its_kernel(tmp_path: Path) -> None:
    files = {"proc/version": "Linux version 5.15.167.4-microsoft-standard-WSL2"}
    assert read_host(tmp_path, root=lay(tmp_path, files), environment={}).wsl


def test_the_hubs_folder_follows_its_variables() -> None:
    assert hub_folder({"HF_HUB_CACHE": "/a"}) == Path("/a")
    assert hub_folder({"HF_HOME": "/b"}) == Path("/b/hub")
    assert hub_folder({"XDG_CACHE_HOME": "/c"}) == Path("/c/huggingface/hub")
    assert hub_folder({}) == Path.home() / ".cache/huggingface/hub"


def test_a_token_is_told_of_and_not_told(tmp_path: Path) -> None:
    host = read_host(tmp_path, root=tmp_path, environment={"HF_TOKEN": "hf_secret", "HF_HOME": str(tmp_path)})
    assert host.hub_token
    assert "hf_secret" not in repr(host)
    (tmp_path / "token").write_text("hf_other")
    assert read_host(tmp_path, root=tmp_path, environment={"HF_HOME": str(tmp_path)}).hub_token


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="nothing is read-only to an administrator")
def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert not read_host(tmp_path, root=tmp_path, environment={}).disks["output"].writable


def test_a_folder_that_is_not_there_yet_is_asked_through_its_parent(tmp_path: Path) -> None:
    disk = read_host(tmp_path / "not" / "yet", root=tmp_path, environment={}).disks["output"]
    assert disk.writable
    assert disk.free_bytes > 0
