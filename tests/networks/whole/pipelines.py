"""Tiny random pipelines of every family; no network, no stored files."""

from collections.abc import Callable
from functools import partial
from typing import Any

import eyes
import torch
from diffusers import (
    AuraFlowPipeline,
    AutoencoderKLCogVideoX,
    AutoencoderKLMochi,
    AutoencoderKLWan,
    ChromaPipeline,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    CogView3PlusPipeline,
    CogView3PlusTransformer2DModel,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    FluxFillPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    HunyuanDiTPipeline,
    LTXConditionPipeline,
    LTXImageToVideoPipeline,
    LTXPipeline,
    Lumina2Pipeline,
    MochiPipeline,
    MochiTransformer3DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    SanaPipeline,
    SanaSprintPipeline,
    SCMScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    ZImagePipeline,
)
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    Qwen3Model,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from networks.whole.autoencoders import (
    autoencoder,
    deep_autoencoder,
    film_autoencoder,
    patch_autoencoder,
    whole_film_autoencoder,
)
from networks.whole.denoisers import (
    SPRINT,
    auraflow_transformer,
    chroma_transformer,
    controlnet,
    dit_transformer,
    flux2_transformer,
    flux_transformer,
    hunyuan_transformer,
    ltx_transformer,
    lumina2_transformer,
    pixart_sigma_transformer,
    pixart_transformer,
    qwen_transformer,
    sana_transformer,
    sd15_unet,
    sd35_transformer,
    sdxl_unet,
    wan_flf2v_transformer,
    wan_i2v_transformer,
    wan_transformer,
    zimage_transformer,
)
from networks.whole.readers import T5_SIZES, bert, clip_config, clip_tokenizer, gemma2, qwen, qwen3, t5


def sd3_pipeline(*, with_t5: bool = False, **changes: Any) -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    encoders = [CLIPTextModelWithProjection(clip_config(tokenizer, width)).eval() for width in (8, 16)]
    tokenizer_3, text_encoder_3 = t5() if with_t5 else (None, None)
    return StableDiffusion3Pipeline(
        transformer=sd35_transformer(**changes).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder(shift_factor=0.1).eval(),
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )


