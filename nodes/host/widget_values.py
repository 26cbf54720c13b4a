"""Values of widgets that come over a link: ComfyUI checks only what is typed into a widget."""

import math
from collections.abc import Container, Mapping
from functools import wraps
from inspect import signature
from typing import Any

from comfy_api.latest import io

from ...difflora_core.errors import ConfigError, described, shown
from .browser import show_here

HINT = "Another node is connected there: see what it gives."


def checked(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """A node that refuses values which its widgets could not hold, before it runs."""
    execute = node.execute.__func__
    if hasattr(execute, "__wrapped__"):
        return node

    @wraps(execute)
    def run(cls: type[io.ComfyNode], *args: Any, **values: Any) -> Any:
        return execute(cls, *args, **_fitting(cls, values))

    node.execute = classmethod(run)
    return node


def _fitting(node: type[io.ComfyNode], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by the names of their widgets, as those would hold them.

    What the node has no input for is left out and told: ComfyUI hands over links of workflows that
    were saved with another version.

    Raises:
        ConfigError: see `fitting`.
    """
    schema = node.define_schema()
    widgets = {widget.id: widget for widget in schema.inputs}
    files = signature(node.validate_inputs).parameters  # of a missing file the node says more
    result = {}
    for name, value in values.items():
        if name not in widgets:
            show_here(
                f"This node has no input {shown(name)}; what is connected there does nothing."
            )
            continue
        if value is None and widgets[name].optional:
            continue  # as if nothing were connected
        many = schema.is_input_list and isinstance(value, list)
        own = [fitting(widgets[name], one, files) for one in (value if many else [value])]
        result[name] = own if many else own[0]
    return result


def fitting(widget: Any, value: Any, files: Container[str] = ()) -> Any:
    """A value as a widget would hold it; what goes into a socket stays, if it is there.

    Args:
        widget: an input of a node's schema.
        value: what came.
        files: names of widgets whose choices are files.

    Raises:
        ConfigError: it is of another kind, out of range, no choice of the widget, or nothing.
    """
    if value is None and not widget.optional:
        raise ConfigError(f"{widget.id} is nothing. {HINT}")
    if isinstance(widget, (io.Int.Input, io.Float.Input)):
        return _number(widget, value)
    choice = isinstance(widget, io.Combo.Input)
    if (choice or isinstance(widget, io.String.Input)) and not isinstance(value, str):
        raise ConfigError(f"{widget.id} is {described(value)}, which is no text. {HINT}")
    if isinstance(widget, io.String.Input) and any("\ud800" <= c <= "\udfff" for c in value):
        raise ConfigError(f"{widget.id} is {described(value)}, with half a character in it.")
    if choice and widget.id not in files and value not in widget.options:
        options = shown(", ".join(widget.options))
        raise ConfigError(f"{widget.id} is {described(value)}; choose one of {options}. {HINT}")
    return value


def _number(widget: Any, value: Any) -> int | float:
    """A number in the range of a widget; 3.0 is whole.

    Raises:
        ConfigError: it is none, or out of range.
    """
    whole = isinstance(widget, io.Int.Input)
    try:
        number = math.nan if isinstance(value, str) else float(value)
        fits = math.isfinite(number) and widget.min <= value <= widget.max
    except (TypeError, ValueError, OverflowError, RuntimeError):
        fits = False
    if not fits or (whole and int(value) != value):
        kind = "a whole number" if whole else "a number"
        raise ConfigError(
            f"{widget.id} is {described(value)}, but has to be {kind} from {widget.min} to "
            f"{widget.max}. {HINT}"
        )
    return int(value) if whole else number
