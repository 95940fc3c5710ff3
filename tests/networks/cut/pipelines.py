"""Tiny pipelines of all kinds, and which of their networks others have too."""

from collections.abc import Callable
from typing import Any

from kinds import masking
from networks.cut.autoencoders import deep_vae, film_vae, ltx_vae, patch_vae, vae, wan_ti2v_vae, wan_vae
from networks.cut.denoisers import (
    OPENING,
    auraflow_transformer,
    chroma_transformer,
    controlnet,
    dit_transformer,
    flux2_transformer,
    flux_transformer,
    hunyuan_transformer,
    ltx_transformer,
    lumina2_transformer,
    pixart_transformer,
    qwen_transformer,
    sana_sprint_transformer,
    sana_transformer,
    sd3_transformer,
    unet,
    wan22_transformer,
    wan_flf2v_transformer,
    wan_transformer,
    zimage_transformer,
)
from networks.cut.readers import (
    bert,
    bert_tokenizer,
    clip,
    clip_tokenizer,
    clip_vision,
    gemma2,
    gemma_tokenizer,
    llama_tokenizer,
    mistral3,
    mistral_tokenizer,
    qwen3,
    qwen3_tokenizer,
    qwen_language_model,
    qwen_tokenizer,
    seeing_language_model,
    t5_encoder,
    t5_tokenizer,
    umt5_encoder,
)


def sd3_pipeline(*, t5: bool = False) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    tokenizer, second = clip_tokenizer(), clip_tokenizer(pad_token="!")
    return StableDiffusion3Pipeline(
        transformer=sd3_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(scaling_factor=1.5, shift_factor=0.06),
        text_encoder=clip(width=8, projection=True),
        tokenizer=tokenizer,
        text_encoder_2=clip(width=12, projection=True),
        tokenizer_2=second,
        text_encoder_3=t5_encoder() if t5 else None,
        tokenizer_3=t5_tokenizer() if t5 else None,
    )


SD: dict[str, Any] = {"levels": 2, "cross_attention_dim": 12}
XL: dict[str, Any] = {
    "cross_attention_dim": 24,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 16 + 6 * 4,
    "use_linear_projection": True,
}
"""Of the UNets."""


def sd_pipeline() -> Any:
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    tokenizer = clip_tokenizer()
    return StableDiffusionPipeline(
        unet=unet(**SD),
        scheduler=PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
        vae=vae(),
        text_encoder=clip(width=12, projection=False),
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def lcm_pipeline() -> Any:
    """Its denoiser was distilled to few steps, and is told the scale of guidance."""
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler

    return LatentConsistencyModelPipeline(
        unet=unet(cross_attention_dim=12, time_cond_proj_dim=16),
        scheduler=LCMScheduler(),
        vae=vae(),
        text_encoder=clip(width=12, projection=False),
        tokenizer=clip_tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl_pipeline() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    tokenizer, second = clip_tokenizer(), clip_tokenizer(pad_token="!")
    return StableDiffusionXLPipeline(
        unet=unet(**XL),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading"
        ),
        vae=vae(scaling_factor=0.13),
        text_encoder=clip(width=12, projection=False),
        tokenizer=tokenizer,
        text_encoder_2=clip(width=12, projection=True),
        tokenizer_2=second,
        add_watermarker=False,
    )


def controlnet_pipeline(*, xl: bool = False) -> Any:
    from diffusers import StableDiffusionControlNetPipeline, StableDiffusionXLControlNetPipeline

    parts = (sdxl_pipeline if xl else sd_pipeline)().components
    if xl:
        return StableDiffusionXLControlNetPipeline(**parts, controlnet=controlnet(**XL), add_watermarker=False)
    return StableDiffusionControlNetPipeline(**parts, controlnet=controlnet(**SD), requires_safety_checker=False)


def inpaint_pipeline(*, xl: bool = False) -> Any:
    """Its UNet reads the mask and what stays."""
    from diffusers import StableDiffusionInpaintPipeline, StableDiffusionXLInpaintPipeline

    parts = (sdxl_pipeline if xl else sd_pipeline)().components
    parts["unet"] = unet(**(XL if xl else SD), in_channels=9)
    if xl:
        return StableDiffusionXLInpaintPipeline(**parts, add_watermarker=False)
    return StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)


