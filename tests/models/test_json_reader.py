"""The one reader of JSON texts, and messages that hold foreign text."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from difflora_core import errors, limits
from difflora_core.config import parse_json
from difflora_core.errors import ConfigError, DiffLoRAError, LibraryError, described, shown
from difflora_core.lora.layout import LoRALayout
from difflora_core.models.dit import DiTConfig

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**19), 10**19) | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@given(PLAIN)
def test_sound_texts_are_read_as_json_reads_them(data):
    try:
        text = json.dumps(data).encode()
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return
    assert parse_json(text, "it") == data == parse_json(text.decode(), "it")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "valid JSON"),
        ("{", "valid JSON"),
        ("[" * 100_000, "nested too deeply|valid JSON"),
        ("[" * 33 + "]" * 33, "nested more than 32"),
        ('{"a":' * 33 + "1" + "}" * 33, "nested more than 32"),
        ("9" * 5000, "more than 20 digits"),
        ("-" + "9" * 21, "more than 20 digits"),
        ("NaN", "NaN is no number"),
        ('{"a": [Infinity]}', "Infinity is no number"),
        ("-Infinity", "no number"),
        ("1e999", "too large"),
        ('"\\ud800"', "surrogates not allowed"),
        ('{"\\udfff": 1}', "surrogates not allowed"),
        ('{"a": 1, "a": 2}', "twice"),
        ('{"a": {"b": 1, "b": 1}}', "twice"),
        (b"\xff{}", "valid JSON"),
        ('{"a": 1}'.encode("utf-16"), "valid JSON"),
        (b'\xef\xbb\xbf{"a": 1}', "valid JSON"),
        (b'"\xed\xa0\x80"', "valid JSON"),
    ],
)
def test_texts_that_are_refused(text, message):
    with pytest.raises(LibraryError, match=message) as caught:
        parse_json(text, "some.json", LibraryError)
    assert str(caught.value).startswith("some.json")
    assert len(str(caught.value)) < 300
    str(caught.value).encode()


def test_the_deepest_text_that_is_read():
    depth = limits.JSON_DEPTH
    parse_json("[" * depth + "]" * depth, "it")


def test_length_is_judged_first():
    with pytest.raises(ConfigError, match="more than 10 bytes"):
        parse_json(" " * 11, "it", most=10)


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, 10**400, "3", [], None, True], ids=str
)
def test_rates_that_are_no_finite_numbers(value):
    good = DiTConfig().to_dict()
    name = next(name for name, value in good.items() if isinstance(value, float))
    with pytest.raises(ConfigError, match=name):
        DiTConfig.from_dict(good | {name: value})


@pytest.mark.parametrize("text", ["[]", "3", '"x"', "null", "{}", '{"base": []}'])
def test_layouts_of_another_shape(text):
    with pytest.raises(errors.LayoutError):
        LoRALayout.from_json(text)


LAYER = {"name": "a", "in_features": 4, "out_features": 4, "diffusers_name": ""}


@pytest.mark.parametrize(
    "change",
    [
        {"rank": True}, {"rank": 0}, {"rank": 2.0}, {"rank": 10**6}, {"base": ""}, {"base": 3},
        {"base": "x" * 2000}, {"layers": []}, {"layers": {}}, {"layers": [[]]}, {"layers": "ab"},
        {"layers": [LAYER] * 2}, {"layers": [LAYER | {"name": ""}]}, {"more": 1},
        {"layers": [LAYER | {"name": 3}]}, {"layers": [LAYER | {"in_features": 0}]},
        {"layers": [LAYER | {"in_features": True}]}, {"layers": [LAYER | {"out_features": 2**17}]},
        {"layers": [LAYER | {"diffusers_name": None}]}, {"layers": [LAYER | {"more": 1}]},
        {"layers": [LAYER | {"name": f"a{k}"} for k in range(limits.LAYERS + 1)]},
    ],
)  # fmt: skip
def test_layouts_that_make_no_sense(change):
    good = {"base": "x", "rank": 2, "layers": [LAYER]}
    assert LoRALayout.from_dict(good).numel == 16
    with pytest.raises(errors.LayoutError):
        LoRALayout.from_json(json.dumps(good | change))


@given(st.text(st.characters(codec=None), max_size=5000))
def test_every_message_can_be_shown(text):
    """Lone surrogates, control characters and 4,000 characters of a file."""
    for message in (str(DiffLoRAError(text)), shown(text), described([text] * 50), described(text)):
        message.encode()
        assert len(message) < 2100 * 10
        assert all(c.isprintable() or c == "\n" for c in message)
    assert len(shown("x" * 10**6)) == errors.MAX_SHOWN + 1
    assert len(str(DiffLoRAError("x" * 10**6))) <= errors.MAX_MESSAGE + 3


def test_the_remedy_survives_the_cut():
    message = str(DiffLoRAError(f"{'x' * 10**5} is wrong. Use another one."))
    assert message.endswith("is wrong. Use another one.")
    assert described(10**6000) == "a int"
    assert shown("a\tb\n\ud800ü") == "a\\tb\\n\\ud800ü"
