"""What a LoRA file adds to one layer: the whole change of its weight, and the same times a factor.

Families that add a constant to a weight (LoRA, LoHa, LoKr, differences) can act in part: in some
blocks, steps or prompts. Families that turn the weight itself (DoRA, OFT, BOFT, GLoRA) cannot: how
much they add depends on what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ...errors import LoRAFileError
from ...limits import MATRIX_VALUES
from .families import split_key

Parts = Mapping[str, Tensor]
"""Role to tensor of one layer, as `families.group_keys` names them."""

_LORA = {"up", "down", "mid"}
_LOHA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"}
_LOKR = {f"lokr_w{n}{part}" for n in "12" for part in ("", "_a", "_b")} | {"lokr_t2"}
_CONSTANT = _LORA | _LOHA | _LOKR | {"alpha", "diff", "bias", "up_peft", "down_peft"}
_EXTRAS = {"alpha", "bias", "mid", "hada_t1", "hada_t2", "lokr_t2"}
_WHOLE = [
    *({"up", "down"}, {"diff"}, {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),
    *(
        first | second
        for first in ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
        for second in ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"})
    ),
]
_TUCKER = "ijkl, jr, ip -> prkl"  # LyCORIS (arXiv 2309.14859): core (i, j, kh, kw) and two factors


def is_constant(parts: Parts) -> bool:
    """Whether a layer's change does not depend on the weight that it is added to."""
    return set(parts) <= _CONSTANT


def kind_of(parts: Parts) -> str:
    """What a layer is called whose change is not constant."""
    if "dora" in parts:
        return "DoRA"
    if "oft_blocks" in parts:
        return "BOFT" if parts["oft_blocks"].ndim == 4 else "OFT"
    if "a1" in parts:
        return "GLoRA"
    return "a new weight or shape"


def is_whole(parts: Parts) -> bool:
    """Whether a layer has all tensors of one family, and no others."""
    body = set(parts) - _EXTRAS
    return body in _WHOLE if body else "bias" in parts


def weight_change(parts: Parts) -> Tensor | None:
    """Change of a weight, alpha over rank included, in float32 or finer; None without one.

    Args:
        parts: roles of one layer. LoRA: up (out, r), down (r, in, ...), of a Tucker convolution
            also mid (r, r, kh, kw). LoHa: ``hada_w1_a`` (out, r), ``hada_w1_b`` (r, in, ...) and
            the same for w2; with ``hada_t1``, ``hada_t2`` (r, r, kh, kw) (r, out) and (r, in).
            LoKr: ``lokr_w1``, ``lokr_w2``, each perhaps as product of ``_a`` and ``_b``. Or
            ``diff`` itself.

    Returns:
        (out, in, ...), with kernels as they are stored, perhaps flattened into ``in``.
    """
    if "diff" in parts:
        return _fine(parts["diff"])
    fine = {role: _fine(tensor) for role, tensor in parts.items()}
    if "up" in fine:
        change = _lora(fine)
    elif "hada_w1_a" in fine:
        change = _half(fine, "hada_w1", "hada_t1") * _half(fine, "hada_w2", "hada_t2")
    elif _LOKR & set(fine):
        change = _kron(fine)
    else:
        return None
    return _scale(parts) * change


def change_width(parts: Parts) -> int:
    """Inputs of the layer that a change is for, off its factors' sizes; 0 where they do not say."""
    shapes = {role: tensor.shape for role, tensor in parts.items() if tensor.ndim >= 2}
    for role in ("down", "diff", "hada_w1_b"):
        if role in shapes:
            return shapes[role][1]
    first, second = (shapes.get(n, shapes.get(f"{n}_b", (0, 0))) for n in ("lokr_w1", "lokr_w2"))
    return first[1] * second[1]


