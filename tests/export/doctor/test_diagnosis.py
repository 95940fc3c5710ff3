"""What the doctor makes of machines that are described, not owned."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from obsdiff_export.asking import Outcome
from obsdiff_export.builders.rtx import KNOWN_TARGETS
from obsdiff_export.doctor import judge
from obsdiff_export.doctor.checks import Check
from obsdiff_export.doctor.examination import FORMATS, LIBRARIES, TO_EXPORT, Facts, asked_of
from obsdiff_export.doctor.host import Disk, Host, Jetson
from obsdiff_export.doctor.text import show

GIB = 2**30
ABSENT = {name: Outcome(value=None, failure=f"ModuleNotFoundError: No module named '{name}'") for name in LIBRARIES}
HOST = Host(
    system="Linux-6.8-x86_64-with-glibc2.39",
    machine="x86_64",
    python="3.12.3",
    cpu="a processor",
    cores=16,
    quota=None,
    memory_bytes=128 * GIB,
    available_bytes=100 * GIB,
    cuda_toolkit=None,
    container="",
    wsl=False,
    jetson=None,
    settings={},
    hub_token=False,
    disks={"output": Disk(folder="/data/out", free_bytes=900 * GIB, writable=True)},
)
ORIN = Jetson(model="NVIDIA Jetson AGX Orin", l4t="36.4.0", jetpack=6, tensorrt_pythons=("3.10",))


def gpus(*capabilities: str, cuda: str = "13.0", **changes: Any) -> Outcome:
    gpu = {"name": "NVIDIA X", "memory_bytes": 80 * GIB, "free_bytes": 79 * GIB, "processors": 132, "integrated": False}
    devices = [{**gpu, "capability": capability, **changes} for capability in capabilities]
    failure = "" if devices else "the driver sees no GPU"
    return Outcome(value={"driver": "580.65.06", "cuda": cuda, "devices": devices, "failure": failure}, failure="")


NO_DRIVER = Outcome(
    value={"driver": None, "cuda": None, "devices": [], "failure": "no CUDA driver is installed (libcuda.so.1)"},
    failure="",
)


def torch(cuda: str | None = "13.0", **changes: Any) -> Outcome:
    value = {"version": "2.13.0", "cuda": cuda, "cudnn": "91200", "usable": cuda is not None, "why": "", "threads": 16}
    value |= {"architectures": ["sm_75", "sm_80", "sm_90", "compute_120"], "cusparselt": True}
    return Outcome(value={**value, **changes}, failure="")


def plain(version: str) -> Outcome:
    return Outcome(value={"version": version}, failure="")


def ort(*providers: str) -> Outcome:
    return Outcome(value={"version": "1.31.1", "providers": [*providers, "CPUExecutionProvider"]}, failure="")


def ran(*names: str, **value: Any) -> dict[str, Outcome]:
    return {name: Outcome(value={"error": 1e-3, **value}, failure="") for name in names}


def facts(
    packages: dict[str, str] | None = None,
    host: Host = HOST,
    unmet: tuple[str, ...] = (),
    misfits: tuple[str, ...] = (),
    products: dict[str, Outcome] | None = None,
    **libraries: Outcome,
) -> Facts:
    """A machine without a GPU where the base install works; libraries by name change it."""
    works = {name: plain("1.0") for name in ("diffusers", "transformers", "onnx", "onnxscript", "polygraphy")}
    works |= {"gpus": NO_DRIVER, "torch": torch(None), "onnxruntime": ort()}
    return Facts(
        host=host,
        packages={"obsdiff": "0.1.0", "torch": "2.13.0", **(packages or {})},
        unmet=unmet,
        misfits=misfits,
        libraries={**ABSENT, **works, **libraries},
        products=products or {},
    )


def found(facts: Facts, name: str) -> Check:
    (check,) = [check for check in judge(facts).checks if check.name == name]
    return check


def faults(facts: Facts) -> dict[str, str]:
    return {check.name: check.finding for check in judge(facts).checks if check.status in ("warn", "problem")}


CUDA = Outcome(value={"version": "13.0.1", "device": {"name": "NVIDIA X", "capability": "9.0"}, "why": ""}, failure="")
H100 = {"gpus": gpus("9.0"), "torch": torch(), "onnxruntime": ort("CUDAExecutionProvider"), "cuda": CUDA}


def test_an_h100_with_tensorrt_has_no_faults_and_can_do_everything() -> None:
    machine = facts(packages={"tensorrt": "11.4.1", "tensorrt-cu13-libs": "11.4.1"}, tensorrt=plain("11.4.1"), **H100)
    assert faults(machine) == {}
    assert [ability.possible for ability in judge(machine).abilities] == [True, True, True, True]
    assert found(machine, "GPU 0").finding.startswith("NVIDIA X, compute capability 9.0, 80.0 GiB, 79.0 GiB free")
    assert found(machine, "sparse tensor cores").finding.startswith("tf32, fp16, bf16, int8, fp8")


def test_rtx_on_an_h100_is_a_warning_that_names_the_other_builder() -> None:
    check = found(facts(tensorrt_rtx=plain("1.7.1.116"), **H100), "TensorRT-RTX and the GPU")
    assert (check.status, check.advice) == ("warn", "pip install 'obsdiff[trt]'")
    export, engines, running, sparse = judge(facts(tensorrt_rtx=plain("1.7.1.116"), **H100)).abilities
    assert (export.possible, engines.possible, running.possible, sparse.possible) == (True, True, False, False)
    assert "they do not run on this machine" in engines.how


def test_without_a_gpu_the_main_job_runs_and_two_four_gains_nothing() -> None:
    machine = facts(tensorrt_rtx=plain("1.7.1.116"))
    assert judge(machine).ready
    assert faults(machine) == {}
    assert found(machine, "driver").status == "not here"
    assert not judge(machine).abilities[3].possible


@pytest.mark.parametrize(
    ("libraries", "name", "status", "words"),
    [
        ({"gpus": gpus("9.0", cuda="12.4"), "torch": torch(usable=False)}, "torch and the driver", "problem", "580"),
        ({"gpus": gpus("9.0"), "torch": torch(None)}, "torch and the GPU", "warn", "CUDA build of torch"),
        ({"gpus": gpus("6.1"), "torch": torch()}, "torch and the GPU", "problem", "built for this GPU"),
        (
            {"gpus": gpus("9.0"), "torch": torch(usable=False, why="CUDA error 802")},
            "torch and the GPU",
            "problem",
            "fits the driver",
        ),
    ],
)
def test_a_torch_that_cannot_use_the_gpu(libraries: dict[str, Outcome], name: str, status: str, words: str) -> None:
    check = found(facts(**libraries), name)
    assert check.status == status
    assert words in check.advice


@pytest.mark.parametrize("capability", ["8.7", "8.9", "9.0", "12.0", "12.1"])
def test_kernels_run_on_later_minors_and_portable_code_on_all_that_is_later(capability: str) -> None:
    assert found(facts(gpus=gpus(capability), torch=torch()), "torch and the GPU").status == "ok"


def test_an_older_minor_of_the_same_cuda_major_is_no_fault() -> None:
    machine = facts(gpus=gpus("9.0", cuda="13.0"), torch=torch("13.2"), onnxruntime=ort("CUDAExecutionProvider"))
    assert faults(machine) == {}


def test_both_onnxruntimes_are_told() -> None:
    machine = facts(packages={"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"})
    assert "pip uninstall onnxruntime onnxruntime-gpu" in found(machine, "onnxruntime twice").advice
    assert judge(machine).ready


def test_an_onnxruntime_for_processors_beside_a_gpu_is_told() -> None:
    machine = facts(gpus=gpus("9.0"), torch=torch())
    assert "obsdiff[gpu]" in found(machine, "onnxruntime and the GPU").advice


def test_the_provider_of_onnxruntime_cannot_use_tensorrt_11() -> None:
    libraries = {**H100, "onnxruntime": ort("TensorrtExecutionProvider", "CUDAExecutionProvider")}
    assert "onnxruntime and TensorRT" in faults(facts(tensorrt=plain("11.4.1"), **libraries))
    assert "onnxruntime and TensorRT" not in faults(facts(tensorrt=plain("10.13.3.9"), **libraries))


def test_tensorrt_of_an_old_release_or_of_mixed_parts_is_told() -> None:
    assert "10.1.0 is older than 10.3" in faults(facts(tensorrt=plain("10.1.0"), **H100))["TensorRT"]
    mixed = {"tensorrt-cu12-libs": "10.3.0", "tensorrt-cu12-bindings": "10.13.3.9", "tensorrt-rtx": "1.7.1.116"}
    finding = faults(facts(packages=mixed, tensorrt=plain("10.13.3.9"), **H100))["TensorRT's parts"]
    assert finding == "of different versions: tensorrt-cu12-bindings 10.13.3.9, tensorrt-cu12-libs 10.3.0"


def test_tensorrt_for_a_later_cuda_than_the_drivers_is_told() -> None:
    machine = facts(
        packages={"tensorrt-cu13-libs": "11.4.1"},
        tensorrt=plain("11.4.1"),
        gpus=gpus("8.6", cuda="12.4"),
        torch=torch("12.4"),
        onnxruntime=ort("CUDAExecutionProvider"),
    )
    check = found(machine, "TensorRT and the driver")
    assert check.advice == "update the driver to 580 or later, or install tensorrt for an older CUDA"


def test_tensorrt_that_does_not_load_is_a_problem_but_stops_no_export() -> None:
    broken = Outcome(value=None, failure="ImportError: libnvinfer.so.11: cannot open shared object file")
    machine = facts(tensorrt=broken)
    assert found(machine, "tensorrt").status == "problem"
    assert "libnvinfer.so.11" in found(machine, "tensorrt").finding
    assert judge(machine).ready


def test_engines_that_can_be_built_and_not_run_are_a_warning() -> None:
    machine = facts(tensorrt=plain("11.4.1"), **{**H100, "cuda": ABSENT["cuda"]})
    assert set(faults(machine)) == {"engines and cuda-python"}
    assert not judge(machine).abilities[2].possible


def test_a_cuda_python_that_does_not_reach_the_gpu_says_why() -> None:
    blind = Outcome(value={"version": "13.0.1", "device": None, "why": "no NVIDIA GPU can be used here"}, failure="")
    machine = facts(tensorrt=plain("11.4.1"), **{**H100, "cuda": blind})
    assert found(machine, "cuda-python and the GPU").finding == "no NVIDIA GPU can be used here"


def test_a_builder_without_polygraphy_builds_nothing() -> None:
    machine = facts(tensorrt_rtx=plain("1.7.1.116"), polygraphy=ABSENT["polygraphy"])
    assert "TensorRT-RTX and Polygraphy" in faults(machine)
    assert not judge(machine).abilities[1].possible


def test_tensorrt_11_on_jetpack_6_is_a_problem() -> None:
    machine = facts(host=replace(HOST, jetson=ORIN), gpus=gpus("8.7", integrated=True), tensorrt=plain("11.4.0"))
    assert found(machine, "TensorRT and JetPack").status == "problem"
    assert "Jetson AGX Orin, L4T 36.4.0 (JetPack 6)" in found(machine, "system").finding
    assert "80.0 GiB shared with the processor" in found(machine, "GPU 0").finding


def test_jetpacks_tensorrt_for_another_python_is_told() -> None:
    machine = facts(host=replace(HOST, jetson=ORIN, python="3.11.9"), gpus=gpus("8.7"))
    assert "installed for Python 3.10, this is 3.11" in found(machine, "TensorRT and Python").finding


@pytest.mark.parametrize("name", ["torch", "diffusers", "onnxruntime", "onnx"])
def test_what_the_main_job_needs_blocks_it(name: str) -> None:
    diagnosis = judge(facts(**{name: ABSENT[name]}))
    assert not diagnosis.ready
    assert diagnosis.abilities[0].how == f"first mend: {name}"


def test_requirements_that_are_not_met_block_the_main_job() -> None:
    diagnosis = judge(facts(unmet=("torch<2.14,>=2.9 is needed, 2.5.1 is installed",)))
    assert not diagnosis.ready
    assert diagnosis.abilities[0].how == "first mend: requirements"


def test_an_optional_package_of_a_version_that_is_not_taken_is_a_warning() -> None:
    machine = facts(misfits=("polygraphy>=0.50.3 is needed, 0.49.26 is installed",))
    assert found(machine, "versions").status == "warn"
    assert judge(machine).ready


def test_a_turing_card_has_no_sparse_tensor_cores() -> None:
    machine = facts(gpus=gpus("7.5"), torch=torch(), onnxruntime=ort("CUDAExecutionProvider"))
    assert "structured:0.25" in found(machine, "sparse tensor cores").advice
    assert "no sparse tensor cores" in judge(machine).abilities[3].how


def test_gpus_of_two_kinds_and_a_gpu_in_use_are_told() -> None:
    machine = facts(
        gpus=gpus("8.6", "9.0", free_bytes=4 * GIB), torch=torch(), onnxruntime=ort("CUDAExecutionProvider")
    )
    assert set(faults(machine)) == {"mixed GPUs", "GPU 0", "GPU 1"}


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"container": "docker"}, "--gpus all"),
        ({"settings": {"CUDA_VISIBLE_DEVICES": "7"}}, "is CUDA_VISIBLE_DEVICES=7 right?"),
        ({}, "nvidia-smi"),
    ],
)
def test_a_driver_without_a_gpu_gets_the_likely_reason(changes: dict[str, Any], advice: str) -> None:
    check = found(facts(gpus=gpus(), host=replace(HOST, **changes)), "driver")
    assert check.status == "problem"
    assert advice in check.advice


def test_a_probe_of_the_driver_that_crashes_is_a_finding() -> None:
    machine = facts(gpus=Outcome(value=None, failure="it crashed (SIGSEGV)"))
    assert "it crashed (SIGSEGV)" in found(machine, "driver").finding
    assert judge(machine).ready


def test_room_and_threads() -> None:
    full = Disk(folder="/data/out", free_bytes=GIB // 2, writable=True)
    sealed = Disk(folder="/tmp", free_bytes=GIB, writable=False)
    machine = facts(
        host=replace(
            HOST, available_bytes=GIB // 2, quota=2.0, disks={"output": full, "temp": sealed}
        )
    )  # fmt: skip
    assert set(faults(machine)) == {"memory", "processor", "disk, output", "disk, temp"}
    assert found(machine, "processor").advice == "set OMP_NUM_THREADS=2"
    assert judge(machine).abilities[0].how == "first mend: memory, disk, temp"


def test_threads_within_the_quota_are_no_fault() -> None:
    assert "processor" not in faults(facts(host=replace(HOST, quota=2.0, settings={"OMP_NUM_THREADS": "2"})))


def test_formats_that_ran_are_listed_and_what_they_were_computed_in() -> None:
    products = ran("onnxruntime/CPUExecutionProvider/fp32", computed_in="fp32")
    products |= ran("onnxruntime/CPUExecutionProvider/fp16", computed_in="fp32")
    products["onnxruntime/CPUExecutionProvider/bf16"] = Outcome(value=None, failure="NotImplemented: no kernel")
    check = found(facts(products=products), "ONNX Runtime CPUExecutionProvider")
    assert (check.status, check.finding) == ("ok", "fp32, fp16 (computed in fp32); not bf16")


@pytest.mark.parametrize("failure", ["ArithmeticError: the product is off by 3e-1", "it crashed (SIGSEGV)"])
def test_a_product_that_is_wrong_is_a_problem(failure: str) -> None:
    products = ran("torch/cuda/fp32") | {"torch/cuda/fp8": Outcome(value=None, failure=failure)}
    check = found(facts(products=products), "torch on the GPU")
    assert check.status == "problem"
    assert failure in check.finding


def test_a_provider_that_does_not_load_is_a_warning_with_its_reason() -> None:
    failure = "RuntimeError: it does not load: libcublasLt.so.13: cannot open shared object file"
    products = {f"onnxruntime/CUDAExecutionProvider/{form}": Outcome(value=None, failure=failure) for form in FORMATS}
    check = found(facts(products=products, **H100), "ONNX Runtime CUDAExecutionProvider")
    assert check.status == "warn"
    assert "libcublasLt.so.13" in check.finding


def test_a_processor_that_multiplies_nothing_blocks_the_main_job() -> None:
    products = {"torch/cpu/fp32": Outcome(value=None, failure="it crashed (SIGILL)")}
    assert judge(facts(products=products)).abilities[0].how == "first mend: torch on the processor"


def test_targets_that_build_the_same_formats_stand_together() -> None:
    products = {
        f"tensorrt_rtx/{target}/{form}": Outcome(value=None, failure="RuntimeError: no")
        if form == "fp8" and float(target) < 8.9
        else Outcome(value={"bytes": 1, "error": None}, failure="")
        for target in KNOWN_TARGETS
        for form in FORMATS
    }
    check = found(facts(products=products, tensorrt_rtx=plain("1.7")), "TensorRT-RTX ahead of time")
    assert check.finding == (
        "for 7.5, 8.0, 8.6: fp32, fp16, bf16, int8; for 8.9, 12.0, 12.1: fp32, fp16, bf16, int8, fp8 (built, not run)"
    )


def test_an_rtx_that_builds_nothing_is_a_problem_and_no_builder() -> None:
    failed = Outcome(value=None, failure="RuntimeError: the builder gave no plan")
    products = {f"tensorrt_rtx/{target}/{form}": failed for target in KNOWN_TARGETS for form in FORMATS}
    diagnosis = judge(facts(products=products, tensorrt_rtx=plain("1.7")))
    assert not diagnosis.abilities[1].possible
    assert "the builder gave no plan" in faults(diagnosis.facts)["TensorRT-RTX ahead of time"]


def test_the_text_has_every_finding_and_no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    cache = Disk(folder=str(tmp_path / ".cache"), free_bytes=9 * GIB, writable=True)
    broken = Outcome(value=None, failure=f"ImportError: {tmp_path}/lib/libnvinfer.so: [wrong] ELF class")
    machine = facts(
        host=replace(HOST, disks={"cache": cache}, settings={"HF_ENDPOINT": "https://inner.example"}), tensorrt=broken
    )
    sink = io.StringIO()
    diagnosis = judge(machine)
    show(diagnosis, Console(file=sink, width=500))
    text = sink.getvalue()
    assert str(tmp_path) not in text + str(diagnosis.to_json()["checks"])
    assert "~/lib/libnvinfer.so: [wrong] ELF class" in text
    assert "inner.example" not in text
    for check in diagnosis.checks:
        assert check.name in text


def test_where_torch_is_not_wanted_its_absence_is_no_fault() -> None:
    libraries = {name: ABSENT[name] for name in TO_EXPORT}
    machine = replace(
        facts(packages={"tensorrt": "10.3.0"}, tensorrt=plain("10.3.0"), **{**H100, **libraries}),
        program="obsdiff-engines",
    )
    machine = replace(machine, libraries={name: machine.libraries[name] for name in asked_of(machine.program)})
    diagnosis = judge(machine)
    assert diagnosis.ready
    assert [ability.name for ability in diagnosis.abilities] == ["build engines", "run engines", "run 2:4 kernels"]
    assert faults(machine) == {}
    assert not {check.name for check in diagnosis.checks} & set(TO_EXPORT)
    small = replace(HOST, available_bytes=GIB // 2, disks={"cache": Disk(folder="/hub", free_bytes=0, writable=False)})
    found = {check.name: check for check in judge(replace(machine, host=small)).checks}
    assert found["memory"].status == "warn"
    assert "obsdiff plan" not in found["memory"].advice
    assert "disk, cache" not in found
    bare = replace(machine, libraries={**machine.libraries, "tensorrt": ABSENT["tensorrt"]})
    assert not judge(bare).ready
    assert "pip install 'obsdiff-engines[trt]' beside an NVIDIA GPU" in judge(bare).abilities[0].how
