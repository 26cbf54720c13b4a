"""The baselines that are trained once: name to class. Another one is a file and a line here."""

from __future__ import annotations

from collections.abc import Mapping

from .base import Baseline
from .instantid import InstantID
from .ip_adapter import IPAdapter
from .photomaker import PhotoMaker

BASELINES: Mapping[str, type[Baseline]] = {
    "IP-Adapter": IPAdapter,
    "PhotoMaker": PhotoMaker,
    "InstantID": InstantID,
}
