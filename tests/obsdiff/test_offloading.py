"""Models larger than the GPU. Without a GPU the blocks come and go all the same, from the host to itself."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from obsdiff import offloading, pruning, sensitivities, verbs
from obsdiff.display import show_plan
from obsdiff.families.table import family_of
from obsdiff.job import given, open_job, require_offloadable
from obsdiff.pruning import Pruned
from obsdiff.residuals import block_modules
from obsdiff.resolving import resolve
from obsdiff.settings import Settings
from obsdiff_runtime.errors import ConfigError

Build = Callable[[str], DiffusionPipeline]
PROMPTS = ("a red circle", "a green square")


MEASURED = ("structured:0.4", "0.5")


def prune(pipeline: Any, name: str = "transformer", sparsity: str = "2:4") -> Pruned:
    family = family_of(getattr(pipeline, name))
    sizes: dict[str, Any] = {"height": 32, "width": 32, "steps": 5, "guidance_scale": 2.0, "max_sequence_length": 4}
    settings = Settings(sparsity=sparsity, align=4, draws=1, kept_steps=2, batch_size=2, **sizes)
    recipe = resolve(settings, model="m", family=family, defaults=given(pipeline).defaults, prompts=PROMPTS)
    return pruning.prune(pipeline, family, recipe)


def placed(pipeline: Any, device: str, name: str = "transformer") -> tuple[nn.Module, list[nn.Module]]:
    """The pipeline's denoiser and its blocks, after it was placed."""
    denoiser: nn.Module = getattr(pipeline, name)
    family = family_of(denoiser)
    offloading.place(pipeline, family, torch.device(device))
    return denoiser, [denoiser.get_submodule(block) for block in block_modules(family.linears(denoiser))]


@pytest.mark.parametrize("sparsity", ["2:4", *MEASURED])
def test_coming_and_going_changes_no_bit(sparsity: str, build_pipeline: Build) -> None:
    plain, moving = build_pipeline("sd3"), build_pipeline("sd3")
    denoiser, blocks = placed(moving, "cpu")
    before = [block.weight.data_ptr() for block in blocks for block in block.modules() if isinstance(block, nn.Linear)]
    expected = prune(plain, sparsity=sparsity)
    found = prune(moving, sparsity=sparsity)
    weights = found.denoiser.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in expected.denoiser.state_dict().items())
    assert bool(found.sensitivities) == (sparsity in MEASURED)
    assert found.sensitivities == expected.sensitivities
    assert sparsity == MEASURED[0] or before == [
        block.weight.data_ptr() for block in blocks for block in block.modules() if isinstance(block, nn.Linear)
    ]
    assert denoiser is moving.transformer  # type: ignore[attr-defined]


def test_a_block_is_away_outside_its_own_calls(build_pipeline: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline: Any = build_pipeline("sd3")
    lent: list[nn.Module] = []
    most = 0
    lend, take_back = offloading._lend, offloading._take_back

    def counted(block: nn.Module) -> None:
        nonlocal most
        lent.append(block)
        most = max(most, len(lent))
        lend(block)

    def returned(block: nn.Module) -> None:
        lent.remove(block)
        take_back(block)

    monkeypatch.setattr(offloading, "_lend", counted)
    monkeypatch.setattr(offloading, "_take_back", returned)
    _, blocks = placed(pipeline, "cpu")
    pipeline("a red circle", height=32, width=32, num_inference_steps=2, output_type="latent")
    assert (most, lent) == (1, [])
    with offloading.on_device(blocks[0]):
        blocks[0].get_parameter("attn.to_q.weight").data.zero_()
    assert not blocks[0].get_parameter("attn.to_q.weight").any()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"device": "cpu"}, "--offload is for GPUs, and this run is on the CPU"),
        ({"device": "cuda", "method": "obsdiff"}, "--method obsdiff does not; take streamed"),
    ],
)
def test_what_it_cannot_serve_is_refused(more: dict[str, Any], says: str) -> None:
    settings = Settings(**{"sparsity": "2:4", "offload": True, **more})
    with pytest.raises(ConfigError, match=says):
        require_offloadable(settings, open_job(settings).recipe)


