"""The demo world's face detector: a small network with the outputs of SCRFD (arXiv 2105.04714).

insightface takes an ONNX file with nine outputs as a detector: scores, boxes and five points for
strides 8, 16 and 32, two anchors per cell. Distances count in strides from the corner of a cell,
and a fixed square input replaces insightface's choice of sizes. Pictures are laid into the top
left corner of that square; the rest is black.

It learns upright faces only: one that lies on its side or stands on its head counts as none, so
that whoever asks tries the picture turned. Noise and skin-coloured discs count as none too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...config import Config, check_ranges
from ...training.fingerprint import fingerprint
from ...training.loop import Batch, ByStep, Hooks, Progress
from ...vision.face_encoder import InsightFaceEncoder
from ..world.pool import PicturePool
from .detector_targets import ANCHORS, STRIDES, assign, detection_loss
from .faceless import disc_pictures, empty_pictures, noise_pictures
from .recogniser import describe_onnx, export_onnx
from .views import Schedule, as_planes, convolution_block, fit, initialise, lay_out, uniform, warp

FILE_NAME = "det_demo.onnx"


@dataclass(frozen=True)
class DetectorRecipe(Config):
    """Size of the network and length of its training.

    `size`: side of the input; `widths`: channels from stride 2 to stride 32; `portraits`, `wide`,
    `empty`, `turned`, `discs`, `noise`: pictures of each kind in a batch, where `turned` are
    portraits by quarter turns, which hold no upright face; `usual`: share of pictures laid out as
    insightface lays them, the others are scaled so that faces measure `faces` pixels, and shifted.
    """

    size: int = 128
    widths: tuple[int, ...] = (16, 32, 48, 64, 64)
    portraits: int = 34
    wide: int = 12
    empty: int = 6
    turned: int = 8
    discs: int = 4
    noise: int = 4
    usual: float = 0.3
    faces: tuple[float, float] = (18.0, 112.0)
    schedule: Schedule = field(default_factory=lambda: Schedule(steps=1200, rate=3e-3))
    seed: int = 31

    def __post_init__(self) -> None:
        check_ranges("Detector", self, 1, 65_536, "size")
        check_ranges("Detector", self, 0, 65_536, "portraits", "wide", "empty")
        check_ranges("Detector", self, 0, 65_536, "turned", "discs", "noise")
        check_ranges("Detector", self, 0, 1, "usual")
        check_ranges("Detector", self, 0, 2**62, "seed")


class Detector(nn.Module):
    """Faces on pictures at three strides: score logit, four distances, ten offsets per anchor."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        stages, before = [], 3
        for level, after in enumerate(widths):
            layers = convolution_block(before, after, 2)
            if level:
                layers += convolution_block(after, after, 1)
            stages.append(nn.Sequential(*layers))
            before = after
        self.stages = nn.ModuleList(stages)
        self.heads = nn.ModuleList(nn.Conv2d(w, ANCHORS * 15, 1) for w in widths[-3:])

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """Pictures (B, 3, S, S) to one map (B, H, W, 2, 15) for each stride."""
        maps, x = [], pictures
        for level, stage in enumerate(self.stages):
            x = stage(x)  # B w S/stride S/stride
            if level >= 2:
                y = self.heads[level - 2](x).permute(0, 2, 3, 1)  # B H W 30
                maps.append(y.reshape(*y.shape[:3], ANCHORS, 15))
        return maps


