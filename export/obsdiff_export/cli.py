"""`obsdiff-engines`: builds engines of bundles where torch is not, such as on a Jetson.

A verb is a function and a line in VERBS. Nothing heavy is imported until one runs.
"""

import typing
from typing import Any, Final

from obsdiff_export.settings import FIELDS, EngineSettings
from obsdiff_runtime.command import BUNDLE, Command, Given, Verb, print_result
from obsdiff_runtime.flags import Flag
from obsdiff_runtime.progress import Progress


def build(given: Given, progress: Progress) -> None:
    """Engines for this machine, from the bundle's ONNX."""
    from obsdiff_export import engines

    settings = EngineSettings(**{name: given[name] for name in FIELDS})
    built = engines.build(given["bundle"], settings, components=given["component"] or (), progress=progress)
    print_result(given, built.to_json(), "\n".join(engines.lines(built)))
    built.hold()


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
}
COMMAND: Final = Command(
    program="obsdiff-engines",
    description="Builds TensorRT engines of obsdiff bundles, without torch.",
    verbs=VERBS,
    codes="Exit codes: 0 done; 1 failed; 2 usage or configuration; 4 not enough memory or disk; "
    "5 engine or environment incompatible; 6 no proof of sparsity; 130 interrupted.",
)
main = COMMAND.main
