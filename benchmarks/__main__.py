"""`make bench name=NAME args='…'`: one table for each name, whatever folder its file lies in."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

BENCHMARKS = {
    "identity": ("identity.identity", "the main table: likeness of predicted LoRAs"),
    "composition": ("identity.composition", "people blended, invented and put side by side"),
    "toy": ("identity.toy", "whether LoRA weights are easier to compress and predict than others"),
    "compression": ("identity.compression", "how far a LoRA can be compressed"),
    "seeds": ("identity.seeds", "spread of the two headline rows between seeds"),
    "train_baselines": ("identity.train_baselines", "baselines of the main table, trained once"),
    "train_lora": ("identity.train_lora", "Train Identity LoRA against DreamBooth and core's node"),
    "corpus_training": ("identity.corpus_training", "identities an hour, in groups or one by one"),
    "lora_noise": ("identity.lora_noise", "how much of a trained LoRA is the person"),
    "face_parameters": ("identity.face_parameters", "which parts of a face each row gets right"),
    "yardstick": ("identity.yardstick", "settings of DreamBooth, chosen on validation people"),
    "choose_strength": ("identity.choose_strength", "strengths, chosen on validation people"),
    "fit_linear": ("identity.fit_linear", "fits the linear baselines, PCA and ridge regression"),
    "plots": ("identity.plots", "plots of reports of other benchmarks, and of training runs"),
    "perfusion": ("concepts.perfusion", "new words by Perfusion and by other methods"),
    "covariance": ("concepts.covariance", "how many captions the covariance C needs"),
    "choose_rates": ("concepts.choose_rates", "learning rates, chosen on validation concepts"),
    "choose_pairs": ("concepts.choose_pairs", "settings for two words, on validation concepts"),
    "styles": ("styles.styles", "styles by every method, learned from teachers and from pictures"),
    "style_rates": ("styles.style_rates", "learning rates of styles, chosen on held-out pictures"),
    "overhead": ("cost.overhead", "what a LoRA or a concept costs while sampling"),
    "processes": ("cost.processes", "the loop under 1, 2 and 4 processes, and a stop on one"),
    "engines": ("cost.engines", "prepare and corpus by several processes, and on a Ray cluster"),
    "faults": ("reliability.faults", "kill -9 at any moment, and disks that fail"),
    "lora_files": ("files.lora_files", "what of LoRA files of every family our nodes keep"),
    "hyperlora": ("cost.hyperlora", "HyperLoRA's public size: loading, memory, the first LoRA"),
    "workflows": ("cost.workflows", "every SDXL workflow at full size, in ComfyUI"),
    "road": ("cost.road", "from photos to a model in ComfyUI at full size, command by command"),
    "full_size": ("cost.full_size", "time and memory of the full-size model"),
}
"""Name to module and what it measures: one line a benchmark. The module has `main(arguments)`."""


def main(arguments: Sequence[str]) -> int:
    """Runs the benchmark named first with the remaining arguments.

    Raises:
        SystemExit: no name, or none of BENCHMARKS; the message lists them.
    """
    name, *rest = arguments or ("",)
    if name not in BENCHMARKS:
        raise SystemExit(f"{f'There is no benchmark {name!r}. ' if name else ''}{listing()}")
    sys.argv[0] = f"python -m benchmarks {name}"  # as --help shows it
    module = importlib.import_module(f"benchmarks.{BENCHMARKS[name][0]}")
    return int(module.main(rest) or 0)


def listing() -> str:
    """Every name with what it measures."""
    lines = [f"  {name:<16}{about}" for name, (_, about) in BENCHMARKS.items()]
    return "\n".join(["Choose one, for example make bench name=identity args='--quick':", *lines])


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
