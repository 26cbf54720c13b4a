"""One adaptation on a model: when it acts, on which prompts, and by which words."""

from dataclasses import dataclass

from ...difflora_core.errors import ConfigError, percent
from ...difflora_core.lora.block_groups import GroupStrengths
from ...difflora_core.methods.base import AppliedAdaptation
from ...difflora_core.methods.registry import method
from .words import mark_of

UNSPOKEN = (
    "The word %s stands in no prompt of this run, so its concept changes nothing. Write it in CLIP "
    "Text Encode, with the CLIP of Load Concept or of the training node connected there. Of two "
    "prompts in ConditioningAverage only the words of conditioning_to count."
)
NOWHERE = (
    "The words %s stand in no positive prompt of this run, so nobody can say where that person is. "
    "Write them there just so, in CLIP Text Encode with the CLIP of the last Place LoRA by Words."
)


@dataclass(frozen=True, eq=False)
class Link:
    """An adaptation in a chain: from and up to which share of the steps it acts, and on what.

    `node_id`: of the node that put it there, which shows what there is to say of it. `place`: the
    words of a prompt that say where it acts, found in the steps up to the share `find`, in which it
    does not act yet; None for the whole picture.

    Raises:
        ConfigError: it would end before it starts.
    """

    applied: AppliedAdaptation
    start: float = 0.0
    end: float = 1.0
    positive_only: bool = False
    node_id: str | None = None
    place: str | None = None
    find: float = 0.0

    def __post_init__(self) -> None:
        if self.start > self.end:
            raise ConfigError(
                f"{self.applied.adaptation.title} would never act: it starts at "
                f"{percent(self.start)} of the steps, after its end at {percent(self.end)}. "
                "Choose a start before the end."
            )

    @property
    def never(self) -> str:
        """What to say where it acts in no step; empty where it may."""
        if self.start < self.end and self.start < 1 and self.end > 0:
            return ""
        title = self.applied.adaptation.title
        return f"{title} acts in no step: {percent(self.start)} to {percent(self.end)} holds none."

    @property
    def always(self) -> bool:
        """Whether it acts in every step, on every prompt, and equally in every part."""
        everywhere = self.applied.blocks == GroupStrengths()
        span = (self.start, self.end, self.positive_only, self.place)
        return everywhere and span == (0.0, 1.0, False, None)

    @property
    def of_base(self) -> bool:
        """Whether it takes something from the base model's output, see `Method`."""
        return method(self.applied.adaptation.method).of_base

    @property
    def word(self) -> str | None:
        """The word that it is called by."""
        word = self.applied.adaptation.word
        return word.word if word else None

    @property
    def term(self) -> str | None:
        """The name by which prompts say where its words stand."""
        return self.word if self.place is None else mark_of(self.place)

    @property
    def unspoken(self) -> str:
        """What to say where its words stand in no prompt."""
        return UNSPOKEN % self.word if self.place is None else NOWHERE % self.place
