"""`make bench name=covariance args='--quick --json FILE'`: how many captions C needs.

C of the demo world's text encoders from 1,000, 10,000 and 50,000 captions, three selections each,
against a C of 50,000 captions that share none of their selections. What an artist feels is the
gate: it is compared on prompts that the captions do not hold, for every concept of the demo world.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from difflora_core.adapters.token_gate import SigmoidGate
from difflora_core.demo import paths
from difflora_core.demo.networks.concept_text import demo_concept_text
from difflora_core.demo.world.concepts import CONCEPTS
from difflora_core.evaluation.report import Report
from difflora_core.text.captions import captions
from difflora_core.text.covariance import RIDGE, Covariance, build_covariance
from difflora_core.text.encoders import TextEncoders
from difflora_core.text.new_words import superclass_token, word_encoding

from ..command import benchmark_console, command_parser, commit, machine, set_threads, write_report
from ..prompts import PROMPTS

COUNTS, QUICK_COUNTS = (1_000, 10_000, 50_000), (500, 2_000)
SELECTIONS, REFERENCE_SEED = (0, 1, 2), 9
GATE = SigmoidGate()
UNRELATED = 0.3
"""Similarity from which an unrelated word counts as touched (perfusion.md 6)."""


@dataclass(frozen=True, eq=False)
class Probes:
    """Directions (J, d) of words, and encodings (T, d) of held-out prompts with them.

    `own`: (J, T) True where a token is the word itself.
    """

    directions: Tensor
    encodings: Tensor
    own: Tensor


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = command_parser("How many captions the covariance needs.", threads=1)
    parser.add_argument("--quick", action="store_true", help="500 and 2,000 captions")
    options = parser.parse_args(arguments)
    set_threads(options.threads)
    counts = QUICK_COUNTS if options.quick else COUNTS
    console = benchmark_console()
    rows = table(demo_concept_text(paths.BASE), counts)
    facts = {"ridge": RIDGE, "selections": len(SELECTIONS), "quick": options.quick}
    report = Report(rows, {**facts, "commit": commit(), "machine": machine()})
    console.print(report.to_markdown({"tokens": 0, "condition": 0, "seconds": 1}))
    write_report(report, options.json, console)
    return 0


def table(text: TextEncoders, counts: Sequence[int]) -> dict[str, dict[str, float]]:
    """One row for each number of captions: means over the selections."""
    probes = make_probes(text)
    reference = build_covariance(text, captions(max(counts), "demo", REFERENCE_SEED))
    rows = {}
    for count in counts:
        found = []
        for seed in SELECTIONS:
            started = time.process_time()
            covariance = build_covariance(text, captions(count, "demo", seed))
            seconds = time.process_time() - started
            found.append({**compare(covariance, reference, probes), "seconds": seconds})
        names = found[0]
        rows[f"{count} captions"] = {
            name: sum(one[name] for one in found) / len(found) for name in names
        }
    return rows


def compare(covariance: Covariance, reference: Covariance, probes: Probes) -> dict[str, float]:
    """What another C changes.

    Returns:
        Tokens, condition number, relative error of the covectors C^-1 i / i' C^-1 i, mean and
        largest error of the gate, and the share of other words' tokens that are touched.
    """
    own, other = (
        torch.stack([c.covector(direction) for direction in probes.directions])
        for c in (covariance, reference)
    )
    near, far = (covectors @ probes.encodings.double().mT for covectors in (own, other))
    gates = (GATE(near) - GATE(far)).abs()
    return {
        "tokens": float(covariance.tokens),
        "condition": covariance.condition_number,
        "covector_error": float(((own - other).norm(dim=1) / other.norm(dim=1)).mean()),
        "gate_error_mean": float(gates.mean()),
        "gate_error_max": float(gates.max()),
        "words_touched": float((near[~probes.own] >= UNRELATED).double().mean()),
    }


@torch.no_grad()
def make_probes(text: TextEncoders) -> Probes:
    """Words of the demo world's kinds in prompts that no caption world makes."""
    kinds = list(dict.fromkeys(concept.kind for concept in CONCEPTS))
    directions, encodings, own = [], [], []
    for kind in kinds:
        embedding = text.embedding(superclass_token(text, kind))
        directions.append(word_encoding(text, embedding))
    words = {f"<{kind}>": text.embedding(superclass_token(text, kind)) for kind in kinds}
    for kind in kinds:
        concept = next(c for c in CONCEPTS if c.kind == kind)
        prompts = [concept.prompt(scene, f"<{kind}>") for scene in PROMPTS]
        encoded = text.encode(prompts, words)
        place = encoded.positions[f"<{kind}>"][:, None]
        number = torch.arange(encoded.real.shape[1])[None]
        real = encoded.real
        encodings.append(encoded.context[real])
        hit = (number == place)[real]
        own.append(torch.stack([hit if k == kind else torch.zeros_like(hit) for k in kinds]))
    return Probes(torch.stack(directions), torch.cat(encodings), torch.cat(own, 1))
