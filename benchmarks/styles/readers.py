"""Readers of painted pictures: what a prompt named, and who is shown, in an art style.

The judges of prompts and of faces have met no art style, so of painted pictures they say little
(right answers of the judge of prompts in ink: shirt 0.23, background 0.36). A reader is their last
features, read anew for one style: answers by ridge regression, and faces by their distance from the
style's mean face; both of rendered portraits that are painted over in that style. It reads every
row alike, and a row that misses the style is read worse for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from difflora_core.base_model.diffusers_base import DiffusersBase
from difflora_core.config import parse_json
from difflora_core.demo.networks.judges import JudgeNetwork, Judges
from difflora_core.demo.networks.views import ATTRIBUTES, NO_LABEL, as_planes, attribute_labels
from difflora_core.demo.world.pool import PicturePool
from difflora_core.demo.world.scenes import Scene
from difflora_core.storage.safetensors_io import read_file, write_atomic

Paint = Callable[[Tensor], Tensor]
"""Rendered pictures (N, H, W, 3) to the same in a style."""
RIDGE = 0.1
"""Of the mean of what it is added to, the diagonal of the features' squares."""
TEST_SHARE = 6
"""One in so many portraits tells how often a reader is right, and teaches it nothing."""
SIZES = [len(answers) for answers in ATTRIBUTES.values()]
CHUNK = 100


@dataclass(frozen=True, eq=False)
class StyleReader:
    """Reads pictures of one style.

    Args:
        judges: the judges of attributes and of faces.
        paint: makes rendered pictures look so.
        weight, bias: (F, A) and (A,), answers of all questions by the features.
        face: (E,) mean embedding of painted faces.
        accuracy: question to the share of right answers on portraits that taught it nothing.
    """

    judges: Judges
    paint: Paint
    weight: Tensor
    bias: Tensor
    face: Tensor
    accuracy: dict[str, float]

    def attributes(self, images: Tensor) -> dict[str, list[str]]:
        """One answer per picture (N, H, W, 3) in [0, 1] to every question of ATTRIBUTES."""
        said = features(self.judges, images) @ self.weight + self.bias
        pairs = zip(ATTRIBUTES.items(), said.split(SIZES, 1), strict=True)
        return {name: [words[k] for k in part.argmax(1).tolist()] for (name, words), part in pairs}

    def faces(self, images: Tensor) -> Tensor:
        """Unit embeddings (N, E) of painted pictures (N, H, W, 3), from the mean face on."""
        return F.normalize(self.judges.embed(images) - self.face, dim=1)

    def likeness(self, images: Tensor, photos: Tensor) -> Tensor:
        """Cosine (N,) of the faces on painted pictures to those who are on plain ones.

        Args:
            images: (N, H, W, 3) in [0, 1].
            photos: (N, M, H, W, 3) real pictures of whom each shows, which are painted over.
        """
        painted = self.faces(self.paint(photos.flatten(0, 1))).unflatten(0, photos.shape[:2])
        return F.cosine_similarity(self.faces(images), painted.mean(1), dim=1)


@torch.no_grad()
def features(judges: Judges, images: Tensor) -> Tensor:
    """What the judge of attributes answers from: (N, F) of pictures (N, 64, 64, 3) in [0, 1]."""
    network = judges.networks["attributes"]
    assert isinstance(network, JudgeNetwork)
    return torch.cat([network.features(as_planes(part)) for part in images.split(CHUNK)])


def style_reader(
    judges: Judges, paint: Paint, base: DiffusersBase, pool: PicturePool, path: Path
) -> StyleReader:
    """A reader that was fitted before, or one from portraits, every other one through the VAE.

    Args:
        judges: whose features it reads.
        paint: of its style.
        base: whose VAE it is.
        pool: portraits.
        path: of its file.
    """
    if not path.exists():
        images = paint(pool.images.float() / 255)
        with torch.no_grad():
            for part in images[::2].split(CHUNK):
                part.copy_(base.decode_latents(base.encode_images(part)))
        made = fitted_reader(judges, paint, images, pool.scenes)
        tensors = {"weight": made.weight, "bias": made.bias, "face": made.face}
        write_atomic(tensors, {"accuracy": json.dumps(made.accuracy)}, path)
    tensors, facts = read_file(path, "reader of a style")
    accuracy = parse_json(facts["accuracy"], "its accuracy")
    return StyleReader(judges, paint, **tensors, accuracy=accuracy)


def fitted_reader(judges: Judges, paint: Paint, images: Tensor, scenes: list[Scene]) -> StyleReader:
    """A reader by ridge regression on painted portraits (N, H, W, 3) of scenes."""
    seen, labels = features(judges, images).double(), attribute_labels(scenes)
    test = torch.arange(len(images)) % TEST_SHARE == 0
    targets = torch.cat([_one_hot(labels[q], len(a)) for q, a in ATTRIBUTES.items()], 1)
    mean, middle = seen[~test].mean(0), targets[~test].mean(0)
    x, y = seen[~test] - mean, targets[~test] - middle
    square = x.T @ x
    ridge = RIDGE * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype)
    weight = torch.linalg.solve(square + ridge, x.T @ y)
    bias = (middle - mean @ weight).float()
    face = judges.embed(images).mean(0)
    made = StyleReader(judges, paint, weight.float(), bias, face, {})
    for name, said in made.attributes(images[test]).items():
        truth = labels[name][test]
        right = torch.tensor([ATTRIBUTES[name].index(word) for word in said]) == truth
        made.accuracy[name] = float(right[truth != NO_LABEL].float().mean())
    return made


def _one_hot(labels: Tensor, answers: int) -> Tensor:
    """(N, answers) float64; all alike where there is no label."""
    told = F.one_hot(labels.clamp_min(0), answers).double()
    return torch.where(labels[:, None] == NO_LABEL, 1 / answers, told)
