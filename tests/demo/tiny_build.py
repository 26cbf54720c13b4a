"""`python tests/demo/tiny_build.py FOLDER`: the whole of `make demo-world`, in minutes and poor.

The stages are the real ones; each loop ends after a few steps, and the pools hold few people.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

from difflora_core.commands import networks
from difflora_core.demo import paths
from difflora_core.demo.build import (
    __main__ as build,
)
from difflora_core.demo.build import (
    controlnet,
    stages,
    stages_concepts,
    stages_faces,
    stages_lora,
    stages_styles,
    words,
)
from difflora_core.demo.networks import concept_judge, detector
from difflora_core.demo.world import pool
from difflora_core.training import loop
from difflora_core.training.difflora.lora_corpus import CorpusConfig

STEPS = 2
PEOPLE = 24
"""At most so many people in a pool, a multiple of what any stage asks for at once."""


def in_folder(folder: Path) -> None:
    """Everything is written here."""
    work, shipped = paths.WORK, paths.ARTEFACTS.parent
    for name, value in list(vars(paths).items()):
        if not isinstance(value, Path) or name == "ROOT":
            continue
        inside = value.is_relative_to(work)
        place = folder / "work" if inside else folder
        setattr(paths, name, place / value.relative_to(work if inside else shipped))
    paths.ROOT = folder


def few_steps() -> None:
    """Every run of the one training loop ends after STEPS."""
    whole = loop._Run

    class Short(whole):
        def __init__(self, objective, draw, config, *rest):
            config = replace(config, steps=min(config.steps, STEPS), warmup=0, compile=False)
            super().__init__(objective, draw, config, *rest)

    loop._Run = Short


def few_people() -> None:
    """Pools of few people, and stages that ask for no more of them."""
    portraits, pairs = pool.portrait_pool, pool.pair_pool

    def portrait_pool(split, identities, pictures, *rest, **more):
        return portraits(split, min(identities, PEOPLE), pictures, *rest, **more)

    def pair_pool(split, count, identities, *rest):
        return pairs(split, min(count, PEOPLE), min(identities, PEOPLE), *rest)

    for module in (stages, stages_faces, stages_styles):
        for name, tiny in (("portrait_pool", portrait_pool), ("pair_pool", pair_pool)):
            if hasattr(module, name):
                setattr(module, name, tiny)
    smaller = {
        controlnet: {"POSED": PEOPLE, "PAIRS": PEOPLE, "MEASURED": 2},
        concept_judge: {"PICTURES": 96, "CHUNK": 96},
        words: {"PAIR_PICTURES": 32, "CHUNK": 32},
        stages_concepts: {"CAPTIONS": 50, "JUDGED": 2},
        stages_styles: {"DRAWN": 2},
        stages_lora: {
            **{"CORPUS_PEOPLE": 16, "CORPUS_HELD_OUT": 8, "CORPUS": CORPUS},
            **{"PAPER_PEOPLE": 12, "PAPER_HELD_OUT": 4, "DOWN_PEOPLE": 4, "PAPER_PICTURES": 10},
            **{name: replace(getattr(stages_lora, name), steps=1) for name in COURSES},
        },
        networks: {"LINEAR_LAE": replace(networks.LINEAR_LAE, latent_tokens=2, latent_dim=4)},
    }
    for module, values in smaller.items():
        for name, value in values.items():
            setattr(module, name, value)


def a_detector_that_finds(shipped: Path) -> None:
    """A detector of two steps finds no face, and people without one are no dataset.

    Args:
        shipped: folder of the demo's own, which takes its place when it is trained.
    """
    train = stages_faces.train_detector

    def trained(portraits, pairs, recipe, folder, *rest):
        train(portraits, pairs, recipe, folder, *rest)
        shutil.copyfile(shipped / detector.FILE_NAME, folder / detector.FILE_NAME)

    stages_faces.train_detector = trained


COURSES = ("PAPER_COURSE", "DOWN_COURSE")
CORPUS: CorpusConfig = replace(
    stages_lora.CORPUS, dreambooth=replace(stages_lora.CORPUS.dreambooth, steps=1)
)


def main(folder: Path) -> int:
    """Builds into a folder; the shipped files stay as they are."""
    shipped = paths.FACES
    in_folder(folder)
    few_steps()
    few_people()
    a_detector_that_finds(shipped)
    (folder / "workflows").mkdir(parents=True, exist_ok=True)
    return build.main([])


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
