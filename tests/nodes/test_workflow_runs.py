"""Every workflow that needs nothing but the pack runs through /prompt and makes pictures.

In the front end, twice and with pixels compared, it is `make workflows`.
"""

import pytest

from difflora_core.demo.comfyui.workflow_api import PACK
from difflora_core.demo.workflows.runner import FULL_SIZE, run_workflow

LONG = ("train_person", "para_style", "distil_checkpoint")
"""They train for half a minute; *teach_concept*, *few_shot_style* and *refine_person* train too."""
DEMOS = [
    pytest.param(
        path,
        id=path.stem,
        marks=[pytest.mark.slow] if path.stem.removesuffix("_demo") in LONG else [],
    )
    for path in sorted((PACK / "workflows").glob("*.json"))
    if not path.name.startswith(FULL_SIZE) and path.stem != "quickstart_demo"  # test_quickstart
]


@pytest.mark.parametrize("path", DEMOS)
def test_demo_workflow_makes_pictures(comfy_server, is_shipped, path):
    if not is_shipped:
        pytest.skip("the shipped demo world is not trained yet (make demo-world)")
    result = run_workflow(comfy_server, path)
    pictures = [picture for shown in result.pictures.values() for picture in shown]
    assert pictures
    assert any(picture.std() > 10 for picture in pictures)