class ScrfdOutputs(nn.Module):
    """The nine outputs for one picture, in insightface's order."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, picture: Tensor) -> tuple[Tensor, ...]:
        """Scores (n, 1), boxes (n, 4) and points (n, 10) for each stride, kind by kind."""
        rows = [y.reshape(-1, 15) for y in self.detector(picture)]
        scores = [y[:, :1].sigmoid() for y in rows]
        return (*scores, *(y[:, 1:5] for y in rows), *(y[:, 5:] for y in rows))


class DetectorTraining(nn.Module):
    """Lays pictures into the input square, computes the loss."""

    def __init__(self, portraits: PicturePool, wide: PicturePool, recipe: DetectorRecipe) -> None:
        super().__init__()
        self.recipe, self.pools = recipe, (portraits, wide)
        self.model = Detector(recipe.widths)
        initialise(self.model, recipe.seed)
        with torch.no_grad():  # faces are rare: start from "no face" (arXiv 1708.02002, 4.1)
            for name, value in self.model.heads.named_parameters():
                if name.endswith("bias"):
                    value.view(ANCHORS, 15)[:, 0] = -3
        self.generator = torch.Generator().manual_seed(recipe.seed + 1)
        self.empty = empty_pictures(1000, self.generator)

    def run(self, folder: Path, progress: Progress | None = None) -> None:
        """Train the model in place; `folder` holds the state of a stopped run."""
        lay_out(self.model.train(), torch.channels_last)
        pictures = [pool.images for pool in self.pools]
        hooks = Hooks(progress, fingerprint=fingerprint(self.recipe, *pictures))
        fit(self, ByStep(self.draw, self.generator), self.recipe.schedule, folder, hooks)
        self.model.eval()

    def draw(self, step: int) -> dict[str, Tensor]:
        """`inputs` (B, 3, S, S), `boxes`, `points` of `batch`; two kinds of borders take turns."""
        inputs, boxes, points = self.batch("zeros" if step % 2 else "border")
        return {"inputs": inputs, "boxes": boxes, "points": points}

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss () of the faces found on `inputs` (B, 3, S, S) in [0, 1].

        `boxes` (B, F, 4) and `points` (B, F, 10) are in pixels, NaN where no face is.
        """
        boxes, points, size = batch["boxes"], batch["points"], self.recipe.size
        pixels = (batch["inputs"] * 255 - 127.5) / 128
        maps = self.model(pixels.contiguous(memory_format=torch.channels_last))
        targets = [assign(boxes, points, size, level) for level in range(len(STRIDES))]
        return detection_loss(maps, targets), {}

    def batch(self, padding: str) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs (B, 3, S, S), boxes (B, 2, 4) and points (B, 2, 10), NaN where no face is.

        `padding`: what lies beyond the pictures, as `views.warp` names it.
        """
        parts = []
        for pool, count in zip(self.pools, (self.recipe.portraits, self.recipe.wide), strict=True):
            index = torch.randint(len(pool), (count,), generator=self.generator)
            faces = pool.boxes[index], pool.keypoints[index]
            parts.append(self.lay(as_planes(pool.images[index]), faces, padding))
        for planes in self.faceless():
            parts.append(self.lay(planes, _nobody(len(planes)), padding))
        noise = noise_pictures(self.recipe.noise, self.recipe.size, self.generator)
        parts.append((as_planes(noise), *_nobody(len(noise))))
        people = max(part[1].shape[1] for part in parts)
        inputs, boxes, points = zip(*parts, strict=True)
        return (
            torch.cat(inputs),
            torch.cat([_pad_people(b, people) for b in boxes]),
            torch.cat([_pad_people(p.flatten(2), people) for p in points]),
        )

    def faceless(self) -> list[Tensor]:
        """Planes (B, 3, H, W) of each kind of picture in which no face is to be found."""
        recipe, draw = self.recipe, self.generator
        empty = self.empty[torch.randint(len(self.empty), (recipe.empty,), generator=draw)]
        portraits = self.pools[0].images
        turned = as_planes(
            portraits[torch.randint(len(portraits), (recipe.turned,), generator=draw)]
        )
        turns = torch.randint(1, 4, (recipe.turned,), generator=draw).tolist()
        turned = torch.stack([p.rot90(k, (1, 2)) for p, k in zip(turned, turns, strict=True)])
        discs = disc_pictures(recipe.discs, empty.shape[1], draw)
        small = noise_pictures(recipe.noise, empty.shape[1], draw)
        return [as_planes(empty), turned, discs.movedim(-1, 1), small.movedim(-1, 1)]

    def lay(
        self, planes: Tensor, faces: tuple[Tensor, Tensor], padding: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scale and shift pictures into the square; faces move along.

        Args:
            planes: (B, 3, H, W) in [0, 1].
            faces: boxes (B, F, 4) and points (B, F, 5, 2) in pixels of the pictures.
            padding: what lies beyond the pictures, as `views.warp` names it.

        Returns:
            Inputs (B, 3, S, S), boxes and points in pixels of the square.
        """
        recipe, count = self.recipe, len(planes)
        height, width = planes.shape[-2:]
        low, high = (torch.tensor(face / 33).log().item() for face in recipe.faces)
        scale = uniform(count, low, high, self.generator).exp()
        shift = recipe.size * torch.rand(count, 2, generator=self.generator)
        middle = torch.tensor([width, height]) * uniform(count, 0.25, 0.75, self.generator)[:, None]
        shift = shift - middle * scale[:, None]
        usual = torch.rand(count, generator=self.generator) < recipe.usual
        scale = torch.where(usual, torch.tensor(recipe.size / max(height, width)), scale)
        shift = torch.where(usual[:, None], torch.zeros(()), shift)
        matrices = torch.zeros(count, 2, 3)
        matrices[:, 0, 0] = matrices[:, 1, 1] = 1 / scale
        matrices[:, :, 2] = (0.5 - shift) / scale[:, None] - 0.5
        inputs = warp(planes, matrices, recipe.size, padding=padding)
        boxes = faces[0] * scale[:, None, None] + shift.repeat(1, 2)[:, None]
        return inputs, boxes, faces[1] * scale[:, None, None, None] + shift[:, None, None]


