"""The baselines. Another one is a file and a line here.

Those that are trained once, name to class; and those that learn each person, which make their own
rows: of artefacts, people and the steps of the budget those that are wanted, see `rows.wanted_row`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from ..artefacts import Artefacts
from ..people import People
from ..rows import Row
from . import hyperdreambooth, textual_inversion
from .base import Baseline
from .instantid import InstantID
from .ip_adapter import IPAdapter
from .photomaker import PhotoMaker

BASELINES: Mapping[str, type[Baseline]] = {
    "IP-Adapter": IPAdapter,
    "PhotoMaker": PhotoMaker,
    "InstantID": InstantID,
}

PersonalRows = Callable[[Artefacts, People, int, Sequence[str] | None], Iterator[Row]]
PERSONAL: Sequence[PersonalRows] = (textual_inversion.rows, hyperdreambooth.rows)
