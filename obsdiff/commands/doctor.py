"""The verb that looks at the machine: doctor. It imports no vendor's library itself."""

from pathlib import Path

from obsdiff.command import Run, option, verb
from obsdiff_runtime.errors import CompatibilityError


@verb(
    "doctor",
    quick=option(bool, "--quick", text="Look only; try no products in the number formats.", default=False),
    output=option(Path, "--output", "-o", text="Where results would go: its disk is looked at.", default=Path()),
)
def doctor(run: Run) -> None:
    """What this machine can do, and what stands in the way: GPU, driver, libraries, precisions that really run."""
    from obsdiff_export.doctor import diagnose

    diagnosis = diagnose(run.options["output"], quick=run.options["quick"], progress=run.progress)

    def show() -> None:
        from obsdiff_export.doctor.text import show

        show(diagnosis)

    run.print_result(diagnosis.to_json(), show)
    if not diagnosis.ready:
        raise CompatibilityError(f"`obsdiff export` cannot run here; {diagnosis.abilities[0].how}")
