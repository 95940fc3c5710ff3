"""Bundles written by hand, where a real export would be too slow or need torch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from obsdiff_runtime.bundle import ComponentEntry, Defaults, Manifest, TensorEntry, write_manifest

LATENTS: dict[str, Any] = {"batch": (1, 2, 8), "height": 64, "width": 64, "image_height": 512, "image_width": 512}
CONFIG = {"patch_size": 2, "pos_embed_max_size": 192}


def write_tiny(folder: Path) -> Path:
    """A denoiser and a decoder of one linear each; the denoiser's is 2:4."""
    components = {}
    for name, port in (("transformer", "hidden_states"), ("vae_decoder", "latent_sample")):
        weight = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float16)
        if name == "transformer":
            weight[1::4] = weight[2::4] = 0
        shape = ("batch", 4, "height", 8)
        x, y = (helper.make_tensor_value_info(each, TensorProto.FLOAT16, shape) for each in (port, "y"))
        nodes = [helper.make_node("MatMul", [port, "fc.weight::T"], ["y"], name="fc")]
        body = helper.make_graph(nodes, "g", [x], [y], [numpy_helper.from_array(weight, "fc.weight::T")])
        (folder / name).mkdir(parents=True)
        onnx.save(
            helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10),
            folder / name / "model.onnx",
        )
        (folder / name / "config.json").write_text(json.dumps(CONFIG))
        ports = tuple(TensorEntry(name=each, dtype="float16", shape=shape) for each in (port, "y"))
        components[name] = ComponentEntry(
            onnx=f"{name}/model.onnx", dtype="float16", inputs=ports[:1], outputs=ports[1:]
        )
    manifest = Manifest(
        created_by="a test",
        family="sd3",
        pipeline_class="StableDiffusion3Pipeline",
        sparsity="2:4",
        defaults=Defaults(height=512, width=512, num_inference_steps=1, guidance_scale=4.0),
        components=components,
        recipe={"sizes": LATENTS},
    )
    write_manifest(folder, manifest)
    return folder
