"""Train a second pipeline to measure on, unlike the shipped one: a UNet that writes handwritten digits.

    python benchmarks/digits.py --out digits

It is a Stable Diffusion 1 in small: an autoencoder, one CLIP text encoder, a UNet with cross-attention that predicts
the noise, DDIM. The pictures are scikit-learn's 1797 digits of 8 x 8 pixels (UCI, "Optical Recognition of Handwritten
Digits", CC BY 4.0), enlarged and inked in a colour on black, one or two in a picture:

    a bright red three on the left and a dim blue five on the right
    a green seven in the middle

Which digit, colour and shade stand where is for the caption to say, so text and guidance matter. Beside the weights lie
`calibration_prompts.txt` and `evaluation_prompts.txt`, never trained on; `digits_check.py` reads pictures back.

Shapes: b batch, h w sides of a picture.
"""

import argparse
import copy
import json
import logging
import math
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

logger = logging.getLogger("digits")

NUMBERS: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS: Final = {"red": (255, 50, 50), "green": (50, 220, 70), "blue": (70, 110, 255), "white": (235, 235, 235)}
SHADES: Final = {"bright": 1.0, "dim": 0.45}
PLACES: Final = {"on the left": 0, "in the middle": 12, "on the right": 24}
"""The left edge of a digit's square, in pixels."""
HEIGHT, WIDTH, DIGIT, JITTER = 24, 48, 20, 2
TEXT_TOKENS, TEXT_WIDTH, LATENTS = 20, 128, 8
DEFAULTS: Final = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 20, "guidance_scale": 3.0}


class Item(NamedTuple):
    """One digit as a caption names it; no colour or shade means any."""

    digit: int
    colour: str | None
    shade: str | None
    place: str


def parse(caption: str) -> list[Item]:
    """The digits that a caption names; a ValueError if it is none of this module's."""
    items = []
    for words in (part.split() for part in caption.split(" and ")):
        colour, shade = (next((word for word in words if word in known), None) for known in (COLOURS, SHADES))
        place = " ".join(words[-3:])
        if len(words) < 5 or words[-4] not in NUMBERS or place not in PLACES:
            raise ValueError(f"{caption!r} is none; expected 'a [SHADE] [COLOUR] NUMBER PLACE [and ...]'")
        items.append(Item(NUMBERS.index(words[-4]), colour, shade, place))
    return items


def captions(n: int, seed: int, split: str = "train") -> list[str]:
    """Random captions, two in three with two digits. A caption's hash decides which split it belongs to."""
    rng = np.random.default_rng(seed)
    found: list[str] = []
    while len(found) < n:
        parts = []
        for place in ["in the middle"] if rng.random() < 1 / 3 else rng.permutation(["on the left", "on the right"]):
            words = [rng.choice(list(known)) for known in (SHADES, COLOURS) if rng.random() < 0.85] or ["handwritten"]
            parts.append(" ".join(("a", *words, rng.choice(NUMBERS), place)))
        caption = " and ".join(parts)
        if {0: "calibration", 1: "evaluation"}.get(zlib.crc32(caption.encode()) % 10, "train") == split:
            found.append(caption)
    return found


class Pen:
    """Writes captions with the digits of scikit-learn, each somewhere in its square."""

    def __init__(self) -> None:
        data = load_digits()
        small = torch.from_numpy(data.images).float()[:, None] / 16  # (n, 1, 8, 8)
        large = functional.interpolate(small, size=(DIGIT, DIGIT), mode="bicubic", align_corners=False)
        self.ink: NDArray[np.float32] = large[:, 0].clamp(0, 1).numpy()
        self.samples = [np.flatnonzero(data.target == digit) for digit in range(10)]

    def draw(self, caption: str, rng: np.random.Generator) -> NDArray[np.float32]:
        """(3, h, w) in [0, 1]."""
        picture = np.zeros((3, HEIGHT, WIDTH), np.float32)
        for item in parse(caption):
            colour = np.array(COLOURS[item.colour or str(rng.choice(list(COLOURS)))], np.float32) / 255
            shade = SHADES[item.shade or str(rng.choice(list(SHADES)))]
            down, along = rng.integers(2 * JITTER + 1, size=2)
            across = PLACES[item.place] + along
            ink = self.ink[rng.choice(self.samples[item.digit])]
            picture[:, down : down + DIGIT, across : across + DIGIT] = shade * colour[:, None, None] * ink
        return picture

    def batch(self, lines: list[str], rng: np.random.Generator) -> Tensor:
        """(b, 3, h, w) in [-1, 1]."""
        return torch.from_numpy(np.stack([self.draw(line, rng) for line in lines])) * 2 - 1


