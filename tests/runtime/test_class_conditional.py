"""Classes through diffusers and through the bundle: the same image; and what is said of those that there are not."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from obsdiff_runtime.benchmark import bench
from obsdiff_runtime.bundle import Bundle
from obsdiff_runtime.errors import ConfigError, ModelError
from obsdiff_runtime.kinds import Settings
from obsdiff_runtime.kinds.dit import DIT
from obsdiff_runtime.labels import Labels, read_labels, written_labels
from obsdiff_runtime.pipeline import Images, Pipeline

ANIMALS = Labels(count=300, numbers={"tench": 0, "Tinca tinca": 0, "golden retriever": 207, "Labrador retriever": 208})


def both(pair: tuple[Any, Path], labels: list[str], numbers: list[int], **given: Any) -> tuple[np.ndarray, Images]:
    """(n, height, width, 3) of diffusers, in 0..1, and what the runtime draws; each image from noise of its own."""
    theirs, folder = pair
    seeds = list(range(7, 7 + len(numbers)))
    given = {"num_inference_steps": 4, "guidance_scale": 3.0} | given
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with torch.no_grad():
        expected = theirs(class_labels=numbers, generator=generators, output_type="np", **given).images
    return expected, Pipeline(folder, threads=1)(labels, seed=seeds, noise_source="torch", **given)


def psnr(expected: np.ndarray, images: Images) -> float:
    return float(-10 * np.log10(np.mean((expected - images.arrays / 255) ** 2)))


@pytest.mark.stage("runtime", kind="dit")
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_class_is_drawn_as_diffusers_draws_it(dit_pair: tuple[Any, Path], scale: float) -> None:
    expected, images = both(dit_pair, ["golden retriever", "12", "Tinca tinca"], [207, 12, 0], guidance_scale=scale)
    assert images.arrays.shape == (3, 32, 32, 3)
    assert expected.std() > 0.02
    assert psnr(expected, images) > 58  # rounding to uint8 alone leaves 59 dB
    swapped, _ = both(dit_pair, ["0"] * 3, [0, 207, 12], guidance_scale=scale)
    assert psnr(swapped, images) < 45  # so the class matters


# diffusers' samplers hand torch tensors to numpy functions
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")
@pytest.mark.parametrize("class_name", ["DPMSolverMultistepScheduler", "PNDMScheduler", "UniPCMultistepScheduler"])
def test_another_sampler_draws_what_diffusers_draws_by_it(
    dit_pair: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch, class_name: str
) -> None:
    scheduler = getattr(diffusers, class_name).from_config(dit_pair[0].scheduler.config)
    monkeypatch.setattr(dit_pair[0], "scheduler", scheduler)
    monkeypatch.setattr(Bundle, "scheduler", lambda self: dict(scheduler.config) | {"_class_name": class_name})
    expected, images = both(dit_pair, ["golden retriever", "12"], [207, 12], num_inference_steps=6)
    assert psnr(expected, images) > 58


def test_the_denoiser_is_told_numbers_and_under_guidance_that_of_no_class(dit_pair: tuple[Any, Path]) -> None:
    networks = Pipeline(dit_pair[1], threads=1).networks
    told = Settings(height=32, width=32, num_inference_steps=1, guidance_scale=3, max_sequence_length=1, guided=True)
    for negative, numbers in ((False, [517, 0]), (True, [1000, 1000])):  # a name of two classes is the last one's
        found = DIT.encode(networks, ["crane", " TENCH "], negative, told)["class_labels"]
        assert found.dtype == np.int64
        assert found.tolist() == numbers
    assert dit_pair[0].get_label_ids(["crane", "tench"]) == [517, 0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"prompt": "golden retreiver"},
            r"no class is called 'golden retreiver'; close are golden retriever; this model",
        ),
        (
            {"prompt": "x" * 3000},
            r"no class is called 'x{60}\.\.\.'; this model draws 1000 classes, 0 to 999, by number",
        ),
        ({"prompt": ""}, r"no class is called ''"),
        ({"prompt": "1000"}, r"there is no class 1000: this model draws 1000 classes, 0 to 999, .* one of 4 names"),
        ({"prompt": "-1"}, r"there is no class -1: "),
        ({"prompt": "0", "negative_prompt": "tench"}, r"takes no negative prompt: it is guided away"),
        ({"prompt": "0", "height": 64}, r"height is fixed to 32 in this bundle's graph, not 64"),
        ({"prompt": "0", "width": 17}, r"width is fixed to 32"),
    ],
)
def test_what_it_cannot_draw_is_one_sentence(dit_pair: tuple[Any, Path], given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Pipeline(dit_pair[1], threads=1)(**given)


def test_an_image_of_its_size_is_changed_and_no_other(dit_pair: tuple[Any, Path]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    ours = Pipeline(dit_pair[1], threads=1)
    assert ours("tench", image=picture[:, :32], strength=0.5).arrays.shape == (1, 32, 32, 3)
    with pytest.raises(ConfigError, match=r"width is fixed to 32 in this bundle's graph, not 48"):
        ours("tench", image=picture, strength=0.5)


def test_the_benchmark_asks_it_for_a_class(dit_pair: tuple[Any, Path]) -> None:
    report = bench(dit_pair[1], iterations=2, warmup=0, num_inference_steps=1)
    assert report.request.prompt == "0"


def test_names_are_spread_over_every_second_class() -> None:
    assert ANIMALS.spread(3, first=0) == ("tench", "100", "200")
    assert ANIMALS.spread(3, first=1) == ("1", "101", "201")
    assert ANIMALS.spread(1000, first=1)[103] == "golden retriever"
    assert not set(ANIMALS.spread(1000, first=0)) & set(ANIMALS.spread(1000, first=1))


def test_a_model_without_names_takes_numbers() -> None:
    labels = read_labels({}, {"num_embeds_ada_norm": 1000})
    assert labels.number("7") == 7
    with pytest.raises(ConfigError, match=r"no class is called 'tench'; .* 0 to 999, which have no names here"):
        labels.number("tench")


def test_what_is_written_is_read_again() -> None:
    index = {"id2label": written_labels(ANIMALS.numbers)}
    assert index["id2label"] == {"0": "tench, Tinca tinca", "207": "golden retriever", "208": "Labrador retriever"}
    assert read_labels(index, {"num_embeds_ada_norm": 300}) == ANIMALS


@pytest.mark.parametrize("table", [{"300": "x"}, {"-1": "x"}, {"one": "x"}, {"1": 2}, {"1": None}, "tench", ["tench"]])
def test_a_table_of_something_else_is_refused(table: Any) -> None:
    with pytest.raises(ModelError, match=r"id2label of model_index.json gives no names of one of 300 classes by "):
        read_labels({"id2label": table}, {"num_embeds_ada_norm": 300})
