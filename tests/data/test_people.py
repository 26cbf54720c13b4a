"""Faces into people: the exact method on all pairs at once is the reference."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist

from difflora_core.data.duplicates import HASH_BITS, distances, duplicates
from difflora_core.data.people import group, likeness, main_person, parts, rivals, several


def unit(generator, count, width):
    """Random faces of unit length."""
    faces = generator.normal(size=(count, width))
    return faces / np.linalg.norm(faces, axis=1, keepdims=True)


def sets(label):
    """A partition, whatever its numbers."""
    return {frozenset(np.flatnonzero(label == one).tolist()) for one in np.unique(label)}


@given(
    st.integers(0, 2**32 - 1), st.integers(2, 40), st.integers(2, 5), st.floats(0.1, 0.9),
    st.integers(1, 50),
)  # fmt: skip
def test_parts_first_is_exact(seed, count, width, threshold, block):
    """Average linkage inside the parts of single linkage is average linkage of all."""
    faces = unit(np.random.default_rng(seed), count, width)
    reference = fcluster(linkage(pdist(faces, "cosine"), "average"), 1 - threshold, "distance")
    found = group(faces, threshold, block)
    assert sets(found) == sets(reference)
    assert all(found[n] == np.flatnonzero(found == found[n])[0] for n in range(count))


@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(1, 31))
def test_blocks_do_not_matter(seed, count, block):
    """Parts of any block size are those of the whole matrix, numbered by their first face."""
    faces = unit(np.random.default_rng(seed), count, 3).astype(np.float32)
    near = faces @ faces.T >= 0.7
    reach = np.linalg.matrix_power(near.astype(float) + np.eye(count), count) > 0
    assert parts(faces, 0.7, block).tolist() == reach.argmax(1).tolist()


def test_a_chain_is_taken_apart():
    """A part that is too large for the exact method is grouped face by face, by the same mean."""
    angles = np.arange(200) * 0.02
    chain = np.stack([np.cos(angles), np.sin(angles)], 1)
    assert len(set(parts(chain, 0.9))) == 1
    label = group(chain, 0.9, largest=20)
    for one in np.unique(label):
        own = chain[label == one]
        for n in range(1, len(own)):
            assert own[n] @ own[:n].mean(0) >= 0.9
    assert 2 <= len(set(label)) < 10
    same = group(np.ones((60, 1)), 0.9, largest=20)  # one person with many pictures stays one
    assert set(same.tolist()) == {0}


def test_groups_of_several_are_found_without_the_rest():
    """Of no faces, of single ones alone, and in any order."""
    assert [list(own) for own in several(np.array([0, 1, 0, 3, 3, 5, 0]))] == [[0, 2, 6], [3, 4]]
    assert list(several(np.arange(4))) == []
    assert list(several(np.zeros(0, dtype=np.int64))) == []


def test_half_precision_from_disk(tmp_path):
    """A mapped float16 file gives the people of the exact numbers."""
    generator = np.random.default_rng(1)
    centres = unit(generator, 12, 64)
    noisy = centres[np.arange(300) % 12] + generator.normal(size=(300, 64)) * 0.06
    faces = noisy / np.linalg.norm(noisy, axis=1, keepdims=True)
    table = np.lib.format.open_memmap(tmp_path / "faces.npy", "w+", np.float16, faces.shape)
    table[:] = faces
    assert group(table, 0.5, 64).tolist() == (np.arange(300) % 12).tolist()


def test_the_main_person_is_in_most_pictures():
    """Not who has most faces; of equal ones the larger; and who else is in about all."""
    label = np.array([0, 0, 0, 3, 3, 5, 5])
    pictures = np.array([0, 0, 0, 0, 1, 0, 1])
    sizes = np.array([9.0, 9, 9, 1, 1, 2, 2])
    assert main_person(label, pictures, sizes) == 5
    assert rivals(label, pictures, 5) == 1
    assert rivals(label[:3], pictures[:3], 0) == 0


def test_likeness_leaves_oneself_out():
    faces = unit(np.random.default_rng(2), 5, 8)
    for n in range(5):
        others = np.delete(faces, n, 0).mean(0)
        expected = faces[n] @ others / np.linalg.norm(others)
        assert likeness(faces)[n] == pytest.approx(expected, abs=1e-12)
    assert likeness(faces[:1]).tolist() == [1.0]


def test_duplicates_keep_the_largest():
    """Near the kept one, not near one that goes: a chain does not vanish."""
    bits = np.zeros((4, HASH_BITS), dtype=np.uint8)
    for number in range(4):
        bits[number, : 20 * number] = 1
    hashes = [np.packbits(row).tobytes() for row in bits]
    assert distances(hashes[0], hashes).tolist() == [0, 20, 40, 60]
    assert duplicates(hashes, [1, 5, 1, 1], 24) == {0: 1, 2: 1}
    assert duplicates(hashes, [1, 1, 1, 1], 24) == {1: 0, 3: 2}
    assert duplicates(hashes[:1] * 3, [1, 1, 1], -1) == {}
