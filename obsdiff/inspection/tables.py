"""What `obsdiff inspect` shows a person: some lines on what it is, then tables; every layer where asked."""

from collections import Counter
from collections.abc import Mapping

from rich.console import RenderableType
from rich.table import Table

from obsdiff.inspection import Content
from obsdiff.inspection.checkpoints import CheckpointContent, StoredLinear
from obsdiff_export.inspection import tables
from obsdiff_export.inspection.tables import as_lines, as_notes, as_table, brief, held, zeros_in
from obsdiff_export.quantities import count, percent, size


def render(content: Content, *, everything: bool) -> list[RenderableType]:
    """What to print, one after the other.

    Args:
        content: from `inspection.inspect`.
        everything: a row for each linear, weight and engine layer, instead of a row for each kind of them.
    """
    if isinstance(content, CheckpointContent):
        return _checkpoint(content, everything)
    return tables.render(content, everything=everything)


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
        ("recipe", ", ".join(f"{key} {brief(value)}" for key, value in content.recipe.items())),
        ("prompts", f"sha256 {content.prompts_sha256[:16]}..." if content.prompts_sha256 else ""),
    ]
    return [as_lines(facts), _linears(content, everything), *as_notes(content.notes)]


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
        columns = ("linear", "outputs x inputs", "asked for", "holds", "zeros", "loss", "left dense because")
        return as_table(columns, (_linear(linear) for linear in content.linears))
    groups = Counter((linear.pattern or "", held(linear.holds), linear.reason or "") for linear in content.linears)
    short = ("linears", "asked for", "holds", "left dense because")
    return as_table(short, ((str(linears), *row) for row, linears in groups.most_common()))


def _linear(linear: StoredLinear) -> tuple[str, ...]:
    shape, loss = f"{linear.n_out} x {linear.k}", "" if linear.loss is None else f"{linear.loss:.2e}"
    asked, reason = linear.pattern or "", linear.reason or ""
    return linear.name, shape, asked, held(linear.holds), zeros_in(linear.zeros), loss, reason
