"""What a style is distilled on: prompts, and latents that the teacher draws from them.

BK-SDM takes pictures with captions from the web. Here the teacher draws its own, so nothing but
prompts is needed, and what is learned is near to what it is asked for later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..base_model.drawing import draw_latents
from ..base_model.protocol import BaseModel, TextCondition
from ..config import Config, check_range, check_ranges
from ..diffusion.sampler import SampleSettings, initial_noise, seeded_generators
from ..errors import CheckpointError, ConfigError, counted
from ..storage.safetensors_io import read_file, write_atomic
from .distillation import latent_channels
from .fingerprint import fingerprint, weights_digest
from .loop_config import MAX_TRAINING_SEED
from .picture_examples import PictureExamples, held_out_numbers
from .picture_task import PictureTask
from .processes import launched

Drawn = Callable[[int, int, Tensor], None]
"""Called for every new picture as (drawn, count, latent (1, C, h, w))."""
ARROW = "=>"
MAX_PROMPTS = 100_000


@dataclass(frozen=True)
class PromptPair:
    """A prompt as the student reads it, and as the teacher does."""

    student: str
    teacher: str


@dataclass(frozen=True)
class DistillationPictures(Config):
    """Where clean latents come from.

    Args:
        source: `teacher` draws them; `noise` takes unit noise in their place, which costs nothing
            and teaches less, since no picture looks so.
        count: how many; the prompts are taken in turn.
        steps, guidance: of the teacher's sampling.
        seed: of its noise.
    """

    source: Literal["teacher", "noise"] = "teacher"
    count: int = 64
    steps: int = 20
    guidance: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        self.check_choices("Distillation")
        check_range("Distillation", "count", self.count, 1, 100_000)
        check_range("Distillation", "seed", self.seed, 0, MAX_TRAINING_SEED)
        check_ranges("Distillation", self, 1, 1000, "steps")
        SampleSettings(self.steps, self.guidance)


def read_prompts(text: str) -> list[PromptPair]:
    """Prompts, one a line; `red hat => 红帽` says it for a teacher that reads something else.

    Empty lines, and those that begin with #, are left out; a prompt of the student counts once.

    Raises:
        ConfigError: there are none, too many, or half a line is missing.
    """
    pairs: dict[str, PromptPair] = {}
    for number, line in enumerate(text.lstrip("\ufeff").splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        own, arrow, other = (part.strip() for part in line.partition(ARROW))
        if arrow and not (own and other):
            raise ConfigError(
                f"Line {number} of the prompts has nothing on one side of {ARROW}: write the "
                "student's prompt before it and the teacher's behind it."
            )
        pairs.setdefault(own, PromptPair(own, other or own))
    if not pairs:
        raise ConfigError(
            "There are no prompts: write some, one a line, of what the style is to be used for."
        )
    if len(pairs) > MAX_PROMPTS:
        raise ConfigError(
            f"There are {counted(len(pairs), 'prompt')}; at most {MAX_PROMPTS} can be used."
        )
    return list(pairs.values())


def held_out_prompts(
    prompts: Sequence[PromptPair], percent: int
) -> tuple[list[PromptPair], list[PromptPair]]:
    """Prompts to train on, and those that only choose the best state, see `held_out_numbers`."""
    apart = held_out_numbers(len(prompts), percent)
    trained = [pair for k, pair in enumerate(prompts) if k not in apart]
    return trained, [prompts[k] for k in apart]


def distillation_examples(
    teacher: PictureTask,
    prompts: Sequence[PromptPair],
    size: tuple[int, int],
    config: DistillationPictures,
    folder: Path | None = None,
    progress: Drawn | None = None,
) -> PictureExamples:
    """Latents with the student's prompts; what was drawn before is read again.

    Args:
        teacher: draws them; nothing is attached to it.
        prompts: see `DistillationPictures.count`.
        size: height and width of a latent.
        config: how.
        folder: where drawn latents are kept, picture by picture; None keeps nothing.
        progress: see `Drawn`; it may raise InterruptedTraining.

    Raises:
        CheckpointError: the folder cannot be written, or holds a damaged file.
    """
    shape = (latent_channels(teacher.base), *size)
    pairs = [prompts[k % len(prompts)] for k in range(config.count)]
    if config.source == "noise":
        seeds = range(config.seed, config.seed + config.count)
        latents = initial_noise(seeded_generators(seeds), shape)
    else:
        if folder is not None:
            folder = folder / _digest(teacher, prompts, size, config)
        latents = _drawn(teacher, pairs, shape, config, folder, progress)
    return PictureExamples(latents, [[pair.student] for pair in pairs])


def _drawn(
    teacher: PictureTask,
    pairs: Sequence[PromptPair],
    shape: tuple[int, int, int],
    config: DistillationPictures,
    folder: Path | None,
    progress: Drawn | None,
) -> Tensor:
    """Latents (N, C, h, w) of all prompts, each from its file where it is there.

    Several processes share the drawing, and all get the same.
    """

    def one(number: int) -> Tensor:
        path = folder / f"{number:06}.safetensors" if folder is not None else None
        latent = _kept(path, shape)
        if latent is None:
            prompt = pairs[number].teacher
            latent = _draw(teacher, prompt, shape, config, config.seed + number).cpu()
            if path is not None:
                write_atomic({"latents": latent}, {"format": "difflora-drawn-latents-1"}, path)
            if progress is not None:
                progress(number + 1, len(pairs), latent)
        return latent

    processes = launched()
    own = range(processes.rank, len(pairs), processes.count)
    shares = processes.gathered(processes.together(lambda: {k: one(k) for k in own}))
    found = {
        k: latent for share in shares if isinstance(share, dict) for k, latent in share.items()
    }
    return torch.cat([found[k] for k in range(len(pairs))])


def _kept(path: Path | None, shape: tuple[int, int, int]) -> Tensor | None:
    """The latent (1, C, h, w) that an earlier run has drawn, None where there is none."""
    if path is None or not path.exists():
        return None
    latent = read_file(path, "file of a drawn latent")[0].get("latents")
    if latent is None or latent.shape != (1, *shape):
        raise CheckpointError(f"{path} is damaged; delete it to draw the picture anew.")
    return latent


def _draw(
    teacher: PictureTask,
    prompt: str,
    shape: tuple[int, int, int],
    config: DistillationPictures,
    seed: int,
) -> Tensor:
    """One clean latent (1, C, h, w), float32."""
    base = teacher.base
    encoded = teacher.encode([prompt])
    text = TextCondition(encoded.context, encoded.pooled)
    noise = initial_noise(seeded_generators([seed]), shape)
    settings = SampleSettings(config.steps, config.guidance)
    return draw_latents(base, noise, text, teacher.nothing, settings, _scheduler(base))


def _scheduler(base: BaseModel) -> object:
    """DDIM over the base's own noise schedule."""
    from diffusers import DDIMScheduler  # noqa: PLC0415  slow, and ComfyUI imports us at its start

    abar = base.alphas_cumprod.detach().double().cpu()
    before = torch.cat([torch.ones(1, dtype=abar.dtype), abar[:-1]])
    return DDIMScheduler(
        num_train_timesteps=len(abar),
        trained_betas=(1 - abar / before).numpy(),
        prediction_type=base.prediction_type,
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
    )


def _digest(
    teacher: PictureTask,
    prompts: Sequence[PromptPair],
    size: tuple[int, int],
    config: DistillationPictures,
) -> str:
    """Name of the folder of what this teacher draws; how many pictures does not matter."""
    spoken = [pair.teacher for pair in prompts]
    how = (config.steps, config.guidance, config.seed)
    return fingerprint(weights_digest(teacher.base.unet), teacher.facts, spoken, size, how)[:24]
