"""Networks that say what a picture shows, each from a folder here; nothing is downloaded.

DINO, DINOv2, CLIP and PickScore are folders as transformers writes them, with safetensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, Dinov2Model, ViTModel

from ..errors import EncoderError, shown
from ..storage.file_digest import hashed
from ..vision.face_choice import FaceOptions, choose_face
from ..vision.face_encoder import FaceEncoder

WEIGHTS = (".safetensors", ".onnx", ".pth", ".pt", ".bin")


class Backbone(Protocol):
    """Pictures, and what was asked for, to numbers."""

    def __call__(self, pictures: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """(N, D) float32 on the CPU of pictures (H, W, 3) in [0, 1] and their N prompts."""
        ...


class DINO:
    """Class token of DINO ViT-S/16 (arXiv:2104.14294), the convention of DreamBooth.

    Args:
        folder: of transformers' ViTModel.
        device: where it computes.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.model = _loaded(ViTModel, folder, device, add_pooling_layer=False)
        self.pixels = _Pixels(folder, device)

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """(N, D) of N pictures."""
        return self.model(self.pixels(pictures)).last_hidden_state[:, 0].cpu()


class DINOv2:
    """Mean over all tokens of DINOv2's last layer, as the script of a co-author of DiffLoRA has it.

    That script prints (1 + cosine) / 2 (SKDDJ/Image_Sim_Cal).

    Args:
        folder: of transformers' Dinov2Model.
        device: where it computes.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.model = _loaded(Dinov2Model, folder, device)
        self.pixels = _Pixels(folder, device)

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """(N, D) of N pictures."""
        return self.model(self.pixels(pictures)).last_hidden_state.mean(1).cpu()


class CLIP:
    """Embeddings of pictures and of prompts in one space (arXiv:2103.00020).

    Args:
        folder: of transformers' CLIPModel and its tokenizer.
        device: where it computes.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.model, self.device = _loaded(CLIPModel, folder, device), device
        self.pixels = _Pixels(folder, device)
        self.tokenizer: Any = _read(AutoTokenizer, folder)

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """(N, 2 D): unit embedding of each picture, then that of its prompt."""
        images = _tensor(self.model.get_image_features(self.pixels(pictures)))
        unique = list(dict.fromkeys(prompts))
        words = self.tokenizer(unique, padding=True, truncation=True, return_tensors="pt")
        texts = _tensor(self.model.get_text_features(**words.to(self.device)))
        texts = texts[[unique.index(prompt) for prompt in prompts]]
        return torch.cat([F.normalize(images, dim=1), F.normalize(texts, dim=1)], 1).cpu()


class PickScore(CLIP):
    """What people would pick: 100 x cosine of a CLIP tuned on choices (arXiv:2305.01569).

    Args:
        folder: of PickScore_v1 and its tokenizer.
        device: where it computes.
    """

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """(N, 1) scores, about 19 to 23."""
        images, texts = super().__call__(pictures, prompts).chunk(2, 1)
        scale = self.model.logit_scale.exp().cpu()
        return scale * (images * texts).sum(1, keepdim=True)


class Faces:
    """The largest face of each picture.

    Args:
        encoder: finds and recognises it; better another than the one that photos are shown to.
    """

    def __init__(self, encoder: FaceEncoder) -> None:
        self.encoder = encoder

    def __call__(self, pictures: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """(N, 1 + E): 1 where there is a face, and its embedding; zeros where there is none."""
        options = FaceOptions(on_missing="skip")
        faces = [choose_face(self.encoder.detect(picture), options) for picture in pictures]
        size = next((len(f.embedding) for f in faces if f), self.encoder.embedding_dim)
        rows = [
            F.pad(f.embedding, (1, 0), value=1.0) if f else torch.zeros(1 + size) for f in faces
        ]
        return torch.stack(rows)


class _Pixels:
    """Pictures as a network was trained to see them, by the preprocessor of its folder."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.process: Any = _read(AutoImageProcessor, folder)
        self.device = device

    def __call__(self, pictures: Sequence[Tensor]) -> Tensor:
        """(N, 3, h, w)."""
        arrays = [(p * 255).round().to(torch.uint8).cpu().numpy() for p in pictures]
        done = self.process(images=arrays, input_data_format="channels_last", return_tensors="pt")
        return done["pixel_values"].to(self.device)


def weight_files(path: Path) -> dict[str, str]:
    """SHA-256 of each file of weights of a folder, or of one file.

    Raises:
        EncoderError: there is none, or one cannot be read.
    """
    files = [path] if path.is_file() else sorted(f for f in path.glob("*") if f.suffix in WEIGHTS)
    if not files:
        raise EncoderError(f"{shown(str(path), 300)} holds no weights ({', '.join(WEIGHTS)}).")
    try:
        return {file.name: hashed(file).hexdigest() for file in files}
    except OSError as error:
        raise EncoderError(f"{shown(str(path), 300)} cannot be read: {error.strerror}.") from error


def _read(kind: Any, folder: Path, **options: Any) -> Any:
    """What a class of transformers makes of a folder.

    Raises:
        EncoderError: it is not there, or is something else.
    """
    if not folder.is_dir():
        raise EncoderError(f"{shown(str(folder), 300)} is no folder of a network of transformers.")
    try:
        return kind.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # transformers says in many ways what is missing
        raise EncoderError(
            f"{shown(str(folder), 300)} cannot be read as {kind.__name__} "
            f"({shown(str(error), 200)}). Its model.safetensors, config.json and preprocessor "
            "(of CLIP the tokenizer too) belong into one folder."
        ) from error


def _loaded(kind: Any, folder: Path, device: torch.device, **options: Any) -> Any:
    """A network with all of its weights, frozen.

    Raises:
        EncoderError: a weight is missing: transformers would draw it at random.
    """
    model, report = _read(kind, folder, use_safetensors=True, output_loading_info=True, **options)
    if missing := sorted(report["missing_keys"]):
        raise EncoderError(
            f"{shown(str(folder), 300)} is no {kind.__name__}: it lacks {shown(missing[0])}."
        )
    return model.float().eval().requires_grad_(False).to(device)


def _tensor(found: Any) -> Tensor:
    """Features, which newer versions of transformers give inside a record."""
    features: Tensor = getattr(found, "pooler_output", found)
    return features
