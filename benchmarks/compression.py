"""`python -m benchmarks.compression`: how far a LoRA can be compressed before likeness suffers.

Both encoders of the autoencoder and PCA, at several latent sizes, trained on the same corpus and
judged on LoRAs of validation people: the share of the original LoRA's gain over the base model
that its reconstruction keeps.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from difflora_core.demo import stages_lora
from difflora_core.evaluation.report import Report
from difflora_core.evaluation.weight_space import reconstruction
from difflora_core.lora.tokens import TokenGrid
from difflora_core.lora.weights import LoRAWeights
from difflora_core.models.lae import LoRAAutoencoder
from difflora_core.storage.lora_corpus import LoRACorpus
from difflora_core.training import lae
from difflora_core.training.early_stopping import EarlyStopping
from difflora_core.training.linear_baselines import pca_autoencoder
from difflora_core.training.loop import LoopConfig

from .drawing import Plan
from .experiment import Experiment, Trial
from .prompts import QUICK
from .rows import Row, corpus_row
from .world import World, benchmark_console, commit, load_world, machine, set_threads

LATENT_TOKENS = (2, 4, 8, 16)
KINDS = ("structured", "conv1d")
_JUDGES = ("face_similarity", "parameter_error")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Ratio against likeness of LoRA autoencoders.")
    parser.add_argument("--people", type=int, default=8)
    parser.add_argument("--steps", type=int, default=800, help="training steps per autoencoder")
    parser.add_argument("--json", type=Path, help="write the curve to this file")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 = all cores")
    options = parser.parse_args(arguments)
    set_threads(options.threads)
    console = benchmark_console()
    world = load_world(say=console.print)
    plan = Plan(QUICK, repeats=0, seed=2)
    experiment = Experiment(world, plan, "validation", options.people)
    original = corpus_row(world, experiment.people)
    if original is None:
        console.print("The curve needs the functional model, whose `down` the corpus shares.")
        return 1
    corpus = stages_lora.corpus_of_loras(world.base, lambda step, total, metrics: None)
    rows = curve(experiment, original, corpus, options.steps, console)
    report = Report(rows, {"seed": plan.seed, "commit": commit(), "machine": machine()})
    console.print(report.to_markdown({"numbers": 0, "ratio": 0}))
    if options.json:
        options.json.write_text(report.to_json() + "\n")
    return 0


def curve(
    experiment: Experiment, original: Row, corpus: LoRACorpus, steps: int, console: Console
) -> dict[str, dict[str, float]]:
    """Rows of the curve, the smallest ratio last for each kind."""
    kept = round(len(corpus) * 6 / 7)
    train = corpus.select(corpus.identities[:kept]).weights
    held_out = corpus.select(corpus.identities[kept:]).weights
    base, whole = experiment.base(), experiment.trial(original, 1.0)
    rows = {}
    for kind in (*KINDS, "pca"):
        for tokens in LATENT_TOKENS:
            numbers = tokens * stages_lora.LAE.latent_dim
            if kind == "pca":
                if numbers >= kept:
                    continue
                again = through_pca(experiment.world, original.weights, train, numbers)
            else:
                name = f"{experiment.world.base_hash[:8]}-{kind}-{tokens}-{steps}"
                folder = experiment.world.cache / "compression" / name
                halves = (train, held_out)
                model = trained_lae(experiment.world, kind, tokens, folder, steps, halves)
                with torch.no_grad():
                    again = model.decode_weights(model.encode_weights(original.weights))
            name = f"{kind}, {numbers} numbers"
            rows[name] = columns(experiment, again, original.weights, (base, whole), numbers)
            told = "  ".join(f"{key} {value:.3g}" for key, value in rows[name].items())
            console.print(f"{name}: {told}")
    return rows


def trained_lae(
    world: World,
    kind: str,
    tokens: int,
    folder: Path,
    steps: int,
    corpus: tuple[LoRAWeights, LoRAWeights],
) -> LoRAAutoencoder:
    """An autoencoder of one kind and size, trained on weights alone as the paper does."""
    config = replace(stages_lora.PAPER_LAE, kind=kind, latent_tokens=tokens)
    model = LoRAAutoencoder(config, world.layout, generator=torch.Generator().manual_seed(tokens))
    loop = LoopConfig(steps=steps, learning_rate=2e-3, ema=0.99, log_every=50)
    settings = lae.LAETrainConfig(loop=loop, stopping=EarlyStopping(every=100, patience=4))
    lae.fit(model, corpus[0], settings, folder, corpus[1])
    return model.eval().requires_grad_(False)


def through_pca(
    world: World, weights: LoRAWeights, corpus: LoRAWeights, numbers: int
) -> LoRAWeights:
    """The LoRAs in the span of the corpus' first components."""
    grid = TokenGrid(world.layout, ("up",))
    pca = pca_autoencoder(grid.encode(corpus)[0].float(), numbers)
    tokens = pca.decode(pca.encode(grid.encode(weights)[0].float()))
    return grid.decode(tokens, {name: layer.down[0] for name, layer in weights.layers.items()})


def columns(
    experiment: Experiment,
    again: LoRAWeights,
    original: LoRAWeights,
    ends: tuple[Trial, Trial],
    numbers: int,
) -> dict[str, float]:
    """Ratio, kept gains by both judges, and the error of delta W."""
    trial = experiment.trial(Row("reconstruction", again), 1.0)
    base, whole = (one.means() for one in ends)
    result = {"numbers": float(numbers), "ratio": experiment.world.layout.numel / numbers}
    for column in _JUDGES:
        gain = trial.means()[column] - base[column]
        result[f"kept_{column}"] = gain / (whole[column] - base[column])
    error = reconstruction(again, original)["relative_error"]
    return result | {"relative_error": float(error.mean())}


if __name__ == "__main__":
    raise SystemExit(main())
