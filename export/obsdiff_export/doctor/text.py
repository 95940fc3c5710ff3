"""The diagnosis on the terminal, which is also what an issue report needs."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from obsdiff_export.doctor import Diagnosis, shorten_home
from obsdiff_runtime.version import __version__

_STYLES = {"ok": "green", "warn": "yellow", "problem": "bold red", "not here": "dim"}


def show(diagnosis: Diagnosis, console: Console | None = None) -> None:
    """Prints what can be done here, then every finding with what to do about it."""
    console = console or Console()
    console.print(f"{diagnosis.facts.program} {__version__}, {diagnosis.date}\n", highlight=False)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(max_width=26)
    table.add_column(min_width=8)
    table.add_column(overflow="fold")
    for ability in diagnosis.abilities:
        word = "[green]yes[/]" if ability.possible else "[yellow]no[/]"
        table.add_row(f"[bold]{ability.name}[/]", word, escape(shorten_home(ability.how)))
    for group in dict.fromkeys(check.group for check in diagnosis.checks):
        table.add_row()
        table.add_row(f"[bold]{group}[/]")
        for check in (check for check in diagnosis.checks if check.group == group):
            text = escape(shorten_home(check.finding))
            if check.advice:
                text += f"\n[bold]->[/] {escape(shorten_home(check.advice))}"
            table.add_row(f"  {check.name}", f"[{_STYLES[check.status]}]{check.status}[/]", text)
    console.print(table)