def fill_pipeline() -> Any:
    """Its denoiser reads latents of what stays and a mask of 4 pixels a latent pixel."""
    from diffusers import FluxFillPipeline

    parts = flux_pipeline().components | {"transformer": flux_transformer(in_channels=16 + 4 * (4 + 4))}
    return FluxFillPipeline(**{name: part for name, part in parts.items() if part is not None})


def flux_pipeline() -> Any:
    """With a schedule that depends on the size, as FLUX.1-dev's."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    return FluxPipeline(
        transformer=flux_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_image_seq_len=16, max_image_seq_len=128
        ),
        vae=vae(scaling_factor=0.36, shift_factor=0.12),
        text_encoder=clip(width=12, projection=False),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
    )


def kontext_pipeline() -> Any:
    """FLUX.1 told a picture."""
    from diffusers import FluxKontextPipeline

    return FluxKontextPipeline(**flux_pipeline().components)


def flux2_pipeline(*, dev: bool = False) -> Any:
    """Of a text encoder that reads its first three layers, not such as the 27th: those take long to export."""
    import diffusers

    kind: Any = diffusers.Flux2Pipeline if dev else diffusers.Flux2KleinPipeline

    class Early(kind):
        def __call__(self, *args: Any, text_encoder_out_layers: Any = (1, 2, 3), **given: Any) -> Any:
            return super().__call__(*args, text_encoder_out_layers=text_encoder_out_layers, **given)

    Early.__name__ = kind.__name__
    pipeline = Early(
        transformer=flux2_transformer(guidance_embeds=dev),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=patch_vae(),
        text_encoder=mistral3() if dev else qwen3(),
        tokenizer=mistral_tokenizer() if dev else qwen3_tokenizer(),
    )
    if dev:
        pipeline.system_message = "Say what it looks like."  # the real one is long
    return pipeline


def pixart_pipeline(*, sigma: bool = False) -> Any:
    """Alpha's is told the image's size; sigma's is not."""
    from diffusers import (
        DPMSolverMultistepScheduler,
        PixArtAlphaPipeline,
        PixArtSigmaPipeline,
    )

    return (PixArtSigmaPipeline if sigma else PixArtAlphaPipeline)(
        transformer=pixart_transformer(use_additional_conditions=not sigma),
        scheduler=DPMSolverMultistepScheduler(),
        vae=vae(scaling_factor=0.13),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
    )


def chroma_pipeline() -> Any:
    """Its text is padded, and told booleans the denoiser looks at a token of padding alone."""
    from diffusers import ChromaPipeline, FlowMatchEulerDiscreteScheduler

    return masking(
        ChromaPipeline(
            transformer=chroma_transformer(),
            scheduler=FlowMatchEulerDiscreteScheduler(use_beta_sigmas=True),
            vae=vae(scaling_factor=0.36, shift_factor=0.12),
            text_encoder=t5_encoder(),
            tokenizer=t5_tokenizer(),
        )
    )


def auraflow_pipeline() -> Any:
    """Its text is padded, and its T5 told where."""
    from diffusers import AuraFlowPipeline, FlowMatchEulerDiscreteScheduler

    return AuraFlowPipeline(
        transformer=auraflow_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        vae=vae(scaling_factor=0.13),
        text_encoder=umt5_encoder(),
        tokenizer=llama_tokenizer(),
    )


def sana_pipeline() -> Any:
    """With the sampler and the autoencoder of Sana, and a denoiser of 2048 pixels, which is told places."""
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline

    return SanaPipeline(
        transformer=sana_transformer(),
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        vae=deep_vae(),
        text_encoder=gemma2(),
        tokenizer=gemma_tokenizer(),
    )


def sana_sprint_pipeline() -> Any:
    """The networks of Sana, but for the denoiser."""
    from diffusers import SanaSprintPipeline, SCMScheduler

    components = sana_pipeline().components | {"transformer": sana_sprint_transformer(), "scheduler": SCMScheduler()}
    return SanaSprintPipeline(**components)


