"""One teacher for each row: chosen by a column of the rows, or by how hard the row is.

B = rows of a batch, R = rows of the dataset, T = tokens, N = predicted tokens, K = teachers.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from llmdistill.batch import Prompts, Sequences, TeacherSignal
from llmdistill.data.table import Row
from llmdistill.distributions import Routed, Several
from llmdistill.errors import DataError, RecipeError
from llmdistill.models.taps import Need
from llmdistill.protocols import Teacher, Writes
from llmdistill.sampling import Draw, Sampling, Writer
from llmdistill.teachers.ensemble import (
    all_ends,
    distribution_of,
    mean_log_prob,
    require_one_vocabulary,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_SIZE = 16  # rows in each batch whose difficulty is measured


class RoutedTeacher:
    """Several frozen teachers with one vocabulary, one of which teaches each row.

    A teacher runs on its own rows only.  If all teachers can write, each writes its own rows.

    Args:
        teachers: The teachers by name.
        route: The name of the teacher of each row, by row id.
        balance: The factor on the loss of each teacher's tokens by name, or None for 1.

    Raises:
        RecipeError: A row has a teacher that is not listed, or there are no teachers.
        VocabularyError: The teachers do not share a vocabulary.
    """

    provides = frozenset({Need.DISTRIBUTION})
    scores_anew = True

    def __init__(
        self,
        teachers: Mapping[str, Teacher],
        route: Mapping[int, str],
        *,
        balance: Mapping[str, float] | None = None,
    ) -> None:
        self.teachers = dict(teachers)
        if not self.teachers:
            raise RecipeError("RoutedTeacher: there are no teachers. List at least one.")
        unknown = {row: name for row, name in route.items() if name not in self.teachers}
        if unknown:
            row, name = next(iter(unknown.items()))
            raise RecipeError(
                f"row {row} is routed to teacher {name!r}, which is not listed "
                f"({len(unknown)} rows are). The teachers are: {', '.join(self.teachers)}. Add "
                "it, or change the rows."
            )
        require_one_vocabulary([teacher.tokenizer for teacher in self.teachers.values()])
        names = list(self.teachers)
        self.place = {row: names.index(name) for row, name in route.items()}
        self.balance = None if balance is None else [balance[name] for name in names]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the first teacher, whose vocabulary all share."""
        return next(iter(self.teachers.values())).tokenizer

    @property
    def ends(self) -> frozenset[int]:
        """The token ids that end a response of one of the teachers."""
        return all_ends(list(self.teachers.values()))

    @property
    def plain(self) -> Teacher:
        """The same teacher without factors, which would not be part of a distribution."""
        if self.balance is None:
            return self
        same = copy.copy(self)
        same.balance = None
        return same

    @torch.no_grad()
    def judge(self, sequences: Sequences, needs: frozenset[Need]) -> TeacherSignal:
        """Score the predicted tokens, those of each row with the row's own teacher."""
        if Need.DISTRIBUTION not in needs:
            return TeacherSignal()
        # A filler row has no predicted token, so no teacher reads it.
        place_B = torch.tensor(self._places(sequences.row_ids_B))
        count_B = sequences.num_predicted.cpu()
        parts, used = [], []
        for place, teacher in enumerate(self.teachers.values()):
            rows = ((place_B == place) & (count_B > 0)).nonzero()[:, 0]
            if len(rows):
                some = sequences.select(rows.to(sequences.input_ids_BT.device))
                parts.append(distribution_of(teacher, some))
                used.append(place)
        if not parts:  # there is nothing to score, but the signal must exist
            parts.append(distribution_of(next(iter(self.teachers.values())), sequences))
        place_N = place_B.repeat_interleave(count_B)
        part_N = torch.searchsorted(torch.tensor(used or [0]), place_N)
        routed = parts[0] if len(parts) == 1 else Routed(tuple(parts), part_N)
        if self.balance is None:
            return TeacherSignal(routed)
        return TeacherSignal(Several((routed,), torch.tensor(self.balance)[place_N][None]))

    def write(
        self, prompts: Prompts, sampling: Sampling, *, max_new_tokens: int, draw: Draw
    ) -> Sequences:
        """Write one response to each prompt with the teacher of its row.

        Raises RecipeError if a teacher cannot write.
        """
        place_B = self._places(prompts.row_ids_B)
        responses: list[list[int]] = [[] for _ in place_B]
        for place, (name, teacher) in enumerate(self.teachers.items()):
            rows = [row for row, own in enumerate(place_B) if own == place]
            if not rows:
                continue
            if not isinstance(teacher, Writes):
                raise RecipeError(f"teacher '{name}' cannot write. Use another rollout.")
            some = prompts.select(rows, pad_id=0)
            written = teacher.write(some, sampling, max_new_tokens=max_new_tokens, draw=draw)
            for row, ids in zip(rows, written.responses(), strict=True):
                responses[row] = ids
        rows_B = prompts.row_ids_B.tolist()
        return Sequences.pack(prompts.ids(), responses, rows_B, writer=Writer.TEACHER, pad_id=0)

    def _places(self, row_ids_B: Tensor) -> list[int]:
        rows = row_ids_B.tolist()
        if missing := [row for row in rows if row not in self.place]:
            raise DataError(
                f"no teacher is chosen for row {missing[0]}. Build the teacher with the route of "
                "all rows that are trained on or measured."
            )
        return [self.place[row] for row in rows]


