"""Films that begin with a picture (Wan image to video): calibrated, pruned, exported and measured as others are."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps

import obsdiff
from kinds import masked_before_the_cut, no_ftfy
from obsdiff import calibration, glances, pictures, trajectories, verbs
from obsdiff.card import write_card
from obsdiff.evaluation import Evaluation
from obsdiff.families import films, wan
from obsdiff.families.checking import problems
from obsdiff.families.exporting import components
from obsdiff.families.references import masked
from obsdiff.pictures import opener
from obsdiff.pipeline_runner import PipelineRunner
from obsdiff.recipe import Sampling
from obsdiff.sampling import velocity_of
from obsdiff.settings import Settings
from obsdiff.sizes import sizes_of
from obsdiff_export.ports import Port
from obsdiff_export.profiles import profiles_for
from obsdiff_runtime.autoencoder import cached, vae_scale
from obsdiff_runtime.benchmark.runner import Request
from obsdiff_runtime.errors import ConfigError, ModelError

PROMPTS = ["a red dog", "a cat", "a star"]
KINDS = ("wan_i2v", "wan_flf2v", "wan22_i2v")
ALL = (*KINDS, "wan_ti2v")
CONFIGS = Path(__file__).parent / "configs"
SIZES: dict[str, Any] = {"height": 32, "width": 48, "num_frames": 9}
Build = Callable[..., Any]


def steps_of(kind: str) -> int:
    return 4 if kind == "wan22_i2v" else 2


def fitted(path: Path, width: int, height: int) -> Image.Image:
    return ImageOps.fit(Image.open(path).convert("RGB"), (width, height), Image.Resampling.LANCZOS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_family_says_what_the_denoiser_does(kind: str, build_denoiser: Build) -> None:
    """That its graph does, too, the runtime's tests show."""
    assert problems(wan, build_denoiser(kind), onnx=False) == []


@torch.no_grad()
@pytest.mark.parametrize("kind", ALL)
def test_calibration_draws_what_diffusers_draws_of_prompt_and_picture(
    kind: str, build_pipeline: Build, picture_folder: Path
) -> None:
    """Of a batch whose prompts have pictures of their own, beside diffusers given them one at a time."""
    pipeline = build_pipeline(kind)
    files = (str(picture_folder / "a.jpg"), str(picture_folder / "b.png"))
    shown = [fitted(Path(file), SIZES["width"], SIZES["height"]) for file in files]
    given: dict[str, Any] = {"num_inference_steps": steps_of(kind), "guidance_scale": 3.0, **SIZES}
    asked = Sampling(batch_size=3, seed=0, max_sequence_length=512, references=files, **given)
    prompts = calibration.encode(pipeline, wan, PROMPTS, asked)
    found = calibration.sample(pipeline, prompts, range(3), asked)
    with no_ftfy():
        theirs = opener(pipeline)
        alone = [
            theirs(
                **({"image": shown[0], "last_image": shown[1]} if kind == "wan_flf2v" else {"image": shown[row % 2]}),
                prompt=prompt,
                generator=torch.Generator().manual_seed(row),
                output_type="latent",
                **given,
            )[0]
            for row, prompt in enumerate(PROMPTS)
        ]
    torch.testing.assert_close(found, torch.cat(alone), atol=1e-4, rtol=1e-4)
    again = calibration.sample(theirs, calibration.encode(theirs, wan, PROMPTS, asked), range(3), asked)
    torch.testing.assert_close(again, found)  # by whichever of diffusers' classes the model is known
    others = calibration.encode(pipeline, wan, PROMPTS, Sampling(**{**vars(asked), "references": files[::-1]}))
    assert (calibration.sample(pipeline, others, range(3), asked) - found).abs().max() > 1e-3


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return {}


@pytest.fixture
def cut(request: pytest.FixtureRequest, build_pipeline: Build, picture_folder: Path, made: dict[str, Any]) -> Any:
    """A pipeline pruned by the default method, and its denoisers before they were cut; made once."""
    kind = request.param
    if kind not in made:
        with pytest.MonkeyPatch.context() as patch:
            masked = masked_before_the_cut(patch)
            pruned = obsdiff.prune(
                build_pipeline(kind, num_layers=1),
                sparsity="ffn:0.25+2:4",
                prompts=PROMPTS[:2],
                references=str(picture_folder),
                steps=steps_of(kind),
                draws=1,
                protect_first=0,
                protect_last=0,
                align=4,
                allocation="uniform",
                **{**SIZES, "width": 32, "num_frames": 5},
            )
        made[kind] = pruned, masked
    return made[kind]


