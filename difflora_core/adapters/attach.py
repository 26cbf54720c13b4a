"""Attach an AdapterSet to a module with hooks, take it off again, or merge it into the weights."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import LayoutError
from .base import AdapterEntry, AdapterSet, LayerAdapter

Strength = float | Tensor
"""One number, or one for each sample of the batch: (B,)."""


def _blend(plain: Tensor, edited: Tensor, strength: Strength) -> Tensor:
    """plain + strength * (edited - plain), exact at strength 1."""
    if edited is plain or (not isinstance(strength, Tensor) and strength == 1.0):
        return edited
    return plain + _weighted(edited - plain, strength)


def _weighted(change: Tensor, strength: Strength) -> Tensor:
    """strength * change (B, ...).

    Raises:
        LayoutError: when there are strengths for another number of samples.
    """
    if not isinstance(strength, Tensor):
        return strength * change
    if strength.shape != change.shape[:1]:
        raise LayoutError(
            f"There are strengths for {tuple(strength.shape)} samples, but the batch has "
            f"{change.shape[0]}."
        )
    return strength.to(change).view(-1, *[1] * (change.ndim - 1)) * change


class _LayerHook:
    """All adapters of one attachment on one layer; remembers the original input of a call."""

    def __init__(self, entries: list[AdapterEntry], owner: AttachHandle) -> None:
        self.entries = entries
        self.owner = owner
        self.x: Tensor | None = None

    def _active(self) -> list[tuple[LayerAdapter, Strength]]:
        """Adapters with a strength other than zero."""
        pairs = [(e.adapter, e.strength * self.owner.strength) for e in self.entries]
        return [(a, s) for a, s in pairs if isinstance(s, Tensor) or s != 0.0]

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """x' = x + sum of s * (substitute(x) - x)."""
        del module
        x = args[0]
        self.x = x
        changed = x
        for adapter, strength in self._active():
            other = adapter.substitute(x)
            if other is not x:
                # the first change is blended alone, so that strength 1 is exact
                changed = (
                    _blend(x, other, strength)
                    if changed is x
                    else changed + _weighted(other - x, strength)
                )
        return None if changed is x else (changed, *args[1:])

    def after(self, module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor | None:
        """y' = y + s * (edit(x, y) - y), adapter after adapter, with the original x."""
        del module
        x = args[0] if self.x is None else self.x
        self.x = None
        changed = y
        for adapter, strength in self._active():
            changed = _blend(changed, adapter.edit(x, changed), strength)
        return None if changed is y else changed


class AttachHandle:
    """A running attachment: leave the ``with`` block or call ``remove`` to take it off.

    ``strength`` may be changed while attached; 0 gives the base model bit-exactly.
    """

    def __init__(self, strength: Strength, layers: tuple[str, ...]) -> None:
        self.strength = strength
        self.layers = layers
        self._handles: list[RemovableHandle] = []

    def hold(self, *handles: RemovableHandle) -> None:
        """Take responsibility for hook handles."""
        self._handles.extend(handles)

    def remove(self) -> None:
        """Take all hooks off; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> AttachHandle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


def _modules(
    module: nn.Module, adapters: AdapterSet, names: Mapping[str, str] | None
) -> dict[str, nn.Module]:
    """Layer name to live module.

    Raises:
        LayoutError: listing the layers that the model does not have.
    """
    found: dict[str, nn.Module] = {}
    missing = []
    for layer in adapters.layers:
        path = layer if names is None else names.get(layer)
        try:
            if path is None:
                raise AttributeError(layer)
            found[layer] = module.get_submodule(path)
        except AttributeError:
            missing.append(layer)
    if missing:
        raise LayoutError(
            f"{len(missing)} of {len(adapters.layers)} adapted layers are not in this model, for "
            f"example {', '.join(missing[:3])}. Use a LoRA made for this kind of base model."
        )
    return found


def attach(
    module: nn.Module,
    adapters: AdapterSet,
    strength: Strength = 1.0,
    names: Mapping[str, str] | None = None,
) -> AttachHandle:
    """Hook every adapter onto its layer; weights stay untouched. Ours.

    Two attachments on one layer compose in the order in which they were attached and can be
    removed in any order.

    Args:
        module: the UNet (or any module) that holds the layers.
        adapters: what to attach; entry strengths are multiplied by ``strength``.
        strength: 0 is the base model bit-exactly, 1 the full edit; any real number, or one for
            each sample (B,).
        names: layer name to module path; None when they are equal (LDM-named modules).
            For a diffusers UNet: ``layout.module_names``.

    Returns:
        Handle and context manager.

    Raises:
        LayoutError: when a layer is not in the module; nothing is attached then.
    """
    modules = _modules(module, adapters, names)
    handle = AttachHandle(strength, adapters.layers)
    entries: dict[str, list[AdapterEntry]] = {layer: [] for layer in modules}
    for entry in adapters:
        entries[entry.layer].append(entry)
    for layer, target in modules.items():
        hook = _LayerHook(entries[layer], handle)
        handle.hold(target.register_forward_pre_hook(hook.before))
        handle.hold(target.register_forward_hook(hook.after))
    return handle


def merged_weights(
    module: nn.Module,
    adapters: AdapterSet,
    strength: float = 1.0,
    names: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """New weights with the adapters merged in: W + s * (merge(W) - W), in the order of the entries.

    Returns:
        Module path to new weight; nothing is written to the module.

    Raises:
        LayoutError: when a layer is missing or an adapter cannot be merged.
    """
    modules = _modules(module, adapters, names)
    result: dict[str, Tensor] = {}
    for entry in adapters:
        path = entry.layer if names is None else names[entry.layer]
        weight = result.get(path)
        if weight is None:
            weight = modules[entry.layer].get_parameter("weight").detach()
        merged = entry.adapter.merge(weight)
        if merged is None:
            raise LayoutError(
                f"The adapter on {entry.layer} depends on its input; attach it instead."
            )
        result[path] = _blend(weight, merged, entry.strength * strength)
    return result
