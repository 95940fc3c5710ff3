"""The methods there are."""

from typing import Final

from obsdiff.methods import Method, dsnot, magnitude, obsdiff, sparsegpt, streamed, wanda

METHODS: Final[dict[str, Method]] = {
    "streamed": streamed,
    "obsdiff": obsdiff,
    "sparsegpt": sparsegpt,
    "dsnot": dsnot,
    "wanda": wanda,
    "magnitude": magnitude,
}
