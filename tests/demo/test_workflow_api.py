"""UI form to API form, on a hand-written schema: what the front end itself would send."""

import pytest

from difflora_core.demo.comfyui.workflow_api import (
    WorkflowError,
    workflow_pictures,
    workflow_to_prompt,
)

INFO = {
    "Load": {"input": {"required": {"name": [["a", "b"], {}]}}, "display_name": "Load It"},
    "Sample": {
        "input": {
            "required": {
                "model": ["MODEL", {}],
                "seed": ["INT", {"default": 0, "control_after_generate": True}],
                "steps": ["INT", {"default": 20}],
                "kind": ["COMBO", {"options": ["x", "y"]}],
            },
            "optional": {"strength": ["FLOAT", {"default": 0.5}]},
        }
    },
}


def node(node_id, kind, widgets=(), inputs=(), outputs=(), mode=0):
    """A node as a workflow file writes it."""
    return {
        "id": node_id,
        "type": kind,
        "mode": mode,
        "widgets_values": list(widgets),
        "inputs": [{"name": n, "type": t, "link": link} for n, t, link in inputs],
        "outputs": [{"name": t, "type": t} for t in outputs],
    }


def workflow(*nodes, links=()):
    return {"nodes": list(nodes), "links": [list(link) for link in links]}


def sample(**changes):
    """A Sample node fed by link 10."""
    values = {"widgets": [7, "randomize", 4, "y", 0.25], "inputs": [("model", "MODEL", 10)]}
    return node(2, "Sample", **{**values, **changes})


def test_widgets_keep_their_names_and_seed_control_goes():
    load, link = node(1, "Load", ["b"], outputs=["MODEL"]), [10, 1, 0, 2, 0, "MODEL"]
    prompt = workflow_to_prompt(workflow(load, sample(), links=[link]), INFO)
    assert prompt["1"]["inputs"] == {"name": "b"}
    assert prompt["1"]["_meta"] == {"title": "Load It"}
    assert prompt["2"] == {
        "class_type": "Sample",
        "inputs": {"model": ["1", 0], "seed": 7, "steps": 4, "kind": "y", "strength": 0.25},
        "_meta": {"title": "Sample"},
    }


def test_widget_newer_than_the_file_takes_its_default():
    prompt = workflow_to_prompt(workflow(sample(widgets=[7, "fixed", 4, "y"], inputs=[])), INFO)
    assert prompt["2"]["inputs"]["strength"] == 0.5


def test_widget_turned_into_a_socket_takes_the_link():
    primitive = node(5, "PrimitiveNode", [99, "fixed"], outputs=["INT"])
    link = [11, 5, 0, 2, 0, "INT"]
    wired = sample(inputs=[("seed", "INT", 11)])
    prompt = workflow_to_prompt(workflow(primitive, wired, links=[link]), INFO)
    assert set(prompt) == {"2"}
    assert prompt["2"]["inputs"]["seed"] == 99


@pytest.mark.parametrize(("kind", "mode"), [("Reroute", 0), ("Sample", 4)])
def test_reroute_and_bypass_pass_the_link_on(kind, mode):
    load = node(1, "Load", ["a"], outputs=["MODEL"])
    between = node(3, kind, [], [("model", "MODEL", 12)], ["MODEL"], mode)
    links = [[12, 1, 0, 3, 0, "MODEL"], [10, 3, 0, 2, 0, "MODEL"]]
    prompt = workflow_to_prompt(workflow(load, between, sample(), links=links), INFO)
    assert set(prompt) == {"1", "2"}
    assert prompt["2"]["inputs"]["model"] == ["1", 0]


def test_muted_node_leaves_nothing():
    load, link = node(1, "Load", ["a"], outputs=["MODEL"], mode=2), [10, 1, 0, 2, 0, "MODEL"]
    prompt = workflow_to_prompt(workflow(load, sample(), links=[link]), INFO)
    assert "model" not in prompt["2"]["inputs"]


def test_unknown_type_and_surplus_widgets_are_refused():
    with pytest.raises(WorkflowError, match="Node 9 has the type 'Gone'"):
        workflow_to_prompt(workflow(node(9, "Gone")), INFO)
    with pytest.raises(WorkflowError, match="3 widget values too many"):
        workflow_to_prompt(workflow(node(1, "Load", ["a", 1, 2, 3])), INFO)


def test_picture_that_does_not_come_with_us_is_named():
    with pytest.raises(WorkflowError, match=r"no-such-picture\.png"):
        workflow_pictures(workflow(node(4, "LoadImage", ["no-such-picture.png", "image"])))
