"""What the machine tells of itself, from files that are laid out for it and from the machine at hand."""

import os
import sys
from pathlib import Path

import pytest

from obsdiff_runtime import vitals
from obsdiff_runtime.vitals import CpuTime, CpuVitals, cpu_time, cpu_vitals, others_cores


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_what_others_took_is_the_busy_time_less_one_s_own() -> None:
    before = CpuTime(at=100.0, busy=50.0, own=10.0)
    assert others_cores(before, CpuTime(at=104.0, busy=57.0, own=16.0)) == 0.25
    assert others_cores(before, CpuTime(at=104.0, busy=55.9, own=16.0)) == 0  # both clocks tick in hundredths
    assert others_cores(before, None) is None


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_busy_time_leaves_out_idle_and_waiting_cores(tmp_path: Path) -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    fields = [
        1,
        2,
        3,
        1000,
        1000,
        4,
        5,
        6,
        1000,
        1000,
    ]  # user nice system idle iowait irq softirq steal guest guest_nice
    found = cpu_time(write(tmp_path, {"proc/stat": f"cpu  {' '.join(map(str, fields))}\ncpu0 9 9 9\n"}))
    assert found is not None
    assert found.busy == (1 + 2 + 3 + 4 + 5 + 6) / ticks
    assert found.own > 0


def test_clocks_come_from_sysfs_else_from_cpuinfo_else_from_nowhere(tmp_path: Path) -> None:
    assert cpu_vitals(tmp_path) == CpuVitals(mhz=None, max_mhz=None, governor=None)
    write(tmp_path, {"proc/cpuinfo": "cpu MHz\t\t: 2000.5\nflags\t: fpu\ncpu MHz\t\t: 3000.5\n"})
    assert cpu_vitals(tmp_path) == CpuVitals(mhz=2500.5, max_mhz=None, governor=None)
    for core, mhz in ((0, 1500), (1, 2500)):
        folder = f"sys/devices/system/cpu/cpu{core}/cpufreq"
        write(
            tmp_path,
            {
                f"{folder}/scaling_cur_freq": f"{mhz}000\n",
                f"{folder}/cpuinfo_max_freq": "3500000\n",
                f"{folder}/scaling_governor": "performance\n",
            },
        )
    assert cpu_vitals(tmp_path) == CpuVitals(mhz=2000.0, max_mhz=3500.0, governor="performance")


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_this_process_s_memory_and_work_are_told() -> None:
    before, resident = cpu_time(), vitals.resident_bytes()
    ballast = b"x" * (64 * 2**20)
    after, grown = cpu_time(), vitals.resident_bytes()
    assert before is not None
    assert after is not None
    assert after.own >= before.own
    assert after.at > before.at
    assert resident is not None
    assert grown is not None
    assert grown - resident > len(ballast) / 2


def test_a_gpu_that_is_not_there_has_no_vitals() -> None:
    assert vitals.managed_gpu(1000) is None
