"""What the export knows of a model: a module, example inputs, and which axes may change."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Component:
    """One network of a pipeline, ready to be exported.

    Attributes:
        name: folder name in the bundle: "transformer", "unet", "text_encoder_2", "vae_decoder", ...
        module: in eval mode; called as module(**inputs), returns one tensor or a flat tuple of tensors.
        inputs: example tensors by ONNX input name; every size that is dynamic is distinct and at least 2
            (a traced batch of 1 would be baked in).
        dynamic_axes: input name -> {axis: symbol}; inputs that share a symbol share the size.
        outputs: ONNX output names, in the order the module returns them.
        config: the component's configuration as JSON data, written as config.json beside the graph.
        more_inputs: further input sets of other sizes for the comparison with torch.
    """

    name: str
    module: nn.Module
    inputs: Mapping[str, Tensor]
    dynamic_axes: Mapping[str, Mapping[int, str]]
    outputs: tuple[str, ...]
    config: Mapping[str, object]
    more_inputs: tuple[Mapping[str, Tensor], ...] = ()
