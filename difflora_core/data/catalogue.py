"""What is known of the pictures of a source: a database with a row a picture, safe against kills.

SQLite keeps it on disk, so a million pictures need no more memory than ten, and a transaction is
there as a whole or not at all. One process writes. What was found out stands under the digest of
the picture's bytes and the settings it was found with: the time of a file does not count.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..config import parse_json
from ..errors import DatasetError, shown
from .looks import Look, SeenFace
from .sources import Entry

_TABLES = """
CREATE TABLE IF NOT EXISTS picture(
    key TEXT PRIMARY KEY, place BLOB, person TEXT, repeats INTEGER, captions TEXT, refused TEXT,
    run INTEGER, looked INTEGER DEFAULT 0, settings TEXT DEFAULT '', digest TEXT DEFAULT '',
    reason TEXT DEFAULT '', height INTEGER DEFAULT 0, width INTEGER DEFAULT 0,
    hash BLOB DEFAULT x'') WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS named ON picture(person, key);
CREATE TABLE IF NOT EXISTS face(
    key TEXT, number INTEGER, embedding BLOB, geometry BLOB, PRIMARY KEY(key, number)
    ) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS choice(
    key TEXT PRIMARY KEY, person TEXT, face INTEGER, likeness REAL, kind TEXT, reason TEXT
    ) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS chosen ON choice(person, key);
