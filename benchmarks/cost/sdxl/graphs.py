"""Workflows of SDXL as prompts that a CPU can run: made small, bypassed, cut down."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

from difflora_core.data import generator_workflow
from difflora_core.demo.comfyui.workflow_api import workflow_to_prompt
from difflora_core.demo.workflows.needs import OWN_CHECKPOINT
from difflora_core.demo.workflows.runner import FULL_SIZE, read_workflow
from difflora_core.demo.workflows.writer import FOLDER

Prompt = dict[str, dict[str, Any]]
Info = Mapping[str, Any]

STEPS, SIDE = 2, 256
MOST_PROMPTS = 2
"""Of a workflow that draws many with one sampler."""
WITNESS = "witness"
"""Id of the node that shows the last picture that something was applied to."""
BASE_PICTURE = "base"
"""Id of the node that shows what the base model draws."""


def pixels(value: int, side: int = SIDE) -> int:
    """A size for pictures of 1024 pixels as one for `side`, a multiple of its quarter."""
    unit = side // 4
    return max(unit, unit * round(value * side / 1024 / unit))


def _fewer(most: int) -> Callable[[Any, int], float]:
    return lambda value, _: min(value, most)


def _middle(at: int, side: int) -> int:
    """Where one sampler hands over to the next: in the middle of STEPS; 10000 is the end."""
    del side
    return at if at >= 10000 else min(at, STEPS // 2)


def _saving(value: str, side: int) -> str:
    """Layers computed again: on the CPU their weights are copies in float32, 10 GB of them."""
    del value, side
    return "saving"


_TRAINING = {"steps": _fewer(STEPS), "batch_size": _fewer(1), "memory": _saving}
SMALLER: dict[str, dict[str, Callable[[Any, int], Any]]] = {
    "EmptyLatentImage": {"width": pixels, "height": pixels, "batch_size": _fewer(1)},
    "SolidMask": {"width": pixels, "height": pixels},
    "MaskComposite": {"x": lambda x, side: pixels(x, side) if x else 0},
    "GrowMask": {"expand": _fewer(16)},
    "KSampler": {"steps": _fewer(STEPS), "cfg": _fewer(1)},  # each step is one pass
    "KSamplerAdvanced": {
        "steps": _fewer(STEPS),
        "cfg": _fewer(1),
        "start_at_step": _middle,
        "end_at_step": _middle,
    },
    "DiffLoRA_StyleRouter": {"steps": _fewer(STEPS), "cfg": _fewer(1)},
    "DiffLoRA_InterpolateIdentities": {"steps": _fewer(2)},
    "DiffLoRA_EncodeLoRA": {"refine_steps": _fewer(STEPS)},
    "DiffLoRA_BuildCovariance": {"count": _fewer(100)},
    "DiffLoRA_TrainLoRA": {
        "steps": _fewer(STEPS),
        "batch_size": _fewer(2),
        "resolution": lambda _, side: side,
        "memory": _saving,
    },
    "DiffLoRA_TrainPerfusionConcept": _TRAINING,
    "DiffLoRA_TrainInfusionConcept": _TRAINING,
    "DiffLoRA_TrainStyleInject": _TRAINING,
    "DiffLoRA_TrainPaRa": _TRAINING,
    "DiffLoRA_DistilCheckpoint": _TRAINING
    | {
        "pictures": _fewer(2),
        "sampling_steps": _fewer(STEPS),
        "width": pixels,
        "height": pixels,
    },
}
"""Node type to input to what becomes of its value, for pictures of a side; all else stays."""

MAKERS: dict[str, tuple[str, dict[str, str]]] = {
    "my_hat": ("sdxl_teach_concept", {}),
    "my_cat": (
        "sdxl_teach_concept",
        {"word": "<my-cat>", "superclass": "cat", "file_name": "my_cat"},
    ),
    "my_style": ("sdxl_few_shot_style", {}),
}
"""Files that artists train themselves: the workflow that does, and what is changed in it."""
FOLDERS = {
    "DiffLoRA_LoadConcept": ("concept_name", "difflora_concepts"),
    "DiffLoRA_LoadStyle": ("style_name", "difflora_styles"),
}
"""Node that loads such a file: its input, and the folder in models."""


PHOTO, SCENE = "difflora_demo_person.png", "in a garden"
"""What a workflow that draws people is given."""


def _words_alone(given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """PhotoMaker encodes its text without the word that stands for the photo, too."""
    text = given["text"].replace("photomaker ", "")
    return "CLIPTextEncode", {"clip": given["clip"], "text": text}


AS_DRAWN: dict[str, Callable[[dict[str, Any]], tuple[str, dict[str, Any]]]] = {
    "DiffLoRA_StyleRouter": lambda given: ("KSampler", given),
    "PhotoMakerEncode": _words_alone,
}
"""Node that applies or shows something: type and inputs of the one that draws the same without."""


def workflow_names() -> list[str]:
    """Every shipped workflow for SDXL, those first that train what others load."""
    first = list(dict.fromkeys(name for name, _ in MAKERS.values()))
    names = sorted(path.stem for path in FOLDER.glob(f"{FULL_SIZE}*.json"))
    return sorted(names, key=lambda name: first.index(name) if name in first else len(first))


def all_prompts(info: Info, side: int = SIDE) -> dict[str, Prompt]:
    """Every shipped workflow for SDXL, and trainings that none of them holds, made small."""
    workflows = {name: small_prompt(name, info, side) for name in workflow_names()}
    return workflows | people_prompts(info, side) | training_prompts(info, side)


def people_prompts(nodes: Container[str], side: int = SIDE) -> dict[str, Prompt]:
    """The workflows in API form that draw people on SDXL for `multiply`, filled and made small.

    Those alone whose nodes are there: some need another pack.
    """
    found = {}
    for path in sorted(FOLDER.glob("api/*_sdxl_*.json")):
        filled = generator_workflow.read_workflow(path).filled(PHOTO, SCENE, seed=1)
        if all(entry["class_type"] in nodes for entry in filled.values()):
            found[path.stem] = smaller(filled, side)
    return found


def small_prompt(name: str, info: Info, side: int = SIDE) -> Prompt:
    """A shipped workflow as a prompt with the values of SMALLER, see `smaller`."""
    prompt = workflow_to_prompt(read_workflow(FOLDER / f"{name}.json"), info)
    return smaller(_without_own_checkpoints(prompt), side)


def _without_own_checkpoints(prompt: Prompt) -> Prompt:
    """The artist's own checkpoint is the published one with a LoRA: no second file of 7 GB."""
    loaders = {k: n for k, n in prompt.items() if n["class_type"] == "CheckpointLoaderSimple"}
    for key, node in loaders.items():
        if node["inputs"]["ckpt_name"] == OWN_CHECKPOINT:
            base = next(other for other in loaders if other != key)
            inputs = {"model": [base, 0], "clip": [base, 1], "lora_name": "my_person.safetensors"}
            inputs |= {"strength_model": 1.0, "strength_clip": 1.0}
            prompt[key] = {**node, "class_type": "LoraLoader", "inputs": inputs}
    return prompt


