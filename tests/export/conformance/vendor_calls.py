"""What a source file asks of a vendor's module: attribute accesses on objects whose class is known.

Classes are followed through assignments, calls and properties, by what a surface (see record.py) says they give. A
function that tests for a feature, with hasattr or getattr and a default, may use what lacks where that feature does.
"""

import ast
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODULE = "module"
SURFACES = Path(__file__).parent / "surfaces"


@dataclass(frozen=True)
class Surface:
    """What one version offers: {class, or "" for the module: {attribute: kind}}."""

    name: str
    names: Mapping[str, Mapping[str, str]]

    def __str__(self) -> str:
        return self.name

    def has(self, name: str) -> bool:
        return any(name in attributes for attributes in self.names.values())


def surfaces(kind: str) -> list[Surface]:
    """All recorded versions of one package."""
    return [
        Surface(path.stem, json.loads(path.read_text(encoding="utf-8"))["names"])
        for path in sorted(SURFACES.glob(f"{kind}-*.json"))
    ]


@dataclass(frozen=True)
class Access:
    """`owner` is a class, "" the module; `features` are those that the function around it tests for."""

    line: int
    owner: str
    name: str
    features: frozenset[str] = field(compare=False)

    def __str__(self) -> str:
        return f"line {self.line}: {self.owner or 'the module'} has no {self.name}"


def missing(source: str, surface: Surface, roots: Mapping[str, str]) -> list[Access]:
    """What the source uses and this version lacks, but for what it tests for."""
    return [
        access
        for access in accesses(source, surface, roots)
        if access.name not in surface.names.get(access.owner, {})
        and access.name not in access.features
        and all(surface.has(feature) for feature in access.features)
    ]


def accesses(source: str, surface: Surface, roots: Mapping[str, str]) -> list[Access]:
    """Every attribute that is asked of the vendor's module, its classes and their instances.

    Args:
        source: of a module.
        surface: a version.
        roots: names in it whose class no assignment tells, such as parameters -> MODULE or a class.
    """
    tree = ast.parse(source)
    follower = _Follower(surface, roots)
    follower.visit(tree)  # learns what `self.x` holds
    follower.found.clear()
    follower.visit(tree)
    return sorted(follower.found, key=lambda access: (access.line, access.name))


class _Follower(ast.NodeVisitor):
    """`visit` of an expression gives its kind: MODULE, "X", "=X", "X()" or "", which is unknown."""

    def __init__(self, surface: Surface, roots: Mapping[str, str]) -> None:
        self.surface = surface
        self.roots = roots
        self.scopes: list[dict[str, str]] = [{}]
        self.fields: dict[str, str] = {}
        self.features: list[frozenset[str]] = [frozenset()]
        self.found: set[Access] = set()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.features.append(self.features[-1] | frozenset(_features(node)))
        self.scopes.append(dict(self.scopes[-1]))
        for statement in node.body:
            self.visit(statement)
        self.scopes.pop()
        self.features.pop()

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name in ("tensorrt", "tensorrt_rtx"):
                self.scopes[-1][alias.asname or alias.name] = MODULE

    def visit_Assign(self, node: ast.Assign) -> None:
        kind = self.visit(node.value)
        for target in node.targets:
            self._bind(target, kind)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._bind(node.target, self.visit(node.value) if node.value is not None else "")

    def visit_Name(self, node: ast.Name) -> str:
        return self.scopes[-1].get(node.id) or self.roots.get(node.id, "")

    def visit_Attribute(self, node: ast.Attribute) -> str:
        kind = self.visit(node.value)
        if not kind:
            written = _written(node)
            return self.fields.get(written) or self.roots.get(written, "")
        return self._access(kind, node.attr, node.lineno)

    def visit_Call(self, node: ast.Call) -> str:
        kinds = [self.visit(argument) for argument in node.args]
        for keyword in node.keywords:
            self.visit(keyword.value)
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name in ("getattr", "hasattr") and kinds[0]:
            if name == "getattr" and isinstance(node.args[1], ast.Constant):
                return self._access(kinds[0], str(node.args[1].value), node.lineno)
            return ""
        kind = self.visit(node.func)
        return kind[1:] if kind.startswith("=") else kind[:-2] if kind.endswith("()") else ""

    def generic_visit(self, node: ast.AST) -> str:
        for child in ast.iter_child_nodes(node):
            self.visit(child)
        return ""

    def _bind(self, target: ast.expr, kind: str) -> None:
        if isinstance(target, ast.Name):
            self.scopes[-1][target.id] = kind
        elif isinstance(target, ast.Attribute):
            if not self.visit(target):
                self.fields[_written(target)] = kind
        elif isinstance(target, ast.Tuple | ast.List):
            for element in target.elts:
                self._bind(element, "")

    def _access(self, kind: str, name: str, line: int) -> str:
        owner = "" if kind == MODULE else kind.removeprefix("=")
        if name.startswith("__") or kind.endswith("()"):
            return ""
        if owner not in self.surface.names:  # of the vendor's, but not recorded
            return ""
        self.found.add(Access(line, owner, name, self.features[-1]))
        return self.surface.names[owner].get(name, "")


def _written(node: ast.Attribute) -> str:
    """ "self.x"; "" for what is longer."""
    return f"{node.value.id}.{node.attr}" if isinstance(node.value, ast.Name) else ""


def _features(node: ast.AST) -> Iterator[str]:
    """Names that a function tests for."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and len(call.args) > 1:
            tests = call.func.id == "hasattr" or (call.func.id == "getattr" and len(call.args) == 3)
            if tests and isinstance(call.args[1], ast.Constant):
                yield str(call.args[1].value)


def names_used(source: str) -> set[str]:
    """Names at the beginning of attribute accesses, and modules imported."""
    used: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used.add(node.value.id)
        elif isinstance(node, ast.Import):
            used |= {alias.name for alias in node.names}
    return used


def keywords_of(function: str, sources: Mapping[str, str]) -> list[str]:
    """Keys of the dictionary that a function of ours returns, for calls with **function(...)."""
    for source in sources.values():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.name == function:
                returned: Any = [inner.value for inner in ast.walk(node) if isinstance(inner, ast.Return)]
                return [key.value for value in returned if isinstance(value, ast.Dict) for key in value.keys]
    raise LookupError(function)
