"""The frozen models that styles are learned and judged with, and where trained teachers lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from difflora_core.demo import paths
from difflora_core.demo.build.stages_styles import painted_pool
from difflora_core.demo.networks.base import load_base
from difflora_core.demo.networks.chinese import load_chinese
from difflora_core.demo.networks.concept_text import chinese_text, demo_concept_text
from difflora_core.demo.networks.judges import Judges, load_judge
from difflora_core.demo.networks.style_judge import StyleJudge, load_style_judge
from difflora_core.demo.world.art_styles import ART_STYLES
from difflora_core.training.picture_task import PictureTask

from ..command import CACHE, Log, silent
from .people import KnownPeople, demo_people
from .readers import StyleReader, style_reader

TEACHERS, STYLE_JUDGE, CHINESE = (
    path.relative_to(paths.ARTEFACTS) for path in (paths.TEACHERS, paths.STYLE_JUDGE, paths.CHINESE)
)
"""Below the folder of artefacts."""
READ = 1800
"""Portraits that a reader is fitted on."""
HOW = "make demo-world makes it (stages style_judge, teachers, chinese); or name another folder"


@dataclass(frozen=True, eq=False)
class StyleWorld:
    """A student and a teacher for each style, all frozen, with judges of styles and prompts.

    `chinese`: the student with text encoders that read Chinese. `readers`: of each style, what a
    prompt named and who is shown; `people`: those whose faces are to be kept. `cache`: folder of
    everything that is drawn or trained; `log`: prints a line.
    """

    student: PictureTask
    chinese: PictureTask
    teachers: Mapping[str, PictureTask]
    judge: StyleJudge
    readers: Mapping[str, StyleReader]
    people: KnownPeople
    cache: Path
    log: Log = silent


def demo_world(styles: Sequence[str], folder: Path, people: int, log: Log = silent) -> StyleWorld:
    """The demo world's models.

    Args:
        styles: names of art styles.
        folder: of artefacts, which holds teachers and the judge of styles.
        people: so many of them.
        log: prints a line.

    Raises:
        SystemExit: a file is missing; the message says how it is made.
    """
    files = {style: folder / TEACHERS / f"{style}.safetensors" for style in styles}
    for path in (folder / STYLE_JUDGE, folder / CHINESE, *files.values()):
        if not path.exists():
            raise SystemExit(f"There is no {path}. {HOW} by --teachers.")
    base, text, cache = load_base(paths.BASE), demo_concept_text(paths.BASE), CACHE / "styles"
    asked = {"attributes": paths.PROMPT_JUDGE, "embedder": paths.JUDGES / "embedder.safetensors"}
    judges = Judges({name: load_judge(path) for name, path in asked.items()})
    pool = painted_pool().head(READ)
    readers = {
        style: style_reader(
            judges, ART_STYLES[style], base, pool, cache / "readers" / f"{style}.safetensors"
        )
        for style in styles
    }
    return StyleWorld(
        PictureTask(base, text, "demo"),
        PictureTask(base, chinese_text(load_chinese(folder / CHINESE)), "demo"),
        {s: PictureTask(load_base(paths.BASE, path), text, "demo") for s, path in files.items()},
        load_style_judge(folder / STYLE_JUDGE),
        readers,
        demo_people(people),
        cache,
        log,
    )
