"""The demo world's face recogniser: a small CNN in the file format of insightface.

insightface takes an ONNX file with one square input of at least 112 pixels as a recogniser, gives
it crops aligned by five face points (`align_face` in vision/preprocess.py is the same alignment)
and scales them to [-1, 1]. The network learns that two pictures of one person lie together,
whatever the look, expression, clothes and light, and that its embedding tells the renderer's
identity parameters; that second head is thrown away.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...config import Config, check_ranges
from ...training.fingerprint import fingerprint
from ...training.loop import Batch, ByStep, Hooks, Progress
from ...vision.preprocess import ARCFACE_POINTS, ARCFACE_SIZE
from ..world.identities import PARAMETERS
from ..world.pool import PicturePool
from .views import (
    PersonSampler,
    Schedule,
    as_planes,
    convolution_block,
    fit,
    initialise,
    lay_out,
    warp,
)

logger = logging.getLogger(__name__)

FILE_NAME = "rec_demo.onnx"


@dataclass(frozen=True)
class RecogniserRecipe(Config):
    """Size of the network and length of its training.

    `widths`: channels of the stages; `embedding`: Df; `people`: people in a batch (two pictures
    each); `point_noise`: deviation of the face points in pixels of a 64 px picture, since a
    detector misses by about as much; `margin`: see `margin_loss`.
    """

    widths: tuple[int, ...] = (24, 48, 96, 128)
    embedding: int = 128
    people: int = 96
    point_noise: float = 0.5
    temperature: float = 0.07
    margin: float = 0.1
    parameter_weight: float = 1.0
    schedule: Schedule = field(default_factory=lambda: Schedule(steps=700, rate=3e-3))
    seed: int = 21

    def __post_init__(self) -> None:
        check_ranges("Recogniser", self, 1, 65_536, "embedding", "people")
        check_ranges("Recogniser", self, 0, 1000, "point_noise", "margin", "parameter_weight")
        check_ranges("Recogniser", self, 1e-4, 100, "temperature")
        check_ranges("Recogniser", self, 0, 2**62, "seed")


class Recogniser(nn.Module):
    """(N, 3, 112, 112) in [-1, 1] to (N, embedding), not normalised."""

    def __init__(self, widths: tuple[int, ...], embedding: int) -> None:
        super().__init__()
        # The crop is an enlarged 64 px picture: halving it loses little and costs a quarter.
        layers: list[nn.Module] = [nn.AvgPool2d(2), *convolution_block(3, widths[0], 2)]
        for before, after in pairwise(widths):
            layers += [*convolution_block(before, after, 2), *convolution_block(after, after, 1)]
        self.features = nn.Sequential(*layers)
        self.embed = nn.Linear(widths[-1] * 16, embedding)

    def forward(self, crops: Tensor) -> Tensor:
        """Aligned crops (N, 3, 112, 112) to (N, embedding)."""
        features = self.features(crops)  # N C 4 4
        return self.embed(features.flatten(1))


def align_batch(planes: Tensor, points: Tensor, size: int = ARCFACE_SIZE) -> Tensor:
    """`align_face` of vision/preprocess.py for a whole batch.

    Args:
        planes: (B, 3, H, W) in [0, 1].
        points: (B, 5, 2) face points in pixels.
        size: side of the crops.

    Returns:
        (B, 3, size, size), black where the picture ends, as insightface's crops.
    """
    template = torch.tensor(ARCFACE_POINTS) * (size / ARCFACE_SIZE)
    source = torch.view_as_complex(points.contiguous())
    goal = torch.view_as_complex(template.contiguous())
    # From the crop to the picture: the inverse of the least-squares map from picture to crop.
    centred = source - source.mean(1, keepdim=True)
    turn = (centred.conj() * (goal - goal.mean())).sum(1) / (centred.abs() ** 2).sum(1)
    back = 1 / turn
    shift = source.mean(1) - back * goal.mean()
    rows = [torch.stack([back.real, -back.imag, shift.real], 1)]
    rows.append(torch.stack([back.imag, back.real, shift.imag], 1))
    return warp(planes, torch.stack(rows, 1), size, padding="zeros")


def margin_loss(features: Tensor, temperature: float, margin: float) -> Tensor:
    """Two-view contrastive loss whose matching cosine must win by a margin.

    The additive cosine margin of CosFace (arXiv 1801.09414, Eq. 4) on the pairs of NT-Xent, of
    features (2 P, D) whose second half shows the people of the first in the same order.
    """
    unit = F.normalize(features.float(), dim=1)
    partner = torch.arange(len(unit)).roll(len(unit) // 2)
    cosines = unit @ unit.T - margin * F.one_hot(partner)
    cosines = cosines.masked_fill(torch.eye(len(unit), dtype=torch.bool), -torch.inf)
    return F.cross_entropy(cosines / temperature, partner)


class RecogniserTraining(nn.Module):
    """Draws crops, computes the loss, measures the result."""

    def __init__(self, pool: PicturePool, recipe: RecogniserRecipe) -> None:
        super().__init__()
        self.pool, self.recipe = pool, recipe
        self.model = Recogniser(recipe.widths, recipe.embedding)
        self.head = nn.Linear(recipe.embedding, len(PARAMETERS))
        initialise(self.model, recipe.seed)
        initialise(self.head, recipe.seed + 1)
        self.generator = torch.Generator().manual_seed(recipe.seed + 2)
        self.sampler = PersonSampler(pool.identities, self.generator)
        self.truth = pool.parameters()
        self.spread = self.truth.std(0)

    def run(self, folder: Path, progress: Progress | None = None) -> None:
        """Train the model in place; `folder` holds the state of a stopped run."""
        lay_out(self.model.train(), torch.channels_last)
        hooks = Hooks(progress, fingerprint=fingerprint(self.recipe, self.pool.images))
        draw = ByStep(self.draw, self.generator)
        fit(self, draw, self.recipe.schedule, folder, hooks)
        self.model.eval()

    def draw(self, step: int) -> dict[str, Tensor]:
        """Crops of people, aligned by face points as a detector finds them.

        `crops` (B, 3, 112, 112) in [-1, 1]; `truth` (B, P) identity parameters in units of their
        deviation.
        """
        del step
        index = self.sampler.draw(self.recipe.people)
        points = self.pool.keypoints[index, 0]
        noise = torch.randn(points.shape, generator=self.generator) * self.recipe.point_noise
        crops = align_batch(as_planes(self.pool.images[index]), points + noise) * 2 - 1
        return {"crops": crops, "truth": self.truth[index] / self.spread}

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss () of a batch of `draw`: margin loss of pairs of pictures, and parameters' error."""
        recipe = self.recipe
        features = self.model(batch["crops"].contiguous(memory_format=torch.channels_last))
        same = margin_loss(features, recipe.temperature, recipe.margin)
        error = F.mse_loss(self.head(features).float(), batch["truth"])
        return same + recipe.parameter_weight * error, {}

    @torch.no_grad()
    def embed(self, pool: PicturePool) -> Tensor:
        """Embeddings (M, Df) of a pool's (left) people, aligned by their true face points."""
        parts = []
        for start in range(0, len(pool), 256):
            planes = as_planes(pool.images[start : start + 256])
            crops = align_batch(planes, pool.keypoints[start : start + 256, 0]) * 2 - 1
            parts.append(self.model(crops))
        return torch.cat(parts)


