"""Distillation on tiny bases: the losses, the run, and what does not fit."""

from dataclasses import replace
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import nn

from difflora_core.base_model.block_outputs import recorded_blocks, unet_blocks
from difflora_core.base_model.diffusers_base import DiffusersBase, time_ids
from difflora_core.errors import ConfigError
from difflora_core.methods.registry import METHODS
from difflora_core.models.layers import DrawnFrom
from difflora_core.training.adaptation_run import run_fingerprint
from difflora_core.training.distillation import (
    OTHER_LAYERS,
    OTHER_TEXT,
    DistillationLoss,
    DistillationObjective,
    distillation_task,
    feature_loss,
    run_distillation,
)
from difflora_core.training.distillation_data import (
    DistillationPictures,
    PromptPair,
    distillation_examples,
    read_prompts,
)
from difflora_core.training.picture_task import PictureTask
from difflora_core.training.processes import split
from difflora_core.training.recipes import default_distillation, distillation_recipes

PAIRS = [PromptPair(p, p) for p in ("photo of a hat", "the red hat", "a blue cup", "a cat")]
QUICK = DistillationPictures(count=8, steps=3, guidance=2.0)


EXAMPLES = {
    name: SimpleNamespace(**run_path(str(Path(__file__).parent / "distillation" / f"{name}.py")))
    for name in distillation_recipes()
}
"""Of each method that can be distilled: the file of its name in distillation/."""


def changed(base, seed=5, amount=0.15):
    """Another base: the same network with other weights."""
    unet = UNet2DConditionModel.from_config(base.unet.config)
    unet.load_state_dict(base.unet.state_dict())
    generator = torch.Generator().manual_seed(seed)
    for parameter in unet.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += amount * parameter.data.std().nan_to_num(0) * noise
    unet.requires_grad_(False).eval()
    return DiffusersBase(unet, None, None, base.scheduler)


@pytest.fixture
def student(base, text):
    """A student and its text encoders."""
    return PictureTask(base, text, "tiny")


@pytest.fixture
def teacher(base, text):
    """A teacher that reads prompts as the student does."""
    return PictureTask(changed(base), text, "tiny")


@pytest.fixture
def task(student, teacher):
    """Both, with the default losses."""
    return distillation_task(student, teacher, DistillationLoss())


def style_objective(task, **changes):
    """What is trained: a style by the method that Distil Checkpoint takes unless told otherwise."""
    example = EXAMPLES[default_distillation()]
    recipe = distillation_recipes()[default_distillation()]
    return DistillationObjective(recipe(task, replace(example.CONFIG, **changes)))


def test_without_the_method_that_is_the_default_another_is():
    first = default_distillation()
    with patch.dict(METHODS):  # it comes back in its order
        for name in list(METHODS):
            if name == first or name not in distillation_recipes():
                del METHODS[name]
        assert distillation_recipes()
        assert default_distillation() == next(iter(distillation_recipes())) != first
        METHODS.clear()
        with pytest.raises(ConfigError, match="can be distilled"):
            default_distillation()


def examples(teacher, pairs=PAIRS, **changes):
    """What the teacher draws."""
    return distillation_examples(teacher, pairs, (4, 4), replace(QUICK, **changes))


def double(base):
    """A base in float64 without any of our code around it: (predict, blocks)."""
    unet = UNet2DConditionModel.from_config(base.unet.config).double()
    unet.load_state_dict({k: v.double() for k, v in base.unet.state_dict().items()})
    outputs = []
    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    for block in blocks:
        block.register_forward_hook(
            lambda _, __, made: outputs.append(made[0] if isinstance(made, tuple) else made)
        )

    @torch.no_grad()
    def run(noisy, timesteps, context, pooled):
        outputs.clear()
        added = {"text_embeds": pooled, "time_ids": time_ids(noisy)}
        made = unet(noisy, timesteps, context, added_cond_kwargs=added).sample
        return made, list(outputs)

    return run


def test_losses_are_those_written_out_in_float64(student, teacher):
    task = distillation_task(student, teacher, DistillationLoss(0.7, 0.3))
    objective = style_objective(task)
    batch = examples(teacher).draw(3, 1000)(torch.Generator().manual_seed(1))
    loss, metrics = objective(batch)  # untrained: the student is its base
    encoded = task.text.encode(batch["prompts"], {})
    abar = student.base.scheduler.alphas_cumprod.double()[batch["timesteps"]][:, None, None, None]
    noisy = abar.sqrt() * batch["latents"].double() + (1 - abar).sqrt() * batch["noise"].double()
    told = (noisy, batch["timesteps"], encoded.context.double(), encoded.pooled.double())
    wanted, theirs = double(teacher.base)(*told)
    made, own = double(student.base)(*told)
    output = ((wanted - made) ** 2).sum() / made.numel()
    features = sum(
        sum(float(((t - s) ** 2).sum() / (t**2).sum()) for t, s in zip(f, g, strict=True)) / 3
        for f, g in zip(theirs, own, strict=True)
    )
    assert len(theirs) == 3
    assert float(metrics["output"]) == pytest.approx(float(output), rel=1e-4)  # ours is float32
    assert float(metrics["features"]) == pytest.approx(features, rel=1e-4)
    assert float(loss.detach()) == pytest.approx(0.7 * float(output) + 0.3 * features, rel=1e-4)
    assert features > 0.01
    assert float(output) > 1e-3


