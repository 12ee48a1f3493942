"""Both write: the student drafts a block, the teacher judges it in one pass and replaces the first
token that it refuses; the rest of the draft is dropped, and both go on from there.

A = active rows, B = sequences, G = drafted tokens, n = those at hand, H = hidden size,
V = vocabulary.  Xu et al. 2025 (SKD), algorithm 1; where the released code departs from it, the
algorithm is followed.  The random numbers of a token depend only on its row and slot, so the
block size and the other rows of a batch do not change an answer, up to the rounding of the models.

    both models read    last token written, draft_1 .. draft_G-1
    the teacher judges  draft_1 .. draft_G, each by the state before it
    both caches keep    what is written now, but its last token
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
from llmdistill.errors import RecipeError
from llmdistill.protocols import Progress, Steps, Student, Teacher
from llmdistill.rollouts.acceptance import Accept, Block, TopK, acceptance
from llmdistill.rollouts.draft_length import AutoBlock, Measured
from llmdistill.rollouts.responses import ActiveRows, Piece, Responses, Verified
from llmdistill.sampling import Draw, Sampling, Writer

LOGITS = 2**25  # the teacher's that are held at a time, as numbers
LEAVE = 1 / 8  # ended rows leave the batch once they are this share of it


class InterleavedRollout:
    """Responses that student and teacher write together, read by the teacher while they do.

    `accept` says which drafted tokens stay: a name of `acceptance.ACCEPT`, a rule, or a function of
    a Block.  By default those stay that are among the teacher's `top_k` likeliest.  What replaces
    the others is drawn from the teacher's distribution as `teacher_sampling` warps it.
    `block_size` tokens are drafted at a time; `auto` measures how many pay.  The defaults are the
    paper's.
    """

    steps_both_models = True

    def __init__(
        self,
        *,
        top_k: int | None = None,
        accept: str | Accept | Callable[[Block], Tensor] = "top_k",
        block_size: int | Literal["auto"] = "auto",
        max_new_tokens: int = 256,
        student_sampling: Sampling = Sampling(temperature=0.5, top_p=0.5),
        teacher_sampling: Sampling = Sampling(temperature=0.2, top_p=0.5),
    ) -> None:
        if top_k is not None and accept != "top_k":
            raise RecipeError(
                "rollout: 'top_k' cannot be combined with another acceptance rule. Give 'top_k' or "
                "'accept', not both."
            )
        self.accept = TopK(top_k) if top_k is not None else acceptance(accept)
        self.block_size = block_size
        self.max_new_tokens = max_new_tokens
        self.student_sampling, self.teacher_sampling = student_sampling, teacher_sampling
        if student_sampling.continuous or teacher_sampling.continuous:
            raise RecipeError(
                "rollout: an interleaved rollout does not support continuous batching. Set "
                "'continuous' to False in student_sampling and teacher_sampling."
            )
        for name, value in (("block_size", block_size), ("max_new_tokens", max_new_tokens)):
            if value != "auto" and value < 1:
                raise RecipeError(f"rollout.{name} should be 1 or more, got {value}")
        self._auto = AutoBlock(max_new_tokens)

    @torch.no_grad()
    def write(
        self, prompts: Prompts, student: Student, teacher: Teacher, progress: Progress
    ) -> Sequences:
        """Raises RecipeError for a teacher that cannot be stepped."""
        if not isinstance(teacher, Steps):
            raise RecipeError(
                "rollout.kind: interleaved runs the teacher block by block, but a "
                f"{type(teacher).__name__} has no 'session' for that. Use a teacher of kind local."
            )
        draw = Draw(progress.seed, epoch=progress.epoch)
        with student.session(prompts) as drafter, teacher.session(prompts) as judge:
            pair = _Pair(self, prompts, drafter, judge, draw)
            while len(pair.active):
                size = self._size(len(pair.active)) if pair.can_take_back else 1
                self._auto.learn(pair.write_block(size))
            return pair.responses.sequences(prompts, judge.head)

    def _size(self, num_rows: int) -> int:
        return self._auto.choose(num_rows) if self.block_size == "auto" else self.block_size


class _Pair:
    """Both models at work on one batch."""

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
        self.active = ActiveRows.start(prompts, rollout.max_new_tokens, judge.device)
        self.responses = Responses(len(prompts))
        self.rule = rollout.accept.start(len(prompts), rollout.max_new_tokens, judge.device)
        self.ends = torch.tensor(sorted(drafter.ends | judge.ends), device=judge.device)
        row_ids_B = prompts.row_ids_B.to(judge.device)
        self.keys = {writer: row_keys(draw, row_ids_B, writer) for writer in Writer}

    def write_block(self, size: int) -> Measured:
        """Drafts, judges, keeps what stands; rows that end leave.  Gives what it took."""
        now, num_rows = self.active, len(self.active)
        size = min(size, int(now.room_A.max()))
        start = self._clock()
        draft_AG, student_AGV = self._draft(size)
        draft_end = self._clock()
        read_AG = torch.cat([now.last_A1, draft_AG[:, :-1]], 1)
        hidden_AGH = self.judge.extend(read_AG, now.last_position_A)
        verified = self._judge(draft_AG, student_AGV, hidden_AGH)
        count_A, ended_A = self._kept(verified.tokens_AG, verified.accepted_A)
        kept_AG = torch.arange(size, device=count_A.device) < count_A[:, None]
        log_prob_AG = verified.log_prob_AG
        self.responses.add(
            Piece(
                now.row_A[:, None].expand_as(draft_AG)[kept_AG],
                now.slots(size)[kept_AG],
                verified.tokens_AG[kept_AG],
                verified.writer_AG[kept_AG],
                hidden_AGH[kept_AG],
                None if log_prob_AG is None else log_prob_AG[kept_AG],
            )
        )
        self._go_on(size, now.after(verified.tokens_AG, count_A, ended_A))
        accepted = int((kept_AG & (verified.writer_AG == Writer.STUDENT)).sum())
        judge_end = self._clock()
        seconds = (draft_end - start, judge_end - draft_end)
        return Measured(num_rows, size, *seconds, accepted, int(kept_AG.sum()))

    def _draft(self, size: int) -> tuple[Tensor, Tensor | None]:
        """The student's next tokens, and the logits that they were drawn from if the rule asks:
        (A, G), (A, G, V).
        """
        device = self.drafter.device
        next_A1 = self.active.last_A1.to(device)
        keys_A = self.keys[Writer.STUDENT][self.active.row_A].to(device)
        tokens, logits = [], []
        for offset in range(size):
            hidden_A1H = self.drafter.extend(next_A1, self.active.last_position_A)
            logits_AV = self.drafter.logits(hidden_A1H)[:, -1]
            slot_A = (self.active.written_A + offset).to(device)
            next_A1 = draw_tokens(logits_AV, self.rollout.student_sampling, keys_A, slot_A)[:, None]
            tokens.append(next_A1)
            logits += [logits_AV] * self.rule.sees_student
        draft_AG = torch.cat(tokens, 1).to(self.judge.device)
        return draft_AG, torch.stack(logits, 1).to(self.judge.device) if logits else None

    def _judge(self, draft_AG: Tensor, student_AGV: Tensor | None, hidden_AGH: Tensor) -> Verified:
        """What the rule says, and what stands in place of what it refuses.

        As many rows at a time as keep their logits small.
        """
        now, size = self.active, draft_AG.shape[1]
        rows = max(LOGITS // (size * self.judge.num_tokens), 1)
        samplings = (self.rollout.teacher_sampling, self.rollout.student_sampling)
        verified = []
        for places in torch.arange(len(draft_AG), device=draft_AG.device).split(rows):
            block = Block(
                draft_AG[places],
                now.row_A[places],
                now.slots(size)[places],
                self.keys[Writer.DATA][now.row_A[places]],  # neither writer's own
                self.judge.logits(hidden_AGH[places]),
                None if student_AGV is None else student_AGV[places],
            )
            accepted_A = self.rule(block).long().cumprod(1).sum(1)  # up to the first refusal
            tokens_AG, writer_AG = self._replaced(block, accepted_A)
            log_prob_AG = self.rule.log_prob(block, tokens_AG, *samplings)
            verified.append(Verified(tokens_AG, writer_AG, accepted_A, log_prob_AG))
        return Verified.join(verified)

    def _replaced(self, block: Block, accepted_A: Tensor) -> tuple[Tensor, Tensor]:
        """The draft with the teacher's token at each row's first refusal, and who wrote what."""
        tokens_AG = block.draft_AG.clone()
        writer_AG = torch.full_like(tokens_AG, int(Writer.STUDENT))
        refused_n = (accepted_A < tokens_AG.shape[1]).nonzero()[:, 0]
        at = (refused_n, accepted_A[refused_n])
        keys_n = self.keys[Writer.TEACHER][block.rows_A[refused_n]]
        tokens_AG[at] = draw_tokens(
            block.teacher_AGV[at], self.rollout.teacher_sampling, keys_n, block.slots_AG[at]
        )
        writer_AG[at] = int(Writer.TEACHER)
        return tokens_AG, writer_AG

    def _kept(self, tokens_AG: Tensor, accepted_A: Tensor) -> tuple[Tensor, Tensor]:
        """How many tokens of each row are kept, and whether they end its response: (A,), (A,).

        Those that stay and the replacement, to the first end token, as far as there is room.
        """
        size = tokens_AG.shape[1]
        count_A = (accepted_A + 1).clamp_max(size).minimum(self.active.room_A)
        inside_AG = torch.arange(size, device=count_A.device) < count_A[:, None]
        ends_AG = torch.isin(tokens_AG, self.ends) & inside_AG
        ended_A = ends_AG.any(1)
        return torch.where(ended_A, ends_AG.long().argmax(1) + 1, count_A), ended_A

    def _go_on(self, size: int, after: ActiveRows) -> None:
        """Sets both models back to what is kept, and lets rows leave that have ended."""
        has_room_A = after.room_A > 0
        ended_n, going_n = (~has_room_A).nonzero()[:, 0], has_room_A.nonzero()[:, 0]
        if len(ended_n) < LEAVE * len(after):
            going_n = torch.arange(len(after), device=going_n.device)
        elif len(going_n):
            self.drafter.drop(ended_n)
            self.judge.drop(ended_n)
        self.active = after.select(going_n)
        if size > 1 and len(self.active):
            length_A = self.active.prompt_A + self.active.written_A - 1
            self.drafter.keep(length_A)
            self.judge.keep(length_A)

    def _clock(self) -> float:
        """The time, once the device has done what it was given."""
        if self.judge.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
