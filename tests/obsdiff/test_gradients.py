"""Gradients through whole tiny denoisers of every family, against autograd on the plain forward pass."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from kinds import EVERY, prompts_of
from obsdiff import glances, gradients, offloading, pointwise, streaming
from obsdiff.core import metric
from obsdiff.core.metric import GradientMoments
from obsdiff.job import computable, given
from obsdiff.resolving import resolve
from obsdiff.results import PackageResult
from obsdiff.sampling import velocity_of
from obsdiff.settings import Settings
from obsdiff.trajectories import Call
from obsdiff_runtime.errors import CalibrationError
from obsdiff_runtime.progress import silent

Build = Callable[..., DiffusionPipeline]
KINDS = [kind for kind in EVERY if kind not in ("sd35", "pixart_sigma")]


class Subject:
    """A tiny pipeline and the recorded calls of its denoiser."""

    def __init__(self, pipeline: DiffusionPipeline, prompts: int = 2) -> None:
        loaded = given(pipeline)
        computable(loaded)
        self.denoiser, self.linears = loaded.denoiser, loaded.family.linears(loaded.denoiser)
        asked: dict[str, Any] = {"sparsity": "2:4", "steps": 2, "height": 32, "width": 32, "batch_size": 2, "draws": 1}
        if loaded.defaults.max_sequence_length is not None:
            asked["max_sequence_length"] = 2
        texts = prompts_of(loaded.family.name, ["a red circle", "a blue square", "a dog"])[:prompts]
        recipe = resolve(Settings(**asked), model="tiny", family=loaded.family, defaults=loaded.defaults, prompts=texts)
        self.calls = streaming.record(loaded.pipeline, loaded.family, recipe, silent)

    def measured(self, calls: list[Call] | None = None, journal: Any = None) -> dict[str, metric.Metric]:
        calls = self.calls if calls is None else calls
        return gradients.measure(self.denoiser, self.linears, calls, weights=[1.0] * len(calls), journal=journal)


@pytest.fixture
def subject(build_pipeline: Build) -> Callable[..., Subject]:
    return lambda kind, **settings: Subject(build_pipeline(kind), **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_every_image_linear_of_every_family_has_a_metric_and_the_model_is_as_it_was(
    kind: str, subject: Callable[..., Subject]
) -> None:
    what = subject(kind)
    before = {name: tensor.clone() for name, tensor in what.denoiser.state_dict().items()}
    free = [weight.requires_grad for weight in what.denoiser.parameters()]
    found = what.measured()
    missing = [each.name for each in what.linears if each.name not in found and each.tokens == "image"]
    assert not missing
    for each in what.linears:
        assert each.name not in found or len(found[each.name].scale) == each.out_features
    assert all(bool(tensor.isfinite().all()) for each in found.values() for tensor in each.tensors().values())
    assert all(torch.equal(before[name], tensor) for name, tensor in what.denoiser.state_dict().items())
    assert [weight.requires_grad for weight in what.denoiser.parameters()] == free
    assert all(weight.grad is None for weight in what.denoiser.parameters())
    assert not any("forward" in vars(module) for module in what.denoiser.modules())


@pytest.mark.parametrize("kind", ["sd3", "sd15", "flux", "hunyuan", "sana"])
def test_sums_are_those_of_autograd_on_the_plain_forward_pass(
    kind: str, subject: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    what = subject(kind)
    call = what.calls[0]
    sums: dict[int, tuple[Tensor, ...]] = {}
    finish = GradientMoments.metric

    def kept(self: GradientMoments) -> Any:
        sums[len(sums)] = tuple(tensor.clone() for tensor in self.sums())
        return finish(self)

    monkeypatch.setattr(GradientMoments, "metric", kept)
    directions: list[Tensor] = []
    draw = torch.randn

    def drawn(*shape: Any, **options: Any) -> Tensor:
        directions.append(draw(*shape, **options))
        return directions[-1]

    monkeypatch.setattr(torch, "randn", drawn)
    what.measured([call])

    outputs: dict[str, Tensor] = {}
    args, kwargs = call.arguments
    args = tuple(value.clone().requires_grad_() if torch.is_floating_point(value) else value for value in args)
    kwargs = {
        name: value.clone().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in kwargs.items()
    }
    handles = []
    for each in what.linears:

        def see(_: Any, __: Any, output: Tensor, name: str = each.name) -> None:
            outputs[name] = output

        handles.append(what.denoiser.get_submodule(each.name).register_forward_hook(see))
    velocity = velocity_of(what.denoiser, what.denoiser(*args, **kwargs), kwargs)
    found = torch.autograd.grad(velocity, list(outputs.values()), directions[-1].to(velocity), allow_unused=True)
    by_name = dict(zip(outputs, found, strict=True))
    for handle in handles:
        handle.remove()
    for place, each in enumerate(what.linears):
        gradient = by_name[each.name]
        exact = GradientMoments(each.out_features)
        if gradient is not None:
            tokens = pointwise.tokens(what.denoiser.get_submodule(each.name), gradient)
            exact.add(glances.spaced(tokens).flatten(0, -2))
        for one, other in zip(sums[place], exact.sums(), strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-5 * max(float(other.abs().max()), 1e-12)), each.name


def test_what_a_journal_knows_is_not_measured_again(subject: Callable[..., Subject]) -> None:
    what = subject("sd3")
    kept: dict[str, PackageResult] = {}

    class Memory:
        def read(self, package: str) -> PackageResult | None:
            return kept.get(package)

        def write(self, package: str, result: PackageResult) -> None:
            kept[package] = result

    first = what.measured(journal=Memory())
    again = what.measured([], journal=Memory())
    assert first.keys() == again.keys()
    for name, each in first.items():
        assert all(torch.equal(tensor, again[name].tensors()[part]) for part, tensor in each.tensors().items())


def test_a_gradient_that_is_not_finite_names_its_layer(subject: Callable[..., Subject]) -> None:
    what = subject("sd3")
    for each in what.linears:
        what.denoiser.get_submodule(each.name).register_full_backward_hook(
            lambda _, found, __: tuple(None if value is None else value * float("inf") for value in found)
        )
    with pytest.raises(CalibrationError, match=r"transformer_blocks\.\d+\.\S+: the gradient .* not finite"):
        what.measured()


def test_blocks_that_visit_the_device_give_the_same(build_pipeline: Build) -> None:
    plain = Subject(build_pipeline("sd3"))
    pipeline = build_pipeline("sd3")
    offloading.place(pipeline, given(pipeline).family, torch.device("cpu"))
    placed = Subject(pipeline)
    expected, found = plain.measured(), placed.measured()
    assert expected.keys() == found.keys()
    for name, each in expected.items():
        assert all(torch.equal(tensor, found[name].tensors()[part]) for part, tensor in each.tensors().items())


def test_a_fifth_of_the_calls_is_differentiated() -> None:
    assert [gradients.count(calls) for calls in (1, 5, 6, 18, 144)] == [1, 1, 2, 4, 29]