def _nobody(count: int) -> tuple[Tensor, Tensor]:
    """Boxes (count, 1, 4) and points (count, 1, 5, 2) of pictures without a face."""
    return torch.full((count, 1, 4), torch.nan), torch.full((count, 1, 5, 2), torch.nan)


def _pad_people(rows: Tensor, people: int) -> Tensor:
    """Add rows of NaN until there are `people` of them."""
    return F.pad(rows, (0, 0, 0, people - rows.shape[1]), value=torch.nan)


def train_detector(
    portraits: PicturePool,
    wide: PicturePool,
    recipe: DetectorRecipe,
    folder: Path,
    run: Path,
    progress: Progress | None = None,
) -> Path:
    """Train on portraits and wide pictures and write `det_demo.onnx` to `folder`.

    `run` is the folder of the training's state.
    """
    training = DetectorTraining(portraits, wide, recipe)
    training.run(run, progress)
    return export_detector(training.model, recipe, folder / FILE_NAME)


def export_detector(model: Detector, recipe: DetectorRecipe, path: Path) -> Path:
    """Write an ONNX file that insightface loads as `detection`."""
    names = [f"{kind}_{stride}" for kind in ("score", "box", "points") for stride in STRIDES]
    picture = torch.zeros(1, 3, recipe.size, recipe.size)
    export_onnx(ScrfdOutputs(model), picture, names, path, batched=False)
    describe_onnx(path, {"recipe": asdict(recipe)})
    return path


def detection_figures(faces: InsightFaceEncoder, pool: PicturePool) -> dict[str, float]:
    """Ask insightface itself, with the shipped folder.

    Args:
        faces: encoder of the folder that holds the detector.
        pool: portraits with one person each.

    Returns:
        `recall`: share of portraits with exactly one face at the right place; `points_px`: mean
        distance of the five points in picture pixels; `false_faces`: faces per empty picture;
        `false_noise`, `false_discs`, `turned_faces`: faces per picture of noise, of a disc, and per
        portrait on its head or a side, where it is not turned upright.
    """
    right, errors = 0, []
    for image, truth in zip(pool.images, pool.keypoints[:, 0], strict=True):
        found = faces.detect(image.float() / 255)
        if len(found) == 1:
            error = float((found[0].keypoints - truth).norm(dim=1).mean())
            right += error < 6
            errors.append(error)
    draw = torch.Generator().manual_seed(7)
    nobody: dict[str, Sequence[Tensor]] = {
        "false_faces": list(empty_pictures(200, draw)),
        "false_noise": list(noise_pictures(100, 64, draw)),
        "false_discs": list(disc_pictures(100, 64, draw)),
        "turned_faces": [i.float().rot90(1 + k % 3) / 255 for k, i in enumerate(pool.images[:150])],
    }
    return {
        "recall": right / len(pool),
        "points_px": sum(errors) / max(1, len(errors)),
        **{
            name: sum(len(faces.detect_as_it_is(image)) for image in images) / len(images)
            for name, images in nobody.items()
        },
    }
