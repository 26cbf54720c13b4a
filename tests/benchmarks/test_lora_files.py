"""The fidelity table: no cell is silent, and a wrong delta would be seen."""

import logging

import pytest
import torch

from benchmarks.files import lora_files
from benchmarks.files.families import FAMILIES, RANK

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def host(pack):
    return lora_files.Host()


def some(family):
    """Of a family: two dtypes, two namings, with and without alpha, every node."""
    return [
        cell
        for cell in lora_files.cells()
        if cell.family is family
        and cell.dtype in ("float16", "fp8 e4m3")
        and cell.names in ("kohya", "PEFT")
    ]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_no_cell_is_silent(host, family, caplog):
    with caplog.at_level(logging.ERROR):
        outcomes = {cell: lora_files.run(host, cell) for cell in some(family)}
    assert {cell: o for cell, o in outcomes.items() if o[0] == "silent"} == {}
    assert not caplog.records  # ComfyUI logs an error where it leaves a layer out
    reached = {cell.node for cell, (outcome, _) in outcomes.items() if outcome == "right"}
    unread = {node for name, node in lora_files.REFUSALS if name == family.name}
    assert reached == {"Apply", "by part", "timed", "Hook", "Encode"} - unread


@pytest.mark.parametrize("node", ["Apply", "timed", "Hook", "Encode"])
def test_a_wrong_scale_is_seen(host, node, monkeypatch):
    """Half of alpha lost, as where only the metadata says it."""
    monkeypatch.setattr(lora_files, "with_peft_alphas", lambda state, metadata: dict(state))
    cell = lora_files.Cell(FAMILIES[0], "float32", "PEFT", "metadata", node)
    outcome, error = lora_files.run(host, cell)
    assert outcome == "silent"
    assert error == pytest.approx(1 - RANK / lora_files.ALPHA, rel=1e-3)


def test_a_refusal_that_is_not_listed_is_silent(host, monkeypatch):
    monkeypatch.setattr(lora_files, "REFUSALS", {})
    cell = lora_files.Cell(FAMILIES[-1], "float32", "kohya", "none", "Apply")
    assert lora_files.run(host, cell)[0] == "silent"


def test_the_base_is_left_as_it_was(host):
    before = {key: value.clone() for key, value in host.state.items()}
    for cell in some(FAMILIES[0]):
        lora_files.run(host, cell)
    assert all(torch.equal(before[key], value) for key, value in host.state.items())
