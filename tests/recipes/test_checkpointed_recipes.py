"""Every recipe under gradient checkpointing: layers that run twice must do the same both times."""

from dataclasses import fields
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

from difflora_core.methods.registry import METHODS
from difflora_core.training.loop import Hooks, train


def recipes():
    """Method name to the recipe that trains it, of those that have one."""
    names = [name for name in METHODS if find_spec(f"difflora_core.training.{name}")]
    modules = {name: import_module(f"difflora_core.training.{name}") for name in names}
    return {n: module.RECIPE for n, module in modules.items() if hasattr(module, "RECIPE")}


@pytest.mark.parametrize("name", recipes())
def test_checkpointing_leaves_the_gradients_of_every_recipe_as_they_are(name, task, pictures):
    recipe, blocks = recipes()[name], []
    asked = {field.name for field in fields(recipe.Config)}
    bounds = {"bound": 1.0} if "bound" in asked else {}  # the layers here are tiny
    block = task.base.unet.mid_block.attentions[0].transformer_blocks[0]
    block.register_forward_pre_hook(lambda *_: blocks.append(1))

    def gradients(checkpointing):
        config = recipe.Config(steps=1, batch=2, checkpointing=checkpointing, **bounds)
        objective, found = recipe(task, config), []
        trained = [p for p in objective.parameters() if p.requires_grad]
        keep = Hooks(
            scale_gradients=lambda: found.extend(p.grad.clone() for p in trained),
            base=task.base,
            settings=(config,),
        )
        blocks.clear()
        train(objective, pictures().draw(2, 1000), config.loop, None, keep)
        return found, len(blocks)

    (plain, once), (again, twice) = gradients(False), gradients(True)
    assert twice > once
    assert any(float(g.abs().max()) > 0 for g in plain)
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-7)
