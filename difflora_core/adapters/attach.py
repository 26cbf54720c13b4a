"""Attach an AdapterSet to a module with hooks, and take it off again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import LayoutError, counted
from .base import AdapterEntry, AdapterSet, LayerAdapter, Strength


def _blend(plain: Tensor, edited: Tensor, strength: Strength) -> Tensor:
    """plain + strength * (edited - plain), exact at strengths 0 and 1."""
    if edited is plain or (not isinstance(strength, Tensor) and strength == 1.0):
        return edited
    if not isinstance(strength, Tensor):
        return plain + strength * (edited - plain)
    rows = _rows(strength, plain)
    blended = torch.where(rows == 1, edited, plain + rows * (edited - plain))
    return torch.where(rows == 0, plain, blended)


def _weighted(change: Tensor, strength: Strength) -> Tensor:
    """strength * change (B, ...)."""
    return (_rows(strength, change) if isinstance(strength, Tensor) else strength) * change


def _rows(strength: Tensor, like: Tensor) -> Tensor:
    """Strengths (B,) shaped to multiply `like` (n * B, ...).

    A layer may see every sample in n parts, one after another (HyperTile's tiles).

    Raises:
        LayoutError: when the batch is no multiple of the number of strengths.
    """
    parts, rest = divmod(like.shape[0], len(strength))
    if rest or not parts:
        raise LayoutError(
            f"There are strengths for {counted(len(strength), 'sample')}, but the batch has "
            f"{like.shape[0]}."
        )
    rows = strength.to(like).repeat_interleave(parts)
    return rows.view(-1, *[1] * (like.ndim - 1))


class _LayerHook:
    """All adapters of one attachment on one layer; remembers the original input of a call."""

    def __init__(self, entries: list[AdapterEntry], owner: AttachHandle) -> None:
        self.entries = entries
        self.owner = owner
        self.x: Tensor | None = None

    def _active(self) -> list[tuple[LayerAdapter, Strength]]:
        """Adapters with a strength other than zero."""
        if self.owner.paused:
            return []
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

    ``strength`` may be changed while attached; 0 gives the base model bit-exactly. Inside `hold`
    the end of the ``with`` block only pauses it.
    """

    def __init__(self, strength: Strength, layers: tuple[str, ...]) -> None:
        self.strength = strength
        self.layers = layers
        self.paused = False
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
        held = _HELD.get()
        if held is None:
            self.remove()
        else:
            held.take(self)


class HeldAttachments:
    """Attachments whose own block has ended, kept until the backward pass is through."""

    def __init__(self) -> None:
        self._handles: list[AttachHandle] = []

    def take(self, handle: AttachHandle) -> None:
        """Pause an attachment, to resume it later.

        Raises:
            LayoutError: one of its layers is held already; recomputing would apply both.
        """
        handle.paused = True
        self._handles.append(handle)
        layers = [layer for own in self._handles for layer in own.layers]
        if len(set(layers)) < len(layers):
            raise LayoutError("Adapters were attached twice to one layer in a training step.")

    def resume(self) -> None:
        """Let the attachments act again, as they did in the forward pass."""
        for handle in self._handles:
            handle.paused = False

    def remove(self) -> None:
        """Take all of them off."""
        for handle in self._handles:
            handle.remove()


_HELD: ContextVar[HeldAttachments | None] = ContextVar("held attachments", default=None)


@contextmanager
def hold() -> Iterator[HeldAttachments]:
    """Keep attachments for the backward pass: checkpointed layers are computed a second time there.

    Inside, an attachment whose block ends is paused instead of removed; `resume` before the
    backward pass lets it act again. All are off when this block ends.
    """
    held = HeldAttachments()
    token = _HELD.set(held)
    try:
        yield held
    finally:
        _HELD.reset(token)
        held.remove()


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
        live = [replace(entry, adapter=entry.adapter.on(target)) for entry in entries[layer]]
        hook = _LayerHook(live, handle)
        handle.hold(target.register_forward_pre_hook(hook.before))
        handle.hold(target.register_forward_hook(hook.after))
    return handle
