"""Token ids against transformers' own tokenizers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from obsdiff_runtime.bundle import Bundle, Defaults, Manifest, open_bundle, read_manifest, write_manifest
from obsdiff_runtime.errors import BundleError
from obsdiff_runtime.text import PromptTokenizer

PROMPTS = [
    "",
    "a large red circle above a small blue square",
    "It's  an ODD\tcaption: 42 pieces, naïve café 😀",
    " ".join(["very long"] * 40),
    "<|endoftext|> inside",
]


def bundle_of(folder: Path, tokenizer: Any) -> Bundle:
    tokenizer.save_pretrained(folder / "tokenizer")
    write_manifest(
        folder,
        Manifest(
            created_by="a test",
            family="sd3",
            pipeline_class="StableDiffusion3Pipeline",
            sparsity="dense",
            defaults=Defaults(height=8, width=8, num_inference_steps=1, guidance_scale=1.0),
            components={},
        ),
    )
    return open_bundle(folder)


@pytest.mark.parametrize("length", [16, 6, 2])
@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_clip_ids_are_transformers(make_clip_tokenizer: Any, tmp_path: Path, pad: str, length: int) -> None:
    theirs = make_clip_tokenizer(pad_token=pad)
    ours = PromptTokenizer(bundle_of(tmp_path, theirs), "tokenizer")
    expected = theirs(PROMPTS, padding="max_length", max_length=length, truncation=True, return_tensors="np").input_ids
    ids = ours.ids(PROMPTS, length)
    assert ids.dtype == np.int64
    np.testing.assert_array_equal(ids, expected)
    assert ours.max_length == 16


@pytest.mark.parametrize("length", [5, 32, 256])
def test_t5_ids_are_transformers(make_t5_tokenizer: Any, tmp_path: Path, length: int) -> None:
    theirs = make_t5_tokenizer()
    ours = PromptTokenizer(bundle_of(tmp_path, theirs), "tokenizer")
    prompts = [prompt for prompt in PROMPTS if "<|" not in prompt]
    expected = theirs(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="np")
    ids, mask = ours.masked_ids(prompts, length)
    np.testing.assert_array_equal(ids, expected.input_ids)
    np.testing.assert_array_equal(mask, expected.attention_mask)
    np.testing.assert_array_equal(ours.ids(prompts, length), ids)


@pytest.mark.parametrize("length", [5, 64])
def test_a_tokenizer_that_pads_in_front_is_followed(make_llama_tokenizer: Any, tmp_path: Path, length: int) -> None:
    theirs = make_llama_tokenizer()
    theirs.init_kwargs["padding_side"] = theirs.padding_side  # as delivery.copy_rest
    ours = PromptTokenizer(bundle_of(tmp_path, theirs), "tokenizer")
    expected = theirs(PROMPTS, padding="max_length", max_length=length, truncation=True, return_tensors="np")
    ids, mask = ours.masked_ids(PROMPTS, length)
    assert mask[:, -1].all()
    np.testing.assert_array_equal(ids, expected.input_ids)
    np.testing.assert_array_equal(mask, expected.attention_mask)


def test_a_cut_prompt_is_told(make_clip_tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours = PromptTokenizer(bundle_of(tmp_path, make_clip_tokenizer()), "tokenizer")
    ours.ids(["a red circle"], 16)
    assert not caplog.records
    ours.ids(["red " * 30], 16)
    assert "16 of 32 tokens are used" in caplog.text


def test_an_unlimited_tokenizer_has_no_max_length(make_clip_tokenizer: Any, tmp_path: Path) -> None:
    tokenizer = make_clip_tokenizer()
    tokenizer.model_max_length = int(1e30)
    assert PromptTokenizer(bundle_of(tmp_path, tokenizer), "tokenizer").max_length is None


def test_an_unknown_pad_token_is_named(make_clip_tokenizer: Any, tmp_path: Path) -> None:
    bundle_of(tmp_path, make_clip_tokenizer())
    path = tmp_path / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "<nothing>"}))
    write_manifest(tmp_path, read_manifest(tmp_path))
    with pytest.raises(BundleError, match="pad_token '<nothing>' is no token"):
        PromptTokenizer(open_bundle(tmp_path), "tokenizer")
