"""Names that are possible everywhere, and sentences for those that are not."""

import pytest

from difflora_core.errors import FileNameError
from difflora_core.storage.file_name import check_file_name, typed_name, with_ending


@pytest.mark.parametrize(
    "name",
    [
        *("cast", "Żółć 李", "a.b-c_d (2)", "console", "é" * 80, "COM", "1", "_x"),
        *("हिन्दी", "ไทยสี่"),
    ],
)
def test_names_that_are_kept(name):
    assert check_file_name(name) == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "cannot be a file name"),
        ("../cast", "cannot be a file name"),
        ("a/b", "cannot be a file name"),
        ("a\\b", "cannot be a file name"),
        (".hidden", "cannot be a file name"),
        ("\u0301a", "cannot be a file name"),
        ("a\u200d", "cannot be a file name"),
        ("a.", "no point or space at the end"),
        ("a ", "no point or space at the end"),
        ("a\nb", "cannot be a file name"),
        ("a\0", "cannot be a file name"),
        ("\ud800", r"'\\ud800' cannot be a file name"),
        ("con:1", "cannot be a file name"),
        ("CON", "device on Windows"),
        ("nul.txt", "device on Windows"),
        ("Com1", "device on Windows"),
        ("LPT³", "device on Windows"),
        ("x" * 81, "too long"),
        ("李" * 67, "200 bytes"),
        ("x" * 10**6, "too long"),
    ],
)
def test_names_that_are_refused(name, message):
    with pytest.raises(FileNameError, match=message) as caught:
        check_file_name(name)
    str(caught.value).encode()
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "typed", ["ada", " ada ", "ada.safetensors", "ada.SafeTensors ", "ada\n", "\u00a0ada"]
)
def test_what_people_type_by_habit(typed):
    assert check_file_name(typed_name(typed)) == "ada"


def test_accents_that_stand_beside_their_letters():
    assert check_file_name(typed_name("Jose\u0301")) == "Jos\u00e9"


@pytest.mark.parametrize("name", ["hat", "h" * 80, "帽" * 66, "é" * 80, "𝔥" * 50, "a" + "帽" * 66])
def test_a_number_always_has_room(name):
    """A training's file is numbered at its end: what was accepted before must be possible then."""
    check_file_name(name)
    numbered = with_ending(name, "_1002")
    assert check_file_name(numbered).endswith("_1002")
    assert name.startswith(numbered.removesuffix("_1002"))
    assert len(numbered) > min(len(name), 40)
