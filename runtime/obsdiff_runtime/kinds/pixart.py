"""PixArt-alpha and -sigma."""

from collections.abc import Sequence
from typing import Final

import numpy as np

from obsdiff_runtime.kinds import Conditions, Kind, Settings, skipped_whole
from obsdiff_runtime.kinds.encoding import encode_masked
from obsdiff_runtime.networks import Networks

ADDED: Final = 128  # sample_size of a denoiser that is told the image's size where its config does not say


def encode(networks: Networks, prompts: Sequence[str], negative: bool, settings: Settings) -> Conditions:
    """T5, told what is padding, and which tokens are not; where the denoiser is trained so, the image's size and shape.

    As diffusers with clean_caption=False: prompts in lower case, without spaces at their ends. Its default, where
    ftfy and beautifulsoup4 are installed, also takes out links, marks and HTML. As with
    use_resolution_binning=False: the very size that is asked for is drawn. Its default draws the nearest of a table
    of sizes and scales the image.
    """
    written = [prompt.lower().strip() for prompt in prompts]
    states, mask = encode_masked(networks, "", written, settings.max_sequence_length)
    told = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
    config = networks.bundle.config("transformer")
    added = config.get("use_additional_conditions")
    if config["sample_size"] == ADDED if added is None else added:
        height, width = settings.height, settings.width
        told["resolution"] = np.tile(np.array([height, width], np.float32), (len(prompts), 1))
        told["aspect_ratio"] = np.full((len(prompts), 1), height / width, np.float32)
    return told


PIXART: Final = Kind(
    encode=encode,
    skipped=skipped_whole,  # diffusers has no pipeline of PixArt that changes an image; as Stable Diffusion's
)
