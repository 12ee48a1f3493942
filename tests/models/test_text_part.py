"""A model that also reads images is used by its text side, or refused by name."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Gemma3Config

from llmdistill import recipe as recipes
from llmdistill.errors import ModelError
from llmdistill.models.load import load_model
from llmdistill.run import distill
from tests import toy
from tests.support.files import write_jsonl
from tests.support.vision import GEMMA_IMAGES, GEMMA_TEXT


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("gemma"))
    torch.manual_seed(0)
    config = Gemma3Config(text_config=GEMMA_TEXT, vision_config=GEMMA_IMAGES, mm_tokens_per_image=4)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    toy.tokenizer().save_pretrained(folder)
    return folder


def test_the_text_side_computes_what_the_whole_model_does(gemma):
    whole = AutoModelForImageTextToText.from_pretrained(gemma).eval()
    text = load_model(gemma, dtype="float32")
    assert type(text).__name__ == "Gemma3ForCausalLM"
    ids = torch.randint(3, toy.NUM_TOKENS, (2, 9))
    with torch.no_grad():
        assert torch.equal(text(input_ids=ids).logits, whole(input_ids=ids).logits)


@pytest.mark.slow
@pytest.mark.parametrize("sides", ["student", "teacher", "carved"])
def test_it_teaches_and_is_trained_and_carved(gemma, tmp_path, sides):
    write_jsonl(tmp_path / "rows.jsonl", toy.rows(6))
    toy.model().save_pretrained(tmp_path / "toy")
    toy.tokenizer().save_pretrained(tmp_path / "toy")
    student = {"model": gemma if sides != "teacher" else str(tmp_path / "toy")}
    if sides == "carved":
        student["carve"] = {"layers": [0, 2]}
    result = distill(
        recipes.build({
            "output": str(tmp_path / "run"),
            "teacher": {"model": gemma if sides == "teacher" else str(tmp_path / "toy"), "dtype": "float32"},
            "student": student,
            "data": {"train": str(tmp_path / "rows.jsonl"), "hold_back": 1},
            "evaluate": {"max_new_tokens": 3},
            "training": {"use_cpu": True, "max_steps": 1, "save_strategy": "no"},
        })
    )  # fmt: skip
    exported = AutoModelForCausalLM.from_pretrained(result.student)
    assert exported.config.num_hidden_layers == (2 if sides == "carved" else 3)


def test_a_model_without_such_a_side_is_refused_by_name(gemma, monkeypatch):
    def none(config):
        raise ValueError("no causal LM")

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", none)
    with pytest.raises(
        ModelError, match=r"Gemma3ForConditionalGeneration, which reads more than text"
    ):
        load_model(gemma)
