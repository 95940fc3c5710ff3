"""What an inspection shows a person: some lines on what it is, then tables; every layer where asked."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from obsdiff_export.inspection import Content
from obsdiff_export.inspection.bundles import BundleContent
from obsdiff_export.inspection.engines import EngineContent
from obsdiff_export.inspection.graphs import GraphContent
from obsdiff_export.ports import Port
from obsdiff_export.proof import Proof
from obsdiff_export.proof.layers import EngineLayer, EngineTensor
from obsdiff_export.quantities import count, percent, size
from obsdiff_runtime.bundle import TensorEntry
from obsdiff_runtime.turns import turns_in_words

SHOWN_NOTES: Final = 8
WIDTH: Final = 160
"""Columns where the output goes to a file or a pipe."""

Facts = list[tuple[str, str]]
"""Label and text of the lines at the top."""


def show(parts: Iterable[RenderableType]) -> None:
    """Prints what was rendered."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    for part in parts:
        console.print(part, highlight=False)


def render(content: Content, *, everything: bool) -> list[RenderableType]:
    """What to print, one after the other.

    Args:
        content: from `inspection.inspect`.
        everything: a row for each linear, weight and engine layer, instead of a row for each kind of them.
    """
    if isinstance(content, GraphContent):
        return _graph(content, everything)
    if isinstance(content, EngineContent):
        return _engine(content, everything)
    return _bundle(content, everything)


def _graph(content: GraphContent, everything: bool) -> list[RenderableType]:
    dtypes = ", ".join(f"{dtype} {count(numbers)}" for dtype, numbers in content.dtypes.items())
    operators = ", ".join(f"{op} {nodes}" for op, nodes in list(content.ops.items())[: None if everything else 14])
    facts = [
        ("onnx", content.path),
        ("made by", content.producer),
        ("opset", str(content.opset)),
        ("parameters", f"{count(content.parameters)} ({dtypes}), {size(content.bytes)}"),
        ("dynamic axes", ", ".join(content.dynamic_axes) or "none"),
        ("inputs", _ports(content.inputs)),
        ("outputs", _ports(content.outputs)),
        ("operators", f"{sum(content.ops.values())}: {operators}"),
    ]
    return [as_lines(facts), _weights(content, everything)]


def _weights(content: GraphContent, everything: bool) -> Table:
    if everything:
        columns = ("weight", "inputs x outputs", "format", "holds", "zeros", "node")
        weights = (
            (each.name, f"{each.k} x {each.n_out}", each.dtype, held(each.patterns), zeros_in(each.zeros), each.node)
            for each in content.weights
        )
        return as_table(columns, weights)
    groups = Counter((weight.dtype, held(weight.patterns)) for weight in content.weights)
    short = ("weights of MatMul and Gemm", "format", "holds")
    return as_table(short, ((str(number), *row) for row, number in groups.most_common()))


def _engine(content: EngineContent, everything: bool) -> list[RenderableType]:
    receipt = content.receipt
    facts: Facts = [("engine", content.path), ("header", content.header or "none that is known")]
    if receipt is not None:
        facts += [
            ("built by", f"{receipt.backend} {receipt.backend_version} in {receipt.seconds:.1f} s"),
            ("built for", f"{receipt.component} on {', '.join(receipt.targets)}"),
            *(("profile", _profile(profile)) for profile in receipt.profiles),
            ("flags", ", ".join(f"{name} {brief(value)}" for name, value in receipt.flags.items() if value)),
        ]
    facts += [("on disk", size(content.bytes)), ("sparsity", content.sparsity)]
    shown: list[RenderableType] = [as_lines(facts)]
    if receipt is not None and receipt.proof.layers:
        shown += _proof(receipt.proof, everything)
    if content.layers:
        shown.append(_layers(content.layers, content.layers_from, everything))
    return [*shown, *as_notes(content.notes)]


def _proof(proof: Proof, everything: bool) -> list[RenderableType]:
    """What is proven, and the reasons below, numbered."""
    reasons = list(dict.fromkeys(layer.reason for layer in proof.layers if layer.reason))
    number = {"": "", **{reason: str(index) for index, reason in enumerate(reasons, 1)}}
    columns = ("verdict", "weights", "log", "kernel", "why")
    rows = [(layer.verdict, layer.weights, layer.log, layer.inspector, number[layer.reason]) for layer in proof.layers]
    if everything:
        linears = ((layer.weight, f"{layer.k} x {layer.n_out}", layer.dtype) for layer in proof.layers)
        told = [(*linear, *row) for linear, row in zip(linears, rows, strict=True)]
        table = as_table(("linear", "inputs x outputs", "format", *columns), told)
    else:
        groups = Counter(rows).most_common()
        table = as_table(("linears", *columns), ((str(linears), *row) for row, linears in groups))
    return [table, as_lines((f"({index})", reason) for index, reason in enumerate(reasons, 1)), Text()]


def _layers(layers: Sequence[EngineLayer], source: str, everything: bool) -> Table:
    if everything:
        columns = ("computes", "kind", "reads", "gives", "kernel")
        each = (
            (
                ", ".join(layer.onnx_nodes) or layer.name,
                layer.kind,
                _tensors(layer.inputs),
                _tensors(layer.outputs),
                layer.tactic if len(layer.tactic) < 60 else f"{layer.tactic[:57]}...",
            )
            for layer in layers
        )
        return as_table(columns, each, title=f"layers, from {source}")
    groups = Counter((layer.kind, _formats(layer)) for layer in layers)
    rows = ((str(found), *row) for row, found in groups.most_common())
    return as_table(("engine layers", "kind", "format"), rows, title=f"{len(layers)} layers, from {source}")