@torch.no_grad()
@pytest.mark.parametrize(
    "cut",
    [pytest.param(kind, marks=pytest.mark.stage("weights", "structured", "saved", kind=kind), id=kind) for kind in ALL],
    indirect=True,
)
def test_what_was_pruned_on_pictures_is_cut_and_comes_back(cut: Any, tmp_path: Path) -> None:
    pruned, masked = cut
    obsdiff.save(pruned, tmp_path / "out")
    loaded: Any = obsdiff.load(tmp_path / "out")
    assert type(loaded) is type(pruned.pipeline)
    before = {id(each): copy for each, copy in zip(reversed(pruned.turns), masked, strict=True)}
    for each in pruned.turns:
        told = wan.arguments(wan.example(each.denoiser, batch=2, size=(2, 8, 8), text_tokens=7, pixels=(32, 32)))
        expected, found = before[id(each)](**told).sample, each.denoiser(**told).sample
        assert each.kept
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()  # fewer terms, in another order
        sparse = [layer.name for layer in each.layers if layer.pattern.endswith("2:4")]
        assert ("blocks.0.attn2.add_k_proj" in sparse) == bool(each.denoiser.config.image_dim)
        for name in sparse:
            weight = each.denoiser.get_submodule(name).weight
            assert bool(((weight.unflatten(1, (-1, 4)) == 0).sum(-1) >= 2).all()), name
        assert torch.equal(getattr(loaded, each.family.denoiser)(**told).sample, found)


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 3, 6])
def test_the_two_encoders_read_a_film_of_any_length_as_the_autoencoder_does(build_pipeline: Build, frames: int) -> None:
    vae = build_pipeline("wan_i2v").vae
    first, following = films.encoders(vae, height=32, width=48)
    pixels = torch.randn(2, 3, 4 * frames - 3, 24, 20, generator=torch.Generator().manual_seed(0))
    means, *caches = first.module(pixels[:, :, 0])
    found = [means]
    for frame in pixels[:, :, 1:].unflatten(2, (-1, 4)).unbind(2) if frames > 1 else ():
        means, *caches = following.module(frame, **{cached(index): cache for index, cache in enumerate(caches)})
        found.append(means)
    expected = vae._encode(pixels)
    torch.testing.assert_close(torch.stack(found, 2), expected, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(
    ("cut", "kind"), [(kind, kind) for kind in ("wan22_i2v", "wan_flf2v", "wan_ti2v")], indirect=["cut"]
)
def test_a_pruned_folder_is_compared_on_pictures(
    cut: Any, kind: str, picture_folder: Path, build_pipeline: Build, tmp_path: Path
) -> None:
    """Its card says how to draw."""
    build_pipeline(kind, num_layers=1).save_pretrained(tmp_path / "dense")
    obsdiff.save(cut[0], tmp_path / "pruned")
    settings = Settings(eval_prompts=1, references=str(picture_folder), steps=4, **SIZES)
    report = verbs.evaluate(tmp_path / "pruned", str(tmp_path / "dense"), settings).reports[0]
    assert isinstance(report.evaluation, Evaluation)
    assert all(0 < error < 10 for error in report.evaluation.velocity_error_per_step)
    if kind == "wan_ti2v":  # by diffusers' class that draws films of a text
        return
    ends = kind == "wan_flf2v"
    for place, calls in {
        "checkpoint": ('pipeline(load_image("picture.png"), "', ', last_image=load_image("last.png")'),
        "bundle": (", image=picture", ", last_image=last, seed=1)"),
    }.items():
        write_card(report, tmp_path / "pruned", place)
        text = (tmp_path / "pruned" / "README.md").read_text()
        assert "pipeline_tag: image-to-video" in text
        assert [call in text for call in calls] == [True, ends]


@pytest.mark.parametrize("kind", ALL)
def test_engines_are_told_the_size_of_every_axis(kind: str, build_pipeline: Build) -> None:
    pipeline = build_pipeline(kind, num_layers=1)
    asked = Sampling(num_inference_steps=4, guidance_scale=3.0, batch_size=1, seed=0, max_sequence_length=512, **SIZES)
    name, config = type(pipeline).__name__, dict(pipeline.transformer.config)
    sizes = sizes_of(asked, name, config, rows=2, text_tokens=512, vae_scale=vae_scale(pipeline.vae.config))
    found = {}
    for component in components(wan, pipeline, height=32, width=48):
        ports = [
            Port(name=port, dtype="float", shape=tuple(axes.get(axis, side) for axis, side in enumerate(example.shape)))
            for port, example in component.inputs.items()
            for axes in [component.dynamic_axes[port]]
        ]
        (found[component.name],) = profiles_for(ports, [sizes])
    if kind == "wan_ti2v":
        assert found["vae_encoder"]["sample"].opt == (2, 3, 32, 48)
        assert found["transformer"]["frame_mask"].opt == (2, 3)
        return
    assert found["vae_encoder_next"]["sample"].opt == (2, 3, 4, 32, 48)
    assert found["transformer"]["opening_states"].opt == (2, 8, 3, 8, 12)


@torch.no_grad()
@pytest.mark.parametrize("size", [(24, 40), (8, 8)])
def test_an_encoder_of_patches_reads_a_picture_as_the_autoencoder_does(
    build_pipeline: Build, size: tuple[int, int]
) -> None:
    vae = build_pipeline("wan_ti2v").vae
    component = films.picture_encoder(vae, height=32, width=48)
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    expected = vae._encode(pixels[:, :, None])[:, :, 0]
    torch.testing.assert_close(component.module(pixels), expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_frames_are_modulated_as_their_tokens_are(build_pipeline: Build) -> None:
    """Blocks are told what takes the memory of a few tokens, and the gates of every token are seen all the same."""
    denoiser = build_pipeline("wan_ti2v").transformer
    told = wan.arguments(masked(wan.example(denoiser, batch=2, size=(5, 6, 8), text_tokens=7, pixels=(48, 64))))
    told["timestep"] = told["timestep"][:1].expand(2, -1)
    assert told["timestep"].shape == (2, 5 * 3 * 4)
    assert len(told["timestep"].unique()) == 2
    block, linears = denoiser.blocks[1], [each for each in wan.linears(denoiser) if each.block == 1 and each.writes]
    seen: list[Any] = []
    block.register_forward_pre_hook(lambda _, args: seen.append(args))
    plain = denoiser(**told).sample
    with wan.by_frames(denoiser):
        torch.testing.assert_close(denoiser(**told).sample, plain, rtol=0, atol=1e-5)
        assert [each[2].shape for each in seen] == [(2, 60, 6, 36), (2, 5, 6, 36)]
        for linear in linears:
            gates = [
                glances.glance(block, "blocks.1", [linear], (args, {}), want="outputs", streams=True)[0].gates
                for args in seen[:2]
            ]
            if linear.writes.gate is not None:
                assert gates[0][linear.name].shape == (2, 60, 36)
                torch.testing.assert_close(gates[1][linear.name], gates[0][linear.name], rtol=0, atol=1e-5)
    assert type(block) is type(build_pipeline("wan").transformer.blocks[0])
    torch.testing.assert_close(denoiser(**told).sample, plain, rtol=0, atol=0)


def test_a_call_that_begins_with_a_picture_is_of_the_step_of_what_it_draws(
    build_pipeline: Build, picture_folder: Path
) -> None:
    """Its first frame, whose timestep is 0 throughout, is no part of the velocity."""
    pipeline = build_pipeline("wan_ti2v", num_layers=1)
    asked = Sampling(
        num_inference_steps=4,
        guidance_scale=3.0,
        batch_size=1,
        seed=0,
        max_sequence_length=8,
        references=(str(picture_folder / "a.jpg"),),
        **SIZES,
    )
    prompts = calibration.encode(pipeline, wan, PROMPTS[:1], asked)
    calls = trajectories.record(pipeline, wan, prompts, asked, computed_steps=4, kept_steps=4)
    assert sorted({call.step for call in calls}) == [0, 1, 2, 3]
    args, kwargs = calls[0].arguments
    velocity = velocity_of(pipeline.transformer, pipeline.transformer(*args, **kwargs), kwargs)
    assert velocity.shape[2:] == (2, 4, 6)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["wan_i2v", "wan_flf2v"])
def test_a_pipeline_in_torch_sees_a_picture_when_it_is_measured(
    kind: str, build_pipeline: Build, tmp_path: Path
) -> None:
    build_pipeline(kind, num_layers=1).save_pretrained(tmp_path / "dense")
    runner = PipelineRunner(tmp_path / "dense", threads=1)
    told: Any = {"prompt": "a cat", "num_inference_steps": 1, "guidance_scale": 1.0, "max_sequence_length": 512}
    request = Request(num_images=1, seed=3, **told, **SIZES)
    runner.check(request)
    runner.load(request)
    drawn = runner.draw(request)
    assert drawn.pictures.shape == (1, 9, 32, 48, 3)
    assert len(drawn.components["image_encoder"]) == 1


@pytest.mark.parametrize(
    ("name", "pictures"),
    [("wan22_i2v_a14b", 0), ("wan21_i2v_14b", 1), ("wan21_i2v_14b", 2)],
    ids=["A14B", "I2V", "FLF2V"],
)
def test_a_plan_counts_what_a_denoiser_is_told_of_pictures(name: str, pictures: int, tmp_path: Path) -> None:
    """Widths as in the configurations that diffusers' script writes; beside text to film's 14 B, what pictures take.

    `pictures`: that an image encoder looks at.
    """
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    config |= {"pos_embed_seq_len": 514} if pictures == 2 else {}
    index: dict[str, Any] = {"_class_name": "WanImageToVideoPipeline", "scheduler": [None, None]}
    names = ("transformer",) if pictures else ("transformer", "transformer_2")
    for each in names:
        index[each] = ["diffusers", "WanTransformer3DModel"]
        (tmp_path / each).mkdir()
        (tmp_path / each / "config.json").write_text(json.dumps(config))
    (tmp_path / "model_index.json").write_text(json.dumps(index | ({} if pictures else {"boundary_ratio": 0.9})))
    plan = verbs.plan(Settings(model=str(tmp_path), sparsity="ffn:0.25", method="obsdiff"))
    width, seen, text, image = 5120, 257, 512, 21 * 30 * 52
    picture = 20 * 4 * width  # of the first convolution: four frames given or not, and 16 channels
    if pictures:
        picture += 40 * (2 * (width + 1) * width + width)  # keys, values, and the norm of keys
        picture += 2 * 1280 + (1280 + 1) * 1280 + (1280 + 1) * width + 2 * width  # of what the encoder sees
    if pictures == 2:
        picture += 2 * seen * 1280  # where each of its tokens stands
    parameters = 14_288_491_584 + picture
    assert plan.parameters_before == len(names) * parameters
    neurons = 13824
    products = 40 * ((6 * width**2 + 2 * width * neurons) * image + 2 * width**2 * (text + pictures * seen))
    assert products < plan.macs_before / len(names) < 1.01 * products
    assert any("--references FOLDER" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 9, "sees": False}, "told 5 channels beside the 4 that it draws"),
        ({"added_kv_proj_dim": None}, "told 8 channels beside"),
        ({"in_channels": 4}, "told 0 channels beside"),
        ({"pos_embed_seq_len": 513}, "has places for 513 tokens of what an image encoder sees, and obsdiff knows"),
        ({"pos_embed_seq_len": 514, "sees": False}, "has places for 514 tokens"),
    ],
)
def test_a_denoiser_that_is_told_other_things_is_refused(
    changes: dict[str, Any], message: str, build_denoiser: Build
) -> None:
    denoiser = build_denoiser("wan_i2v", **changes)
    for refused in (wan.linears, wan.groups, lambda each: wan.component(each, height=32, width=32)):
        with pytest.raises(ModelError, match=message):
            refused(denoiser)


