"""Which style acted where, over the steps: a table of a sampling run, and a picture of it.

The picture has a small panel for each part of the model, as the figure of arXiv 2401.13942 looks at
routers layer by layer. It is drawn with Pillow, which is there anyway: a plotting library would be
eight more packages to install for one picture.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..errors import ConfigError, percent

PANEL, GAP, LEFT, LINE, FONT_SIZE = (84, 44), 6, 132, 20, 12
"""Pixels: (width, height) of a panel, between panels, for names at the left, a line of text."""
LEGEND_WIDTH, LEGEND_LEAST = 76, 8
"""Pixels of an entry of the legend, and how many entries a line of it holds at least."""
LARGEST_SIDE = 4096
BLOCKS = ("input_blocks", "middle_block", "output_blocks")


@dataclass
class RoutingTable:
    """What a run showed: for every layer and noise level the weights of its styles.

    `seen`: layer to noise level to the weights (B, n) of each call, of B pictures. A layer that
    several adapters change has a name for each, as its owner gives them.
    """

    seen: dict[str, dict[float, list[Tensor]]] = field(default_factory=dict)

    def add(self, layer: str, noise: float, weights: Tensor) -> None:
        """Weights (B, n) of B pictures at a noise level."""
        if len(weights):
            levels = self.seen.setdefault(layer, {})
            levels.setdefault(noise, []).append(weights.float().cpu())

    def shares(self) -> dict[str, Tensor]:
        """Layer to (T, n), the largest noise first; layers with one style have nothing to choose.

        Raises:
            ConfigError: no layer chooses.
        """
        made = {
            layer: torch.stack([_mean_of_calls(levels[t])[0] for t in sorted(levels)[::-1]])
            for layer, levels in self.seen.items()
        }
        made = {layer: table for layer, table in made.items() if table.shape[1] > 1}
        if not made:
            raise ConfigError(
                "No style on this model chooses between several: there is no router to show. "
                "Apply a style that was trained with two or more, at a strength other than 0."
            )
        return made

    def by_picture(self) -> Tensor:
        """(T, B, D): what all routers say of each of B pictures, the largest noise first.

        D counts the styles of all layers; they are 0 where a style does not act. Where calls show
        several numbers of pictures, as with prompts for regions, B is 1 and it is their mean.
        """
        noises = sorted({t for levels in self.seen.values() for t in levels})[::-1]
        counts = {
            len(w) for levels in self.seen.values() for calls in levels.values() for w in calls
        }
        merged = _mean_of_calls if len(counts) > 1 else _each_picture
        columns = []
        for levels in self.seen.values():
            known = {t: merged(calls) for t, calls in levels.items()}
            nothing = torch.zeros_like(next(iter(known.values())))
            columns.append(torch.stack([known.get(t, nothing) for t in noises]))
        return torch.cat(columns, -1)


def _mean_of_calls(calls: Sequence[Tensor]) -> Tensor:
    """(1, n) of weights (B, n), a mean over pictures and then over calls."""
    return torch.stack([weights.mean(0) for weights in calls]).mean(0)[None]


def _each_picture(calls: Sequence[Tensor]) -> Tensor:
    """(B, n) of weights (B, n), a mean over calls."""
    return torch.stack(list(calls)).mean(0)


def routing_report(shares: Mapping[str, Tensor]) -> str:
    """What each style took on the whole, and which layers choose most and least evenly.

    Args:
        shares: layer to (T, n), see `RoutingTable.shares`.
    """
    lines = []
    for name, group in _by_adapter(shares).items():
        mean = torch.stack([table.mean(0) for table in group.values()]).mean(0)
        parts = (f"style {k + 1} {percent(share)}" for k, share in enumerate(mean.tolist()))
        # 1 where all act alike, 0 where one acts alone
        even = {layer: _evenness(table) for layer, table in group.items()}
        sharp, flat = min(even, key=even.__getitem__), max(even, key=even.__getitem__)
        lines.append(
            f"{name}{', '.join(parts)}; most decided {_plain(sharp)} ({percent(1 - even[sharp])}), "
            f"least {_plain(flat)} ({percent(1 - even[flat])})"
        )
    return "\n".join(lines)


def routing_picture(shares: Mapping[str, Tensor]) -> Tensor:
    """Small panels: columns are the blocks of the model in its order, rows the kinds of layers.

    In a panel time goes from left to right; the height of a colour is the share of that style, mean
    over the layers of the panel.

    Args:
        shares: layer to (T, n), see `RoutingTable.shares`.

    Returns:
        (H, W, 3) float32 in [0, 1].

    Raises:
        ConfigError: the picture would be larger than 4096 x 4096 pixels.
    """
    panels: dict[tuple[str, str], list[Tensor]] = {}
    for layer, table in shares.items():
        panels.setdefault(_place(layer), []).append(table)
    columns = sorted({block for block, _ in panels}, key=_block_order)
    rows = sorted({kind for _, kind in panels})
    colours = colours_of(max(table.shape[1] for table in shares.values()))
    panels_width = len(columns) * (PANEL[0] + GAP)
    across = min(len(colours), max(LEGEND_LEAST, panels_width // LEGEND_WIDTH))
    head = LINE * (1 + math.ceil(len(colours) / across))  # the legend, and the names of columns
    width = LEFT + max(panels_width, across * LEGEND_WIDTH)
    height = head + len(rows) * (PANEL[1] + GAP) + LINE
    if max(width, height) > LARGEST_SIDE:
        raise ConfigError(
            f"A picture of {width} x {height} pixels is too large. Apply fewer styles."
        )
    sheet = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for k, colour in enumerate(colours):
        left, top = LEFT + k % across * LEGEND_WIDTH, k // across * LINE
        pen.rectangle((left, top + 4, left + 10, top + 14), fill=colour)
        pen.text((left + 14, top + 2), f"style {k + 1}", fill="black", font=font)
    for x, block in enumerate(columns):
        pen.text((LEFT + x * (PANEL[0] + GAP), head - LINE + 2), block, fill="black", font=font)
    for y, kind in enumerate(rows):
        top = head + y * (PANEL[1] + GAP)
        pen.text((4, top + PANEL[1] // 2 - 8), kind, fill="black", font=font)
        for x, block in enumerate(columns):
            if (block, kind) in panels:
                place = (LEFT + x * (PANEL[0] + GAP), top)
                sheet.paste(_panel(panels[block, kind], colours), place)
    pen.text((LEFT, height - LINE + 2), "each panel: first step to last", fill="black", font=font)
    return torch.from_numpy(np.array(sheet)).float() / 255


def _panel(tables: Sequence[Tensor], colours: Sequence[tuple[int, int, int]]) -> Image.Image:
    """Stacked shares (n) over time of layers that may have several lengths and widths."""
    wide, high = PANEL
    most = max(table.shape[1] for table in tables)
    stretched = [_stretched(table, wide, most) for table in tables]
    edges = (torch.stack(stretched).mean(0).cumsum(1) * high).round().int()  # W n
    rows = torch.arange(high)[:, None, None]
    style = (rows >= edges[None]).sum(-1).clamp_max(most - 1)  # H W
    return Image.fromarray(np.array(colours, np.uint8)[style.numpy()])


def _stretched(table: Tensor, wide: int, styles: int) -> Tensor:
    """(wide, styles) of (T, n), each step equally wide."""
    steps = torch.arange(wide) * len(table) // wide
    return torch.nn.functional.pad(table[steps], (0, styles - table.shape[1]))


def _place(layer: str) -> tuple[str, str]:
    """Block and kind of a layer, as the labels of column and row."""
    adapter, _, name = layer.rpartition(" ")
    block, *rest = name.split(".")
    if block in BLOCKS[::2]:
        block = f"{block.removesuffix('_blocks')} {rest.pop(0)}"
    return block.removesuffix("_block"), " ".join([*([adapter] if adapter else []), _kind(rest)])


def _kind(parts: Sequence[str]) -> str:
    """The end of a layer's name."""
    return ".".join(parts[-2:])


