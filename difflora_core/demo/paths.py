"""Where the demo world's files are."""

from __future__ import annotations

from pathlib import Path

ARTEFACTS = Path(__file__).parent / "artefacts"
"""What ships with the pack."""

BASE = ARTEFACTS / "base.safetensors"
CLIP_VISION = ARTEFACTS / "clip_vision.safetensors"
CONTROLNET = ARTEFACTS / "controlnet.safetensors"
DIFFLORA = ARTEFACTS / "difflora.safetensors"
DIFFLORA_PAPER = ARTEFACTS / "difflora_paper.safetensors"
MODELS = {"functional": DIFFLORA, "paper": DIFFLORA_PAPER}
"""The DiffLoRA models, by the preset that trained them."""
FACES = ARTEFACTS / "insightface" / "demo_faces"
JUDGES = ARTEFACTS / "judges"
CONCEPT_JUDGE = JUDGES / "concepts.safetensors"
PROMPT_JUDGE = JUDGES / "prompts.safetensors"
CONCEPTS = ARTEFACTS / "concepts"
STYLE_JUDGE = JUDGES / "styles.safetensors"
TEACHERS = ARTEFACTS / "teachers"
"""Base models that draw in one style each: what their UNets have in place of the base's."""
CHINESE = ARTEFACTS / "chinese.safetensors"
"""Text encoders of the base that read Chinese."""
STYLES = ARTEFACTS / "styles"
LORAS = ARTEFACTS / "loras"
OLD_LORA = LORAS / "difflora_demo_old_lora.safetensors"
MANIFEST = ARTEFACTS / "manifest.json"
LINEAR = ARTEFACTS / "linear.safetensors"
STRENGTHS = ARTEFACTS / "strengths.json"
"""No stage makes these two: benchmarks do, whenever they are asked to, of what the stages made."""

ROOT = Path(__file__).parents[2]
WORK = ROOT / ".cache"
POOLS = WORK / "pool"
BUILD = WORK / "build"
"""Intermediate files of `make demo-world`; safe to delete."""
TRAINED_VAE = BUILD / "decoder" / "trained"
"""The VAE that the base ships with, as a diffusers folder."""
FIRST_BASE = BUILD / "first_base.safetensors"
"""The base before it reads word by word: trained on short captions alone."""
FACE_READER = BUILD / "reader.safetensors"
"""For the likeness loss of training alone."""
