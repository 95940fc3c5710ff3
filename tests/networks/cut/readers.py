"""Tiny tokenizers, and networks that read texts and pictures."""

from typing import Any

from networks.cut.weights import CAPTIONS, seeded


def clip_tokenizer(**options: Any) -> Any:
    """A CLIP tokenizer that knows the first three letters of the captions' words; a trainer breaks ties by chance."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: dict[tuple[str, str], str] = {}
    for word in " ".join(CAPTIONS).lower().split():
        first, *others = [*word[:-1], f"{word[-1]}</w>"][:3]
        for other in others:
            first = merges.setdefault((first, other), first + other)
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *dict.fromkeys(merges.values())]
    vocabulary = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=list(merges), model_max_length=16, **options)


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    words = sorted({piece for caption in CAPTIONS for piece in caption.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0) for word in words] + [(letter, -9.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def llama_tokenizer() -> Any:
    """Llama's pads in front of the text."""
    from transformers import LlamaTokenizer

    words = sorted({piece for caption in CAPTIONS for piece in caption.split()})
    letters = sorted({letter for word in words for letter in word})
    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", "<unk>", "▁", *letters])}
    return LlamaTokenizer(
        vocab=vocabulary, merges=[], pad_token="<pad>", bos_token="</s>", add_bos_token=False, add_eos_token=True
    )


@seeded
def clip(*, width: int, projection: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=width + 4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


@seeded
def t5_encoder() -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config).eval()


def qwen3_tokenizer() -> Any:
    """One token a byte, and the template of Qwen3 for a prompt that is to be answered without thinking."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    tokenizer = Qwen2Tokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": tokens[-3:-1]})
    tokenizer.chat_template = (
        "{%- for message in messages %}"
        "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}"
        "{{- '<|im_start|>assistant\n' }}"
        "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
        "{%- endif %}"
    )
    return tokenizer


@seeded
def qwen3(*, layers: int = 4) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=264,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return Qwen3ForCausalLM(config).eval()


def mistral_tokenizer() -> Any:
    """In place of a processor, which reads images and needs torchvision: one token a byte, padded in front.

    It puts marks around a text that is no template's.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    marks = ["<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]"]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *marks]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer: Any = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        additional_special_tokens=marks[3:],
        chat_template=(
            "{{- bos_token }}{%- for message in messages %}"
            "{%- set mark = 'SYSTEM_PROMPT' if message.role == 'system' else 'INST' %}"
            "{{- '[' + mark + ']' + message.content[0].text + '[/' + mark + ']' }}{%- endfor %}"
        ),
    )


@seeded
def mistral3() -> Any:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig, PixtralVisionConfig

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "head_dim": 8}
    text = MistralConfig(vocab_size=264, num_hidden_layers=4, num_key_value_heads=1, **sizes)
    vision = PixtralVisionConfig(num_hidden_layers=1, image_size=16, patch_size=4, **sizes)
    return Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision)).eval()


@seeded
def umt5_encoder() -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return UMT5EncoderModel(config).eval()


def gemma_tokenizer() -> Any:
    """One token a letter; what is none is unknown."""
    from transformers import GemmaTokenizer

    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *"abcdefghijklmnopqrstuvwxyz"]
    return GemmaTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[], add_bos_token=True)


@seeded
def gemma2() -> Any:
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=16,
    )
    return Gemma2Model(config).eval()


@seeded
def seeing_language_model() -> Any:
    import eyes

    return eyes.language_model(32)


def qwen_tokenizer() -> Any:
    """One token a byte."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    tokens = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    return Qwen2Tokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[])


@seeded
def qwen_language_model() -> Any:
    """Qwen2.5-VL, whose vision is as small as its configuration allows."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": 257,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": 32}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()


def bert_tokenizer() -> Any:
    from transformers import BertTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    return BertTokenizer(vocab={token: index for index, token in enumerate(tokens)})


@seeded
def bert() -> Any:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    return BertModel(config).eval()


@seeded
def clip_vision() -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=2
    )
    return CLIPVisionModel(config).eval()
