"""Face recogniser: the FaceEncoder protocol and its insightface implementation.

insightface is optional and imported on first use. Its FaceAnalysis downloads models when a folder
is missing, so it is only ever built on a folder that `face_folder.py` has checked, and cannot then.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import ConfigError, EncoderError
from .face_folder import find_face_folder
from .face_providers import ProviderReport, choose_providers
from .preprocess import as_picture, pad_border, shrink
from .turns import quarter_turns, turn_box, turn_points

logger = logging.getLogger(__name__)

# Tried in this order until a face is found. Detectors miss faces that are larger than the ones
# they were trained on; a smaller input or a border makes such a face smaller again.
DETECTOR_SIZES = (640, 512, 384, 256)
BORDERS = (0.0, 0.25, 0.5, 1.0)
TURNED = 2
"""So many of the borders are tried on turned pictures."""
SURER = 0.1
"""By so much a face of a turned picture has to be surer than one of the upright picture."""
TURNS = (1, 3, 2)
"""Quarter turns of a picture in which no upright face was found; lying on a side comes first."""

LANDMARKS = "landmark_2d_106"
"""insightface's name of the model that finds the outline of a face, and of what it finds."""

LONGEST_SIDE = 2048  # detectors see 640 px at most; larger pictures only cost memory
SHORTEST_SIDE = 8  # below that there is no face to find, and resizing would reach zero pixels
LONGEST_RATIO = 8  # longer strips get a border, for the same reason


@dataclass(frozen=True)
class DetectedFace:
    """One face of a picture, in pixels of that picture.

    Attributes:
        box: (4,) float32 x1, y1, x2, y2; may reach over the border.
        score: The detector's confidence in [0, 1].
        keypoints: (5, 2) float32 eyes, nose tip, mouth corners.
        embedding: (Df,) float32 as the recogniser gives it, not normalised.
        landmarks: (106, 2) float32 outline and features of the face; None where the package has
            no model for them.
    """

    box: Tensor
    score: float
    keypoints: Tensor
    embedding: Tensor
    landmarks: Tensor | None = None

    @property
    def area(self) -> float:
        """Area of the box in square pixels."""
        x1, y1, x2, y2 = (float(value) for value in self.box)
        return max(0.0, x2 - x1) * max(0.0, y2 - y1)

    @property
    def quarter_turns(self) -> int:
        """How often `torch.rot90` has to turn the picture for this face to stand upright."""
        return quarter_turns(self.keypoints, self.area**0.5)

    def turned(self, turns: int, height: int, width: int) -> DetectedFace:
        """The face in its picture (height, width, 3) after `torch.rot90(picture, turns)`."""
        where = (turns, height, width)
        landmarks = self.landmarks
        return replace(
            self,
            box=turn_box(self.box, *where),
            keypoints=turn_points(self.keypoints, *where),
            landmarks=None if landmarks is None else turn_points(landmarks, *where),
        )


class FaceEncoder(Protocol):
    """Finds faces and describes who they are."""

    @property
    def embedding_dim(self) -> int:
        """Df, the length of an embedding."""
        ...

    def detect(self, image: Tensor) -> list[DetectedFace]:
        """All faces of one picture (H, W, 3) in [0, 1]; an empty list when there is none."""
        ...


def _import_insightface() -> tuple[Any, Any]:
    """The modules insightface.app and onnxruntime, or a sentence that says what to install."""
    try:
        return importlib.import_module("insightface.app"), importlib.import_module("onnxruntime")
    except ImportError as error:
        raise EncoderError(
            f"Face analysis needs insightface and onnxruntime, which could not be loaded ({error})."
            " In ComfyUI's Python run: python -m pip install 'insightface>=2' onnxruntime"
        ) from error


@contextmanager
def _no_download(folder: Path) -> Iterator[None]:
    """A block in which insightface takes a folder as it is.

    It downloads a package whose folder is missing, also one that vanished since it was checked.
    """
    module: Any = importlib.import_module("insightface.app.face_analysis")
    with _LOADING:
        download = module.ensure_available
        module.ensure_available = lambda *_, **__: str(folder)
        try:
            yield
        finally:
            module.ensure_available = download


_LOADING = threading.Lock()