def qwen_pipeline() -> Any:
    """With a schedule that depends on the size and ends above zero, as Qwen-Image's."""
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline

    return QwenImagePipeline(
        transformer=qwen_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_image_seq_len=16,
            max_image_seq_len=128,
            max_shift=0.9,
            shift_terminal=0.02,
        ),
        vae=film_vae(),
        text_encoder=qwen_language_model(),
        tokenizer=qwen_tokenizer(),
    )


def qwen_edit_pipeline(*, plus: bool = True) -> Any:
    """The networks of Qwen-Image but for what reads, and the denoiser, which modulates pictures as at timestep 0."""
    import diffusers
    import eyes

    name = "QwenImageEditPlusPipeline" if plus else "QwenImageEditPipeline"
    denoiser = qwen_transformer(zero_cond_t=True) if plus else qwen_transformer()
    components = {**qwen_pipeline().components, "transformer": denoiser}
    return eyes.seeing(getattr(diffusers, name), components, seeing_language_model())


def lumina2_pipeline() -> Any:
    """With an autoencoder of two levels, which diffusers' pipeline takes for four."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline

    pipeline = Lumina2Pipeline(
        transformer=lumina2_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=vae(scaling_factor=0.36, shift_factor=0.12),
        text_encoder=gemma2(),
        tokenizer=gemma_tokenizer(),
    )
    pipeline.system_prompt = "draw"
    pipeline.vae_scale_factor = 2
    return pipeline


def zimage_pipeline() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline

    return ZImagePipeline(
        transformer=zimage_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(scaling_factor=0.36, shift_factor=0.12),
        text_encoder=qwen3(layers=2).model,
        tokenizer=qwen3_tokenizer(),
    )


def hunyuan_pipeline() -> Any:
    """Its call counts on 8 pixels a side of a latent pixel. The published sampler draws noise; this one does not."""
    from diffusers import DDIMScheduler, HunyuanDiTPipeline

    return HunyuanDiTPipeline(
        vae=vae(channels=(4, 4, 4, 8), scaling_factor=0.13),
        text_encoder=bert(),
        tokenizer=bert_tokenizer(),
        transformer=hunyuan_transformer(),
        scheduler=DDIMScheduler(**HUNYUAN_SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
    )


HUNYUAN_SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.03,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "steps_offset": 1,
    "prediction_type": "v_prediction",
}


def wan_pipeline() -> Any:
    """A latent pixel is four pixels wide, and a latent frame four frames long."""
    from diffusers import UniPCMultistepScheduler, WanPipeline

    return WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=umt5_encoder(),
        vae=wan_vae(),
        transformer=wan_transformer(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )


def ltx_pipeline() -> Any:
    """A latent pixel is 32 pixels wide, and a latent frame eight frames long."""
    from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline

    return LTXPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(),
        vae=ltx_vae(),
        transformer=ltx_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
        ),
    )


def ltx_condition_pipeline() -> Any:
    """Likewise; its call says the levels of noise."""
    from diffusers import FlowMatchEulerDiscreteScheduler, LTXConditionPipeline

    return LTXConditionPipeline(**ltx_pipeline().components | {"scheduler": FlowMatchEulerDiscreteScheduler()})


def wan_ti2v_pipeline() -> Any:
    """A latent pixel is two patches of the autoencoder wide; the denoiser is told a timestep for each token."""
    pipeline = wan_pipeline()
    vae = wan_ti2v_vae()
    return type(pipeline)(**{**pipeline.components, "vae": vae}, expand_timesteps=True)


def wan22_pipeline() -> Any:
    """Two denoisers in turn: of four steps each takes two."""
    pipeline = wan_pipeline()
    pipeline.register_modules(transformer_2=wan22_transformer())
    pipeline.register_to_config(boundary_ratio=0.875)
    return pipeline


def wan_i2v_pipeline() -> Any:
    """Films that begin with a picture, in which an image encoder sees as many tokens as CLIP's."""
    from diffusers import WanImageToVideoPipeline
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    parts = {**wan_pipeline().components, "transformer": wan_transformer(**OPENING, image_dim=16, added_kv_proj_dim=24)}
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return WanImageToVideoPipeline(**parts, image_encoder=clip_vision(), image_processor=processor)


