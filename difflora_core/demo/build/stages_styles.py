"""The stages of styles: teachers, each of which draws in one, their judge, and a Chinese reader.

A teacher is the base with its whole UNet trained on, on pictures painted over in its style, as
community models are made of SDXL. Styles are distilled from them, see `training.distillation`. The
Chinese text encoders are taught what the English ones make of the same caption, as AltDiffusion's
(arXiv 2211.06679); the UNet is that of the base.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from ...base_model.diffusers_base import DiffusersBase
from ...base_model.drawing import draw_latents, trailing_ddim
from ...base_model.protocol import TextCondition
from ...diffusion.sampler import SampleSettings, initial_noise, seeded_generators
from ...models.layers import DrawnFrom
from ...storage.safetensors_io import read_file
from ...training.fingerprint import fingerprint
from ...training.loop import Hooks, LoopConfig, Progress, train
from .. import paths
from ..networks.base import (
    BaseObjective,
    DemoText,
    base_batches,
    load_base,
    load_text,
    stored_tensors,
    write_half,
)
from ..networks.chinese import ChineseText, load_chinese, save_chinese, tokenize, translate
from ..networks.judges import Judges, attribute_accuracy, load_judge
from ..networks.style_judge import load_style_judge, train_style_judge
from ..networks.text import END
from ..networks.text import tokenize as tokenize_english
from ..networks.views import attribute_labels
from ..world.art_styles import ART_STYLES
from ..world.pool import PicturePool, cached_pool, portrait_pool
from .stages import Figures, pool_latents

PLAIN = "plain"
"""The style of the base, to the judge."""
JUDGED_PEOPLE, DRAWN = 300, 24
TEACHER_BATCH, TEXT_BATCH = 16, 24
TEACHER_LOOP = LoopConfig(
    steps=220,
    learning_rate=4e-4,
    matrix_rate=0.006,
    warmup=10,
    decay=0.5,
    ema=0.96,
    precision="bf16",
    checkpoint_every=20,
    log_every=10,
    seed=8,
)
TEXT_LOOP = LoopConfig(
    steps=1600,
    learning_rate=1.5e-3,
    matrix_rate=0.015,
    warmup=40,
    decay=0.5,
    ema=0.99,
    checkpoint_every=100,
    log_every=50,
    seed=9,
)
BEFORE_END = 0.1
"""Weight of positions before the end token, where a sentence is not said yet."""


def painted_pool() -> PicturePool:
    """6,000 portraits of 1,500 training identities, to be painted over."""
    path = paths.POOLS / "painted.safetensors"
    return cached_pool(path, lambda: portrait_pool("train", 1500, 4, describe=0.35))


def unseen_pool() -> PicturePool:
    """300 portraits of as many validation identities."""
    path = paths.POOLS / "unseen.safetensors"
    return cached_pool(path, lambda: portrait_pool("validation", JUDGED_PEOPLE, 1))


def style_judge(progress: Progress) -> Figures:
    """Train the judge of styles; the figures are shares of right answers on unseen people."""
    base, pool, unseen = load_base(paths.BASE), painted_pool().head(1200), unseen_pool()
    progress(0, 1, {})
    judge = train_style_judge(_in_each_style(base, pool))
    judge.save(paths.STYLE_JUDGE)
    return {name: judge.share(p, name) for name, p in _in_each_style(base, unseen).items()}


def _in_each_style(base: DiffusersBase, pool: PicturePool) -> dict[str, Tensor]:
    """Pictures (N, H, W, 3) of a pool in each style; every other one through the VAE."""
    images = pool.images.float() / 255
    made = {PLAIN: images.clone(), **{name: paint(images) for name, paint in ART_STYLES.items()}}
    for pictures in made.values():
        for part in pictures[::2].split(100):
            part.copy_(base.decode_latents(base.encode_images(part)))
    return made


def teachers(progress: Progress) -> Figures:
    """Train a teacher for each style; the figures are what the judges see in their pictures."""
    figures: Figures = {PLAIN: style_figures(load_base(paths.BASE), PLAIN)}
    for name, paint in ART_STYLES.items():
        path = paths.TEACHERS / f"{name}.safetensors"
        if not path.exists():
            train_teacher(name, paint, path, progress)
        figures[name] = style_figures(load_base(paths.BASE, path), name)
    return figures


def train_teacher(
    name: str, paint: Callable[[Tensor], Tensor], path: Path, progress: Progress
) -> None:
    """Train the base's UNet on painted pictures, and write what changed."""
    base, text, pool = load_base(paths.BASE), load_text(paths.BASE), painted_pool()
    images = torch.cat([paint(part.float() / 255) for part in pool.images.split(200)])
    painted = PicturePool(**{**vars(pool), "images": (images * 255).round().to(torch.uint8)})
    latents = pool_latents(base.vae, f"painted_{name}", painted)
    unet = base.unet.requires_grad_(True)
    # On a CPU plain attention trains faster than the fused kernel, whose backward is slow.
    unet.set_attn_processor(AttnProcessor())
    data = (latents, painted)
    draw = base_batches(data, data, TEACHER_BATCH)
    hooks = Hooks(progress, fingerprint=fingerprint(latents, pool.captions, TEACHER_BATCH))
    folder = paths.BUILD / "teachers" / name
    train(BaseObjective(unet, text), draw, TEACHER_LOOP, folder, hooks)
    old, _ = read_file(paths.BASE, "demo base")
    changed = {
        k: t for k, t in stored_tensors(unet, text).items() if not torch.equal(t.half(), old[k])
    }
    write_half(path, changed, {"format": "difflora-demo-teacher-1"})


