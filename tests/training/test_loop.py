"""The training loop: a run stopped anywhere and resumed gives the same weights."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from difflora_core.errors import CheckpointError, ConfigError, InterruptedTraining
from difflora_core.training.loop import ByStep, Hooks, LoopConfig, train


class Line(nn.Module):
    """A small network that learns a fixed linear map from noisy targets."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) / 2)

    def forward(self, batch):
        loss = (self.net(batch["x"]) - batch["y"]).square().mean()
        return loss, {"error": loss.detach()}


def draw(generator):
    """Noisy samples of a line."""
    x = torch.randn(16, 3, generator=generator)
    y = x.sum(1, keepdim=True) + torch.randn(16, 1, generator=generator)
    return {"x": x, "y": y}


def weights(module):
    """All parameters as one vector."""
    return torch.cat([p.detach().flatten() for p in module.parameters()])


LOOP = LoopConfig(
    steps=40, learning_rate=1e-2, warmup=5, ema=0.9, checkpoint_every=7, log_every=1, seed=3
)


def stop_at(step):
    """Progress callback that interrupts."""

    def progress(now, steps, metrics):
        if now == step:
            raise InterruptedTraining("enough")

    return progress


@pytest.mark.parametrize("step", [1, 7, 23, 39, 40])
@pytest.mark.parametrize("matrix_rate", [0.0, 0.01])
def test_resumed_run_equals_straight_run(tmp_path, step, matrix_rate):
    loop = replace(LOOP, matrix_rate=matrix_rate)
    straight, stopped = Line(), Line()
    train(straight, draw, loop, tmp_path / "a")
    with pytest.raises(InterruptedTraining, match=f"step {step}"):
        train(stopped, draw, loop, tmp_path / "b", Hooks(stop_at(step)))
    resumed = Line()
    train(resumed, draw, loop, tmp_path / "b")
    assert torch.equal(weights(straight), weights(resumed))
    assert not torch.equal(weights(straight), weights(Line()))
    with pytest.raises(CheckpointError, match="another model"):
        train(nn.Linear(2, 2), draw, loop, tmp_path / "b")


def test_precision_may_change_within_a_process(tmp_path):
    for number, precision in enumerate(("bf16", "no", "bf16")):
        line = Line()
        train(line, draw, replace(LOOP, precision=precision), tmp_path / str(number))
        assert torch.isfinite(weights(line)).all()


def noisy_valley():
    """Validation loss with its minimum at the third validation, counted in calls."""
    values = iter([3.0, 2.0, 1.0, 1.5, 2.5, 2.0, 9.0, 9.0, 9.0])
    seen = []

    def validate():
        seen.append(next(values))
        return seen[-1]

    return validate, seen


def test_best_weights_are_kept_and_patience_ends(tmp_path):
    validate, seen = noisy_valley()
    kept, loop = Line(), replace(LOOP, validate_every=5, patience=3)
    result = train(kept, draw, loop, tmp_path / "a", Hooks(validate=validate))
    assert seen == [3.0, 2.0, 1.0, 1.5, 2.5, 2.0]
    assert result["best_step"] == 15
    assert result["validation"] == 1.0
    assert result["steps"] == 30
    # the averaged weights after 15 steps of a run of 40
    reference = Line()
    with pytest.raises(InterruptedTraining):
        train(reference, draw, LOOP, tmp_path / "b", Hooks(stop_at(15)))
    state = load_file(tmp_path / "b" / "state.safetensors")
    average = torch.cat([state[f"ema.{n}"].flatten() for n, _ in reference.named_parameters()])
    assert torch.equal(weights(kept), average)
    # called again it neither trains nor validates
    again = Line()
    train(again, draw, loop, tmp_path / "a", Hooks(validate=validate))
    assert torch.equal(weights(again), average)
    assert len(seen) == 6


def true_error(module):
    """Validation without noise."""
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return float((module.net(x) - x.sum(1, keepdim=True)).square().mean())


def validated(module, **hooks):
    """Hooks that validate a module."""
    return Hooks(validate=lambda: true_error(module), **hooks)


def events(folder):
    """The event log."""
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("step", [3, 10, 12, 40])
def test_validated_run_resumes_exactly(tmp_path, step):
    loop = replace(LOOP, validate_every=10, patience=0, log_every=4, validate_first=True)
    straight, first, resumed = Line(), Line(), Line()
    a = train(straight, draw, loop, tmp_path / "a", validated(straight))
    asked = iter([False] * step + [True])
    hooks = validated(first, stop=lambda: next(asked))
    if step < 40:
        with pytest.raises(InterruptedTraining):
            train(first, draw, loop, tmp_path / "b", hooks)
    else:
        train(first, draw, loop, tmp_path / "b", hooks)
    b = train(resumed, draw, loop, tmp_path / "b", validated(resumed))
    assert torch.equal(weights(straight), weights(resumed))
    assert (a["validation"], a["best_step"]) == (b["validation"], b["best_step"])
    assert true_error(resumed) == a["validation"] < true_error(Line())
    assert events(tmp_path / "a") == events(tmp_path / "b")


