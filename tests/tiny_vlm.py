"""Tiny vision-language models that answer: random weights, except that after a prompt they say a box and stop.

Which box depends on the pictures. ``write_llava`` makes a folder that every loader takes; Qwen2.5-VL's own processor
needs torchvision for its videos, so ``qwen`` returns the model with a processor for pictures alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin

BOXES, END = ("\\box{Success}", "\\box{Failure}"), "<|im_end|>"
QWEN_MARKS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TEXT = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{% for part in message.content %}{% if part.type == 'image' %}PICTURE"
    "{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


class PicturesOnly(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor without its video half."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        self.image_token, self.video_token = QWEN_MARKS[2:]
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(QWEN_MARKS[2:])
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def tokenizer_of_bytes(marks: list[str]) -> PreTrainedTokenizerFast:
    core = Tokenizer(
        models.BPE({letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *marks]})
    tokenizer.add_tokens(list(BOXES))
    return tokenizer


def teach(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """Sets a few embeddings: after a prompt a box comes, after a box the end; attention decides which box."""
    model.eval().generation_config.do_sample = True
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", END, *BOXES)}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("v_proj.weight", "o_proj.weight")):
                weight.mul_(10)
        words, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        head.zero_()
        spoken, asked = torch.eye(32)[:2] * 10
        words[ids["<|im_start|>"]] = asked
        head[ids[END]] = spoken
        lean = torch.cat([torch.zeros(2), torch.randn(30)])
        for box, sign in zip(BOXES, (1, -1), strict=True):
            words[ids[box]] = spoken
            head[ids[box]] = 0.5 * asked + sign * lean


def write_llava(folder: Path) -> None:
    """Writes a LLaVA of 30,000 parameters with all that a server needs to load it."""
    tokenizer = tokenizer_of_bytes(["<image>"])
    torch.manual_seed(0)
    vision = CLIPVisionConfig(**TEXT, image_size=32, patch_size=16, projection_dim=32)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    text = Qwen2Config(**TEXT, num_key_value_heads=2, vocab_size=len(tokenizer), **ends)
    picture = tokenizer.convert_tokens_to_ids("<image>")
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=picture, vision_feature_layer=-1)
    )
    teach(model, tokenizer)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(**size),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=TEMPLATE.replace("PICTURE", "<image>"),
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def qwen() -> tuple[Any, Any]:
    """Returns a Qwen2.5-VL of 60,000 parameters and its processor."""
    tokenizer = tokenizer_of_bytes(QWEN_MARKS)
    start, end, picture, video = tokenizer.convert_tokens_to_ids(QWEN_MARKS)
    torch.manual_seed(0)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    text = {**TEXT, "num_key_value_heads": 2, "vocab_size": len(tokenizer), "rope_parameters": rope, **ends}
    eyes = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=text,
            vision_config={**eyes, "fullatt_block_indexes": [0]},
            image_token_id=picture,
            video_token_id=video,
            vision_start_token_id=start,
            vision_end_token_id=end,
        )
    )
    teach(model, tokenizer)
    template = TEMPLATE.replace("PICTURE", "".join((QWEN_MARKS[0], QWEN_MARKS[2], QWEN_MARKS[1])))
    return model, PicturesOnly(Qwen2VLImageProcessorPil(), tokenizer, chat_template=template)
