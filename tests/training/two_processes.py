"""What each of several processes runs in test_processes: one case after another in one launch."""

import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from difflora_core.errors import InterruptedTraining
from difflora_core.training.loop import ByStep, Hooks, LoopConfig, train
from difflora_core.training.sharding import local

LOOP = LoopConfig(
    steps=30, learning_rate=1e-2, warmup=5, ema=0.9, checkpoint_every=7, log_every=5, seed=3,
    validate_every=10, patience=0,
)  # fmt: skip


class Line(nn.Module):
    """Learns a linear map; its loss is normalised by weights, and a buffer follows its inputs."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        self.unused = nn.Linear(2, 2)
        self.register_buffer("follows", torch.zeros(3))
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) / 2)

    def forward(self, batch):
        if self.training:
            self.follows.lerp_(batch["x"].mean(0), 0.1)
        error = (self.net(batch["x"]) - batch["y"]).square()[:, 0]
        loss = (batch["weights"] * error).mean() / batch["mean_weight"]
        loss = loss + batch.get("compared", 0.0) * self.net(batch["x"]).mean().square()
        return loss * batch.get("bad", 1.0), {"error": error.detach().mean()}


def draw(generator):
    """Noisy samples of a line, some of which weigh more."""
    x = torch.randn(16, 3, generator=generator)
    y = x.sum(1, keepdim=True) + torch.randn(16, 1, generator=generator)
    weights = torch.rand(16, generator=generator)
    return {"x": x, "y": y, "weights": weights, "mean_weight": weights.mean()}


def compared(generator):
    """The same; the loss then depends on the mean over the whole batch."""
    return {**draw(generator), "compared": torch.tensor(1.0)}


def weights(module):
    """All parameters and buffers as one vector."""
    return torch.cat([t.detach().flatten() for t in module.state_dict().values()]).tolist()


def true_error(module):
    """Validation without noise."""
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return float((module.net(x) - x.sum(1, keepdim=True)).square().mean())


def run(folder, loop=LOOP, draws=draw, **hooks):
    """Train a new module; its weights, or what was raised."""
    module = Line()
    given = {"validate": lambda: true_error(module), **hooks}
    try:
        result = train(module, draws, loop, folder, Hooks(**given))
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {"weights": weights(module), "result": result}


def held():
    """How many numbers of the module this process holds in a step, and of how many."""
    module, seen = Line(), []

    def counting(step):
        seen.append(sum(local(p).numel() for p in module.parameters()))
        return draw(torch.Generator().manual_seed(step))

    train(module, ByStep(counting), replace(LOOP, steps=2), None)
    kinds = {type(p).__name__ for p in module.parameters()}
    return {"held": seen[1], "all": sum(p.numel() for p in module.parameters()), "kinds": [*kinds]}


def shown():
    """What the main process sees of the weights when it is told of the last step, and the end."""
    module, seen = Line(), []

    def progress(step, steps, metrics):
        seen.append(torch.cat([p.detach().flatten() for p in module.parameters()]).tolist())

    train(module, draw, replace(LOOP, steps=5, ema=0.0), None, Hooks(progress=progress))
    return {"seen": seen, "end": torch.cat([p.flatten() for p in module.parameters()]).tolist()}


def cases(folder, rank, count):
    """Every case by name; where one alone fails or stops, it is the last, or main for the disk."""
    last = rank == count - 1
    yield from ends(folder, last)
    yield from failures(folder, last)
    yield from validations(folder, rank, last)


def ends(folder, last):
    """Runs that end, in parts too, stop and go on."""
    asked = iter([False] * 12 + [last] + [False] * 100)
    yield "finish", lambda: run(folder / "finish")
    yield "parts", lambda: run(folder / "parts", replace(LOOP, accumulate=2))
    yield "compared", lambda: run(folder / "compared", draws=compared, splits=False)
    yield "taken over", lambda: run(folder / "one process stopped")
    yield "stop", lambda: run(folder / "stop", stop=lambda: next(asked))
    yield "resume", lambda: run(folder / "stop")
    yield "stop for one", lambda: run(folder / "stop for one", progress=stop_at(15))
    yield "held", held
    yield "shown", shown
    yield "uneven", lambda: run(folder / "uneven", replace(LOOP, accumulate=3))


def failures(folder, last):
    """What goes wrong in a step."""

    def broken(step):
        batch = draw(torch.Generator().manual_seed(step))
        bad = math.nan if step == 6 and last else 1.0
        return {**batch, "bad": torch.tensor(bad), "prompts": [f"person {k}" for k in range(16)]}

    def failing(step):
        if step == 4 and last:
            raise ValueError("a broken picture")
        return draw(torch.Generator().manual_seed(step))

    def key(step):
        if step == 4 and last:
            raise KeyboardInterrupt
        return draw(torch.Generator().manual_seed(step))

    def full_disk(step, steps, metrics):
        raise OSError("no space left")

    yield "not a number", lambda: run(folder / "nan", draws=ByStep(broken))
    yield "failure", lambda: run(folder / "failure", draws=ByStep(failing))
    yield "keyboard", lambda: run(folder / "keyboard", draws=ByStep(key))
    yield "disk", lambda: run(folder / "disk", progress=full_disk)


def validations(folder, rank, last):
    """What goes wrong in validation, and when it ends the run."""

    def judged(error):
        """Validation that fails on one process, the second time it is asked."""
        calls = iter([None, error if last else None])

        def validate():
            if (raised := next(calls, None)) is not None:
                raise raised
            return 1.0 + rank  # the main process's counts

        return validate

    yield (
        "validation fails",
        lambda: run(folder / "validation fails", validate=judged(ValueError("a broken judge"))),
    )
    yield (
        "validation stops",
        lambda: run(folder / "validation stops", validate=judged(InterruptedTraining("enough"))),
    )
    yield (
        "patience",
        lambda: run(
            folder / "patience", replace(LOOP, patience=2, validate_every=5), validate=judged(None)
        ),
    )


def stop_at(step):
    """Progress callback that interrupts."""

    def progress(now, steps, metrics):
        if now == step:
            raise InterruptedTraining("enough")

    return progress


def main(folder):
    """Run all cases and write what came of them."""
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    found = {name: case() for name, case in cases(folder, rank, count)}
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