def token_balance(
    rows: Sequence[Row], route: Mapping[int, str], *, by_tokens: bool = True
) -> dict[str, float]:
    """Return the factor of each teacher's tokens with which all teachers count the same.

    It is N / (K N_k), with N_k the response tokens of teacher k in the rows, or without `by_tokens`
    the number of its rows, because a model writes the responses.  So it does not depend on which
    rows share a step.
    """
    counts: dict[str, int] = {}
    for row in rows:
        name = route[row.row_id]
        tokens = len(row.response_ids or ()) if by_tokens else 1
        counts[name] = counts.get(name, 0) + tokens
    total = sum(counts.values())
    return {name: total / (len(counts) * max(count, 1)) for name, count in counts.items()}


class CurriculumTeacher(RoutedTeacher):
    """Experts of increasing size, the smallest for easy rows and the largest for hard ones.

    Amara et al. 2022 (CES-KD, arXiv 2209.07606), as its abstract describes it, for language models:
    the difficulty of a row is the mean cross-entropy of its response under the largest expert.  It
    is ranked from 0 to 1, and expert floor(K * rank) teaches the row.  A student is measured
    against the largest expert.

    Args:
        teachers: The experts by name, from the smallest to the largest.
        rows: The rows to train on, with responses.
        pace_from: Share of the rows, the easiest ones, that are drawn at the start of training.  It
            grows by the same amount at each step, to all rows at the end.  1 draws all from the
            start.

    Raises:
        RecipeError: There are no experts.
        DataError: A row has no response.
        VocabularyError: The experts do not share a vocabulary.
    """

    def __init__(
        self, teachers: Mapping[str, Teacher], rows: Sequence[Row], *, pace_from: float = 1.0
    ) -> None:
        names = list(teachers)
        super().__init__(teachers, {})
        self.pace_from = pace_from
        if len(names) > 1 or pace_from < 1:
            self.rank = ranks(difficulty(teachers[names[-1]], rows))
        else:
            self.rank = {row.row_id: 0.0 for row in rows}
        self.place = {row: int(len(names) * rank) for row, rank in self.rank.items()}

    @property
    def plain(self) -> Teacher:
        """The largest expert."""
        return list(self.teachers.values())[-1]

    def train_sampler(self, rows: Any, *, epochs: float, seed: int) -> Sampler[int] | None:
        """Return the order of the rows, the easier ones first; None if all are drawn at once."""
        if self.pace_from >= 1:
            return None
        ranks_R = [self.rank[row] for row in rows.rows.row_ids_N.tolist()]
        return Paced(ranks_R, self.pace_from, epochs=epochs, seed=seed)


class Paced(Sampler[int]):
    """A random order of rows in which the share of the easiest ones that are drawn grows.

    At position i of all that are drawn in a run, only rows with a rank below pace(i) are drawn, and
    pace grows linearly from `start` to 1.  A row is drawn again when all others below the pace have
    been drawn as often.  The order depends only on seed and epoch.
    """

    def __init__(self, ranks: Sequence[float], start: float, *, epochs: float, seed: int) -> None:
        self.ranks, self.start, self.epochs = list(ranks), start, max(epochs, 1e-9)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the order depends on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.ranks)

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self.seed}/{self.epoch}")
        by_rank = sorted(range(len(self)), key=lambda row: self.ranks[row])
        waiting: list[int] = []
        reached = 0
        for position in range(len(self)):
            done = (self.epoch + position / len(self)) / self.epochs
            pace = min(self.start + (1 - self.start) * done, 1.0)
            while reached < len(by_rank) and (reached == 0 or self.ranks[by_rank[reached]] < pace):
                waiting.append(by_rank[reached])
                reached += 1
            if not waiting:  # all rows below the pace have been drawn
                waiting = by_rank[:reached]
            yield waiting.pop(draw.randrange(len(waiting)))


def difficulty(teacher: Teacher, rows: Sequence[Row]) -> dict[int, float]:
    """Return the mean cross-entropy of each row's response under a teacher, in nats, by row id.

    Raises DataError for a row without a response.
    """
    for row in rows:
        if row.response_ids is None:
            raise DataError(
                f"row {row.row_id} has no response, by which its difficulty could be measured. Use "
                "rows with responses."
            )
    found: dict[int, float] = {}
    by_length = sorted(rows, key=lambda row: len(row.prompt_ids) + len(row.response_ids or ()))
    for start in range(0, len(by_length), BATCH_SIZE):
        some = by_length[start : start + BATCH_SIZE]
        sequences = Sequences.pack(
            [row.prompt_ids for row in some],
            [row.response_ids or [] for row in some],
            [row.row_id for row in some],
            writer=Writer.DATA,
            pad_id=0,
        )
        with torch.no_grad():
            scores_B = mean_log_prob(distribution_of(teacher, sequences), sequences)
        found |= {row.row_id: -float(score) for row, score in zip(some, scores_B, strict=True)}
    return found


def ranks(values: Mapping[int, float]) -> dict[int, float]:
    """Return the rank of each value among all, from 0 to just below 1.  Ties keep their order."""
    ordered = sorted(values, key=lambda row: (values[row], row))
    return {row: place / len(ordered) for place, row in enumerate(ordered)}
