"""Filters decide which tasks become rows.  Each returns the reason to drop a task, or None.

`kept` is called for each task that passes all filters, so that a filter can compare later tasks
with it.  The defaults follow Self-Instruct (Wang et al. 2023) and Alpaca (Taori et al. 2023).
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from llmdistill.evaluation.text import result_of, same_result
from llmdistill.evaluation.words import count_words, plain_words, words
from llmdistill.instruct.similarity import RougePool
from llmdistill.instruct.tasks import Task

# Instructions with these words tend to ask for what a model that only writes text cannot do.
BLACKLIST = (
    *("image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps"),
    *("draw", "plot", "go to", "video", "audio", "music", "flowchart", "diagram"),
)
FENCE = re.compile(
    r"^[ \t]*(?:```|~~~)[^\n]*\n(.*?)(?:^[ \t]*(?:```|~~~)[ \t]*$|\Z)", re.MULTILINE | re.DOTALL
)
MIN_MATCHED_WORDS = 4  # shorter texts, such as the answer "Paris", occur in many rows by chance


class Filter(ABC):
    """A test that drops some tasks.  `kind` is its name in recipes, or "" if it has none.

    Filters that look only at the answer set `needs_answer`: they let questions alone pass.
    """

    kind = ""
    needs_answer = False

    @abstractmethod
    def reason(self, task: Task) -> str | None:
        """Return why the task is dropped, or None to keep it.

        Reasons are counted in the log and on the card, so they are a few fixed words.
        """

    def kept(self, task: Task) -> None:
        """Record a task that passed all filters.  Does nothing by default."""
        return

    def columns(self, task: Task) -> Mapping[str, Any]:
        """Return columns for the row of a task that passed all filters; none by default.

        This is called before `kept`.
        """
        return {}


class Length(Filter):
    """Drops tasks whose `field` has fewer than `min_words` or more than `max_words` words.

    The default bounds of an instruction are those of Self-Instruct (Wang et al. 2023).
    """

    def __init__(self, min_words: int = 4, max_words: int = 150, field: str = "instruction"):
        self.min_words, self.max_words, self.field = min_words, max_words, field

    def reason(self, task: Task) -> str | None:
        count = count_words(getattr(task, self.field))
        if count < self.min_words:
            return f"{self.field} too short"
        return f"{self.field} too long" if count > self.max_words else None


class Truncated(Filter):
    """Drops answers that the limit of new tokens cut off."""

    needs_answer = True

    def reason(self, task: Task) -> str | None:
        return "truncated" if task.truncated else None


class Blacklist(Filter):
    """Drops instructions that contain one of `words` as a whole word, in any case.

    The default `BLACKLIST` names images, files, music and the like (Taori et al. 2023, Alpaca).
    """

    def __init__(self, words: Sequence[str] | None = None) -> None:
        alternatives = "|".join(map(re.escape, words or BLACKLIST))
        self.pattern = re.compile(rf"\b(?:{alternatives})\b", re.IGNORECASE)

    def reason(self, task: Task) -> str | None:
        return "blacklisted word" if self.pattern.search(task.instruction) else None


class OddStart(Filter):
    """Drops instructions that start with a sign, or with "Write a program".

    The rule is that of Alpaca (Taori et al. 2023), but letters of any language may start an
    instruction, and so may opening marks such as "¿" and "«".
    """

    def reason(self, task: Task) -> str | None:
        first = task.instruction.lstrip()[:1]
        opens = not first.isascii() and unicodedata.category(first or " ") in ("Ps", "Pi")
        starts = first.isalnum() or opens or first in ("¿", "¡")
        if not starts or task.instruction.lstrip().startswith("Write a program"):
            return "odd start"
        return None


class RepeatedLines(Filter):
    """Drops answers that repeat their lines or runs of words.

    Neither the share of repeated lines nor that of repeated runs of `ngram` words may be larger
    than `max_share`.  In fenced code, where lines and names repeat, only `max_code_share` of the
    lines may be repeated.
    """

    needs_answer = True

    def __init__(self, max_share: float = 0.3, ngram: int = 4, max_code_share: float = 0.8) -> None:
        self.max_share, self.ngram, self.max_code_share = max_share, ngram, max_code_share

    def reason(self, task: Task) -> str | None:
        code = "\n".join(block[1] for block in FENCE.finditer(task.output))
        text = FENCE.sub("\n", task.output)
        parts = words(text)
        runs = [tuple(parts[i : i + self.ngram]) for i in range(len(parts) - self.ngram + 1)]
        repeats = max(_repeated(_lines(text)), _repeated(runs))
        is_looping = _repeated(_lines(code)) > self.max_code_share
        return "repeats itself" if repeats > self.max_share or is_looping else None


class EmptyAnswer(Filter):
    """Drops empty answers.  It is no option of recipes, because the pipeline always applies it."""

    needs_answer = True

    def reason(self, task: Task) -> str | None:
        if task.output.strip():
            return None
        return "only thinking" if task.thinking else "empty answer"


class Duplicates(Filter):
    """Drops rows that equal a kept one: the same prompt, messages before it, images and answer."""

    def __init__(self) -> None:
        self.rows: set[bytes] = set()

    def reason(self, task: Task) -> str | None:
        return "duplicate" if self._row(task) in self.rows else None

    def kept(self, task: Task) -> None:
        self.rows.add(self._row(task))

    def _row(self, task: Task) -> bytes:
        told = (task.messages_before, task.images, task.prompt.strip())
        text = repr((told, task.output.strip(), task.rejected))
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


class EmptyOrEcho(Filter):
    """Drops answers that are empty, only punctuation, or a copy of the question or input."""

    needs_answer = True

    def reason(self, task: Task) -> str | None:
        output = _plain(task.output)
        if not output:
            return "empty answer"
        echoes = {_plain(task.instruction), _plain(task.input), _plain(task.prompt)}
        return "echo" if output in echoes else None


class OpenEnd(Filter):
    """Drops tasks whose input or answer ends with a colon, because its continuation is missing."""

    def reason(self, task: Task) -> str | None:
        ends = (task.input.rstrip()[-1:], task.output.rstrip()[-1:])
        return "ends with a colon" if ":" in ends else None


class Rouge(Filter):
    """Drops instructions that are too similar to a seed or to an instruction that was kept.

    The ROUGE-L F-measure to each of them may be at most `at_most`, as in Self-Instruct (Wang et al.
    2023).  Rows get their `most_similar` instructions, and the mean similarity to all, as columns.
    """

    def __init__(
        self, at_most: float = 0.7, seeds: Iterable[str] = (), *, most_similar: int = 0
    ) -> None:
        self.at_most, self.most_similar, self.pool = at_most, most_similar, RougePool()
        self.texts = list(seeds)
        for seed in self.texts:
            self.pool.add(seed)

    def reason(self, task: Task) -> str | None:
        return "too similar" if self.pool.nearest(task.instruction, self.at_most) else None

    def columns(self, task: Task) -> Mapping[str, Any]:
        if not self.most_similar:
            return {}
        similar, mean = self.pool.similar(task.instruction, self.most_similar)
        listed = [{"instruction": self.texts[one.place], "score": one.score} for one in similar]
        return {"most_similar": listed, "mean_similarity": mean}

    def kept(self, task: Task) -> None:
        self.pool.add(task.instruction)
        self.texts.append(task.instruction)


class NearDuplicates(Filter):
    """Drops rows that are nearly the same as a kept one, by MinHash (Broder 1997).

    A row is dropped if the Jaccard similarity of its set of `ngram`-word runs (of prompt and
    answer) to that of a kept row is at least `threshold`.  `permutations` is the number of hash
    functions: more estimate the similarity more exactly.
    """

    def __init__(self, threshold: float = 0.8, ngram: int = 3, permutations: int = 128) -> None:
        self.threshold, self.ngram, self.permutations = threshold, ngram, permutations
        # One row of numbers for each kept row.  Comparing all of them takes milliseconds, and an
        # index of them takes thirty times as much memory.
        self.sketches = np.empty((64, permutations), np.uint32)
        self.count = 0

    def reason(self, task: Task) -> str | None:
        alike = self.sketches[: self.count] == self._sketch(task)
        shares = np.count_nonzero(alike, axis=1) / self.permutations
        return "near duplicate" if (shares >= self.threshold).any() else None

    def kept(self, task: Task) -> None:
        if self.count == len(self.sketches):
            self.sketches = np.concatenate([self.sketches, np.empty_like(self.sketches)])
        self.sketches[self.count] = self._sketch(task)
        self.count += 1

    def _sketch(self, task: Task) -> np.ndarray:
        from datasketch import MinHash

        # A fixed seed: sketches are only comparable if they use the same permutations.
        sketch = MinHash(num_perm=self.permutations, seed=1)
        sketch.update_batch(
            [run.encode() for run in _runs(f"{task.prompt}\n{task.output}", self.ngram)]
        )
        return sketch.hashvalues.astype(np.uint32)  # they are below 2 to the power of 32


class Contamination(Filter):
    """Drops rows that share a run of `ngram` words with a text of an evaluation set.

    `texts` are the questions and answers of that set.  A text with fewer than `ngram` words matches
    if a row contains all of it and it has at least `MIN_MATCHED_WORDS` words.
    """

    def __init__(self, texts: Iterable[str], ngram: int = 10) -> None:
        runs = {run: run.count(" ") + 1 for text in texts for run in _runs(text, ngram)}
        self.runs = {run for run, words in runs.items() if words >= min(MIN_MATCHED_WORDS, ngram)}
        # A text shorter than `ngram` words is one run, so rows are searched for each length.
        self.lengths = sorted({runs[run] for run in self.runs})

    def reason(self, task: Task) -> str | None:
        texts = (task.instruction, task.input, task.prompt, task.output)
        found = (run for text in texts for n in self.lengths for run in _runs(text, n))
        return "in an evaluation set" if any(run in self.runs for run in found) else None


class Language(Filter):
    """Drops rows in a language other than `languages` (ISO 639-1 codes).

    `py3langid` classifies prompt and answer together.
    """

    def __init__(self, languages: Sequence[str] = ("en",)) -> None:
        self.languages = tuple(languages)

    def reason(self, task: Task) -> str | None:
        import py3langid

        found = py3langid.classify(f"{task.prompt}\n{task.output}")[0]
        return None if found in self.languages else "another language"


class SameResult(Filter):
    """Drops answers whose result differs from that of the reference answer, as in maths.

    `pattern` finds the result as in `evaluation.text.result_of`.  Rows without a reference pass;
    an answer without a result is dropped.
    """

    needs_answer = True

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern

    def reason(self, task: Task) -> str | None:
        if task.reference is None:
            return None
        found, expected = (result_of(t, self.pattern) for t in (task.output, task.reference))
        return None if same_result(found, expected) else "another result"


class Perplexity(Filter):
    """Drops answers whose perplexity under the teacher is above `at_most` or below `at_least`.

    The perplexity is exp of the mean negative log-probability per token.  It is high if the teacher
    rambled, and very low if it recited or repeated itself.
    """

    needs_answer = True

    def __init__(self, at_most: float | None = None, at_least: float | None = None) -> None:
        # Compared as logarithms: servers give impossible tokens log-probabilities such as -9999,
        # and the perplexity of those overflows a float.
        self.highest = math.log(at_most) if at_most else math.inf
        self.lowest = math.log(at_least) if at_least else -math.inf

    def reason(self, task: Task) -> str | None:
        if task.log_prob is None:  # the teacher did not write this answer
            return None
        if -task.log_prob > self.highest:
            return "perplexity too high"
        return "perplexity too low" if -task.log_prob < self.lowest else None


class Balanced(Filter):
    """Keeps at most `at_most` rows of each variant: Lion keeps hard and easy tasks 1:1."""

    def __init__(self, at_most: int) -> None:
        self.at_most, self.counts = at_most, Counter[str]()

    def reason(self, task: Task) -> str | None:
        return f"enough {task.variant} ones" if self.counts[task.variant] >= self.at_most else None

    def kept(self, task: Task) -> None:
        self.counts[task.variant] += 1


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _repeated(parts: Sequence[object]) -> float:
    """Return the share of parts that occurred earlier in the list; 0 for an empty list."""
    return 1 - len(set(parts)) / len(parts) if parts else 0.0


def _plain(text: str) -> str:
    """Return the text in lower case, without outer punctuation and extra white space."""
    return " ".join(text.lower().split()).strip(" .!?:\"'")


def _runs(text: str, length: int) -> list[str]:
    """Return all runs of `length` words, in lower case and without punctuation.

    A text with fewer words is a single run.
    """
    found = plain_words(text)
    return [" ".join(found[i : i + length]) for i in range(max(len(found) - length + 1, 1))]
