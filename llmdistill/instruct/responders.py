"""Responders get replies to the requests of a generator, from a local or a remote teacher.

N = predicted tokens, G = tokens of one response.

Randomness is keyed by the request.  On this machine, a reply does not depend on the other rows of
its batch, up to the rounding of the teacher, and the requests of a round form the same batches in
every run.  A server is sent a seed that is made from the same key, but it may ignore it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from llmdistill.batch import Prompts, Sequences
from llmdistill.data.context import room
from llmdistill.data.formats import Example, Message
from llmdistill.data.render import close_user_turn, continued, open_user_turn, render
from llmdistill.decoding.batches import by_tokens
from llmdistill.decoding.keyed import row_keys
from llmdistill.errors import DataError
from llmdistill.evaluation.agreement import judge
from llmdistill.instruct.parse import after_start
from llmdistill.instruct.requests import Asked, Reply, Request
from llmdistill.models.chat import ChatTemplate
from llmdistill.models.thinking import TAGS, spoken_thinking
from llmdistill.models.vocabulary import end_ids
from llmdistill.objectives.labels import token_log_probs
from llmdistill.sampling import Draw, Sampling, Writer
from llmdistill.teachers.multimodal import MultimodalTeacher, Seen, images_in
from llmdistill.teachers.remote import Question, RemoteTeacher, Spoken

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmdistill.teachers.local import LocalTeacher

logger = logging.getLogger("llmdistill")

REJECTED = "rejected by the chat template"
TOO_LONG = "prompt longer than the teacher's context"
OPENING_TOKENS = 16  # at the end of a prompt, in which the tag that opens thinking is looked for
CONTROL_TOKEN, NO_UNICODE = "control token in the text", "text that is not Unicode"
# Control tokens of the common model families.  A server renders the chat template itself and reads
# them anywhere in a text, so a user's text could open or close turns.
_CONTROL = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<\uff5c[^\uff5c\s]{1,40}\uff5c>|</?s>|\[/?INST\]|<</?SYS>>"
    r"|<(?:start|end)_of_turn>|<\|?turn\|?>|<(?:bos|eos|pad|unk)>|</?tool_(?:call|response)>"
    r"|\[/?(?:TOOL_CALLS|AVAILABLE_TOOLS|TOOL_RESULTS|SYSTEM_PROMPT|IMG|gMASK)\]"
)


def unheard(asked: Asked, reply: Reply) -> None:
    """Do nothing with a reply."""


class Responder(Protocol):
    """Anything that replies to requests."""

    def respond(self, asked: Sequence[Asked]) -> list[Reply]:
        """Return a reply to each request, in the same order."""
        ...


class LocalResponder:
    """Responder with a teacher on this machine.

    It writes `batch_size` replies at a time and batches prompts of similar length.  With `scored`,
    each reply has its log-probability.
    """

    def __init__(
        self,
        teacher: LocalTeacher,
        *,
        seed: int,
        batch_size: int = 32,
        scored: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.teacher, self.seed, self.batch_size, self.heard = teacher, seed, batch_size, unheard
        self.scored, self.template_options = scored, dict(chat_template_kwargs or {})
        # Any special token ends a reply: one that opens a turn means that the teacher has started
        # to write the next turn.
        known = teacher.tokenizer.added_tokens_decoder.items()
        tags = {tag for pair in TAGS for tag in pair}
        special = {n for n, token in known if token.special and token.content not in tags}
        self._ends = end_ids(teacher.model, teacher.tokenizer) | special

    def respond(self, asked: Sequence[Asked]) -> list[Reply]:
        prompts: list[list[int]] = []
        replies: dict[int, Reply | None] = {}
        for place, one in enumerate(asked):
            try:
                prompts.append(self._prompt(one.request))
                replies[place] = self._too_long(prompts[place], one)
            except DataError as error:  # this conversation alone; others may be fine
                prompts.append([])
                replies[place] = Reply("", refused=REJECTED)
                logger.warning("call %d: %s", one.call, error)
        for (sampling, max_new_tokens, stage, stop), places in self._groups(asked).items():
            places = [place for place in places if replies[place] is None]
            places.sort(key=lambda place: len(prompts[place]))
            lengths = [len(prompts[place]) for place in places]
            # With continuous batching, transformers forms the batches itself.
            batches = by_tokens(lengths, max_new_tokens, self.batch_size)
            for batch in [range(len(places))] if sampling.continuous else batches:
                some = [places[number] for number in batch]
                # A batch with one unknown reply is written as a whole, as it was the first time.
                if all(asked[place].known for place in some):
                    replies |= {place: asked[place].known for place in some}
                    continue
                packed = Prompts.pack(
                    [prompts[place] for place in some], [asked[place].call for place in some],
                    pad_id=self.teacher.tokenizer.pad_token_id,
                )  # fmt: skip
                # The key of the randomness: row = call, epoch = stage, sample = place in the stage.
                sample = tuple(asked[place].place for place in some)
                written = self.teacher.write(
                    packed, sampling, max_new_tokens=max_new_tokens,
                    draw=Draw(self.seed, epoch=stage, sample=sample), stop=stop,
                )  # fmt: skip
                each = written_log_probs(self.teacher, written) if self.scored else None
                is_open = [self._is_open(prompts[place], asked[place].request) for place in some]
                found = self._replies(written.responses(), stop, each, is_open)
                replies |= zip(some, found, strict=True)
        return [reply for reply in replies.values() if reply is not None]

    def _too_long(self, prompt: Sequence[int], asked: Asked) -> Reply | None:
        """Return a refusal for a prompt that exceeds the teacher's context, or None."""
        config = self.teacher.model.config.get_text_config()
        fits = len(prompt) <= room(config, asked.request.max_new_tokens)
        return None if fits else Reply("", refused=TOO_LONG)

    def _is_open(self, prompt: Sequence[int], request: Request) -> bool:
        """Whether the prompt ends within thinking that the template has opened."""
        if request.turn == "user":
            return False
        end = str(self.teacher.tokenizer.decode(list(prompt[-OPENING_TOKENS:]))).rstrip()
        return any(end.endswith(opening) for opening, _ in TAGS)

    def _groups(self, asked: Sequence[Asked]) -> dict[tuple[Sampling, int, int, str], list[int]]:
        """Return the places of the requests that can share a batch.

        A batch has one setting for everything but its prompts.
        """
        groups: dict[tuple[Sampling, int, int, str], list[int]] = {}
        for place, one in enumerate(asked):
            request = one.request
            stop = _stop(request, self.teacher.tokenizer, self.template_options)
            key = (request.sampling, request.max_new_tokens, one.stage, stop)
            groups.setdefault(key, []).append(place)
        return groups

    def _prompt(self, request: Request) -> list[int]:
        """Return the ids up to where the teacher's text begins, `request.start` included."""
        tokenizer, options = self.teacher.tokenizer, self.template_options
        if request.turn == "user":
            ids = open_user_turn(tokenizer, options, request.messages)
        else:
            ids, _ = render(tokenizer, Example(request.messages, None, "a request"), options)
            if request.start and self._is_open(ids, request):  # the text starts after the thinking
                chat = ChatTemplate(tokenizer, options)
                ids += chat.ids_after(f"\n{chat.tags[1]}\n\n")
        return ids + continued(tokenizer, request.start, "a request")

    def _replies(
        self,
        responses: Sequence[list[int]],
        stop: str,
        each: list[Tensor] | None = None,
        is_open: Sequence[bool] = (),
    ) -> list[Reply]:
        """Return the text of each row up to `stop` or to the first special token.

        Only a template writes special tokens: they end a turn or open another one.  `each` are the
        log-probabilities of the tokens, if replies are scored.  `is_open` marks the rows that start
        within thinking.
        """
        tokenizer, replies = self.teacher.tokenizer, []
        for row, ids in enumerate(responses):
            end = next((place for place, token in enumerate(ids) if token in self._ends), len(ids))
            text = tokenizer.decode(ids[:end])
            cut = text.find(stop) if stop else -1
            mean = None
            if each is not None:  # over the tokens of the text and the one that ends it
                count = end + 1 if cut < 0 else _tokens_of(tokenizer, ids, cut)
                mean = float(each[row][:count].mean())
            # Neither ended nor stopped: the limit of new tokens cut it off.
            is_whole = end < len(ids) or cut >= 0
            inside = bool(is_open) and is_open[row]
            thinking, text = spoken_thinking(text if cut < 0 else text[:cut], is_open=inside)
            replies.append(Reply(text, not is_whole, log_prob=mean, thinking=thinking))
        return replies