class InsightFaceEncoder:
    """FaceEncoder over insightface's FaceAnalysis (2.x, and 0.7.3's call form).

    Args:
        directory: Folder with the .onnx files, or the folder that holds it (see `name`).
        name: Model package, e.g. "antelopev2": `directory/name` and `directory/name/name` are
            searched too.
        provider: A key of `PROVIDERS`; unavailable ones fall back to the CPU, see `providers`.
        det_size: Largest detector input in pixels; smaller ones are tried after it. Detectors
            with a fixed input use their own.
        det_thresh: Lowest score of a face; 0.5 is insightface's default.

    Attributes:
        name: Which recogniser this is, e.g. "antelopev2/glintr100.onnx"; kept with trained models.
        providers: ProviderReport of what really runs.

    Raises:
        EncoderError: insightface is not installed, or the folder is absent, incomplete or broken.
        ConfigError: Unknown provider, or a detector size below 32 or not a multiple of 32.
    """

    def __init__(
        self,
        directory: str | Path,
        name: str | None = None,
        provider: str = "cpu",
        det_size: int = DETECTOR_SIZES[0],
        det_thresh: float = 0.5,
    ) -> None:
        if det_size < 32 or det_size % 32:
            raise ConfigError(f"The detector size {det_size} must be a multiple of 32, e.g. 640.")
        folder = find_face_folder(directory, name)
        app, onnxruntime = _import_insightface()
        available = tuple(onnxruntime.get_available_providers())
        chosen = choose_providers(provider, available)
        try:
            with _no_download(folder.path):
                analysis = app.FaceAnalysis(
                    name=str(folder.path),
                    root=str(folder.path.parent),
                    allowed_modules=["detection", "recognition", LANDMARKS],
                    providers=chosen,
                )
            analysis.prepare(ctx_id=0, det_thresh=det_thresh, det_size=(det_size, det_size))
        except Exception as error:  # onnxruntime's errors share no base class of their own
            raise EncoderError(
                f"insightface could not load the models in {folder.path}: {error or 'no reason'}. "
                "Download the package again; files must not be renamed or cut short."
            ) from error
        self.name = f"{folder.path.name}/{folder.recogniser}"
        self._adopt(analysis, provider, available, det_size)

    @classmethod
    def wrap(cls, analysis: Any, embedding_dim: int | None = None) -> InsightFaceEncoder:
        """Use a FaceAnalysis that another node has loaded (anything with `.get(bgr)`).

        Args:
            analysis: The object; it is not changed beyond the time of a call.
            embedding_dim: Df, when the object has no `models["recognition"]` to ask (default 512).

        Raises:
            EncoderError: the object has no `get`.
        """
        if not callable(getattr(analysis, "get", None)):
            raise EncoderError(
                f"A {type(analysis).__name__} is not a face analysis. Connect the output of "
                "Load Face Analysis or of another pack's insightface loader."
            )
        encoder = cls.__new__(cls)
        encoder.name = Path(str(getattr(analysis, "model_dir", "unknown"))).name
        encoder._adopt(analysis, None, (), DETECTOR_SIZES[0], embedding_dim)
        return encoder

    def _adopt(
        self,
        analysis: Any,
        asked: str | None,
        available: tuple[str, ...],
        det_size: int,
        embedding_dim: int | None = None,
    ) -> None:
        """Keep the loaded analysis and ask it what it is."""
        models: Mapping[str, Any] = getattr(analysis, "models", None) or {}
        self.analysis = analysis
        self._embedding_dim = embedding_dim or _embedding_dim(models.get("recognition"))
        self._detector = getattr(analysis, "det_model", None)
        self._sizes: tuple[int | None, ...] = (None,)
        if self._detector is not None and not _has_fixed_input(self._detector):
            self._sizes = (det_size, *(size for size in DETECTOR_SIZES if size < det_size))
        used = {
            task: model.session.get_providers()[0]
            for task, model in models.items()
            if hasattr(model, "session")
        }
        self.providers = ProviderReport(asked, available, used)
        if not self.providers.honoured:
            logger.warning("%s", self.providers.sentence())

    @property
    def embedding_dim(self) -> int:
        """Df, the length of an embedding."""
        return self._embedding_dim

    @property
    def recogniser(self) -> str:
        """File name of the recogniser; empty when the analysis does not say."""
        models: Mapping[str, Any] = getattr(self.analysis, "models", None) or {}
        return Path(str(getattr(models.get("recognition"), "model_file", None) or "")).name

    def detect(self, image: Tensor) -> list[DetectedFace]:
        """All faces of one picture, with retries for faces that fill it or do not stand upright.

        Args:
            image: (H, W, 3) float32 in [0, 1]; any size, large ones are scaled down.

        Returns:
            The faces in the picture's own pixels; empty when no attempt finds one.

        Raises:
            ImageError: NaN pixels or a wrong shape.
            EncoderError: The analysis has no recogniser or no face points.
        """
        found = self.detect_as_it_is(image, BORDERS[:1])
        if found:
            return found
        # Within a border a face on its head is smaller, and small ones pass for upright ones. So
        # what is found there gives way to what is clearly a face of the turned picture.
        best = self.detect_as_it_is(image, BORDERS[1:])
        surest = _surest(best) + SURER if best else 0.0
        for turns in TURNS:
            turned = torch.rot90(image, turns)
            faces = self.detect_as_it_is(turned, BORDERS[:TURNED])
            if faces and _surest(faces) > surest:
                best = [face.turned(-turns, *turned.shape[:2]) for face in faces]
                surest = _surest(faces)
        return best

    def detect_as_it_is(
        self, image: Tensor, borders: Sequence[float] = BORDERS
    ) -> list[DetectedFace]:
        """As `detect`, without turning the picture.

        Args:
            image: (H, W, 3).
            borders: widths that are tried, as shares of the longer side.
        """
        picture = as_picture(image)
        if min(picture.shape[:2]) < SHORTEST_SIDE:
            return []
        picture, scale = shrink(picture.cpu(), LONGEST_SIDE)
        pixels = _to_bgr(picture)
        for border in borders:
            padded, width = pad_border(pixels, border)
            bgr = padded.numpy()
            for size in self._sizes:
                faces = self._get(bgr, size)
                if faces:
                    return [_face_record(face, width, scale) for face in faces]
        return []

    def _get(self, bgr: Any, size: int | None) -> list[Any]:
        """Run the analysis at one detector size."""
        if size is None:
            return list(self.analysis.get(bgr))
        with _detector_size(self._detector, size):
            return list(self.analysis.get(bgr))


