"""Frozen configuration records and their strict JSON form."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from .errors import ConfigError

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
        built = _build(cls, data, cls.__name__)
        if not isinstance(built, cls):
            raise ConfigError(f"{cls.__name__}: expected a configuration, got {built!r}.")
        return built

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads `to_json`'s string.

        Raises:
            ConfigError: not JSON, an unknown field, or a value of the wrong type or range.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{cls.__name__}: the settings are not valid JSON.") from error
        return cls.from_dict(data)


def check_range(where: str, name: str, value: float, low: float, high: float) -> None:
    """Raises ConfigError unless low <= value <= high (and value is finite)."""
    if not (math.isfinite(value) and low <= value <= high):
        raise ConfigError(f"{where}: {name} is {value}; it must lie in {low} to {high}.")


def check_ranges(where: str, settings: object, low: float, high: float, *names: str) -> None:
    """`check_range` for several fields of a record."""
    for name in names:
        check_range(where, name, getattr(settings, name), low, high)


def _build(kind: Any, data: Any, where: str) -> Any:
    """Converts plain data to the annotated type, or raises ConfigError."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _build_record(kind, data, where)
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        if data is None and type(None) in typing.get_args(kind):
            return None
        real = [option for option in typing.get_args(kind) if option is not type(None)]
        return _build(real[0], data, where)
    if origin is Literal:
        return _choice(kind, data, where)
    if origin is tuple:
        return _build_tuple(typing.get_args(kind), data, where)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(data, Mapping):
            raise ConfigError(f"{where}: expected a table, got {type(data).__name__}.")
        names, values = typing.get_args(kind)
        return {_build(names, k, where): _build(values, v, f"{where}.{k}") for k, v in data.items()}
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if isinstance(data, bool) is not (kind is bool) or not isinstance(data, kind):
        raise ConfigError(f"{where}: expected {kind.__name__}, got {data!r}.")
    return data


def _choice(kind: Any, data: Any, where: str) -> Any:
    """One of the values of a Literal."""
    known = typing.get_args(kind)
    if not any(data == value and type(data) is type(value) for value in known):
        listed = ", ".join(str(value) for value in known)
        raise ConfigError(f"{where}: unknown value {data!r}; use one of {listed}.")
    return data


def _build_tuple(kinds: tuple[Any, ...], data: Any, where: str) -> tuple[Any, ...]:
    """`tuple[X, ...]` of any length, `tuple[X, Y]` of just these."""
    if not isinstance(data, list | tuple):
        raise ConfigError(f"{where}: expected a list, got {type(data).__name__}.")
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(data)
    if len(kinds) != len(data):
        raise ConfigError(f"{where}: expected {len(kinds)} values, got {len(data)}.")
    return tuple(_build(kind, item, where) for kind, item in zip(kinds, data, strict=True))


def _build_record(kind: type, data: Any, where: str) -> Any:
    """Builds one dataclass from a dictionary."""
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected a group of settings, got {type(data).__name__}.")
    hints = typing.get_type_hints(kind)
    names = {field.name for field in dataclasses.fields(kind)}
    unknown = sorted(str(key) for key in set(data) - names)
    if unknown:
        raise ConfigError(f"{where}: unknown settings {', '.join(unknown[:8])}.")
    values = {key: _build(hints[key], value, f"{where}.{key}") for key, value in data.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}.") from error
