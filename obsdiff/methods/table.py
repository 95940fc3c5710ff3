"""The methods there are."""

from typing import Final

from obsdiff.methods import Method, dsnot, magnitude, obsdiff, sparsegpt, wanda

METHODS: Final[dict[str, Method]] = {
    "obsdiff": obsdiff,
    "sparsegpt": sparsegpt,
    "dsnot": dsnot,
    "wanda": wanda,
    "magnitude": magnitude,
}
