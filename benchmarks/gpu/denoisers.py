"""One SD3 block and the whole SD3-medium denoiser, each beside the dense one: eager, compiled, as CUDA graphs."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gpu import clock, models
from gpu.rows import Options, Row, Sheet
from obsdiff_export import semi_structured
from obsdiff_export.semi_structured import Algorithms, Compress

PASSES = (
    (("block", "denoiser"), ("eager", "graph")),
    (("block",), ("compiled", "compiled graph")),
    (("denoiser",), ("compiled", "compiled graph")),
)
"""What is timed and how, over all variants before the next: compiling takes seconds, and may use up the time."""

RACE_SECONDS = 1.0


def run(sheet: Sheet, options: Options, compress: Compress = semi_structured.compress) -> None:
    """Every variant in every mode, the dense model interleaved with it. `compress` makes 2:4 weights sparse."""
    torch._dynamo.config.recompile_limit = 64  # every variant's widths are a graph of their own
    dense = Subject(models.dense(options), options)
    algorithms = Algorithms("bfloat16") if options.device == "cuda" else None
    failed: set[str] = set()
    for whats, modes in PASSES:
        for variant in models.variants(options, compress, algorithms):
            cases = [(what, mode) for what in whats for mode in modes]
            if variant.name in failed or sheet.left() < 0:
                sheet.not_reached(len(cases) * (variant.name not in failed))
                continue
            try:
                subject = Subject(variant.make(dense.model), options)
            except Exception as error:  # whatever this torch lacks for it
                failed.add(variant.name)
                sheet.refused(error, variant=variant.name)
                continue
            for what, mode in cases:
                if sheet.left() < 0:
                    sheet.not_reached(1)
                    continue
                with sheet.case(variant=variant.name, what=what, mode=mode) as row:
                    race(row, dense, subject, options)
            del subject
            if options.device == "cuda":
                torch.cuda.empty_cache()


def race(row: Row, dense: "Subject", pruned: "Subject", options: Options) -> None:
    what, mode = str(row.case["what"]), str(row.case["mode"])
    calls = {"dense": dense.call(what, mode), "pruned": pruned.call(what, mode)}
    found = clock.times(calls, options.device, 0 if options.tiny else RACE_SECONDS)
    row.figures |= clock.figures(found, "dense")
    row.figures["parameters_share"] = pruned.parameters / dense.parameters


class Subject:
    """A model, its compiled view, and what it is called with."""

    def __init__(self, model: nn.Module, options: Options) -> None:
        self.model, self._options = model, options
        self.parameters = sum(weight.numel() for weight in model.parameters())
        self._compiled = models.compiled(model, "inductor" if options.device == "cuda" else "eager")
        self._example = models.inputs(model, options)
        self._block = models.block_inputs(model, self._example)

    def call(self, what: str, mode: str) -> Callable[[], object]:
        model = self._compiled if mode.startswith("compiled") else self.model
        call = _block(model, self._block) if what == "block" else _whole(model, self._example)
        return clock.graphed(call, self._options.device) if mode.endswith("graph") else call


def _block(model: nn.Module, given: dict[str, Tensor]) -> Callable[[], object]:
    block = model.get_submodule("transformer_blocks.0")
    return lambda: block(**given)


def _whole(model: nn.Module, given: dict[str, Tensor]) -> Callable[[], object]:
    return lambda: model(**given, return_dict=False)
