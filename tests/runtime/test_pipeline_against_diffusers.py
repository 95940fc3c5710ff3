"""The same prompt and noise through diffusers and through the bundle: the same image."""

import copy
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import FrozenDict
from PIL import Image

from obsdiff.families import reading
from obsdiff_runtime.autoencoder import Autoencoder
from obsdiff_runtime.bundle import Bundle
from obsdiff_runtime.errors import ConfigError
from obsdiff_runtime.kinds import Settings
from obsdiff_runtime.kinds.auraflow import AURAFLOW
from obsdiff_runtime.kinds.flux2 import FLUX2, FLUX2_KLEIN
from obsdiff_runtime.kinds.hunyuan import HUNYUAN
from obsdiff_runtime.kinds.qwen import QWEN
from obsdiff_runtime.kinds.scales import told_scale
from obsdiff_runtime.pipeline import Images, Pipeline

# diffusers' Euler hands torch tensors to numpy functions
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

PROMPTS = ["a large red circle above a small blue square", "a small green triangle"]


def is_flux(pipeline: Any) -> bool:
    return type(pipeline).__name__ == "FluxPipeline"


def is_chroma(pipeline: Any) -> bool:
    return type(pipeline).__name__.startswith("Chroma")


def is_flux2(pipeline: Any) -> bool:
    return type(pipeline).__name__.startswith("Flux2")


def is_pixart(pipeline: Any) -> bool:
    return type(pipeline).__name__.startswith("PixArt")


def is_qwen(pipeline: Any) -> bool:
    return type(pipeline).__name__.startswith("Qwen")


def is_sana(pipeline: Any) -> bool:
    return type(pipeline).__name__.startswith("Sana")


def is_sprint(pipeline: Any) -> bool:
    return type(pipeline).__name__ == "SanaSprintPipeline"


def is_hunyuan(pipeline: Any) -> bool:
    return type(pipeline).__name__.startswith("Hunyuan")


def is_zimage(pipeline: Any) -> bool:
    return type(pipeline).__name__.startswith("ZImage")


def length_of(pipeline: Any) -> dict[str, int]:
    """The argument that a pipeline with T5, Gemma or Qwen takes."""
    if is_flux2(pipeline) or is_zimage(pipeline):
        return {"max_sequence_length": 80}  # 52 of them, or 33, are around the prompt
    names = ("AuraFlow", "Chroma", "Flux", "Lumina2", "PixArt", "Qwen", "Sana", "StableDiffusion3")
    return {"max_sequence_length": 5} if type(pipeline).__name__.startswith(names) else {}


def guided(pipeline: Any, **options: Any) -> dict[str, Any]:
    """The options of a call as diffusers' has them.

    Qwen-Image's guides by another name, given a negative prompt. Sana-Sprint's takes two steps by default, and is told
    to forget the time of the second one where there are others.
    """
    if is_sprint(pipeline) and options["num_inference_steps"] != 2:
        return options | {"intermediate_timesteps": None}
    if not is_qwen(pipeline):
        return options
    scale = options.pop("guidance_scale")
    return {"true_cfg_scale": scale, "negative_prompt": [""] * len(PROMPTS)} | options


def exact(pipeline: Any) -> dict[str, bool]:
    """What diffusers is told to draw the prompt and the size that it is asked for; see `encode_pixart`."""
    if is_hunyuan(pipeline):
        return {"use_resolution_binning": False}
    return {"clean_caption": False, "use_resolution_binning": False} if is_pixart(pipeline) or is_sana(pipeline) else {}


