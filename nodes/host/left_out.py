"""What merging or saving a model leaves out: everything that acts while it samples."""

import logging
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import comfy.patcher_extension
from comfy.model_patcher import ModelPatcher

from .browser import show_here

logger = logging.getLogger(__name__)

LEFT_OUT = (
    "%s acts while a model samples and is not in its weights, so what is merged or saved here goes "
    "without it. Apply it to the model that comes out."
)
CLONED = comfy.patcher_extension.CallbacksMP.ON_CLONE
READERS = ("get_key_patches", "state_dict_for_saving")
"""By these ComfyUI reads a model's weights to merge them, or to save them."""


def tell_when_left_out(patcher: ModelPatcher, key: str, titles: str) -> None:
    """Has a model, and clones of it, tell on a node that reads its weights what it does not get.

    Args:
        patcher: the model.
        key: under which ComfyUI keeps this; an older one is replaced.
        titles: what is on the model and in no weight.
    """
    patcher.remove_callbacks_with_key(CLONED, key)
    patcher.add_callback_with_key(CLONED, key, lambda _, clone: _listen(clone, titles))
    _listen(patcher, titles)


def _listen(patcher: ModelPatcher, titles: str) -> None:
    """Puts itself before the readers of a model, which it does not keep alive."""
    for name in READERS:
        usual = getattr(type(patcher), name)
        setattr(patcher, name, partial(_read, weakref.ref(patcher), usual, titles))


def _read(
    patcher: Callable[[], ModelPatcher | None],
    usual: Callable[..., Any],
    titles: str,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """A model's weights as ComfyUI reads them, and what is told; hooks ask without a prefix."""
    if args or kwargs or usual.__name__ != READERS[0]:
        text = LEFT_OUT % titles
        logger.warning("%s", text)
        show_here(text)
    return usual(patcher(), *args, **kwargs)