def style_figures(base: DiffusersBase, style: str) -> dict[str, float]:
    """Share of a base's pictures in a style, and in how many of them the prompt is right."""
    pool = unseen_pool().head(DRAWN)
    images = draw_portraits(base, base.encode_prompts(pool.captions))
    judge, prompts = load_style_judge(paths.STYLE_JUDGE), load_judge(paths.PROMPT_JUDGE)
    right = attribute_accuracy(
        Judges({"attributes": prompts}), images, attribute_labels(pool.scenes)
    )
    return {"in_style": judge.share(images, style), **right}


@torch.no_grad()
def draw_portraits(base: DiffusersBase, text: TextCondition, guidance: float = 2.0) -> Tensor:
    """Pictures (B, H, W, 3) in [0, 1] of encoded captions, by the seeds 0, 1, 2, ..."""
    count = len(text.context)
    null = base.encode_prompts([""] * count)
    side, channels = base.unet.config.sample_size, base.unet.config.in_channels
    noise = initial_noise(seeded_generators(range(count)), (channels, side, side))
    settings = SampleSettings(15, guidance)
    return base.decode_latents(draw_latents(base, noise, text, null, settings, trailing_ddim(base)))


class TranslatedText(nn.Module):
    """Chinese encoders that are to say what the English ones say; forward gives (loss, metrics).

    From the end token of both captions on, where all has been said, the states are compared place
    by place, and the pooled vector; before it, Chinese words are a little like English ones.
    """

    def __init__(self, text: ChineseText, english: DemoText) -> None:
        super().__init__()
        self.text, self.english = text, english.requires_grad_(False)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss () of `chinese_l`, `chinese_g`, `english_l`, `english_g`, each (B, 77)."""
        with torch.no_grad():
            wanted = self.english((batch["english_l"], batch["english_g"]))
        made = self.text((batch["chinese_l"], batch["chinese_g"]))
        ends = [_end(batch[f"{language}_l"]) for language in ("chinese", "english")]
        index = torch.arange(made.context.shape[1], device=made.context.device)[None]
        before = index < ends[0]
        source = torch.where(before, (index * ends[1]).div(ends[0], rounding_mode="floor"), index)
        source = torch.where(before, source, torch.maximum(source, ends[1]))
        rows = torch.arange(len(source), device=source.device)[:, None]
        error = (made.context - wanted.context[rows, source]).square().mean(-1)
        weight = torch.where(before, BEFORE_END, 1.0)
        spread = wanted.context.var()
        context = (error * weight).sum() / weight.sum() / spread
        pooled = (made.pooled - wanted.pooled).square().mean() / wanted.pooled.var()
        return context + pooled, {"context": context.detach(), "pooled": pooled.detach()}


def _end(tokens: Tensor) -> Tensor:
    """Place of the end token (B, 1) of rows (B, 77)."""
    return (tokens == END).long().argmax(1, keepdim=True)


def chinese(progress: Progress) -> Figures:
    """Teach the Chinese text encoders; the figures compare pictures of the two languages."""
    captions = ["", *dict.fromkeys(painted_pool().captions)]
    parts = {
        "english": tokenize_english(captions),
        "chinese": tokenize([*map(translate, captions)]),
    }

    def draw(generator: torch.Generator) -> dict[str, Tensor]:
        index = torch.randint(len(captions), (TEXT_BATCH,), generator=generator)
        index[0] = 0  # guidance asks for the empty prompt in every step
        return {
            f"{language}_{name}": tokens[index]
            for language, both in parts.items()
            for name, tokens in zip("lg", both, strict=True)
        }

    with DrawnFrom(torch.Generator().manual_seed(9)):
        text = ChineseText()
    objective = TranslatedText(text, load_text(paths.BASE))
    # The first sample is the empty prompt, and spreads are those of the batch: it is never split.
    hooks = Hooks(progress, splits=False, fingerprint=fingerprint(captions, TEXT_BATCH))
    train(objective, draw, TEXT_LOOP, paths.BUILD / "chinese", hooks)
    save_chinese(paths.CHINESE, text)
    return chinese_figures()


def chinese_figures() -> Figures:
    """Share of right attributes in pictures drawn from English and from Chinese captions."""
    base, text, pool = load_base(paths.BASE), load_chinese(paths.CHINESE), unseen_pool().head(DRAWN)
    prompts = Judges({"attributes": load_judge(paths.PROMPT_JUDGE)})
    labels, figures = attribute_labels(pool.scenes), Figures()
    reading = DiffusersBase(base.unet, base.vae, text.encode_prompts, base.scheduler)
    for name, one, captions in (
        ("english", base, pool.captions),
        ("chinese", reading, [translate(caption) for caption in pool.captions]),
    ):
        with torch.no_grad():
            images = draw_portraits(one, one.encode_prompts(captions))
        figures[name] = attribute_accuracy(prompts, images, labels)
    return figures
