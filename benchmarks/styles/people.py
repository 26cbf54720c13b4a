"""People whom DiffLoRA knows from one photo, to be drawn in a style."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from difflora_core.adapters.base import AdapterSet
from difflora_core.adapters.lora import lora_adapter_set
from difflora_core.demo import paths
from difflora_core.demo.build.features import demo_encoders
from difflora_core.demo.networks.judges import PLAIN_LOOKS
from difflora_core.demo.world.identities import split_seeds
from difflora_core.demo.world.scenes import render_portraits
from difflora_core.lora.weights import LoRALayer, LoRAWeights
from difflora_core.storage.checkpoint import load_model
from difflora_core.vision.face_choice import FaceOptions
from difflora_core.vision.features import extract_features

PICTURES = range(40, 48)
"""Numbers of the pictures that a judge knows a person by; 0 is the photo."""


@dataclass(frozen=True, eq=False)
class KnownPeople:
    """People I, each with a LoRA.

    `weights`: factors (I, ...) of all of them; `photos` (I, M, H, W, 3): other real pictures of
    each.
    """

    weights: LoRAWeights
    photos: Tensor

    def adapters(self, owners: Sequence[int]) -> AdapterSet:
        """One person for each sample of a batch."""
        index = torch.tensor(owners)
        layers = {
            name: LoRALayer(layer.down[index], layer.up[index], layer.alpha)
            for name, layer in self.weights.layers.items()
        }
        return lora_adapter_set(LoRAWeights(layers))


@torch.no_grad()
def demo_people(count: int) -> KnownPeople:
    """The first people of the test split, by DiffLoRA's best guess from one photo of each."""
    model = load_model(paths.DIFFLORA).eval().requires_grad_(False)
    seeds = split_seeds("test", count)
    face, image = demo_encoders()
    options = FaceOptions(on_missing="image_only")
    features, photos = [], []
    for seed in seeds:
        photo = render_portraits([seed], [0], looks=("photo",)).images
        features.append(extract_features(photo, face, image, options).features)
        others = render_portraits([seed] * len(PICTURES), list(PICTURES), looks=PLAIN_LOOKS)
        photos.append(others.images)
    weights = model.decode(model.mean_latent(model.condition(features)))
    return KnownPeople(weights.detach(), torch.stack(photos))
