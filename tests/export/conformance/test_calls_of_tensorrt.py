"""Everything that is asked of TensorRT is in every version that is supported, or tested for where it is used.

The versions are what record.py wrote down of the real bindings: 10.3 (JetPack 6), 10.13 and 11.4, and TensorRT-RTX.
"""

import ast
from pathlib import Path

import pytest
from vendor_calls import MODULE, Surface, accesses, missing, names_used, surfaces

ROOT = Path(__file__).parents[3]
TENSORRT = surfaces("tensorrt")
RTX = surfaces("tensorrt_rtx")
EVERY = [*TENSORRT, *RTX]
OBJECTS = {
    "trt": MODULE,
    "vendor": MODULE,
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "engine": "ICudaEngine",
    "inspector": "EngineInspector",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "refitter": "Refitter",
    "runtime": "Runtime",
    "self._context": "IExecutionContext",
    "self._engine": "ICudaEngine",
    "self._runtime": "Runtime",
}
"""What the names mean, in the modules below, that no assignment tells."""

MODULES: dict[str, tuple[list[Surface], dict[str, str]]] = {
    "export/obsdiff_export/builders/polygraph.py": (EVERY, {**OBJECTS, "error": "ParserError"}),
    "export/obsdiff_export/builders/tensorrt.py": (TENSORRT, OBJECTS),
    "export/obsdiff_export/builders/rtx.py": (RTX, OBJECTS),
    "export/obsdiff_export/probes/engines.py": (EVERY, OBJECTS),
    "export/obsdiff_export/refitting.py": (EVERY, OBJECTS),
    "runtime/obsdiff_runtime/backends/trt.py": (EVERY, {"vendor": MODULE}),
    "runtime/obsdiff_runtime/backends/engine.py": (EVERY, OBJECTS),
}
"""Modules that call TensorRT -> the versions they meet, and their objects. A new one is a line here."""

CASES = [
    pytest.param(path, surface, roots, id=f"{Path(path).stem}-{surface}")
    for path, (met, roots) in MODULES.items()
    for surface in met
]


def test_the_versions_are_those_that_are_supported() -> None:
    assert [surface.name for surface in TENSORRT] == ["tensorrt-10.13.3.9", "tensorrt-10.3.0", "tensorrt-11.4.0.106"]
    assert len(RTX) == 1


@pytest.mark.parametrize(("path", "surface", "roots"), CASES)
def test_what_is_called_exists_or_is_tested_for(path: str, surface: Surface, roots: dict[str, str]) -> None:
    absent = missing((ROOT / path).read_text(encoding="utf-8"), surface, roots)
    assert not absent, f"{path} with {surface}: {'; '.join(map(str, absent))}"