class MultimodalResponder(LocalResponder):
    """Responder with a teacher on this machine that also sees the images of a request.

    Relative paths of images start from `folder`, or else from the working directory.
    """

    teacher: MultimodalTeacher  # type: ignore[assignment]

    def __init__(
        self, teacher: MultimodalTeacher, *, folder: Path | None = None, **options: Any
    ) -> None:
        super().__init__(teacher, **options)  # type: ignore[arg-type]
        self.folder = folder

    def respond(self, asked: Sequence[Asked]) -> list[Reply]:
        replies: dict[int, Reply] = {}
        for (sampling, max_new_tokens, stage, stop), places in self._groups(asked).items():
            # Rows with and without images are written in separate batches.
            places.sort(key=lambda place: bool(asked[place].request.images))
            for start in range(0, len(places), self.batch_size):
                some = places[start : start + self.batch_size]
                if all(asked[place].known for place in some):
                    replies |= {place: known for place in some if (known := asked[place].known)}
                    continue
                seen = [self._seen(asked[place]) for place in some]
                responses = self.teacher.answer(
                    seen, [asked[place].call for place in some], sampling,
                    max_new_tokens=max_new_tokens, stop=stop,
                    draw=Draw(self.seed, epoch=stage, sample=tuple(asked[p].place for p in some)),
                )  # fmt: skip
                replies |= zip(some, self._replies(responses, stop), strict=True)
        return [replies[place] for place in range(len(asked))]

    def _seen(self, asked: Asked) -> Seen:
        places = images_in(self.folder, asked.request.images, f"prompt {asked.call}")
        return Seen(asked.request.messages, places)