def _surest(faces: Sequence[DetectedFace]) -> float:
    """The highest score of some faces."""
    return max(face.score for face in faces)


def _has_fixed_input(detector: Any) -> bool:
    """True when the detector's ONNX file fixes its input height and width."""
    session = getattr(detector, "session", None)
    if session is None:
        return True  # not insightface's own detector: leave its settings alone
    return all(isinstance(side, int) for side in session.get_inputs()[0].shape[2:4])


@contextmanager
def _detector_size(detector: Any, size: int) -> Iterator[None]:
    """Set the detector's input size and put it back: the object may be shared with other nodes.

    `prepare` cannot do it: 0.7.3 ignores a second size. 2.x reads the list, 0.7.3 the pair.
    """
    names = [name for name in ("input_size", "input_sizes") if hasattr(detector, name)]
    before = {name: getattr(detector, name) for name in names}
    try:
        for name in names:
            setattr(detector, name, (size, size) if name == "input_size" else [(size, size)])
        yield
    finally:
        for name, value in before.items():
            setattr(detector, name, value)


def _embedding_dim(recogniser: Any) -> int:
    """Df of an ArcFaceONNX from its output shape; 512, insightface's usual, when it is silent."""
    shape = getattr(recogniser, "output_shape", None)
    return shape[-1] if shape and isinstance(shape[-1], int) else 512


def _to_bgr(picture: Tensor) -> Tensor:
    """(H, W, 3) in [0, 1] to the contiguous 8-bit BGR pixels that insightface takes."""
    pixels = (picture * 255).round().to(torch.uint8).flip(-1).contiguous()
    height, width = pixels.shape[:2]
    missing = max(height, width) // LONGEST_RATIO - min(height, width)
    if missing <= 0:
        return pixels
    # On the far side only, so that coordinates stay.
    extra = (0, 0, 0, missing) if width < height else (0, 0, 0, 0, 0, missing)
    return torch.nn.functional.pad(pixels, extra)


def _face_record(face: Any, border: int, scale: float) -> DetectedFace:
    """insightface's Face to our record, in pixels of the original picture."""
    if face.kps is None or face.embedding is None:
        lacking = "five face points" if face.kps is None else "face embedding"
        raise EncoderError(
            f"The face analysis gave no {lacking}. Load a package with a detector that finds "
            "points and a recogniser, e.g. antelopev2 or buffalo_l."
        )
    landmarks = getattr(face, LANDMARKS, None)
    if landmarks is not None:
        landmarks = (torch.as_tensor(landmarks).float()[:106, :2] - border) / scale
    return DetectedFace(
        box=(torch.as_tensor(face.bbox[:4]).float() - border) / scale,
        score=float(face.det_score),
        keypoints=(torch.as_tensor(face.kps).float() - border) / scale,
        embedding=torch.as_tensor(face.embedding).float().flatten(),
        landmarks=landmarks,
    )