def _bundle(content: BundleContent, everything: bool) -> list[RenderableType]:
    defaults = content.defaults
    frames = "" if defaults.num_frames is None else f", {defaults.num_frames} frames,"
    built = sum(len(engines) for engines in content.engines.values())
    facts = [
        ("bundle", content.path),
        ("made by", content.created_by),
        ("pipeline", f"{content.pipeline_class} ({content.family}), {content.sparsity}"),
        ("files", f"{content.files}, {size(content.bytes)}; every sha256 is that of the manifest"),
        (
            "draws",
            f"{defaults.width}x{defaults.height}{frames} in {defaults.num_inference_steps} steps, "
            f"guidance {defaults.guidance_scale:g}",
        ),
        ("turns", turns_in_words(content.turns, defaults.guidance_scale_2)),
        ("tiles", "" if defaults.vae_tile is None else f"of the VAE, {defaults.vae_tile} pixels a side"),
        ("engines", str(built) if built else "none"),
        ("measured", ", ".join(content.measurements)),
    ]
    networks = ((each.name, each.precision, size(each.bytes), _ports(each.inputs)) for each in content.networks)
    shown: list[RenderableType] = [as_lines(facts), as_table(("component", "format", "on disk", "inputs"), networks)]
    if everything:
        for engines in content.engines.values():
            for engine in engines:
                shown += _engine(engine, everything)
    elif built:
        shown += _engines(content)
    return shown


def _engines(content: BundleContent) -> list[RenderableType]:
    """A row for each engine, and below what is known of their sparsity, each sentence once."""
    rows: list[tuple[str, ...]] = []
    said: dict[str, list[str]] = {}
    for name, engines in content.engines.items():
        for engine in engines:
            receipt = engine.receipt
            builder = f"{receipt.backend} {receipt.backend_version}" if receipt is not None else engine.header
            targets = ", ".join(receipt.targets) if receipt is not None else ""
            verdicts = ", ".join(f"{linears} {verdict}" for verdict, linears in engine.verdicts.items())
            rows.append((name, builder, targets, size(engine.bytes), verdicts))
            for sentence in (engine.sparsity, *engine.notes):
                said.setdefault(sentence, []).append(name)
    columns = ("engine", "built by", "for", "on disk", "linears by proof of sparse kernels")
    sentences = ((", ".join(dict.fromkeys(names)), sentence) for sentence, names in said.items())
    return [as_table(columns, rows), as_lines(sentences)]


def as_lines(facts: Iterable[tuple[str, str]]) -> Table:
    """Labels and texts, without those that are empty."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in facts:
        if text:
            grid.add_row(Text(label), Text(text))
    return grid


def as_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str | None = None) -> Table:
    """Cells as they are: names hold brackets, which rich would take for markup."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def as_notes(notes: Sequence[str]) -> list[RenderableType]:
    """The first SHOWN_NOTES of them."""
    more = [f"and {len(notes) - SHOWN_NOTES} more"] if len(notes) > SHOWN_NOTES else []
    return [Text.assemble(("note ", "yellow"), note) for note in [*notes[:SHOWN_NOTES], *more]]


def _ports(ports: Iterable[Port | TensorEntry]) -> str:
    """name float16 [batch, 4, height] of inputs and outputs."""
    return "; ".join(f"{port.name} {port.dtype} [{', '.join(map(str, port.shape))}]" for port in ports)


def _profile(profile: Mapping[str, Mapping[str, Sequence[int]]]) -> str:
    """What changes, smallest to largest, with the best in the middle."""

    def sizes(shapes: Mapping[str, Sequence[int]]) -> str:
        ends = ["x".join(map(str, shapes[end])) for end in ("min", "opt", "max") if end in shapes]
        return " .. ".join(dict.fromkeys(ends))

    return "; ".join(f"{name} {sizes(shapes)}" for name, shapes in profile.items())


def _tensors(tensors: Sequence[EngineTensor]) -> str:
    """float16 ?x256: a size that changes at run time is a ?."""

    def shape(dims: Sequence[int] | None) -> str:
        return "?" if dims is None else "x".join("?" if axis < 0 else str(axis) for axis in dims)

    return "; ".join(f"{tensor.dtype} {shape(tensor.dims)}" for tensor in tensors)


def _formats(layer: EngineLayer) -> str:
    given = list(dict.fromkeys(tensor.dtype for tensor in layer.inputs))
    made = list(dict.fromkeys(tensor.dtype for tensor in layer.outputs))
    if given == made:
        return ", ".join(given)
    return f"{', '.join(given) or 'nothing'} -> {', '.join(made) or 'nothing'}"


def held(patterns: Sequence[str]) -> str:
    """Patterns in words."""
    return ", ".join(patterns) or "no pattern"


def zeros_in(share: float | None) -> str:
    """A share of zeros in words."""
    return "not known" if share is None else percent(share)


def brief(value: object) -> str:
    """A setting in few words."""
    if isinstance(value, Mapping):
        return " ".join(f"{key}={brief(entry)}" for key, entry in value.items())
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
