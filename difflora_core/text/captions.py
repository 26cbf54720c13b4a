"""Captions of our own for C: short descriptions of pictures, put together from word lists.

Distinct captions by construction: caption number n of a seed is one combination of the lists in
mixed radix, visited in a scrambled order that never repeats before all were seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConfigError

_THINGS = """
cat dog horse bird fish man woman child person hat cup chair table car train boat house tower
bridge tree flower mountain river street garden kitchen window book clock guitar toy robot
cake apple bottle shoe jacket umbrella lamp bear girl boy king queen soldier dancer doctor
farmer crowd family cow sheep pig rabbit fox wolf lion tiger elephant owl duck eagle snake
frog whale butterfly dragon castle church temple palace lighthouse barn tent farm harbour
airport station market shop hospital school library theatre stadium road tunnel path waterfall
island volcano cave forest field cloud moon star sun planet rocket airplane helicopter bicycle
motorcycle truck bus ship statue mask crown sword shield armour ring necklace watch phone
camera computer piano violin drum trumpet painting mirror vase candle basket box bag backpack
suitcase sofa bed desk door wall floor fountain pool bread cheese pizza soup coffee tea wine
orange lemon banana strawberry mushroom carrot egg dress coat shirt boot glove scarf helmet
glasses face hand eye city village skyline landscape logo letter flag map machine engine gear
"""


def any_of(words: str) -> tuple[str, ...]:
    """Choices for one place, written with | between them: spaces count, one may be empty."""
    return tuple(words.split("|"))


_GENERAL = (
    any_of(
        "a photo of|a painting of|a drawing of|a close view of|an old picture of"
        "|a bright photo of|a poster of|a sketch of|a film still of|a postcard of"
    ),
    any_of(
        "a|the|one|my|a small|a large|an old|a new|a broken|a shiny|a dark|a wooden|a colourful"
        "|a quiet|a happy|a strange"
    ),
    any_of("red|green|blue|yellow|white|black|orange|purple|brown|grey|pink|golden"),
    tuple(_THINGS.split()),
    any_of(
        "on a beach|in a forest|at night|in the snow|under a bridge|on a shelf|in a museum"
        "|by the sea|in the rain|on a plate|in front of a mountain|at a market|in an empty room"
        "|beside a lake|on the grass|in a city|at sunset|behind glass|in the desert"
        "|on a rooftop|in space|underwater|by a window|with people around"
    ),
    any_of(
        "|, soft light|, wide angle|, high detail|, in watercolour|, black and white"
        "|, seen from above|, out of focus|, with long shadows|, in the style of a cartoon"
    ),
)

_PORTRAITS = (
    any_of("photo|cartoon|painting|picture|portrait"),
    any_of("of a|of the|of one|of an old|of a young"),
    any_of(
        "person|man|woman|cat|flower|cup|hat|face|head|person with glasses|person with a beard"
        "|person with long hair|person with short hair|person with blonde hair"
        "|person with dark hair|person with red hair"
    ),
    any_of(", smiling|, sad|, surprised|, neutral|"),
    any_of(
        ", blue|, green|, pink|, grey|, yellow|, dark|, striped blue|, striped green"
        "|, striped pink|, plain grey|, striped yellow|, striped dark"
    ),
    any_of(
        " background, red shirt| background, green shirt| background, blue shirt"
        "| background, yellow shirt| background, white shirt| background, black shirt"
        "| background, purple shirt| background, orange shirt| background"
    ),
    any_of(
        "|, wearing a red hat|, wearing a blue hat|, wearing a white hat|, wearing a black hat"
        "|, wearing a green hat|, wearing a yellow hat|, holding a red cup|, holding a blue cup"
        "|, holding a white cup|, holding a green cup|, holding an orange cup"
        "|, with a black cat|, with a white cat|, with an orange cat|, with a purple cat"
        "|, holding a red flower|, holding a yellow flower|, holding a purple flower"
        "|, holding a blue flower"
    ),
)


@dataclass(frozen=True)
class CaptionWorld:
    """Word lists whose combinations are captions: one list for each place."""

    parts: tuple[tuple[str, ...], ...]

    @property
    def size(self) -> int:
        """Number of distinct captions."""
        return math.prod(len(part) for part in self.parts)

    def caption(self, number: int) -> str:
        """Caption of a number in [0, size)."""
        words = []
        for part in self.parts:
            number, index = divmod(number, len(part))
            words.append(part[index])
        return " ".join(" ".join(words).split()).replace(" ,", ",")


WORLDS = {
    "general": CaptionWorld(_GENERAL),
    "demo": CaptionWorld(_PORTRAITS),
}
"""`general` for SDXL: things, places, looks. `demo`: the captions of the demo world."""


def captions(count: int, world: str = "general", seed: int = 0) -> Sequence[str]:
    """Distinct captions, the same ones for the same arguments everywhere.

    Args:
        count: how many, up to the size of the world.
        world: a name of WORLDS.
        seed: another one gives another selection.

    Raises:
        ConfigError: an unknown world, or more captions than it has.
    """
    if world not in WORLDS:
        raise ConfigError(f"Unknown captions {world!r}; there are {', '.join(WORLDS)}.")
    size = WORLDS[world].size
    if not 1 <= count <= size:
        raise ConfigError(f"The {world} captions are {size}; {count} were asked for.")
    # A step that is prime to the size visits every number once, far apart from each other.
    step = int(size * 0.6180339887) | 1
    while math.gcd(step, size) != 1:
        step += 2
    start = (seed * 7_919 + 17) % size
    return [WORLDS[world].caption((start + k * step) % size) for k in range(count)]
