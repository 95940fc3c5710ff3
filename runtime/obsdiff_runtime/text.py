"""Prompts to token ids, as transformers' fast tokenizers make them: from tokenizer.json and tokenizer_config.json."""

import logging
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from obsdiff_runtime.bundle import Bundle
from obsdiff_runtime.errors import BundleError

logger = logging.getLogger(__name__)

LONGEST: Final = 2**20  # transformers writes 1e30 where a tokenizer has no limit


class PromptTokenizer:
    """One tokenizer folder of a bundle.

    Attributes:
        max_length: longest text it was made for, in tokens with the special ones; None where it has no limit.
    """

    def __init__(self, bundle: Bundle, name: str) -> None:
        config = bundle.json(f"{name}/tokenizer_config.json")
        self._name = name
        self._tokenizer: Any = Tokenizer.from_file(str(bundle.path(f"{name}/tokenizer.json")))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._pad_id = self._pad(config)
        self._pads_left = config.get("padding_side") == "left"
        limit = config.get("model_max_length")
        self.max_length: int | None = int(limit) if isinstance(limit, int | float) and limit <= LONGEST else None

    def ids(self, prompts: Sequence[str], length: int) -> NDArray[np.int64]:
        """Token ids with special tokens, cut and padded to `length`, on the side that the tokenizer's config names.

        Returns:
            (len(prompts), length), int64.
        """
        return self.masked_ids(prompts, length)[0]

    def length(self, text: str) -> int:
        """Tokens of a text, with special tokens."""
        return len(self._tokenizer.encode(text).ids)

    def masked_ids(
        self, prompts: Sequence[str], length: int, *, pads_left: bool | None = None, special: bool = True
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The ids, and 1 where they are no padding, both (len(prompts), length), int64.

        Args:
            prompts: texts.
            length: of all rows.
            pads_left: whether padding stands in front of the text; None: as the tokenizer's config says.
            special: whether to put special tokens around the text; not where it has them, by a template.
        """
        pads_left = self._pads_left if pads_left is None else pads_left
        rows = np.full((len(prompts), length), self._pad_id, dtype=np.int64)
        mask = np.zeros_like(rows)
        for row, told, prompt in zip(rows, mask, prompts, strict=True):
            ids = self._tokenizer.encode(prompt, add_special_tokens=special).ids
            if len(ids) > length:
                logger.warning("%s: %d of %d tokens are used of a prompt", self._name, length, len(ids))
                self._tokenizer.enable_truncation(length)  # keeps the special tokens at the ends
                ids = self._tokenizer.encode(prompt, add_special_tokens=special).ids
                self._tokenizer.no_truncation()
            place = slice(length - len(ids), length) if pads_left else slice(0, len(ids))
            row[place] = ids
            told[place] = 1
        return rows, mask

    def _pad(self, config: dict[str, Any]) -> int:
        token = config.get("pad_token")
        content = token.get("content") if isinstance(token, dict) else token
        pad_id = None if content is None else self._tokenizer.token_to_id(str(content))
        if pad_id is None:
            raise BundleError(f"{self._name}/tokenizer_config.json: pad_token {content!r} is no token of the tokenizer")
        return int(pad_id)
