"""What is drawn to compare models: people, prompts, seeds and sampler, listed in a file.

The DiffLoRA paper (arXiv:2408.06740) draws 25 people in 30 prompts and prints neither list; those
of `protocols/` are ours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..config import Config, check_range, parse_json
from ..diffusion.sampler import MAX_SEED
from ..errors import ConfigError, shown
from ..limits import JSON_BYTES

FOLDER = Path(__file__).parent / "protocols"
PLACE = "{person}"
"""Stands in every prompt where the person is named."""


@dataclass(frozen=True)
class Prompt(Config):
    """A prompt.

    Args:
        text: with PLACE where the person is named.
        kind: what it asks for beside the person: context, clothing, action, style.
    """

    text: str
    kind: str = ""


@dataclass(frozen=True)
class Protocol(Config):
    """What is drawn, and how; the same for every model that is compared.

    Args:
        prompts: in order; pictures of other programs are named by their number, from 1.
        title: of the report.
        base: family of the base model that it is meant for.
        people: names of people's folders; all folders there are unless given.
        count: how many people the protocol asks for; fewer or more are told in the report.
        person: word in the place of the person, before a model's own trigger words.
        negative: prompt of what guidance leads away from.
        seeds: pictures of each prompt.
        seed: of all noise.
        side: of the pictures in pixels.
        steps, guidance: of the sampler.
        sampler: ddim with trailing timesteps, or DPM++ 2M on Karras' noise levels.

    Raises:
        ConfigError: a value is out of range.
    """

    prompts: tuple[Prompt, ...] = (Prompt(PLACE),)
    title: str = "evaluation"
    base: str = "sdxl"
    people: tuple[str, ...] = ()
    count: int = 25
    person: str = "a person"
    negative: str = ""
    seeds: int = 1
    seed: int = 0
    side: int = 1024
    steps: int = 30
    guidance: float = 5.0
    sampler: Literal["ddim", "dpmpp_2m_karras"] = "ddim"

    def __post_init__(self) -> None:
        self.check_choices("Protocol")
        if not self.prompts:
            raise ConfigError("A protocol needs prompts.")
        for prompt in self.prompts:
            if PLACE not in prompt.text:
                raise ConfigError(
                    f"The prompt {shown(prompt.text)} lacks {PLACE}, the person's place."
                )
        check_range("Protocol", "count", self.count, 1, 100_000)
        check_range("Protocol", "seeds", self.seeds, 1, 1000)
        check_range("Protocol", "seed", self.seed, 0, MAX_SEED)
        check_range("Protocol", "side", self.side, 8, 8192)
        check_range("Protocol", "steps", self.steps, 1, 1000)
        check_range("Protocol", "guidance", self.guidance, 0, 100)

    @property
    def cells(self) -> list[tuple[int, int]]:
        """(prompt, seed) of every picture of a person, both from 0."""
        return [(p, s) for p in range(len(self.prompts)) for s in range(self.seeds)]

    def text(self, prompt: int, trigger: str = "") -> str:
        """A prompt as it is encoded.

        Args:
            prompt: its number from 0.
            trigger: words that a model needs at the beginning.
        """
        plain = self.prompts[prompt].text.replace(PLACE, self.person)
        return f"{trigger}, {plain}" if trigger else plain

    def noise_seed(self, person: str, prompt: int, seed: int) -> int:
        """Seed of a picture's noise: the same for every model, whoever else is drawn."""
        name = f"{self.seed}/{person}/{prompt}/{seed}".encode()
        return int.from_bytes(hashlib.sha256(name).digest()[:7], "big")


def read_protocol(name: str) -> Protocol:
    """A protocol of `protocols/` by name, or of a JSON file by path.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    path = Path(name)
    if not path.suffix and (FOLDER / f"{name}.json").is_file():
        path = FOLDER / f"{name}.json"
    try:
        with path.open("rb") as file:
            text = file.read(JSON_BYTES + 1)
    except OSError as error:
        known = ", ".join(sorted(own.stem for own in FOLDER.glob("*.json")))
        raise ConfigError(
            f"The protocol {shown(name, 300)} cannot be read: {error.strerror}. Name a JSON file, "
            f"or one of {known}."
        ) from error
    data = parse_json(text, shown(path.name))
    try:
        return Protocol.from_dict(data)
    except ConfigError as error:
        raise ConfigError(f"{shown(path.name)}: {error}") from error


def chosen_people(protocol: Protocol, there: Sequence[str]) -> list[str]:
    """The people who are evaluated, of those there are.

    Raises:
        ConfigError: one of the protocol's is not there, or there is nobody.
    """
    if missing := [name for name in protocol.people if name not in there]:
        raise ConfigError(
            f"{len(missing)} of the protocol's people have no folder (for example "
            f"{shown(missing[0])})."
        )
    if not there:
        raise ConfigError("There is nobody to evaluate: name a folder with one folder a person.")
    return list(protocol.people) or sorted(there)