def test_gradients_of_both_losses_reach_the_style_and_nothing_else(student, teacher):
    seen = {}
    for name, loss in (("output", DistillationLoss(1, 0)), ("features", DistillationLoss(0, 1))):
        objective = style_objective(distillation_task(student, teacher, loss))
        batch = examples(teacher).draw(2, 1000)(torch.Generator().manual_seed(1))
        objective(batch)[0].backward()
        seen[name] = [p.grad for p in objective.parameters() if p.requires_grad]
        ups = [part["up"].grad for part in objective.style.parts]
        assert all(up is not None for up in ups)
        assert sum(bool(up.any()) for up in ups) > len(ups) // 2
    assert any(not torch.equal(a, b) for a, b in zip(*seen.values(), strict=True) if a is not None)
    for base in (student.base, teacher.base):
        assert all(p.grad is None for p in base.unet.parameters())


def test_a_batch_in_parts_has_the_loss_of_the_whole(task, teacher):
    """Each sample counts by itself, so processes can share a batch."""
    objective = style_objective(task)
    batch = examples(teacher).draw(4, 1000)(torch.Generator().manual_seed(2))
    whole = float(objective(batch)[0])
    parts = [float(objective(part)[0]) for part in split(batch, 2)]
    assert sum(parts) / 2 == pytest.approx(whole, rel=1e-5)


def test_a_larger_feature_of_one_block_counts_no_more_than_a_small_one():
    generator = torch.Generator().manual_seed(0)
    wanted = {"a": torch.randn(2, 3, 4, 4, generator=generator)}
    made = {"a": wanted["a"] * 1.1}
    assert float(feature_loss(wanted, made)) == pytest.approx(0.01, rel=1e-4)
    large = {"a": wanted["a"], "b": 1000 * wanted["a"]}
    assert float(feature_loss(large, {k: 1.1 * t for k, t in large.items()})) == pytest.approx(
        0.02, rel=1e-4
    )
    assert float(feature_loss(wanted, wanted)) == 0


@pytest.mark.parametrize("method", distillation_recipes())
def test_every_style_learns_from_the_teacher(task, teacher, tmp_path, method):
    example = EXAMPLES[method]
    objective = DistillationObjective(distillation_recipes()[method](task, example.CONFIG))
    trained, apart = (
        examples(teacher, PAIRS[:3]),
        examples(teacher, PAIRS[3:], count=2, seed=50),
    )
    looks = []
    result = run_distillation(
        objective, trained, tmp_path, lambda *seen: looks.append(seen), held_out=apart
    )
    (style,) = result.adaptations
    METHODS[method].check(style)
    assert (style.method, style.base, style.word) == (method, "tiny", None)
    assert style.facts["distilled_by"] == "outputs and features"
    assert result.finished
    assert {"output", "features", "evaluation"} <= looks[0][2].keys()
    with torch.no_grad():
        generator, draw = torch.Generator().manual_seed(71), apart.draw(2, 1000)
        batches = [draw(generator) for _ in range(6)]
        after = sum(float(objective(batch)[0]) for batch in batches) / 6
        fresh = type(objective)(type(objective.style)(task, objective.config))
        before = sum(float(fresh(batch)[0]) for batch in batches) / 6
    assert result.loss == pytest.approx(after, rel=1e-5)  # on prompts that it was not trained on
    assert after < example.LEFT * before


def test_a_stopped_run_goes_on_to_the_same_numbers(task, teacher, tmp_path):
    def run(folder, stop=None):
        objective = style_objective(task, steps=12, evaluate_every=4)
        return run_distillation(objective, examples(teacher), folder, stop=stop)

    whole = run(tmp_path / "whole")
    asked = iter([False] * 7 + [True])
    first, again = run(tmp_path / "parts", lambda: next(asked)), run(tmp_path / "parts")
    assert (first.finished, again.finished) == (False, True)
    for name, tensors in whole.adaptations[0].layers.items():
        for key, tensor in tensors.items():
            assert torch.equal(again.adaptations[0].layers[name][key], tensor)


def test_prompts_that_were_held_out_end_a_run_that_does_not_help_them(task, teacher, tmp_path):
    objective = style_objective(task, steps=400, learning_rate=1.0, evaluate_every=2, patience=2)
    steps = []
    result = run_distillation(
        objective,
        examples(teacher, PAIRS[:1]),
        tmp_path,
        lambda step, *_: steps.append(step),
        held_out=examples(teacher, PAIRS[3:]),
    )
    assert max(steps) < 100
    assert max(steps) <= result.step + 2 * 2


def test_an_equal_teacher_has_nothing_to_teach(student, base, text, tmp_path):
    twin = PictureTask(changed(base, amount=0.0), text, "tiny")
    objective = style_objective(distillation_task(student, twin, DistillationLoss()))
    with pytest.raises(ConfigError, match="nothing to learn: teacher and student draw the same"):
        run_distillation(objective, examples(twin), tmp_path)
    assert not list(tmp_path.iterdir())


