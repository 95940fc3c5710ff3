"""Cached text embeddings against the pipeline's own reading of the prompt."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import SanaPipeline

from obsdiff.families.table import FAMILIES
from obsdiff.sampling import exactly
from obsdiff_runtime.errors import ConfigError, ModelError

PROMPTS = ["red box", "a blue one"]
CASES = [
    ("sd3", {"with_t5": True}),
    ("sd3", {}),
    ("sd15", {}),
    ("sdxl", {}),
    ("flux", {}),
    ("pixart", {}),
    ("pixart", {"sigma": True}),
    ("auraflow", {}),
    ("sana", {}),
    ("hunyuan", {}),
]


def latents(pipeline: Any, **call: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    exact = exactly(pipeline, embedded="prompt" not in call)
    size = (32, 64) if isinstance(pipeline, SanaPipeline) else (16, 24)  # Sana's are multiples of 32
    sized = dict(zip(("height", "width"), size, strict=True))
    found: torch.Tensor = pipeline(
        num_inference_steps=2, generator=generator, output_type="latent", **(sized | exact | call)
    ).images
    return found


def options(kind: str) -> dict[str, int]:
    return {"max_sequence_length": 6} if kind in ("sd3", "flux", "pixart", "auraflow", "sana") else {}


@pytest.mark.parametrize(("kind", "changes"), CASES)
@pytest.mark.parametrize("negative", [None, ["ugly", ""]])
def test_a_call_with_embeddings_equals_a_call_with_prompts(
    kind: str, changes: dict[str, Any], negative: list[str] | None, build_pipeline: Callable[..., Any]
) -> None:
    pipeline = build_pipeline(kind, **changes)
    family = FAMILIES.get(kind, FAMILIES["unet"])
    unwanted = (negative or ["", ""]) if family.negatives else []
    encoded = family.encode(pipeline, PROMPTS, unwanted, **options(kind))
    given = {} if negative is None else {"negative_prompt": negative}
    expected = latents(pipeline, prompt=PROMPTS, guidance_scale=4.0, **given, **options(kind))
    assert torch.equal(latents(pipeline, guidance_scale=4.0, **encoded), expected)
    assert all(tensor.shape[0] == len(PROMPTS) and not tensor.requires_grad for tensor in encoded.values())


@pytest.mark.parametrize(("kind", "changes"), CASES[1:])
def test_without_guidance_there_are_no_negative_embeddings(
    kind: str, changes: dict[str, Any], build_pipeline: Callable[..., Any]
) -> None:
    pipeline = build_pipeline(kind, **changes)
    family = FAMILIES.get(kind, FAMILIES["unet"])
    encoded = family.encode(pipeline, PROMPTS, [])
    assert not any(name.startswith("negative") for name in encoded)
    expected = latents(pipeline, prompt=PROMPTS, guidance_scale=1.0)
    assert torch.equal(latents(pipeline, guidance_scale=1.0, **encoded), expected)


def test_the_length_of_the_text_is_honoured(build_pipeline: Callable[..., Any]) -> None:
    pipeline = build_pipeline("sd3", with_t5=True)
    lengths = [
        FAMILIES["sd3"].encode(pipeline, PROMPTS, [], max_sequence_length=length)["prompt_embeds"].shape[1]
        for length in (4, 6)
    ]
    assert lengths[1] - lengths[0] == 2
    assert FAMILIES["flux"].encode(build_pipeline("flux"), PROMPTS, [], max_sequence_length=6)["prompt_embeds"].shape[
        :2
    ] == (2, 6)
    with pytest.raises(ConfigError, match="--max-sequence-length"):
        FAMILIES["unet"].encode(build_pipeline("sd15"), PROMPTS, [], max_sequence_length=4)
    with pytest.raises(ConfigError, match=r"--max-sequence-length.* 77 tokens and 256"):
        FAMILIES["hunyuan"].encode(build_pipeline("hunyuan"), PROMPTS, [], max_sequence_length=4)


def test_flux_takes_no_negative_prompt(build_pipeline: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="takes no negative prompts"):
        FAMILIES["flux"].encode(build_pipeline("flux"), PROMPTS, ["ugly", ""])


def test_a_pipeline_without_text_encoders_is_an_error(build_pipeline: Callable[..., Any]) -> None:
    pipeline = build_pipeline("sd3")
    pipeline.text_encoder_2 = None
    with pytest.raises(ModelError, match="has no text_encoder_2"):
        FAMILIES["sd3"].encode(pipeline, PROMPTS, [])
