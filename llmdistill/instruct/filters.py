"""Which tasks are kept.  A filter gives the reason why one is dropped, or None.

Those that compare with what was kept before are told of each task that all filters let pass.  The
defaults are those of Self-Instruct (Wang et al. 2023) and Alpaca (Taori et al. 2023).
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from llmdistill.evaluation.text import result_of
from llmdistill.instruct.similarity import RougePool
from llmdistill.instruct.tasks import Task

# What a model that reads and writes text cannot do.
BLACKLIST = (
    *("image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps"),
    *("draw", "plot", "go to", "video", "audio", "music", "flowchart", "diagram"),
)
MIN_MATCHED_WORDS = 4  # fewer words can match by chance


class Filter(ABC):
    @abstractmethod
    def reason(self, task: Task) -> str | None:
        """Why this task is dropped, in a few words that can be counted; None keeps it."""

    def kept(self, task: Task) -> None:
        """Every filter let this task pass; few have to remember it."""
        return


class Length(Filter):
    """The number of words of one field, by default the instruction."""

    def __init__(self, min_words: int = 4, max_words: int = 150, field: str = "instruction"):
        self.min_words, self.max_words, self.field = min_words, max_words, field

    def reason(self, task: Task) -> str | None:
        words = len(getattr(task, self.field).split())
        if words < self.min_words:
            return f"{self.field} too short"
        return f"{self.field} too long" if words > self.max_words else None


class Truncated(Filter):
    """An answer that the limit of new tokens cut off."""

    def reason(self, task: Task) -> str | None:
        return "truncated" if task.truncated else None


class Blacklist(Filter):
    """Whole words of the instruction that ask for more than text, by default `BLACKLIST`."""

    def __init__(self, words: Sequence[str] | None = None) -> None:
        alternatives = "|".join(map(re.escape, words or BLACKLIST))
        self.pattern = re.compile(rf"\b(?:{alternatives})\b", re.IGNORECASE)

    def reason(self, task: Task) -> str | None:
        return "blacklisted word" if self.pattern.search(task.instruction) else None


class OddStart(Filter):
    """Starts with punctuation or outside ASCII, or asks to write a program."""

    def reason(self, task: Task) -> str | None:
        first = task.instruction.lstrip()[:1]
        odd = not first or not first.isascii() or not first.isalnum()
        if odd or task.instruction.lstrip().startswith("Write a program"):
            return "odd start"
        return None


class RepeatedLines(Filter):
    """The answer says the same line, or the same run of words, too often."""

    def __init__(self, max_share: float = 0.3, ngram: int = 4) -> None:
        self.max_share, self.ngram = max_share, ngram

    def reason(self, task: Task) -> str | None:
        lines = [line.strip() for line in task.output.splitlines() if line.strip()]
        words = task.output.split()
        runs = [tuple(words[i : i + self.ngram]) for i in range(len(words) - self.ngram + 1)]
        repeats = max(_repeated(lines), _repeated(runs))
        return "repeats itself" if repeats > self.max_share else None


class EmptyAnswer(Filter):
    """Nothing was answered."""

    def reason(self, task: Task) -> str | None:
        return None if task.output.strip() else "empty answer"


class EmptyOrEcho(Filter):
    """Nothing was answered, or punctuation, or the question."""

    def reason(self, task: Task) -> str | None:
        output = _plain(task.output)
        if not output:
            return "empty answer"
        echoes = {_plain(task.instruction), _plain(task.input), _plain(task.prompt)}
        return "echo" if output in echoes else None


class OpenEnd(Filter):
    """The input or the answer ends in a colon: something was to follow."""

    def reason(self, task: Task) -> str | None:
        ends = (task.input.rstrip()[-1:], task.output.rstrip()[-1:])
        return "ends with a colon" if ":" in ends else None


class Rouge(Filter):
    """Too like an instruction that is there already: ROUGE-L F above `at_most`."""

    def __init__(self, at_most: float = 0.7, seeds: Iterable[str] = ()) -> None:
        self.at_most, self.pool = at_most, RougePool()
        for seed in seeds:
            self.pool.add(seed)

    def reason(self, task: Task) -> str | None:
        return "too similar" if self.pool.nearest(task.instruction, self.at_most) else None

    def kept(self, task: Task) -> None:
        self.pool.add(task.instruction)


class NearDuplicates(Filter):
    """Word runs of prompt and answer that nearly all stand in another row: MinHash (Broder 1997).

    `threshold` is the Jaccard similarity of the sets of runs.
    """

    def __init__(self, threshold: float = 0.8, ngram: int = 3, permutations: int = 128) -> None:
        from datasketch import MinHashLSH

        self.threshold, self.ngram, self.permutations = threshold, ngram, permutations
        # Its candidates are a guess: asked for more of them than wanted, each is looked at.
        self.index = MinHashLSH(threshold=max(threshold - 0.25, 0.1), num_perm=permutations)
        self.sketches: list[Any] = []

    def reason(self, task: Task) -> str | None:
        sketch = self._sketch(task)
        alike = (sketch.jaccard(self.sketches[place]) for place in self.index.query(sketch))
        return "near duplicate" if any(share >= self.threshold for share in alike) else None

    def kept(self, task: Task) -> None:
        self.sketches.append(self._sketch(task))
        self.index.insert(len(self.sketches) - 1, self.sketches[-1])

    def _sketch(self, task: Task) -> Any:
        from datasketch import MinHash

        sketch = MinHash(num_perm=self.permutations, seed=1)
        sketch.update_batch(
            [run.encode() for run in _runs(f"{task.prompt}\n{task.output}", self.ngram)]
        )
        return sketch


class Contamination(Filter):
    """Shares a run of `ngram` words with a text of an evaluation set, or holds all of a shorter
    text of `MIN_MATCHED_WORDS` or more.  A question and its answer count as two texts.
    """

    def __init__(self, texts: Iterable[str], ngram: int = 10) -> None:
        runs = {run: run.count(" ") + 1 for text in texts for run in _runs(text, ngram)}
        self.runs = {run for run, words in runs.items() if words >= min(MIN_MATCHED_WORDS, ngram)}
        self.lengths = sorted({runs[run] for run in self.runs})

    def reason(self, task: Task) -> str | None:
        texts = (task.instruction, task.input, task.prompt, task.output)
        found = (run for text in texts for n in self.lengths for run in _runs(text, n))
        return "in an evaluation set" if any(run in self.runs for run in found) else None


class Language(Filter):
    """Prompt and answer are in one of these languages (ISO 639-1), by `py3langid`."""

    def __init__(self, languages: Sequence[str] = ("en",)) -> None:
        self.languages = tuple(languages)

    def reason(self, task: Task) -> str | None:
        import py3langid

        found = py3langid.classify(f"{task.prompt}\n{task.output}")[0]
        return None if found in self.languages else "another language"


class SameResult(Filter):
    """The result in the answer is the reference's, as `result_of` finds it (for maths)."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern

    def reason(self, task: Task) -> str | None:
        if task.reference is None:
            return None
        found, expected = (result_of(t, self.pattern) for t in (task.output, task.reference))
        return None if found is not None and found == expected else "another result"


