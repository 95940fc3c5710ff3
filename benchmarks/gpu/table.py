"""The rows of a run as a short table."""

from collections.abc import Iterator, Sequence
from statistics import median

from rich.table import Table

from gpu.rows import Row, flat


def table(rows: Sequence[Row]) -> Table:
    """One line for each case; linears by model, format and tokens, denoisers by variant."""
    machine = next((row for row in rows if row.part == "machine" and row.case), None)
    found = Table("part", "case", "measured", title=flat(machine.case) if machine is not None else None)
    for row in rows:
        if (row.part == "machine" and not row.error) or _grouped(row):
            continue
        found.add_row(row.part, flat(row.case), _cell(row))
    for case, members in _groups(rows, "linears", ("model", "dtype", "tokens")):
        found.add_row("linears", case, _speedups(members))
    for case, members in _groups(rows, "denoisers", ("what", "variant")):
        found.add_row("denoisers", case, "\n".join(_mode(row) for row in members))
    return found


def _grouped(row: Row) -> bool:
    return (row.part == "linears" and "model" in row.case) or (row.part == "denoisers" and "mode" in row.case)


def _groups(rows: Sequence[Row], part: str, by: tuple[str, ...]) -> Iterator[tuple[str, list[Row]]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.part == part and _grouped(row):
            groups.setdefault(flat({name: row.case[name] for name in by}), []).append(row)
    yield from groups.items()


def _mode(row: Row) -> str:
    """ "graph: 71.2 to 58.3 ms, 1.22x (1.21 to 1.23)"."""
    values = row.figures
    if row.error or "pruned_ms" not in values:
        return f"{row.case['mode']}: error: {row.error}"
    interval = f" ({values['pruned_low']:.2f} to {values['pruned_high']:.2f})" if "pruned_low" in values else ""
    times = f"{number(values['dense_ms'])} to {number(values['pruned_ms'])} ms"
    return f"{row.case['mode']}: {times}, {values['pruned_speedup']:.2f}x{interval}"


def number(value: float) -> str:
    """Three digits, without an exponent where that is readable."""
    if value == 0 or 1e-2 <= abs(value) < 1e4:
        return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
    return f"{value:.2e}"


def _cell(row: Row) -> str:
    parts = [", ".join(f"{name} {number(value)}" for name, value in row.figures.items()), row.note]
    return "\n".join(part for part in [*parts, f"error: {row.error}" if row.error else ""] if part)


def _speedups(rows: Sequence[Row]) -> str:
    gains = [row.figures["sparse_speedup"] for row in rows if "sparse_speedup" in row.figures]
    faster = sum(row.figures.get("sparse_low", 0) > 1 for row in rows)
    errors = sorted({row.error for row in rows if row.error})
    parts = [f"error: {error}" for error in errors[:1]]
    if gains:
        middle = f"2:4 {median(gains):.2f}x dense in the middle, {min(gains):.2f} to {max(gains):.2f}"
        parts = [f"{middle}; surely faster at {faster} of {len(rows)} shapes", *parts]
    return "\n".join(parts)
