"""The evaluation prompts of this rank, in batches of similar length.

B = sequences, P = prompt tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llmdistill.batch import Prompts, Sequences
from llmdistill.decoding.batches import by_tokens
from llmdistill.evaluation.ranks import own_rows
from llmdistill.sampling import Writer

BATCH_SIZE = 32  # rows in each batch of everything that is not timed


@dataclass(frozen=True)
class PromptBatches:
    """Prompts in batches that leave room for responses of `max_new_tokens` tokens.

    Each rank has its share of the prompts, or all of them if the ranks work `alike`.
    """

    prompts: Prompts
    max_new_tokens: int
    alike: bool = False

    def places(self) -> Iterator[list[int]]:
        """Yield the places of this rank's prompts, in batches."""
        own = own_rows(len(self.prompts), alike=self.alike)
        lengths = self.prompts.attention_mask_BP.sum(1)[own].tolist()
        for batch in by_tokens(lengths, self.max_new_tokens, BATCH_SIZE):
            yield [own[place] for place in batch]

    def __iter__(self) -> Iterator[Prompts]:
        """Yield this rank's prompts, in batches."""
        for places in self.places():
            yield self.prompts.select(places, pad_id=0)

    def given(self) -> list[Sequences]:
        """Return the prompts with the responses of the dataset, in batches."""
        return [
            Sequences.pack(
                some.ids(),
                some.responses or (),
                some.row_ids_B.tolist(),
                writer=Writer.DATA,
                pad_id=0,
            )
            for some in self
        ]
