"""What an artist asks of a training node: words, their kinds, and prompts that hold them."""

from dataclasses import dataclass

from ...difflora_core.errors import ConfigError
from ...difflora_core.text.new_words import SLOT, TEMPLATES, find_words
from ...difflora_core.training.concept_task import NewWord


@dataclass(frozen=True)
class TrainingRequest:
    """What to teach, in which prompts, and where to keep it."""

    word: str
    superclass: str
    prompts: str
    file_name: str
    mirror: bool
    small_file: bool
    second_word: str = ""
    second_superclass: str = ""

    @property
    def kinds(self) -> dict[str, str]:
        """Each new word and the word of its kind.

        Raises:
            ConfigError: both words are the same.
        """
        kinds = {self.word.strip(): self.superclass.strip()}
        if second := self.second_word.strip():
            if second in kinds:
                raise ConfigError(f"The two words are both {second}; choose different ones.")
            kinds[second] = self.second_superclass.strip()
        return kinds

    @property
    def lines(self) -> list[str]:
        """Prompts to train in, with the new words.

        Raises:
            ConfigError: one holds no new word, or one several times.
        """
        words = list(self.kinds)
        lines = [line.strip() for line in self.prompts.split("\n") if line.strip()]
        for line in lines:
            found = [word for _, _, word in find_words(line, words)]
            if not found or len(set(found)) < len(found):
                raise ConfigError(
                    f"The training prompt {line!r} must hold the new word {' or '.join(words)} "
                    "once."
                )
        return lines or [template.replace(SLOT, " and a ".join(words)) for template in TEMPLATES]

    def new_words(self) -> list[NewWord]:
        """The words, each with its prompts, in which other new words stand as their kinds.

        Raises:
            ConfigError: no prompt holds one of them.
        """
        kinds, words = self.kinds, []
        for word, kind in kinds.items():
            rest = {other: k for other, k in kinds.items() if other != word}
            named = {**rest, word: SLOT}
            contexts = []
            for line in self.lines:
                found = find_words(line, list(kinds))
                if word in (w for _, _, w in found):
                    for start, end, w in reversed(found):
                        line = line[:start] + named[w] + line[end:]
                    contexts.append(line)
            if not contexts:
                raise ConfigError(f"No training prompt holds the new word {word}.")
            words.append(NewWord(word, kind, tuple(contexts)))
        return words
