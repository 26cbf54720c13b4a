"""Who is who: faces grouped into people, and the face of a picture that belongs to its person.

Groups are those of average linkage on the cosine (UPGMA, Sokal and Michener 1958; scipy's), cut at
a threshold. It never joins across the parts into which single linkage at the same threshold falls:
a mean above the threshold needs a pair above it. So the parts are found first, by products of
blocks of faces that lie on disk, and the exact method runs inside each: memory is that of two
blocks and one part. 32,000 faces of 512 numbers take 10 seconds of a core; a million, 1 GB on disk
as float16, ten minutes of 16. A part of more than LARGEST_PART faces, many pictures of one
person or a chain of lookalikes, is taken face after face (the leader algorithm, Hartigan 1975), by
the same mean cosine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import pdist

Array = np.ndarray[Any, Any]

BLOCK = 2048
LARGEST_PART = 4000
_ROUNDING = 2e-3
"""Faces in float16 have a length that is so far from 1; parts are found with that to spare."""


def parts(faces: Array, threshold: float, block: int = BLOCK) -> Array:
    """Connected parts of the graph of all pairs whose cosine is at least `threshold`.

    Args:
        faces: (N, Df) of unit length, of any floating type; may be mapped from disk.
        threshold: cosine.
        block: faces that are in memory at once, twice.

    Returns:
        (N,) int64, for each face the number of the first face of its part.
    """
    count = len(faces)
    label = np.arange(count)
    for start in range(0, count, block):
        rows = np.asarray(faces[start : start + block], dtype=np.float32)
        edges = [np.stack([np.arange(count), label])]
        for other in range(start, count, block):
            columns = np.asarray(faces[other : other + block], dtype=np.float32)
            i, j = np.nonzero(rows @ columns.T >= threshold)
            numbers = np.concatenate(
                [np.arange(start, start + len(rows)), np.arange(other, other + len(columns))]
            )
            firsts = _first_of_part(np.stack([i, j + len(rows)]), len(numbers))
            edges.append(np.stack([numbers, numbers[firsts]]))
        label = _first_of_part(np.concatenate(edges, axis=1), count)
    return label


def _first_of_part(edges: Array, count: int) -> Array:
    """The first node (count,) of the part of a graph that each node is in; edges (2, E)."""
    graph = coo_array((np.ones(edges.shape[1], dtype=np.int8), tuple(edges)), (count, count))
    _, found = connected_components(graph, directed=False)
    _, firsts, which = np.unique(found, return_index=True, return_inverse=True)
    return np.asarray(firsts[which.reshape(-1)], dtype=np.int64)


def group(faces: Array, threshold: float, block: int = BLOCK, largest: int = LARGEST_PART) -> Array:
    """People among faces.

    Args:
        faces: (N, Df) of unit length; may be mapped from disk.
        threshold: mean cosine of two groups from which on they are one person.
        block: see `parts`.
        largest: faces of a part that average linkage takes at once.

    Returns:
        (N,) int64, for each face the number of the first face of the same person.
    """
    label = parts(faces, threshold - _ROUNDING, block)
    result = label.copy()
    for members in several(label):
        if len(members) > largest:
            result[members] = members[_leaders(faces, members, threshold)]
        else:
            own = np.asarray(faces[members], dtype=np.float64)
            result[members] = members[_average_linkage(own, threshold)]
    return result


def several(label: Array) -> Iterator[Array]:
    """The members (n,) of each group of more than one, in order; label (N,)."""
    order = np.argsort(label, kind="stable")
    ends = np.flatnonzero(np.diff(label[order], append=-1)) + 1
    starts = np.concatenate([[0], ends[:-1]])
    for place in np.flatnonzero(ends - starts > 1):
        yield order[starts[place] : ends[place]]


def _average_linkage(faces: Array, threshold: float) -> Array:
    """`group` of a few faces (n, Df) float64, all pairs at once."""
    tree = linkage(pdist(faces, "cosine"), "average")
    found = fcluster(tree, 1 - threshold, "distance")
    _, firsts, which = np.unique(found, return_index=True, return_inverse=True)
    return np.asarray(firsts[which.reshape(-1)], dtype=np.int64)


def _leaders(faces: Array, members: Array, threshold: float) -> Array:
    """`group` of many faces (N, Df), of which `members` (n,) count, one after the other.

    A face joins the group with which its mean cosine is highest, if that reaches the threshold.
    """
    sums = np.zeros((0, faces.shape[1]))
    counts: list[int] = []
    firsts: list[int] = []
    result = np.empty(len(members), dtype=np.int64)
    for place, member in enumerate(members):
        face = np.asarray(faces[member], dtype=np.float64)
        means = sums @ face / np.maximum(counts, 1)
        best = int(means.argmax()) if len(means) else -1
        if best < 0 or means[best] < threshold:
            best = len(firsts)
            firsts.append(place)
            counts.append(0)
            sums = np.concatenate([sums, np.zeros((1, sums.shape[1]))])
        sums[best] += face
        counts[best] += 1
        result[place] = firsts[best]
    return result


def likeness(faces: Array) -> Array:
    """Cosine (n,) of each face (n, Df) with the mean of the others; 1 for a single one."""
    if len(faces) == 1:
        return np.ones(1)
    exact = np.asarray(faces, dtype=np.float64)
    others = exact.sum(0) - exact
    length = np.linalg.norm(others, axis=1) * np.linalg.norm(exact, axis=1)
    return np.asarray((exact * others).sum(1) / np.maximum(length, 1e-12))


def main_person(label: Array, pictures: Array, sizes: Array) -> int:
    """The group that is in most pictures; of equal ones the one with the larger faces, then first.

    Args:
        label: (N,) group of each face, as `group` numbers them.
        pictures: (N,) number of the picture that each is in.
        sizes: (N,) area of each.

    Returns:
        The label of the group.
    """

    def weight(one: int) -> tuple[int, float, int]:
        own = label == one
        return len(set(pictures[own].tolist())), float(sizes[own].sum()), -one

    return max((int(one) for one in np.unique(label)), key=weight)


def rivals(label: Array, pictures: Array, main: int, share: float = 0.9) -> int:
    """How many other groups are in about as many pictures (`share` of them) as the main one."""
    count = {one: len(set(pictures[label == one].tolist())) for one in np.unique(label).tolist()}
    most = count.pop(main)
    return sum(number >= share * most for number in count.values()) if most > 1 else 0
