"""The GPU that engines are built for: the first that is visible."""

from obsdiff_runtime.gpus import find_gpus


def compute_capability() -> str | None:
    """That of the first visible GPU ("8.6"), None where there is no driver or no GPU."""
    devices = find_gpus().devices
    return devices[0].capability if devices else None
