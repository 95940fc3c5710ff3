"""LPIPS: how different two pictures look to AlexNet.

Zhang, Isola, Efros, Shechtman and Wang 2018, eq. 1: features of five layers, each scaled to unit length over its
channels; squared differences, weighted per channel, averaged over places, summed over layers. The channel weights
(version 0.1) come with torchmetrics; AlexNet's weights are the user's.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from obsdiff.metrics import Picture
from obsdiff_runtime.errors import ConfigError, MissingPackageError

SHIFT: Final = (-0.030, -0.088, -0.188)
SCALE: Final = (0.458, 0.448, 0.450)
RELU_AFTER: Final = (1, 4, 7, 9, 11)
SMALLEST: Final = 31
"""Side of the smallest picture that leaves anything to the last layer."""


class Lpips(nn.Module):
    """The distance, as a function of two pictures."""

    def __init__(self, alexnet: Mapping[str, Tensor], channel_weights: Mapping[str, Tensor]) -> None:
        """Takes AlexNet's weights under torchvision's names, and those of the channels under torchmetrics'.

        Raises:
            ConfigError: these are no AlexNet's weights.
        """
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
        )
        found = {name: tensor for name, tensor in alexnet.items() if name.startswith("features.")}
        try:
            self.load_state_dict(found)
        except RuntimeError:
            raise ConfigError(
                "--lpips: these are not the weights of torchvision's AlexNet (features.0.weight and so on)"
            ) from None
        self.channel_weights = [channel_weights[f"lin{layer}.model.1.weight"] for layer in range(5)]
        self.eval().requires_grad_(False)

    def distance(self, a: Picture, b: Picture) -> float:
        """0 for identical pictures; they are (height, width, 3) uint8 and of one size.

        Raises:
            ConfigError: they are too small.
        """
        if min(a.shape[:2]) < SMALLEST:
            raise ConfigError(f"--lpips: pictures of {a.shape[0]}x{a.shape[1]} pixels; it needs {SMALLEST}x{SMALLEST}")
        x = torch.stack([torch.from_numpy(picture.copy()).permute(2, 0, 1) for picture in (a, b)])  # (2, 3, h, w)
        x = (x.float() / 127.5 - 1 - torch.tensor(SHIFT).view(3, 1, 1)) / torch.tensor(SCALE).view(3, 1, 1)
        total = 0.0
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in RELU_AFTER:
                unit = x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt()
                weights = self.channel_weights[RELU_AFTER.index(index)].view(-1, 1, 1)
                total += float(((unit[0] - unit[1]).square() * weights).sum(0).mean())
        return total


def load_lpips(weights: Path) -> Lpips:
    """LPIPS with AlexNet's weights from a file: .safetensors, or .pth as torchvision publishes it.

    Raises:
        MissingPackageError: torchmetrics is absent.
        ConfigError: the file is absent, unreadable or something else.
    """
    found = find_spec("torchmetrics")
    if found is None or found.origin is None:
        raise MissingPackageError("--lpips: the channel weights come with torchmetrics: pip install 'obsdiff[eval]'")
    heads = Path(found.origin).parent / "functional" / "image" / "lpips_models" / "alex.pth"
    if not weights.is_file():
        raise ConfigError(
            f"--lpips {weights}: no such file; give AlexNet's weights, torchvision's alexnet-owt-7be5be79.pth"
        )
    return Lpips(_read(weights), _read(heads))


def _read(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ConfigError(f"{path}: no file of weights: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path}: no file of weights, but a {type(data).__name__}")
    return data
