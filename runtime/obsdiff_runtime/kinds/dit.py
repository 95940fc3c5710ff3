"""Class-conditional DiT."""

from collections.abc import Sequence
from typing import Final

import numpy as np

from obsdiff_runtime.kinds import Conditions, Kind, Settings, skipped_whole
from obsdiff_runtime.labels import COUNT, read_labels
from obsdiff_runtime.networks import Networks


def encode(networks: Networks, prompts: Sequence[str], negative: bool, settings: Settings) -> Conditions:
    """Numbers of classes; the negative one is that behind the last, which stands for none."""
    config = networks.bundle.config("transformer")
    labels = read_labels(networks.bundle.index(), config)
    numbers = [int(config[COUNT]) if negative else labels.number(prompt) for prompt in prompts]
    return {"class_labels": np.array(numbers, np.int64)}


DIT: Final = Kind(
    encode=encode,
    only=lambda config: int(config["sample_size"]),
    skipped=skipped_whole,  # as PixArt's
    draws_classes=True,
    example="0",
)
