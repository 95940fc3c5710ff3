"""Cached text embeddings against the pipeline's own reading of the prompt."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import LTXPipeline, Lumina2Pipeline, SanaPipeline, SanaSprintPipeline, WanPipeline

from kinds import masking
from obsdiff import calls
from obsdiff.families import guided, parts
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
    ("flux2", {}),
    ("pixart", {}),
    ("pixart", {"sigma": True}),
    ("auraflow", {}),
    ("sana", {}),
    ("qwen", {}),
    ("lumina2", {}),
    ("zimage", {}),
    ("hunyuan", {}),
    ("wan", {}),
    ("ltx", {}),
]


def latents(pipeline: Any, *, guidance_scale: float, **call: Any) -> torch.Tensor:
    guided = {parts.guidance_argument(type(pipeline)): guidance_scale}
    generator = torch.Generator().manual_seed(0)
    exact = exactly(pipeline, embedded="prompt" not in call, pixels=64 * 64)
    large = isinstance(pipeline, SanaPipeline | SanaSprintPipeline | Lumina2Pipeline | WanPipeline | LTXPipeline)
    size = (32, 64) if large else (16, 24)  # multiples of 32 and 16
    sized = dict(zip(("height", "width"), size, strict=True))
    found: torch.Tensor = calls.call(pipeline)(
        num_inference_steps=2, generator=generator, output_type="latent", **(sized | exact | guided | call)
    )[0]
    return found


def options(kind: str) -> dict[str, int]:
    named = ("sd3", "flux", "pixart", "auraflow", "sana", "qwen", "lumina2", "wan", "ltx")
    lengths = dict.fromkeys(named, 6) | {"flux2": 30, "zimage": 30}  # their template is 20 long
    return {"max_sequence_length": lengths[kind]} if kind in lengths else {}


@pytest.mark.parametrize(("kind", "changes"), CASES)
@pytest.mark.parametrize("negative", [None, ["ugly", ""]])
def test_a_call_with_embeddings_equals_a_call_with_prompts(
    kind: str, changes: dict[str, Any], negative: list[str] | None, build_pipeline: Callable[..., Any]
) -> None:
    pipeline = build_pipeline(kind, **changes)
    family = FAMILIES.get(kind, FAMILIES["unet"])
    unwanted = (negative or ["", ""]) if family.negatives else []
    encoded = family.encode(pipeline, PROMPTS, unwanted, **options(kind))
    given: dict[str, Any] = {} if negative is None else {"negative_prompt": list(negative)}
    if given and kind == "flux2":  # whose call has no negative texts
        given = {"negative_prompt_embeds": pipeline.encode_prompt(negative, **options(kind))[0]}
    told = {"prompt": list(PROMPTS), **given}  # lists of its own: Z-Image's call writes its template into them
    expected = latents(pipeline, guidance_scale=4.0, **told, **options(kind))
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
    scale = 0.0 if kind == "zimage" else 1.0
    assert not guided(family, getattr(pipeline, family.denoiser), scale)
    assert guided(family, getattr(pipeline, family.denoiser), scale + 0.1) == (kind != "flux" and family.negatives)
    expected = latents(pipeline, prompt=list(PROMPTS), guidance_scale=scale)
    found = latents(pipeline, guidance_scale=scale, **encoded)
    if kind == "qwen":  # its own call pads to the longest prompt only, and sums run in another order
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_chroma_masks_padded_text_out_as_its_call_does_that_is_told_booleans(
    scale: float, build_pipeline: Callable[..., Any]
) -> None:
    """The day that they are equal without, diffusers masks it out itself."""
    pipeline, unwanted = build_pipeline("chroma"), ["ugly", ""] if scale > 1 else []
    encoded = FAMILIES["chroma"].encode(pipeline, PROMPTS, unwanted, max_sequence_length=30)
    told = {"prompt": list(PROMPTS), "negative_prompt": ["ugly", ""], "max_sequence_length": 30}
    shown = [int(row.sum()) for name, rows in encoded.items() if name.endswith("mask") for row in rows]
    assert shown == [len(ids) + 1 for ids in pipeline.tokenizer([*PROMPTS, *unwanted])["input_ids"]]  # one of padding
    found = latents(pipeline, guidance_scale=scale, **encoded)
    assert not torch.allclose(found, latents(pipeline, guidance_scale=scale, **told), atol=1e-3)
    assert torch.equal(found, latents(masking(pipeline), guidance_scale=scale, **told))


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


def test_flux2_dev_takes_no_negative_prompt(build_pipeline: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"FLUX\.2-dev takes no negative prompts"):
        FAMILIES["flux2"].encode(build_pipeline("flux2", guidance_embeds=True), PROMPTS, ["ugly", ""])


def test_a_pipeline_without_text_encoders_is_an_error(build_pipeline: Callable[..., Any]) -> None:
    pipeline = build_pipeline("sd3")
    pipeline.text_encoder_2 = None
    with pytest.raises(ModelError, match="has no text_encoder_2"):
        FAMILIES["sd3"].encode(pipeline, PROMPTS, [])


def test_sana_sprint_reads_prompts_as_its_call_does_and_no_negative_ones(build_pipeline: Callable[..., Any]) -> None:
    pipeline, sana = build_pipeline("sana_sprint"), FAMILIES["sana"]
    encoded = sana.encode(pipeline, PROMPTS, [], max_sequence_length=6)
    expected = latents(pipeline, guidance_scale=4.0, prompt=PROMPTS, max_sequence_length=6)
    assert torch.equal(latents(pipeline, guidance_scale=4.0, **encoded), expected)
    assert not torch.equal(latents(pipeline, guidance_scale=2.0, **encoded), expected)  # its denoiser is told
    assert not guided(sana, pipeline.transformer, 4.0)
    with pytest.raises(ConfigError, match="Sana-Sprint takes no negative prompts"):
        sana.encode(pipeline, PROMPTS, ["ugly", ""])
