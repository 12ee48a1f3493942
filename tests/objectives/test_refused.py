"""What cannot work with inner states is refused by name, before any step."""

from __future__ import annotations

import pytest
from torch import nn

from llmdistill import recipe as recipes
from llmdistill.cost import memory
from llmdistill.data.collate import PromptDataset
from llmdistill.errors import ModelError, RecipeError, TrainingError
from llmdistill.models.taps import Need
from llmdistill.objectives.features import CkaObjective, HiddenObjective
from llmdistill.objectives.minilm import MiniLMObjective
from llmdistill.objectives.relations import RkdObjective
from llmdistill.objectives.rtk import RtkObjective
from llmdistill.teachers.local import LocalTeacher
from tests import toy
from tests.conformance import entries
from tests.training.helpers import trainer


class DistributionsOnly(LocalTeacher):
    provides = frozenset({Need.DISTRIBUTION})


@pytest.mark.parametrize(
    ("objective", "what"),
    [
        (HiddenObjective(layers=[(4, 1)]), "layer 4 does not exist: LlamaForCausalLM has 3 decoder"),
        (CkaObjective(layers=[(1, -5)]), "layer -5 does not exist: LlamaForCausalLM has 4 decoder"),
        (MiniLMObjective(layers=[(0, 1)]), "layer 0 does not exist: .* Use 1 to 3"),
        (RkdObjective(layers="skip"), "'skip' needs a teacher with a multiple of the student's layers"),
        (HiddenObjective(layers="carved"), "'carved' needs a student that was carved"),
        (MiniLMObjective(relation_heads=5), "relation_heads is 5, but it must divide the widths"),
    ],
    ids=["student", "teacher", "embeddings", "skip", "carved", "heads"],
)  # fmt: skip
def test_layers_maps_and_heads_that_do_not_fit(tmp_path, objective, what):
    with pytest.raises(ModelError, match=what):
        trainer(tmp_path, objectives=[objective])


@pytest.mark.parametrize("objective", [HiddenObjective(), RtkObjective(), RkdObjective()])
def test_a_teacher_without_hidden_states(tmp_path, objective):
    teacher = DistributionsOnly(toy.teacher_model(), toy.tokenizer())
    with pytest.raises(
        RecipeError, match=f"'{objective.name}' needs hidden states from the teacher"
    ):
        trainer(tmp_path, teacher=teacher, objectives=[objective])


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_model_without_a_single_list_of_layers(tmp_path, side):
    student, model = toy.model(), toy.teacher_model()
    broken = student if side == "student" else model
    broken.model.more = nn.ModuleList([nn.Linear(2, 2)])
    teacher = LocalTeacher(model, toy.tokenizer())
    with pytest.raises(ModelError, match="LlamaModel has 2 lists of decoder layers"):
        trainer(tmp_path, student=student, teacher=teacher, objectives=[HiddenObjective()])


@pytest.mark.parametrize(
    ("section", "what"),
    [
        ({"kind": "hidden", "layers": [[99, 1]]}, "layer 99 does not exist"),
        ({"kind": "cka", "layers": "skip"}, "'skip' needs a teacher"),
        ({"kind": "minilm", "relation_heads": 7}, "relation_heads is 7"),
    ],
)
def test_check_finds_them_without_loading_weights(pair, section, what):
    teacher, student = pair
    recipe = entries.recipe(
        teacher={"model": teacher}, student={"model": student}, objectives=[section]
    )
    with pytest.raises(ModelError, match=what):
        memory(recipe, PromptDataset.of(toy.rows(2), toy.tokenizer()))


def test_check_counts_inner_states_and_projectors(pair):
    teacher, student = pair
    rows = PromptDataset.of(toy.rows(2), toy.tokenizer())
    models = {"teacher": {"model": teacher}, "student": {"model": student}}
    plain = memory(entries.recipe(**models), rows)
    section = {"kind": "hidden", "layers": [[1, 1], [2, 2]]}
    more = memory(entries.recipe(**models, objectives=[section]), rows)
    assert "inner states" not in plain
    longest = (
        max(len(r.prompt_ids) for r in rows.rows),
        max(len(r.response_ids) for r in rows.rows),
    )
    tokens = 8 * sum(longest)  # a batch of the longest rows
    assert more["inner states"] == 4.0 * tokens * 2 * (32 + 48)
    assert more["projectors"] == 2 * 32 * 48 * 16.0  # weights, gradients, two moments


@pytest.mark.parametrize(
    ("section", "where"),
    [
        ({"kind": "hidden", "layers": "unifrm"}, r"objectives\[0\].layers.*Did you mean 'uniform'"),
        ({"kind": "hidden", "layers": [[1]]}, r"objectives\[0\].layers\[0\]"),
        ({"kind": "hidden", "student_layer": 1}, "It is now called 'layers'"),
        ({"kind": "pkt", "kernel": "rbf"}, "should be one of both, cosine, student_t"),
        ({"kind": "ckd", "group": 4}, r"objectives\[0\].group"),
        ({"kind": "rtk", "num_layers": 0}, r"objectives\[0\].num_layers"),
        ({"kind": "rkd", "projector_learning_rate": 1.0}, "unknown key"),
        ({"kind": "crd", "queue_size": 0}, "greater than 0"),
        ({"kind": "rrd", "teacher_temperature": 0.0}, "greater than 0"),
        ({"kind": "icd", "temperature": 0.1}, "unknown key"),
        ({"kind": "rkd", "distance": 0.0, "angle": 0.0}, "'distance' and 'angle' are both 0"),
        ({"kind": "dist", "inter": 0.0, "intra": 0.0}, "'inter' and 'intra' are both 0"),
        ({"kind": "correlation", "value": 0.0, "rank": 0.0}, "'value' and 'rank' are both 0"),
    ],
)
def test_mistakes_in_a_recipe_are_named(section, where):
    with pytest.raises(RecipeError, match=where):
        recipes.build(
            {
                "output": "o",
                "teacher": {"model": "t"},
                "student": {"model": "s"},
                "data": {"train": "x.jsonl"},
                "objectives": [section],
            }
        )


def test_a_pruned_teacher_whose_distribution_nothing_uses():
    with pytest.raises(RecipeError, match="changes the distribution, but no objective uses it"):
        entries.recipe(teacher={"kind": "pruned", "model": "t"}, objectives=[{"kind": "hidden"}])


def test_a_flow_with_an_inner_weight_has_a_held_out_loss():
    """The weight of the last pair may be 0."""
    shared = {"data": {"train": "x.jsonl", "hold_back": 2}, "evaluate": {"every_steps": 1}}
    section = {"kind": "flow", "weight": 0.0, "inner_weight": 1.0}
    assert not entries.recipe(objectives=[section], **shared).objectives[0].ends_at_zero
    with pytest.raises(RecipeError, match="are all 0"):
        entries.recipe(objectives=[section | {"inner_weight": 0.0}], **shared)


def test_an_evaluation_batch_with_too_few_rows(tmp_path):
    options = {
        "eval_strategy": "steps",
        "eval_dataset": toy.rows(4),
        "per_device_eval_batch_size": 2,
    }
    with pytest.raises(TrainingError, match="per_device_eval_batch_size on 1 processes"):
        trainer(tmp_path, objectives=[RkdObjective()], **options)


def test_a_learning_rate_without_projectors_is_a_warning(tmp_path, caplog):
    teacher = LocalTeacher(toy.teacher_model(hidden=32), toy.tokenizer())
    trainer(tmp_path, teacher=teacher, objectives=[HiddenObjective(projector_learning_rate=0.1)])
    assert "objective 'hidden' has no projectors" in caplog.text
