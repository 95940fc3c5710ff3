"""Writes down what vendors' packages offer, for the tests beside: classes, attributes, their types, parameters.

    pip download --no-deps -d wheels tensorrt-cu12-bindings==10.3.0      # and whatever else is to be recorded
    python tests/export/conformance/record.py wheels/*.whl               # needs gcc, no GPU and no TensorRT

The bindings of TensorRT link three libraries that take gigabytes. Nine functions of them are called at import or by
name only, so that empty libraries of these names are enough to read every class and signature. `tensorrt_rtx` is
recorded from the environment, with its real libraries: `record.py tensorrt_rtx`. cuda-python imports without a driver
(its cuda-pathfinder must be installed); Polygraphy is read from its sources.
"""

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

SURFACES = Path(__file__).parent / "surfaces"
SYMBOLS = (
    *("createInferBuilder_INTERNAL", "createInferRuntime_INTERNAL", "createInferRefitter_INTERNAL"),
    *("createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getBuilderPluginRegistry"),
    *("getPluginRegistry", "getNvOnnxParserVersion", "initLibNvInferPlugins"),
)
CUDA_ENUMERATIONS = ("cudaDeviceAttr", "cudaError_t", "cudaMemcpyKind", "cudaStreamCaptureMode")
POLYGRAPHY = ("backend/trt", "backend/tensorrt_rtx", "exception", "logger")
"""Packages and modules of Polygraphy that are read."""


def main(*sources: str) -> None:
    for source in sources:
        if source == "tensorrt_rtx":
            save("tensorrt_rtx", inspect_here(source, {}))
            continue
        name, version = Path(source).name.split("-")[:2]
        with tempfile.TemporaryDirectory() as folder:
            with zipfile.ZipFile(source) as wheel:
                wheel.extractall(folder)
            if name.startswith("tensorrt"):
                libraries = stub(Path(folder), int(version.split(".")[0]))
                save(
                    "tensorrt", inspect_here("tensorrt_bindings", {"LD_LIBRARY_PATH": libraries, "PYTHONPATH": folder})
                )
            elif name == "polygraphy":
                save("polygraphy", read_polygraphy(Path(folder) / "polygraphy", version))
            else:  # cuda_python, and cuda_bindings as it is called since 12.8
                path = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])
                module = "cuda.cudart" if name == "cuda_python" else "cuda.bindings.runtime"
                save("cuda", inspect_here(module, {"PYTHONPATH": path}, version))


def save(kind: str, surface: dict[str, Any]) -> None:
    lines = [f"{json.dumps(key)}: {json.dumps(value, sort_keys=True)}" for key, value in surface["names"].items()]
    text = "{" + f'"version": {json.dumps(surface["version"])}, "names": {{\n' + ",\n".join(lines) + "\n}}\n"
    (SURFACES / f"{kind}-{surface['version']}.json").write_text(text, encoding="utf-8")


def stub(folder: Path, major: int) -> str:
    """Folder of empty libraries that the bindings of this major version link."""
    libraries = folder / "stubs"
    libraries.mkdir()
    functions = "".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in SYMBOLS)
    for name, source in (("libnvinfer", functions), ("libnvonnxparser", ""), ("libnvinfer_plugin", "")):
        library = libraries / f"{name}.so.{major}"
        command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", str(library), "-x", "c", "-"]
        subprocess.run(command, input=source, text=True, check=True)
    return str(libraries)


def inspect_here(module: str, environment: dict[str, str], version: str | None = None) -> dict[str, Any]:
    """The surface of a module, read in a process of its own."""
    command = [sys.executable, __file__, "--inspect", module]
    out = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True).stdout
    surface: dict[str, Any] = json.loads(out)
    return {**surface, "version": version or surface["version"]}


def inspect(module_name: str) -> dict[str, Any]:
    """{"version", "names": {class or "": {attribute: kind}}}, with "" for the module's own names.

    A kind is "X" for a value of class X, "X()" for what gives one when called, "=X" for the class itself; X is "" where
    it is not of the module, or not told.
    """
    import importlib

    module = importlib.import_module(module_name)
    names: dict[str, dict[str, str]] = {"": {}}
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") and name != "__version__":
            continue
        if isinstance(value, type):
            if not irrelevant(module, value):
                names[""][name] = f"={name}"
                describe(name, value, names)
        else:
            names[""][name] = returned(value)
    return {"version": getattr(module, "__version__", ""), "names": names}


