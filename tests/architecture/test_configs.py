"""Every record of settings is a strict Config: through JSON and back, nothing else is taken."""

import ast
import math
import types
import typing
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from pathlib import Path

import pytest

from difflora_core.config import Config
from difflora_core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
ENDINGS = ("Config", "Settings", "Options", "Training", "Recipe")
REQUIRED = {int: 8, float: 0.5, str: "text"}
"""Values for fields without a default, by type."""


def bases(node: ast.ClassDef) -> set[str]:
    """Names of the classes that a class is made from."""
    return {base.id for base in node.bases if isinstance(base, ast.Name)}


def is_record(node: ast.stmt) -> bool:
    """Whether a statement makes a dataclass."""
    decorators = node.decorator_list if isinstance(node, ast.ClassDef) else []
    return any(ast.unparse(each).startswith("dataclass") for each in decorators)


def found() -> list[tuple[str, str]]:
    """Module and name of every dataclass that is called settings, or is a Config."""
    records = []
    for path in sorted((ROOT / "difflora_core").glob("**/*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.parse(path.read_text("utf-8")).body:
            if is_record(node) and (node.name.endswith(ENDINGS) or "Config" in bases(node)):
                records.append((module, node.name))
    return records


RECORDS = found()


@pytest.fixture(params=RECORDS, ids=[name for _, name in RECORDS])
def record(request) -> type:
    """One class of settings."""
    module, name = request.param
    return getattr(import_module(module), name)


def real(hint: object) -> object:
    """The type itself, where it may also be None."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return next(option for option in typing.get_args(hint) if option is not type(None))
    return hint


def example(record: type) -> Config:
    """A record with its defaults, and something plain where there is none."""
    hints = typing.get_type_hints(record)
    given = {}
    for field in fields(record):
        if field.default is MISSING and field.default_factory is MISSING:
            kind = real(hints[field.name])
            if typing.get_origin(kind) is tuple:
                given[field.name] = (REQUIRED[typing.get_args(kind)[0]],)
            else:
                given[field.name] = example(kind) if is_dataclass(kind) else REQUIRED[kind]
    return record(**given)


def test_records_are_found():
    assert {"DiTConfig", "FaceOptions", "SampleSettings", "NoiseSchedule"} <= {
        n for _, n in RECORDS
    }


def test_is_a_frozen_config(record):
    assert issubclass(record, Config)
    assert record.__dataclass_params__.frozen


def test_goes_through_json_and_refuses_an_unknown_field(record):
    settings = example(record)
    assert record.from_json(settings.to_json()) == settings
    with pytest.raises(ConfigError, match="unknown settings surprise"):
        record.from_dict({**settings.to_dict(), "surprise": 1})


def test_numbers_have_ranges(record):
    """No number is taken as it comes: not NaN, nor a whole number far below zero."""
    settings, hints = example(record).to_dict(), typing.get_type_hints(record)
    for field in fields(record):
        bad = {float: math.nan, int: -(10**12)}.get(real(hints[field.name]))
        if bad is not None:
            with pytest.raises(ConfigError):
                record.from_dict({**settings, field.name: bad})
