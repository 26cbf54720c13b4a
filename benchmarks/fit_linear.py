"""`python -m benchmarks.fit_linear`: fit the linear baselines, PCA and ridge regression.

Trains a corpus of DreamBooth LoRAs of training people, with the settings of the benchmark's own
baseline, and writes both baselines beside the artefacts. A stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .dreambooth import SETTINGS
from .linear import fit_linear, photo_rows, save_linear, up_vectors
from .people import benchmark_people
from .world import LINEAR, World, benchmark_console, load_world, set_threads

PHOTOS_PER_PERSON = 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Fit the linear baselines of the benchmark.")
    parser.add_argument("--people", type=int, default=160, help="training people of the corpus")
    parser.add_argument("--steps", type=int, default=100, help="DreamBooth steps per person")
    parser.add_argument("--components", type=int, default=128, help="directions of the PCA")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 = all cores")
    options = parser.parse_args(arguments)
    set_threads(options.threads)
    console = benchmark_console()
    world = load_world(say=console.print)
    vectors, features = corpus(world, options.people, options.steps)
    linear = fit_linear(vectors, features, options.components)
    facts = {"people": options.people, "steps": options.steps, "base": world.base_hash}
    save_linear(linear, LINEAR, facts)
    left = (linear.project(vectors) - vectors).square().sum()
    share = 1 - float(left / (vectors - linear.mean).square().sum())
    console.print(f"PCA of {len(linear.basis)} directions holds {share:.2f} of the corpus' energy")
    console.print(f"wrote {LINEAR.name}, {LINEAR.stat().st_size / 1024:.0f} KB")
    return 0


def corpus(world: World, people: int, steps: int) -> tuple[Tensor, Tensor]:
    """LoRA vectors (M, V) and features (M, Q, F) of Q photos of M training people."""
    crowd = benchmark_people("train", people, ())
    trained = world.workshop.train(
        crowd.photos, crowd.seeds, replace(SETTINGS, steps=steps, snapshots=())
    )
    seen = world.features(crowd.photos.images[:, :PHOTOS_PER_PERSON])
    return up_vectors(trained.snapshots[steps]), torch.stack([photo_rows(row) for row in seen])


if __name__ == "__main__":
    raise SystemExit(main())
