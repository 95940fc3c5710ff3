"""Networks by the names that they have in single files: of Stable Diffusion 1.5, XL and 3, and of OpenCLIP."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

Tensors = dict[str, Tensor]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_MMDIT = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
_MMDIT_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}


def unet(module: nn.Module, prefix: str = "model.diffusion_model.") -> Tensors:
    """Of a UNet with as many layers in every block."""
    layers = module.config.layers_per_block  # type: ignore[union-attr]
    return {prefix + _in_unet(name, layers, module): tensor for name, tensor in module.state_dict().items()}


def _in_unet(name: str, layers: int, module: nn.Module) -> str:
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name)
    if found is None:
        renamed = _renamed(name, _UNET)
        return _resnet(renamed) if "resnets" in name else renamed
    way, block, kind, layer, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
    if way == "down":
        place = 1 + block * (layers + 1) + (layers if kind == "downsamplers" else layer)
        part = {"resnets": "0", "attentions": "1", "downsamplers": "0"}[kind]
        return f"input_blocks.{place}.{part}." + (_resnet(rest) if kind == "resnets" else rest.replace("conv.", "op."))
    place = block * (layers + 1) + (layers if kind == "upsamplers" else layer)
    looks = hasattr(module.up_blocks[block], "attentions")  # type: ignore[index, union-attr]
    part = {"resnets": "0", "attentions": "1", "upsamplers": "2" if looks else "1"}[kind]
    return f"output_blocks.{place}.{part}." + (_resnet(rest) if kind == "resnets" else rest)


def _resnet(name: str) -> str:
    for ours, theirs in _RESNET.items():
        name = name.replace(ours, theirs)
    return name


def autoencoder(module: nn.Module, prefix: str = "first_stage_model.") -> Tensors:
    found: Tensors = {}
    last = len(module.config.up_block_types) - 1  # type: ignore[union-attr]
    for name, tensor in module.state_dict().items():
        renamed = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        renamed = renamed.replace("mid_block.attentions.0", "mid.attn_1")
        renamed = re.sub(r"mid_block\.resnets\.(\d)", lambda place: f"mid.block_{int(place[1]) + 1}", renamed)
        renamed = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", renamed)
        renamed = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", renamed)
        renamed = re.sub(r"up_blocks\.(\d)\.resnets", lambda place: f"up.{last - int(place[1])}.block", renamed)
        renamed = re.sub(
            r"up_blocks\.(\d)\.upsamplers\.0", lambda place: f"up.{last - int(place[1])}.upsample", renamed
        )
        if "attn_1" in renamed:
            renamed = renamed.replace("group_norm", "norm").replace("to_out.0", "proj_out")
            renamed = re.sub(r"to_([qkv])\.", r"\1.", renamed)
            tensor = tensor[..., None, None] if tensor.ndim == 2 else tensor
        found[prefix + renamed] = tensor
    return found


def clip(module: nn.Module, prefix: str) -> Tensors:
    """As transformers names it, in its own model."""
    names = module.state_dict()
    inner = "" if any(name.startswith("text_model.") for name in names) else "text_model."
    return {f"{prefix}{inner}{name}": tensor for name, tensor in names.items()}


def open_clip(module: nn.Module, prefix: str) -> Tensors:
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in module.state_dict().items()}
    found = {
        "positional_embedding": tensors.pop("embeddings.position_embedding.weight"),
        "token_embedding.weight": tensors.pop("embeddings.token_embedding.weight"),
        "ln_final.weight": tensors.pop("final_layer_norm.weight"),
        "ln_final.bias": tensors.pop("final_layer_norm.bias"),
        "text_projection": tensors.pop("text_projection.weight").T.contiguous(),
    }
    stem = re.compile(r"encoder\.layers\.(\d+)\.(.*)\.(weight|bias)")
    for name in sorted(tensors):
        layer, rest, leaf = stem.fullmatch(name).groups()  # type: ignore[union-attr]
        if rest.startswith("self_attn.") and rest != "self_attn.out_proj":
            every = [tensors[f"encoder.layers.{layer}.self_attn.{part}_proj.{leaf}"] for part in "qkv"]
            found[f"transformer.resblocks.{layer}.attn.in_proj_{leaf}"] = torch.cat(every)
        else:
            found[f"transformer.resblocks.{layer}.{_CLIP[rest]}.{leaf}"] = tensors[name]
    return {prefix + name: tensor for name, tensor in found.items()}


def mmdit(module: nn.Module, prefix: str = "model.diffusion_model.") -> Tensors:
    """Of Stable Diffusion 3, which computes the last scales before the last shifts."""
    tensors, found = module.state_dict(), Tensors()
    last = len(module.transformer_blocks) - 1  # type: ignore[arg-type]
    for name, tensor in tensors.items():
        block = re.fullmatch(r"transformer_blocks\.(\d+)\.(.*)", name)
        if block is None:
            renamed = _renamed(name, _MMDIT)
            found[renamed] = _swapped(tensor) if name.startswith("norm_out") else tensor
            continue
        place, rest = int(block[1]), block[2]
        fused = re.fullmatch(r"(attn2?)\.(to_q|to_k|to_v|add_q_proj|add_k_proj|add_v_proj)\.(weight|bias)", rest)
        if fused is None:
            ours = _swapped(tensor) if place == last and rest.startswith("norm1_context") else tensor
            found[f"joint_blocks.{place}.{_renamed(rest, _MMDIT_BLOCK)}"] = ours
        elif fused[2] in ("to_q", "add_q_proj"):
            every = [tensors[name.replace("_q", f"_{part}")] for part in "qkv"]
            side = "x_block" if fused[2] == "to_q" else "context_block"
            found[f"joint_blocks.{place}.{side}.{fused[1]}.qkv.{fused[3]}"] = torch.cat(every)
    return {prefix + name: tensor for name, tensor in found.items()}


def _swapped(tensor: Tensor) -> Tensor:
    return torch.cat(tensor.chunk(2)[::-1])


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """The longest beginning that has another name is replaced."""
    fitting = [ours for ours in names if name == ours or name.startswith(f"{ours}.")]
    ours = max(fitting, key=len, default="")
    return names[ours] + name.removeprefix(ours) if ours else name