def test_a_validation_that_a_stop_came_before_is_made_up_for(tmp_path):
    loop = replace(LOOP, validate_every=10, patience=0)
    straight, first, resumed = Line(), Line(), Line()
    train(straight, draw, loop, tmp_path / "a", validated(straight))
    calls = []

    def validate():
        calls.append(None)
        if len(calls) == 2:
            raise InterruptedTraining("enough")
        return true_error(first)

    with pytest.raises(InterruptedTraining, match="step 20"):
        train(first, draw, loop, tmp_path / "b", Hooks(validate=validate))
    steps = []
    hooks = Hooks(validate=lambda: steps.append(None) or true_error(resumed))
    train(resumed, draw, loop, tmp_path / "b", hooks)
    assert len(steps) == 3  # at 20, 30 and 40
    assert torch.equal(weights(straight), weights(resumed))


def test_a_stopped_run_leaves_its_best_state(tmp_path):
    """Between two validations the present state may be better, but the run goes on as before."""
    loop = replace(LOOP, validate_every=10, patience=0, ema=0.0, learning_rate=1e-3)
    line, loss = Line(), []
    asked = iter([False] * 15 + [True])
    hooks = validated(line, stop=lambda: next(asked))
    with pytest.raises(InterruptedTraining) as stop:
        train(line, draw, loop, tmp_path, hooks)
    loss.append(true_error(line))
    assert stop.value.result["best_step"] == 15
    assert stop.value.result["validation"] == loss[0]
    with pytest.raises(InterruptedTraining):  # at once: what is kept is that of step 15 again
        train(line, draw, loop, tmp_path, validated(line, stop=lambda: True))
    assert true_error(line) == loss[0]


class Normed(nn.Module):
    """A network whose forward changes a buffer."""

    def __init__(self):
        super().__init__()
        self.norm, self.line = nn.BatchNorm1d(3), Line()

    def forward(self, batch):
        if batch.get("stop"):
            self.norm(batch["x"])
            raise InterruptedTraining("inside the step")
        return self.line({**batch, "x": self.norm(batch["x"])})


@pytest.mark.parametrize("inside", [False, True])
def test_buffers_and_a_generator_of_the_recipe_are_part_of_the_state(tmp_path, inside):
    def run(folder, stop=None):
        generator, module = torch.Generator().manual_seed(5), Normed()

        def make(step):
            return {**draw(generator), "stop": inside and step == stop}

        asked = Hooks(stop_at(stop)) if stop and not inside else Hooks()
        try:
            train(module, ByStep(make, generator), LOOP, tmp_path / folder, asked)
        except InterruptedTraining:
            return run(folder)  # a new generator and a new module
        return module.state_dict()

    straight, resumed = run("a"), run("b", 13)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert straight["norm.num_batches_tracked"] == LOOP.steps


def test_parts_of_a_batch_give_the_gradient_of_the_whole(tmp_path):
    whole, parts = Line(), Line()
    train(whole, draw, LOOP, tmp_path / "a")
    train(parts, draw, replace(LOOP, accumulate=4), tmp_path / "b")
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-4, atol=1e-5)
    assert not torch.equal(weights(parts), weights(whole))
    # a run may go on with other parts, but not with other settings
    train(Line(), draw, replace(LOOP, accumulate=2), tmp_path / "b")
    with pytest.raises(CheckpointError, match=r"another training \(weight_decay 0.01 there"):
        train(Line(), draw, replace(LOOP, weight_decay=0.5), tmp_path / "b")
    with pytest.raises(CheckpointError, match=r"another training \(other words, pictures or"):
        train(Line(), draw, LOOP, tmp_path / "b", Hooks(fingerprint="other pictures"))