def lokr_factors(parts: Parts) -> dict[str, Tensor]:
    """``lokr_w1`` and ``lokr_w2`` of a LoKr layer, multiplied out and with alpha in the second.

    Raises:
        LoRAFileError: a tensor is missing, or a small file would become too large.
    """
    core, out, width = (parts.get(name) for name in ("lokr_t2", "lokr_w2_a", "lokr_w2_b"))
    if not is_whole(parts) or core is None or core.ndim != 4 or out is None or width is None:
        raise LoRAFileError("A LoKr layer in Tucker form lacks a tensor; the file is damaged.")
    if out.shape[-1] * width.shape[-1] * core[0, 0].numel() > MATRIX_VALUES:
        raise LoRAFileError("A LoKr layer is too large for any model; the file is broken.")
    fine = {role: _fine(tensor) for role, tensor in parts.items()}
    first, second = (_matrix(fine, name).contiguous() for name in ("lokr_w1", "lokr_w2"))
    return {"lokr_w1": first, "lokr_w2": _scale(parts) * second}


def _scale(parts: Parts) -> float:
    """Alpha over the rank, where both count."""
    rank = _scaled_by(parts)
    return float(parts["alpha"].double()) / rank if rank and "alpha" in parts else 1.0


def scaled_parts(parts: Parts, factor: float) -> dict[str, Tensor] | None:
    """The same layer with its change times a factor; None where no file can say that."""
    if factor == 1.0:
        return dict(parts)
    if not is_constant(parts):
        return None
    result = dict(parts)
    for role in ("diff", "bias"):
        if role in parts:
            result[role] = _fine(parts[role]) * factor
    rank = _scaled_by(parts)
    if rank:
        alpha = parts["alpha"].double() if "alpha" in parts else torch.tensor(float(rank))
        result["alpha"] = (alpha * factor).float()
    elif "lokr_w1" in parts:
        result["lokr_w1"] = _fine(parts["lokr_w1"]) * factor
    return result


def scaled_state(
    state: Mapping[str, Tensor], factor: Callable[[str], float]
) -> tuple[dict[str, Tensor], list[str]]:
    """A LoRA of any family with a factor on every layer.

    Args:
        state: key to tensor, as a file has them.
        factor: of a stem, the part of a key in front of what says its role.

    Returns:
        State dict of the same keys, with alphas where they are needed; stems of the layers that
        stay as they are, since no file can say a factor on them.
    """
    result, left = dict(state), []
    for stem, keys in keys_by_role(state).items():
        parts = {role: state[key] for role, key in keys.items()}
        scaled = scaled_parts(parts, factor(stem))
        if scaled is None:
            left.append(stem)
            continue
        for role, tensor in scaled.items():
            result[keys.get(role, f"{stem}.{role}")] = tensor
    return result, left


def keys_by_role(state: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """Stem to role to key of a state dict; keys without a known role are left out."""
    groups: dict[str, dict[str, str]] = {}
    for key in state:
        stem, role = split_key(key) or ("", "")
        if role:
            groups.setdefault(stem, {})[role] = key
    return groups


def _scaled_by(parts: Parts) -> int | None:
    """The rank that alpha is divided by; None where alpha does not count."""
    for role in ("down", "down_peft", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if role in parts:
            return len(parts[role])
    return None


def _fine(tensor: Tensor) -> Tensor:
    """In float32, or float64 where it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _lora(parts: Parts) -> Tensor:
    """up @ down, with the kernel in ``mid`` of a Tucker convolution."""
    up, down = parts["up"].flatten(1), parts["down"]
    if "mid" in parts:
        return torch.einsum("om, mnhw, ni -> oihw", up, parts["mid"], down.flatten(1))
    return (up @ down.flatten(1)).unflatten(1, down.shape[1:])


def _half(parts: Parts, name: str, core: str) -> Tensor:
    """One of the two matrices that LoHa multiplies element by element."""
    first, second = parts[f"{name}_a"], parts[f"{name}_b"]
    return torch.einsum(_TUCKER, parts[core], second, first) if core in parts else first @ second


def _kron(parts: Parts) -> Tensor:
    """The Kronecker product of LoKr; the second factor holds the kernel."""
    first, second = (_matrix(parts, name).contiguous() for name in ("lokr_w1", "lokr_w2"))
    return torch.kron(first[..., None, None] if second.ndim == 4 else first, second)


def _matrix(parts: Parts, name: str) -> Tensor:
    """A factor of LoKr, whole or as a product."""
    if name in parts:
        return parts[name]
    first, second = parts[f"{name}_a"], parts[f"{name}_b"]
    if name == "lokr_w2" and "lokr_t2" in parts:
        return torch.einsum(_TUCKER, parts["lokr_t2"], second, first)
    return first @ second
