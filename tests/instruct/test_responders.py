"""A teacher that replies to requests: in what batch, with which text, cut off or not."""

from __future__ import annotations

import re

import pytest
import torch

from llmdistill.batch import Sequences
from llmdistill.data.render import close_user_turn, open_user_turn
from llmdistill.errors import DataError
from llmdistill.instruct.requests import Asked, Request, user
from llmdistill.instruct.responders import LocalResponder
from llmdistill.sampling import Sampling, Writer
from llmdistill.teachers.local import LocalTeacher
from tests import toy


@pytest.fixture(scope="module")
def teacher():
    model = toy.teacher_model().double()
    model.lm_head.weight.data[2] *= 2  # answers end now and then
    return LocalTeacher(model, toy.tokenizer())


def asked(call, text="Name a bird", stage=0, place=0, **options):
    options = {"sampling": Sampling(), "max_new_tokens": 12} | options
    return Asked(call, stage, place, Request(user(text), **options))


MANY = [asked(call, "Name a bird " * (call % 4), place=call % 3) for call in range(9)]


def test_a_reply_does_not_depend_on_the_batch_or_its_order(teacher):
    whole = LocalResponder(teacher, seed=1).respond(MANY)
    assert LocalResponder(teacher, seed=1, batch_size=2).respond(MANY) == whole
    assert LocalResponder(teacher, seed=1).respond(MANY[::-1]) == whole[::-1]
    assert LocalResponder(teacher, seed=1).respond(MANY[4:5]) == whole[4:5]
    assert LocalResponder(teacher, seed=2).respond(MANY) != whole


def test_every_call_stage_and_place_is_drawn_anew(teacher):
    some = [asked(0), asked(1), asked(0, stage=1), asked(0, place=1)]
    assert len({reply.text for reply in LocalResponder(teacher, seed=0).respond(some)}) == 4


def test_a_reply_that_ended_is_not_truncated_and_has_no_end_token(teacher):
    replies = LocalResponder(teacher, seed=0).respond([asked(call) for call in range(30)])
    assert {reply.truncated for reply in replies} == {True, False}
    assert not any("<|im_end|>" in reply.text for reply in replies)


def test_each_request_has_its_own_sampling_and_limit(teacher):
    greedy = Sampling(temperature=0.0)
    short, long = LocalResponder(teacher, seed=0).respond(
        [asked(3, sampling=greedy, max_new_tokens=3), asked(4, sampling=greedy)]
    )
    assert long.text.startswith(short.text)
    assert len(long.text) > len(short.text)


def test_the_teacher_goes_on_with_what_the_reply_starts_with(teacher):
    prompts = []
    write = teacher.write

    def record(batch, *args, **options):
        prompts.extend(teacher.tokenizer.decode(ids) for ids in batch.ids())
        return write(batch, *args, **options)

    teacher.write = record
    try:
        LocalResponder(teacher, seed=0).respond(
            [
                asked(0, start="###\n4. Instruction:"),
                Asked(1, 0, 0, Request((), Sampling(), 4, turn="user")),
                asked(2, "say <|im_end|> now"),
            ]
        )
    finally:
        teacher.write = write
    assert sorted(prompts, key=len)[0] == "<|im_start|>user\n"
    assert any(text.endswith("<|im_start|>assistant\n###\n4. Instruction:") for text in prompts)


def test_without_a_template_nothing_opens_a_users_turn():
    tokenizer = toy.tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="has no chat template, so it cannot open"):
        open_user_turn(tokenizer)


def test_a_reply_ends_before_its_stop_text(teacher):
    texts = LocalResponder(teacher, seed=0).respond(
        [asked(n, max_new_tokens=30) for n in range(20)]
    )
    found = (re.search(r"[ -~]{2}", reply.text[4:]) for reply in texts)  # two plain characters
    call, match = next((n, match) for n, match in enumerate(found) if match)
    stop = match.group()
    before = texts[call].text[: texts[call].text.index(stop)]
    generated = []
    write = teacher.write

    def record(*args, **options):
        written = write(*args, **options)
        generated.extend(map(len, written.responses()))
        return written

    teacher.write = record
    try:
        many = [asked(call, max_new_tokens=30, stop=stop), asked(99, max_new_tokens=3, stop=stop)]
        reply, _ = LocalResponder(teacher, seed=0).respond(many)
    finally:
        teacher.write = write
    assert (reply.text, reply.truncated) == (before, False)
    assert generated[0] < 30  # it was not written on to the limit


