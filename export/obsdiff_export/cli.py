"""`obsdiff-engines`: builds engines of bundles where torch is not, such as on a Jetson.

A verb is a function and a line in VERBS. Nothing heavy is imported until one runs.
"""

import typing
from pathlib import Path
from typing import Any, Final

from obsdiff_export.settings import FIELDS, INSPECT, EngineSettings
from obsdiff_runtime.command import BUNDLE, Argument, Command, Given, Verb, print_result
from obsdiff_runtime.errors import CompatibilityError, require_file
from obsdiff_runtime.flags import THREADS, Flag
from obsdiff_runtime.progress import Progress


def build(given: Given, progress: Progress) -> None:
    """Engines for this machine, from the bundle's ONNX."""
    from obsdiff_export import engines

    settings = EngineSettings(**{name: given[name] for name in FIELDS})
    built = engines.build(given["bundle"], settings, components=given["component"] or (), progress=progress)
    print_result(given, built.to_json(), lambda: print(*engines.lines(built), sep="\n"))
    built.hold()


def time(given: Given, progress: Progress) -> None:
    """The products of a latency table, such as `obsdiff whatif MODEL --gpu orin -o FILE` wrote, timed here."""
    import tempfile

    from obsdiff_export import latency_table, running
    from obsdiff_export.measuring import seconds_of
    from obsdiff_export.retiming import retime

    require_file("--output", given["output"])
    table = latency_table.load(given["table"])
    seconds = seconds_of(given["minutes"])
    with tempfile.TemporaryDirectory(prefix="obsdiff-") as scratch:
        measurer = running.measurer_of(given["backend"], given["dtype"], given["threads"], Path(scratch))
        found = retime(table, measurer, seconds=seconds, progress=progress)
    found.table.save(given["output"])
    lines = (*found.lines(), f"table {given['output']}")
    print_result(given, found.to_json(), lambda: print(*lines, sep="\n"))


def inspect(given: Given, progress: Progress) -> None:
    """What is in an ONNX file, an engine or a bundle, and whether its sparsity is proven."""
    from obsdiff_export import inspection

    content = inspection.inspect(given["path"], progress)

    def display() -> None:
        from obsdiff_export.inspection.tables import render, show

        show(render(content, everything=given["layers"]))

    print_result(given, inspection.to_json(content), display)
    if given["require_sparse"]:
        inspection.demand_sparsity(content)


def doctor(given: Given, progress: Progress) -> None:
    """Whether engines can be built and run here, and what stands in the way."""
    from obsdiff_export.doctor import diagnose

    diagnosis = diagnose(program=COMMAND.program, quick=given["quick"], progress=progress)

    def display() -> None:
        from obsdiff_export.doctor.text import show

        show(diagnosis)

    print_result(given, diagnosis.to_json(), display)
    if not diagnosis.ready:
        raise CompatibilityError(f"no engine can be built here; {diagnosis.abilities[0].how}")


def _flag(name: str) -> Flag:
    """The flag of a field of EngineSettings."""
    annotated, text = typing.get_args(FIELDS[name].type)
    kind: Any = next(each for each in typing.get_args(annotated) if each is not type(None))
    many = typing.get_origin(kind) is list
    return Flag(
        name="--" + name.replace("_", "-"),
        kind=typing.get_args(kind)[0] if many else kind,
        text=text,
        many=many,
    )


VERBS: Final = {
    "build": Verb(
        work=build,
        arguments=[BUNDLE],
        flags=[
            *(_flag(name) for name in FIELDS),
            Flag(name="--component", kind=str, text="Only this one's engine; repeatable.", many=True),
        ],
    ),
    "time": Verb(
        work=time,
        arguments=[Argument(name="table", text="A latency table: which products.", kind=Path)],
        flags=[
            Flag(name="--output", short="-o", kind=Path, text="The measured table.", default=Path("table.json")),
            Flag(name="--minutes", kind=float, text="Time to spend.", default=5.0),
            Flag(name="--backend", kind=str, text="tensorrt, or cpu (ONNX Runtime).", default="tensorrt"),
            Flag(name="--dtype", kind=str, text="fp16, bf16 or fp32; default: fp16, of cpu fp32."),
            THREADS,
        ],
    ),
    "inspect": Verb(
        work=inspect,
        arguments=[Argument(name="path", text="An ONNX file, an engine's plan or a bundle.", kind=Path)],
        flags=INSPECT,
    ),
    "doctor": Verb(
        work=doctor,
        arguments=[],
        flags=[Flag(name="--quick", kind=bool, text="Look only; try no products.", default=False)],
    ),
}
COMMAND: Final = Command(
    program="obsdiff-engines",
    description="Builds TensorRT engines of obsdiff bundles, without torch.",
    verbs=VERBS,
    codes="Exit codes: 0 done; 1 failed; 2 usage or configuration; 4 not enough memory or disk; "
    "5 engine or environment incompatible; 6 no proof of sparsity; 130 interrupted.",
)
main = COMMAND.main