class RemoteResponder:
    """Responder with a teacher behind a server.

    Conversations go to its chat endpoint.  The text of a user goes to its completions endpoint,
    after the opening of the turn by the chat template.

    `heard` is called with each reply as it arrives.  A request whose text contains a control token
    is not sent, because the server would interpret the token.
    """

    def __init__(
        self,
        teacher: RemoteTeacher,
        *,
        seed: int,
        heard: Callable[[Asked, Reply], None] = unheard,
    ) -> None:
        self.teacher, self.seed, self.heard = teacher, seed, heard

    def respond(self, asked: Sequence[Asked]) -> list[Reply]:
        replies = [one.known or self._withheld(one.request) for one in asked]
        missing = [place for place, reply in enumerate(replies) if reply is None]

        def heard(number: int, spoken: Spoken) -> None:
            place = missing[number]
            request = asked[place].request
            thinking, text = spoken.thinking, spoken.text
            if request.turn != "user":  # some servers state the thinking twice
                inside, text = spoken_thinking(text)
                thinking = thinking or inside
            reply = Reply(
                after_start(request.start, text), spoken.truncated, spoken.refused, spoken.log_prob,
                thinking,
            )  # fmt: skip
            replies[place] = reply
            self.heard(asked[place], reply)

        if missing:
            self.teacher.answer([self._question(asked[place]) for place in missing], heard)
        return [reply for reply in replies if reply is not None]

    def _withheld(self, request: Request) -> Reply | None:
        """Return a refusal for a request that must not be sent, or None."""
        known = self.teacher.tokenizer.all_special_tokens if self.teacher.tokenizer else ()
        for text in (message["content"] for message in request.messages):
            if _CONTROL.search(text) or any(token in text for token in known):
                return Reply("", refused=CONTROL_TOKEN)
            # A lone surrogate is half a character: it cannot be encoded as UTF-8.
            if any("\ud800" <= character <= "\udfff" for character in text):
                return Reply("", refused=NO_UNICODE)
        return None

    def _question(self, asked: Asked) -> Question:
        request = asked.request
        # The same key as on this machine, reduced to the 31 bits that servers accept as a seed.
        draw = Draw(self.seed, epoch=asked.stage, sample=asked.place)
        seed = int(row_keys(draw, torch.tensor([asked.call]), Writer.TEACHER)) % 2**31
        prompt: str | tuple[dict[str, str], ...] = request.messages
        stop = request.stop
        if request.turn == "user":
            tokenizer, options = self.teacher.tokenizer, self.teacher.chat_template_kwargs
            assert tokenizer is not None  # the recipe was refused without one
            stop = _stop(request, tokenizer, options)
            prompt = _opening(tokenizer, options, request.messages)
        tokens = request.max_new_tokens
        return Question(prompt, request.sampling, tokens, seed, stop, request.schema)


