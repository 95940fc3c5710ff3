"""The grammar of `--sparsity`.

    sparsity    = part ("+" part)*
    part        = N ":" M | ratio | "structured:" ratio | "heads:" ratio | "ffn:" ratio
    ratio       = number in [0, 1) | percentage

`2:4`: 2 of every 4 consecutive inputs are zero. `0.5`: half of the weights, anywhere. `structured:0.25`: a quarter
of the heads and of the FFN neurons leave the model. At most one of N:M and unstructured.
"""

import re
from dataclasses import dataclass
from decimal import Decimal

from obsdiff_runtime.errors import ConfigError


@dataclass(frozen=True)
class Unstructured:
    """A share of the weights, anywhere in the matrix."""

    ratio: float

    def __str__(self) -> str:
        return _decimal(self.ratio)


@dataclass(frozen=True)
class NM:
    """n of every m consecutive inputs are zero."""

    n: int
    m: int

    @property
    def ratio(self) -> float:
        return self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


Pattern = Unstructured | NM


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """What is removed: shares of whole units, then a pattern in the weights that are left."""

    heads: float = 0.0
    ffn: float = 0.0
    pattern: Pattern | None = None

    @property
    def structured(self) -> bool:
        return self.heads > 0 or self.ffn > 0

    def __str__(self) -> str:
        parts = []
        if self.heads == self.ffn and self.structured:
            parts.append(f"structured:{_decimal(self.heads)}")
        else:
            parts += [
                f"{kind}:{_decimal(ratio)}" for kind, ratio in (("heads", self.heads), ("ffn", self.ffn)) if ratio
            ]
        if self.pattern is not None:
            parts.append(str(self.pattern))
        return "+".join(parts) or "structured:0"


EXAMPLES = "2:4, 4:8, 0.5, 50%, structured:0.25, heads:0.2, ffn:0.3, structured:0.2+2:4"


def parse(text: str) -> Sparsity:
    """The sparsity that a string names.

    Raises:
        ConfigError: it names none; the message says which part and lists examples.
    """
    heads: float | None = None
    ffn: float | None = None
    pattern: Pattern | None = None
    for part in (part.strip() for part in text.split("+")):
        kind, _, value = part.partition(":")
        if kind in ("structured", "heads", "ffn"):
            ratio = _ratio(value, text)
            if (heads is not None and kind != "ffn") or (ffn is not None and kind != "heads"):
                raise ConfigError(f"--sparsity {text}: {kind} is given twice")
            heads = ratio if kind != "ffn" else heads
            ffn = ratio if kind != "heads" else ffn
        elif pattern is not None and part:
            raise ConfigError(f"--sparsity {text}: two patterns for the same weights, {pattern} and {part}")
        elif ":" in part:
            pattern = _n_of_m(part, text)
        else:
            pattern = Unstructured(_ratio(part, text))
    return Sparsity(heads=heads or 0.0, ffn=ffn or 0.0, pattern=pattern)


def _decimal(ratio: float) -> str:
    """The shortest decimal number, without exponent, that reads back as this ratio."""
    text = format(Decimal(repr(ratio)), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def _ratio(text: str, whole: str) -> float:
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)(%?)", text)
    if match is None:
        raise ConfigError(f"--sparsity {whole}: '{text}' is no ratio; examples: {EXAMPLES}")
    ratio = float(match[1]) / (100 if match[2] else 1)
    if not 0 <= ratio < 1:
        hint = f"; did you mean {text}%?" if 1 < ratio < 100 and not match[2] else ""
        raise ConfigError(f"--sparsity {whole}: {text} is not in [0, 1){hint}")
    return ratio


def _n_of_m(text: str, whole: str) -> NM:
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None:
        raise ConfigError(f"--sparsity {whole}: '{text}' is no sparsity; examples: {EXAMPLES}")
    n, m = int(match[1]), int(match[2])
    if not 0 < n < m:
        raise ConfigError(f"--sparsity {whole}: {n}:{m} means {n} zeros in every {m} weights; N must be 1 to M-1")
    return NM(n, m)
