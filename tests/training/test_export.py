"""Plain transformers loads the exported student, and it stops where it stopped in training."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmdistill.models.adapters import add_adapter
from llmdistill.objectives.response import CrossEntropyObjective
from tests import toy
from tests.training.helpers import trainer

pytestmark = pytest.mark.slow

END_OF_TEXT = 7  # the end token of a base model; that of the chat template is 2


def base_student():
    student = toy.model()
    student.generation_config.eos_token_id = student.config.eos_token_id = END_OF_TEXT
    return student


@pytest.mark.parametrize("adapted", [False, True])
def test_the_export_ends_where_its_responses_end(tmp_path, adapted):
    """A base model with an instruct tokenizer writes nothing after the first end token."""
    student = base_student()
    if adapted:
        student = add_adapter(student, rank=16, alpha=32, targets="all-linear", dropout=0.0, seed=0)
    row = {"instruction": "why", "input": "", "output": "the sea is blue"}
    made = trainer(
        tmp_path, student=student, rows=[row] * 4, objectives=[CrossEntropyObjective()],
        optim="adamw_torch", learning_rate=2e-2 if adapted else 5e-3, max_steps=150,
    )  # fmt: skip
    made.train()
    made.export_student(tmp_path / "student")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    assert model.generation_config.eos_token_id == [2, END_OF_TEXT]
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "why"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    written = model.generate(**ids, max_new_tokens=60)[0, ids["input_ids"].shape[1] :]
    assert len(written) < 60
    assert (written == tokenizer.eos_token_id).nonzero().tolist() == [[len(written) - 1]]
    if not adapted:  # an adapter learns less in the same number of steps
        assert tokenizer.decode(written) == "the sea is blue<|im_end|>"


def test_one_end_token_stays_one(tmp_path):
    made = trainer(tmp_path)
    made.export_student(tmp_path / "student")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert exported.generation_config.eos_token_id == 2


def test_a_checkpoint_lists_them_too(tmp_path):
    trainer(tmp_path, student=base_student(), save_strategy="steps", save_steps=1).train()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1")
    assert saved.generation_config.eos_token_id == [2, END_OF_TEXT]
