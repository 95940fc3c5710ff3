"""Train the pipeline that ships with obsdiff, from nothing, on a CPU.

    python examples/01_train_shapes/train.py --out shapes

Three stages: an autoencoder on drawn pictures, a pool of its latents, and the denoiser with both text encoders. The
autoencoder is not trained again when an interrupted run is started anew. Training follows the conventions by which
`StableDiffusion3Pipeline` later samples: flow matching between latent and noise, timestep 1000 sigma, the penultimate
hidden states and the projected end-of-text states of two CLIP encoders, zero tokens where T5 is absent, and the empty
prompt as the unconditional one.

Shapes: b batch, c latent channels, h w latent height and width, t text tokens, d width of a text token, p pooled width.
"""

import argparse
import copy
import dataclasses
import json
import logging
import math
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from obsdiff import shapes

logger = logging.getLogger("train_shapes")

PIXELS: Final = 64
TEXT_TOKENS: Final = 15
ZERO_TOKENS: Final = 1
TRAINED: Final = ("transformer", "text_encoder", "text_encoder_2")
"""What is trained with the autoencoder held fixed."""

DEFAULTS: Final[dict[str, Any]] = {
    "height": PIXELS,
    "width": PIXELS,
    "num_inference_steps": 20,
    "guidance_scale": 3.5,
    "max_sequence_length": ZERO_TOKENS,
    "prompts": "shapes",
}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much of everything."""

    vae_steps: int
    vae_batch: int
    pool: int
    steps: int
    batch: int


FULL: Final = Budget(vae_steps=1300, vae_batch=8, pool=40_000, steps=2000, batch=64)
SMOKE: Final = Budget(vae_steps=3, vae_batch=2, pool=16, steps=2, batch=4)


def train_tokenizer(folder: Path, vocabulary: int, seed: int) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges are learned from captions."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    bpe = Tokenizer(models.BPE(unk_token=end, end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[start, end],
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(shapes.captions(4000, seed), trainer)
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    tokenizer = CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=TEXT_TOKENS)
    tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def build_text_encoder(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=TEXT_TOKENS,
        projection_dim=width,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = CLIPTextModelWithProjection(config)
    for embedding in (encoder.text_model.embeddings.token_embedding, encoder.text_model.embeddings.position_embedding):
        nn.init.normal_(embedding.weight, std=0.3)  # CLIP's own 0.02 would drown in the biases of so small a model.
    return encoder


def build_pipeline(folder: Path, seed: int) -> StableDiffusion3Pipeline:
    """The pipeline with fresh weights; the tokenizers are trained here."""
    torch.manual_seed(seed)
    tokenizers = [train_tokenizer(folder / f"tokenizer{end}", 620, seed + i) for i, end in enumerate(("", "_2"))]
    encoders = [build_text_encoder(tokenizers[0], 64, 3), build_text_encoder(tokenizers[1], 96, 2)]
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=PIXELS,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
    )
    transformer = SD3Transformer2DModel(
        sample_size=PIXELS // 4,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=8,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=160,
        caption_projection_dim=128,
        pooled_projection_dim=160,
        pos_embed_max_size=PIXELS // 8,
        qk_norm="rms_norm",
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=scheduler,
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizers[0],
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizers[1],
        text_encoder_3=None,
        tokenizer_3=None,
    )


def picture_tensor(pictures: list[shapes.Image]) -> Tensor:
    """(b, 3, PIXELS, PIXELS) in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def schedule(progress: float, warm: float = 0.02) -> float:
    """Learning-rate factor at a fraction of the run: linear warm-up, then a cosine to a hundredth."""
    if progress < warm:
        return (progress + 1e-3) / (warm + 1e-3)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warm) / (1 - warm))))


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix update is orthogonalised (Jordan et al. 2024), in float32 and batched over equal shapes.

    A convolution's weight is the matrix from its patches to its output channels.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        shapes_ = sorted({tuple(m.shape) for m in matrices})
        groups = [{"params": [m for m in matrices if tuple(m.shape) == shape]} for shape in shapes_]
        super().__init__(groups, {"lr": lr, "initial_lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            weights = group["params"]
            gradient = torch.stack([w.grad.flatten(1) for w in weights])  # (k, out, in)
            state = self.state[weights[0]]
            average = state.setdefault("average", torch.zeros_like(gradient))
            average.lerp_(gradient, 1 - group["momentum"])
            update = orthogonalise(torch.lerp(gradient, average, group["momentum"]))
            rate = group["lr"] * max(1.0, update.shape[1] / update.shape[2]) ** 0.5
            for weight, change in zip(weights, update, strict=True):
                weight.sub_(change.view_as(weight), alpha=rate)


def adam(parameters: Iterable[nn.Parameter], but: list[nn.Parameter], lr: float) -> torch.optim.AdamW:
    """AdamW for those parameters that are not among the others."""
    others = {id(p) for p in but}
    rest = [p for p in parameters if id(p) not in others]
    return torch.optim.AdamW(
        [{"params": rest, "initial_lr": lr}], lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )


def orthogonalise(update: Tensor, steps: int = 5) -> Tensor:
    """(k, out, in): each matrix with its singular values moved close to one, by Newton-Schulz iterations."""
    tall = update.shape[1] > update.shape[2]
    x = update.mT if tall else update
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return x.mT if tall else x


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Change the optimizer's learning rates to this factor of their initial ones."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["initial_lr"]


def autoencoder_pictures(n: int, seed: int) -> Tensor:
    """Drawn pictures (n, 3, PIXELS, PIXELS); the even ones are two laid over each other, for more edges a pixel."""
    scenes = [shapes.parse(caption) for caption in shapes.captions(2 * n, seed, held_out=False, split="train")]
    drawn = [shapes.draw(scene, PIXELS, seed * 1000 + i) for i, scene in enumerate(scenes)]
    return picture_tensor([np.minimum(drawn[i], drawn[n + i]) if i % 2 == 0 else drawn[i] for i in range(n)])


def train_vae(vae: AutoencoderKL, budget: Budget, seed: int) -> None:
    """Train the autoencoder in place on drawn pictures, then set its latents' scale and shift as measured."""
    torch.manual_seed(seed)
    vae.train()
    matrices = [p for p in vae.parameters() if p.ndim >= 2 and min(p.shape[:2]) >= 16]
    optimizers = [Muon(matrices, lr=0.01), adam(vae.parameters(), matrices, lr=2e-3)]
    started, smooth = time.monotonic(), 1.0
    for step in range(budget.vae_steps):
        pictures = autoencoder_pictures(budget.vae_batch, seed + step)
        for optimizer in optimizers:
            set_rate(optimizer, schedule(step / budget.vae_steps))
            optimizer.zero_grad(set_to_none=True)
        posterior = vae.encode(pictures).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        squared = functional.mse_loss(decoded, pictures)
        torch.autograd.backward(functional.l1_loss(decoded, pictures) + squared + 5e-4 * divergence)
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        smooth = 0.95 * smooth + 0.05 * squared.item()
        if step % 50 == 49:
            pace = (time.monotonic() - started) / (step + 1)
            psnr = 10 * math.log10(4 / smooth)
            logger.info("vae step %d: PSNR %.1f dB, KL %.2f, %.2f s/step", step + 1, psnr, divergence.item(), pace)
    vae.eval()
    with torch.no_grad():
        latents = vae.encode(autoencoder_pictures(512, seed)[1::2]).latent_dist.mean
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Normalised latents (n, c, h, w) and their captions' tokens (n, t) for either encoder, and those of no caption."""

    latents: Tensor
    tokens: tuple[Tensor, Tensor]
    no_tokens: tuple[Tensor, Tensor]


def training_captions(n: int, seed: int) -> list[str]:
    """Captions of the training part, three in five with two objects; now and then one leaves sizes out."""
    rng = np.random.default_rng(seed)
    chosen = shapes.captions(n, seed, two_objects=0.6, held_out=False, split="train")
    return [c.replace(" small", "").replace(" large", "") if rng.random() < 0.06 else c for c in chosen]


@torch.no_grad()
def encode_pool(pipe: StableDiffusion3Pipeline, n: int, seed: int) -> Pool:
    """Draw n captioned pictures and encode them."""
    torch.manual_seed(seed)
    captions = training_captions(n, seed)
    parts = []
    for start in range(0, n, 64):
        batch = [shapes.draw(shapes.parse(captions[i]), PIXELS, seed + i) for i in range(start, min(n, start + 64))]
        pictures = picture_tensor(batch).contiguous(memory_format=torch.channels_last)
        parts.append(pipe.vae.encode(pictures).latent_dist.sample())
        if start % 6400 == 0:
            logger.info("pool %d of %d", start, n)
    latents = (torch.cat(parts).contiguous() - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    first, second = (
        (tokenize(tokenizer, captions), tokenize(tokenizer, [""])) for tokenizer in (pipe.tokenizer, pipe.tokenizer_2)
    )
    return Pool(latents=latents, tokens=(first[0], second[0]), no_tokens=(first[1], second[1]))


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """(n, t)."""
    ids: Tensor = tokenizer(
        captions, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


def encode_text(encoders: list[CLIPTextModelWithProjection], tokens: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Text as the denoiser reads it: (b, t + ZERO_TOKENS, d) and pooled (b, p)."""
    outputs = [encoder(ids, output_hidden_states=True) for encoder, ids in zip(encoders, tokens, strict=True)]
    states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)
    return functional.pad(states, (0, 0, 0, ZERO_TOKENS)), pooled


def start_at_zero(transformer: SD3Transformer2DModel) -> None:
    """Make every block the identity and the output zero, as DiT does (Peebles & Xie 2023); changes the transformer."""
    zeroed = ("norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out")
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(zeroed):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def denoiser_optimizers(pipe: StableDiffusion3Pipeline) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for everything else."""
    transformer = pipe.transformer
    blocks = transformer.transformer_blocks.named_parameters()
    matrices = [p for name, p in blocks if p.ndim == 2 and ".norm1" not in name and ".norm1_context" not in name]
    text = [*pipe.text_encoder.parameters(), *pipe.text_encoder_2.parameters()]
    return [Muon(matrices, lr=0.02), adam(transformer.parameters(), matrices, lr=2e-3), adam(text, [], lr=1e-3)]


def train_denoiser(pipe: StableDiffusion3Pipeline, pool: Pool, budget: Budget, out: Path, seed: int) -> None:
    """Train the denoiser and both text encoders in place; what is written to `out` are their moving averages."""
    torch.manual_seed(seed)
    start_at_zero(pipe.transformer)
    modules = nn.ModuleList(getattr(pipe, name) for name in TRAINED).train()
    average = copy.deepcopy(modules).eval().requires_grad_(False)
    optimizers = denoiser_optimizers(pipe)
    parameters: list[Tensor] = list(modules.parameters())
    averages: list[Tensor] = list(average.parameters())
    started, smooth = time.monotonic(), 1.0
    for step in range(1, budget.steps + 1):
        for optimizer in optimizers:
            set_rate(optimizer, schedule(step / budget.steps))
            optimizer.zero_grad(set_to_none=True)
        loss = flow_loss(pipe, pool, budget.batch)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, max(0.002, 1 / (1 + 0.1 * step)))
        smooth = 0.98 * smooth + 0.02 * loss.item()
        if not math.isfinite(smooth):
            raise FloatingPointError(f"the loss of step {step} is not finite; {out} holds the last good checkpoint")
        if step % 50 == 0:
            pace = (time.monotonic() - started) / step
            logger.info("denoiser step %d of %d: loss %.4f, %.2f s/step", step, budget.steps, smooth, pace)
        if step % 400 == 0 or step == budget.steps:
            save(pipe, average, out)


def flow_loss(pipe: StableDiffusion3Pipeline, pool: Pool, batch: int) -> Tensor:
    """Squared error of the predicted velocity, noise - latent, on a random batch with one caption in ten dropped."""
    chosen = torch.randint(len(pool.latents), (batch,))
    dropped = torch.rand(batch, 1) < 0.1
    tokens = [torch.where(dropped, none, ids[chosen]) for ids, none in zip(pool.tokens, pool.no_tokens, strict=True)]
    states, pooled = encode_text([pipe.text_encoder, pipe.text_encoder_2], tokens)
    uniform = (torch.arange(batch) + torch.rand(batch)) / batch
    sigma = 2 * uniform / (1 + uniform)
    latents = pool.latents[chosen]
    noise = torch.randn_like(latents)
    mixed = torch.lerp(latents, noise, sigma[:, None, None, None])
    velocity = pipe.transformer(
        hidden_states=mixed,
        timestep=1000 * sigma,
        encoder_hidden_states=states,
        pooled_projections=pooled,
        return_dict=False,
    )[0]
    return functional.mse_loss(velocity, noise - latents)


def save(pipe: StableDiffusion3Pipeline, average: nn.ModuleList, out: Path) -> None:
    """Write the pipeline, averaged, its weights stored in half precision but loaded as float32; it appears whole."""
    beside = out.with_name(out.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    names = ("transformer", "scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    parts = {name: getattr(pipe, name) for name in names} | dict(zip(TRAINED, average, strict=True))
    halves = {k: copy.deepcopy(v).half() if isinstance(v, nn.Module) else v for k, v in parts.items()}
    StableDiffusion3Pipeline(**halves, text_encoder_3=None, tokenizer_3=None).save_pretrained(beside)
    for path in beside.glob("*/config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        if "dtype" in config:
            config["dtype"] = "float32"  # transformers loads at the precision named here, diffusers at float32.
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (beside / "obsdiff_defaults.json").write_text(json.dumps(DEFAULTS, indent=2) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    beside.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the pipeline that ships with obsdiff.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished pipeline")
    parser.add_argument("--steps", type=int, default=FULL.steps, help="steps of the denoiser")
    parser.add_argument("--vae-steps", type=int, default=FULL.vae_steps, help="steps of the autoencoder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, to see that it runs")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    torch.set_num_threads(given.threads)
    full = dataclasses.replace(FULL, steps=given.steps, vae_steps=given.vae_steps)
    train(given.out, SMOKE if given.smoke else full, given.seed)


def train(out: Path, budget: Budget, seed: int) -> None:
    """Run the stages; what an interrupted run left in the work folder beside the output is used again."""
    work = out.with_name(out.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    pipe = build_pipeline(work, seed)
    if (work / "vae").exists():
        logger.info("autoencoder: found in %s", work)
        pipe.register_modules(vae=AutoencoderKL.from_pretrained(work / "vae"))
    else:
        train_vae(pipe.vae, budget, seed + 1)
        pipe.vae.save_pretrained(work / "vae")
    pipe.vae.requires_grad_(False)
    pool = encode_pool(pipe, budget.pool, seed + 2)
    train_denoiser(pipe, pool, budget, out, seed + 3)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
