"""StyleInject: low-rank changes that a router mixes for every picture, and another spread.

arXiv 2401.13942. Dynamic multi-style adaptation (DMA): n down matrices A_i share one up matrix B.
Style transfer via AdaIN (STA): every channel of the plain output h keeps its mean and gets another
spread. The text that we have lost its formulas; these are restored from its words and from the
parameter counts of its table, which they meet exactly:

    s = softmax(R mean(x))                      how much of each style this picture takes
    dh = alpha / r * B sum_i s_i A_i x          DMA
    gamma = W s + b                             STA: h_out = mean(h) + (1 + gamma) (h - mean(h))
    y = h_out + dh                              the base model itself while B, W and b are zero

Statistics are those of one sample: of its tokens, or of its places in a convolution. A tiled or
regional sampler hands over tiles, so the statistics and the choice of styles are the tile's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Config, check_range
from ..errors import ConfigError, LayoutError
from .base import LayerAdapter
from .routing import show_routing

Routing = Literal["instance", "token"]
Pooling = Literal["mean", "sum"]
Spread = Literal["mul", "add"]

LEAST_SPREAD = 0.05
"""Of the spread that a channel has (`mul`): below it contrast vanishes, below 0 it turns round."""
VARIANCE_FLOOR = 1e-5
"""Added to variances that are divided by (`add`), so that a constant channel stays finite."""
ROUTER_STD = 0.01
"""Of a new router's weights: almost even, and no two styles alike."""
MAX_STYLES = 64
MAX_RANK = 1024

READS_TEXT = ("attn2.to_k", "attn2.to_v")
"""Layers whose input is the prompt. Statistics over its tokens would tell how long it is."""
ATTENTION = ("attn1.to_q", "attn1.to_v", "attn2.to_q", "attn2.to_v")
CONVOLUTIONS = ("in_layers.2", "out_layers.3")
"""The two 3 x 3 convolutions of a residual block, which draw texture."""


@dataclass(frozen=True)
class StyleInjectConfig(Config):
    """How a style acts, where the paper's text leaves it open; the defaults are recommended.

    Args:
        routing: "instance": one mixture for each sample, as the text says; "token": one for each
            token or place. Gamma always takes the sample's mean, so that channels keep theirs.
        pooling: what the router sees of a sample: the "mean" over tokens or places, the same at
            every resolution; or the "sum", as the text says of convolutions, which grows with it.
        spread: "mul": (1 + gamma) sigma, no less than 0.05 sigma; "add": sigma + gamma.

    Raises:
        ConfigError: an unknown option.
    """

    routing: Routing = "instance"
    pooling: Pooling = "mean"
    spread: Spread = "mul"

    def __post_init__(self) -> None:
        self.check_choices("StyleInject")


@dataclass(frozen=True)
class StyleInjectPlan(Config):
    """Which layers get what; see `PRESETS`.

    Args:
        styles: n, down matrices of a layer; 1 leaves the router nothing to choose.
        rank: r of each.
        alpha: numerator of the scale alpha / r; 0 is the rank, a scale of 1.
        targets: endings of the layers' names.
        spread_targets: of those, the layers that get another spread too.

    Raises:
        ConfigError: a number out of range, or a spread for a layer that is no target.
    """

    styles: int = 4
    rank: int = 16
    alpha: float = 0.0
    targets: tuple[str, ...] = ATTENTION
    spread_targets: tuple[str, ...] = ("attn1.to_q", "attn2.to_q")

    def __post_init__(self) -> None:
        check_range("StyleInject", "styles", self.styles, 1, MAX_STYLES)
        check_range("StyleInject", "rank", self.rank, 1, MAX_RANK)
        check_range("StyleInject", "alpha", self.alpha, 0, 2**16)
        if lost := sorted(set(self.spread_targets) - set(self.targets)):
            raise ConfigError(
                f"StyleInject: {', '.join(lost)} cannot get another spread without being adapted; "
                "name it among the targets too."
            )

    def of_size(self, styles: int, rank: int) -> StyleInjectPlan:
        """The same layers with other numbers."""
        return replace(self, styles=styles, rank=rank)


PRESETS: Mapping[str, StyleInjectPlan] = {
    # The text: queries get both, values "the same scheme as LoRA" with n styles.
    "recommended": StyleInjectPlan(),
    # What the counts of its table imply: both on queries and values of both attentions.
    "paper_table": StyleInjectPlan(styles=16, rank=32, spread_targets=ATTENTION),
    # Distillation also adapts convolutions.
    "distillation": StyleInjectPlan(
        targets=(*ATTENTION, *CONVOLUTIONS),
        spread_targets=("attn1.to_q", "attn2.to_q", *CONVOLUTIONS),
    ),
}


