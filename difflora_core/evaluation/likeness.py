"""Who is who: pictures of unknown people compared with reference pictures of one person."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ImageError, NoFaceError, counted
from ..vision.face_choice import FaceOptions, choose_face
from ..vision.face_encoder import FaceEncoder
from ..vision.grid import LABEL_HEIGHT, LARGEST_SIDE, GridRow, draw_grid
from ..vision.preprocess import as_pictures
from .metrics import centroid, copy_paste, face_similarity

_LARGEST = FaceOptions(on_missing="skip")
_COLUMNS, _SIDE = 4, 192


@dataclass(frozen=True)
class Likeness:
    """How much pictures look like a person.

    `similarity`: (N,) cosine of each picture's largest face to the references' mean direction, 0
    without a face; `face_found`: (N,) bool; `reference_found`: (R,) bool; `copying`: (N,) see
    `metrics.copy_paste`, None unless other photos of the person are known.
    """

    similarity: Tensor
    face_found: Tensor
    reference_found: Tensor
    copying: Tensor | None = None

    @property
    def mean(self) -> float:
        """Mean over the pictures that show a face; 0 where none does."""
        return float(self.similarity[self.face_found].mean()) if self.face_found.any() else 0.0

    def captions(self) -> list[str]:
        """One short text per picture."""
        pairs = zip(self.similarity.tolist(), self.face_found.tolist(), strict=True)
        return [f"{value:.3f}" if found else "no face" for value, found in pairs]

    def report(self) -> str:
        """The numbers as text, one line per picture."""
        found, count = int(self.face_found.sum()), len(self.face_found)
        lines = [f"mean similarity {self.mean:.3f} over {found} of {counted(count, 'picture')}"]
        if not found:
            lines = ["no picture shows a face, so nothing was compared"]
        missing = [str(k) for k, f in enumerate(self.reference_found.tolist(), start=1) if not f]
        if missing:
            lines.append(f"no face in reference {', '.join(missing)}, left out")
        if self.copying is not None and found:
            copying = float(self.copying[self.face_found].mean())
            lines.append(
                f"copy-paste {copying:+.2f} (1: the references again, 0: as near to other photos)"
            )
        lines += [f"picture {k}: {text}" for k, text in enumerate(self.captions(), start=1)]
        return "\n".join(lines)


def compare_people(
    references: Tensor, pictures: Tensor, faces: FaceEncoder, others: Tensor | None = None
) -> Likeness:
    """Compare the largest face of each picture with a person.

    Args:
        references: (R, H, W, 3) in [0, 1], pictures of one person.
        pictures: (N, H, W, 3) in [0, 1].
        faces: finds and recognises faces.
        others: (T, H, W, 3), photos of the person that were not used, for `copying`.

    Raises:
        NoFaceError: no reference, or no other photo, shows a face.
        ImageError: a picture cannot be used, or there is none.
    """
    known, reference_found = _seen("reference", references, faces)
    shown, face_found = _seen("compared", pictures, faces, needed=False)
    person = centroid(known[reference_found])
    similarity = face_similarity(shown, person[None], face_found)
    if others is None:
        return Likeness(similarity, face_found, reference_found)
    more, more_found = _seen("other", others, faces)
    copying = copy_paste(shown, known[reference_found], more[more_found])
    return Likeness(similarity, face_found, reference_found, copying)


def _seen(
    name: str, images: Tensor, faces: FaceEncoder, needed: bool = True
) -> tuple[Tensor, Tensor]:
    """Embeddings (N, E) of the largest faces, and (N,) where there is one; raises if needed."""
    if not len(images):
        raise ImageError(f"The batch of {name} pictures is empty. Connect at least one.")
    rows, found = _embeddings(images, faces)
    if needed and not found.any():
        raise NoFaceError(
            f"There is no face in any of the {len(found)} {name} pictures, so nothing can be "
            "compared. Use pictures with a clear face, or another face analysis."
        )
    return rows, found


def likeness_picture(references: Tensor, pictures: Tensor, likeness: Likeness) -> Tensor:
    """References above, pictures below with their similarity: (H, W, 3) in [0, 1]."""
    columns = max(_COLUMNS, math.ceil(math.sqrt(len(pictures))))
    rows = [GridRow(list(references[:columns]), "reference")]
    captions = likeness.captions()
    for start in range(0, len(pictures), columns):
        part = slice(start, start + columns)
        label = f"mean similarity {likeness.mean:.3f}" if start == 0 else ""
        rows.append(GridRow(list(pictures[part]), label, captions[part]))
    widest = max(1.0, *(images.shape[2] / images.shape[1] for images in (references, pictures)))
    side = min(_SIDE, int(LARGEST_SIDE / widest) // max(columns, len(rows) + 1) - LABEL_HEIGHT)
    return draw_grid(rows, max(side, 1))


def _embeddings(pictures: Tensor, faces: FaceEncoder) -> tuple[Tensor, Tensor]:
    """(N, E) of the largest faces, zeros without one, and which were found."""
    chosen = [choose_face(faces.detect(picture), _LARGEST) for picture in as_pictures(pictures)]
    size = next((len(face.embedding) for face in chosen if face), faces.embedding_dim)
    rows = [face.embedding if face else torch.zeros(size) for face in chosen]
    return torch.stack(rows), torch.tensor([face is not None for face in chosen])
