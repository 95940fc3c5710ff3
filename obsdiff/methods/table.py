"""The methods there are."""

from typing import Final

from obsdiff.methods import Method, magnitude, obsdiff, wanda

METHODS: Final[dict[str, Method]] = {
    "obsdiff": obsdiff,
    "wanda": wanda,
    "magnitude": magnitude,
}