class Several:
    """Responder that asks the judge where a request is for it, and else the teacher."""

    def __init__(
        self, teacher: LocalResponder | RemoteResponder, judge: LocalResponder | RemoteResponder
    ) -> None:
        self.teacher, self.judge = teacher, judge

    @property
    def heard(self) -> Callable[[Asked, Reply], None]:
        return self.teacher.heard

    @heard.setter
    def heard(self, heard: Callable[[Asked, Reply], None]) -> None:
        self.teacher.heard = self.judge.heard = heard

    def respond(self, asked: Sequence[Asked]) -> list[Reply]:
        for_judge = [one for one in asked if one.request.who == "judge"]
        for_teacher = [one for one in asked if one.request.who == "teacher"]
        judged = iter(self.judge.respond(for_judge) if for_judge else ())
        written = iter(self.teacher.respond(for_teacher) if for_teacher else ())
        return [next(judged if one.request.who == "judge" else written) for one in asked]


def written_log_probs(teacher: LocalTeacher, written: Sequences) -> list[Tensor]:
    """Return the teacher's log-probabilities of the tokens that it wrote, in nats.

    There is one tensor (G,) for each row.  They are computed at temperature 1, whatever the
    sampling settings were.
    """
    responses = written.responses()
    (judged,) = judge(teacher, [written])
    tokens = torch.tensor([token for ids in responses for token in ids])
    each_N = token_log_probs(judged.distribution, tokens)
    return list(each_N.split([len(ids) for ids in responses]))


def _stop(request: Request, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> str:
    """Return the text that ends a turn, or "" if only tokens end it."""
    return request.stop or (close_user_turn(tokenizer, options) if request.turn == "user" else "")


def _opening(
    tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any], before: Sequence[Message]
) -> str:
    """Return the text that opens a user's turn, without the BOS token if the server adds it."""
    text = str(tokenizer.decode(open_user_turn(tokenizer, options, before)))
    # A server adds BOS to a plain prompt if its tokenizer, which is this one, does.
    writes_it = tokenizer.bos_token and tokenizer("")["input_ids"] == [tokenizer.bos_token_id]
    return text.removeprefix(tokenizer.bos_token) if writes_it else text


def _tokens_of(tokenizer: PreTrainedTokenizerBase, ids: list[int], length: int) -> int:
    """Return how many of the first tokens decode to at least `length` characters; at least 1."""
    # Decoded from the start each time: a character may need several tokens.
    return next(n for n in range(1, len(ids) + 1) if len(tokenizer.decode(ids[:n])) >= length)
