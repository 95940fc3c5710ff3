"""HunyuanDiT."""

from collections.abc import Sequence
from typing import Final

import numpy as np

from obsdiff_runtime.kinds import Conditions, Kind, Settings, skipped_whole
from obsdiff_runtime.kinds.encoding import encode_masked
from obsdiff_runtime.networks import Networks

ORIGINAL_SIZE: Final = (1024, 1024)  # pixels; the pipeline's default for the picture that the drawn one is made of


def encode(networks: Networks, prompts: Sequence[str], negative: bool, settings: Settings) -> Conditions:
    """BERT and T5, told what is padding, which tokens are not; up to version 1.1 of the denoiser, the image's size.

    As with use_resolution_binning=False: the very size that is asked for is drawn.
    """
    config = networks.bundle.config("transformer")
    told: Conditions = {}
    for suffix, name, length in (("", "", "text_len"), ("_2", "_t5", "text_len_t5")):
        states, mask = encode_masked(networks, suffix, prompts, int(config[length]))
        told |= {f"encoder_hidden_states{name}": states, f"text_embedding_mask{name}": mask}
    if config["use_style_cond_and_image_meta_size"]:
        sizes = np.array([*ORIGINAL_SIZE, settings.height, settings.width, 0, 0], np.float32)
        told["image_meta_size"] = np.tile(sizes, (len(prompts), 1))
    return told


HUNYUAN: Final = Kind(
    encode=encode,
    skipped=skipped_whole,  # as PixArt's
)