CREATE TABLE IF NOT EXISTS caption(
    digest TEXT, command TEXT, text TEXT, PRIMARY KEY(digest, command)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS shard(number INTEGER PRIMARY KEY, plan TEXT, file TEXT);
CREATE TABLE IF NOT EXISTS fact(name TEXT PRIMARY KEY, value INTEGER) WITHOUT ROWID;
"""
_BATCH = 1000


@dataclass(frozen=True)
class Changes:
    """How a source differs from what it was at the last run that listed all of it."""

    added: int = 0
    changed: int = 0
    gone: int = 0

    def __str__(self) -> str:
        return f"{self.added} new, {self.changed} changed, {self.gone} gone"

    @property
    def any(self) -> bool:
        """Whether there are any."""
        return bool(self.added or self.changed or self.gone)


@dataclass(frozen=True)
class Known:
    """A picture of the list, and what is known of it.

    Attributes:
        key, place, person, repeats, captions: see `Entry`.
        refused: why it is not even opened; empty otherwise.
        settings: what it was looked at with; empty if never.
        look: what was found; its digest is empty if never.
    """

    key: str
    place: bytes
    person: str
    repeats: int
    captions: tuple[str, ...]
    refused: str
    settings: str
    look: Look


@dataclass(frozen=True)
class Choice:
    """What becomes of a picture: whom it shows, by which face; or why it is left out.

    Attributes:
        key: of the picture.
        person: the name; empty where it is left out and nobody was recognised.
        face: number of the face among those of the picture; -1 without one.
        likeness: see `PreparedPicture`.
        kind: of the reason, in a word for counts: "unreadable"; empty where it is kept.
        reason: why it is left out; empty where it is kept.
    """

    key: str
    person: str
    face: int = -1
    likeness: float = 1.0
    kind: str = ""
    reason: str = ""


class Catalogue:
    """The database of one dataset.

    Args:
        path: its file; it is made when missing.

    Raises:
        DatasetError: it cannot be opened or written, or is damaged; also from every method.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._telling():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(_TABLES)
            # Readers of their own see the state before a transaction, whole, while it runs.
            self._reader = sqlite3.connect(path)

    def close(self) -> None:
        """Lets go of the file."""
        self._reader.close()
        self._db.close()

    def start_run(self) -> int:
        """The number of a new run, above all before."""
        with self.writing():
            self.set_fact("run", self.fact("run") + 1)
        return self.fact("run")

    def fact(self, name: str) -> int:
        """A number that was kept, 0 if never."""
        found = self._rows("SELECT value FROM fact WHERE name=?", name)
        return int(found[0][0]) if found else 0

    def set_fact(self, name: str, value: int) -> None:
        """Keeps a number; inside `writing`."""
        self._db.execute("INSERT OR REPLACE INTO fact VALUES(?, ?)", (name, value))

    def list_entries(self, entries: Iterable[Entry], run: int) -> Changes:
        """Takes up what a source lists, and forgets what it lists no more.

        Returns:
            New entries and those that are gone; changed contents show when they are looked at.
        """
        added = 0
        for batch in _batches(entries):
            with self.writing():
                added += sum(self._list(entry, run) for entry in batch)
        with self.writing():
            gone = self._db.execute("DELETE FROM picture WHERE run<>?", (run,)).rowcount
            self._db.execute("DELETE FROM face WHERE key NOT IN (SELECT key FROM picture)")
        return Changes(added=added, gone=gone)

    def _list(self, entry: Entry, run: int) -> bool:
        """Takes up one entry; whether it is new."""
        found = self._db.execute("SELECT run FROM picture WHERE key=?", (entry.key,)).fetchone()
        values = (entry.place, entry.person, entry.repeats, json.dumps(entry.captions))
        if found is None:
            self._db.execute(
                "INSERT INTO picture(place, person, repeats, captions, refused, run, key)"
                " VALUES(?, ?, ?, ?, ?, ?, ?)",
                (*values, entry.refused, run, entry.key),
            )
            return True
        refused = "it is listed twice" if found[0] == run else entry.refused
        self._db.execute(
            "UPDATE picture SET place=?, person=?, repeats=?, captions=?, refused=?, run=?"
            " WHERE key=?",
            (*values, refused, run, entry.key),
        )
        return False

    def unseen(self, run: int, count: int) -> Iterator[list[Known]]:
        """Pictures that were not looked at in this run, in batches and in the order of their keys.

        What is looked at meanwhile does not come again.
        """
        after = ""
        while True:
            rows = self._rows(
                "SELECT * FROM picture WHERE key>? AND looked<>? AND refused='' ORDER BY key"
                " LIMIT ?",
                *(after, run, count),
            )
            if not rows:
                return
            after = rows[-1]["key"]
            yield [_known(row) for row in rows]

    def keep_looks(self, looks: Sequence[tuple[str, Look]], settings: str, run: int) -> int:
        """Keeps what was found in pictures; returns how many of them have changed since."""
        changed = 0
        with self.writing():
            for key, look in looks:
                digest, before = self._db.execute(
                    "SELECT digest, settings FROM picture WHERE key=?", (key,)
                ).fetchone()
                changed += bool(digest) and digest != look.digest
                if not look.digest or (digest, before) != (look.digest, settings):
                    self._keep_look(key, look, settings)
                self._db.execute("UPDATE picture SET looked=? WHERE key=?", (run, key))
        return changed

    def _keep_look(self, key: str, look: Look, settings: str) -> None:
        """Writes what was found in one picture."""
        self._db.execute(
            "UPDATE picture SET settings=?, digest=?, reason=?, height=?, width=?, hash=?"
            " WHERE key=?",
            (settings, look.digest, look.reason, look.height, look.width, look.hash, key),
        )
        self._db.execute("DELETE FROM face WHERE key=?", (key,))
        self._db.executemany(
            "INSERT INTO face VALUES(?, ?, ?, ?)",
            [(key, n, face.embedding, face.geometry) for n, face in enumerate(look.faces)],
        )

    def known(self, key: str) -> Known:
        """What is known of one picture."""
        return _known(self._rows("SELECT * FROM picture WHERE key=?", key)[0])

    def pictures(self, where: str = "", *values: object) -> Iterator[Known]:
        """What is known of all pictures, or of those that fulfil a condition, in order of keys."""
        for row in self._stream(f"SELECT * FROM picture {where} ORDER BY key", *values):
            yield _known(row)

    def faces(self, key: str) -> list[SeenFace]:
        """The faces of a picture."""
        query = "SELECT embedding, geometry FROM face WHERE key=? ORDER BY number"
        return [SeenFace(row["embedding"], row["geometry"]) for row in self._rows(query, key)]

    def named(self) -> list[str]:
        """Everybody whom the source names."""
        query = "SELECT DISTINCT person FROM picture WHERE person<>'' ORDER BY person"
        return [row["person"] for row in self._rows(query)]

    def choose(self, choices: Iterable[Choice]) -> None:
        """Replaces all choices, in one transaction."""
        with self.writing():
            self._db.execute("DELETE FROM choice")
            self._db.executemany(
                "INSERT INTO choice VALUES(:key, :person, :face, :likeness, :kind, :reason)",
                (vars(choice) for choice in choices),
            )

    def update_choices(self, choices: Iterable[Choice]) -> None:
        """Replaces some choices, in one transaction."""
        with self.writing():
            self._db.executemany(
                "INSERT OR REPLACE INTO choice"
                " VALUES(:key, :person, :face, :likeness, :kind, :reason)",
                (vars(choice) for choice in choices),
            )

    def choices(self, where: str = "", *values: object, most: int = -1) -> Iterator[Choice]:
        """Choices that fulfil a condition, by person and key; not more than `most`, if given."""
        query = f"SELECT * FROM choice {where} ORDER BY person, key LIMIT ?"
        for row in self._stream(query, *values, most):
            yield Choice(**dict(row))

    def by_losses(self, most: int) -> list[str]:
        """Names of people: those first of whom most pictures were left out."""
        query = (
            "SELECT person, SUM(kind<>'') AS gone FROM choice GROUP BY person"
            " ORDER BY gone DESC, person LIMIT ?"
        )
        return [row["person"] for row in self._rows(query, most)]

    def count_of(self, person: str) -> tuple[int, int]:
        """How many pictures of a person are kept and how many left out."""
        query = "SELECT SUM(kind=''), SUM(kind<>'') FROM choice WHERE person=?"
        kept, gone = self._rows(query, person)[0]
        return kept, gone

    def counts(self) -> dict[str, int]:
        """Number of pictures, and how many were left out for which kind of reason."""
        total = self._rows("SELECT COUNT(*) FROM picture")[0][0]
        rows = self._rows(
            "SELECT kind, COUNT(*) FROM choice WHERE kind<>'' GROUP BY kind ORDER BY kind"
        )
        return {"pictures": total, **{row[0]: row[1] for row in rows}}

    def kept(self) -> int:
        """How many pictures are kept."""
        return int(self._rows("SELECT COUNT(*) FROM choice WHERE kind=''")[0][0])

    def people(self) -> int:
        """How many people are kept."""
        query = "SELECT COUNT(DISTINCT person) FROM choice WHERE kind=''"
        return int(self._rows(query)[0][0])

    def caption(self, digest: str, command: str) -> str:
        """The caption that a command gave for a picture, empty if never."""
        rows = self._rows("SELECT text FROM caption WHERE digest=? AND command=?", digest, command)
        return rows[0]["text"] if rows else ""

    def keep_captions(self, captions: Iterable[tuple[str, str, str]]) -> None:
        """Keeps captions: digest of the picture, command, caption."""
        with self.writing():
            self._db.executemany("INSERT OR REPLACE INTO caption VALUES(?, ?, ?)", captions)

    def shard(self, number: int) -> tuple[str, str]:
        """The plan that a shard was written by and what is known of its file; empty if never."""
        rows = self._rows("SELECT plan, file FROM shard WHERE number=?", number)
        return (rows[0]["plan"], rows[0]["file"]) if rows else ("", "")

    def keep_shard(self, number: int, plan: str, file: str) -> None:
        """Keeps that a shard is written."""
        with self.writing():
            self._db.execute("INSERT OR REPLACE INTO shard VALUES(?, ?, ?)", (number, plan, file))

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A transaction: all of it or nothing."""
        with self._telling():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def _rows(self, query: str, *values: object) -> list[sqlite3.Row]:
        """All rows of a query that has few."""
        return list(self._stream(query, *values))

    def _stream(self, query: str, *values: object) -> Iterator[sqlite3.Row]:
        """Rows of a query, one after the other."""
        with self._telling():
            cursor = self._reader.cursor()
            cursor.row_factory = sqlite3.Row
            yield from cursor.execute(query, values)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Turns what goes wrong with the file into a sentence."""
        try:
            yield
        except (sqlite3.Error, OSError) as failure:
            raise DatasetError(
                f"{shown(str(self.path), 300)} cannot be used: {failure}. Free space on the disk; "
                "if the file is damaged, delete its folder and prepare again."
            ) from failure


def _known(row: sqlite3.Row) -> Known:
    """A row of `picture`; its faces are read on their own."""
    look = Look(row["digest"], row["reason"], row["height"], row["width"], row["hash"])
    captions = tuple(parse_json(row["captions"], "the captions", DatasetError))
    return Known(
        row["key"], row["place"], row["person"], row["repeats"], captions, row["refused"],
        row["settings"], look,
    )  # fmt: skip


def _batches(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Entries in lists of a few."""
    batch: list[Entry] = []
    for entry in entries:
        batch.append(entry)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    yield batch
