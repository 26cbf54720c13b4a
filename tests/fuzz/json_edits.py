"""Edits of JSON documents: other values, other shapes, other sizes.

An edit takes the bytes of a document and a random generator and returns other bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

DEEP, DIGITS, HUGE = "@deep@", "@digits@", "@huge@"
RAW = {DEEP: "[" * 100_000 + "]" * 100_000, DIGITS: "9" * 5000, HUGE: "1" + "0" * 4000}
"""What Python's writer refuses to write, by the text that stands for it."""

HOSTILE_KEYS = (
    "",
    "\ud800",
    "x" * 5000,
    "a\nb",
    "\0",
    "../../x",
    "__class__",
    "self",
    "C:\\x",
    "é" * 300,
)
HOSTILE_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 0.5, 1e300, -1e-300, 2**31, 2**63, 2**64, 10**30, float("nan"),
    float("inf"), "", "x", "\ud800", "x" * 5000, "\0", "a\nb", "../../x", "/etc/passwd", "1", "nan",
    [], {}, [[]], [None], [0], {"a": {}}, [1, 2], "CON", DEEP, DIGITS, HUGE, 65537, 4096,
)  # fmt: skip


def dump(value: object) -> bytes:
    """The document as ASCII, with what `RAW` stands for."""
    text = json.dumps(value)
    for sign, raw in RAW.items():
        text = text.replace(f'"{sign}"', raw)
    return text.encode()


def _places(value: Any, limit: int = 400) -> list[tuple[Any, Any]]:
    """Container and key of every value inside, breadth first."""
    places: list[tuple[Any, Any]] = []
    row = [value]
    while row and len(places) < limit:
        after = []
        for container in row:
            keys = container.keys() if isinstance(container, dict) else range(len(container))
            places += [(container, key) for key in keys]
            inner = [container[key] for key in keys]
            after += [v for v in inner if isinstance(v, dict | list)]
        row = after
    return places


def _on_document(change: Callable[[Any, Random], Any]) -> Callable[[bytes, Random], bytes]:
    """An edit of the parsed document."""

    def edit(content: bytes, rng: Random) -> bytes:
        try:
            value = change(json.loads(content), rng)
            return dump(value)
        except (ValueError, TypeError, AttributeError, RecursionError):
            return content

    return edit


def _on_place(change: Callable[[Any, Any, Random], object]) -> Callable[[bytes, Random], bytes]:
    """An edit of one value inside, by its container and key."""

    def one(document: Any, rng: Random) -> Any:
        places = _places(document)
        if places:
            change(*rng.choice(places), rng)
        return document

    return _on_document(one)


def _replace(container: Any, key: Any, rng: Random) -> None:
    container[key] = rng.choice(HOSTILE_VALUES)


def _retype(container: Any, key: Any, rng: Random) -> None:
    """A value of the same meaning and another type."""
    value = container[key]
    container[key] = rng.choice([str(value), [value], {"value": value}, bool(value), repr(value)])


def _scale(container: Any, key: Any, rng: Random) -> None:
    """Another number, another length of a text or list."""
    value = container[key]
    if isinstance(value, bool) or value is None:
        container[key] = not value
    elif isinstance(value, int | float):
        container[key] = rng.choice(
            [-value, value + 1, 2 * value, value * 1000, value / 3, value * 10**9]
        )
    elif isinstance(value, str | list):
        container[key] = rng.choice([value[:-1], value * 2, value[::-1], value * 300])
    else:
        container[key] = {**value, rng.choice(HOSTILE_KEYS): 1}


def _drop(container: Any, key: Any, rng: Random) -> None:
    del container[key]


def _rename(container: Any, key: Any, rng: Random) -> None:
    if isinstance(container, dict):
        container[rng.choice(HOSTILE_KEYS)] = container.pop(key)
    else:
        container.append(container[key])


def _exchange(document: Any, rng: Random) -> Any:
    """Two values change places."""
    places = _places(document)
    if len(places) > 1:
        (a, i), (b, j) = rng.sample(places, 2)
        a[i], b[j] = b[j], a[i]
    json.dumps(document)  # a circle is no document
    return document


def _crowd(document: Any, rng: Random) -> Any:
    """A table or a list of hundreds or many thousands."""
    places = [document, *(c[k] for c, k in _places(document))]
    containers = [p for p in places if isinstance(p, dict | list)]
    if not containers:
        return document
    container = rng.choice(containers)
    filler = rng.choice(
        [0, {}, "x", container[-1] if isinstance(container, list) and container else 1]
    )
    count = rng.choice([100, 100, 100, 20_000])
    if isinstance(container, list):
        container.extend([filler] * count)
    else:
        container.update({f"k{n}": filler for n in range(count)})
    return document


def _top(document: Any, rng: Random) -> Any:
    """Something else instead of the whole document."""
    return rng.choice([*HOSTILE_VALUES, [document], {"document": document}, json.dumps(document)])


JSON_EDITS: dict[str, Callable[[bytes, Random], bytes]] = {
    "replace": _on_place(_replace),
    "retype": _on_place(_retype),
    "scale": _on_place(_scale),
    "drop": _on_place(_drop),
    "rename": _on_place(_rename),
    "exchange": _on_document(_exchange),
    "crowd": _on_document(_crowd),
    "top": _on_document(_top),
}
