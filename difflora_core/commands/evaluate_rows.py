"""The rows of an evaluation: what each gives the base for a person, whatever file it is."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.base import AdapterEntry, AdapterSet
from ..data.generator_workflow import read_workflow
from ..errors import CheckpointError, ConfigError, LayoutError, LoRAFileError, counted, shown
from ..evaluation.backbones import weight_files
from ..evaluation.drawing import Adaptation
from ..lora.formats.change import is_constant, keys_by_role, kind_of
from ..lora.formats.state_dict import to_state_dict, with_peft_alphas
from ..lora.formats.stems import other_part, stem_table, why_nothing
from ..lora.layout import module_size, unet_name_map
from ..lora.weights import LoRAWeights
from ..methods.lora import layer_adapter, layer_tensors
from ..models.identity_model import IdentityModel
from ..storage.checkpoint import METADATA_KEY
from ..storage.identity_models import load_identity_model, model_folder
from ..storage.image_files import SUFFIXES, read_image
from ..storage.lora_file import read_lora_file
from ..storage.safetensors_io import read_header
from ..training.fingerprint import fingerprint
from ..vision.face_choice import FaceOptions
from ..vision.face_encoder import FaceEncoder
from ..vision.features import extract_features
from ..vision.image_encoder import ImageEncoder
from .encoders import options_for
from .evaluate_workflows import WorkflowRow

BASE, PHOTOS, REAL = "base", "photos", "real"
"""Names that are taken: a row, people's photos, and what FID and KID compare with."""
TRIGGER = "modelspec.trigger_phrase"


@dataclass(frozen=True, eq=False)
class Setting:
    """What rows share.

    Attributes:
        photos: person to the photos that a model is shown.
        unet: of the base.
        encoders: of photos, opened when the first model asks; they are the same for all.
        faces: whether a face analysis is among them.
        encoder_key: of the encoders' files.
        device: where models compute.
        say: prints a line.
    """

    photos: Mapping[str, Sequence[Path]]
    unet: Any
    encoders: Callable[[], tuple[FaceEncoder, ImageEncoder]]
    faces: bool
    encoder_key: str
    device: torch.device
    say: Callable[[str], None]


class Row(ABC):
    """A row of the table that is drawn here.

    Attributes:
        name: of the row.
        strength: of its LoRAs.
    """

    name: str
    strength: float = 1.0

    @abstractmethod
    def key(self, person: str) -> str:
        """Digest of everything that the LoRA of a person depends on."""

    @abstractmethod
    def adaptation(self, person: str) -> Adaptation:
        """What the base is given for a person."""


@dataclass(frozen=True)
class BaseRow(Row):
    """The base model as it is."""

    name: str = BASE
    strength: float = 0.0

    def key(self, person: str) -> str:
        """Nothing."""
        return ""

    def adaptation(self, person: str) -> Adaptation:
        """Nothing."""
        return Adaptation()


@dataclass(frozen=True, eq=False)
class LoRARow(Row):
    """One LoRA for everybody, or one a person.

    Attributes:
        files: of each person.
        setting: what rows share.
    """

    name: str
    files: Mapping[str, Path]
    setting: Setting
    strength: float = 1.0
    _digests: dict[Path, str] = field(default_factory=dict)

    def key(self, person: str) -> str:
        """Digest of the file."""
        file = self.files[person]
        if file not in self._digests:
            self._digests[file] = fingerprint(weight_files(file))
        return self._digests[file]

    def adaptation(self, person: str) -> Adaptation:
        """The person's LoRA.

        Raises:
            LoRAFileError: the file cannot be read.
            LayoutError: it is for another base.
        """
        path = self.files[person]
        file = read_lora_file(path)
        adapters, note = adapters_of(with_peft_alphas(file.tensors, file.metadata), self.setting)
        if note:
            self.setting.say(f"{shown(path.name)}: {note}")
        return Adaptation(adapters, self.strength, file.metadata.get(TRIGGER, ""))


class ModelRow(Row):
    """A model that makes the LoRA of a person's photos.

    Args:
        name: of the row.
        path: the model's file or folder.
        setting: what rows share.
        strength: of the LoRAs.
    """

    def __init__(self, name: str, path: Path, setting: Setting, strength: float = 1.0) -> None:
        self.name, self.path, self.setting, self.strength = name, path, setting, strength
        self._files = fingerprint(weight_files(path))
        kind = model_folder(path)
        self._trigger = "" if kind is None else kind.trigger
        self._model: IdentityModel | None = None

    def key(self, person: str) -> str:
        """Digest of model, encoders and photos."""
        photos = [weight_files(path) for path in self.setting.photos[person]]
        return fingerprint(self._files, self.setting.encoder_key, photos)

    @torch.no_grad()
    def adaptation(self, person: str) -> Adaptation:
        """The LoRA that the model makes: its best guess.

        Raises:
            DiffLoRAError: the encoders are not the model's, or a photo shows no face.
        """
        if self._model is None:
            self._model = load_identity_model(self.path).to(self.setting.device)
            self._made(self._model, person)  # the first call pays for what libraries prepare
        begun = time.perf_counter()
        weights = self._made(self._model, person)
        seconds = time.perf_counter() - begun
        adapters, _ = adapters_of(to_state_dict(weights, "kohya_ldm"), self.setting)
        return Adaptation(adapters, self.strength, self._trigger, seconds)

    def _made(self, model: IdentityModel, person: str) -> LoRAWeights:
        """Photos to LoRA."""
        pictures = [read_image(path)[0] for path in self.setting.photos[person]]
        options = options_for(model, FaceOptions(), self.setting.faces)
        features = extract_features(pictures, *self.setting.encoders(), options).features
        condition = model.condition(model.complete(features).to(self.setting.device))
        return model.decode(model.mean_latent(condition)).batch_item(0).to(device="cpu")


