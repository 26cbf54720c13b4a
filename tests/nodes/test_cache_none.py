"""Start-up flag --cache-none: ComfyUI forgets the output of every node as soon as it is used."""

import pytest

from difflora_core.demo.comfyui.server import ComfyServer
from tests.nodes.placed import OURS, common_nodes
from tests.nodes.sampler_graphs import ROUNDING, VISIBLE, cfg, difference, guided


@pytest.fixture(scope="module")
def forgetful(comfyui, is_shipped, tmp_path_factory):
    """Such a ComfyUI."""
    if not is_shipped:
        pytest.skip("the demo world is not complete")
    with ComfyServer(tmp_path_factory.mktemp("comfyui"), arguments=["--cache-none"]) as server:
        yield server


def test_each_without_a_cache(forgetful):
    """Twice the same picture, and core's where core has a way."""
    comfy = forgetful.client
    common = common_nodes(comfy, forgetful)
    for kind, make in OURS.items():
        made = make()
        nodes = common | made.nodes
        ways = {"base": made.base, "ours": made.ours, "cores": made.cores or made.ours}
        for name, placed in ways.items():
            links = (list(link) for link in (placed.model, placed.positive, placed.negative))
            nodes |= guided(name, cfg(*links))
        first, again = comfy.run(nodes), comfy.run(nodes)
        assert not again.cached, kind
        assert difference(first.pictures["ours"], again.pictures["ours"]) == 0, kind
        assert difference(first.pictures["ours"], first.pictures["base"]) > VISIBLE, kind
        assert difference(first.pictures["ours"], first.pictures["cores"]) <= ROUNDING, kind
