"""A file of changes to the demo base has to fit it."""

import pytest
import torch
from safetensors.torch import save_file

from difflora_core.demo import paths
from difflora_core.demo.networks.base import load_base
from difflora_core.demo.networks.changes import with_changes
from difflora_core.errors import CheckpointError

BASE = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}


def test_changes_take_the_place_of_the_base(tmp_path):
    made = with_changes(BASE, {"b": torch.ones(4)}, tmp_path)
    assert torch.equal(made["b"], torch.ones(4))
    assert made["a"] is BASE["a"]
    assert not BASE["b"].any()


@pytest.mark.parametrize("change", [{"c": torch.ones(4)}, {"a": torch.ones(3, 2)}])
def test_changes_of_another_base(tmp_path, change):
    with pytest.raises(CheckpointError, match=r"1 of its 2 tensors.*example [ac]\).*make it") as e:
        with_changes(BASE, {"b": torch.ones(4), **change}, tmp_path / "ink.safetensors")
    assert "ink.safetensors does not fit" in str(e.value)


def test_the_base_is_not_loaded_with_them(tmp_path):
    path = tmp_path / "ink.safetensors"
    save_file({"nowhere": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="does not fit the demo base"):
        load_base(paths.BASE, path)
