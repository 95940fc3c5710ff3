"""Judges with weights made up here: no trained network is at hand, so what is tested is the arithmetic."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from obsdiff import judges, perceptual
from obsdiff.judges import Clip, frechet_distance, judges_of
from obsdiff.metrics import Picture
from obsdiff.perceptual import load_lpips
from obsdiff.settings import Settings
from obsdiff_runtime.errors import ConfigError, MissingPackageError

CPU = torch.device("cpu")


def picture(seed: int, height: int = 40, width: int = 36) -> Picture:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory, sd15_folder: Path) -> Path:
    """A tiny random CLIP with the tokenizer of the tiny Stable Diffusion: one token a letter, 12 tokens at most."""
    tokenizer = StableDiffusionPipeline.from_pretrained(sd15_folder).tokenizer
    torch.manual_seed(0)
    narrow = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**narrow, **special, "vocab_size": len(tokenizer), "max_position_embeddings": 12}
    vision = {**narrow, "image_size": 32, "patch_size": 8}
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    return folder


def test_the_clip_score_is_a_hundred_times_the_cosine_that_clip_itself_gives(clip_folder: Path) -> None:
    """Oracle: the model's own forward, whose logits are exp(logit_scale) cos."""
    clip, model = Clip(str(clip_folder), CPU), CLIPModel.from_pretrained(clip_folder).eval()
    prompts, image = ["a cat", "a dog", "red"], picture(0, 32, 32)
    tokens = [clip._tokenizer([prompt], return_tensors="pt") for prompt in prompts]
    mean, std = (
        torch.tensor(values).view(1, 3, 1, 1) for values in (clip._processor.image_mean, clip._processor.image_std)
    )
    pixels = (torch.from_numpy(image).permute(2, 0, 1)[None] / 255 - mean) / std
    with torch.no_grad():
        logits = [model(**token, pixel_values=pixels).logits_per_image / model.logit_scale.exp() for token in tokens]
    expected = [max(100 * float(logit), 0.0) for logit in logits]
    found = [clip.score(image, prompt) for prompt in prompts]
    assert found == pytest.approx(expected, abs=1e-4)
    assert len(set(found)) > 1


def test_a_prompt_longer_than_clip_reads_is_cut(clip_folder: Path) -> None:
    clip = Clip(str(clip_folder), CPU)
    assert clip.score(picture(0), "abcdefghij" + " k" * 50) == clip.score(picture(0), "abcdefghij")


def test_a_folder_without_a_clip_model_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"--clip-model {tmp_path}: no CLIP model"):
        Clip(str(tmp_path), CPU)


def alexnet() -> nn.Module:
    """As torchvision builds it, without the classifier; random weights."""
    torch.manual_seed(1)
    model = nn.Module()
    model.features = nn.Sequential(
        *(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(True), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, 1, 2), nn.ReLU(True), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, 1, 1), nn.ReLU(True), nn.Conv2d(384, 256, 3, 1, 1), nn.ReLU(True)),
        *(nn.Conv2d(256, 256, 3, 1, 1), nn.ReLU(True), nn.MaxPool2d(3, 2)),
    )
    return model


@pytest.fixture
def alexnet_file(tmp_path: Path) -> Path:
    save_file(alexnet().state_dict(), tmp_path / "alexnet.safetensors")
    return tmp_path / "alexnet.safetensors"


def test_lpips_is_that_of_torchmetrics(alexnet_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: torchmetrics around the same AlexNet, handed over where it looks for torchvision's."""
    theirs = pytest.importorskip("torchmetrics.functional.image.lpips")
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda *_, **__: alexnet().features)
    network = theirs._LPIPS(net="alex")
    ours = load_lpips(alexnet_file)
    a = picture(0, 64, 80)
    b = np.clip(a + np.random.default_rng(1).normal(0, 40, a.shape), 0, 255).astype(np.uint8)
    x, y = (torch.from_numpy(image).permute(2, 0, 1)[None] / 255 for image in (a, b))
    expected = float(network(x, y, normalize=True))
    assert expected > 0.01
    assert ours.distance(a, b) == pytest.approx(expected, rel=1e-4)
    assert ours.distance(a, a) == 0