def test_pictures_are_asked_for_before_anything_is_loaded(
    build_pipeline: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_pipeline("wan22_i2v", num_layers=1).save_pretrained(tmp_path / "dense")
    monkeypatch.setattr(verbs, "load_model", None)
    asked = Settings(model=str(tmp_path / "dense"), sparsity="2:4", steps=4, **SIZES)
    message = "films of this pipeline begin with a picture; give some: --references FOLDER"
    with pytest.raises(ConfigError, match=message):
        verbs.prune_to_folder(asked, tmp_path / "out")
    with pytest.raises(ConfigError, match=message):  # to compare on
        verbs.export(replace(asked, method="magnitude"), tmp_path / "out")


def test_films_that_can_begin_with_a_picture_are_calibrated_on_a_text_with_a_note(build_pipeline: Build) -> None:
    pipeline = build_pipeline("wan_ti2v", num_layers=1)
    asked = Sampling(num_inference_steps=1, guidance_scale=1.0, batch_size=1, seed=0, max_sequence_length=8, **SIZES)
    index = {**pipeline.config, "_class_name": type(pipeline).__name__}
    (said,) = pictures.note(index, asked)
    assert "films of this pipeline can begin with a picture" in said
    assert pictures.note(index, replace(asked, references=("a.jpg",))) == ()
    assert pictures.note({**index, "expand_timesteps": False}, asked) == ()
    alone = replace(asked, references=("a.jpg",), num_frames=1)
    with pytest.raises(ConfigError, match="--num-frames 1: nothing is drawn of a film whose only frame is given"):
        calibration.encode(pipeline, wan, PROMPTS[:1], alone)


def test_what_cannot_be_is_refused_in_a_sentence(build_pipeline: Build, picture_folder: Path) -> None:
    pipeline = build_pipeline("wan_i2v", num_layers=1)
    asked: dict[str, Any] = {"sparsity": "2:4", "prompts": PROMPTS[:1], "steps": 1, **SIZES}
    with pytest.raises(ConfigError, match="films of this pipeline begin with a picture; give some: --references"):
        obsdiff.prune(pipeline, **asked)
    with pytest.raises(ConfigError, match=r"--max-sequence-length 8: .* texts of 512 tokens alone"):
        obsdiff.prune(pipeline, references=str(picture_folder), max_sequence_length=8, **asked)
    pipeline.image_processor.do_center_crop = False
    with pytest.raises(ModelError, match="image_encoder is a CLIPVisionModel that reads 32 pixels a side; known are"):
        components(wan, pipeline, height=32, width=32)
