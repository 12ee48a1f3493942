"""The student's base as teacher: what the adapter changed is gone while it judges, and back after."""

from __future__ import annotations

import pytest
import torch

from llmdistill.batch import Prompts, Sequences
from llmdistill.data.collate import PromptDataset, collate
from llmdistill.decoding.session import session
from llmdistill.errors import ModelError
from llmdistill.models.adapters import add_adapter
from llmdistill.protocols import Need
from llmdistill.rollouts.interleaved import InterleavedRollout
from llmdistill.sampling import Draw, Sampling, Writer
from llmdistill.teachers.adapter_off import AdapterOffTeacher
from llmdistill.teachers.local import LocalTeacher
from tests import toy
from tests.training.helpers import INTERLEAVED, trainer

NEEDS = frozenset({Need.DISTRIBUTION})


def adapted(dropout: float):
    """With an adapter that changes something."""
    model = toy.model(attention_dropout=dropout)
    made = add_adapter(model, rank=4, alpha=8.0, targets="all-linear", dropout=dropout, seed=0)
    torch.manual_seed(1)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    return made.train()


@pytest.fixture
def student():
    return adapted(dropout=0.5)


def base():
    return LocalTeacher(toy.model(), toy.tokenizer())


def test_judges_as_the_base_does_while_the_student_trains(student):
    sequences = toy.sequences()
    teacher = AdapterOffTeacher(student, toy.tokenizer())
    found = teacher.judge(sequences, NEEDS)
    torch.testing.assert_close(
        found.distribution.hidden_NH, base().judge(sequences, NEEDS).distribution.hidden_NH
    )
    assert student.training
    assert not student.get_base_model().model.layers[0].mlp.up_proj.disable_adapters
    trained = [n for n, p in student.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)


def test_writes_as_the_base_does(student):
    prompts = collate(PromptDataset.of(toy.rows(4), toy.tokenizer()).rows)
    options = {"max_new_tokens": 8, "draw": Draw(0)}
    teacher = AdapterOffTeacher(student, toy.tokenizer())
    found = teacher.write(prompts, Sampling(), **options)
    assert torch.equal(
        found.input_ids_BT, base().write(prompts, Sampling(), **options).input_ids_BT
    )


@pytest.mark.parametrize("rollout", [None, InterleavedRollout(**INTERLEAVED)])
def test_steps_are_those_with_a_second_copy_of_the_base(tmp_path, rollout):
    ends = []
    for alone in (True, False):
        student = adapted(dropout=0.0)
        start = trained(student)
        teacher = AdapterOffTeacher(student, toy.tokenizer()) if alone else base()
        trainer(tmp_path, student=student, teacher=teacher, rollout=rollout, max_steps=2).train()
        ends.append(trained(student))
        assert (ends[-1] - start).abs().max() > 1e-3
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-6)


def trained(student):
    return torch.cat([p.detach().flatten() for p in student.parameters() if p.requires_grad])


def test_a_student_without_an_adapter_is_refused():
    with pytest.raises(
        ModelError, match=r"no adapter that could be switched off.* Set student\.peft"
    ):
        AdapterOffTeacher(toy.model(), toy.tokenizer())


def test_it_is_stepped_beside_its_student(student):
    """One model, two sessions: each pass runs with the adapter as it should be."""
    prompts = Prompts.pack([[5, 6, 7], [8]], [0, 1], pad_id=0)
    teacher = AdapterOffTeacher(student, toy.tokenizer())
    last_B1 = prompts.input_ids_BP[:, -1:]
    with session(student, toy.tokenizer(), prompts) as own, teacher.session(prompts) as base:
        adapted, plain = own.extend(last_B1), base.extend(last_B1)
        again = own.extend(last_B1)
    sequences = Sequences.pack([[5, 6, 7], [8]], [[9], [9]], [0, 1], writer=Writer.DATA, pad_id=0)
    judged = teacher.judge(sequences, teacher.provides)
    torch.testing.assert_close(plain[:, 0], judged.distribution.hidden_NH)
    assert (adapted - plain).abs().max() > 1e-3
    assert (again - adapted).abs().max() > 1e-3
