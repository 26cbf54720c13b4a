"""Drawn people as photos that `prepare` reads, and the datasets that it makes of them."""

from __future__ import annotations

from pathlib import Path

import torch

from ...commands import prepare
from ...commands.main import plain_console
from ...data.choices import ChoiceSettings
from ...data.libraries import arrow_library
from ...data.prepared import PreparedDataset
from ...data.records import encoded
from ...errors import DatasetError
from ...storage.atomic import replacing
from .. import paths
from ..world.pool import PicturePool

SIDE = 64
_ROWS = 500
"""Pictures of a row group: so many are read at once."""


def dataset_folder(name: str) -> Path:
    """Where a dataset of drawn people is kept."""
    return paths.BUILD / "dataset" / name


def prepared(name: str, pool: PicturePool) -> PreparedDataset:
    """A pool's people as a dataset; what is there of it already is not made again.

    Nobody needs to be told apart: the names are certain, and a person's pictures differ.

    Args:
        name: of the dataset.
        pool: portraits, person by person.
    """
    photos = paths.BUILD / "photos" / f"{name}.parquet"
    write_photos(pool, photos)
    settings = prepare.Settings(
        source=str(photos),
        out=str(dataset_folder(name)),
        resolution=SIDE,
        faces=str(paths.FACES),
        smallest_face=12,
        choices=ChoiceSettings(same_person=0.0, same_picture=-1),
        encoding="png",
        sheets=1,
        licence="Apache-2.0",
        base="demo",
        workers=torch.get_num_threads(),
        update=True,
    )
    prepare.run(settings, plain_console())
    return PreparedDataset(dataset_folder(name))


def write_photos(pool: PicturePool, path: Path) -> None:
    """A parquet file of pictures, each with the name of its person and a caption.

    The captions never describe the person: that is what the LoRA is for.
    """
    arrow, parquet = arrow_library(), arrow_library("parquet")
    text, picture = arrow.string(), arrow.struct([("bytes", arrow.binary()), ("path", "string")])
    schema = arrow.schema([("image", picture), ("person", text), ("caption", text)])
    numbers = torch.unique_consecutive(pool.identities, return_inverse=True)[1].tolist()
    with replacing(path, DatasetError) as temporary:
        with parquet.ParquetWriter(temporary, schema) as out:
            for start in range(0, len(pool), _ROWS):
                rows = [
                    {
                        "image": {"bytes": encoded(pool.images[k].numpy(), "png"), "path": None},
                        "person": f"{numbers[k]:05d}",
                        "caption": pool.scenes[k].caption(),
                    }
                    for k in range(start, min(start + _ROWS, len(pool)))
                ]
                out.write_table(arrow.Table.from_pylist(rows, schema=schema))
