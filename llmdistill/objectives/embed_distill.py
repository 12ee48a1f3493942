"""EmbedDistill: the embeddings of prompts and responses, and how well they fit each other.

B = rows of this rank, S = rows of all ranks, T = tokens of a row, N = tokens of all rows.
H = hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from llmdistill.batch import Sequences
from llmdistill.objectives.choices import choose
from llmdistill.objectives.divergences import kl
from llmdistill.objectives.features import DISTANCES, Distance, projector
from llmdistill.objectives.layer_maps import LAST_LAYERS, Layers
from llmdistill.objectives.samples import POOLS, Pool, gather_together, pooled, share_of, sum_of
from llmdistill.objectives.states import Compared, StateObjective, projected
from llmdistill.objectives.weights import responses
from llmdistill.schedules import Schedule

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def scores(prompt_SH: Tensor, response_SH: Tensor, temperature: float) -> Tensor:
    """Return the cosine of each prompt with each response, divided by the temperature: (S, S)."""
    unit = nn.functional.normalize
    return unit(prompt_SH, dim=1) @ unit(response_SH, dim=1).T / temperature


def score_loss(student_SS: Tensor, teacher_SS: Tensor) -> Tensor:
    """Return KL(teacher || student) of the responses' distributions, a mean over prompts: ().

    Each row of scores becomes a distribution over the responses by a softmax.  Kim et al. 2023
    (EmbedDistill), score-based distillation, with the teacher's scores as the targets.
    """
    return kl(teacher_SS.log_softmax(1), student_SS.log_softmax(1)).mean()


class EmbedDistillObjective(StateObjective):
    """Match the embeddings of prompts and responses, and their scores against each other.

    A prompt is taken for a query and its response for a document.  An embedding is the pooled
    hidden state of their tokens.  With `documents="teacher"`, the student's prompts are scored
    against the teacher's embeddings of the responses, which get no gradient, and only prompts are
    matched.  With "student", both are the student's, and both are matched.  The targets are the
    teacher's own scores, so two responses to one prompt are not taken to be unrelated.

    Args:
        distance: A name in `features.DISTANCES`, or a function, for the match of embeddings.
        documents: Whose embeddings of responses the scores use: "teacher" or "student".
        temperature: Divides the scores before the softmax.
        pool: A name in `samples.POOLS`, or a function.
        layers: Pairs of layers, as in `StateObjective`.
        weight: Factor on the objective's mean over rows: a number, or a schedule over the run.
        projector_learning_rate: Learning rate of the projectors.  None is that of the student.
    """

    name = "embed_distill"
    compares_samples = True
    least_rows = 2

    def __init__(
        self,
        *,
        distance: str | Distance = "cosine",
        documents: Literal["teacher", "student"] = "teacher",
        temperature: float = 0.05,
        pool: str | Pool = "mean",
        layers: Layers = LAST_LAYERS,
        weight: float | Schedule = 1.0,
        projector_learning_rate: float | None = None,
    ) -> None:
        super().__init__(
            layers=layers,
            tokens="all",
            weight=weight,
            projector_learning_rate=projector_learning_rate,
        )
        self.distance = choose("distance", distance, DISTANCES)
        self.pool = choose("pool", pool, POOLS)
        self.documents, self.temperature = documents, temperature
        self.projectors = nn.ModuleList()

    def prepare(self, student: PreTrainedConfig, teacher: PreTrainedConfig | None) -> None:
        """Choose the layers, and create the projectors if the models differ in width."""
        super().prepare(student, teacher)
        assert teacher is not None
        self.projectors = nn.ModuleList(projector(student, teacher) for _ in self.needs)

    def divisor(self, sequences: Sequences) -> Tensor:
        """Return the number of rows with a predicted token: ()."""
        return responses(sequences)

    def compare(self, states: Sequence[Compared], sequences: Sequences) -> Tensor:
        """Return the matches of this rank's rows, and its share of the score loss."""
        own = int(self.divisor(sequences))
        totals = []
        for project, (mine_NH, other_NH) in zip(self.projectors, states, strict=True):
            prompt_BH, response_BH = self._embed(projected(project, mine_NH), sequences)
            asked_BH, wanted_BH = self._embed(other_NH, sequences)
            total = self.distance(prompt_BH, asked_BH).sum()
            if self.documents == "student":
                total = total + self.distance(response_BH, wanted_BH).sum()
            else:
                response_BH = wanted_BH
            found = gather_together([prompt_BH, response_BH, asked_BH, wanted_BH])
            if (everyone := len(found[0])) >= self.least_rows:
                mine_SS = scores(found[0], found[1], self.temperature)
                loss = score_loss(mine_SS, scores(found[2], found[3], self.temperature))
                total = total + share_of(loss, own, everyone)
            totals.append(total + sum_of([response_BH, prompt_BH]) * 0.0)
        return torch.stack(totals).mean()

    def _embed(self, states_NH: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """Return the embeddings of prompts and of responses: (B, H) each."""
        response_N = sequences.response_mask_BT[sequences.trained_mask_BT]
        counts = sequences.trained_mask_BT.sum(1)
        in_response = sequences.response_mask_BT.sum(1)
        real = sequences.num_predicted > 0
        in_prompt = (counts - in_response)[real].tolist()
        prompts = pooled(states_NH[~response_N], in_prompt, self.pool)
        return prompts, pooled(states_NH[response_N], in_response[real].tolist(), self.pool)