def smaller(prompt: Mapping[str, Mapping[str, Any]], side: int = SIDE) -> Prompt:
    """The same prompt with fewer steps, and with pictures of `side` for 1024; links stay."""
    made: Prompt = copy.deepcopy({key: dict(node) for key, node in prompt.items()})
    for node in made.values():
        inputs = node["inputs"]
        for name, change in SMALLER.get(node["class_type"], {}).items():
            if name in inputs and not _is_link(inputs[name]):
                inputs[name] = change(inputs[name], side)
        if node["class_type"] == "CreateList":
            node["inputs"] = dict(list(inputs.items())[:MOST_PROMPTS])
    return made


def bypassed(prompt: Mapping[str, Mapping[str, Any]], info: Info) -> Prompt:
    """The prompt as ComfyUI's front end makes it when everything applied to a model is bypassed.

    A node that takes a model and gives one passes on what it took, each output the input of its
    type; hooks are unplugged; see also AS_DRAWN.
    """
    made: Prompt = copy.deepcopy({key: dict(node) for key, node in prompt.items()})
    gone = {key: node for key, node in made.items() if _passed(node, "MODEL", info)}
    for key in gone:
        del made[key]
    for node in made.values():
        if plain := AS_DRAWN.get(node["class_type"]):
            node["class_type"], node["inputs"] = plain(node["inputs"])
        for name, value in list(node["inputs"].items()):
            if name == "hooks" and _is_link(value):
                del node["inputs"][name]
            while _is_link(source := node["inputs"].get(name)) and source[0] in gone:
                before = gone[source[0]]
                kind = info[before["class_type"]]["output"][source[1]]
                node["inputs"][name] = _passed(before, kind, info)
    return made


def witnessed(prompt: Mapping[str, Mapping[str, Any]], info: Info) -> Prompt | None:
    """The prompt with a node that shows the last picture that `bypassed` would change.

    None where it changes none. The last, because rows of strengths begin with 0.
    """
    plain = bypassed(prompt, info)
    for key, node in reversed(prompt.items()):
        source = node["inputs"].get("samples")
        if node["class_type"] != "VAEDecode" or not _is_link(source):
            continue
        if ancestors(prompt, source[0]) != ancestors(plain, source[0]):
            inputs = {"images": [key, 0]}
            others = {  # ComfyUI runs two nodes that are alike as one, and does not say so
                k: dict(copy.deepcopy(n))
                for k, n in prompt.items()
                if (n["class_type"], n["inputs"]) != ("PreviewImage", inputs)
            }
            return {**others, WITNESS: {"class_type": "PreviewImage", "inputs": inputs}}
    return None


