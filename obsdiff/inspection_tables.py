"""What `obsdiff inspect` shows a person: some lines on what it is, then tables; every layer where asked."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from obsdiff.contents.bundles import BundleContent
from obsdiff.contents.checkpoints import CheckpointContent
from obsdiff.contents.engines import EngineContent
from obsdiff.contents.graphs import GraphContent
from obsdiff.inspection import Content
from obsdiff.quantities import count, percent, size
from obsdiff_export.layers import EngineLayer
from obsdiff_export.proof import Proof
from obsdiff_runtime.bundle import TensorEntry

SHOWN_NOTES: Final = 8

Facts = list[tuple[str, str]]
"""Label and text of the lines at the top."""


def render(content: Content, *, everything: bool) -> list[RenderableType]:
    """What to print, one after the other.

    Args:
        content: from `inspection.inspect`.
        everything: a row for each linear, weight and engine layer, instead of a row for each kind of them.
    """
    if isinstance(content, CheckpointContent):
        return _checkpoint(content, everything)
    if isinstance(content, GraphContent):
        return _graph(content, everything)
    if isinstance(content, EngineContent):
        return _engine(content, everything)
    return _bundle(content, everything)


def _checkpoint(content: CheckpointContent, everything: bool) -> list[RenderableType]:
    zeros = "not known" if content.zeros is None else f"{count(content.zeros)} ({_share(content)})"
    facts = [
        ("checkpoint", content.path),
        ("pipeline", content.pipeline_class or "the denoiser alone"),
        ("denoiser", content.denoiser),
        ("pruned", f"{content.sparsity} by {content.created_by}" if content.created_by else "not by obsdiff"),
        ("stored", f"{count(content.parameters)} parameters, {zeros} of them zero, {size(content.bytes)}"),
        ("kept units", _kept(content.kept)),
        ("loss", _losses(content)),
        ("recipe", ", ".join(f"{key} {_brief(value)}" for key, value in content.recipe.items())),
        ("prompts", f"sha256 {content.prompts_sha256[:16]}..." if content.prompts_sha256 else ""),
    ]
    return [_facts(facts), _linears(content, everything), *_notes(content.notes)]


def _share(content: CheckpointContent) -> str:
    return percent((content.zeros or 0) / max(1, content.parameters))


def _kept(kept: Mapping[str, tuple[int, ...]]) -> str:
    ratios = Counter(f"{left} of {units}" for left, units in kept.values())
    return ", ".join(f"{ratio} in {groups} {'group' if groups == 1 else 'groups'}" for ratio, groups in ratios.items())


def _losses(content: CheckpointContent) -> str:
    losses = sorted(linear.loss for linear in content.linears if linear.loss is not None)
    if not losses:
        return ""
    worst = max((linear for linear in content.linears if linear.loss is not None), key=lambda linear: linear.loss or 0)
    return f"median {losses[len(losses) // 2]:.2e}, largest {losses[-1]:.2e} at {worst.name}"


def _linears(content: CheckpointContent, everything: bool) -> Table:
    if everything:
        table = _table("linear", "outputs x inputs", "asked for", "holds", "zeros", "loss", "left dense because")
        for linear in content.linears:
            loss = "" if linear.loss is None else f"{linear.loss:.2e}"
            shape = f"{linear.n_out} x {linear.k}"
            held = _held(linear.holds)
            table.add_row(
                linear.name, shape, linear.pattern or "", held, _zeros(linear.zeros), loss, linear.reason or ""
            )
        return table
    groups = Counter((linear.pattern or "", _held(linear.holds), linear.reason or "") for linear in content.linears)
    table = _table("linears", "asked for", "holds", "left dense because")
    for (pattern, held, reason), linears in groups.most_common():
        table.add_row(str(linears), pattern, held, reason)
    return table


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
    if everything:
        table = _table("weight", "inputs x outputs", "format", "holds", "zeros", "node")
        for weight in content.weights:
            shape = f"{weight.k} x {weight.n_out}"
            table.add_row(weight.name, shape, weight.dtype, _held(weight.patterns), _zeros(weight.zeros), weight.node)
    else:
        groups = Counter((weight.dtype, _held(weight.patterns)) for weight in content.weights)
        table = _table("weights of MatMul and Gemm", "format", "holds")
        for (dtype, held), weights in groups.most_common():
            table.add_row(str(weights), dtype, held)
    return [_facts(facts), table]


def _engine(content: EngineContent, everything: bool) -> list[RenderableType]:
    receipt = content.receipt
    facts: Facts = [("engine", content.path), ("header", content.header or "none that is known")]
    if receipt is not None:
        facts += [
            ("built by", f"{receipt.backend} {receipt.backend_version} in {receipt.seconds:.1f} s"),
            ("built for", f"{receipt.component} on {', '.join(receipt.targets)}"),
            *(("profile", _profile(profile)) for profile in receipt.profiles),
            ("flags", ", ".join(f"{name} {_brief(value)}" for name, value in receipt.flags.items() if value)),
        ]
    facts += [("on disk", size(content.bytes)), ("sparsity", content.sparsity)]
    shown: list[RenderableType] = [_facts(facts)]
    if receipt is not None and receipt.proof.layers:
        shown.append(_proof(receipt.proof, everything))
    if content.layers:
        shown.append(_layers(content.layers, content.layers_from, everything))
    return [*shown, *_notes(content.notes)]


def _proof(proof: Proof, everything: bool) -> Table:
    if everything:
        table = _table("linear", "inputs x outputs", "format", "weights", "log", "kernel", "verdict", "why")
        for layer in proof.layers:
            shape = f"{layer.k} x {layer.n_out}"
            witnesses = (layer.weights, layer.log, layer.inspector)
            table.add_row(layer.weight, shape, layer.dtype, *witnesses, layer.verdict, layer.reason)
        return table
    groups = Counter((layer.verdict, layer.weights, layer.log, layer.inspector, layer.reason) for layer in proof.layers)
    table = _table("linears", "verdict", "weights", "log", "kernel", "why")
    for row, linears in groups.most_common(10):
        verdict, weights, log, inspector, reason = row
        table.add_row(str(linears), verdict, weights, log, inspector, reason)
    if len(groups) > 10:
        table.add_row(f"{len(groups) - 10} more", "", "", "", "", "see --layers")
    return table


def _layers(layers: Sequence[EngineLayer], source: str, everything: bool) -> Table:
    if everything:
        table = _table("engine layer", "kind", "reads", "gives", "kernel", "computes", title=f"layers, from {source}")
        for layer in layers:
            kernel = layer.tactic if len(layer.tactic) < 60 else f"{layer.tactic[:57]}..."
            tensors = (_tensors(layer.inputs), _tensors(layer.outputs))
            table.add_row(layer.name, layer.kind, *tensors, kernel, ", ".join(layer.onnx_nodes))
        return table
    groups = Counter((layer.kind, _formats(layer)) for layer in layers)
    table = _table("engine layers", "kind", "format", title=f"{len(layers)} layers, from {source}")
    for (kind, formats), found in groups.most_common():
        table.add_row(str(found), kind, formats)
    return table


def _bundle(content: BundleContent, everything: bool) -> list[RenderableType]:
    defaults = content.defaults
    built = sum(len(engines) for engines in content.engines.values())
    facts = [
        ("bundle", content.path),
        ("made by", content.created_by),
        ("pipeline", f"{content.pipeline_class} ({content.family}), {content.sparsity}"),
        ("files", f"{content.files}, {size(content.bytes)}; every sha256 is that of the manifest"),
        (
            "draws",
            f"{defaults.width}x{defaults.height} in {defaults.num_inference_steps} steps, "
            f"guidance {defaults.guidance_scale:g}",
        ),
        ("engines", str(built) if built else "none"),
        ("measured", ", ".join(content.measurements) or "nothing"),
    ]
    table = _table("component", "format", "on disk", "inputs", "engines")
    for network in content.networks:
        engines = content.engines.get(network.name, ())
        backends = Counter(engine.receipt.backend for engine in engines if engine.receipt is not None)
        listed = ", ".join(f"{number} x {backend}" for backend, number in backends.items())
        table.add_row(network.name, network.dtype, size(network.bytes), _ports(network.inputs), listed)
    shown: list[RenderableType] = [_facts(facts), table]
    for engines in content.engines.values():
        for engine in engines:
            shown += _engine(engine, everything)
    return shown


def _facts(facts: Iterable[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in facts:
        if text:
            grid.add_row(Text(label), Text(text))
    return grid


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def _notes(notes: Sequence[str]) -> list[RenderableType]:
    more = [f"and {len(notes) - SHOWN_NOTES} more"] if len(notes) > SHOWN_NOTES else []
    return [Text.assemble(("note ", "yellow"), note) for note in [*notes[:SHOWN_NOTES], *more]]


def _ports(ports: Iterable[Any]) -> str:
    """name [batch, 4, height] of inputs and outputs."""
    shown: list[TensorEntry] = list(ports)
    return "; ".join(f"{port.name} {port.dtype} [{', '.join(map(str, port.shape))}]" for port in shown)


def _profile(profile: Mapping[str, Mapping[str, Sequence[int]]]) -> str:
    """What changes, smallest to largest, with the best in the middle."""

    def sizes(shapes: Mapping[str, Sequence[int]]) -> str:
        ends = ["x".join(map(str, shapes[end])) for end in ("min", "opt", "max") if end in shapes]
        return " .. ".join(dict.fromkeys(ends))

    return "; ".join(f"{name} {sizes(shapes)}" for name, shapes in profile.items())


def _tensors(tensors: Sequence[Any]) -> str:
    return "; ".join(f"{tensor.dtype} {'x'.join(map(str, tensor.dims or ('?',)))}" for tensor in tensors)


def _formats(layer: EngineLayer) -> str:
    given = list(dict.fromkeys(tensor.dtype for tensor in layer.inputs))
    made = list(dict.fromkeys(tensor.dtype for tensor in layer.outputs))
    if given == made:
        return ", ".join(given)
    return f"{', '.join(given) or 'nothing'} -> {', '.join(made) or 'nothing'}"


def _held(patterns: Sequence[str]) -> str:
    return ", ".join(patterns) or "no pattern"


def _zeros(share: float | None) -> str:
    return "not known" if share is None else percent(share)


def _brief(value: object) -> str:
    """A setting in few words."""
    if isinstance(value, Mapping):
        return " ".join(f"{key}={_brief(entry)}" for key, entry in value.items())
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
