"""What the tried products mean: which number formats really run, by library and device."""

from collections.abc import Iterator, Mapping
from typing import Final

from obsdiff_export.asking import Outcome
from obsdiff_export.doctor.checks import Check
from obsdiff_export.doctor.examination import FORMATS, Facts

_WRONG: Final = ("ArithmeticError", "it crashed", "it ended", "no answer")
"""Beginnings of failures that no library should have; the rest are kernels that are not there."""
_TITLES: Final = {"onnxruntime": "ONNX Runtime", "tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}


def check_products(facts: Facts) -> Iterator[Check]:
    """One line per library and device."""
    if not facts.products:
        yield Check(group="precisions", name="products", status="not here", finding="none was tried (--quick)")
    for (library, device), outcomes in _by_device(facts.products).items():
        if library != "tensorrt_rtx":
            yield _check(library, device, outcomes)
    yield from _targets(facts.products)


def runs(facts: Facts, library: str) -> bool:
    """Whether some product of a library ran, or none was tried."""
    tried = [outcome for name, outcome in facts.products.items() if name.startswith(f"{library}/")]
    return not tried or any(outcome.value is not None for outcome in tried)


def _by_device(products: Mapping[str, Outcome]) -> dict[tuple[str, str], dict[str, Outcome]]:
    grouped: dict[tuple[str, str], dict[str, Outcome]] = {}
    for name, outcome in products.items():
        library, device, form = name.split("/")
        grouped.setdefault((library, device), {})[form] = outcome
    return grouped


def _check(library: str, device: str, outcomes: Mapping[str, Outcome]) -> Check:
    where = {"cpu": "on the processor", "cuda": "on the GPU", "here": "for this GPU"}.get(device, device)
    name = f"{_TITLES.get(library, library)} {where}"
    blocks = (library, device) in (("torch", "cpu"), ("onnxruntime", "CPUExecutionProvider"))
    good = [_said(form, outcome) for form, outcome in outcomes.items() if outcome.value is not None]
    wrong = [f"{form}: {o.failure}" for form, o in outcomes.items() if o.failure.startswith(_WRONG)]
    if not good:
        first = next(iter(outcomes.values())).failure
        advice = "install it again" if blocks else "its libraries, CUDA's among them, are not found or do not fit"
        return Check(
            group="precisions",
            name=name,
            status="problem" if blocks else "warn",
            finding=f"nothing runs: {first}",
            advice=advice,
            blocks=blocks,
        )
    finding = ", ".join(good)
    lacking = [form for form, outcome in outcomes.items() if outcome.value is None]
    if lacking:
        finding += f"; not {', '.join(lacking)}"
    if wrong:
        return Check(
            group="precisions",
            name=name,
            status="problem",
            finding=f"{finding}. {'. '.join(wrong)}",
            advice="report it, with this text, to whoever makes the library",
        )
    return Check(group="precisions", name=name, status="ok", finding=finding)


def _said(form: str, outcome: Outcome) -> str:
    """A format that ran, and what it was really computed in; "built" where an engine was not run."""
    if outcome.value.get("computed_in") not in (None, form):
        return f"{form} (computed in {outcome.value['computed_in']})"
    return f"{form} (built, not run)" if outcome.value.get("error", 0) is None else form


def _targets(products: Mapping[str, Outcome]) -> Iterator[Check]:
    """What TensorRT-RTX builds, targets with the same formats together."""
    together: dict[str, list[str]] = {}
    wrong = []
    for (library, target), outcomes in _by_device(products).items():
        if library == "tensorrt_rtx":
            good = [form for form in FORMATS if outcomes[form].value is not None]
            together.setdefault(", ".join(good) or "nothing", []).append(target)
            wrong += [f"{target} {form}: {o.failure}" for form, o in outcomes.items() if o.failure.startswith(_WRONG)]
    if not together:
        return
    finding = "; ".join(f"for {', '.join(targets)}: {formats}" for formats, targets in together.items())
    name = "TensorRT-RTX ahead of time"
    if wrong or list(together) == ["nothing"]:
        failed = next(o.failure for key, o in products.items() if key.startswith("tensorrt_rtx/") and o.failure)
        yield Check(
            group="precisions",
            name=name,
            status="problem",
            finding=f"{finding}. {'; '.join(wrong) or failed}",
            advice="pip install --force-reinstall tensorrt-rtx",
        )
    else:
        yield Check(group="precisions", name=name, status="ok", finding=f"{finding} (built, not run)")
