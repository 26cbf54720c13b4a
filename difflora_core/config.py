"""Frozen configuration records, and the one strict reader of JSON texts."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from .errors import ConfigError, DiffLoRAError, counted, described, shown
from .limits import INTEGER_DIGITS, JSON_BYTES, JSON_DEPTH

if TYPE_CHECKING:
    from typing_extensions import Self


class Config:
    """Base of frozen configuration dataclasses: `to_json`, `from_json`, strict about fields."""

    def check_choices(self, where: str) -> None:
        """Raises ConfigError where a field annotated as Literal holds another value."""
        for name, hint in typing.get_type_hints(type(self)).items():
            if typing.get_origin(hint) is Literal:
                _choice(hint, getattr(self, name), f"{where}: {name}")

    def to_dict(self) -> dict[str, Any]:
        """Returns nested plain dictionaries, lists and numbers.

        Raises:
            ConfigError: the class is not a dataclass.
        """
        if not dataclasses.is_dataclass(self):
            raise ConfigError(f"{type(self).__name__} is not a dataclass.")
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """Returns the configuration as one JSON string with sorted keys."""
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Builds the record from what `to_dict` returned.

        Raises:
            ConfigError: an unknown field, or a value of the wrong type or range.
        """
        return build(cls, data, cls.__name__)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads `to_json`'s string.

        Raises:
            ConfigError: not JSON, an unknown field, or a value of the wrong type or range.
        """
        return cls.from_dict(parse_json(text, f"{cls.__name__}: the settings"))


def parse_json(
    text: str | bytes,
    what: str,
    error: type[DiffLoRAError] = ConfigError,
    most: int = JSON_BYTES,
) -> Any:
    """Reads a JSON text that nobody vouches for.

    Args:
        text: the text, or its bytes in UTF-8.
        what: what it is, to begin the message with: "x.json".
        error: raised when something is wrong.
        most: bytes (or characters) that it may have.

    Returns:
        Lists, tables, texts that can be encoded, finite floats, integers of a few digits.

    Raises:
        DiffLoRAError: as `error`: too long or too deep, no JSON, not UTF-8, a key twice, NaN or
            infinity, an integer of too many digits, or half a character (a lone surrogate).
    """
    if len(text) > most:
        raise error(f"{what} is too long: more than {most} bytes.")
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        data = json.loads(
            text, object_pairs_hook=_unique, parse_int=_integer, parse_constant=_no_number
        )
        _check_values(data)
    except RecursionError as damage:
        raise error(f"{what} is damaged: it is nested too deeply.") from damage
    except ValueError as damage:
        raise error(f"{what} is damaged: it is not valid JSON ({damage}).") from damage
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON table whose keys are unique."""
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key stands there twice")
    return table


def _integer(digits: str) -> int:
    """A JSON integer of a length that costs nothing."""
    if len(digits.lstrip("-")) > INTEGER_DIGITS:
        raise ValueError(f"a number has more than {INTEGER_DIGITS} digits")
    return int(digits)


def _no_number(name: str) -> float:
    """Refuses NaN and the infinities, which JSON does not know and Python would accept."""
    raise ValueError(f"{name} is no number")


def _check_values(data: Any) -> None:
    """Raises ValueError for depth, half characters, and floats too large for 64 bits."""
    level = [data]
    for _ in range(JSON_DEPTH):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += value.keys()
                below += value.values()
            elif isinstance(value, list):
                below += value
            elif isinstance(value, str):
                value.encode("utf-8")  # UnicodeEncodeError is a ValueError
            elif isinstance(value, float) and not math.isfinite(value):
                raise ValueError("a number is too large")
        level = below
        if not level:
            return
    raise ValueError(f"it is nested more than {JSON_DEPTH} deep")


def check_range(where: str, name: str, value: float, low: float, high: float) -> None:
    """Raises ConfigError unless low <= value <= high (and value is finite)."""
    if not (math.isfinite(value) and low <= value <= high):
        raise ConfigError(f"{where}: {name} is {value}; it must lie in {low} to {high}.")


def check_ranges(where: str, settings: object, low: float, high: float, *names: str) -> None:
    """`check_range` for several fields of a record."""
    for name in names:
        check_range(where, name, getattr(settings, name), low, high)


def build(kind: Any, data: Any, where: str) -> Any:
    """Plain data as the annotated type: a dataclass of any kind, or what its fields may be.

    Args:
        kind: the type.
        data: what `parse_json` gave.
        where: what it is, for messages.

    Raises:
        ConfigError: an unknown field, or a value of the wrong type.
    """
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _build_record(kind, data, where)
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        if data is None and type(None) in typing.get_args(kind):
            return None
        real = [option for option in typing.get_args(kind) if option is not type(None)]
        return build(real[0], data, where)
    if origin is Literal:
        return _choice(kind, data, where)
    if origin is tuple:
        return _build_tuple(typing.get_args(kind), data, where)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(data, Mapping):
            raise ConfigError(f"{where}: expected a table, got {type(data).__name__}.")
        names, values = typing.get_args(kind)
        return {build(names, k, where): build(values, v, f"{where}.{k}") for k, v in data.items()}
    if kind is Any:
        return data
    if kind is float and type(data) in (int, float):
        return _number(data, where)
    if isinstance(data, bool) is not (kind is bool) or not isinstance(data, kind):
        raise ConfigError(f"{where}: expected {kind.__name__}, got {described(data)}.")
    return data


def _number(data: float, where: str) -> float:
    """A finite float."""
    try:
        number = float(data)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ConfigError(f"{where}: expected a finite number, got {described(data)}.")
    return number


def _choice(kind: Any, data: Any, where: str) -> Any:
    """One of the values of a Literal."""
    known = typing.get_args(kind)
    if not any(data == value and type(data) is type(value) for value in known):
        listed = ", ".join(str(value) for value in known)
        raise ConfigError(f"{where}: unknown value {described(data)}; use one of {listed}.")
    return data


def _build_tuple(kinds: tuple[Any, ...], data: Any, where: str) -> tuple[Any, ...]:
    """`tuple[X, ...]` of any length, `tuple[X, Y]` of just these."""
    if not isinstance(data, list | tuple):
        raise ConfigError(f"{where}: expected a list, got {type(data).__name__}.")
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(data)
    if len(kinds) != len(data):
        raise ConfigError(f"{where}: expected {counted(len(kinds), 'value')}, got {len(data)}.")
    return tuple(build(kind, item, where) for kind, item in zip(kinds, data, strict=True))


def _build_record(kind: type, data: Any, where: str) -> Any:
    """Builds one dataclass from a dictionary."""
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected a group of settings, got {type(data).__name__}.")
    hints = typing.get_type_hints(kind)
    names = {field.name for field in dataclasses.fields(kind)}
    unknown = sorted(shown(str(key)) for key in set(data) - names)
    if unknown:
        raise ConfigError(f"{where}: unknown settings {', '.join(unknown[:8])}.")
    values = {key: build(hints[key], value, f"{where}.{key}") for key, value in data.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}.") from error
