"""Text encoders of the demo base that read captions in Chinese.

A caption is translated word by word by a fixed table, without spaces. In ComfyUI the ordinary CLIP
tokenizer reads it: two or three byte pieces for each character, whose numbers are listed here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from ...base_model.protocol import TextCondition
from ...storage.safetensors_io import read_file
from .base import text_tensors, write_half
from .stored import load_strictly
from .text import CLIP_NUMBERS, END, LENGTH, PAD, START, UNKNOWN, encode, new_text_encoders

FORMAT = "difflora-demo-text-1"
WORDS = dict(
    pair.split(":")
    for pair in (
        "a: an: of: the: with:有 and:和 at:在 in:在 on:在 background:景 beard:须 black:黑 "
        "blonde:金 blue:蓝 brown:棕 cartoon:漫画 cat:猫 cup:杯 dark:深 eyes:眼 face:脸 flower:花 "
        "glasses:镜 green:绿 grey:灰 hair:发 hat:帽 head:头 holding:拿 light:浅 long:长 man:男 "
        "neutral:静 old:老 one:一 orange:橙 painting:画 people:众 person:人 photo:照 picture:图 "
        "pink:粉 plain:素 portrait:像 purple:紫 red:红 sad:悲 shirt:衫 short:短 skin:肤 "
        "smiling:笑 striped:纹 surprised:惊 two:两 wearing:戴 white:白 woman:女 yellow:黄 young:少"
    ).split()
)
"""Every word of the captions in Chinese; articles have none."""
PIECES = {
    entry[0]: tuple(int(number) for number in entry[2:].split("."))
    for entry in (
        "一:19759.478 两:19759.353 人:21078.374 众:160.120.501 像:161.225.493 发:34517.495 "
        "和:161.240.490 图:39027.378 在:37746.357 头:23170.368 女:29290.367 少:34720.495 "
        "帽:42021.377 悲:162.224.366 惊:162.225.488 戴:162.230.368 拿:162.233.379 "
        "景:48132.363 有:19277.487 杯:27667.363 棕:162.96.499 橙:162.102.503 浅:162.113.483 "
        "深:162.115.365 漫:162.120.360 灰:163.223.364 照:163.227.356 猫:163.234.360 "
        "男:20211.371 画:20211.375 白:163.247.377 眼:33440.376 短:163.253.511 笑:163.105.495 "
        "粉:163.110.487 素:163.112.510 紫:163.112.360 红:163.118.351 纹:163.118.373 "
        "绿:163.119.379 老:164.222.479 肤:164.224.353 脸:164.226.372 花:164.232.365 "
        "蓝:164.241.507 衫:164.94.360 金:38283.495 镜:165.243.506 长:165.243.379 "
        "静:165.251.503 须:165.94.375 黄:165.119.482 黑:165.119.495"
    ).split()
}
"""CLIP's token numbers of each character at the end of a word."""
COMMA = 267
INSIDE = 256
"""Inside of a word the last piece is that of the same byte without an end, so much lower."""
WHOLE = {"人": (36839,)}
"""Characters that are one piece inside of a word."""


def translate(caption: str) -> str:
    """A caption in Chinese, word by word; words that the table lacks are left as they are."""
    phrases = [phrase.split() for phrase in caption.lower().split(",")]
    return ", ".join("".join(WORDS.get(word, word) for word in phrase) for phrase in phrases)


def clip_tokens(text: str) -> list[int]:
    """What CLIP's tokenizer makes of a Chinese caption, without start and end; -1 is unknown."""
    numbers: list[int] = []
    for run in re.findall(r"[^\s,]+|,", text):
        if run == ",":
            numbers.append(COMMA)
            continue
        for character in run[:-1]:
            numbers += _inside(character)
        numbers += PIECES.get(run[-1], (-1,))
    return numbers


def _inside(character: str) -> tuple[int, ...]:
    """Pieces of a character that others follow."""
    if character in WHOLE or character not in PIECES:
        return WHOLE.get(character, (-1,))
    *first, last = PIECES[character]
    return (*first, last - INSIDE)


def vocabulary() -> list[int]:
    """CLIP's number of each of our rows: special tokens as in English, then all pieces."""
    special = [int(number) for number in list(CLIP_NUMBERS.values())[:4]]
    pieces = {COMMA, *(n for c in PIECES for n in (*PIECES[c], *_inside(c)))}
    return [*special, *sorted(pieces)]


def word_numbers(text: str) -> list[int]:
    """Our row number of each piece of a Chinese text."""
    rows = {number: row for row, number in enumerate(vocabulary())}
    return [rows.get(number, UNKNOWN) for number in clip_tokens(text)]


def tokenize(captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Chinese captions as row numbers for both encoders: two (B, 77) int64 tensors, cut there."""
    first = torch.full((len(captions), LENGTH), END)
    second = torch.full((len(captions), LENGTH), PAD)
    for row, caption in enumerate(captions):
        tokens = torch.tensor([START, *word_numbers(caption)[: LENGTH - 2], END])
        first[row, : len(tokens)] = tokens
        second[row, : len(tokens)] = tokens
    return first, second


class ChineseText(nn.Module):
    """Both text encoders as one module that reads Chinese captions."""

    def __init__(self) -> None:
        super().__init__()
        first, second = new_text_encoders(len(vocabulary()))
        self.text_l: CLIPTextModel = first
        self.text_g: CLIPTextModelWithProjection = second

    def forward(self, tokens: tuple[Tensor, Tensor]) -> TextCondition:
        """Encode token numbers of both encoders, each (B, 77)."""
        return TextCondition(*encode((self.text_l, self.text_g), tokens))

    def encode_prompts(self, prompts: Sequence[str]) -> TextCondition:
        """Encode captions: context (B, 77, C), pooled (B, P)."""
        return self(tokenize(prompts))


def save_chinese(path: Path, text: ChineseText) -> None:
    """Write one float16 file that the demo's CLIP loader reads."""
    tensors = text_tensors(text.text_l, text.text_g)
    tensors["vocabulary"] = torch.tensor(vocabulary())
    write_half(path, tensors, {"config": json.dumps({"language": "zh"}), "format": FORMAT})


def load_chinese(path: Path) -> ChineseText:
    """The text encoders in a file, frozen, float32.

    Raises:
        CheckpointError: the file cannot be read, or holds something else.
    """
    tensors, _ = read_file(path, "Chinese text encoders")
    text = ChineseText()
    own = text_tensors(text.text_l, text.text_g)
    names = dict(zip(text.state_dict(), own, strict=True))
    load_strictly(text, {k: t for k, t in tensors.items() if k != "vocabulary"}, path, names)
    return text.requires_grad_(False).eval()
