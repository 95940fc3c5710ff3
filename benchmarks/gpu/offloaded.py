"""A model of FLUX.1-dev's shapes, 12 G parameters, pruned on a GPU that may use 24 GB: its blocks come one at a time.

Random weights, which cost the time and memory of trained ones and say nothing of quality; small text encoders.
"""

import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from gpu import pruning as whole
from gpu.rows import Options, Sheet
from obsdiff import offloading, pruning
from obsdiff.job import given
from obsdiff.parking import File, Host

CONFIG = Path(__file__).resolve().parents[2] / "tests/obsdiff/configs/flux1_dev.json"
TINY = {
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 6, 6),
}
BYTES = 24e9
PIXELS = 1024
PROMPTS = whole.PROMPTS[:4]
ASKED: dict[str, Any] = {"sparsity": "2:4", "batch_size": 2, "draws": 1, "trajectory_steps": 4, "kept_steps": 2}


def run(sheet: Sheet, options: Options) -> None:
    waiting(sheet, options)
    with sheet.case(model="FLUX.1-dev's shapes", sparsity="2:4", memory="24 GB") as row:
        started = time.perf_counter()
        pipeline = made(options)
        row.figures["making_seconds"] = time.perf_counter() - started
        pixels = 64 if options.tiny else PIXELS
        job = whole.job_of(pipeline, {**ASKED, "height": pixels, "width": pixels}, PROMPTS)
        loaded = given(pipeline)
        clock = whole.Stages(time.perf_counter())
        if options.device == "cuda":
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, BYTES / total))
            offloading.place(pipeline, loaded.family, torch.device(options.device))
            torch.cuda.reset_peak_memory_stats()
        row.figures["parameters"] = sum(weight.numel() for weight in loaded.denoiser.parameters())
        try:
            stored = next(loaded.denoiser.parameters()).dtype
            pruned = pruning.prune(pipeline, loaded.family, job.recipe, stored=stored, progress=clock)
            row.figures["linears"] = len(pruned.layers)
        finally:
            row.figures |= clock.seconds()
            if options.device == "cuda":
                row.figures["peak_bytes"] = torch.cuda.max_memory_reserved()


def waiting(sheet: Sheet, options: Options) -> None:
    """How fast hidden states come and go; see parking."""
    count = 2**16 if options.tiny else 2**28
    values = torch.zeros(count, dtype=torch.uint8, device=options.device)
    for name, store in (("host", Host()), ("file", File(Path(tempfile.gettempdir())))):
        with sheet.case(store=name, bytes=count) as row:
            store.free(store.put(values), count)  # the first time its room is made
            for figure, move in (("put_bytes_per_second", store.put), ("get_bytes_per_second", partial(store.get, 0))):
                started = time.perf_counter()
                move(values)
                if options.device == "cuda":
                    torch.cuda.synchronize()
                row.figures[figure] = count / (time.perf_counter() - started)
        store.close()


def made(options: Options) -> DiffusionPipeline:
    """In the host's memory, in bfloat16 (float32 for a CPU)."""
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    config = {**json.loads(CONFIG.read_text(encoding="utf-8")), **(TINY if options.tiny else {})}
    torch.manual_seed(0)
    encoder, tokenizer = whole.clip(CLIPTextModel, "tokenizer", config["pooled_projection_dim"])
    with torch.device("meta"):
        denoiser: Any = FluxTransformer2DModel.from_config(config)
        t5: Any = T5EncoderModel(
            T5Config(
                vocab_size=64,
                d_model=config["joint_attention_dim"],
                d_kv=16,
                d_ff=64,
                num_layers=2,
                num_heads=2,
            )
        )
    words = Tokenizer(WordLevel({"<pad>": 0, "<unk>": 1, "</s>": 2, "large": 3}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=whole.small_vae(),
        text_encoder=encoder.to(dtype),
        tokenizer=tokenizer,
        text_encoder_2=filled(t5, options.device, dtype),
        tokenizer_2=PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", model_max_length=512
        ),
        transformer=filled(denoiser, options.device, dtype),
    )


def filled(module: nn.Module, device: str, dtype: torch.dtype) -> nn.Module:
    """A module on the meta device, with random weights in the host's memory that keep activations about as large."""
    module = module.to(dtype).to_empty(device="cpu").eval().requires_grad_(False)
    for name, weight in module.named_parameters():
        if weight.dim() < 2:
            weight.data.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            weight.data.copy_(torch.randn(weight.shape, dtype=dtype, device=device) / weight.shape[-1] ** 0.5)
    return module
