"""Which diffusers pipelines the runtime samples, and how: a module and a line."""

from typing import Final

from obsdiff_runtime.errors import CompatibilityError
from obsdiff_runtime.kinds import (
    Kind,
    auraflow,
    chroma,
    dit,
    flux,
    flux2,
    hunyuan,
    ltx,
    lumina2,
    pixart,
    qwen,
    sana,
    sd3,
    unet,
    wan,
    zimage,
)

KINDS: Final[dict[str, Kind]] = {
    "StableDiffusion3Pipeline": sd3.SD3,
    "StableDiffusionPipeline": unet.SD,
    "LatentConsistencyModelPipeline": unet.LCM,
    "StableDiffusionXLPipeline": unet.SDXL,
    "StableDiffusionInpaintPipeline": unet.SD_INPAINT,
    "StableDiffusionXLInpaintPipeline": unet.SDXL_INPAINT,
    "StableDiffusionControlNetPipeline": unet.SD_CONTROLNET,
    "StableDiffusionXLControlNetPipeline": unet.SDXL_CONTROLNET,
    "FluxPipeline": flux.FLUX,
    "FluxKontextPipeline": flux.FLUX_KONTEXT,
    "FluxFillPipeline": flux.FLUX_FILL,
    "ChromaPipeline": chroma.CHROMA,
    "PixArtAlphaPipeline": pixart.PIXART,
    "PixArtSigmaPipeline": pixart.PIXART,
    "AuraFlowPipeline": auraflow.AURAFLOW,
    "SanaPipeline": sana.SANA,
    "SanaSprintPipeline": sana.SANA_SPRINT,
    "Flux2KleinPipeline": flux2.FLUX2_KLEIN,
    "Flux2Pipeline": flux2.FLUX2,
    "QwenImagePipeline": qwen.QWEN,
    "QwenImageEditPipeline": qwen.QWEN_IMAGE_EDIT,
    "QwenImageEditPlusPipeline": qwen.QWEN_IMAGE_EDIT_PLUS,
    "Lumina2Pipeline": lumina2.LUMINA2,
    "HunyuanDiTPipeline": hunyuan.HUNYUAN,
    "DiTPipeline": dit.DIT,
    "WanPipeline": wan.WAN,
    "WanImageToVideoPipeline": wan.WAN_OPENING,
    "LTXPipeline": ltx.LTX,
    "LTXImageToVideoPipeline": ltx.LTX,
    "LTXConditionPipeline": ltx.LTX_CONDITION,
    "ZImagePipeline": zimage.ZIMAGE,
}


def kind_of(pipeline_class: str) -> Kind:
    """How that diffusers class samples; CompatibilityError with the list if it is not known here."""
    if pipeline_class not in KINDS:
        raise CompatibilityError(f"the runtime cannot sample a {pipeline_class}; it can {', '.join(KINDS)}")
    return KINDS[pipeline_class]
