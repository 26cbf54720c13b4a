"""Models of the demo's size on pools of drawn pictures, for benchmarks that train."""

from __future__ import annotations

from pathlib import Path

import torch

from difflora_core.base_model.diffusers_base import DiffusersBase
from difflora_core.commands.networks import network_config
from difflora_core.commands.plan import DEMO
from difflora_core.commands.train_data import encode_all
from difflora_core.demo import paths
from difflora_core.demo.build.features import demo_encoders
from difflora_core.demo.networks.base import demo_layout
from difflora_core.demo.world.pool import PicturePool
from difflora_core.models.difflora import DiffLoRAModel
from difflora_core.storage.safetensors_io import read_file, write_atomic
from difflora_core.training.difflora.functional import PersonPictures
from difflora_core.training.loop import Progress
from difflora_core.vision.face_choice import FaceOptions
from difflora_core.vision.features import ImageFeatures, extract_features

_CHUNK = 500
_PARTS = ("face", "face_found", "image", "image_tokens")


def new_model(seed: int, targets: str = "attention", **parts: object) -> DiffLoRAModel:
    """An untrained model of the functional preset.

    Args:
        seed: of its weights.
        targets: the layers that its LoRAs edit, key of `lora.layout.TARGETS`.
        parts: networks in place of the usual ones.
    """
    about = {"face_encoder": "demo_faces/rec_demo.onnx", "image_encoder": "demo CLIP vision"}
    config = network_config(DEMO, False, **{**about, **parts})
    layout = demo_layout(targets=targets)
    return DiffLoRAModel(config, layout, generator=torch.Generator().manual_seed(seed))


def pool_features(name: str, pool: PicturePool, progress: Progress | None = None) -> ImageFeatures:
    """Features of every picture of a pool, in order; kept on disk in parts, so it resumes."""
    folder = paths.BUILD / "features" / name
    folder.mkdir(parents=True, exist_ok=True)
    face, clip = demo_encoders()
    parts = []
    for start in range(0, len(pool), _CHUNK):
        path = folder / f"{start:06d}.safetensors"
        if not path.exists():
            images = pool.images[start : start + _CHUNK].float() / 255
            made = extract_features(images, face, clip, FaceOptions(on_missing="image_only"))
            _save(path, made.features)
        parts.append(_load(path))
        if progress is not None:
            progress(min(start + _CHUNK, len(pool)), len(pool), {})
    return ImageFeatures.cat(parts)


def person_pictures(
    base: DiffusersBase, latents: torch.Tensor, pool: PicturePool, features: ImageFeatures
) -> PersonPictures:
    """Latents, prompts and features of a pool whose pictures come person by person.

    The prompts never describe the person: that is what the LoRA is for.

    Args:
        base: encodes the prompts.
        latents: (M, C, h, w) scaled, of the pool's pictures.
        pool: M pictures, the same number of each person.
        features: of the same pictures, M rows.
    """
    captions = [scene.caption() for scene in pool.scenes]
    prompts = list(dict.fromkeys(captions))
    row = {prompt: k for k, prompt in enumerate(prompts)}
    count = len(torch.unique(pool.identities))
    return PersonPictures(
        latents=latents,
        text=encode_all(base, prompts),
        prompts=torch.tensor([row[caption] for caption in captions]),
        features=features,
        people=torch.arange(len(pool)).reshape(count, -1),
    )


def _save(path: Path, features: ImageFeatures) -> None:
    tensors = {name: getattr(features, name).contiguous() for name in _PARTS}
    tensors["image_tokens"] = tensors["image_tokens"].half()
    write_atomic(tensors, {}, path)


def _load(path: Path) -> ImageFeatures:
    tensors, _ = read_file(path, "file of features")
    face, found, image, tokens = (tensors[name] for name in _PARTS)
    return ImageFeatures(face, found, image, tokens)
