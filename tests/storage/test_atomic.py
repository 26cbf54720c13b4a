"""The one writer: whole or not at all, its mode, its links, and what killed writers leave."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from difflora_core.errors import CheckpointError, ImageError
from difflora_core.storage.atomic import STALE_SECONDS, replacing, write_text
from difflora_core.storage.image_files import write_image

ROOT = Path(__file__).resolve().parents[2]


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask():
    """Sets the process's umask, and puts it back."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(("mask", "wanted"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_has_the_mode_of_the_umask(tmp_path, umask, mask, wanted):
    umask(mask)
    assert mode(write_text(tmp_path / "a", "x")) == wanted


@pytest.mark.parametrize("old", [0o600, 0o640, 0o644, 0o664])
def test_an_old_file_keeps_its_mode(tmp_path, umask, old):
    """Also while it is written: a private file is never readable, not for a moment."""
    path = write_text(tmp_path / "a", "old")
    path.chmod(old)
    with replacing(path) as temporary:
        assert mode(temporary) & ~old == 0
        temporary.write_text("new")
    assert (mode(path), path.read_text()) == (old, "new")


def test_a_link_stays_and_its_target_is_written(tmp_path):
    target = write_text(tmp_path / "elsewhere" / "real", "old")
    link = tmp_path / "link"
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    hanging = tmp_path / "hanging"
    hanging.symlink_to(tmp_path / "elsewhere" / "later")
    write_text(hanging, "made")
    assert (tmp_path / "elsewhere" / "later").read_text() == "made"


KILLED = """
import os, sys, signal
from difflora_core.storage.atomic import replacing
with replacing(sys.argv[1]) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_leftovers_of_killed_writers_are_swept_by_the_next(tmp_path):
    path = write_text(tmp_path / "lib.safetensors", "old")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    (left,) = set(tmp_path.iterdir()) - {path}
    write_text(path, "new")
    assert left.exists()  # a writer of another machine may still be at it
    older = tmp_path / ".lib.safetensors.ab_3k9xz"  # as version 0.1.0 named them
    older.write_text("half")
    others = [tmp_path / ".lib.safetensors.lock", tmp_path / ".other.safetensors.ab_3k9xz"]
    long_ago = time.time() - STALE_SECONDS - 10
    for file in (left, older, *others):
        file.touch()
        os.utime(file, (long_ago, long_ago))
    write_text(path, "newer")
    assert set(tmp_path.iterdir()) == {path, *others}


@pytest.mark.parametrize(
    "name", ["x" * 256, "é" * 128, "a\0b", "\ud800", "there", "there/below/a", "/dev/null"]
)
def test_names_that_cannot_be_written(tmp_path, name):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "below").write_text("a file")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match="could not be written") as caught:
        write_text(tmp_path / name, "x")
    str(caught.value).encode()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_name_of_255_bytes_is_written(tmp_path):
    path = write_text(tmp_path / ("é" * 127 + "x"), "x")
    assert path.read_text() == "x"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser writes everywhere")
def test_a_folder_and_a_file_that_are_write_protected(tmp_path):
    path = write_text(tmp_path / "a", "old")
    path.chmod(0o400)
    with pytest.raises(CheckpointError, match="write-protected"):
        write_text(path, "new")
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="could not be written"):
        write_text(tmp_path / "b", "new")
    tmp_path.chmod(0o700)


FULL = """
import resource, signal, sys, torch
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
from difflora_core.errors import DiffLoRAError
from difflora_core.storage.atomic import write_text
from difflora_core.storage.image_files import write_image
from difflora_core.storage.safetensors_io import write_atomic
folder = sys.argv[1]
for write in (
    lambda: write_text(f"{folder}/text", "x" * 10_000),
    lambda: write_atomic({"a": torch.zeros(10_000)}, {}, f"{folder}/tensors"),
    lambda: write_image(torch.rand(100, 100, 3), f"{folder}/picture.png"),
):
    try:
        write()
    except DiffLoRAError as error:
        assert "could not be written" in str(error), error
    else:
        raise SystemExit("it was written")
"""


def test_a_full_disk_leaves_the_old_files(tmp_path):
    """A limit on the size of files fails as a full disk does: in the middle of a write."""
    old = [write_text(tmp_path / name, "old") for name in ("text", "tensors", "picture.png")]
    subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], cwd=ROOT, check=True)
    assert sorted(tmp_path.iterdir()) == sorted(old)
    assert {path.read_text() for path in old} == {"old"}


def test_a_folder_that_goes_away_meanwhile(tmp_path):
    folder = tmp_path / "gone"
    with pytest.raises(CheckpointError, match="could not be written"):  # noqa: PT012
        with replacing(folder / "a") as temporary:
            temporary.unlink()
            folder.rmdir()


def test_an_error_of_the_caller_is_his_own(tmp_path):
    path = write_text(tmp_path / "a", "old")
    with pytest.raises(ZeroDivisionError), replacing(path):
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert path.read_text() == "old"


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".tif"])
def test_pictures_are_written_the_same_way(tmp_path, suffix):
    from PIL import Image

    path = tmp_path / f"a{suffix}"
    path.write_text("old")
    path.chmod(0o600)
    write_image(torch.zeros(8, 8, 3), path)
    with Image.open(path) as opened:
        assert opened.size == (8, 8)
    assert mode(path) == 0o600
    with pytest.raises(ImageError, match="could not be written"):
        write_image(torch.zeros(8, 8, 3), path / f"inside{suffix}")
