"""Quantised teachers and bases, on the CPU: close to the whole model, much smaller, head untouched."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from llmdistill.data.collate import PromptDataset, collate
from llmdistill.errors import ModelError
from llmdistill.models import quantization
from llmdistill.models.adapters import add_adapter
from llmdistill.models.heads import check_split, split
from llmdistill.models.load import load_model
from llmdistill.protocols import Need
from llmdistill.sampling import Draw, Sampling
from llmdistill.teachers.local import LocalTeacher
from tests import toy

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
# bitsandbytes warns of what it does inside; its CPU kernels ask for bfloat16.
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose layers are wide enough for the kernels."""
    path = tmp_path_factory.mktemp("wide")
    toy.model(hidden=256, layers=2).save_pretrained(path)
    toy.tokenizer().save_pretrained(path)
    return str(path)


GAPS = {"bnb_4bit": 0.5, "bnb_8bit": 0.1, "torchao_int8": 0.1}


@pytest.mark.parametrize("kind", GAPS)
@torch.no_grad()
def test_a_quantised_model_is_close_and_judges_and_writes(kind, folder):
    whole = load_model(folder, dtype="float32", device="cpu")
    small = load_model(folder, dtype="float32", device="cpu", quantization=kind)
    check_split(small)
    assert torch.equal(split(small)[1].weight_VH, split(whole)[1].weight_VH)
    gap = (small(IDS).logits - whole(IDS).logits).abs().mean() / whole(IDS).logits.std()
    assert 0 < gap < GAPS[kind]
    teacher = LocalTeacher(small, toy.tokenizer())
    rows = PromptDataset.of(toy.rows(3), toy.tokenizer())
    sampling = Sampling(temperature=0)
    written = teacher.write(collate(rows.rows), sampling, max_new_tokens=4, draw=Draw(0))
    judged = teacher.judge(written, frozenset({Need.DISTRIBUTION}))
    torch.testing.assert_close(
        judged.distribution.hidden_NH, written.signal.distribution.hidden_NH, rtol=0, atol=0.2
    )


@pytest.mark.parametrize("kind", GAPS)
def test_an_adapter_trains_on_a_quantised_base(kind, folder):
    base = load_model(folder, dtype="float32", device="cpu", quantization=kind)
    student = add_adapter(base, rank=2, alpha=4.0, targets="all-linear", dropout=0.0, seed=0)
    student(input_ids=IDS).logits.square().mean().backward()
    grads = [p.grad for n, p in student.named_parameters() if "lora_B" in n]
    assert grads
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads)


def test_a_missing_package_is_named_with_its_extra(folder, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "bitsandbytes" else found(n, *a)
    )
    with pytest.raises(ModelError, match=r"needs bitsandbytes.*llmdistill\[quantization\]"):
        load_model(folder, device="cpu", quantization="bnb_4bit")


def test_each_kind_is_tested():
    assert set(GAPS) == set(quantization.QUANTIZATIONS)


def test_an_unknown_kind_lists_the_known():
    with pytest.raises(ModelError, match="Choose one of bnb_4bit, bnb_8bit, torchao_int8"):
        quantization.quantization_config("int3", torch.float32)