def train_tokenizer(folder: Path, seed: int) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges are learned from captions."""
    start, end, ending = "<|startoftext|>", "<|endoftext|>", "</w>"
    bpe = Tokenizer(models.BPE(unk_token=end, end_of_word_suffix=ending))
    splitting = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Sequence(splitting), decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    first = [start, end, *letters, *(letter + ending for letter in letters)]  # else their order is that of a hash map
    trainer = trainers.BpeTrainer(special_tokens=first, end_of_word_suffix=ending, show_progress=False)
    bpe.train_from_iterator(captions(2000, seed), trainer)
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=TEXT_TOKENS).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_TOKENS,
        **special,
    )
    encoder = CLIPTextModel(config)
    for module in (module for module in encoder.modules() if isinstance(module, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.3)  # CLIP's own 0.02 would drown in the biases of so small a model.
    return encoder


def build_pipeline(folder: Path, seed: int) -> StableDiffusionPipeline:
    """The pipeline with fresh weights; the tokenizer is trained here."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(folder / "tokenizer", seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=LATENTS,
        norm_num_groups=4,
    )
    unet = UNet2DConditionModel(
        sample_size=(HEIGHT // 4, WIDTH // 4),
        in_channels=LATENTS,
        out_channels=LATENTS,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(64, 96),
        transformer_layers_per_block=(1, 3),
        attention_head_dim=(4, 6),  # what diffusers calls so is the number of heads
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=TEXT_WIDTH,
        use_linear_projection=True,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


class Muon:
    """Momentum whose update is orthogonalised (Jordan et al. 2024), batched over weights of equal shape."""

    def __init__(self, weights: list[nn.Parameter], rate: float) -> None:
        self.rate = rate
        self.alike = [[w for w in weights if w.shape == shape] for shape in sorted({tuple(w.shape) for w in weights})]
        self.momenta = [torch.zeros(len(same), *same[0].flatten(1).shape) for same in self.alike]  # (k, out, in)

    @torch.no_grad()
    def step(self, factor: float) -> None:
        for same, momentum in zip(self.alike, self.momenta, strict=True):
            gradient = torch.stack([weight.grad.flatten(1) for weight in same if weight.grad is not None])
            x = torch.lerp(gradient, momentum.lerp_(gradient, 0.05), 0.95)
            scale = self.rate * factor * max(1.0, x.shape[1] / x.shape[2]) ** 0.5
            tall = x.shape[1] > x.shape[2]
            x = x.mT if tall else x
            x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
            for _ in range(5):  # Newton-Schulz: every singular value comes close to one
                a = x @ x.mT
                x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.775, alpha=2.0315), x, beta=3.4445)
            for weight, update in zip(same, x.mT if tall else x, strict=True):
                weight.sub_(update.reshape(weight.shape), alpha=scale)


def minimise(trained: nn.Module, loss_of: Callable[[], Tensor], steps: int, name: str) -> nn.Module:
    """Trains in place: Muon for matrices and convolutions, AdamW for the rest. Returns the weights' moving average."""
    average = copy.deepcopy(trained.train()).requires_grad_(False).eval()
    weights = list(trained.parameters())
    embeddings = {id(module.weight) for module in trained.modules() if isinstance(module, nn.Embedding)}
    matrices = [w for w in weights if w.ndim >= 2 and min(w.shape[:2]) >= 16 and id(w) not in embeddings]
    rest = [w for w in weights if id(w) not in set(map(id, matrices))]
    muon, adam = Muon(matrices, 0.02), torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    started, smooth = time.monotonic(), 1.0
    for step in range(1, steps + 1):
        factor = min(1.0, 50 * step / steps) * (0.505 + 0.495 * math.cos(math.pi * step / steps))
        adam.param_groups[0]["lr"] = 2e-3 * factor
        trained.zero_grad(set_to_none=True)
        loss = loss_of()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(weights, 1.0, error_if_nonfinite=True)
        muon.step(factor)
        adam.step()
        with torch.no_grad():
            torch._foreach_lerp_([*average.parameters()], [*weights], max(0.003, 1 / (1 + 0.1 * step)))
        smooth = 0.98 * smooth + 0.02 * loss.item()
        if step % 50 == 0:
            logger.info("%s %d of %d: loss %.4f, %.0f s", name, step, steps, smooth, time.monotonic() - started)
    return average


