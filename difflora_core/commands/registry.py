"""COMMANDS: what the command line can do, by name. A command is registered by its line here."""

from __future__ import annotations

COMMANDS = {
    "prepare": "photos of people to a dataset that training reads",
    "corpus": "a dataset, or LoRA files of people, to a corpus that training reads",
    "multiply": "a portrait a person to pictures of each, drawn by ComfyUI",
    "train": "a dataset to a DiffLoRA model",
    "plan": "what training will take: time, memory, disk",
    "evaluate": "models, LoRAs and pictures to a table of measures, with the pictures",
    "generate": "photos of a person to a LoRA file",
    "convert": "LoRA files to another naming, rank or precision",
    "inspect": "what a file or folder is, and what it holds",
}
"""Name to what it does. The file of that name has `Settings`, a Config, and `run(settings,
console)`."""


def listing() -> str:
    """Every command with what it does."""
    lines = [f"  {name:<10}{about}" for name, about in COMMANDS.items()]
    asked = "python -m difflora_core COMMAND --help tells the options of one."
    return "\n".join(["python -m difflora_core COMMAND ...", *lines, asked])