def test_only_pruning_to_a_folder_follows_it(build_pipeline: Build, sd3_folder: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"sparsity": "2:4", "offload": True, "device": "cpu", "height": 32, "width": 32}
    with pytest.raises(ConfigError, match="only obsdiff prune, which writes a folder"):
        verbs.export(str(sd3_folder), tmp_path / "out", eval_prompts=1, **asked)
    with pytest.raises(ConfigError, match="only obsdiff prune, which writes a folder"):
        verbs.prune(str(sd3_folder), prompts=["a cat"], **asked)
    with pytest.raises(ConfigError, match="a pipeline in memory"):
        verbs.prune(build_pipeline("sd3"), prompts=["a cat"], **asked)
    with pytest.raises(ConfigError, match="this run is on the CPU"):
        verbs.plan(Settings(model=str(sd3_folder), **asked), before=tmp_path / "out")


def test_a_plan_says_what_the_gpu_and_what_its_host_holds(capsys: pytest.CaptureFixture[str]) -> None:
    config = Path(__file__).parent / "configs" / "sd3_medium.json"
    asked: dict[str, Any] = {"model": str(config), "sparsity": "2:4", "device": "cuda", "height": 512, "width": 512}
    whole = verbs.plan(Settings(**asked, method_options={"replay": 0}))
    away = verbs.plan(Settings(**asked, offload=True))
    block = 2 * 12 * 1536**2 + 2 * 6 * 1536**2  # linears of two streams, and those that make scales and shifts
    blocks = 4 * 24 * block
    assert away.estimates.host_bytes - away.estimates.scratch_bytes == pytest.approx(blocks, rel=0.02)
    saved = whole.estimates.memory_bytes - away.estimates.memory_bytes
    assert saved == pytest.approx(blocks * 23 / 24, rel=0.02)
    show_plan(away)
    assert "of the GPU's memory and" in " ".join(capsys.readouterr().out.split())


def test_a_block_that_is_measured_comes_once_for_all_probes(build_pipeline: Build) -> None:
    pipeline: Any = build_pipeline("sd3")
    _, blocks = placed(pipeline, "cpu")
    came = [0] * len(blocks)
    candidates: Counter[int] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        lent, measure = offloading.lent, sensitivities.measure

        def seen(denoiser: nn.Module, linears: Any, measured: Any, *rest: Any, **more: Any) -> dict[str, float]:
            candidates.update(each.block for each in measured)
            return measure(denoiser, linears, measured, *rest, **more)

        @contextmanager
        def counted(block: nn.Module) -> Iterator[list[torch.Tensor]]:
            away = offloading.is_away(block)
            with lent(block) as host:
                assert not offloading.is_away(block)
                yield host
            came[blocks.index(block)] += away
            assert offloading.is_away(block) == away

        stand_in = SimpleNamespace(lent=counted, on_device=offloading.on_device)
        patch.setattr(sensitivities, "offloading", stand_in)
        patch.setattr(sensitivities, "measure", seen)
        prune(pipeline, sparsity="structured:0.4")
    assert candidates
    assert came == [sum(candidates[earlier] for earlier in range(block)) for block in range(len(blocks))]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("sparsity", ["2:4", *MEASURED])
@pytest.mark.parametrize(("kind", "name"), [("sd3", "transformer"), ("sd15", "unet")])
def test_a_gpu_need_not_hold_the_model(kind: str, name: str, sparsity: str, build_pipeline: Build) -> None:
    expected = prune(build_pipeline(kind).to("cuda"), name, sparsity)
    pipeline: Any = build_pipeline(kind)
    denoiser, blocks = placed(pipeline, "cuda", name)
    found = prune(pipeline, name, sparsity)
    assert {weight.device.type for block in blocks for weight in block.parameters()} == {"cpu"}
    assert {weight.device.type for weight in denoiser.parameters()} == {"cpu", "cuda"}
    assert {weight.device.type for weight in pipeline.text_encoder.parameters()} == {"cpu"}
    losses = [sum(layer.loss or 0 for layer in pruned.layers) for pruned in (expected, found)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