def test_batches_that_cannot_be_split_are_refused_before_training(tmp_path):
    with pytest.raises(ConfigError, match=r"16 samples.*evenly by 3 parts.*multiple of 3"):
        train(Line(), draw, replace(LOOP, accumulate=3), tmp_path / "a")
    with pytest.raises(ConfigError, match="accumulate 1"):
        train(Line(), draw, replace(LOOP, accumulate=2), tmp_path / "b", Hooks(splits=False))
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_no_number_names_step_and_batch(tmp_path):
    class Broken(Line):
        def forward(self, batch):
            loss, metrics = super().forward(batch)
            return loss * (math.nan if batch["bad"] else 1.0), metrics

    def make(step):
        batch = draw(torch.Generator().manual_seed(step))
        return {**batch, "bad": step == 6, "prompts": [f"person {step}"] * 16}

    with pytest.raises(ConfigError, match=r"no longer a number \(nan\) at step 7 .*'person 6'"):
        train(Broken(), ByStep(make), LOOP, tmp_path)


class Half(nn.Module):
    """A frozen float16 base under float32 factors; its gradients are far below float16's range."""

    def __init__(self, dtype=torch.float16):
        super().__init__()
        self.unet = nn.Linear(8, 8, bias=False).requires_grad_(False)
        self.factor = nn.Parameter(torch.zeros(8))
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            self.unet.weight.copy_(torch.randn(8, 8, generator=g))
        self.unet.to(dtype)
        self.dtype = dtype

    def forward(self, batch):
        seen = self.unet((batch["x"] + self.factor).to(self.dtype))
        # the loss of a large picture: its mean leaves little for each number
        return (seen.float() - batch["y"]).square().mean() * 1e-6, {}


def half_batch(generator):
    """Targets that a shift of the input explains; many, so that each gradient is small."""
    x = torch.randn(4096, 8, generator=generator)
    return {"x": x, "y": torch.ones(4096, 8)}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_float16_base_trains_with_a_scaled_loss(tmp_path, device):
    """Unscaled, gradients below 3e-8 vanish in float16; scaled, the factors follow float32's."""
    loop = LoopConfig(steps=40, learning_rate=0.02, warmup=1, weight_decay=0.0, clip=0.0)
    runs = {}
    for name, dtype, base in (("fine", torch.float32, None), ("half", torch.float16, "own"),
                              ("unscaled", torch.float16, None)):  # fmt: skip
        module = Half(dtype)
        hooks = Hooks(base=module if base else None)
        train(module, half_batch, loop, tmp_path / name, hooks, torch.device(device))
        assert module.factor.dtype == torch.float32
        runs[name] = module.factor.detach()
    scale = runs["fine"].abs().mean()
    assert scale > 0.1
    assert (runs["half"] - runs["fine"]).abs().mean() < 0.05 * scale
    assert not runs["unscaled"].any()


def test_half_trained_weights_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="float32"):
        train(Line().half(), draw, LOOP, tmp_path)


def test_autocast_in_float16_stays_close(tmp_path):
    fine, coarse = Line(), Line()
    train(fine, draw, LOOP, tmp_path / "a")
    train(coarse, draw, replace(LOOP, precision="fp16"), tmp_path / "b")
    moved = (weights(fine) - weights(Line())).abs().mean()
    assert 0 < (weights(fine) - weights(coarse)).abs().mean() < 0.1 * moved


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("plateau", [0.5, 1, 1, 1, 1, 3 / 4, 2 / 4, 1 / 4]),
        ("cosine", [0.5 * math.sin(math.pi * (8 - k) / 16) ** 2 if k == 0 else
                    math.sin(math.pi * (8 - k) / 16) ** 2 for k in range(8)]),
        ("one_cycle", [0.5, 1, *(math.cos(math.pi * k / 12) ** 2 for k in range(6))]),
    ],
)  # fmt: skip
def test_course_of_the_learning_rate(schedule, expected):
    loop = LoopConfig(steps=8, warmup=2, decay=0.5, schedule=schedule)
    assert [loop.rate(3.0, step) / 3 for step in range(8)] == pytest.approx(expected)


def test_want_of_memory_keeps_the_state(tmp_path):
    """What was trained before the step that did not fit is on disk, and goes on to the same end."""

    class Greedy(nn.Module):
        def __init__(self, fails):
            super().__init__()
            self.w, self.fails, self.calls = nn.Parameter(torch.ones(3)), fails, 0

        def forward(self, batch):
            self.calls += 1
            if self.calls == self.fails:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return (self.w * batch["x"]).square().mean(), {}

    def draw(generator):
        return {"x": torch.randn(4, 3, generator=generator)}

    config = LoopConfig(steps=10, warmup=1)
    whole = Greedy(0)
    train(whole, draw, config, None)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        train(Greedy(6), draw, config, tmp_path)
    resumed = Greedy(0)
    train(resumed, draw, config, tmp_path)
    assert resumed.calls == 5
    assert torch.equal(resumed.w, whole.w)
