"""The report of an evaluation as one HTML page beside its pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from .report import Interval

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em; color: #222; background: #fff; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: .25em .6em; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
td small { color: #777; display: block; }
.people { overflow-x: auto; }
.people img { width: 112px; height: 112px; object-fit: cover; display: block; }
.people td, .people th { padding: 2px; text-align: center; max-width: 112px; font-size: 12px; }
"""

Cells = Mapping[str, Mapping[str, Sequence[Path | None]]]
"""Person to row to pictures in the order of the prompts."""


def html_page(
    title: str,
    table: Mapping[str, Mapping[str, Interval | float]],
    notes: Sequence[str],
    prompts: Sequence[str],
    pictures: Cells,
) -> str:
    """The page.

    Args:
        title: heading.
        table: row to column to number, with its interval where it has one.
        notes: sentences below the table.
        prompts: headings of the columns of pictures.
        pictures: paths relative to the page; None leaves a place empty.
    """
    columns = list(dict.fromkeys(name for row in table.values() for name in row))
    head = "".join(f"<th>{escape(name)}</th>" for name in ("", *columns))
    lines = [
        f"<tr><td>{escape(name)}</td>{''.join(_cell(row.get(c)) for c in columns)}</tr>"
        for name, row in table.items()
    ]
    said = "".join(f"<li>{escape(note)}</li>" for note in notes)
    people = [_person(name, rows, prompts) for name, rows in pictures.items()]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}'
        f"</title><style>{STYLE}</style></head><body>\n<h1>{escape(title)}</h1>\n"
        f"<table><tr>{head}</tr>\n{chr(10).join(lines)}\n</table>\n<ul>{said}</ul>\n"
        f"{chr(10).join(people)}\n</body></html>\n"
    )


def _cell(value: Interval | float | None) -> str:
    """A number of the table, its interval below."""
    number = value.value if isinstance(value, Interval) else value
    if number is None or number != number:
        return "<td>–</td>"
    if not isinstance(value, Interval):
        return f"<td>{number:.{0 if number.is_integer() else 3}f}</td>"
    return f"<td>{number:.3f}<small>{value.low:.3f} to {value.high:.3f}</small></td>"


def _person(name: str, rows: Mapping[str, Sequence[Path | None]], prompts: Sequence[str]) -> str:
    """A person: one line a row, one column a prompt."""
    head = "".join(f"<th>{escape(prompt)}</th>" for prompt in ("", *prompts))
    lines = []
    for row, paths in rows.items():
        cells = "".join(f"<td>{'' if path is None else _image(path)}</td>" for path in paths)
        lines.append(f"<tr><td>{escape(row)}</td>{cells}</tr>")
    table = f"<table><tr>{head}</tr>\n{chr(10).join(lines)}\n</table>"
    return f'<h2>{escape(name)}</h2>\n<div class="people">{table}</div>'


def _image(path: Path) -> str:
    """A picture, read when it comes into sight."""
    return f'<img loading="lazy" alt="{escape(path.stem)}" src="{quote(path.as_posix())}">'
