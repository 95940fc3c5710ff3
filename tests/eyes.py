"""A text encoder that looks at pictures, for the tests of Qwen-Image-Edit: Qwen2.5-VL, as small as it may be."""

from typing import Any, Final

from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.processing_utils import ProcessorMixin

MARKS: Final = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


class Processor(Qwen2VLProcessor):
    """Without what reads films, which needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        self.image_token = MARKS[4]
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def tokenizer() -> Qwen2Tokenizer:
    """One token a byte, and Qwen's marks."""
    from tokenizers import pre_tokenizers

    tokens = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *MARKS]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], additional_special_tokens=list(MARKS))


def language_model(width: int) -> Qwen2_5_VLForConditionalGeneration:
    """Of two layers each; one layer of vision looks at windows."""
    text = {
        "vocab_size": 263,
        "hidden_size": width,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": width // 8,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
    }
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": width,
        "fullatt_block_indexes": [1],
    }
    marks = {"vision_start_token_id": 259, "vision_end_token_id": 260, "image_token_id": 261, "video_token_id": 262}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **marks)).eval()


def seeing(pipeline_class: Any, components: dict[str, Any], model: Qwen2_5_VLForConditionalGeneration) -> Any:
    """An editor with these components but for what reads, and a short template."""
    reads = {"tokenizer": tokenizer(), "text_encoder": model}
    processor = Processor(Qwen2VLImageProcessorPil(), reads["tokenizer"])
    pipeline = pipeline_class(**{**components, **reads}, processor=processor)
    place = "" if "Plus" in pipeline_class.__name__ else "<|vision_start|><|image_pad|><|vision_end|>"
    pipeline.prompt_template_encode = f"<|im_start|>look\n{place}{{}}<|im_end|>\n<|im_start|>a\n"
    pipeline.prompt_template_encode_start_idx = 4
    return pipeline