@dataclass(frozen=True)
class PictureRow:
    """Pictures that another program drew.

    Attributes:
        name: of the row.
        folder: of the pictures, see `evaluation.pictures`.
    """

    name: str
    folder: Path


def open_rows(
    words: Sequence[str], setting: Setting, strengths: Sequence[float]
) -> tuple[list[Row], list[PictureRow | WorkflowRow]]:
    """The rows that words name, `NAME=PATH` or PATH; each LoRA row at each strength.

    Those that are drawn here, and those that other programs draw or have drawn.

    Raises:
        ConfigError: a name stands twice, cannot be a folder's, or a path holds nothing known.
    """
    drawn: list[Row] = []
    foreign: list[PictureRow | WorkflowRow] = []
    for word in words:
        name, _, place = word.rpartition("=")
        path = Path(place)
        name = name or path.stem
        if not path.exists():
            raise ConfigError(f"There is no {shown(str(path), 300)}: a row is NAME=PATH or PATH.")
        if path.suffix.lower() == ".json":
            foreign.append(WorkflowRow(name, read_workflow(path)))
            continue
        if _holds_pictures(path, list(setting.photos)):
            foreign.append(PictureRow(name, path))
            continue
        for strength in strengths:
            suffix = "" if len(strengths) == 1 else f" x {strength:g}"
            drawn.append(_drawn_row(name + suffix, path, setting, strength))
    names = [BASE, PHOTOS, REAL, *(row.name for row in drawn), *(row.name for row in foreign)]
    for name in names:
        if names.count(name) > 1 or not name.strip(". ") or set(name) & set('/\\\0:*?"<>|'):
            raise ConfigError(f"A row cannot be called {shown(name)!r}: say NAME=PATH.")
    return drawn, foreign


def _drawn_row(name: str, path: Path, setting: Setting, strength: float) -> Row:
    """The row of a LoRA, of LoRAs, or of a model."""
    if path.is_dir() and model_folder(path) is None:
        files = {person: path / f"{person}.safetensors" for person in setting.photos}
        missing = [person for person, file in files.items() if not file.is_file()]
        if missing:
            raise ConfigError(
                f"{shown(str(path), 300)} holds no model, no pictures of these people, and no LoRA "
                f"of {counted(len(missing), 'person')}: {shown(missing[0])}.safetensors is missing."
            )
        return LoRARow(name, files, setting, strength)
    if path.is_dir() or _is_model(path):
        return ModelRow(name, path, setting, strength)
    return LoRARow(name, dict.fromkeys(setting.photos, path), setting, strength)


def _is_model(path: Path) -> bool:
    """Whether a file says that it is a DiffLoRA model."""
    try:
        return METADATA_KEY in read_header(path, "model").metadata
    except CheckpointError:
        return False


def _holds_pictures(path: Path, people: Sequence[str]) -> bool:
    """Whether a folder has a picture in the folder of one of the people."""
    if not path.is_dir():
        return False
    folders = [path / person for person in people if (path / person).is_dir()]
    return any(file.suffix.lower() in SUFFIXES for own in folders for file in own.iterdir())


def adapters_of(state: Mapping[str, Tensor], setting: Setting) -> tuple[AdapterSet, str]:
    """What a LoRA of any family changes in the base's UNet, and a sentence on what it does not.

    Args:
        state: key to tensor, with alphas.
        setting: of the base.

    Raises:
        LayoutError: it is for no layer of the base.
        LoRAFileError: what a layer changes depends on the weight it is on (DoRA).
    """
    names = unet_name_map(dict(setting.unet.config))
    modules, table = {ldm: place for place, ldm in names.items()}, stem_table(names)
    entries, left = [], []
    for stem, keys in keys_by_role(state).items():
        if (name := table.get(stem)) is None:
            left.append(stem)
            continue
        parts = {role: state[key] for role, key in keys.items()}
        if not is_constant(parts):
            raise LoRAFileError(
                f"This LoRA has {kind_of(parts)} on {name}: what that changes depends on the "
                "weight it is on, which is not computed here."
            )
        module = setting.unet.get_submodule(modules[name])
        own = layer_tensors(parts, module_size(module))
        entries += [AdapterEntry(modules[name], layer_adapter(own))] if own else []
    if not entries:
        raise LayoutError(
            why_nothing(list(state))
            or "No layer of this LoRA belongs to the base model. Use a LoRA made for it."
        )
    parts_of = Counter(other_part(stem) or "layers that the base does not have" for stem in left)
    said = ", ".join(f"{count} of {part}" for part, count in parts_of.items())
    note = f"{counted(len(entries), 'layer')} read; left out: {said}." if said else ""
    return AdapterSet(tuple(entries)), note
