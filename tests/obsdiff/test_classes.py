"""Models that draw classes, from folder to folder; diffusers' own pipeline is what their pictures are held to."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline, EulerDiscreteScheduler
from PIL import Image

import obsdiff
from obsdiff import calibration, class_calls, trajectories, verbs
from obsdiff.evaluation import Evaluation
from obsdiff.families import dit
from obsdiff.job import open_job
from obsdiff.pipeline_runner import PipelineRunner
from obsdiff.recipe import Sampling, evaluation_prompts
from obsdiff.settings import Settings
from obsdiff.whatif import steps as whatif_steps
from obsdiff.whatif.subject import subject_of
from obsdiff_runtime.benchmark.runner import Request
from obsdiff_runtime.bundle import open_bundle
from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.pipeline import Pipeline

Build = Callable[..., Any]
SMALL: dict[str, Any] = {"steps": 2, "num_samples": 3, "draws": 1, "protect_first": 0, "protect_last": 0, "align": 1}


@pytest.fixture(scope="module")
def pruned(dit_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pruned") / "cut"
    settings = Settings(model=str(dit_folder), sparsity="structured:0.25+2:4", allocation="uniform", **SMALL)
    verbs.prune_to_folder(settings, path)
    return path


def drawn(pipeline: Any, numbers: Sequence[int], seed: int = 7, **told: Any) -> np.ndarray:
    given = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"} | told
    generators = [torch.Generator().manual_seed(seed + index) for index in range(len(numbers))]
    found: np.ndarray = pipeline(class_labels=list(numbers), generator=generators, **given).images
    return found


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed")
@pytest.mark.slow
def test_a_cut_model_draws_in_a_bundle_what_diffusers_draws_with_it(pruned: Path, tmp_path: Path) -> None:
    """And has an engine of its one size."""
    pipeline = obsdiff.load(pruned)
    assert pipeline.get_label_ids(["tench", "golden retriever"]) == [0, 207]
    assert pipeline.transformer.get_submodule("transformer_blocks.0.attn1").heads == 3
    told = {"trt": True, "targets": ["8.9"], "dtype": "fp32", "eval_prompts": 1, "no_cache": True, "steps": 2}
    exported = obsdiff.export(pruned, tmp_path / "bundle", **told)
    assert exported.report.sparsity == "structured:0.25+2:4"
    bundle = open_bundle(tmp_path / "bundle")
    (engine,) = bundle.component("transformer").engines
    assert engine.profiles[0]["class_labels"].max == (8,)  # of four images under guidance
    assert engine.profiles[0]["hidden_states"].max == (8, 4, 16, 16)
    assert bundle.component("transformer").inputs[2].dtype == "int64"
    given = {"num_inference_steps": 4, "guidance_scale": 3.0, "noise_source": "torch"}
    images = Pipeline(bundle, threads=1)(["golden retriever", "12"], seed=[7, 8], **given)
    error = np.square(drawn(pipeline, [207, 12]) - images.arrays / 255).mean()
    assert -10 * np.log10(error) > 58  # rounding to uint8 alone leaves 59 dB
    with pytest.raises(ConfigError, match="--profile 48: width 48 is no multiple of 32"):
        obsdiff.export(pruned, tmp_path / "other", profile=["48"], **told)
    with pytest.raises(ConfigError, match="--profile 64: this denoiser draws at most 32 pixels a side, not 64"):
        obsdiff.export(pruned, tmp_path / "other", profile=["64"], **told)


def test_what_if_takes_it(dit_folder: Path) -> None:
    settings = Settings(model=str(dit_folder), align=8)
    steps = whatif_steps.time_steps(subject_of(settings), settings, whatif_steps.OrtRunner(threads=1), seconds=1)
    assert [type(step.ms) for step in steps[:2]] == [float, float]  # dense, and cut


def test_a_pruned_folder_is_compared_and_its_card_draws_a_class(
    dit_folder: Path, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = verbs.evaluate(pruned, str(dit_folder), Settings(eval_prompts=2, steps=2)).reports[0]
    assert isinstance(report.evaluation, Evaluation)
    assert [each.prompt for each in report.evaluation.per_prompt] == ["1", "501"]
    assert 0 < report.evaluation.velocity_error < 10
    card = (pruned / "README.md").read_text()
    assert "pipeline_tag" not in card
    code = card.split("```python\n")[1].split("```")[0]
    assert "pipeline([0]).images[0]" in code
    monkeypatch.chdir(tmp_path)
    exec(code.replace("path/to/this/folder", str(pruned)), {})
    with Image.open("drawn.png") as picture:
        assert picture.size == (32, 32)


@pytest.mark.parametrize("method", ["obsdiff", "magnitude"])
def test_other_methods_prune_it_too(dit_folder: Path, method: str, tmp_path: Path) -> None:
    found = verbs.prune_to_folder(
        Settings(model=str(dit_folder), sparsity="2:4", method=method, **SMALL), tmp_path / "out"
    )
    assert sum(layer.pattern == "2:4" for layer in found.layers) == 18


def test_prompts_are_classes_spread_over_all_and_others_are_held_out(dit_folder: Path) -> None:
    job = open_job(Settings(model=str(dit_folder), sparsity="2:4"))
    assert (len(job.recipe.prompts), job.recipe.prompts[:3]) == (100, ("tench", "10", "20"))
    held_out = evaluation_prompts(Settings(), job.defaults.prompts, job.defaults.labels)
    assert (len(held_out), held_out[:2]) == (16, ("1", "63"))
    assert not set(held_out) & set(job.recipe.prompts)
    with pytest.raises(ConfigError, match=r"--num-samples 501: the built-in set has 500 prompts"):
        open_job(Settings(model=str(dit_folder), sparsity="2:4", num_samples=501))


@pytest.mark.parametrize("flag", ["prompts_file", "eval_prompts_file"])
def test_a_file_with_what_is_no_class_is_refused_before_any_work(flag: str, dit_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("tench\ngolden retreiver\n")
    settings = Settings(model=str(dit_folder), sparsity="2:4", **{flag: str(path)})
    with pytest.raises(ConfigError, match="no class is called 'golden retreiver'; close are golden retriever"):
        verbs.export(settings, tmp_path / "out")
    with pytest.raises(ConfigError, match="no class is called 'cat'"):
        obsdiff.prune(str(dit_folder), sparsity="2:4", prompts=["cat"])


def test_another_size_than_its_own_is_refused(dit_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"--height 64: this denoiser draws 32 pixels a side, and no other size"):
        open_job(Settings(model=str(dit_folder), sparsity="2:4", height=64))


def test_it_takes_no_negative_prompt_and_no_sampler_that_its_pipeline_gets_wrong(build_pipeline: Build) -> None:
    pipeline = build_pipeline("dit")
    with pytest.raises(ConfigError, match="takes no negative prompt"):
        dit.encode(pipeline, ["tench"], ["blurred"])
    pipeline.scheduler = EulerDiscreteScheduler()
    with pytest.raises(ConfigError, match="DiTPipeline does not scale its noise, as EulerDiscreteScheduler needs it"):
        dit.encode(pipeline, ["tench"], [""])


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_called_as_others_it_draws_the_same_and_tells_of_every_step(build_pipeline: Build, scale: float) -> None:
    pipeline = build_pipeline("dit")
    told: list[torch.Tensor] = []
    given = {"num_inference_steps": 3, "guidance_scale": scale, "height": 32, "width": 32}
    with torch.no_grad():
        latents = class_calls.call(pipeline)(
            class_labels=torch.tensor([207, 3]),
            generator=[torch.Generator().manual_seed(seed) for seed in (7, 8)],
            output_type="latent",
            callback=lambda step, _, each: told.append(each.clone()),
            **given,
        )[0]
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    expected = drawn(pipeline, [207, 3], num_inference_steps=3, guidance_scale=scale)
    assert latents.shape == (2, 4, 16, 16)
    assert len(told) == 3
    assert torch.equal(told[-1], latents)
    picture = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(picture, expected, atol=1e-5)
    assert "step" not in vars(pipeline.scheduler)


def test_calls_are_recorded_with_the_rows_of_no_class_first(build_pipeline: Build) -> None:
    pipeline = build_pipeline("dit")
    seen: list[dict[str, Any]] = []
    pipeline.transformer.register_forward_pre_hook(lambda _, __, kwargs: seen.append(dict(kwargs)), with_kwargs=True)
    runs = Sampling(
        num_inference_steps=2, guidance_scale=3.0, height=32, width=32, max_sequence_length=None, batch_size=2, seed=0
    )
    prompts = calibration.encode(pipeline, dit, ["golden retriever", "3"], runs)
    calls = trajectories.record(pipeline, dit, prompts, runs, computed_steps=2, kept_steps=2)
    assert [kwargs["class_labels"].tolist() for kwargs in seen] == [[207, 3, 1000, 1000]] * 2
    assert all(call.paired for call in calls)
    assert [call.arguments[1]["class_labels"].tolist() for call in calls] == [[1000, 1000, 207, 3]] * 2
    assert torch.equal(*calls[0].arguments[0][0].chunk(2))  # the same noise


def test_torch_is_timed_on_a_class(dit_folder: Path) -> None:
    runner = PipelineRunner(dit_folder, device="cpu", threads=1)
    request = Request(
        prompt=runner.example,
        height=32,
        width=32,
        num_inference_steps=2,
        guidance_scale=3.0,
        max_sequence_length=None,
        num_images=2,
        seed=7,
    )
    runner.check(request)
    runner.load(request)
    found = runner.draw(request)
    pipeline = DiTPipeline.from_pretrained(dit_folder)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline([0, 0], generator=torch.Generator().manual_seed(7), num_inference_steps=2, guidance_scale=3.0)
    np.testing.assert_array_equal(found.pictures, np.stack([np.asarray(image) for image in expected.images]))
    assert len(found.components["transformer"]) == 2
