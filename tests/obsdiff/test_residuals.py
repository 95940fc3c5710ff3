from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from obsdiff import residuals
from obsdiff.families.table import FAMILIES
from obsdiff.residuals import BlockErrors, Clock, block_modules
from obsdiff_runtime.errors import CalibrationError


class TwoStreams(nn.Module):
    """Two blocks that hand on two streams, (rows, tokens, width) each."""

    def __init__(self, scale: tuple[float, float]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Scaled(1.0), Scaled(*scale)])

    def forward(self, x: Tensor) -> Tensor:
        streams = (x, 100 * x)
        for block in self.blocks:
            streams = block(*streams)
        return streams[0]


class Scaled(nn.Module):
    def __init__(self, a: float, b: float | None = None) -> None:
        super().__init__()
        self.a, self.b = a, a if b is None else b

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.a * x, self.b * y


def curves(pruned: nn.Module, x: Tensor, prompts: int = 2) -> Tensor:
    dense = TwoStreams((1.0, 1.0))
    errors = BlockErrors(["blocks.0", "blocks.1"], prompts, 2, clock := Clock())
    with errors.watching(dense, pruned):
        for clock.step in range(2):
            dense(x)
            pruned(x)
    assert not any(module._forward_hooks for model in (dense, pruned) for module in model.modules())
    return errors.curves(["a", "b"][:prompts])


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_the_streams_of_a_block_count_alike_whatever_their_size() -> None:
    found = curves(TwoStreams((1.1, 1.3)), noise(4, 5, 3))
    assert found.shape == (2, 2, 2)
    assert (found[0] == 0).all()
    # (0.1^2 + 0.3^2) / 2, at float32's accuracy of 0.1.
    assert found[1] == pytest.approx((0.01 + 0.09) / 2, rel=1e-5)


def test_of_many_tokens_evenly_spaced_ones_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residuals, "TOKENS", 4)
    assert residuals._spaced(torch.arange(10.0).view(1, 10, 1)).flatten().tolist() == [0, 3, 6, 9]
    assert curves(TwoStreams((1.1, 1.1)), noise(2, 50, 3))[1] == pytest.approx(0.01, rel=1e-5)


def test_rows_of_guidance_belong_to_their_prompt() -> None:
    x = noise(4, 5, 3)  # negative a, negative b, a, b

    class SecondPromptOff(TwoStreams):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * torch.tensor([1.0, 1.1, 1.0, 1.1]).view(4, 1, 1))

    found = curves(SecondPromptOff((1.0, 1.0)), x)
    assert (found[:, 0] == 0).all()
    assert found[:, 1] == pytest.approx(0.01, rel=1e-4)


def test_a_dense_stream_of_zeros_is_an_error_that_names_the_block() -> None:
    with pytest.raises(CalibrationError, match=r"blocks\.0, step 1, prompt 'a'.*exactly zero"):
        curves(TwoStreams((1.0, 1.0)), torch.zeros(2, 5, 3))


@pytest.mark.parametrize(
    ("kind", "family", "first", "blocks"),
    [
        ("sd3", "sd3", "transformer_blocks.0", 3),
        ("sd15", "unet", "down_blocks.0.attentions.0.transformer_blocks.0", 4),
        ("sdxl", "unet", "down_blocks.1.attentions.0.transformer_blocks.0", 8),
    ],
)
def test_blocks_are_the_modules_that_their_linears_share(
    build_denoiser: Callable[..., nn.Module], kind: str, family: Any, first: str, blocks: int
) -> None:
    denoiser = build_denoiser(kind)
    names = block_modules(FAMILIES[family].linears(denoiser))
    assert names[0] == first
    assert len(names) == blocks
    kinds = {type(denoiser.get_submodule(name)).__name__ for name in names}
    assert kinds <= {"JointTransformerBlock", "BasicTransformerBlock"}
