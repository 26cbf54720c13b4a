"""Names with a number after them stay possible, whatever characters they are made of."""

import pytest

from difflora_core.storage.file_name import check_file_name, with_ending


@pytest.mark.parametrize("name", ["hat", "h" * 80, "帽" * 66, "é" * 80, "𝔥" * 50, "a" + "帽" * 66])
def test_a_number_always_has_room(name):
    """A training's file is numbered at its end: what was accepted before must be possible then."""
    check_file_name(name)
    numbered = with_ending(name, "_1002")
    assert check_file_name(numbered).endswith("_1002")
    assert name.startswith(numbered.removesuffix("_1002"))
    assert len(numbered) > min(len(name), 40)
