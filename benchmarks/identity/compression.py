"""`make bench name=compression`: how far a LoRA can be compressed before likeness suffers.

Both kinds of the autoencoder and PCA, at several latent sizes, trained on the weights of the same
corpus, and the functional model's autoencoder at its one size; then what the weight-preserved loss
and the canonical form do. All are judged on LoRAs of validation people: the share of the original
LoRA's gain over the base model that survives in its reconstruction.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from rich.console import Console

from difflora_core.commands import networks
from difflora_core.config import Config
from difflora_core.demo.build import stages_lora
from difflora_core.evaluation.metrics import reconstruction
from difflora_core.evaluation.report import Report
from difflora_core.lora.tokens import TokenGrid
from difflora_core.lora.weights import LoRALayer, LoRAWeights
from difflora_core.models.lae.autoencoder import LoRAAutoencoder
from difflora_core.models.lae.config import LAEConfig
from difflora_core.storage.lora_corpus import LoRACorpus
from difflora_core.training.difflora import lae
from difflora_core.training.difflora.linear_baselines import pca_autoencoder
from difflora_core.training.loop import LoopConfig

from ..command import benchmark_console, command_parser, commit, machine, set_threads, write_report
from ..prompts import QUICK
from .artefacts import Artefacts, load_artefacts
from .drawing import Plan
from .experiment import Experiment, Trial
from .rows import Row, corpus_row

LATENT_TOKENS = (2, 4, 8, 16)
KINDS = ("structured", "conv1d")


@dataclass(frozen=True)
class Recipe(Config):
    """How an autoencoder is trained on weights.

    `preserve`: strength of the weight-preserved term; `both_factors`: `down` is generated too;
    `turned`: every LoRA by other factors of the same delta W; `canonical`: brought to the canonical
    form; `steps`: training steps.
    """

    preserve: float = 1.0
    both_factors: bool = False
    turned: bool = False
    canonical: bool = False
    steps: int = 800

    def key(self, config: LAEConfig, corpus: LoRAWeights) -> str:
        """Name of the folder of such a run."""
        digest = hashlib.sha256(f"{self}{config.to_json()}".encode())
        for layer in corpus.layers.values():
            digest.update(layer.up.detach().float().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


ABLATIONS = {
    "plain MSE": Recipe(preserve=0.0),
    "both factors": Recipe(both_factors=True),
    "both factors, turned at random": Recipe(both_factors=True, turned=True),
    "both factors, turned, canonical form": Recipe(both_factors=True, turned=True, canonical=True),
}
"""Changes to `structured` at the paper preset's size. The corpus shares one `down`, so its LoRAs
are turned (other factors of the same delta W) to stand for LoRAs that were trained apart."""
_JUDGES = ("face_similarity", "parameter_error")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = command_parser("Ratio against likeness of LoRA autoencoders.")
    parser.add_argument("--people", type=int, default=8)
    parser.add_argument("--steps", type=int, default=800, help="training steps per autoencoder")
    options = parser.parse_args(arguments)
    set_threads(options.threads)
    console = benchmark_console()
    artefacts = load_artefacts(log=console.print)
    plan = Plan(QUICK, repeats=0, seed=2)
    experiment = Experiment(artefacts, plan, "validation", options.people)
    original = corpus_row(artefacts, experiment.people)
    if original is None:
        console.print("The curve needs the `down` of the corpus: make bench name=fit_linear.")
        return 1
    corpus = stages_lora.paper_loras()
    rows = curve(experiment, original, corpus, options.steps, console)
    report = Report(rows, {"seed": plan.seed, "commit": commit(), "machine": machine()})
    console.print(report.to_markdown({"numbers": 0, "ratio": 0}))
    write_report(report, options.json, console)
    return 0


def curve(
    experiment: Experiment, original: Row, corpus: LoRACorpus, steps: int, console: Console
) -> dict[str, dict[str, float]]:
    """Rows of the curve, the smallest ratio last for each kind; then the ablations."""
    learned = round(len(corpus) * 6 / 7)
    halves = tuple(
        corpus.select(names).weights
        for names in (corpus.identities[:learned], corpus.identities[learned:])
    )
    artefacts, size = experiment.artefacts, networks.SMALL_LAE.latent_dim
    ends = experiment.base(), experiment.trial(original, 1.0)
    rows = {}

    def judge(name: str, again: LoRAWeights, numbers: int) -> None:
        rows[name] = columns(experiment, again, original.weights, ends, numbers)
        line = "  ".join(f"{key} {value:.3g}" for key, value in rows[name].items())
        console.print(f"{name}: {line}")

    def trained(kind: str, tokens: int, recipe: Recipe) -> LoRAWeights:
        config = replace(networks.SMALL_PAPER_LAE, kind=kind, latent_tokens=tokens)
        recipe = replace(recipe, steps=steps)
        return through_autoencoder(artefacts, config, recipe, halves, original)

    for kind in KINDS:
        for tokens in LATENT_TOKENS:
            judge(
                f"{kind}, {tokens * size} numbers", trained(kind, tokens, Recipe()), tokens * size
            )
    for numbers in (tokens * size for tokens in LATENT_TOKENS if tokens * size < learned):
        again = through_pca(artefacts, original.weights, halves[0], numbers)
        judge(f"pca, {numbers} numbers", again, numbers)
    usual = networks.SMALL_LAE.latent_tokens
    model = artefacts.models["functional"]
    with torch.no_grad():
        again = model.decode(model.encode(original.weights))
    judge(f"functional, {usual * size} numbers", again, usual * size)
    for change, recipe in ABLATIONS.items():
        again = trained("structured", usual, recipe)
        judge(f"structured, {usual * size} numbers, {change}", again, usual * size)
    return rows


def through_autoencoder(
    artefacts: Artefacts,
    config: LAEConfig,
    recipe: Recipe,
    corpus: tuple[LoRAWeights, LoRAWeights],
    original: Row,
) -> LoRAWeights:
    """LoRAs through an autoencoder that was trained on weights alone, as the paper does."""
    seed = config.latent_tokens
    learn, held_out, seen = (*corpus, original.weights)
    if recipe.both_factors:
        config = replace(config, parts=("down", "up"))
    if recipe.turned:
        learn, held_out, seen = (
            turned(weights, torch.Generator().manual_seed(number))
            for number, weights in enumerate((learn, held_out, seen))
        )
    if recipe.canonical:
        learn, reference = lae.standard_form(learn, artefacts.layout.rank)
        held_out, seen = (
            lae.standard_form(weights, artefacts.layout.rank, reference)[0]
            for weights in (held_out, seen)
        )
    model = LoRAAutoencoder(config, artefacts.layout, generator=torch.Generator().manual_seed(seed))
    loop = LoopConfig(
        steps=recipe.steps, learning_rate=2e-3, ema=0.99, validate_every=100, patience=4
    )
    settings = lae.LAETrainConfig(loop=loop, canonical=False, preserve=recipe.preserve)
    folder = artefacts.cache / "compression" / recipe.key(config, learn)
    lae.fit(model, learn, settings, folder, held_out)
    with torch.no_grad():
        return model.eval().decode_weights(model.encode_weights(seen))


def turned(weights: LoRAWeights, generator: torch.Generator) -> LoRAWeights:
    """Other factors of the same delta W: every layer's r components rotated at random."""
    layers = {}
    for name, layer in weights.layers.items():
        shape = (*layer.batch_shape, layer.rank, layer.rank)
        turn = torch.linalg.qr(torch.randn(shape, generator=generator))[0]
        layers[name] = LoRALayer(turn @ layer.down, layer.up @ turn.mT, layer.alpha)
    return LoRAWeights(layers)


def through_pca(
    artefacts: Artefacts, weights: LoRAWeights, corpus: LoRAWeights, numbers: int
) -> LoRAWeights:
    """The LoRAs in the span of the corpus' first components."""
    grid = TokenGrid(artefacts.layout, ("up",))
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
    """Ratio, surviving shares of the gain by both judges, and the error of delta W."""
    trial = experiment.trial(Row("reconstruction", again), 1.0)
    base, whole = (one.means() for one in ends)
    result = {"numbers": float(numbers), "ratio": experiment.artefacts.layout.numel / numbers}
    for column in _JUDGES:
        gain = trial.means()[column] - base[column]
        result[f"kept_{column}"] = gain / (whole[column] - base[column])
    error = reconstruction(again, original)["relative_error"]
    return result | {"relative_error": float(error.mean())}
