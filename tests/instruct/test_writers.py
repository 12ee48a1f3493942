"""A teacher that replies to requests: in what batch, with which text, cut off or not."""

from __future__ import annotations

import pytest

from llmdistill.batch import Sampling
from llmdistill.data.render import open_user_turn
from llmdistill.errors import DataError
from llmdistill.instruct.pipeline import Asked
from llmdistill.instruct.requests import Request, user
from llmdistill.instruct.writers import LocalWriter
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
    whole = LocalWriter(teacher, seed=1).write(MANY)
    assert LocalWriter(teacher, seed=1, batch_size=2).write(MANY) == whole
    assert LocalWriter(teacher, seed=1).write(MANY[::-1]) == whole[::-1]
    assert LocalWriter(teacher, seed=1).write(MANY[4:5]) == whole[4:5]
    assert LocalWriter(teacher, seed=2).write(MANY) != whole


def test_every_call_stage_and_place_is_drawn_anew(teacher):
    some = [asked(0), asked(1), asked(0, stage=1), asked(0, place=1)]
    assert len({reply.text for reply in LocalWriter(teacher, seed=0).write(some)}) == 4


def test_a_reply_that_ended_is_not_truncated_and_has_no_end_token(teacher):
    replies = LocalWriter(teacher, seed=0).write([asked(call) for call in range(30)])
    assert {reply.truncated for reply in replies} == {True, False}
    assert not any("<|im_end|>" in reply.text for reply in replies)


def test_each_request_has_its_own_sampling_and_limit(teacher):
    greedy = Sampling(temperature=0.0)
    short, long = LocalWriter(teacher, seed=0).write(
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
        LocalWriter(teacher, seed=0).write(
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
    with pytest.raises(DataError, match="has no chat template: nothing opens"):
        open_user_turn(tokenizer)
