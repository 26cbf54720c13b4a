"""The networks that judge an evaluation: which were named, and what each file is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from ..config import Config
from ..demo import paths
from ..demo.networks.judges import load_judges
from ..evaluation.backbones import CLIP, DINO, Backbone, DINOv2, Faces, PickScore, weight_files
from ..evaluation.image_reward import ImageReward
from ..evaluation.inception import InceptionFeatures
from ..training.fingerprint import fingerprint
from ..vision.face_encoder import DetectedFace, InsightFaceEncoder

DEMO = "demo"


@dataclass(frozen=True)
class Backbones(Config):
    """The networks that judge; a column whose network is not named is left out.

    Args:
        dino: folder of DINO ViT-S/16 (facebook/dino-vits16): DINO.
        dinov2: folder of DINOv2-base (facebook/dinov2-base): DINOv2, mapped to (1 + cosine) / 2.
        clip: folder of CLIP ViT-B/32 (openai/clip-vit-base-patch32): CLIP-I and CLIP-T.
        image_reward: folder with ImageReward.pt and the vocab.txt of bert-base-uncased.
        pick_score: folder of PickScore_v1 with its tokenizer.
        faces: folder of an insightface package, better another than --faces; or demo, the demo
            world's judge: Face Sim, R-FaceSim, copy-paste.
        inception: file of FID's Inception (pt_inception-2015-12-05-6726825d.pth): FID and KID.
    """

    dino: str = ""
    dinov2: str = ""
    clip: str = ""
    image_reward: str = ""
    pick_score: str = ""
    faces: str = ""
    inception: str = ""


@dataclass(frozen=True)
class OpenBackbones:
    """What was opened.

    Attributes:
        networks: by the names that `evaluation.scores` knows.
        digests: of each one's files.
        files: of each one, with SHA-256.
        missing: a sentence for each that was not named.
    """

    networks: Mapping[str, Backbone]
    digests: Mapping[str, str]
    files: Mapping[str, Mapping[str, str]]
    missing: tuple[str, ...]


def open_backbones(settings: Backbones, device: torch.device) -> OpenBackbones:
    """Opens what was named.

    Raises:
        EncoderError: a folder or file is not what it should be.
    """
    networks: dict[str, Backbone] = {}
    digests, files, missing = {}, {}, []
    for field in fields(settings):
        title, columns, open_one = KINDS[field.name]
        place = getattr(settings, field.name)
        if not place:
            missing.append(f"{columns} left out: --backbones.{field.name.replace('_', '-')}")
            continue
        judge = field.name == "faces" and place == DEMO
        path = paths.JUDGES / "embedder.safetensors" if judge else Path(place)
        files[f"{title} {path.name}"] = weight_files(path)
        digests[title] = fingerprint(files[f"{title} {path.name}"])
        networks[title] = Faces(DemoJudge()) if judge else open_one(path, device)
    return OpenBackbones(networks, digests, files, tuple(missing))


def _faces(folder: Path, device: torch.device) -> Faces:
    """An insightface package."""
    return Faces(InsightFaceEncoder(folder, provider="cuda" if device.type == "cuda" else "cpu"))


KINDS: Mapping[str, tuple[str, str, Callable[[Path, torch.device], Backbone]]] = {
    "dino": ("DINO", "DINO", DINO),
    "dinov2": ("DINOv2", "DINOv2", DINOv2),
    "clip": ("CLIP", "CLIP-I, CLIP-T", CLIP),
    "image_reward": ("ImageReward", "ImageReward", ImageReward),
    "pick_score": ("PickScore", "PickScore", PickScore),
    "faces": ("faces", "Face Sim, R-FaceSim, copy-paste", _faces),
    "inception": ("Inception", "FID, KID", InceptionFeatures),
}
"""Of each setting: name, its columns, and what opens it."""


class DemoJudge:
    """The demo world's judge as a FaceEncoder: it knows whole pictures with a face on them.

    The shipped detector says whether there is a face; the judge shares nothing with the recogniser
    that photos are shown to.
    """

    def __init__(self) -> None:
        self.detector, self.judges = InsightFaceEncoder(paths.FACES), load_judges(paths.JUDGES)
        self.embedding_dim = self.judges.embed(torch.zeros(1, 64, 64, 3)).shape[1]

    def detect(self, image: Tensor) -> list[DetectedFace]:
        """The largest face of a picture (H, W, 3), with the judge's embedding of the picture."""
        found = self.detector.detect(image)
        if not found:
            return []
        face = max(found, key=lambda own: own.area)
        embedding = self.judges.embed(image[None])[0]
        return [DetectedFace(face.box, face.score, face.keypoints, embedding)]