def sd15_pipeline(**changes: Any) -> StableDiffusionPipeline:
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    return StableDiffusionPipeline(
        unet=sd15_unet(**changes).eval(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        vae=autoencoder().eval(),
        text_encoder=CLIPTextModel(clip_config(tokenizer, 16)).eval(),
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl_pipeline(**changes: Any) -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    return StableDiffusionXLPipeline(
        unet=sdxl_unet(**changes).eval(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        vae=autoencoder().eval(),
        text_encoder=CLIPTextModel(clip_config(tokenizer, 8)).eval(),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(clip_config(tokenizer, 16)).eval(),
        tokenizer_2=tokenizer,
        add_watermarker=False,
    )


def controlnet_pipeline(
    *, xl: bool = False, **changes: Any
) -> StableDiffusionControlNetPipeline | StableDiffusionXLControlNetPipeline:
    plain = (sdxl_pipeline if xl else sd15_pipeline)(**changes)
    kind = StableDiffusionXLControlNetPipeline if xl else StableDiffusionControlNetPipeline
    options = {"add_watermarker": False} if xl else {"requires_safety_checker": False}
    return kind(**plain.components, controlnet=controlnet(plain.unet).eval(), **options)


def inpaint_pipeline(
    *, xl: bool = False, **changes: Any
) -> StableDiffusionInpaintPipeline | StableDiffusionXLInpaintPipeline:
    """Whose UNet reads the mask and what stays."""
    plain = (sdxl_pipeline if xl else sd15_pipeline)(**{"in_channels": 9, **changes})
    kind = StableDiffusionXLInpaintPipeline if xl else StableDiffusionInpaintPipeline
    return kind(**plain.components, **({"add_watermarker": False} if xl else {"requires_safety_checker": False}))


def fill_pipeline(**changes: Any) -> FluxFillPipeline:
    """Told latents of 4 channels beside those that are drawn, and a mask of 4 pixels a latent pixel."""
    plain = flux_pipeline(**{"in_channels": 16 + 4 * (4 + 4), "out_channels": 16, **changes})
    return FluxFillPipeline(**{name: part for name, part in plain.components.items() if name in _FILLS})


_FILLS = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer")


def flux_pipeline(**changes: Any) -> FluxPipeline:
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    tokenizer_2, text_encoder_2 = t5()
    return FluxPipeline(
        transformer=flux_transformer(**changes).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=autoencoder(shift_factor=0.1).eval(),
        text_encoder=CLIPTextModel(clip_config(tokenizer, 16)).eval(),
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
    )


def chroma_pipeline(**changes: Any) -> ChromaPipeline:
    torch.manual_seed(0)
    tokenizer, text_encoder = t5()
    return ChromaPipeline(
        transformer=chroma_transformer(**changes).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_beta_sigmas=True),
        vae=autoencoder(shift_factor=0.1).eval(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )


def kontext_pipeline(**changes: Any) -> FluxKontextPipeline:
    """FLUX.1 told a picture."""
    return FluxKontextPipeline(**flux_pipeline(**changes).components)


def flux2_pipeline(**changes: Any) -> Flux2KleinPipeline:
    torch.manual_seed(0)
    tokenizer, text_encoder = qwen3()
    return Flux2KleinPipeline(
        transformer=flux2_transformer(**changes).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=patch_autoencoder().eval(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )


def pixart_pipeline(*, sigma: bool = False, **changes: Any) -> PixArtAlphaPipeline | PixArtSigmaPipeline:
    torch.manual_seed(0)
    tokenizer, text_encoder = t5()
    build = pixart_sigma_transformer if sigma else pixart_transformer
    return (PixArtSigmaPipeline if sigma else PixArtAlphaPipeline)(
        transformer=build(**changes).eval(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        vae=autoencoder().eval(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )


def auraflow_pipeline(**changes: Any) -> AuraFlowPipeline:
    torch.manual_seed(0)
    tokenizer, _ = t5()
    config = UMT5Config(**T5_SIZES)
    return AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(config).eval(),
        vae=autoencoder().eval(),
        transformer=auraflow_transformer(**changes).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def sana_pipeline(**changes: Any) -> SanaPipeline:
    torch.manual_seed(0)
    tokenizer, text_encoder = gemma2()
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=deep_autoencoder().eval(),
        transformer=sana_transformer(**changes).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def sana_sprint_pipeline(**changes: Any) -> SanaSprintPipeline:
    """The networks of Sana, but for the denoiser."""
    components = sana_pipeline(**SPRINT | changes).components
    return SanaSprintPipeline(**components | {"scheduler": SCMScheduler()})


def qwen_pipeline(**changes: Any) -> QwenImagePipeline:
    torch.manual_seed(0)
    tokenizer, text_encoder = qwen()
    return QwenImagePipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=film_autoencoder().eval(),
        transformer=qwen_transformer(**changes).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
    )


def qwen_edit_pipeline(**changes: Any) -> QwenImageEditPlusPipeline:
    """As of 2511, whose denoiser modulates pictures as at timestep 0."""
    components = qwen_pipeline(zero_cond_t=True, **changes).components
    return eyes.seeing(QwenImageEditPlusPipeline, components, eyes.language_model(24))


def lumina2_pipeline(**changes: Any) -> Lumina2Pipeline:
    """A latent pixel is eight pixels wide, whatever the autoencoder, says the pipeline."""
    torch.manual_seed(0)
    tokenizer, text_encoder = gemma2()
    pipeline = Lumina2Pipeline(
        transformer=lumina2_transformer(**changes).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=autoencoder(shift_factor=0.1, channels=(8, 8, 8, 16)).eval(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )
    pipeline.system_prompt = "draw"
    return pipeline


def hunyuan_pipeline(**changes: Any) -> HunyuanDiTPipeline:
    """Its call counts on 8 pixels a side of a latent pixel, and on the published lengths of text."""
    torch.manual_seed(0)
    tokenizer, text_encoder = bert()
    tokenizer_2, text_encoder_2 = t5()
    return HunyuanDiTPipeline(
        vae=autoencoder(channels=(4, 4, 4, 8)).eval(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=hunyuan_transformer(**{"text_len": 77, "text_len_t5": 256, **changes}).eval(),
        scheduler=DDPMScheduler(clip_sample=False, steps_offset=1, prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
    )


def wan_pipeline(patch: int | None = None, **changes: Any) -> WanPipeline:
    """A latent pixel is four pixels wide, and a latent frame four frames long.

    With a patch it is one of Wan 2.2 TI2V: its autoencoder's blocks have shortcuts, its pixels are patches of so many a
    side, and its denoiser is told a timestep for each token.
    """
    torch.manual_seed(0)
    tokenizer, _ = t5()
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=0,
        temperal_downsample=[True, True],
        latents_mean=[-0.7, 0.1, 0.9, 0.2],
        latents_std=[2.8, 1.4, 0.6, 1.2],
        is_residual=patch is not None,
        in_channels=3 * (patch or 1) ** 2,
        out_channels=3 * (patch or 1) ** 2,
        patch_size=patch,
        scale_factor_temporal=4,
        scale_factor_spatial=4 * (patch or 1),
    )
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(UMT5Config(**T5_SIZES)).eval(),
        vae=vae.eval(),
        transformer=wan_transformer(**changes).eval(),
        expand_timesteps=patch is not None,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )


def wan22_pipeline(patch: int | None = None, **changes: Any) -> WanPipeline:
    """Two denoisers in turn: of four steps each takes two."""
    pipeline = wan_pipeline(patch, **changes)
    torch.manual_seed(1)
    pipeline.register_modules(transformer_2=wan_transformer(**changes).eval())
    pipeline.register_to_config(boundary_ratio=0.875)
    return pipeline


def wan_i2v_pipeline(*, ends: bool = False, **changes: Any) -> WanImageToVideoPipeline:
    """Films that begin with a picture, and may end with one; an image encoder sees as many tokens as CLIP's."""
    parts = wan_pipeline().components
    parts["transformer"] = (wan_flf2v_transformer if ends else wan_i2v_transformer)(**changes).eval()
    torch.manual_seed(2)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=2
    )
    return WanImageToVideoPipeline(
        **parts,
        image_encoder=CLIPVisionModel(vision).eval(),
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    )


def wan22_i2v_pipeline(**changes: Any) -> WanImageToVideoPipeline:
    """Likewise, by two denoisers in turn, without an image encoder."""
    parts, first, second = wan_pipeline().components, *(wan_i2v_transformer(sees=False, **changes) for _ in range(2))
    given = {"transformer": first.eval(), "transformer_2": second.eval()}
    return WanImageToVideoPipeline(**{**parts, **given}, boundary_ratio=0.875)


def ltx_pipeline(**changes: Any) -> LTXPipeline:
    torch.manual_seed(0)
    tokenizer, text_encoder = t5()
    return LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
        ),
        vae=whole_film_autoencoder().eval(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=ltx_transformer(**changes).eval(),
    )


def ltx_i2v_pipeline(**changes: Any) -> LTXImageToVideoPipeline:
    """Of the networks of LTX-Video; its call wants a picture."""
    return LTXImageToVideoPipeline(**ltx_pipeline(**changes).components)


def ltx_condition_pipeline(**changes: Any) -> LTXConditionPipeline:
    """Of the networks of LTX-Video; its call says the levels of noise."""
    parts = ltx_pipeline(**changes).components
    return LTXConditionPipeline(**parts | {"scheduler": FlowMatchEulerDiscreteScheduler()})


def zimage_pipeline(**changes: Any) -> ZImagePipeline:
    torch.manual_seed(0)
    tokenizer, text_encoder = qwen3(Qwen3Model, hidden_size=24, num_hidden_layers=2)
    return ZImagePipeline(
        transformer=zimage_transformer(**changes).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(shift_factor=0.1).eval(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )


def dit_pipeline(**changes: Any) -> DiTPipeline:
    torch.manual_seed(0)
    return DiTPipeline(
        transformer=dit_transformer(**changes).eval(),
        vae=autoencoder().eval(),
        scheduler=DDIMScheduler(beta_schedule="linear", beta_end=0.02, clip_sample=False),
        id2label={0: "tench, Tinca tinca", 207: "golden retriever", 208: "Labrador retriever"},
    )


PIPELINES: dict[str, Callable[..., DiffusionPipeline]] = {
    "sd3": sd3_pipeline,
    "sd15": sd15_pipeline,
    "sdxl": sdxl_pipeline,
    "controlnet": controlnet_pipeline,
    "controlnet_xl": partial(controlnet_pipeline, xl=True),
    "inpaint": inpaint_pipeline,
    "inpaint_xl": partial(inpaint_pipeline, xl=True),
    "fill": fill_pipeline,
    "flux": flux_pipeline,
    "kontext": kontext_pipeline,
    "chroma": chroma_pipeline,
    "flux2": flux2_pipeline,
    "pixart": pixart_pipeline,
    "pixart_sigma": partial(pixart_pipeline, sigma=True),
    "auraflow": auraflow_pipeline,
    "sana": sana_pipeline,
    "sana_sprint": sana_sprint_pipeline,
    "qwen": qwen_pipeline,
    "qwen_edit": qwen_edit_pipeline,
    "lumina2": lumina2_pipeline,
    "hunyuan": hunyuan_pipeline,
    "wan": wan_pipeline,
    "wan22": wan22_pipeline,
    "wan_ti2v": partial(wan_pipeline, patch=2),
    "wan_i2v": wan_i2v_pipeline,
    "wan_flf2v": partial(wan_i2v_pipeline, ends=True),
    "wan22_i2v": wan22_i2v_pipeline,
    "ltx": ltx_pipeline,
    "ltx_condition": ltx_condition_pipeline,
    "ltx_i2v": ltx_i2v_pipeline,
    "dit": dit_pipeline,
    "zimage": zimage_pipeline,
}


def cogview3_pipeline() -> CogView3PlusPipeline:
    tokenizer, text_encoder = t5()
    transformer = CogView3PlusTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        text_embed_dim=24,
        time_embed_dim=16,
        condition_dim=4,
        pos_embed_max_size=16,
        sample_size=16,
    )
    return CogView3PlusPipeline(
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        vae=autoencoder().eval(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer.eval(),
    )


def cogvideox_pipeline() -> CogVideoXPipeline:
    """Films: text and frames are one sequence, and its call draws as many frames as the denoiser says."""
    tokenizer, text_encoder = t5()
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=24,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=8,
    )
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    return CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=CogVideoXDDIMScheduler(),
    )


def mochi_pipeline() -> MochiPipeline:
    """Films: a denoiser of two streams, whose text is masked, and an autoencoder of six frames a latent frame."""
    tokenizer, text_encoder = t5()
    transformer = MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        pooled_projection_dim=24,
        in_channels=12,
        text_embed_dim=24,
        time_embed_dim=4,
        max_sequence_length=8,
    )
    vae = AutoencoderKLMochi(
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
    )
    return MochiPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    )


UNDESCRIBED: dict[str, Callable[[], DiffusionPipeline]] = {
    "cogview3": cogview3_pipeline,
    "cogvideox": cogvideox_pipeline,
    "mochi": mochi_pipeline,
}