def recognition_figures(embeddings: Tensor, identities: Tensor) -> dict[str, float]:
    """How well embeddings recognise people.

    Args:
        embeddings: (M, E), several pictures of each person.
        identities: (M,) who is on them.

    Returns:
        Mean cosine of the `same` and of `different` people; `rank1`: share of each person's first
        picture whose nearest centroid of the others' remaining pictures is the person's own.
    """
    unit = F.normalize(embeddings.float(), dim=1)
    people, inverse = torch.unique(identities, return_inverse=True)
    match = inverse[:, None] == inverse[None]
    cosines = unit @ unit.T
    others = ~torch.eye(len(unit), dtype=torch.bool)
    first = torch.stack([(inverse == k).nonzero()[0, 0] for k in range(len(people))])
    rest = torch.ones(len(unit), dtype=torch.bool)
    rest[first] = False
    centroids = torch.zeros(len(people), unit.shape[1])
    centroids.index_add_(0, inverse[rest], unit[rest])
    nearest = (unit[first] @ F.normalize(centroids, dim=1).T).argmax(1)
    return {
        "same": float(cosines[match & others].mean()),
        "different": float(cosines[~match].mean()),
        "rank1": float((nearest == torch.arange(len(people))).float().mean()),
    }


def train_recogniser(
    pool: PicturePool,
    recipe: RecogniserRecipe,
    folder: Path,
    run: Path,
    validation: PicturePool | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Train on a pool of portraits and write `rec_demo.onnx` to `folder`.

    `run` is the folder of the training's state.

    Returns:
        `recognition_figures` on `validation`; empty without it.
    """
    training = RecogniserTraining(pool, recipe)
    training.run(run, progress)
    measured = {}
    if validation is not None:
        measured = recognition_figures(training.embed(validation), validation.identities)
    export_recogniser(training.model, recipe, measured, folder / FILE_NAME)
    return measured


def export_recogniser(
    model: Recogniser, recipe: RecogniserRecipe, measured: dict[str, float], path: Path
) -> None:
    """Write an ONNX file that insightface loads as `recognition`."""
    crops = torch.zeros(2, 3, ARCFACE_SIZE, ARCFACE_SIZE)
    export_onnx(model, crops, ["embedding"], path, batched=True)
    describe_onnx(path, {"recipe": asdict(recipe), "measured": measured})


def export_onnx(
    model: nn.Module, example: Tensor, outputs: list[str], path: Path, batched: bool
) -> None:
    """Trace a network into an ONNX file.

    Args:
        model: from one input to the outputs.
        example: input (N, 3, S, S), whose size the file keeps.
        outputs: their names.
        path: the file.
        batched: leaves N free.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    axes = {name: {0: "N"} for name in ["input", *outputs]} if batched else None
    lay_out(model.eval(), torch.contiguous_format)
    torch.onnx.export(
        model,
        (example,),
        str(path),
        input_names=["input"],
        output_names=outputs,
        dynamic_axes=axes,
        opset_version=17,
        dynamo=False,
    )


def describe_onnx(path: Path, facts: dict[str, object]) -> None:
    """Write facts as JSON into the file's metadata, and halve the file's weights."""
    model = onnx.load_model(str(path))
    for key, value in facts.items():
        model.metadata_props.add(key=key, value=json.dumps(value))
    halve_weights(model.graph)
    onnx.save_model(model, str(path))
    logger.info("wrote %s", path.name)


def halve_weights(graph: onnx.GraphProto) -> None:
    """Store large weights in half precision, cast back to float32 when the file is loaded."""
    casts = []
    for tensor in graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype != "float32" or values.size < 64:
            continue
        name = tensor.name
        tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype("float16"), name + "_half"))
        to = onnx.TensorProto.FLOAT
        casts.append(
            onnx.helper.make_node("Cast", [name + "_half"], [name], f"widen_{name}", to=to)
        )
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
