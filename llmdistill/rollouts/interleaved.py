"""A rollout that both models write: the student drafts, and the teacher replaces.

The student drafts a block of tokens.  The teacher scores it in one forward pass and replaces the
first token that it refuses.  The rest of the draft is dropped, and the next block starts there.

A = active rows, B = sequences, G = drafted tokens, n = a part of the active rows, H = hidden size,
V = vocabulary.  Xu et al. 2025 (SKD), algorithm 1; the algorithm is followed where the released
code differs from it.  The random numbers of a token depend only on its row and its position in the
response.  So the block size and the other rows of a batch do not change a response, up to the
rounding of the models.

    both models read    the last token written, draft_1 .. draft_G-1
    the teacher scores  draft_1 .. draft_G, each from the state before it
    both caches keep    all tokens written so far, except the last one

On a GPU, both models compute a block without being asked for a number.  The CPU then fetches the
tokens and the acceptances of the block, and decides alone what each row keeps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from llmdistill.batch import Prompts, Sequences
from llmdistill.decoding.keyed import draw_tokens, row_keys
from llmdistill.decoding.session import Session
from llmdistill.decoding.transfer import fetch, send, waits
from llmdistill.errors import RecipeError
from llmdistill.models.sharding import has_sharded_weights, largest
from llmdistill.protocols import Progress, Steps, Student, Teacher
from llmdistill.rollouts.acceptance import Accept, Block, TopK, acceptance
from llmdistill.rollouts.draft_length import AutoBlock, Measured
from llmdistill.rollouts.parts import in_parts
from llmdistill.rollouts.responses import ActiveRows, Piece, Responses, Verified
from llmdistill.sampling import Draw, Sampling, Writer

LOGITS = 2**25  # logits of the teacher in memory at a time: 128 MiB in float32
LEAVE = 1 / 8  # Ended rows leave the batch once they are this share of it.


class InterleavedRollout:
    """Responses that the student drafts and the teacher corrects while they are written (SKD).

    The teacher's states of the kept tokens are returned as `Sequences.signal`, so the teacher does
    not run again for the loss.  Xu et al. 2025, algorithm 1.  The defaults of the acceptance rule
    and of the two sampling settings are the paper's.

    Args:
        top_k: The same as `accept=TopK(top_k)`: a drafted token stays if it is among
            the teacher's `top_k` likeliest ones.
        accept: The rule that decides which drafted tokens stay: a name in `acceptance.ACCEPT`, with
            its default options, a rule, or a function of a `Block`.
        block_size: Number of tokens that are drafted at a time, 1 or more.  "auto" measures the
            costs of both models and uses the cheapest size.
        max_new_tokens: The longest response, in tokens, 1 or more.
        student_sampling: How the student draws drafted tokens.
        teacher_sampling: How the teacher draws the tokens that replace refused ones.
        batch_size: The most rows that are written at once; "auto" lets memory decide.

    Raises:
        RecipeError: If `top_k` is combined with another rule, if a sampling is continuous, or if a
            number is below 1.
    """

    def __init__(
        self,
        *,
        top_k: int | None = None,
        accept: str | Accept | Callable[[Block], Tensor] = "top_k",
        block_size: int | Literal["auto"] = "auto",
        max_new_tokens: int = 256,
        student_sampling: Sampling = Sampling(temperature=0.5, top_p=0.5),
        teacher_sampling: Sampling = Sampling(temperature=0.2, top_p=0.5),
        batch_size: int | Literal["auto"] = "auto",
    ) -> None:
        if top_k is not None and accept != "top_k":
            raise RecipeError(
                "rollout: 'top_k' cannot be combined with another acceptance rule. Give 'top_k' or "
                "'accept', not both."
            )
        self.accept = TopK(top_k) if top_k is not None else acceptance(accept)
        self.block_size = block_size
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.student_sampling, self.teacher_sampling = student_sampling, teacher_sampling
        if student_sampling.continuous or teacher_sampling.continuous:
            raise RecipeError(
                "rollout: an interleaved rollout does not support continuous batching. Set "
                "'continuous' to False in student_sampling and teacher_sampling."
            )
        for name, value in (
            ("block_size", block_size),
            ("max_new_tokens", max_new_tokens),
            ("batch_size", batch_size),
        ):
            if value != "auto" and value < 1:
                raise RecipeError(f"rollout.{name} should be 1 or more, got {value}")
        self._auto = AutoBlock(max_new_tokens)

    @torch.no_grad()
    def write(
        self, prompts: Prompts, student: Student, teacher: Teacher, progress: Progress
    ) -> Sequences:
        """Return responses of both models, with their writers and the teacher's signal.

        Raises RecipeError if the teacher has no `session`.
        """
        if not isinstance(teacher, Steps):
            raise RecipeError(
                "rollout.kind: interleaved runs the teacher block by block, but a "
                f"{type(teacher).__name__} has no 'session' method. Use a teacher of kind local."
            )

        def write(some: Prompts, draw: Draw) -> Sequences:
            return self._write(some, student, teacher, draw)

        return in_parts(
            prompts,
            Draw(progress.seed, epoch=progress.epoch),
            write,
            new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            writers=(student, teacher),
        )

    def _write(self, prompts: Prompts, student: Steps, teacher: Steps, draw: Draw) -> Sequences:
        with student.session(prompts) as drafter, teacher.session(prompts) as judge:
            pair = _Pair(self, prompts, drafter, judge, draw)
            while size := self._size(pair):
                measured = pair.write_block(size)
                if self.block_size == "auto" and measured.kept:
                    self._auto.learn(measured)
            return pair.responses.sequences(prompts, judge.head)

    def _size(self, pair: _Pair) -> int:
        """Return the number of tokens of the next block, or 0 if all responses have ended."""
        # A cache that cannot remove tokens allows blocks of one token only: a refused token is not
        # in the cache yet.
        size = 1 if not pair.can_take_back else self.block_size
        if size == "auto":
            size = self._auto.choose(len(pair.active))
        own = min(size, pair.room)
        # Ranks that gather weights from each other make the same passes until all have ended.
        return largest(own) if pair.in_step else own


class _Pair:
    """Both models and the state of one batch while it is written."""

    def __init__(
        self,
        rollout: InterleavedRollout,
        prompts: Prompts,
        drafter: Session,
        judge: Session,
        draw: Draw,
    ) -> None:
        self.rollout, self.drafter, self.judge = rollout, drafter, judge
        self.can_take_back = drafter.can_hold_holes and judge.can_hold_holes
        self.in_step = any(has_sharded_weights(one.model) for one in (drafter, judge))
        self.active = ActiveRows.start(prompts, rollout.max_new_tokens)
        self.responses = Responses(len(prompts))
        self.rule = rollout.accept.start(len(prompts), rollout.max_new_tokens, judge.device)
        # What either model calls an end ends a response, or one of them would write past its end.
        self.ends = torch.tensor(sorted(drafter.ends | judge.ends))
        self.keys = {writer: row_keys(draw, prompts.row_ids_B, writer) for writer in Writer}

    @property
    def room(self) -> int:
        """Tokens that still fit into the response with the most room; 0 if all have ended."""
        return int(self.active.room_A.max()) if len(self.active) else 0

    def write_block(self, size: int) -> Measured:
        """Draft a block, score it, keep what is accepted, and return the measurements.

        The seconds are 0 if the block size is fixed.
        """
        now, num_rows = self.active, len(self.active)
        start = self._clock(self.drafter)
        draft_AG, student_AGV = self._draft(size)
        draft_end = self._clock(self.drafter)
        read_AG = torch.cat([send(now.last_A1, draft_AG.device), draft_AG[:, :-1]], 1)
        hidden_AGH = self.judge.extend(read_AG, now.last_position_A)
        verified = self._judge(draft_AG, student_AGV, hidden_AGH)
        # The only time that this block waits for a GPU, apart from other ranks.
        both = fetch(torch.cat([verified.tokens_AG, verified.accepted_A[:, None]], 1))
        tokens_AG, accepted_A = both[:, :size], both[:, size]
        count_A, ended_A = self._kept(tokens_AG, accepted_A)
        piece = _piece(now, tokens_AG, accepted_A, count_A, hidden_AGH, verified.log_prob_AG)
        self.responses.add(piece)
        self._go_on(size, now.after(tokens_AG, count_A, ended_A))
        accepted = int((piece.writer_n == Writer.STUDENT).sum())
        judge_end = self._clock(self.judge)
        seconds = (draft_end - start, judge_end - draft_end)
        return Measured(num_rows, size, *seconds, accepted, len(piece.token_n))

    def _draft(self, size: int) -> tuple[Tensor, Tensor | None]:
        """Return the student's next tokens, and their logits if the rule needs them.

        Shapes: (A, G) and (A, G, V), on the teacher's device.
        """
        now, device = self.active, self.drafter.device
        next_A1, slots_AG = send(now.last_A1, device), send(now.slots(size), device)
        keys_A = send(self.keys[Writer.STUDENT][now.row_A], device)
        sampling = self.rollout.student_sampling
        tokens, logits = [], []
        for offset in range(size):
            hidden_A1H = self.drafter.extend(next_A1, now.last_position_A)
            logits_AV = self.drafter.logits(hidden_A1H)[:, -1]
            next_A1 = draw_tokens(logits_AV, sampling, keys_A, slots_AG[:, offset])[:, None]
            tokens.append(next_A1)
            logits += [logits_AV] * self.rule.sees_student
        draft_AG = send(torch.cat(tokens, 1), self.judge.device)
        return draft_AG, send(torch.stack(logits, 1), self.judge.device) if logits else None

    def _judge(self, draft_AG: Tensor, student_AGV: Tensor | None, hidden_AGH: Tensor) -> Verified:
        """Apply the rule, and replace the first token that it refuses in each row.

        It works on a few rows at a time, so that about `LOGITS` logits are in memory.
        """
        now, size, device = self.active, draft_AG.shape[1], self.judge.device
        num_rows = max(LOGITS // (size * self.judge.num_tokens), 1)
        rows_A, slots_AG = send(now.row_A, device), send(now.slots(size), device)
        # The key of neither model, so that the rule's randomness is independent of both.
        rule_A, teacher_A = (
            send(self.keys[writer][now.row_A], device) for writer in (Writer.DATA, Writer.TEACHER)
        )
        samplings = (self.rollout.teacher_sampling, self.rollout.student_sampling)
        verified = []
        for start in range(0, len(draft_AG), num_rows):
            part = slice(start, start + num_rows)
            block = Block(
                draft_AG[part],
                rows_A[part],
                slots_AG[part],
                rule_A[part],
                self.judge.logits(hidden_AGH[part]),
                None if student_AGV is None else student_AGV[part],
            )
            # The product of the mask is 1 up to the first refusal.
            accepted_A = self.rule(block).long().cumprod(1).sum(1)
            tokens_AG = self._replaced(block, accepted_A, teacher_A[part])
            log_prob_AG = self.rule.log_prob(block, tokens_AG, *samplings)
            verified.append(Verified(tokens_AG, accepted_A, log_prob_AG))
        return Verified.join(verified)

    def _replaced(self, block: Block, accepted_A: Tensor, keys_A: Tensor) -> Tensor:
        """Return the draft with the teacher's token at each row's first refusal: (A, G).

        Tokens after the replacement have no meaning.
        """
        tokens_AG = block.draft_AG.clone()
        size = tokens_AG.shape[1]
        # To draw in rows that refuse nothing costs a GPU less than the question which rows refuse.
        if waits(accepted_A.device):
            row_n = torch.arange(len(accepted_A), device=accepted_A.device)
        else:
            row_n = (accepted_A < size).nonzero()[:, 0]
        at = (row_n, accepted_A[row_n].clamp_max(size - 1))
        drawn_n = draw_tokens(
            block.teacher_AGV[at], self.rollout.teacher_sampling, keys_A[row_n], block.slots_AG[at]
        )
        tokens_AG[at] = torch.where(accepted_A[row_n] < size, drawn_n, tokens_AG[at])
        return tokens_AG

    def _kept(self, tokens_AG: Tensor, accepted_A: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many tokens each row keeps, and whether they end its response: (A,), (A,).

        A row keeps its accepted tokens and the replacement, up to the first end token and up to the
        room that is left.
        """
        size = tokens_AG.shape[1]
        count_A = (accepted_A + 1).clamp_max(size).minimum(self.active.room_A)
        inside_AG = torch.arange(size) < count_A[:, None]
        ends_AG = torch.isin(tokens_AG, self.ends) & inside_AG
        ended_A = ends_AG.any(1)
        return torch.where(ended_A, ends_AG.long().argmax(1) + 1, count_A), ended_A

    def _go_on(self, size: int, after: ActiveRows) -> None:
        """Remove dropped tokens from both caches, and ended rows from the batch."""
        has_room_A = after.room_A > 0
        if self.in_step and not has_room_A.any():
            has_room_A[0] = True  # this row makes the passes that other ranks still need
        ended_n, going_n = (~has_room_A).nonzero()[:, 0], has_room_A.nonzero()[:, 0]
        # Each removal copies the caches, so ended rows wait until there are enough of them.
        if len(ended_n) < LEAVE * len(after):
            going_n = torch.arange(len(after))
        elif len(going_n):
            self.drafter.drop(ended_n)
            self.judge.drop(ended_n)
        self.active = after.select(going_n)
        # With blocks of one token, the caches have nothing to remove: the newest token is not read.
        if size > 1 and len(self.active):
            length_A = self.active.prompt_A + self.active.written_A - 1
            self.drafter.keep(length_A)
            self.judge.keep(length_A)

    def _clock(self, session: Session) -> float:
        """Return the time in seconds, after a model's device has finished its queued work.

        A fixed block size needs no times, so that it is 0 then, and nothing waits.
        """
        if self.rollout.block_size != "auto":
            return 0.0
        if session.device.type == "cuda":
            torch.cuda.synchronize(session.device)
        return time.perf_counter()


def _piece(
    now: ActiveRows,
    tokens_AG: Tensor,
    accepted_A: Tensor,
    count_A: Tensor,
    hidden_AGH: Tensor,
    log_prob_AG: Tensor | None,
) -> Piece:
    """Return the first `count_A` tokens of each row as a piece of the responses."""
    size_G = torch.arange(tokens_AG.shape[1])
    kept_AG = size_G < count_A[:, None]
    replaced_AG = size_G == accepted_A[:, None]
    writer_AG = torch.where(replaced_AG, int(Writer.TEACHER), int(Writer.STUDENT))
    # Indices instead of a mask, because a GPU would be asked how many tokens a mask keeps.
    place_n = send(kept_AG.flatten().nonzero()[:, 0], hidden_AGH.device)
    return Piece(
        now.row_A[:, None].expand_as(tokens_AG)[kept_AG],
        now.slots(tokens_AG.shape[1])[kept_AG],
        tokens_AG[kept_AG],
        writer_AG[kept_AG],
        hidden_AGH.flatten(0, 1)[place_n],
        None if log_prob_AG is None else log_prob_AG.flatten()[place_n],
    )
