"""The demo world's CLIP vision: a tiny `CLIPVisionModelWithProjection` of transformers.

The real CLIP learned from 400 million captioned pictures. This one cannot: it is taught by dense
labels of the renderer instead (who is on the picture and what else it shows), plus a contrastive
term between two pictures of one person. Only the vision tower is kept; the heads are thrown away.
It stands in for CLIP's role in the pipeline and proves nothing about CLIP itself.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from ...config import Config, check_ranges, parse_json
from ...errors import CheckpointError
from ...storage.safetensors_io import read_file, write_atomic
from ...training.fingerprint import fingerprint
from ...training.loop import Batch, ByStep, Hooks, Progress
from ...vision.preprocess import CLIP_MEAN, CLIP_STD
from ..world.identities import PARAMETERS
from ..world.pool import PicturePool
from .stored import building, check_tensors, load_strictly
from .views import (
    ATTRIBUTES,
    NO_LABEL,
    PersonSampler,
    Schedule,
    as_planes,
    attribute_labels,
    contrastive_loss,
    explained,
    fit,
    initialise,
    map_points,
    square_matrices,
    uniform,
    warp,
)

logger = logging.getLogger(__name__)

FILE_NAME = "clip_vision.safetensors"


@dataclass(frozen=True)
class ClipVisionRecipe(Config):
    """Size of the network and length of its training.

    `people`: people in a batch (two pictures each); `whole`: share of uncropped pictures;
    `crop`: side of the cropped squares in face boxes; other weights are of the loss terms.
    """

    image_size: int = 64
    patch_size: int = 8
    width: int = 128
    layers: int = 4
    heads: int = 4
    projection: int = 64
    people: int = 32
    whole: float = 0.3
    crop: tuple[float, float] = (1.6, 2.6)
    attribute_weight: float = 0.3
    point_weight: float = 0.3
    contrast_weight: float = 0.1
    schedule: Schedule = field(default_factory=lambda: Schedule(steps=2000))
    seed: int = 11

    def __post_init__(self) -> None:
        sizes = ("image_size", "patch_size", "width", "layers", "heads", "projection", "people")
        check_ranges("CLIP vision", self, 1, 65_536, *sizes)
        check_ranges("CLIP vision", self, 0, 1, "whole")
        weights = ("attribute_weight", "point_weight", "contrast_weight")
        check_ranges("CLIP vision", self, 0, 1000, *weights)
        check_ranges("CLIP vision", self, 0, 2**62, "seed")

    def network(self) -> dict[str, object]:
        """The configuration that transformers and ComfyUI both read."""
        return {
            "model_type": "clip_vision_model",
            "hidden_size": self.width,
            "intermediate_size": 4 * self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_channels": 3,
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "projection_dim": self.projection,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
        }


class Heads(nn.Module):
    """Linear read-outs of the pooled embedding and of the penultimate tokens, for training only."""

    def __init__(self, width: int, projection: int) -> None:
        super().__init__()
        self.sizes = [len(answers) for answers in ATTRIBUTES.values()]
        self.pooled = nn.Linear(projection, len(PARAMETERS))
        self.attributes = nn.Linear(projection, sum(self.sizes))
        self.contrast = nn.Linear(projection, projection)
        self.norm = nn.LayerNorm(width)
        self.attention = nn.Linear(width, 8)
        self.tokens = nn.Linear(8 * width, len(PARAMETERS) + 10)

    def read_tokens(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Identity parameters (B, P) and face points (B, 10) from penultimate tokens."""
        tokens = self.norm(tokens)
        weights = self.attention(tokens).softmax(1)
        read = self.tokens((weights.transpose(1, 2) @ tokens).flatten(1))
        return read[:, :-10], read[:, -10:]


