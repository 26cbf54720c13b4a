"""Captions in Chinese, as ComfyUI's own tokenizer and text encoders read them."""

import pytest
import torch

from difflora_core.demo.networks.chinese import (
    ChineseText,
    clip_tokens,
    save_chinese,
    translate,
)
from difflora_core.demo.world.pool import pair_pool, portrait_pool
from difflora_core.models.layers import DrawnFrom


@pytest.fixture(scope="module")
def captions():
    drawn = portrait_pool("train", 60, 3, describe=0.5).captions
    return ["", "照人", *map(translate, dict.fromkeys(drawn + pair_pool("train", 20, 20).captions))]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    with DrawnFrom(torch.Generator().manual_seed(4)):
        text = ChineseText()
    for parameter in text.parameters():
        parameter.data = parameter.data.half().float()
    path = tmp_path_factory.mktemp("chinese") / "chinese.safetensors"
    save_chinese(path, text)
    return text, path


def test_clips_tokenizer_cuts_captions_as_we_do(node_module, file, captions):
    tokenizer = node_module("host.demo").load_demo_clip(file[1]).tokenizer.clip_l.tokenizer
    for caption in captions:
        assert tokenizer(caption)["input_ids"][1:-1] == clip_tokens(caption)


def test_comfyui_encodes_what_the_encoders_do(node_module, file, captions):
    clip = node_module("host.demo").load_demo_clip(file[1])
    some = captions[:3] + captions[-2:]
    with torch.inference_mode():
        made = [clip.encode_from_tokens(clip.tokenize(c), return_pooled=True) for c in some]
        expected = file[0].encode_prompts(some)
    for k, wanted in enumerate((expected.context, expected.pooled)):
        got = torch.cat([pair[k] for pair in made]).float()
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