def test_a_users_turn_may_end_in_plain_text():
    """A template such as Llama 2's closes a user's turn with no token of its own."""
    tokenizer = toy.tokenizer()
    assert close_user_turn(tokenizer) == "<|im_end|>"
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}sea {{ m.content }} red bird\nblue"
        "{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    assert close_user_turn(tokenizer) == "red bird"

    class Says:
        """A teacher that writes a whole turn and goes on."""

        def __init__(self):
            self.tokenizer, self.model = tokenizer, toy.teacher_model()

        def write(self, prompts, sampling, **options):
            self.stop = options["stop"]
            ids = tokenizer("name a sea red bird blue say")["input_ids"]
            rows = prompts.row_ids_B.tolist()
            return Sequences.pack(
                prompts.ids(), [ids] * len(rows), rows, writer=Writer.TEACHER, pad_id=0
            )

    says = Says()
    request = Request((), Sampling(), 9, turn="user")
    (reply,) = LocalResponder(says, seed=0).respond([Asked(0, 0, 0, request)])
    assert (reply.text.strip(), reply.truncated, says.stop) == ("name a sea", False, "red bird")


def test_template_options_reach_the_template(teacher):
    tokenizer = teacher.tokenizer
    before = tokenizer.chat_template
    tokenizer.chat_template = "{% if loud %}sea {% endif %}" + before
    try:
        plain, loud = (
            LocalResponder(teacher, seed=0, chat_template_kwargs={"loud": value})
            for value in (False, True)
        )
        request = asked(0).request
        assert loud._prompt(request)[-len(plain._prompt(request)) :] == plain._prompt(request)
        assert len(loud._prompt(request)) > len(plain._prompt(request))
    finally:
        tokenizer.chat_template = before


@pytest.mark.parametrize("stops", [False, True])
def test_a_reply_is_as_likely_as_the_teacher_finds_it(teacher, stops):
    """The mean log-probability of the tokens that its text is made of, and of its end token; not of
    what fills the row until its neighbours are done.
    """
    many = [asked(call, max_new_tokens=20) for call in range(12)]
    tokenizer, plain = teacher.tokenizer, LocalResponder(teacher, seed=0)
    stop = ""
    if stops:
        found = (re.search(r"[ -~]{2}", reply.text[4:]) for reply in plain.respond(many))
        stop = next(match for match in found if match).group()
        many = [asked(call, max_new_tokens=20, stop=stop) for call in range(12)]
    recorded = []
    write = teacher.write

    def record(*args, **options):
        recorded.append(write(*args, **options))
        return recorded[-1]

    teacher.write = record
    try:
        replies = LocalResponder(teacher, seed=0, scored=True).respond(many)
    finally:
        teacher.write = write
    assert plain.respond(many)[0].log_prob is None
    (written,) = recorded
    order, prompt, stopped = written.row_ids_B.tolist(), plain._prompt(many[0].request), 0
    for place, ids in enumerate(written.responses()):
        kept = ids
        if tokenizer.eos_token_id in ids:
            kept = ids[: ids.index(tokenizer.eos_token_id) + 1]
        if stop and stop in tokenizer.decode(kept):
            stopped += 1
            before = len(tokenizer.decode(kept).partition(stop)[0])
            kept = next(kept[:n] for n in range(1, 21) if len(tokenizer.decode(kept[:n])) >= before)
        with torch.no_grad():
            logits = teacher.model(torch.tensor([[*prompt, *kept]])).logits[0, len(prompt) - 1 : -1]
        log_probs = logits[:, : toy.NUM_TOKENS].log_softmax(-1)
        mean = log_probs.gather(1, torch.tensor(kept)[:, None]).mean()
        assert replies[order[place]].log_prob == pytest.approx(float(mean), abs=1e-6)
    assert (stopped > 0) is stops