class ClipVisionTraining(nn.Module):
    """Draws views, computes the loss, measures the result."""

    def __init__(self, pool: PicturePool, recipe: ClipVisionRecipe) -> None:
        super().__init__()
        self.recipe, self.pool = recipe, pool
        config = CLIPVisionConfig(**recipe.network(), attn_implementation="eager")
        self.model = CLIPVisionModelWithProjection(config)
        self.heads = Heads(recipe.width, recipe.projection)
        initialise(self.model, recipe.seed)
        initialise(self.heads, recipe.seed + 1)
        self.generator = torch.Generator().manual_seed(recipe.seed + 2)
        self.sampler = PersonSampler(pool.identities, self.generator)
        self.truth = pool.parameters()
        self.labels = attribute_labels(pool.scenes)
        self.spread = self.truth.std(0)

    def run(self, folder: Path, progress: Progress | None = None) -> None:
        """Train the model in place; `folder` holds the state of a stopped run."""
        layers = [
            weight
            for name, weight in self.model.named_parameters()
            if weight.ndim == 2 and ".layers." in name
        ]
        hooks = Hooks(
            progress, matrices=layers, fingerprint=fingerprint(self.recipe, self.pool.images)
        )
        self.model.train()
        fit(self, ByStep(self.draw, self.generator), self.recipe.schedule, folder, hooks)
        self.model.eval()

    def draw(self, step: int) -> dict[str, Tensor]:
        """Two views of each of `people` people with what is to be read from them.

        `views` (B, 3, S, S) in [0, 1]; `points` (B, 10), see `views`; `truth` (B, P) identity
        parameters in units of their deviation; `labels` (B, questions) int64, NO_LABEL where a
        question has no answer.
        """
        del step
        index = self.sampler.draw(self.recipe.people)
        views, points = self.views(index)
        labels = torch.stack([column[index] for column in self.labels.values()], 1)
        truth = self.truth[index] / self.spread
        return {"views": views, "points": points, "truth": truth, "labels": labels}

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum () of all terms of the loss of a batch of `draw`."""
        truth, points = batch["truth"], batch["points"]
        pooled, tokens = encode(self.model, batch["views"])
        seen, found = self.heads.read_tokens(tokens)
        terms = F.mse_loss(self.heads.pooled(pooled).float(), truth)
        terms = terms + F.mse_loss(seen.float(), truth)
        terms = terms + self.recipe.point_weight * F.mse_loss(found.float(), points)
        answers = self.heads.attributes(pooled).float().split(self.heads.sizes, 1)
        asked = [
            F.cross_entropy(answer, labels, ignore_index=NO_LABEL)
            for answer, labels in zip(answers, batch["labels"].unbind(1), strict=True)
        ]
        terms = terms + self.recipe.attribute_weight * torch.stack(asked).mean()
        contrast = contrastive_loss(self.heads.contrast(pooled), 0.1)
        return terms + self.recipe.contrast_weight * contrast, {}

    def views(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Whole pictures and squares around faces (B, 3, S, S) of pictures (B,), and face points.

        The points (B, 10) are x and y of each, -2 to 2 from edge to edge of the view.
        """
        recipe, count = self.recipe, len(index)
        planes, box = as_planes(self.pool.images[index]), self.pool.boxes[index, 0]
        height, width = planes.shape[-2:]
        longest = (box[:, 2:] - box[:, :2]).amax(1)
        side = (longest * uniform(count, *recipe.crop, self.generator)).clamp(
            max=max(height, width)
        )
        jitter = torch.rand(count, 2, generator=self.generator) - 0.5
        centre = (box[:, :2] + box[:, 2:]) / 2 + 0.2 * longest[:, None] * jitter
        whole = torch.rand(count, generator=self.generator) < recipe.whole
        side = torch.where(whole, torch.tensor(float(height)), side)
        middle = torch.tensor([width / 2, height / 2])
        matrices = square_matrices(
            torch.where(whole[:, None], middle, centre), side, recipe.image_size
        )
        views = warp(planes, matrices, recipe.image_size, "bicubic")
        points = map_points(matrices, self.pool.keypoints[index, 0]) / recipe.image_size - 0.5
        return views, 4 * points.flatten(1)

    @torch.no_grad()
    def measure(self, pool: PicturePool) -> dict[str, list[float]]:
        """R squared of every identity parameter on whole pictures of other people.

        Returns:
            Columns "pooled" and "tokens" (read by the heads), in the order of PARAMETERS.
        """
        read: tuple[list[Tensor], list[Tensor]] = [], []
        for start in range(0, len(pool), 256):
            pooled, tokens = encode(self.model, as_planes(pool.images[start : start + 256]))
            read[0].append(self.heads.pooled(pooled))
            read[1].append(self.heads.read_tokens(tokens)[0])
        truth = pool.parameters() / self.spread
        columns = [explained(torch.cat(part), truth).tolist() for part in read]
        return {"pooled": columns[0], "tokens": columns[1]}


