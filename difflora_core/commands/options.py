"""The words of a command line to a command's settings, and files of settings.

The options are the fields of the record: a field without a default stands without a name, in order;
the others are `--name value`. `--config FILE` gives values in JSON; words on the line win.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from ..config import Config, build, parse_json
from ..errors import ConfigError, shown

FILE_OPTION = "--config"
ABOUT_FILES = "--config FILE takes settings from a JSON file; what the line says wins."

S = TypeVar("S", bound=Config)


def read_settings(kind: type[S], words: Sequence[str], program: str) -> S:
    """A command's settings.

    Args:
        kind: the record, a dataclass.
        words: of the command line, after the command's name.
        program: how the command is called, for `--help`.

    Raises:
        ConfigError: tyro is not installed, the file of settings cannot be used, or a value is out
            of range.
        SystemExit: help was asked for (0), or an option is unknown, missing or no such value (2).
    """
    try:
        import tyro
    except ImportError as error:
        raise ConfigError(
            "The command line needs the package tyro. Run: pip install 'difflora[train]'"
        ) from error
    rest = list(words)
    given: dict[str, Any] = {}
    while (file := _taken(rest)) is not None:
        given |= _read(kind, Path(file))
    line: Any = tyro.cli(
        _line(kind, given), args=rest, prog=program, description=f"{_summary(kind)}\n{ABOUT_FILES}"
    )
    return kind(**{field.name: getattr(line, field.name) for field in dataclasses.fields(line)})


def _taken(words: list[str]) -> str | None:
    """The file that the first `--config` names; both words are taken out."""
    for number, word in enumerate(words):
        if word.startswith(f"{FILE_OPTION}="):
            return words.pop(number).partition("=")[2]
        if word == FILE_OPTION:
            if number + 1 == len(words):
                raise ConfigError(f"{FILE_OPTION} needs the name of a file after it.")
            words.pop(number)
            return words.pop(number)
    return None


def _read(kind: type[Config], path: Path) -> dict[str, Any]:
    """The values of a file by field; groups of settings are completed from the defaults.

    Raises:
        ConfigError: it cannot be read, names an unknown setting, or holds a wrong value.
    """
    try:
        data = parse_json(path.read_bytes(), shown(path.name))
    except OSError as error:
        raise ConfigError(f"{shown(str(path), 300)} cannot be read: {error.strerror}.") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{shown(path.name)} is no table of settings.")
    own = {field.name: field for field in _fields(kind)}
    if unknown := sorted(shown(name) for name in data.keys() - own.keys()):
        raise ConfigError(
            f"{shown(path.name)}: unknown settings {', '.join(unknown[:8])}; there are "
            f"{', '.join(own)}."
        )
    hints = typing.get_type_hints(kind)
    return {
        name: build(hints[name], _completed(own[name], value), f"{shown(path.name)}: {name}")
        for name, value in data.items()
    }


def _completed(field: dataclasses.Field[Any], value: Any) -> Any:
    """A value of a file, with a group's other settings as the command has them."""
    default = _default(field)
    if isinstance(default, Config) and isinstance(value, dict):
        return _merged(default.to_dict(), value)
    return value


def _merged(default: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A table with the given values in place of its own, group in group."""
    groups = {
        name: _merged(default[name], value)
        for name, value in given.items()
        if isinstance(value, dict) and isinstance(default.get(name), dict)
    }
    return {**default, **given, **groups}


def _line(kind: type[Config], given: Mapping[str, Any]) -> type[Any]:
    """The record as tyro is to read it: files' values as defaults, what has none by its place."""
    import tyro

    positional: Any = tyro.conf.Positional
    hints, fields = typing.get_type_hints(kind), []
    for field in _fields(kind):
        hint: Any = hints[field.name]
        default = _default(field)
        if default is dataclasses.MISSING:
            name = tyro.conf.arg(metavar=field.name.upper())
            hint = Annotated[positional[hint], name]
        default = given.get(field.name, default)
        fields.append((field.name, hint, dataclasses.field(default=default, kw_only=True)))
    line = dataclasses.make_dataclass(kind.__name__, fields, frozen=True)
    line.__doc__ = _described(kind)
    return line


def _described(kind: type[Config]) -> str:
    """A docstring with the fields of the record and of those that it extends."""
    docs = [inspect.cleandoc(each.__dict__.get("__doc__") or "") for each in kind.__mro__]
    parts = [doc.partition("Args:\n")[2].partition("\n\n")[0] for doc in docs]
    return "\n".join([_summary(kind), "", "Args:", *filter(None, parts)])


def _fields(kind: type[Config]) -> tuple[dataclasses.Field[Any], ...]:
    """The fields of a record."""
    return dataclasses.fields(kind)  # type: ignore[arg-type]


def _default(field: dataclasses.Field[Any]) -> Any:
    """A field's default; MISSING where it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _summary(kind: type[Config]) -> str:
    """What a record's docstring says before its fields."""
    return (inspect.getdoc(kind) or "").partition("Args:")[0].strip()