def wan_flf2v_pipeline() -> Any:
    """Likewise, of films that end with a picture, too."""
    pipeline = wan_i2v_pipeline()
    pipeline.register_modules(transformer=wan_flf2v_transformer())
    return pipeline


def wan22_i2v_pipeline() -> Any:
    """Likewise, by two denoisers in turn, without an image encoder."""
    from diffusers import WanImageToVideoPipeline

    given = {"transformer": wan_transformer(**OPENING), "transformer_2": wan22_transformer(**OPENING)}
    return WanImageToVideoPipeline(**{**wan_pipeline().components, **given}, boundary_ratio=0.875)


PIPELINES: dict[str, Callable[[], Any]] = {
    "sd3": sd3_pipeline,
    "sd3_t5": lambda: sd3_pipeline(t5=True),
    "sd": sd_pipeline,
    "lcm": lcm_pipeline,
    "sdxl": sdxl_pipeline,
    "flux": flux_pipeline,
    "chroma": chroma_pipeline,
    "flux2": flux2_pipeline,
    "flux2_dev": lambda: flux2_pipeline(dev=True),
    "pixart_alpha": pixart_pipeline,
    "pixart_sigma": lambda: pixart_pipeline(sigma=True),
    "auraflow": auraflow_pipeline,
    "sana": sana_pipeline,
    "sana_sprint": sana_sprint_pipeline,
    "qwen": qwen_pipeline,
    "lumina2": lumina2_pipeline,
    "zimage": zimage_pipeline,
    "hunyuan": hunyuan_pipeline,
    "wan": wan_pipeline,
    "ltx": ltx_pipeline,
}
FILMS = ("wan", "ltx")


def dit_pipeline() -> Any:
    """It draws classes, and takes no prompt."""
    from diffusers import DDIMScheduler, DiTPipeline

    return DiTPipeline(
        transformer=dit_transformer(),
        vae=vae(scaling_factor=0.13),
        scheduler=DDIMScheduler(beta_schedule="linear", beta_end=0.02, clip_sample=False),
        id2label={0: "tench, Tinca tinca", 134: "crane", 207: "golden retriever", 517: "crane"},
    )


OTHERS: dict[str, Callable[[], Any]] = {
    "dit": dit_pipeline,
    "controlnet": controlnet_pipeline,
    "controlnet_xl": lambda: controlnet_pipeline(xl=True),
    "inpaint": inpaint_pipeline,
    "inpaint_xl": lambda: inpaint_pipeline(xl=True),
    "fill": fill_pipeline,
    "kontext": kontext_pipeline,
    "qwen_edit": qwen_edit_pipeline,
    "qwen_edit_first": lambda: qwen_edit_pipeline(plus=False),
    "ltx_condition": ltx_condition_pipeline,
    "wan22": wan22_pipeline,
    "wan_ti2v": wan_ti2v_pipeline,
    "wan_i2v": wan_i2v_pipeline,
    "wan_flf2v": wan_flf2v_pipeline,
    "wan22_i2v": wan22_i2v_pipeline,
}
"""Pipelines whose calls are others, each with a file of tests: class_conditional, references, turns, openings."""
LIKE = {
    "inpaint": "sd",
    "inpaint_xl": "sdxl",
    "fill": "flux",
    "controlnet": "sd",
    "controlnet_xl": "sdxl",
    "kontext": "flux",
    "qwen_edit": "qwen",
    "qwen_edit_first": "qwen_edit",
    **{name: "wan" for name in ("wan22", "wan_ti2v", "wan_i2v", "wan22_i2v")},
    "wan_flf2v": "wan_i2v",
    "ltx_condition": "ltx",
}
"""Pipelines that share all networks with another but for those in OWN, or the denoiser's graph."""
OWN = {
    "ltx_condition": ("text_encoder",),
    "qwen_edit": ("transformer", "text_encoder", "vision_encoder"),
    "qwen_edit_first": ("transformer", "text_encoder"),
    "wan_ti2v": ("transformer", "vae_decoder", "vae_decoder_next", "vae_encoder"),
}
