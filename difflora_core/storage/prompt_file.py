"""Text files of prompts that people write."""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError
from ..limits import PROMPT_BYTES


def read_prompt_file(path: Path) -> str:
    """The text of a prompt file.

    Raises:
        ConfigError: it cannot be read, is too large, or is not in UTF-8.
    """
    try:
        with path.open("rb") as file:
            data = file.read(PROMPT_BYTES + 1)
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"The prompt file {path.name} cannot be read: {error}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"The prompt file {path.name} is not in UTF-8 (byte {error.start}): save it again as "
            "UTF-8 text."
        ) from error
    if len(data) > PROMPT_BYTES:
        raise ConfigError(f"The prompt file {path.name} is larger than {PROMPT_BYTES >> 20} MiB.")
    return text
