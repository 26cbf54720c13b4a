"""The demo base, trained on to read a prompt word by word, as SDXL does.

Trained from nothing on short captions, a small base finds everything in the prompt's end token,
where causal text encoders sum it up, and looks at no word. Then nothing can be learned through a
word either. So its attention and text encoders train on while every caption ends with the end
token and padding of another one: what is drawn has to come from the words themselves. The finest
level of its UNet trains with them: it paints what is smaller than a few latent pixels.

Its new pictures show two things each, in one colour, in two that the caption names ("a red and
blue hat"), or in any two that it does not name ("a hat"): a base that draws hats of one kind only
has no look to teach a word. And often the words for colours are hidden once the encoders have read
them. Then the encoding of the thing's own word says them, by a linear map that is thrown away
afterwards, as a name would: SDXL can draw thousands of looks from one word each, more than its
captions describe.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch.nn import functional as F

from ...base_model.protocol import TextCondition
from ...config import parse_json
from ...diffusion.objective import stratified_timesteps
from ...storage.safetensors_io import read_file, write_atomic
from ...training.fingerprint import fingerprint
from ...training.loop import Hooks, LoopConfig, Progress, train
from .. import paths
from ..networks.base import BaseObjective, DemoText, load_base, load_text, save_base
from ..networks.text import END, tokenize, word_numbers
from ..networks.vae import encode_pool
from ..world.identities import split_seeds
from ..world.pool import PicturePool
from ..world.renderer import COLOURS
from ..world.scenes import ITEM_PHRASES
from ..world.things import draw_things
from .stages import Figures, base_loss, drawn_pool, pool_latents, validation_pool

ITEM_PAIRS = (("hat", "cup"), ("hat", "cat"), ("hat", "flower"), ("cat", "cup"), ("cat", "flower"))
"""Things that can be together in a picture."""
FINEST = ("conv_in", "down_blocks.0", "up_blocks.1", "conv_norm_out", "conv_out")
TRAINED = ("attn", ".layers.", *FINEST)
"""Parts of names of what is trained: attention, layers of the text encoders, the finest level."""
COLOUR_WORDS = torch.tensor(word_numbers(" ".join((*COLOURS, "and"))))
THING_WORDS = torch.tensor(word_numbers(" ".join(ITEM_PHRASES)))
HIDDEN_SHARE, NAMED_SHARE = 0.5, 0.9
PAIR_PICTURES, PAIR_PEOPLE, PAIR_NUMBER, CHUNK = 12_000, 3000, 200, 250
BATCH, PAIR_SHARE, THING_WEIGHT = 64, 0.5, 5.0
"""As in the last of the runs that made the shipped file; the manifest lists them."""
LOOP = LoopConfig(
    steps=4000,
    learning_rate=1e-3,
    matrix_rate=0.008,
    warmup=20,
    decay=0.4,
    ema=0.99,
    precision="bf16",
    checkpoint_every=100,
    log_every=20,
    seed=3,
)


class WordsObjective(BaseObjective):
    """The base's own loss under captions whose end tokens and padding belong to other captions.

    Batches also say of every picture (B, 1) whether it is `captioned`, or has an empty caption, and
    whether the words for colours are `hidden` from the UNet: those positions show the start token.
    `looks` (B, 2, 6), -1 to 1, are the colours that the first two words of things stand for; zeros
    say nothing.
    """

    def __init__(self, unet: UNet2DConditionModel, text: DemoText) -> None:
        super().__init__(unet, text)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(any(part in name for part in TRAINED))
        self.names = nn.Linear(6, unet.config.cross_attention_dim, bias=False)

    def condition(self, batch: dict[str, Tensor]) -> TextCondition:
        """Encoded captions of `tokens_l` and `tokens_g` (B, 77), changed as the class says."""
        own = super().condition(batch)
        end = (batch["tokens_l"] == END).long().argmax(1, keepdim=True)  # B 1
        other = torch.arange(len(end), device=end.device).roll(1)[:, None]
        index = torch.arange(own.context.shape[1], device=end.device)[None]
        source = (end[other[:, 0]] + index - end).clamp(0, own.context.shape[1] - 1)
        foreign = (index >= end) & batch["captioned"]
        context = torch.where(foreign[..., None], own.context[other, source], own.context)
        colour = torch.isin(batch["tokens_l"], COLOUR_WORDS.to(end.device)) & batch["hidden"]
        context = torch.where(colour[..., None], context[:, :1], context)
        things = torch.isin(batch["tokens_l"], THING_WORDS.to(end.device))
        order = things.cumsum(1)[..., None] == torch.arange(1, 3, device=end.device)
        named = (order & things[..., None]).to(context) @ self.names(batch["looks"]).to(context)
        return TextCondition(context + named, own.pooled)


def word_batches(
    portraits: tuple[Tensor, PicturePool], things: ThingLatents, batch: int, steps: int
) -> Callable[[torch.Generator], dict[str, Tensor]]:
    """Batches for `WordsObjective`; a tenth of the captions is empty.

    Args:
        portraits: scaled latents (M, 8, h, w) and their pool.
        things: pictures of two things.
        batch: pictures per batch.
        steps: length of the noise schedule.
    """
    latents, pool = portraits
    nothing = (torch.zeros(len(latents), *things.masks.shape[1:]), torch.zeros(len(latents), 2, 6))
    looks = 2 * things.paint - 1
    sets = (
        (latents.float(), *nothing, *tokenize(pool.captions)),
        (things.latents.float(), things.masks.float(), looks, *tokenize(things.captions)),
    )
    empty, pairs = tokenize([""]), int(batch * PAIR_SHARE)

    def draw(generator: torch.Generator) -> dict[str, Tensor]:
        parts = []
        for columns, count in zip(sets, (batch - pairs, pairs), strict=True):
            index = torch.randint(len(columns[0]), (count,), generator=generator)
            parts.append([column[index] for column in columns])
        order = torch.randperm(batch, generator=generator)
        z, masks, looks, first, second = (torch.cat(c)[order] for c in zip(*parts, strict=True))
        captioned = torch.rand(batch, 1, generator=generator) >= 0.1
        hidden = torch.rand(batch, 1, generator=generator) < HIDDEN_SHARE
        named = captioned & hidden & (torch.rand(batch, 1, generator=generator) < NAMED_SHARE)
        return {
            "latents": z,
            "noise": torch.randn(z.shape, generator=generator),
            "timesteps": stratified_timesteps(batch, generator, steps),
            "tokens_l": torch.where(captioned, first, empty[0]),
            "tokens_g": torch.where(captioned, second, empty[1]),
            "captioned": captioned,
            "hidden": hidden,
            "looks": looks * named[..., None],
            "weights": 1 + THING_WEIGHT * masks[:, None],
        }

    return draw


@dataclass(frozen=True, eq=False)
class ThingLatents:
    """Pictures of two things each, M of them.

    `latents`: (M, 8, h, w); `masks`: (M, h, w), where the things are; `paint`: (M, 2, 6), the two
    colours of each thing in the order of the captions.
    """

    latents: Tensor
    masks: Tensor
    paint: Tensor
    captions: list[str]


def thing_latents(vae: AutoencoderKL) -> ThingLatents:
    """Portraits of training people with two things each, in either order; kept on disk."""
    path = paths.BUILD / "latents" / "things.safetensors"
    if not path.exists():
        parts = [_draw_pairs(vae, start) for start in range(0, PAIR_PICTURES, CHUNK)]
        tensors = {
            "latents": torch.cat([part.latents for part in parts]),
            "masks": torch.cat([part.masks for part in parts]),
            "paint": torch.cat([part.paint for part in parts]),
        }
        captions = [caption for part in parts for caption in part.captions]
        write_atomic(tensors, {"captions": json.dumps(captions)}, path)
    tensors, facts = read_file(path, "file of latents")
    return ThingLatents(**tensors, captions=parse_json(facts["captions"], "the captions"))


def _draw_pairs(vae: AutoencoderKL, start: int) -> ThingLatents:
    seeds = split_seeds("train", PAIR_PEOPLE)
    numbers = range(start, start + CHUNK)
    people = [seeds[k % PAIR_PEOPLE] for k in numbers]
    generator = torch.Generator().manual_seed(start)
    pairs = torch.randint(2 * len(ITEM_PAIRS), (CHUNK,), generator=generator).tolist()
    kinds = [ITEM_PAIRS[pair // 2][:: 1 - 2 * (pair % 2)] for pair in pairs]
    places = [list(place) for place in zip(*kinds, strict=True)]
    drawn = draw_things(
        people, [PAIR_NUMBER + k // PAIR_PEOPLE for k in numbers], places, generator
    )
    latents = encode_pool(vae, (drawn.images * 255).round().to(torch.uint8))
    masks = F.adaptive_avg_pool2d(drawn.masks[:, None], latents.shape[-1])[:, 0]
    return ThingLatents(latents, masks.half(), drawn.paint.flatten(2), drawn.captions)


def words(progress: Progress) -> Figures:
    """Train the first base on where TRAINED says, and write the base that ships."""
    base, text = load_base(paths.FIRST_BASE), load_text(paths.FIRST_BASE)
    pool, unseen = drawn_pool(), validation_pool()
    portraits = pool_latents(base.vae, "train", pool), pool
    things = thing_latents(base.vae)
    held_out = pool_latents(base.vae, "validation", unseen)
    plain = BaseObjective(base.unet, text)
    before = base_loss(plain, held_out, unseen)
    # On a CPU plain attention trains faster than the fused kernel, whose backward is slow.
    base.unet.set_attn_processor(AttnProcessor())
    objective = WordsObjective(base.unet, text)
    facts = (portraits[0], pool.captions, things, BATCH, PAIR_SHARE, THING_WEIGHT)
    # Captions end with the end tokens of others in the batch, so it is never split.
    hooks = Hooks(progress, splits=False, fingerprint=fingerprint(*facts))
    draw = word_batches(portraits, things, BATCH, len(base.alphas_cumprod))
    train(objective, draw, LOOP, paths.BUILD / "words", hooks)
    save_base(paths.BASE, base.unet, text, base.vae)
    return {
        "validation_loss": base_loss(plain, held_out, unseen),
        "validation_loss_before": before,
    }