@dataclass(frozen=True, eq=False)
class StyleLayer:
    """The trained tensors of one layer.

    Args:
        downs: A_i one after another, (n * r, in); of a convolution (n * r, in, k, k).
        up: B (out, r).
        router: R (n, in), without a bias.
        alpha: (1,) numerator of the scale alpha / r.
        spread: W (out, n), None where the spread stays.
        spread_bias: b (out,), None with it.

    Raises:
        LayoutError: they do not fit each other.
    """

    downs: Tensor
    up: Tensor
    router: Tensor
    alpha: Tensor
    spread: Tensor | None = None
    spread_bias: Tensor | None = None

    def __post_init__(self) -> None:
        fits = self.downs.ndim in (2, 4) and self.up.ndim == self.router.ndim == 2
        fits = fits and self.downs.shape[:2] == (self.styles * self.rank, self.router.shape[1])
        fits = fits and self.alpha.numel() == 1
        fits = fits and all(side % 2 for side in self.kernel)
        out = self.up.shape[0]
        if self.spread is None or self.spread_bias is None:
            fits = fits and self.spread is self.spread_bias
        else:
            fits = fits and self.spread.shape == (out, self.styles)
            fits = fits and self.spread_bias.shape == (out,)
        if not fits:
            shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors().items()}
            raise LayoutError(f"The parts of a style do not fit each other: {shapes}.")

    @property
    def styles(self) -> int:
        """Number of styles n."""
        return len(self.router)

    @property
    def rank(self) -> int:
        """Rank r of each."""
        return self.up.shape[-1]

    @property
    def kernel(self) -> tuple[int, ...]:
        """Height and width of a convolution's kernel, empty for a linear layer."""
        return tuple(self.downs.shape[2:])

    @property
    def size(self) -> tuple[int, ...]:
        """(in, out), and the kernel of a convolution."""
        return (self.router.shape[1], self.up.shape[0], *self.kernel)

    def tensors(self) -> dict[str, Tensor]:
        """What there is, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def numel(self) -> int:
        """Trained numbers: r (n in + out) + n in, and out (n + 1) where the spread changes."""
        return sum(t.numel() for name, t in self.tensors().items() if name != "alpha")

    def mixed(self, styles: Tensor) -> Tensor:
        """sum_i s_i A_i of weights (B, n) as (B, r, in) or (B, r, in, k, k); of (n,) without B."""
        downs = self.downs.unflatten(0, (self.styles, self.rank))
        return torch.tensordot(styles.to(downs), downs, dims=1)

    def gamma(self, styles: Tensor) -> Tensor | None:
        """W s + b of weights (..., n) as (..., out)."""
        if self.spread is None or self.spread_bias is None:
            return None
        return F.linear(styles, self.spread.to(styles), self.spread_bias.to(styles))


def new_layer(
    size: tuple[int, ...],
    plan: StyleInjectPlan,
    spread: bool,
    generator: torch.Generator | None = None,
) -> StyleLayer:
    """An untrained layer, which changes nothing: B, W and b are zero.

    Args:
        size: (in, out), and the kernel of a convolution.
        plan: styles, rank and alpha.
        spread: whether it also changes the spread.
        generator: of the A_i, each drawn for itself: alike they would stay alike.
    """
    width, out, *kernel = size
    downs = torch.empty(plan.styles * plan.rank, width, *kernel)
    nn.init.kaiming_uniform_(downs, a=5**0.5, generator=generator)
    router = torch.empty(plan.styles, width).normal_(0, ROUTER_STD, generator=generator)
    extra = (torch.zeros(out, plan.styles), torch.zeros(out)) if spread else ()
    alpha = torch.full((1,), plan.alpha or float(plan.rank))
    return StyleLayer(downs, torch.zeros(out, plan.rank), router, alpha, *extra)


class StyleInjectAdapter(LayerAdapter):
    """DMA and STA on one linear layer, or on a convolution that keeps height and width per stride.

    Args:
        layer: the tensors; gradients flow into them.
        config: how they act.
        text: the layer's input is the prompt. Its tokens get no statistics: they count as mean 0
            and spread 1, so that gamma is a gain on every channel.
        name: of the layer, for `routing.watched_routing`.
    """

    def __init__(
        self, layer: StyleLayer, config: StyleInjectConfig, text: bool = False, name: str = ""
    ) -> None:
        self.layer, self.config, self.text, self.name = layer, config, text, name

    def edit(self, x: Tensor, y: Tensor) -> Tensor:
        """h_out + dh for h = y; x (B, ..., in), y (B, ..., out), or (B, C, H, W) of both.

        Raises:
            LayoutError: made for a layer of another kind or size.
        """
        self._check(x, y)
        styles = self.styles(x)
        show_routing(self.name, _mean_over_places(styles))
        gamma = self.layer.gamma(_mean_over_places(styles))
        return (y if gamma is None else self._spread(y, gamma)) + self._change(x, y, styles)

    def styles(self, x: Tensor) -> Tensor:
        """s of inputs: (B, n), with token routing (B, ..., n); float32 or better."""
        tokens = x.movedim(1, -1) if self.layer.kernel else x  # B ... in
        fine = tokens.to(torch.promote_types(x.dtype, torch.float32))
        if self.config.routing == "instance":
            places = tuple(range(1, fine.ndim - 1))
            pool = torch.sum if self.config.pooling == "sum" else torch.mean
            fine = pool(fine, places) if places else fine  # B in
        return F.linear(fine, self.layer.router.to(fine)).softmax(-1)

    def _check(self, x: Tensor, y: Tensor) -> None:
        """Raises LayoutError where sizes differ."""
        conv = bool(self.layer.kernel)
        got = (x.shape[1], y.shape[1]) if conv else (x.shape[-1], y.shape[-1])
        if got != self.layer.size[:2] or (conv and x.ndim != 4):
            raise LayoutError(
                f"This style is for a layer {self.name} of {self.layer.size[0]} to "
                f"{self.layer.size[1]} features, but was attached to one of {got[0]} to {got[1]}."
            )

    def _spread(self, h: Tensor, gamma: Tensor) -> Tensor:
        """mean + sigma' (h - mean) / sigma for gamma (B, out), written so that gamma 0 gives h."""
        places = (2, 3) if self.layer.kernel else tuple(range(1, h.ndim - 1))
        shape = (len(h), -1, 1, 1) if self.layer.kernel else (len(h), *[1] * len(places), -1)
        fine = h.to(gamma.dtype)
        mean = fine.mean(places, keepdim=True) if places else fine
        relative = gamma.view(shape)
        if self.text:  # mean 0 and spread 1 by convention; both kinds of spread are the same then
            mean = torch.zeros_like(mean)
        elif self.config.spread == "add":
            variance = (fine - mean).square()
            variance = variance.mean(places, keepdim=True) if places else variance
            relative = relative / (variance + VARIANCE_FLOOR).sqrt()
        if self.text or self.config.spread == "mul":
            # the gradient passes the clamp, else a channel that overshot would never come back
            relative = relative + (relative.clamp_min(LEAST_SPREAD - 1) - relative).detach()
        return h + (relative * (fine - mean)).to(h.dtype)

    def _change(self, x: Tensor, y: Tensor, styles: Tensor) -> Tensor:
        """alpha / r B sum_i s_i A_i x, of the shape of y."""
        layer = self.layer
        up = (layer.up * (layer.alpha / layer.rank)).to(x)
        if layer.kernel:
            inner = self._inner_of_places(x, y, styles)  # B r H W
            return F.conv2d(inner, up[..., None, None])
        if self.config.routing == "token":
            each = F.linear(x, layer.downs.to(x)).unflatten(-1, (layer.styles, layer.rank))
            inner = (each * styles[..., None].to(each)).sum(-2)  # B ... r
            return F.linear(inner, up)
        flat = x.reshape(len(x), -1, x.shape[-1])  # B T in
        inner = flat @ layer.mixed(styles).to(x).mT  # B T r
        return F.linear(inner, up).reshape(y.shape)

    def _inner_of_places(self, x: Tensor, y: Tensor, styles: Tensor) -> Tensor:
        """sum_i s_i A_i * x of a convolution, (B, r, H', W') with the height and width of y."""
        layer = self.layer
        stride = tuple(-(-a // b) for a, b in zip(x.shape[-2:], y.shape[-2:], strict=True))
        padding = tuple(side // 2 for side in layer.kernel)
        if self.config.routing == "token":
            each = F.conv2d(x, layer.downs.to(x), stride=stride, padding=padding)
            here = styles[:, :: stride[0], :: stride[1]].movedim(-1, 1)  # B n H' W'
            inner = each.unflatten(1, (layer.styles, layer.rank)) * here[:, :, None].to(each)
            inner = inner.sum(1)
        else:  # every sample has kernels of its own: one group each
            kernels = layer.mixed(styles).to(x).flatten(0, 1)  # B*r in k k
            grouped = x.reshape(1, -1, *x.shape[-2:])
            inner = F.conv2d(grouped, kernels, stride=stride, padding=padding, groups=len(x))
            inner = inner.view(len(x), layer.rank, *inner.shape[-2:])
        if inner.shape[-2:] != y.shape[-2:]:
            raise LayoutError(
                f"This style cannot act on the convolution {self.name}: it makes "
                f"{tuple(y.shape[-2:])} of {tuple(x.shape[-2:])} places, which no padding by half "
                "a kernel does."
            )
        return inner


def _mean_over_places(styles: Tensor) -> Tensor:
    """(B, n) of weights (B, ..., n)."""
    places = tuple(range(1, styles.ndim - 1))
    return styles.mean(places) if places else styles