def train(pipe: StableDiffusionPipeline, vae_steps: int, steps: int, batch: int, seed: int) -> None:
    """Trains the autoencoder, then the UNet and the text encoder, all in place."""
    rng, pen = np.random.default_rng(seed), Pen()
    words = iter(captions(batch * (vae_steps + steps), seed))

    def pictures() -> tuple[list[str], Tensor]:
        lines = [next(words) for _ in range(batch)]
        return lines, pen.batch(lines, rng)

    def autoencoder_loss() -> Tensor:
        _, drawn = pictures()
        posterior = pipe.vae.encode(drawn).latent_dist
        decoded = pipe.vae.decode(posterior.sample()).sample
        divergence: Tensor = posterior.kl().mean() / posterior.mean[0].numel()
        return functional.mse_loss(decoded, drawn) + functional.l1_loss(decoded, drawn) + 1e-4 * divergence

    pipe.register_modules(vae=minimise(pipe.vae, autoencoder_loss, vae_steps, "autoencoder"))
    with torch.no_grad():
        latents = pipe.vae.encode(pen.batch(captions(256, seed + 1), rng)).latent_dist.mean
    pipe.vae.register_to_config(scaling_factor=1 / latents.std().item())

    def denoiser_loss() -> Tensor:
        lines, drawn = pictures()
        with torch.no_grad():
            latents = pipe.vae.encode(drawn).latent_dist.sample() * pipe.vae.config.scaling_factor
        kept = [line if rng.random() > 0.1 else "" for line in lines]
        tokens = pipe.tokenizer(kept, padding="max_length", return_tensors="pt").input_ids
        times = ((torch.arange(batch) + torch.rand(batch)) * 1000 / batch).long()
        noise = torch.randn_like(latents)
        noisy = pipe.scheduler.add_noise(latents, noise, times)
        error = (pipe.unet(noisy, times, pipe.text_encoder(tokens)[0]).sample - noise).square().mean((1, 2, 3))
        signal = pipe.scheduler.alphas_cumprod[times]
        weighted: Tensor = error * (5 * (1 - signal) / signal).clamp(0.2, 1)  # min-SNR-5, Hang et al. 2023, from 0.2 up
        return weighted.mean()

    trained = nn.ModuleDict({"unet": pipe.unet, "text_encoder": pipe.text_encoder})
    pipe.register_modules(**dict(minimise(trained, denoiser_loss, steps, "denoiser").named_children()))


def save(pipe: StableDiffusionPipeline, out: Path) -> None:
    """Writes the pipeline, how obsdiff runs it, and prompts that it was not trained on."""
    pipe.save_pretrained(out)
    (out / "obsdiff_defaults.json").write_text(json.dumps(DEFAULTS, indent=2) + "\n")
    for split, n in (("calibration", 64), ("evaluation", 96)):
        unique = list(dict.fromkeys(captions(2 * n, 0, split)))
        (out / f"{split}_prompts.txt").write_text("\n".join(unique[:n]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a pipeline that writes digits.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished pipeline")
    parser.add_argument("--vae-steps", type=int, default=350)
    parser.add_argument("--steps", type=int, default=1200, help="of the UNet and the text encoder")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="two steps of everything, to see that it runs")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    vae_steps, steps, batch = (2, 2, 4) if given.smoke else (given.vae_steps, given.steps, given.batch)
    pipe = build_pipeline(beside := given.out.with_name(f"{given.out.name}.new"), given.seed)
    train(pipe, vae_steps, steps, batch, given.seed)
    save(pipe, beside)
    beside.rename(given.out)


if __name__ == "__main__":
    main()
