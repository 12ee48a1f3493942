"""Continuous batching writes what `generate` writes, greedily, and says when it could not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from llmdistill.data.collate import PromptDataset, collate
from llmdistill.decoding.sample import sample
from llmdistill.errors import TrainingError
from llmdistill.sampling import Draw, Sampling, Writer
from tests import toy

pytestmark = pytest.mark.slow


@pytest.fixture
def prompts():
    return collate(PromptDataset.of(toy.rows(5), toy.tokenizer()).rows)


def write(model, prompts, *, epoch=0, **options):
    rest = {"max_new_tokens": 8, "draw": Draw(3, epoch=epoch), "writer": Writer.STUDENT}
    return sample(model, toy.tokenizer(), prompts, Sampling(**options), **rest)


def test_greedy_answers_are_those_of_generate(prompts):
    model = toy.model(rows=toy.NUM_TOKENS)
    plain = write(model, prompts, temperature=0.0)
    found = write(model, prompts, temperature=0.0, continuous=True)
    assert torch.equal(found.input_ids_BT, plain.input_ids_BT)
    assert torch.equal(found.response_mask_BT, plain.response_mask_BT)
    assert torch.equal(found.row_ids_B, plain.row_ids_B)


def test_the_same_seed_gives_the_same_answers(prompts):
    first, again = (write(toy.model(), prompts, continuous=True).responses() for _ in range(2))
    assert first == again
    assert first != write(toy.model(), prompts, temperature=0.0).responses()
    other = write(toy.model(), prompts, continuous=True, epoch=1).responses()
    assert first != other
    assert all(token < toy.NUM_TOKENS for ids in first for token in ids)


def test_the_global_generator_is_left_alone(prompts):
    model = toy.model()
    before = torch.get_rng_state()
    write(model, prompts, continuous=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_it_writes_in_the_dtype_of_autocast(prompts, monkeypatch):
    seen = []
    model = toy.model()
    generate_batch = type(model).generate_batch

    def spy(self, *args, **options):
        seen.append(self.dtype)
        return generate_batch(self, *args, **options)

    monkeypatch.setattr(type(model), "generate_batch", spy)
    with torch.autocast("cpu", torch.bfloat16):
        write(model, prompts, continuous=True)
    assert seen == [torch.bfloat16]
    assert model.dtype == torch.float32


def test_answers_that_were_not_finished_are_an_error(prompts, monkeypatch):
    done = SimpleNamespace(generated_tokens=[5], error=None)
    outputs = {"a": done, "b": SimpleNamespace(generated_tokens=[], error="out of memory")}
    model = toy.model()
    monkeypatch.setattr(type(model), "generate_batch", lambda *a, **k: outputs)
    with pytest.raises(TrainingError, match="finished 1 of 5 responses"):
        write(model, prompts, continuous=True)
