"""A pruned teacher: how much is pruned, the blend of both passes, and that nothing stays changed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from llmdistill import recipe as recipes
from llmdistill.errors import ModelError, RecipeError
from llmdistill.evaluation.measure import Evaluation
from llmdistill.forward import read, teacher_signal
from llmdistill.models.layers import decoder_layers
from llmdistill.models.pruned import pruned, thresholds
from llmdistill.models.taps import Need
from llmdistill.rollouts.sampled import SampledRollout
from llmdistill.teachers.local import LocalTeacher
from llmdistill.teachers.pruned import PrunedTeacher
from tests import toy
from tests.conformance import entries
from tests.support.spies import spy
from tests.training.helpers import dataset, trainer, weights

NEEDS = frozenset({Need.DISTRIBUTION})


def logits(teacher, sequences):
    signal = teacher_signal(teacher, sequences, toy.NUM_TOKENS, NEEDS)
    return signal.distribution.serve()[0 : len(signal.distribution)].clone()


def pruned_copy(model, share):
    """The model with the smallest weights of each linear layer set to 0, by sorting."""
    cut = copy.deepcopy(model)
    for module in decoder_layers(cut).modules():
        if isinstance(module, nn.Linear):
            weight = module.weight.data
            order = weight.abs().flatten().argsort()
            weight.view(-1)[order[: round(share * weight.numel())]] = 0
    return cut


def test_a_tenth_of_the_weights_is_zero_while_a_layer_runs_and_none_before_or_after():
    model = toy.teacher_model()
    before = weights(model)
    seen = []
    with pruned(thresholds(model, 0.1)):
        for module in decoder_layers(model).modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(
                    lambda m, *_: seen.append((m.weight == 0).float().mean().item()), prepend=True
                )
        model(torch.arange(5)[None])
        assert (weights(model) == 0).sum() == (before == 0).sum()  # each ran and was restored
    assert len(seen) == 4 * 7
    assert seen == pytest.approx([0.1] * len(seen), abs=2e-3)
    assert torch.equal(weights(model), before)


def test_the_matrices_of_experts_are_pruned_too():
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    matrices = [p for p in decoder_layers(model).parameters() if p.dim() > 1]
    limits = thresholds(model, 0.1)
    covered = [getattr(module, name) for module, named in limits.items() for name in named]
    assert {id(one) for one in covered} == {id(one) for one in matrices}
    ids = torch.arange(6)[None]
    with torch.no_grad():
        whole = model(ids).logits
        with pruned(limits):
            assert (model(ids).logits - whole).abs().max() > 1e-6
        assert torch.equal(model(ids).logits, whole)


def test_the_blend_is_that_of_a_pruned_copy():
    model, sequences = toy.teacher_model(), toy.sequences()
    teacher = PrunedTeacher(model, toy.tokenizer(), share=0.2, pruned_weight=0.3)
    whole, cut = (
        logits(LocalTeacher(one, toy.tokenizer()), sequences)
        for one in (model, pruned_copy(model, 0.2))
    )
    assert (whole - cut).abs().max() > 1e-2
    torch.testing.assert_close(logits(teacher, sequences), 0.7 * whole + 0.3 * cut)


@pytest.mark.parametrize("options", [{"share": 0.0}, {"pruned_weight": 0.0}])
def test_nothing_pruned_or_no_weight_is_the_teacher_itself(options):
    model, sequences = toy.teacher_model(), toy.sequences()
    found = logits(PrunedTeacher(model, toy.tokenizer(), **options), sequences)
    torch.testing.assert_close(found, logits(LocalTeacher(model, toy.tokenizer()), sequences))


def test_a_pass_that_fails_leaves_the_weights_as_they_were():
    model = toy.teacher_model()
    before = weights(model)

    def fail(*_):
        raise RuntimeError("out of memory")

    handle = model.model.layers[1].mlp.down_proj.register_forward_hook(fail, prepend=True)
    with pytest.raises(RuntimeError, match="out of memory"), pruned(thresholds(model, 0.5)):
        model(torch.arange(5)[None])
    handle.remove()
    assert torch.equal(weights(model), before)


def test_inner_states_alone_need_one_pass_of_the_model_as_it_is():
    model, sequences = toy.teacher_model(), toy.sequences()
    teacher = PrunedTeacher(model, toy.tokenizer())
    need = Need.HIDDEN.after(2)
    calls = spy(model.model, "forward")
    states = teacher.judge(sequences, frozenset({need})).states[need]
    assert len(calls) == 1
    torch.testing.assert_close(states, read(model, sequences, toy.NUM_TOKENS, [need]).states[need])


def test_its_own_responses_are_scored_anew(tmp_path):
    """The states that it wrote from are those of the model as it is, not of the blend."""
    teacher = PrunedTeacher(toy.teacher_model(), toy.tokenizer())
    calls = spy(teacher, "judge")
    rollout = SampledRollout("teacher", max_new_tokens=4)
    trainer(tmp_path, teacher=teacher, rollout=rollout, rows=dataset(4), max_steps=1).train()
    assert len(calls) == 1


def test_a_student_is_measured_against_the_model_as_it_is(prompts):
    teacher = PrunedTeacher(toy.teacher_model(), toy.tokenizer(), share=0.5)
    evaluation = Evaluation(teacher, prompts, max_new_tokens=4, seed=0)
    assert evaluation.teacher_figures()["teacher"].kl_teacher_text == pytest.approx(0, abs=1e-6)


@pytest.fixture
def prompts():
    from llmdistill.data.collate import collate

    return collate(dataset(3).rows)


def test_quantised_and_offloaded_weights_are_refused():
    for key, value in (("placement", "offloaded"), ("quantization", "torchao_int8")):
        with pytest.raises(RecipeError, match="kind pruned needs plain weights"):
            entries.recipe(teacher={"kind": "pruned", "model": "t", key: value})
    model = toy.teacher_model()
    model.model.layers[0].mlp.up_proj.to("meta")
    with pytest.raises(ModelError, match="Linear are quantised or not in one place"):
        thresholds(model, 0.1)


def test_its_keys_have_bounds():
    with pytest.raises(RecipeError, match=r"teacher.share"):
        recipes.build(recipes.parse_yaml(
            "output: o\nteacher: {kind: pruned, model: t, share: 1.0}\nstudent: {model: s}\n"
            "data: {train: x.jsonl}", "x"))  # fmt: skip
