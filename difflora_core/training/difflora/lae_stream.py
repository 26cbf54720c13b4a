"""What the autoencoder's training needs of a corpus that is not in memory: passes over its LoRAs.

Every function here gives what its namesake of `lae` gives of the whole corpus, to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...data.lora_rows import LoRARows
from ...lora.canonical import align_to, canonical
from ...lora.layout import LayerShape
from ...lora.statistics import RunningStatistics
from ...lora.weights import LoRALayer, LoRAWeights
from ...models.lae.autoencoder import LoRAAutoencoder

AT_ONCE = 16
"""LoRAs of a part; SDXL's at rank 8 have 46 MB each."""
GRAM_VALUES = 2**27
"""Numbers of the matrices that a pass of `common_down` sums up, in float64."""
_ROUNDS = 2


def prepare(
    lae: LoRAAutoencoder, corpus: LoRARows, form: bool, device: torch.device
) -> LoRAWeights | None:
    """Sets shared `down` and statistics of the autoencoder.

    Args:
        lae: changed in place.
        corpus: LoRAs of a store.
        form: bring them to canonical form, where both factors are learned.
        device: where to compute.

    Returns:
        The reference of the canonical form, if used.
    """
    reference = None
    if lae.config.parts == ("up",):
        lae.set_shared_down(common_down(corpus, tuple(lae.layout), lae.layout.rank, device))
    elif form:
        reference = common_reference(corpus, lae.layout.rank, device)
    running = RunningStatistics(lae.groups.grid.mask().to(device))
    for part in corpus.parts(AT_ONCE):
        running.add(tokens(lae, part.to(device=device), reference))
    statistics = running.result()
    lae.set_statistics(statistics.mean.cpu(), statistics.scale.cpu())
    return reference


@torch.no_grad()
def tokens(lae: LoRAAutoencoder, weights: LoRAWeights, reference: LoRAWeights | None) -> Tensor:
    """Raw tokens (B, T, L) of a batch, turned to the reference if there is one."""
    if reference is not None:
        weights = align_to(canonical(weights, lae.layout.rank), reference)
    return lae.tokens(weights).float()


def common_reference(corpus: LoRARows, rank: int, device: torch.device) -> LoRAWeights:
    """The reference that LoRAs are turned to: the mean of all, after two rounds of turning."""
    reference = canonical(corpus.batch([0]).to(device=device), rank).batch_item(0)
    for _ in range(_ROUNDS):
        sums: dict[str, tuple[Tensor, Tensor]] = {}
        for part in corpus.parts(AT_ONCE):
            turned = align_to(canonical(part.to(device=device), rank), reference)
            for name, layer in turned.layers.items():
                own = (layer.down.sum(0), layer.up.sum(0))
                before = sums.get(name)
                sums[name] = own if before is None else (before[0] + own[0], before[1] + own[1])
        reference = LoRAWeights(
            {
                name: LoRALayer(down / len(corpus), up / len(corpus), reference[name].alpha)
                for name, (down, up) in sums.items()
            }
        )
    return reference


def common_down(
    corpus: LoRARows, shapes: Sequence[LayerShape], rank: int, device: torch.device
) -> dict[str, Tensor]:
    """The rows that one shared `down` per layer should have, see `lae.common_down`.

    Sums of delta^T delta need the square of a layer's inputs: as many layers as GRAM_VALUES allows
    are summed up in one pass over the files.
    """
    rows = {}
    for group in _groups(shapes):
        grams: dict[str, Tensor] = {}
        for part in corpus.parts(AT_ONCE):
            whole = part.folded().layers
            for name in group:
                up, down = (x.to(device).double() for x in (whole[name].up, whole[name].down))
                root = torch.linalg.qr(up)[1] @ down  # M r in
                gram = torch.einsum("mri,mrj->ij", root, root)
                grams[name] = grams[name] + gram if name in grams else gram
        for name, gram in grams.items():
            rows[name] = torch.linalg.eigh(gram)[1][:, -rank:].flip(1).mT.float()
    return rows


def _groups(shapes: Sequence[LayerShape]) -> Iterator[list[str]]:
    """Names of layers whose sums fit into memory together."""
    group: list[str] = []
    values = 0
    for shape in shapes:
        if group and values + shape.in_features**2 > GRAM_VALUES:
            yield group
            group, values = [], 0
        group.append(shape.name)
        values += shape.in_features**2
    yield group