def both(
    pair: tuple[Any, Path], prompts: list[str] = PROMPTS, *, height: int = 32, width: int = 32, **options: Any
) -> tuple[np.ndarray, Images]:
    """(n, height, width, 3) of diffusers, in 0..1, and what the runtime draws."""
    theirs, folder = pair
    ours = Pipeline(folder, threads=1)
    count = len(prompts) * options.get("num_images", 1)
    channels, scale = (16, 4) if is_flux2(theirs) else (4, theirs.vae_scale_factor)  # the latents of FLUX.2 are patches
    shape = (count, channels, height // scale, width // scale)
    noise = np.random.default_rng(1).standard_normal(shape, dtype=np.float32)
    latents = torch.from_numpy(noise)
    if is_flux(theirs) or is_chroma(theirs) or is_qwen(theirs):
        latents = theirs._pack_latents(latents, *noise.shape)
    given = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": height, "width": width}
    given |= length_of(theirs) | options
    with torch.no_grad():
        told = copy.deepcopy({name: value for name, value in given.items() if name != "num_images"})
        if is_flux2(theirs) and "negative_prompt" in told:  # its call takes no such texts, only what was read of them
            embeds = theirs.encode_prompt(
                told.pop("negative_prompt"),
                max_sequence_length=told["max_sequence_length"],
                text_encoder_out_layers=reading.read_layers(theirs),
            )[0]
            told["negative_prompt_embeds"] = embeds
        expected = theirs(
            prompt=list(prompts),  # Z-Image's writes its template into such lists
            num_images_per_prompt=given.get("num_images", 1),
            latents=latents,
            generator=torch.Generator().manual_seed(0),  # of samplers that take noise of their own
            output_type="np",
            **exact(theirs),
            **guided(theirs, **told),
        ).images
    return expected, ours(prompts, latents=noise, seed=0, noise_source="torch", **given)


def psnr(expected: np.ndarray, images: Images) -> float:
    error = np.mean((expected - images.arrays / 255) ** 2)
    return float(-10 * np.log10(error))


@pytest.mark.slow
@pytest.mark.stage("runtime")
def test_an_image_is_what_diffusers_draws(pair: tuple[Any, Path]) -> None:
    expected, images = both(pair)
    assert images.arrays.dtype == np.uint8
    assert expected.std() > 0.02  # not a grey square, on which everything agrees
    assert psnr(expected, images) > 50  # rounding to uint8 alone leaves 59 dB


def test_sizes_steps_and_negative_prompts_are_what_diffusers_makes_of_them(pair: tuple[Any, Path]) -> None:
    negative = {"negative_prompt": ["a small green triangle", "two yellow stars"]}
    told_scale = ("FluxPipeline", "Flux2Pipeline", "SanaSprintPipeline", "LatentConsistencyModelPipeline")
    distilled = type(pair[0]).__name__ in told_scale
    given = {} if distilled else negative
    if distilled:
        with pytest.raises(ConfigError, match="takes no negative prompt"):
            Pipeline(pair[1], threads=1)(PROMPTS, **negative)
    height = 64 if is_sana(pair[0]) or is_hunyuan(pair[0]) else 24  # diffusers' take multiples of 32 and of 16
    expected, images = both(pair, height=height, width=32, num_inference_steps=6, **given)
    assert images.arrays.shape == (2, height, 32, 3)
    assert psnr(expected, images) > 50


def test_no_guidance_and_several_images_of_a_prompt(pair: tuple[Any, Path]) -> None:
    # diffusers' HunyuanDiT gives the second image of a prompt the next prompt's mask
    prompts = PROMPTS[:1] if is_hunyuan(pair[0]) else PROMPTS
    expected, images = both(pair, prompts, guidance_scale=1.0, num_images=2)
    assert len(images) == 2 * len(prompts)
    assert psnr(expected, images) > 50


def test_pixart_reads_prompts_in_lower_case_and_no_padding(pixart_pair: tuple[Any, Path]) -> None:
    theirs, folder = pixart_pair
    prompt, unwanted = "  a large RED circle\t", "Two yellow stars"
    given = {"num_inference_steps": 3, "guidance_scale": 4.0, "height": 24, "width": 48, "max_sequence_length": 12}
    told = {"generator": torch.Generator().manual_seed(7), "output_type": "np", **exact(theirs)}
    with torch.no_grad():
        expected = theirs(prompt, negative_prompt=unwanted, **given, **told).images
    images = Pipeline(folder, threads=1)(prompt, negative_prompt=unwanted, seed=7, noise_source="torch", **given)
    assert psnr(expected, images) > 58  # 54 with height and width exchanged in the aspect ratio, 33 without the mask


def test_pixart_draws_in_few_steps_as_a_latent_consistency_model(
    pixart_pair: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, folder = pixart_pair
    scheduler = diffusers.LCMScheduler.from_config(theirs.scheduler.config)
    monkeypatch.setattr(theirs, "scheduler", scheduler)
    monkeypatch.setattr(Bundle, "scheduler", lambda self: dict(scheduler.config) | {"_class_name": "LCMScheduler"})
    given = {"num_inference_steps": 4, "guidance_scale": 0.0, "height": 24, "width": 48, "max_sequence_length": 12}
    told = {"generator": torch.Generator().manual_seed(7), "output_type": "np", **exact(theirs)}
    with torch.no_grad():
        expected = theirs(PROMPTS, **given, **told).images
    assert psnr(expected, Pipeline(folder, threads=1)(PROMPTS, seed=7, noise_source="torch", **given)) > 50


def test_sana_reads_prompts_behind_its_instruction_and_negative_ones_without(sana_pair: tuple[Any, Path]) -> None:
    theirs, folder = sana_pair
    prompt, unwanted = "  a large RED circle\t", "Two yellow stars"
    given = {"num_inference_steps": 3, "guidance_scale": 4.0, "height": 32, "width": 64, "max_sequence_length": 12}
    told = {"generator": torch.Generator().manual_seed(7), "output_type": "np", **exact(theirs)}
    with torch.no_grad():
        expected = theirs(prompt, negative_prompt=unwanted, **given, **told).images
    images = Pipeline(folder, threads=1)(prompt, negative_prompt=unwanted, seed=7, noise_source="torch", **given)
    assert psnr(expected, images) > 58


@pytest.mark.parametrize(("steps", "scale"), [(1, 4.5), (2, 4.5), (2, 1.0), (4, 9.0)])
def test_sana_sprint_goes_from_angle_to_angle_with_new_noise_at_each_told_its_guidance(
    sana_sprint_pair: tuple[Any, Path], steps: int, scale: float
) -> None:
    """Latents tell more than pictures of a small random decoder: guidance changes them by half a hundredth."""
    theirs, folder = sana_sprint_pair
    size = {"height": 32, "width": 64, "max_sequence_length": 12}
    given = {"num_inference_steps": steps, "guidance_scale": scale, **size}
    told = {"generator": torch.Generator().manual_seed(7), "output_type": "latent", **exact(theirs)}
    with torch.no_grad():
        expected = theirs(PROMPTS, **guided(theirs, **given), **told).images
        decoded = theirs.vae.decode(expected / theirs.vae.config.scaling_factor).sample
    found = Pipeline(folder, threads=1)(PROMPTS, seed=7, noise_source="torch", **given)
    assert np.abs(found.latents - expected.numpy()).max() < 1e-4 * expected.abs().max()
    assert psnr(theirs.image_processor.postprocess(decoded, output_type="np"), found) > 58


@pytest.mark.parametrize(("steps", "scale"), [(1, 8.5), (4, 1.0), (4, 8.5)])
def test_a_latent_consistency_model_is_told_its_guidance_and_noised_again_at_each_step(
    lcm_pair: tuple[Any, Path], steps: int, scale: float
) -> None:
    theirs, folder = lcm_pair
    given = {"num_inference_steps": steps, "guidance_scale": scale, "height": 32, "width": 48}
    with torch.no_grad():
        drawn = theirs(PROMPTS, generator=torch.Generator().manual_seed(7), output_type="latent", **given).images
        waves = theirs.get_guidance_scale_embedding(torch.tensor([scale - 1]), embedding_dim=16)[0]
    ours = Pipeline(folder, threads=1)
    found = ours(PROMPTS, seed=7, noise_source="torch", **given)
    assert np.abs(found.latents - drawn.numpy()).max() < 1e-4 * drawn.abs().max()
    told = told_scale(ours.bundle.component("unet").inputs, scale)
    np.testing.assert_allclose(told["timestep_cond"], waves.numpy(), atol=1e-3)  # angles of up to 7500
    assert ours.resolver.choices.guidance_scale
    assert not ours.resolver.choices.negative_prompt


@pytest.mark.parametrize("length", [20, 60, 120])
def test_flux2_reads_prompts_in_the_template_of_its_tokenizer(flux2_pair: tuple[Any, Path], length: int) -> None:
    """Cut behind a part of it, or padded; a small random denoiser draws nearly the same of all."""
    theirs, folder = flux2_pair
    told = {"height": 32, "width": 32, "num_inference_steps": 1, "guidance_scale": 3.0, "guided": True}
    networks = Pipeline(folder, threads=1).networks
    found = FLUX2_KLEIN.encode(networks, PROMPTS, False, Settings(**told, max_sequence_length=length))
    layers = reading.read_layers(theirs)
    with torch.no_grad():
        expected = theirs.encode_prompt(PROMPTS, max_sequence_length=length, text_encoder_out_layers=layers)[0]
    assert found.keys() == {"encoder_hidden_states"}
    np.testing.assert_allclose(found["encoder_hidden_states"], expected.numpy(), atol=1e-5)


def test_flux2_dev_reads_prompts_behind_its_system_message_without_the_mark_of_an_image(
    flux2_dev_pair: tuple[Any, Path],
) -> None:
    theirs, folder = flux2_dev_pair
    told = {"height": 32, "width": 32, "num_inference_steps": 1, "guidance_scale": 3.0, "guided": False}
    prompts = ["a red [IMG]circle", PROMPTS[0]]
    networks = Pipeline(folder, threads=1).networks
    found = FLUX2.encode(networks, prompts, False, Settings(**told, max_sequence_length=70))
    layers = reading.read_layers(theirs)
    with torch.no_grad():
        expected = theirs.encode_prompt(prompts, max_sequence_length=70, text_encoder_out_layers=layers)[0]
    np.testing.assert_allclose(found["encoder_hidden_states"], expected.numpy(), atol=1e-5)
    assert told_scale(networks.bundle.component("transformer").inputs, 3.0)["guidance"] == 3.0


def test_flux2_gives_an_image_s_latents_as_its_pipeline_reads_them(flux2_pair: tuple[Any, Path]) -> None:
    theirs, folder = flux2_pair
    ours = Pipeline(folder, threads=1)
    vae = Autoencoder(ours.networks, ours.bundle.config("vae_encoder"))
    pixels = torch.from_numpy(picture(32, 48)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        expected = theirs._encode_vae_image(pixels, None)[0]
    found = vae.sample(vae.encode(picture(32, 48)), lambda shape: np.ones(shape, np.float32))
    assert found.shape == (16, 8, 12)
    assert np.abs(found - expected.numpy()).max() < 1e-4 * np.abs(found).max()
    drawn = ours("red", image=picture(32, 48), strength=0.5, max_sequence_length=60)
    assert drawn.arrays.shape == (1, 32, 48, 3)


def test_a_pipeline_whose_steps_are_distilled_takes_no_guidance(
    flux2_pair: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    index = Bundle.index
    monkeypatch.setattr(Bundle, "index", lambda self: index(self) | {"is_distilled": True})
    distilled = FrozenDict({**flux2_pair[0].config, "is_distilled": True})
    monkeypatch.setattr(flux2_pair[0], "_internal_dict", distilled)
    expected, images = both(flux2_pair, guidance_scale=1.0)
    assert psnr(expected, images) > 50
    with pytest.raises(ConfigError, match=r"guidance_scale should be at most 1, not 3: .* distilled"):
        Pipeline(flux2_pair[1], threads=1)("red", guidance_scale=3.0)


def test_lumina2_reads_prompts_of_different_lengths_behind_its_system_prompt(
    lumina2_pair: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one batch, the rows of which diffusers cuts to their own lengths; and with a schedule by the image's size."""
    unwanted = {"negative_prompt": ["a small green triangle", ""], "max_sequence_length": 80}
    expected, images = both(lumina2_pair, height=48, width=32, **unwanted)
    assert psnr(expected, images) > 58  # 40 without the norm of guidance, 34 without the mask, 53 with other sigmas
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=3, max_image_seq_len=9)
    monkeypatch.setattr(lumina2_pair[0], "scheduler", scheduler)
    name = {"_class_name": type(scheduler).__name__}
    monkeypatch.setattr(Bundle, "scheduler", lambda self: dict(scheduler.config) | name)
    expected, images = both(lumina2_pair, **unwanted)
    assert psnr(expected, images) > 58


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_chroma_looks_at_a_text_and_at_one_token_of_what_pads_it(chroma_pair: tuple[Any, Path], scale: float) -> None:
    """In one batch of texts of several lengths, the longest without a token of padding; by a schedule of the size."""
    theirs, folder = chroma_pair
    prompts, unwanted = ["a large red circle", "a dog"], ["two yellow stars", ""]
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=3, max_image_seq_len=99)
    length = len(theirs.tokenizer(prompts[0])["input_ids"])
    given = {
        "num_inference_steps": 3,
        "guidance_scale": scale,
        "height": 48,
        "width": 32,
        "max_sequence_length": length,
    }
    told = {"generator": [torch.Generator().manual_seed(seed) for seed in (7, 8)], "output_type": "latent"}
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(theirs, "scheduler", scheduler)
        name = {"_class_name": type(scheduler).__name__}
        patch.setattr(Bundle, "scheduler", lambda self: dict(scheduler.config) | name)
        expected = theirs(prompts, negative_prompt=unwanted, **given, **told).images
        expected = theirs._unpack_latents(expected, 48, 32, theirs.vae_scale_factor).numpy()
        found = Pipeline(folder, threads=1)(
            prompts, negative_prompt=unwanted if scale > 1 else "", seed=[7, 8], noise_source="torch", **given
        ).latents
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("scale", [0.0, 0.5, 5.0])
def test_z_image_is_guided_by_how_much_is_added(zimage_pair: tuple[Any, Path], scale: float) -> None:
    """In one batch of texts that are filled up to 64 and 96 tokens, negative ones to others, and 30 patches to 32."""
    theirs, folder = zimage_pair
    unwanted = ["two yellow stars, left of a purple ring and more", ""]
    given = {"num_inference_steps": 3, "guidance_scale": scale, "height": 20, "width": 24, "max_sequence_length": 100}
    told = {"generator": [torch.Generator().manual_seed(seed) for seed in (7, 8)], "output_type": "latent"}
    with torch.no_grad():
        expected = theirs(list(PROMPTS), negative_prompt=list(unwanted), **given, **told).images.numpy()
    ours = Pipeline(folder, threads=1)
    found = ours(PROMPTS, negative_prompt=unwanted, seed=[7, 8], noise_source="torch", **given).latents
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    assert ours.resolver.resolve(guidance_scale=scale).guided == (scale > 0)


def test_z_image_is_drawn_by_a_schedule_of_its_size(
    zimage_pair: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=16, max_image_seq_len=99)
    monkeypatch.setattr(zimage_pair[0], "scheduler", scheduler)
    name = {"_class_name": type(scheduler).__name__}
    monkeypatch.setattr(Bundle, "scheduler", lambda self: dict(scheduler.config) | name)
    expected, images = both(zimage_pair, height=20, width=24)
    assert psnr(expected, images) > 50


def test_hunyuan_draws_by_its_own_sampler_at_any_size(
    hunyuan_pair: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published sampler, whose noise comes from the generator of the latents, after them."""
    theirs, folder = hunyuan_pair
    scheduler = diffusers.DDPMScheduler.from_config(theirs.scheduler.config)
    monkeypatch.setattr(theirs, "scheduler", scheduler)
    monkeypatch.setattr(Bundle, "scheduler", lambda self: dict(scheduler.config) | {"_class_name": "DDPMScheduler"})
    prompt, unwanted = "a large RED circle", "Two yellow stars"
    given = {"num_inference_steps": 4, "guidance_scale": 4.0, "height": 48, "width": 112}
    told = {"generator": torch.Generator().manual_seed(7), "output_type": "np", **exact(theirs)}
    with torch.no_grad():
        expected = theirs(prompt, negative_prompt=unwanted, **given, **told).images
    ours = Pipeline(folder, threads=1)
    images = ours(prompt, negative_prompt=unwanted, seed=7, noise_source="torch", **given)
    assert psnr(expected, images) > 58
    with pytest.raises(ConfigError, match="height should be a multiple of 16, not 40"):
        ours(prompt, height=40)


@pytest.mark.parametrize("negative", [False, True])
def test_hunyuan_is_told_what_diffusers_tells_it(hunyuan_pair: tuple[Any, Path], negative: bool) -> None:
    """A small random denoiser draws nearly the same whatever it is told, so that is compared."""
    theirs, folder = hunyuan_pair
    told = Settings(height=48, width=32, num_inference_steps=1, guidance_scale=3.0, max_sequence_length=5, guided=True)
    found = HUNYUAN.encode(Pipeline(folder, threads=1).networks, PROMPTS, negative, told)
    asked: list[dict[str, torch.Tensor]] = []
    handle = theirs.transformer.register_forward_pre_hook(lambda _, __, kwargs: asked.append(kwargs), with_kwargs=True)
    given = {"num_inference_steps": 1, "guidance_scale": 3.0, "height": 48, "width": 32, "output_type": "latent"}
    with torch.no_grad():
        theirs(
            ["x", "y"] if negative else PROMPTS, negative_prompt=PROMPTS if negative else None, **given, **exact(theirs)
        )
    handle.remove()
    rows = slice(0, 2) if negative else slice(2, 4)
    assert found["text_embedding_mask_t5"].shape == (2, 256)
    for name, value in found.items():
        np.testing.assert_allclose(value, asked[0][name][rows].numpy(), atol=1e-5)


def test_auraflow_is_told_what_diffusers_tells_it_and_zeros_for_padding(auraflow_pair: tuple[Any, Path]) -> None:
    """Told of padding or not, a small random denoiser draws the same to 0.01 dB, so embeddings are compared."""
    theirs, folder = auraflow_pair
    told = Settings(height=32, width=32, num_inference_steps=1, guidance_scale=3.0, max_sequence_length=48, guided=True)
    found = AURAFLOW.encode(Pipeline(folder, threads=1).networks, PROMPTS, False, told)["encoder_hidden_states"]
    with torch.no_grad():
        expected = theirs.encode_prompt(PROMPTS, None, False, max_sequence_length=48)[0].numpy()
    assert not expected[1, 0].any()  # padded in front
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_auraflow_draws_up_to_the_size_of_its_places(auraflow_pair: tuple[Any, Path]) -> None:
    theirs, folder = auraflow_pair
    prompt, unwanted = "a large red circle", "two yellow stars, left of a purple ring"
    given = {"num_inference_steps": 3, "guidance_scale": 4.0, "height": 68, "width": 36, "max_sequence_length": 48}
    told = {"generator": torch.Generator().manual_seed(7), "output_type": "np"}
    with torch.no_grad():
        expected = theirs(prompt, negative_prompt=unwanted, **given, **told).images
    ours = Pipeline(folder, threads=1)
    images = ours(prompt, negative_prompt=unwanted, seed=7, noise_source="torch", **given)
    assert psnr(expected, images) > 58
    with pytest.raises(ConfigError, match="height should be at most 68"):
        ours(prompt, height=72, width=36)


@pytest.mark.parametrize("unwanted", [["", "blurred"], ["two yellow stars, left of a purple ring and more", " "]])
def test_qwen_reads_all_of_a_prompt_and_no_padding(qwen_pair: tuple[Any, Path], unwanted: list[str]) -> None:
    """Prompts and negative ones of four lengths, which diffusers runs in two calls, each as long as its longest.

    Latents tell more than pictures of a small random decoder: without the mask, or with a length kept in each pixel
    rather than in each token, they are off by more than 1 %.
    """
    theirs, folder = qwen_pair
    given = {"num_inference_steps": 3, "guidance_scale": 6.0, "height": 24, "width": 52, "max_sequence_length": 300}
    told = {"generator": [torch.Generator().manual_seed(seed) for seed in (7, 8)], "output_type": "latent"}
    with torch.no_grad():
        packed = theirs(PROMPTS, **guided(theirs, **given, negative_prompt=unwanted), **told).images
    expected = theirs._unpack_latents(packed, 24, 52, theirs.vae_scale_factor)[:, :, 0].numpy()
    ours = Pipeline(folder, threads=1)
    found = ours(PROMPTS, negative_prompt=unwanted, seed=[7, 8], noise_source="torch", **given).latents
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_qwen_is_told_what_diffusers_tells_it(qwen_pair: tuple[Any, Path]) -> None:
    theirs, folder = qwen_pair
    size = {"height": 32, "width": 32, "max_sequence_length": 300}
    told = Settings(num_inference_steps=1, guidance_scale=3.0, guided=True, **size)
    found = QWEN.encode(Pipeline(folder, threads=1).networks, PROMPTS, False, told)
    with torch.no_grad():
        expected, mask = theirs.encode_prompt(PROMPTS, max_sequence_length=300)
    length = mask.shape[1]
    assert not mask.all()
    assert length < 300
    np.testing.assert_array_equal(found["encoder_hidden_states_mask"][:, :length], mask)
    np.testing.assert_allclose(found["encoder_hidden_states"][:, :length], expected, atol=1e-5)
    assert not found["encoder_hidden_states"][:, length:].any()
    assert not found["encoder_hidden_states_mask"][:, length:].any()


@pytest.mark.parametrize("seed", [7, [7, 2**32 + 1]], ids=["one generator", "a list of generators"])
def test_a_seed_of_diffusers_draws_the_same_image(pair: tuple[Any, Path], seed: int | list[int]) -> None:
    theirs, folder = pair
    seeded = [torch.Generator().manual_seed(number) for number in np.ravel(seed).tolist()]
    given = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 32, "width": 32} | length_of(theirs)
    with torch.no_grad():
        expected = theirs(
            prompt=list(PROMPTS),
            generator=seeded if isinstance(seed, list) else seeded[0],
            output_type="np",
            **guided(theirs, **given),
            **exact(theirs),
        ).images
    assert psnr(expected, Pipeline(folder, threads=1)(PROMPTS, seed=seed, noise_source="torch", **given)) > 50


@pytest.mark.parametrize(
    ("class_name", "options", "eta"),
    [
        ("EulerAncestralDiscreteScheduler", {}, 0.0),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, 0.0),
        ("UniPCMultistepScheduler", {}, 0.0),
        ("HeunDiscreteScheduler", {}, 0.0),
        ("LCMScheduler", {}, 0.0),
        ("TCDScheduler", {}, 0.0),
        ("TCDScheduler", {}, 0.3),
        ("DDIMScheduler", {}, 0.7),
    ],
)
def test_another_sampler_draws_what_diffusers_draws_by_it(
    sd_pair: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch, class_name: str, options: dict[str, Any], eta: float
) -> None:
    """The noise of each step comes from the generator of the latents, after them."""
    theirs, folder = sd_pair
    scheduler = getattr(diffusers, class_name).from_config(theirs.scheduler.config, **options)
    monkeypatch.setattr(theirs, "scheduler", scheduler)
    monkeypatch.setattr(Bundle, "scheduler", lambda self: dict(scheduler.config) | {"_class_name": class_name})
    given = {"num_inference_steps": 5, "guidance_scale": 3.0, "height": 32, "width": 32, "eta": eta}
    with torch.no_grad():
        expected = theirs(PROMPTS, generator=torch.Generator().manual_seed(7), output_type="np", **given).images
    assert psnr(expected, Pipeline(folder, threads=1)(PROMPTS, seed=7, noise_source="torch", **given)) > 50


def picture(height: int = 32, width: int = 24) -> np.ndarray:
    slope = np.linspace(0, 255, height * width * 3).reshape(height, width, 3)
    return (slope + np.random.default_rng(0).normal(0, 20, slope.shape)).clip(0, 255).astype(np.uint8)


def changed(pair: tuple[Any, Path], strength: float, steps: int) -> tuple[np.ndarray, Images]:
    """An image that diffusers changes, in 0..1, and the runtime."""
    theirs, folder = pair
    kind = getattr(diffusers, type(theirs).__name__.replace("Pipeline", "Img2ImgPipeline"))
    given = {"num_inference_steps": steps, "guidance_scale": 3.0, "strength": strength} | length_of(theirs)
    size = (32, 32) if is_sprint(theirs) else (32, 24)  # whose call takes multiples of 32
    start = Image.fromarray(picture(*size))
    with torch.no_grad():
        expected = kind(**theirs.components)(
            PROMPTS[0],
            image=start,
            generator=torch.Generator().manual_seed(7),
            output_type="np",
            **guided(theirs, **given, **({"negative_prompt": ""} if is_qwen(theirs) else {})),
            **(dict(zip(("height", "width"), size, strict=True)) if length_of(theirs) else {}),
            **exact(theirs),
        ).images
    ours = Pipeline(folder, threads=1)(PROMPTS[0], image=picture(*size), seed=7, noise_source="torch", **given)
    return expected, ours


@pytest.mark.parametrize(("strength", "steps"), [(0.5, 5), (0.8, 4), (1.0, 3)])
def test_an_image_is_changed_as_diffusers_changes_it(pair: tuple[Any, Path], strength: float, steps: int) -> None:
    if type(pair[0]).__name__.startswith(("AuraFlow", "Flux2", "HunyuanDiT", "Lumina2", "PixArt", "SanaPipeline")):
        pytest.skip("diffusers has no pipeline of this kind that changes an image by a strength")
    expected, images = changed(pair, strength, steps)
    assert images.arrays.shape == expected.shape
    assert psnr(expected, images) > 50


def test_a_deep_autoencoder_gives_an_image_s_latents_without_drawing_them(sana_pair: tuple[Any, Path]) -> None:
    theirs, folder = sana_pair
    ours = Pipeline(folder, threads=1)
    vae = Autoencoder(ours.networks, ours.bundle.config("vae_encoder"))
    pixels = torch.from_numpy(picture(32, 48)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        expected = theirs.vae.encode(pixels).latent[0] * theirs.vae.config.scaling_factor
    found = vae.sample(vae.encode(picture(32, 48)), lambda shape: np.ones(shape, np.float32))
    assert np.abs(found - expected.numpy()).max() < 1e-4 * np.abs(found).max()
    assert ours("red", image=picture(32, 64), strength=0.5, max_sequence_length=5).arrays.shape == (1, 32, 64, 3)


def test_a_strength_of_no_step_is_explained(sd_pair: tuple[Any, Path], lcm_pair: tuple[Any, Path]) -> None:
    with pytest.raises(ConfigError, match=r"strength 0.2 of 4 steps is none; give 0.25 or more"):
        Pipeline(sd_pair[1], threads=1)("red", image=picture(), strength=0.2, num_inference_steps=4)
    with pytest.raises(ConfigError, match=r"4 steps are more than the 3 that strength 0.06 leaves of the 50"):
        Pipeline(lcm_pair[1], threads=1)("red", image=picture(), strength=0.06, num_inference_steps=4)


@pytest.mark.parametrize("class_name", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "UniPCMultistepScheduler"])
def test_another_sampler_changes_it_as_diffusers_does(
    sd_pair: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch, class_name: str
) -> None:
    scheduler = getattr(diffusers, class_name).from_config(sd_pair[0].scheduler.config)
    monkeypatch.setattr(sd_pair[0], "scheduler", scheduler)
    monkeypatch.setattr(Bundle, "scheduler", lambda self: dict(scheduler.config) | {"_class_name": class_name})
    assert psnr(*changed(sd_pair, 0.6, 6)) > 50


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs onnxruntime-gpu and a GPU")
def test_a_gpu_draws_what_the_cpu_draws(pair: tuple[Any, Path]) -> None:
    """In float32 without TF32, sums run in another order: a value may round to the next of 256."""
    drawn = [Pipeline(pair[1], backend=name)(PROMPTS, seed=3) for name in ("onnxruntime", "onnxruntime_cuda")]
    assert np.abs(drawn[0].arrays.astype(int) - drawn[1].arrays.astype(int)).max() <= 1
