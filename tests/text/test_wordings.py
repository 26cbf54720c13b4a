"""Where taught words stand in what people write, by CLIP's own tokenizer, and what is told."""

import pytest
from transformers import CLIPTokenizer

from difflora_core.text.new_words import find_words, near_misses

HAT, CAT, BARE = WORDS = ("<demo-hat>", "<demo-cat>", "blorp")


@pytest.fixture(scope="module")
def tokens(comfyui):
    tokenizer = CLIPTokenizer.from_pretrained(comfyui / "comfy" / "sd1_tokenizer")
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("a <demo-hat>, red.", [HAT]),
        ("a <demo-hat>!", [HAT]),
        ('"<demo-hat>"', [HAT]),
        ("<demo-hat>'s brim", [HAT]),
        ("(<demo-hat>:1.2)", [HAT]),
        ("((<demo-hat>))", [HAT]),
        ("[<demo-hat>]", [HAT]),
        ("{<demo-hat>|a cap}", [HAT]),
        ("embedding:<demo-hat>", [HAT]),
        ("red BREAK <demo-hat>", [HAT]),
        ("\u00a0<demo-hat>\u00a0", [HAT]),
        ("\U0001f600<demo-hat>\U0001f600", [HAT]),
        ("<DEMO-hat>", [HAT]),
        ("a <demo-hat> and a <demo-cat>", [HAT, CAT]),
        ("<demo-hat>/<demo-cat>", [HAT, CAT]),
        ("a <demo-cat> in a <demo-hat>, blorp", [CAT, HAT, BARE]),
        ("<demo-hat><demo-hat>", [HAT, HAT]),
        ("<demo-hat><demo-cat>blorp", [HAT, CAT, BARE]),
        ("blorp<demo-hat>", [BARE, HAT]),
        ("a red<demo-hat>", [HAT]),
        ("two <demo-hat>s", [HAT]),
        ("a pre-<demo-hat>-ish thing", [HAT]),
        ("blorp", [BARE]),
        ("BLORP, Blorp", [BARE, BARE]),
        ("(blorp:0.8)", [BARE]),
        ("", []),
        ("a hat", []),
    ],
)
def test_found_with_nothing_to_tell(tokens, prompt, found):
    places = find_words(prompt, WORDS, tokens)
    assert [word for _, _, word in places] == found
    assert [prompt[start:end].casefold() for start, end, _ in places] == found
    assert near_misses(prompt, WORDS, tokens) == []


@pytest.mark.parametrize(
    ("prompt", "written", "word"),
    [
        ("two blorps", "blorps", BARE),
        ("blorp2", "blorp2", BARE),
        ("a blorp_x", "blorp_x", BARE),
        ("a blorp-like thing", "blorp-like", BARE),
        ("an un-Blorp thing", "un-Blorp", BARE),
        ("bl\u00f3rp", "bl\u00f3rp", BARE),
        ("\uff1cdemo-hat\uff1e", "\uff1cdemo-hat\uff1e", HAT),
        ("<demo-hat:1.2>", "<demo-hat", HAT),
        ("<lora:demo-hat:1>", "demo-hat", HAT),
        ("&lt;demo-hat&gt;", "demo-hat", HAT),
        ("demohat", "demohat", HAT),
        ("<<demo-hat>>", "<demo-hat>", HAT),
        ("<blorp>", "<blorp>", BARE),
    ],
)
def test_a_word_in_another_word_is_told(tokens, prompt, written, word):
    assert find_words(prompt, WORDS, tokens) == []
    assert (written, word) in near_misses(prompt, WORDS, tokens)