def test_no_module_calls_tensorrt_unseen() -> None:
    for folder in ("export", "runtime", "obsdiff", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            text = path.read_text(encoding="utf-8")
            if not any(word in text for word in ("trt", "vendor", "tensorrt")):
                continue
            if {"trt", "vendor", "tensorrt", "tensorrt_rtx"} & names_used(text) - _own_modules(path):
                assert name in MODULES, f"{name} calls TensorRT; add it to MODULES"


def _own_modules(path: Path) -> set[str]:
    """Names that `from obsdiff... import` brings in, such as our own module trt."""
    return {
        alias.asname or alias.name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("obsdiff")
        for alias in node.names
    }


def test_the_calls_are_really_followed() -> None:
    path = "runtime/obsdiff_runtime/backends/engine.py"
    source = (ROOT / path).read_text(encoding="utf-8")
    seen = {(access.owner, access.name) for access in accesses(source, TENSORRT[0], MODULES[path][1])}
    assert ("IExecutionContext", "execute_async_v3") in seen
    assert ("ICudaEngine", "num_io_tensors") in seen
    assert ("TensorIOMode", "INPUT") in seen
    path = "export/obsdiff_export/builders/tensorrt.py"
    source = (ROOT / path).read_text(encoding="utf-8")
    seen = {(access.owner, access.name) for access in accesses(source, TENSORRT[0], MODULES[path][1])}
    assert ("EngineInspector", "get_engine_information") in seen
    assert ("LayerInformationFormat", "JSON") in seen


@pytest.mark.parametrize(
    ("line", "absent_in"),
    [
        ("config.set_flag(trt.BuilderFlag.FP16)", ["tensorrt-11.4.0.106", "tensorrt_rtx-1.7.1.116"]),
        ("engine.weight_streaming_budget", ["tensorrt-11.4.0.106", "tensorrt_rtx-1.7.1.116"]),
        ("trt.Runtime(logger).deserialize_cuda_engine(plan).no_such_thing()", [surface.name for surface in EVERY]),
        ("inspector = engine.create_engine_inspector(); inspector.get_layers()", [surface.name for surface in EVERY]),
        ("config.no_such_setting = 3", [surface.name for surface in EVERY]),
        ("self._engine.device_memory_size", ["tensorrt-11.4.0.106", "tensorrt_rtx-1.7.1.116"]),
        ("engine.get_engine_stat(trt.EngineStat.TOTAL_WEIGHTS_SIZE)", ["tensorrt-10.13.3.9", "tensorrt-10.3.0"]),
        ("engine.get_engine_stat() if hasattr(engine, 'get_engine_stat') else None", []),
        ("getattr(trt, 'EngineStat', None)", []),
        ("getattr(trt.BuilderFlag, 'EDITABLE_TIMING_CACHE')", ["tensorrt-10.3.0"]),
        ("config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)", []),
    ],
)
def test_a_call_that_a_version_lacks_is_found(line: str, absent_in: list[str]) -> None:
    source = f"def work(self, trt, config, engine, plan, logger):\n    {line}\n"
    assert [surface.name for surface in EVERY if missing(source, surface, OBJECTS)] == sorted(absent_in)


def test_a_feature_that_is_there_excuses_nothing() -> None:
    source = """
def work(trt, engine):
    if getattr(trt, "CudaGraphStrategy", None) is not None:
        engine.create_runtime_config().no_such_setting = 1
"""
    assert [str(surface) for surface in EVERY if missing(source, surface, OBJECTS)] == ["tensorrt_rtx-1.7.1.116"]


def test_what_the_runtime_declares_is_in_every_version() -> None:
    from obsdiff_runtime.backends.engine import VENDOR_NAMES

    for surface in EVERY:
        for owner, names in VENDOR_NAMES.items():
            absent = [name for name in names if name not in surface.names[owner]]
            assert not absent, f"{surface}: {owner} has no {absent}"


def test_what_the_runtime_asks_of_cuda_is_in_every_cuda_python() -> None:
    from obsdiff_runtime.cuda import RUNTIME_NAMES

    found = surfaces("cuda")
    assert [surface.name for surface in found] == ["cuda-12.3.0", "cuda-12.8.0", "cuda-13.5.0"]
    for surface in found:
        absent = [name for name in RUNTIME_NAMES if name not in surface.names[""]]
        assert not absent, f"{surface} has no {absent}"


def test_the_runtime_declares_all_that_it_asks_of_cuda() -> None:
    from obsdiff_runtime.cuda import RUNTIME_NAMES

    source = (ROOT / "runtime/obsdiff_runtime/cuda.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    spoken = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    declared = ast.unparse(next(
        node for node in tree.body if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "RUNTIME_NAMES"
    ))  # fmt: skip
    asked = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr.startswith("cuda")}
    functions = {name for name in asked | spoken if name.startswith("cuda") and surfaces("cuda")[0].names[""].get(name)}
    assert functions <= set(RUNTIME_NAMES), declared
    members = {
        name
        for name in asked
        for surface in surfaces("cuda")
        if name not in surface.names[""] and not surface.has(name)
    }
    assert not members
