"""Numbers in messages: right in one thing as in many, and never a minus before nothing."""

import ast
import re

import pytest

from difflora_core.errors import counted, percent

THINGS = (
    "captions concepts entries faces files identities images layers LoRAs masks numbers people "
    "photos pictures prompts samples steps styles tensors thumbnails tokens values weights words"
).split()
NUMBER = re.compile(r"\blen\(|\bcount\b")
MANY = re.compile(rf" (?:{'|'.join(THINGS)})\b")


@pytest.mark.parametrize(
    ("number", "noun", "said"),
    [
        (0, "layer", "0 layers"), (1, "layer", "1 layer"), (2, "layer", "2 layers"),
        (1, "entry", "1 entry"), (3, "entry", "3 entries"), (1, "person", "1 person"),
        (2, "person", "2 people"), (5, "training picture", "5 training pictures"),
    ],
)  # fmt: skip
def test_counted(number, noun, said):
    assert counted(number, noun) == said


@pytest.mark.parametrize(
    ("share", "digits", "said"),
    [
        (0.4, 0, "40%"), (-0.004, 0, "0%"), (-0.0, 0, "0%"), (-0.06, 0, "-6%"), (1.0, 0, "100%"),
        (-1e-9, 1, "0.0%"), (0.0123, 1, "1.2%"), (2.5, 0, "250%"),
    ],
)  # fmt: skip
def test_percent(share, digits, said):
    assert percent(share, digits) == said


def test_numbers_of_messages_have_one_home(sources):
    """A percentage is `percent`'s; a number of things that can be one is `counted`'s."""
    wrong = []
    for source in sources:
        if source.path.parts[1] in ("demo", "errors.py"):
            continue
        for text in ast.walk(source.tree):
            if not isinstance(text, ast.JoinedStr):
                continue
            for part, after in zip(text.values, [*text.values[1:], None], strict=True):
                if not isinstance(part, ast.FormattedValue):
                    continue
                form = ast.unparse(part.format_spec) if part.format_spec else ""
                words = after.value if isinstance(after, ast.Constant) else ""
                value = ast.unparse(part.value)
                number = NUMBER.search(value) and not value.startswith("counted(")
                if "%" in form or (number and not form and MANY.match(words)):
                    wrong.append(f"{source.path}:{part.lineno} {value}{words}")
    assert not wrong, "\n".join(wrong)
