"""What we call of Polygraphy, with these arguments, is in the oldest version that we ask for and in the newest."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import tomllib
from vendor_calls import Surface, keywords_of, surfaces

ROOT = Path(__file__).parents[3]
VERSIONS = surfaces("polygraphy")
SOURCES = {
    str(path.relative_to(ROOT)): text
    for folder in ("export", "runtime", "obsdiff")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "from polygraphy" in (text := path.read_text(encoding="utf-8"))
}
INSTANCES = {"G_LOGGER": "Logger"}
"""Variables of Polygraphy -> their class."""


def faults(source: str, surface: Surface) -> Iterator[str]:
    """Names, attributes, arguments that this version lacks."""
    tree = ast.parse(source)
    imported: dict[str, tuple[str, str]] = {}  # our name -> module, its name there
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("polygraphy"):
            for alias in node.names:
                imported[alias.asname or alias.name] = (str(node.module), alias.name)
                here = surface.names.get(str(node.module), {})
                if alias.name not in here and f"{node.module}.{alias.name}" not in surface.names:
                    yield f"line {node.lineno}: {node.module} has no {alias.name}"
    classes = dict(_instances(tree, imported))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield from _attribute(node, imported, classes, surface)
        elif isinstance(node, ast.Call):
            yield from _call(node, imported, classes, surface)


def _instances(tree: ast.Module, imported: Mapping[str, tuple[str, str]]) -> Iterator[tuple[str, tuple[str, str]]]:
    """Variables that hold an object of an imported class -> module, class."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)):
            continue
        target, called = node.targets[0], node.value.func
        if isinstance(target, ast.Name) and isinstance(called, ast.Name) and called.id in imported:
            yield target.id, imported[called.id]
    yield from ((name, (imported[name][0], kind)) for name, kind in INSTANCES.items() if name in imported)


def _attribute(node: ast.Attribute, imported: Mapping[str, tuple[str, str]], classes: Mapping[str, tuple[str, str]],
               surface: Surface) -> Iterator[str]:  # fmt: skip
    name = node.value.id
    if name in classes:
        module, kind = classes[name]
        if f"{kind}.{node.attr}" not in surface.names.get(module, {}):
            yield f"line {node.lineno}: {kind} has no {node.attr}"
    elif name in imported:
        module = ".".join(imported[name])
        if module in surface.names and node.attr not in surface.names[module]:
            yield f"line {node.lineno}: {module} has no {node.attr}"


def _call(node: ast.Call, imported: Mapping[str, tuple[str, str]], classes: Mapping[str, tuple[str, str]],
          surface: Surface) -> Iterator[str]:  # fmt: skip
    if isinstance(node.func, ast.Name) and node.func.id in imported:
        module, name = imported[node.func.id]
    elif (
        isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name) and node.func.value.id in classes
    ):
        module, name = classes[node.func.value.id]
        name = f"{name}.{node.func.attr}"
    else:
        return
    takes = surface.names.get(module, {}).get(name)
    if takes is None:
        return
    given = [keyword.arg for keyword in node.keywords if keyword.arg is not None]
    for keyword in node.keywords:
        if keyword.arg is None and isinstance(keyword.value, ast.Call) and isinstance(keyword.value.func, ast.Name):
            given += keywords_of(keyword.value.func.id, SOURCES)
    yield from (f"line {node.lineno}: {name} takes no {argument}" for argument in given if argument not in takes)
    if len(node.args) + len(given) > len(takes) and not any(name.startswith("*") for name in takes):
        yield f"line {node.lineno}: {name} takes {len(takes)} arguments"


def test_the_oldest_versions_are_those_that_are_asked_for() -> None:
    """0.49.26 takes TensorRT-RTX 1.7 for a TensorRT before 10 and refuses it (seen: explicit_batch)."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    asked = [text for extra in ("trt", "rtx") for text in extras[extra] if text.startswith("polygraphy")]
    assert asked == ["polygraphy>=0.49.26", "polygraphy>=0.50.3"]
    assert [str(surface) for surface in VERSIONS] == ["polygraphy-0.49.26", "polygraphy-0.50.3", "polygraphy-0.53.6"]


@pytest.mark.parametrize("surface", VERSIONS, ids=str)
@pytest.mark.parametrize("path", SOURCES)
def test_what_is_called_is_there(path: str, surface: Surface) -> None:
    found = list(faults(SOURCES[path], surface))
    assert not found, f"{path} with {surface}: {'; '.join(found)}"


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("CreateConfig(sparse=True)", "CreateConfig takes no sparse"),
        ("CreateConfig(**common_options(trt, request), tf32=False)", None),
        ("profile = Profile(); profile.add('x', minimum=1)", "Profile.add takes no minimum"),
        ("profile = Profile(); profile.extend('x')", "Profile has no extend"),
        ("G_LOGGER.module_severity = G_LOGGER.SILENT", "Logger has no SILENT"),
        ("NoSuchLoader()", "polygraphy.backend.trt has no NoSuchLoader"),
    ],
)
def test_what_is_not_there_is_found(line: str, fault: str | None) -> None:
    source = (
        "from polygraphy.backend.trt import CreateConfig, Profile\nfrom polygraphy.logger import G_LOGGER\n"
        + ("from polygraphy.backend.trt import NoSuchLoader\n" if "NoSuch" in line else "")
        + line
    )
    for surface in VERSIONS:
        found = list(faults(source, surface))
        assert (found == []) if fault is None else any(fault in text for text in found)


def test_there_is_something_to_look_at() -> None:
    assert "export/obsdiff_export/builders/polygraph.py" in SOURCES