def test_lpips_reads_what_torchvision_publishes(alexnet_file: Path, tmp_path: Path) -> None:
    torch.save({**alexnet().state_dict(), "classifier.1.weight": torch.zeros(2, 2)}, tmp_path / "alexnet.pth")
    a, b = picture(0), picture(1)
    assert load_lpips(tmp_path / "alexnet.pth").distance(a, b) == load_lpips(alexnet_file).distance(a, b)


def test_lpips_without_its_weights_is_an_error_that_says_what_to_give(tmp_path: Path, alexnet_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such file; give AlexNet's weights"):
        load_lpips(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ConfigError, match="no file of weights"):
        load_lpips(tmp_path / "text.pth")
    save_file({"features.0.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="not the weights of torchvision's AlexNet"):
        load_lpips(tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="30x40 pixels; it needs 31x31"):
        load_lpips(alexnet_file).distance(picture(0, 30, 40), picture(1, 30, 40))


def test_lpips_without_torchmetrics_names_the_extra(alexnet_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perceptual, "find_spec", lambda _: None)
    with pytest.raises(MissingPackageError, match=r"obsdiff\[eval\]"):
        load_lpips(alexnet_file)


def test_the_frechet_distance_of_gaussians_without_correlation_is_known() -> None:
    """With diagonal covariances it is |m - n|^2 + |s - t|^2, s and t the standard deviations."""
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    scale, shift = torch.tensor([2.0, 3.0]), torch.tensor([1.0, -4.0])
    deviation = (4 / 3) ** 0.5  # of a corner's coordinate, dividing by n - 1
    expected = 1 + 16 + deviation**2 * (1 + 4)
    assert frechet_distance(corners, corners * scale + shift) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(corners, corners) == pytest.approx(0, abs=1e-5)


def test_fid_takes_the_pictures_of_a_folder(clip_folder: Path, tmp_path: Path) -> None:
    for seed in range(3):
        Image.fromarray(picture(seed)).save(tmp_path / f"{seed}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    asked = Settings(clip_model=str(clip_folder), fid_reference=str(tmp_path))
    found = judges_of(asked, obeys=None, device=CPU)
    assert found.reference is not None
    assert found.embed is not None
    assert found.reference.shape == (3, 8)
    assert torch.equal(found.reference[1], found.embed(picture(1)))


def test_fid_without_features_or_pictures_is_an_error(
    clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="--clip-model"):
        judges_of(Settings(fid_reference=str(tmp_path)), obeys=None, device=CPU)
    asked = Settings(clip_model=str(clip_folder), fid_reference=str(tmp_path))
    with pytest.raises(ConfigError, match="at least two pictures, found 0"):
        judges_of(asked, obeys=None, device=CPU)
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(MissingPackageError, match=r"obsdiff\[eval\]"):
        judges_of(asked, obeys=None, device=CPU)


def test_a_function_of_the_user_s_is_found_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_taste.py").write_text("def red(picture, prompt):\n    return picture[..., 0].mean() / 255\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    found = judges_of(Settings(judge=["redness=my_taste:red"]), obeys=None, device=CPU)
    assert sys.path == before
    name, judge = found.first or ("", lambda *_: 0.0)
    assert name == "redness"
    assert judge(np.full((2, 2, 3), 51, np.uint8), "") == pytest.approx(0.2)
    sys.modules.pop("my_taste")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("red", "expected name=module:function"),
        ("red=math", "expected name=module:function"),
        ("a.b=math:sqrt", "expected name=module:function"),
        ("red=no_such_module:red", "No module named"),
        ("red=math:redness", "no attribute 'redness'"),
        ("red=math:pi", "pi is no function"),
    ],
)
def test_a_judge_that_cannot_come_is_an_error(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"--judge {text}.*{message}"):
        judges_of(Settings(judge=[text]), obeys=None, device=CPU)


def test_nobody_is_called_who_was_not_asked_for() -> None:
    found = judges_of(Settings(), obeys=None, device=CPU)
    assert found.first is None
    assert (found.lpips, found.embed, found.reference, dict(found.scores)) == (None, None, None, {})


def test_obedience_decides_before_any_score() -> None:
    found = judges_of(Settings(), obeys=lambda image, prompt: True, device=CPU, judges={"mine": lambda *_: 0.3})
    assert found.first is not None
    assert found.first[0] == judges.OBEDIENCE
    assert found.first[1](picture(0), "") == 1.0