def ancestors(prompt: Mapping[str, Mapping[str, Any]], node: str) -> Prompt:
    """A node with everything that it depends on."""
    found: Prompt = {}
    waiting = [node]
    while waiting:
        key = waiting.pop()
        if key not in found:
            found[key] = dict(prompt[key])
            links = [v[0] for v in prompt[key]["inputs"].values() if _is_link(v)]
            waiting += links
    return found


def base_prompt(checkpoint: str, side: int = SIDE) -> Prompt:
    """One step of the base model alone, which must draw the same whatever ran before."""
    words = {"clip": ["load", 1], "text": "photo of a person"}
    sampler = {
        "model": ["load", 0],
        "positive": ["words", 0],
        "negative": ["words", 0],
        "latent_image": ["empty", 0],
        "seed": 1,
        "steps": 1,
        "cfg": 1.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "denoise": 1.0,
    }
    size = {"width": side, "height": side, "batch_size": 1}
    nodes = {
        "load": ("CheckpointLoaderSimple", {"ckpt_name": checkpoint}),
        "words": ("CLIPTextEncode", words),
        "empty": ("EmptyLatentImage", size),
        "sampler": ("KSampler", sampler),
        "pixels": ("VAEDecode", {"samples": ["sampler", 0], "vae": ["load", 2]}),
        BASE_PICTURE: ("PreviewImage", {"images": ["pixels", 0]}),
    }
    return {key: {"class_type": kind, "inputs": given} for key, (kind, given) in nodes.items()}


def missing_files(prompt: Mapping[str, Mapping[str, Any]], models: Path) -> list[str]:
    """Names of MAKERS whose files a prompt loads and that are not in ComfyUI's models yet."""
    found = []
    for node in prompt.values():
        name, folder = FOLDERS.get(node["class_type"], ("", ""))
        if name and not (models / folder / node["inputs"][name]).exists():
            found.append(Path(node["inputs"][name]).stem)
    return list(dict.fromkeys(found))


def maker_prompt(name: str, info: Info, side: int = SIDE) -> Prompt:
    """The training alone that makes a file of MAKERS."""
    workflow, changes = MAKERS[name]
    prompt = small_prompt(workflow, info, side)
    key, node = _training_node(prompt)
    node["inputs"] |= changes
    return _reported(prompt, key, info)


def training_prompts(info: Info, side: int = SIDE) -> dict[str, Prompt]:
    """Two steps of the training nodes that no shipped workflow for SDXL holds."""
    infusion = small_prompt("sdxl_teach_concept", info, side)
    key, node = _training_node(infusion)
    kind = "DiffLoRA_TrainInfusionConcept"
    inputs = _defaults(info, kind)
    node["inputs"] = inputs | {k: v for k, v in node["inputs"].items() if k in inputs}
    node["inputs"]["file_name"] = "my_infusion"
    node["class_type"] = kind
    return {"Train Infusion Concept": _reported(smaller(infusion, side), key, info)}


def _training_node(prompt: Prompt) -> tuple[str, dict[str, Any]]:
    (found,) = [
        (key, node)
        for key, node in prompt.items()
        if node["class_type"].startswith("DiffLoRA_Train")
    ]
    return found


def _reported(prompt: Prompt, key: str, info: Info) -> Prompt:
    """What leads to a node, and a node that shows its report."""
    output = info[prompt[key]["class_type"]]["output_name"].index("report")
    shown = {"class_type": "PreviewAny", "inputs": {"source": [key, output]}}
    return {**ancestors(prompt, key), "report": shown}


def _defaults(info: Info, kind: str) -> dict[str, Any]:
    """A node's widgets at their defaults, and its other required inputs as None."""
    found: dict[str, Any] = {}
    for name, spec in info[kind]["input"]["required"].items():
        options = spec[1] if len(spec) > 1 else {}
        choices = options.get("options") or (spec[0] if isinstance(spec[0], list) else [None])
        found[name] = options.get("default", choices[0])
    for name, spec in (info[kind]["input"].get("optional") or {}).items():
        if len(spec) > 1 and "default" in spec[1]:
            found[name] = spec[1]["default"]
    return found


def _passed(node: Mapping[str, Any], kind: str, info: Info) -> list[Any] | None:
    """Where the first input of a type comes from, of a node that gives one; None without one."""
    schema = info[node["class_type"]]
    if kind not in schema["output"]:
        return None
    for group in ("required", "optional"):
        for name, spec in (schema["input"].get(group) or {}).items():
            if spec[0] == kind and _is_link(node["inputs"].get(name)):
                return list(node["inputs"][name])
    return None


def _is_link(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)