def irrelevant(module: Any, value: type) -> bool:
    """Layers and plugins: networks are parsed from ONNX here, never put together by hand. CUDA's structures."""
    if module.__name__.startswith("cuda"):
        return value.__name__ not in CUDA_ENUMERATIONS
    layer = getattr(module, "ILayer", None)
    return (layer is not None and issubclass(value, layer)) or "Plugin" in value.__name__ or "V_" in value.__name__


def describe(path: str, kind: type, names: dict[str, dict[str, str]]) -> None:
    attributes = names.setdefault(path, {})
    for name in dir(kind):
        value = getattr(kind, name, None)
        if name.startswith("_"):
            continue
        if isinstance(value, type) and value.__name__ == name:
            attributes[name] = f"={path}.{name}"
            describe(f"{path}.{name}", value, names)
        elif isinstance(value, kind):  # a member of an enumeration
            attributes[name] = path
        elif not (path == "INetworkDefinition" and name.startswith("add_") and name not in ("add_input", "add_output")):
            attributes[name] = returned(value)


def returned(value: Any) -> str:
    """What pybind's docstring says that a function, or a property's getter, gives."""
    call = "()" if callable(value) else ""
    text = getattr(getattr(value, "fget", value), "__doc__", None) or ""
    found = re.search(r"\) -> [\w.]*?(\w+(?:\.Severity)?)\s*$", text.partition("\n\n")[0] or text, re.MULTILINE)
    if found is None:
        found = re.search(r"^\d+\. .*\) -> [\w.]*?(\w+)\s*$", text, re.MULTILINE)
    return (found[1] if found and found[1][0].isupper() and found[1] not in ("None", "Any") else "") + call


def read_polygraphy(root: Path, version: str) -> dict[str, Any]:
    """{"version", "names": {module: {name: parameters, "Class.method": parameters, variable: None}}}."""
    names: dict[str, dict[str, list[str] | None]] = {}
    for place in POLYGRAPHY:
        files = sorted((root / place).glob("*.py"))
        merged = names.setdefault("polygraphy." + place.replace("/", "."), {})
        for file in files:
            found = definitions(ast.parse(file.read_text(encoding="utf-8")), names.get("polygraphy.backend.trt", {}))
            names[f"polygraphy.{place.replace('/', '.')}.{file.stem}"] = found
            merged.update(found)  # their packages import * from their modules
    return {"version": version, "names": {key: value for key, value in names.items() if not key.endswith("__init__")}}


def definitions(tree: ast.Module, bases_elsewhere: dict[str, list[str] | None]) -> dict[str, list[str] | None]:
    """Functions, classes and variables of a module; a class has what its bases have."""
    found: dict[str, list[str] | None] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = parameters(node)
        elif isinstance(node, ast.ClassDef):
            found[node.name] = []
            known = bases_elsewhere | found
            bases = [base.id for base in node.bases if isinstance(base, ast.Name) and base.id in known]
            for base in bases:
                found |= {
                    name.replace(base, node.name, 1): value
                    for name, value in known.items()
                    if name == base or name.startswith(f"{base}.")
                }
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    own = parameters(inner)[1:]
                    inherited = found.get(node.name) if bases and inner.args.kwarg is not None else None
                    key = node.name if inner.name == "__init__" else f"{node.name}.{inner.name}"
                    found[key] = own + [name for name in inherited or () if name not in own]
                elif isinstance(inner, ast.Assign):
                    found |= {f"{node.name}.{t.id}": None for t in inner.targets if isinstance(t, ast.Name)}
        elif isinstance(node, ast.Assign):
            found |= {target.id: None for target in node.targets if isinstance(target, ast.Name)}
    return found


def parameters(node: ast.FunctionDef) -> list[str]:
    named = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return named + ([f"*{node.args.vararg.arg}"] if node.args.vararg else [])


if __name__ == "__main__":
    if sys.argv[1] == "--inspect":
        print(json.dumps(inspect(sys.argv[2])))
    else:
        main(*sys.argv[1:])