def _block_order(block: str) -> tuple[int, int]:
    """Place of a column: the way down, the middle, the way up."""
    name, _, number = block.partition(" ")
    known = [each.split("_")[0] for each in BLOCKS]
    return (known.index(name) if name in known else len(known), int(number or 0))


def _by_adapter(shares: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Layers of each adapter, by its name with a colon; no name where there is one adapter."""
    groups: dict[str, dict[str, Tensor]] = {}
    for layer, table in shares.items():
        adapter = layer.rpartition(" ")[0]
        groups.setdefault(f"{adapter}: " if adapter else "", {})[layer] = table
    return groups


def _plain(layer: str) -> str:
    return layer.rpartition(" ")[2]


def _evenness(table: Tensor) -> float:
    """Entropy of (T, n) over its largest value, mean over time."""
    entropy = torch.special.entr(table.double()).sum(1) / np.log(table.shape[1])
    return float(entropy.mean())


def colours_of(count: int) -> list[tuple[int, int, int]]:
    """Colours that differ from their neighbours: hues a golden section apart."""
    made = []
    for k in range(count):
        red, green, blue = colorsys.hls_to_rgb(
            (0.58 + 0.618034 * k) % 1, 0.45 + 0.15 * (k % 2), 0.6
        )
        made.append((round(255 * red), round(255 * green), round(255 * blue)))
    return made
