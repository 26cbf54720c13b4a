"""The training loop: a run stopped anywhere and resumed gives the same weights."""

from dataclasses import replace

import pytest
import torch
from difflora_core.training.early_stopping import EarlyStopping, train_validated
from torch import nn

from difflora_core.errors import CheckpointError, ConfigError, InterruptedTraining
from difflora_core.training.loop import LoopConfig, train


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
        train(stopped, draw, loop, tmp_path / "b", stop_at(step))
    resumed = Line()
    train(resumed, draw, loop, tmp_path / "b")
    assert torch.equal(weights(straight), weights(resumed))
    assert not torch.equal(weights(straight), weights(Line()))
    with pytest.raises(CheckpointError, match="another model"):
        train(nn.Linear(2, 2), draw, LOOP, tmp_path / "b")


def test_precision_may_change_within_a_process(tmp_path):
    for number, precision in enumerate(("bf16", "no", "bf16")):
        line = Line()
        train(line, draw, replace(LOOP, precision=precision), tmp_path / str(number))
        assert torch.isfinite(weights(line)).all()


def noisy_valley():
    """Validation loss with its minimum at the third judgement, counted in calls."""
    values = iter([3.0, 2.0, 1.0, 1.5, 2.5, 2.0, 9.0, 9.0, 9.0])
    seen = []

    def validate():
        seen.append(next(values))
        return seen[-1]

    return validate, seen


def test_best_weights_are_kept_and_patience_ends(tmp_path):
    validate, seen = noisy_valley()
    kept = Line()
    result = train_validated(
        kept, draw, LOOP, tmp_path / "a", validate, EarlyStopping(every=5, patience=3)
    )
    assert seen == [3.0, 2.0, 1.0, 1.5, 2.5, 2.0]
    assert result["best_step"] == 15
    assert result["validation"] == 1.0
    assert result["steps"] == 30
    # the averaged weights after 15 steps of a run of 40
    reference = Line()
    with pytest.raises(InterruptedTraining):
        train(reference, draw, LOOP, tmp_path / "b", stop_at(15))
    from safetensors.torch import load_file

    state = load_file(tmp_path / "b" / "state.safetensors")
    average = torch.cat([state[f"ema.{n}"].flatten() for n, _ in reference.named_parameters()])
    assert torch.equal(weights(kept), average)
    # called again it neither trains nor judges
    again = Line()
    train_validated(again, draw, LOOP, tmp_path / "a", validate, EarlyStopping(5, 3))
    assert torch.equal(weights(again), average)
    assert len(seen) == 6


def true_error(module):
    """Validation without noise."""
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return float((module.net(x) - x.sum(1, keepdim=True)).square().mean())


@pytest.mark.parametrize("step", [3, 10, 12, 40])
def test_validated_run_resumes_exactly(tmp_path, step):
    stopping = EarlyStopping(every=10, patience=0)
    straight, resumed = Line(), Line()
    a = train_validated(
        straight, draw, LOOP, tmp_path / "a", lambda: true_error(straight), stopping
    )
    first = Line()
    with pytest.raises(InterruptedTraining):
        train_validated(
            first, draw, LOOP, tmp_path / "b", lambda: true_error(first), stopping, stop_at(step)
        )
    b = train_validated(resumed, draw, LOOP, tmp_path / "b", lambda: true_error(resumed), stopping)
    assert torch.equal(weights(straight), weights(resumed))
    assert (a["validation"], a["best_step"]) == (b["validation"], b["best_step"])
    assert true_error(resumed) == a["validation"] < true_error(Line())


def test_judgements_must_meet_the_log(tmp_path):
    loop = LoopConfig(steps=10, log_every=4)
    with pytest.raises(ConfigError, match="multiple"):
        train_validated(Line(), draw, loop, tmp_path, lambda: 0.0, EarlyStopping(every=6))
    with pytest.raises(ConfigError):
        EarlyStopping(every=0)
