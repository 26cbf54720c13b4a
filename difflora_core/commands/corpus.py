"""`corpus`: LoRA files of people to a corpus that the paper's preset is trained on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from ..config import Config, check_range
from ..data.collect_loras import collect_loras
from ..data.lora_checks import LoRACheckSettings
from ..data.lora_store import StoreWriter
from ..errors import DatasetError, counted, shown
from ..limits import RANK
from ..lora.layout import layout_from_unet_config
from .bases import unet_config
from .run_folder import run_folder


@dataclass(frozen=True)
class Settings(Config):
    """Makes a corpus of LoRA files: read in any family, brought to one rank, checked, indexed.

    Called again it adds what is new; files that are in it are known by their content. Other checks
    change what is used and train nothing again.

    Args:
        source: a folder of LoRA files, one a person; those in folders below count too.
        out: folder of the corpus.
        base: base model that the LoRAs are for: sdxl, sd15 or demo.
        rank: of the corpus; others are brought to it.
        most_lost: share of its change that a LoRA may lose by that.
        checks: which LoRAs are used.
    """

    source: str
    out: str
    base: str = "sdxl"
    rank: int = 8
    most_lost: float = 0.5
    checks: LoRACheckSettings = field(default_factory=LoRACheckSettings)

    def __post_init__(self) -> None:
        check_range("Corpus", "rank", self.rank, 1, RANK)
        check_range("Corpus", "most_lost", self.most_lost, 0, 1)


def run(settings: Settings, console: Console) -> None:
    """Collects and indexes, and says what was left out.

    Raises:
        DiffLoRAError: there is no LoRA, the corpus is of another base, or it cannot be written.
    """
    source, folder = Path(settings.source), Path(settings.out)
    files = sorted(path for path in source.rglob("*.safetensors") if path.is_file())
    if not files:
        raise DatasetError(f"There is no LoRA file (.safetensors) in {shown(str(source), 300)}.")
    layout = layout_from_unet_config(settings.base, unet_config(settings.base), settings.rank)
    with run_folder(folder, settings, console) as own:
        writer = StoreWriter(folder, layout, "")
        names = [path.relative_to(source).with_suffix("").as_posix() for path in files]
        with own.watch("reading LoRA files") as watch:
            refused = collect_loras(
                *(files, names, writer, settings.most_lost),
                lambda what, done, total: watch(done, total, {}),
            )
        store = writer.write_index(settings.checks)
        left = {**refused, **{row.identity: row.reason for row in store.left_out}}
        for name, reason in left.items():
            own.say(f"{shown(name)} left out: {reason}")
        own.say(f"{counted(len(store), 'LoRA')} in the corpus, {len(left)} left out.")