class Perplexity(Filter):
    """How likely the teacher found its text: exp of the mean negative log-probability per token.

    High where it rambled, very low where it recites or repeats.
    """

    def __init__(self, at_most: float | None = None, at_least: float | None = None) -> None:
        # As logarithms: exp of what a server says of an impossible token is no float.
        self.highest = math.log(at_most) if at_most else math.inf
        self.lowest = math.log(at_least) if at_least else -math.inf

    def reason(self, task: Task) -> str | None:
        if task.log_prob is None:  # the teacher did not write this answer
            return None
        if -task.log_prob > self.highest:
            return "perplexity too high"
        return "perplexity too low" if -task.log_prob < self.lowest else None


class Balanced(Filter):
    """No more than a number of each variant (Lion's 1:1)."""

    def __init__(self, at_most: int) -> None:
        self.at_most, self.counts = at_most, Counter[str]()

    def reason(self, task: Task) -> str | None:
        return f"enough {task.variant} ones" if self.counts[task.variant] >= self.at_most else None

    def kept(self, task: Task) -> None:
        self.counts[task.variant] += 1


def _repeated(parts: Sequence[object]) -> float:
    """Share of parts that stood earlier already."""
    return 1 - len(set(parts)) / len(parts) if parts else 0.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).strip(" .!?:\"'")


def _runs(text: str, length: int) -> list[str]:
    """Runs of words in lower case without punctuation; a shorter text is one run."""
    words = re.findall(r"\w+", text.lower())
    return [" ".join(words[i : i + length]) for i in range(max(len(words) - length + 1, 1))]