def encode(model: CLIPVisionModelWithProjection, planes: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled embeddings (B, projection) and penultimate tokens (B, L, width).

    Args:
        model: the network.
        planes: (B, 3, image_size, image_size) in [0, 1].
    """
    mean, std = torch.tensor(CLIP_MEAN), torch.tensor(CLIP_STD)
    pixels = (planes - mean[:, None, None]) / std[:, None, None]
    output = model(pixel_values=pixels, output_hidden_states=True)
    return output.image_embeds, output.hidden_states[-2]


def train_clip_vision(
    pool: PicturePool,
    recipe: ClipVisionRecipe,
    folder: Path,
    run: Path,
    validation: PicturePool | None = None,
    progress: Progress | None = None,
) -> dict[str, list[float]]:
    """Train on a pool of portraits and write `clip_vision.safetensors` to `folder`.

    `run` is the folder of the training's state.

    Returns:
        What `ClipVisionTraining.measure` says on `validation`; empty without it.
    """
    training = ClipVisionTraining(pool, recipe)
    training.run(run, progress)
    measured = training.measure(validation) if validation is not None else {}
    save_clip_vision(training.model, recipe, measured, folder / FILE_NAME)
    return measured


def save_clip_vision(
    model: CLIPVisionModelWithProjection,
    recipe: ClipVisionRecipe,
    measured: dict[str, list[float]],
    path: Path,
) -> None:
    """Write the weights in half precision with the configuration in the metadata."""
    tensors = {
        name: value.to(torch.float16).contiguous()
        for name, value in model.state_dict().items()
        if value.is_floating_point()
    }
    metadata = {
        "config": json.dumps(recipe.network()),
        "recipe": json.dumps(asdict(recipe)),
        "measured": json.dumps(measured),
    }
    write_atomic(tensors, metadata, path)
    logger.info("wrote %s", path.name)


def _checked_network(config: object, tensors: int) -> dict[str, object]:
    """A configuration that `ClipVisionRecipe.network` writes, for a file of so many tensors.

    transformers reads further names from a configuration, and some of them fetch code.
    """
    if not isinstance(config, dict):
        raise CheckpointError("it is no table")
    sizes = {ours: config[theirs] for ours, theirs in _SIZES.items()}
    recipe = ClipVisionRecipe.from_dict(sizes)
    if recipe.network() != config or recipe.layers > tensors:
        raise CheckpointError("it describes something else than this network")
    return recipe.network()


_SIZES = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "projection": "projection_dim",
}


def load_clip_vision(
    path: Path,
) -> tuple[CLIPVisionModelWithProjection, dict[str, object], dict[str, Tensor]]:
    """Read the shipped file.

    Returns:
        The model in float32, the configuration for `comfy.clip_vision.ClipVisionModel`, and the
        state dict.

    Raises:
        CheckpointError: the file cannot be read, or does not fit its own configuration.
    """
    stored, facts = read_file(path, "CLIP vision")
    with building(path):
        config = _checked_network(parse_json(facts["config"], "the configuration"), len(stored))
        with torch.device("meta"):  # sizes are judged before anything is allocated
            shapes = CLIPVisionModelWithProjection(CLIPVisionConfig(**config)).state_dict()
    check_tensors({n: t for n, t in shapes.items() if not n.endswith("position_ids")}, stored, path)
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**config))
    tensors = {name: tensor.float() for name, tensor in stored.items()}
    load_strictly(model, tensors, path)
    return model.eval(), config, tensors