def test_other_text_encoders_leave_the_outputs(student, teacher, make_text, tmp_path):
    """Scenario 2: each reads its own words for the same picture."""
    foreign = PictureTask(student.base, make_text(7), "tiny")
    pairs = read_prompts("photo of a hat => the red hat\na cat => a blue cup")
    spoken = {pair.student: pair.teacher for pair in pairs}
    task = distillation_task(foreign, teacher, DistillationLoss(), spoken)
    assert task.remarks == (OTHER_TEXT,)
    assert task.loss == DistillationLoss(1.0, 0.0)
    objective = style_objective(task)
    data = examples(teacher, pairs)
    assert {p for own in data.prompts for p in own} == {"photo of a hat", "a cat"}
    told = task.taught(["a cat", "unknown"])
    wanted = teacher.text.encode(["a blue cup", "unknown"], {})
    assert torch.equal(told.context, wanted.context)
    loss, metrics = objective(data.draw(2, 1000)(torch.Generator().manual_seed(1)))
    assert set(metrics) == {"output"}
    assert float(loss) == float(metrics["output"])
    made = run_distillation(style_objective(task, steps=2), data, tmp_path).adaptations[0]
    assert made.facts["distilled_by"] == "outputs"
    with pytest.raises(ConfigError, match="no loss left: the text encoders differ"):
        distillation_task(foreign, teacher, DistillationLoss(0.0, 1.0))


def test_what_does_not_fit_is_refused(student, teacher, base, text):
    def refused(match, changed_base=None, name="tiny"):
        other = PictureTask(changed_base or teacher.base, text, name)
        with pytest.raises(ConfigError, match=match):
            distillation_task(student, other, DistillationLoss())

    def rescheduled(**settings):
        settings = {"prediction_type": "v_prediction", "beta_schedule": "scaled_linear"} | settings
        return DiffusersBase(teacher.base.unet, None, None, DDIMScheduler(**settings))

    refused("family differ: sd15 and tiny", name="sd15")
    refused("prediction differ: epsilon and v_prediction", rescheduled(prediction_type="epsilon"))
    refused("noise schedules differ", rescheduled(beta_schedule="linear"))
    refused("steps of noise differ: 500 and 1000", rescheduled(num_train_timesteps=500))
    config = {**base.unet.config, "in_channels": 8, "out_channels": 8}
    eight = DiffusersBase(UNet2DConditionModel.from_config(config), None, None, base.scheduler)
    refused("latent channels differ: 8 and 4", eight)
    with pytest.raises(ConfigError, match="cannot both weigh 0"):
        DistillationLoss(0, 0)
    with pytest.raises(ConfigError, match="needs a task with a teacher"):
        style_objective(student)


def test_a_teacher_with_other_layers_is_compared_by_outputs(student, base, text):
    config = {**base.unet.config, "layers_per_block": 2}
    with DrawnFrom(torch.Generator().manual_seed(3)):
        unet = UNet2DConditionModel.from_config(config).requires_grad_(False)
    deeper = PictureTask(DiffusersBase(unet, None, None, base.scheduler), text, "tiny")
    task = distillation_task(student, deeper, DistillationLoss())
    assert (task.remarks, task.loss.features) == ((OTHER_LAYERS,), 0.0)


def test_another_teacher_or_loss_is_another_run(student, teacher, base, text):
    other = PictureTask(changed(base, seed=6), text, "tiny")
    data = examples(teacher)
    prints = {
        run_fingerprint(style_objective(distillation_task(student, one, loss, said)), data)
        for one, loss, said in (
            (teacher, DistillationLoss(), None),
            (other, DistillationLoss(), None),
            (teacher, DistillationLoss(features=0.2), None),
            (teacher, DistillationLoss(), {"a cat": "the cat"}),
        )
    }
    assert len(prints) == 4


def test_blocks_of_ldm_are_heard_though_they_are_never_called():
    """ComfyUI walks through LDM's sequences itself."""

    class Ldm(nn.Module):
        def __init__(self):
            super().__init__()
            self.input_blocks = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))])
            self.middle_block = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
            self.output_blocks = nn.ModuleList([nn.Sequential(nn.Linear(3, 2))])

        def forward(self, x):
            for block in (*self.input_blocks, self.middle_block, *self.output_blocks):
                for layer in block:
                    x = layer(x)
            return x

    unet = Ldm()
    assert list(unet_blocks(unet)) == ["input_blocks.0", "middle_block", "output_blocks.0"]
    with recorded_blocks(unet) as outputs:
        made = unet(torch.ones(1, 2))
    assert [t.shape[-1] for t in outputs.values()] == [3, 3, 2]
    assert torch.equal(outputs["output_blocks.0"], made)
    kept = dict(outputs)
    unet(torch.zeros(1, 2))
    assert outputs["middle_block"] is kept["middle_block"]  # nothing is heard afterwards
    with pytest.raises(ConfigError, match="blocks of Linear"):
        unet_blocks(nn.Linear(1, 1))
