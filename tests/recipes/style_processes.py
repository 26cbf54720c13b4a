"""What each of several processes runs in test_style_processes: every style, one after another."""

import json
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from difflora_core.base_model.diffusers_base import DiffusersBase
from difflora_core.models.layers import DrawnFrom
from difflora_core.training.adaptation_run import run_adaptation
from difflora_core.training.distillation import (
    DistillationLoss,
    DistillationObjective,
    distillation_task,
    run_distillation,
)
from difflora_core.training.distillation_data import (
    DistillationPictures,
    PromptPair,
    distillation_examples,
)
from difflora_core.training.picture_examples import PictureExamples
from difflora_core.training.picture_task import PictureTask
from difflora_core.training.recipes import distillation_recipes
from difflora_core.training.sharding import LAUNCHED

HERE = Path(__file__).parent
PROMPTS = ["photo of a hat", "the red hat", "a blue cup", "a cat"]
QUICK = DistillationPictures(count=6, steps=2, guidance=2.0)
COURSE = {"steps": 8, "batch": 4, "evaluate_every": 4, "patience": 0}
VAE = {"block_out_channels": [8], "norm_num_groups": 4, "latent_channels": 4}


def setting():
    """The tiny base, with a VAE for previews, and its text encoders; alike in every process."""
    tiny = SimpleNamespace(**run_path(str(HERE / "conftest.py")))
    with DrawnFrom(torch.Generator().manual_seed(2)):
        vae = AutoencoderKL(**VAE).requires_grad_(False).eval()
    base = tiny.tiny_base()
    return PictureTask(
        DiffusersBase(base.unet, vae, None, base.scheduler), tiny.text_encoders(1), "tiny"
    )


def config_of(method, **changes):
    """The settings that distillation/METHOD.py gives a style on this base, shorter."""
    example = run_path(str(HERE / "distillation" / f"{method}.py"))
    return replace(example["CONFIG"], **(COURSE | changes))


def left_by(train, *given):
    """What a run left: step, loss, every number of its style, and what it showed on the way."""
    shown = []
    result = train(*given, lambda step, steps, metrics, preview: shown.append(preview().tolist()))
    (style,) = result.adaptations
    tensors = [t.float().flatten() for own in style.layers.values() for t in own.values()]
    found = {"step": result.step, "loss": result.loss, "finished": result.finished}
    return {**found, "style": torch.cat(tensors).tolist(), "shown": shown}


def by_pictures(method, folder, stop=None, **changes):
    """A style of a few pictures."""
    g = torch.Generator().manual_seed(4)
    examples = PictureExamples(0.5 + 0.1 * torch.randn(4, 4, 4, 4, generator=g), [PROMPTS[:2]] * 4)
    objective = distillation_recipes()[method](setting(), config_of(method, **changes))
    return left_by(partial(run_adaptation, stop=stop), objective, examples, folder)


def by_teacher(method, folder, stop=None, **changes):
    """A style of what a teacher draws: the same base with other weights."""
    student = setting()
    unet = UNet2DConditionModel.from_config(student.base.unet.config)
    unet.load_state_dict(student.base.unet.state_dict())
    generator = torch.Generator().manual_seed(5)
    for parameter in unet.requires_grad_(False).eval().parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += 0.15 * parameter.data.std().nan_to_num(0) * noise
    base = DiffusersBase(unet, None, None, student.base.scheduler)
    teacher = PictureTask(base, student.text, "tiny")
    pairs = [PromptPair(p, p) for p in PROMPTS]
    drawn = []
    examples = distillation_examples(
        teacher, pairs, (4, 4), QUICK, folder / "drawn", lambda done, *_: drawn.append(done)
    )
    task = distillation_task(student, teacher, DistillationLoss())
    style = distillation_recipes()[method](task, config_of(method, **changes))
    objective = DistillationObjective(style)
    left = left_by(partial(run_distillation, stop=stop), objective, examples, folder)
    return left | {"drawn": drawn}


WAYS = {"pictures": by_pictures, "teacher": by_teacher}


def cases():
    """Every style by every way."""
    return [(way, method) for way in WAYS for method in distillation_recipes()]


def main(folder):
    """Run every case; where weights are not shared out, also with a stop that the last is told."""
    last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    found = {}
    for way, method in cases():
        train, own = partial(WAYS[way], method), folder / way / method
        runs = {"straight": train(own / "straight")}
        if os.environ[LAUNCHED] == "false":
            asked = iter([False] * 5 + [last])
            runs["stopped"] = train(own / "stopped", stop=partial(next, asked))
            runs["resumed"] = train(own / "stopped")
        found[f"{way} {method}"] = runs
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
