"""MixKD, adversarial inputs and token dropout: their limits, their passes, and who is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from llmdistill import recipe as recipes
from llmdistill.batch import Sequences
from llmdistill.cost import memory
from llmdistill.errors import ModelError, RecipeError, TrainingError
from llmdistill.forward import read
from llmdistill.models.heads import check_embeddings
from llmdistill.models.placement import park_layers
from llmdistill.objectives.augment import (
    AdversarialObjective,
    MixObjective,
    TokenDropoutObjective,
)
from llmdistill.objectives.build import build_objectives
from llmdistill.objectives.changes import (
    Perturbation,
    change_keys,
    dropped,
    mixed,
    partners,
    partners_of,
    random_start,
    shares,
)
from llmdistill.objectives.contrastive import CrdObjective
from llmdistill.objectives.correlation import CorrelationObjective
from llmdistill.objectives.features import HiddenObjective
from llmdistill.objectives.response import CrossEntropyObjective, ResponseObjective
from llmdistill.protocols import Progress
from llmdistill.teachers.ensemble import EnsembleTeacher
from llmdistill.teachers.local import LocalTeacher
from llmdistill.teachers.pruned import PrunedTeacher
from llmdistill.teachers.reflexive import ReflexiveTeacher
from llmdistill.teachers.routed import RoutedTeacher
from tests import toy
from tests.conformance import entries
from tests.support.objectives import loss
from tests.support.spies import spy
from tests.support.teachers import every_teacher
from tests.training.helpers import dataset, gradient, trainer, weights

START = Progress(step=0, epoch=0, seed=0)


@pytest.fixture
def pair():
    """A student and a wider teacher."""
    return toy.model(), LocalTeacher(toy.teacher_model(), toy.tokenizer())


class Alone(MixObjective):
    """MixKD whose rows have all of the mixture."""

    def shares(self, keys_B):
        return torch.ones(len(keys_B))


def each(value):
    return lambda keys_B: torch.full((len(keys_B),), value)


# ---- at their limits they are the objective that they wrap ----


@pytest.mark.parametrize(
    "changed",
    [
        lambda of: Alone(of),
        lambda of: AdversarialObjective(of, epsilon=0.0),
        lambda of: AdversarialObjective(of, epsilon=0.0, steps=2),
        lambda of: TokenDropoutObjective(of, rate=0.0),
    ],
    ids=["mixkd lambda 1", "fgm epsilon 0", "pgd epsilon 0", "token_dropout rate 0"],
)
@pytest.mark.parametrize("of", [ResponseObjective, CorrelationObjective, HiddenObjective])
def test_without_a_change_it_is_the_wrapped_objective(tmp_path, changed, of):
    """METHODS 16: MixKD with lambda 1 is KD, and each term without a change adds KD once more."""
    torch.manual_seed(0)
    plain = gradient(tmp_path / "plain", objectives=[of()])
    found = gradient(tmp_path / "changed", objectives=[changed(of())])
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-6)


def test_adversarial_with_epsilon_0_is_kd_with_the_sum_of_the_weights(tmp_path):
    """METHODS 16: (1 + lambda) KD."""
    kd = gradient(tmp_path / "kd", objectives=[ResponseObjective()])
    both = [ResponseObjective(), AdversarialObjective(epsilon=0.0, weight=0.5)]
    found = gradient(tmp_path / "both", objectives=both)
    torch.testing.assert_close(found, 1.5 * kd, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_row_mixed_with_itself_is_read_as_it_is(pair):
    student, _ = pair
    sequences = toy.sequences(4)
    found = read(student, mixed(sequences, sequences, torch.full((4,), 0.7)), toy.NUM_TOKENS)
    expected = read(student, sequences, toy.NUM_TOKENS)
    torch.testing.assert_close(found.hidden_NH, expected.hidden_NH)


# ---- mixed rows ----


@torch.no_grad()
def test_a_mixture_is_symmetric(pair):
    """(i, j, lambda) and (j, i, 1 - lambda) are the same for student and teacher."""
    one, other = toy.sequences(4), toy.sequences(4, seed=5)
    share_B = torch.tensor([0.6, 0.7, 0.8, 0.9])
    first, second = mixed(one, other, share_B), mixed(other, one, 1 - share_B)
    assert torch.equal(first.attention_mask_BT, second.attention_mask_BT)
    assert torch.equal(first.response_mask_BT, second.response_mask_BT)
    for model in (pair[0], pair[1].model):
        views = [read(model, mixture, toy.NUM_TOKENS) for mixture in (first, second)]
        torch.testing.assert_close(views[0].hidden_NH, views[1].hidden_NH)


def test_a_mixture_has_the_tokens_of_both_rows():
    one = Sequences.pack([[5]], [[6, 7]], [0], writer=0, pad_id=0)
    other = Sequences.pack([[8, 9]], [[10, 11, 12]], [1], writer=0, pad_id=0)
    mixture = mixed(one, other, torch.tensor([0.75]))
    assert mixture.attention_mask_BT.tolist() == [[1, 1, 1, 1, 1]]
    assert mixture.response_mask_BT.tolist() == [[False, True, True, True, True]]
    assert mixture.targets_N.tolist() == [6, 7, 11, 12]  # the partner's where it alone predicts
    table = torch.eye(20)
    found = mixture.embedding_change(lambda ids: table[ids], mixture.input_ids_BT)
    expected = torch.zeros(1, 5, 20)
    for column, (mine, theirs) in enumerate([(5, 8), (6, 9), (7, 10), (None, 11), (None, 12)]):
        expected[0, column, theirs] = 0.25
        if mine is not None:
            expected[0, column, mine] = 0.75
    torch.testing.assert_close(found, expected)


def test_a_partner_without_a_share_is_left_out():
    one, other = toy.sequences(3), toy.sequences(3, seed=9, longest=30)
    mixture = mixed(one, other, torch.ones(3))
    assert mixture.attention_mask_BT.sum() == one.attention_mask_BT.sum()
    assert mixture.response_mask_BT.sum() == one.response_mask_BT.sum()


def test_partners_are_mutual_and_of_similar_length():
    lengths, keys = torch.tensor([9, 2, 5, 8, 3, 30]), torch.arange(6)
    partner = partners(lengths, keys)
    assert partner.tolist() == [5, 4, 3, 2, 1, 0]
    # The row with the smallest key is alone.
    assert partners(lengths[:5], torch.tensor([4, 2, 0, 3, 1])).tolist() == [3, 4, 2, 0, 1]
    equal = torch.full((6,), 4)
    assert partners(equal, torch.tensor([5, 0, 4, 1, 3, 2])).tolist() == [2, 3, 0, 1, 5, 4]


def test_rows_without_a_predicted_token_are_nobodys_partner():
    sequences = toy.sequences(4)
    sequences = sequences.without_loss(torch.tensor([False, True, False, True]))
    found = partners_of(sequences, START)
    assert found.row_ids_B.tolist() == [2, 1, 0, 3]
    assert mixed(sequences, found, torch.full((4,), 0.6)).num_predicted[[1, 3]].tolist() == [0, 0]


def test_the_larger_share_is_the_rows_own():
    keys = change_keys(START, torch.arange(4000))
    found = shares(keys, 0.4)
    assert found.min() >= 0.5
    # E max(u, 1 - u) of Beta(0.4, 0.4), by numerical integration.
    assert found.mean().item() == pytest.approx(0.838, abs=0.01)
    assert shares(keys, 0.05).mean() > found.mean()


def test_mixkd_counts_the_mean_over_its_tokens_for_the_tokens_of_the_rows(pair):
    """The divisor of the step is that of the unchanged rows."""
    student, teacher = pair
    sequences = toy.sequences(6)
    objective = MixObjective()
    objective.shares = each(0.7)
    found = loss(objective, student, teacher, sequences).total
    mixture = mixed(sequences, partners_of(sequences, START), torch.full((6,), 0.7))
    plain, more = sequences.num_predicted.sum(), mixture.num_predicted.sum()
    assert more > plain
    expected = loss(ResponseObjective(), student, teacher, mixture).total * plain / more
    torch.testing.assert_close(found, expected)


# ---- perturbations ----


def climbed(pair, steps=1, epsilon=0.05):
    """Return the sequences, their perturbation, and the losses of the rows before and after."""
    student, teacher = pair
    sequences = toy.sequences(8)
    start = random_start(sequences, START) if steps > 1 else None
    change = Perturbation(epsilon, start)
    seen = replace(sequences, embedding_change=change)
    before = loss(ResponseObjective(), student, teacher, sequences).total
    signal = teacher.judge(sequences, ResponseObjective.teacher_needs)
    for _ in range(steps):
        view = read(student, seen, toy.NUM_TOKENS)
        change.climb(ResponseObjective()(view, signal, seen).total, 1.0 if steps == 1 else 0.5)
    view = read(student, seen, toy.NUM_TOKENS)
    return sequences, change, before, ResponseObjective()(view, signal, seen).total


def test_a_step_has_its_length_until_it_leaves_the_ball():
    change = Perturbation(0.1)
    table = torch.full((5, 4), 2.0)  # embeddings of length 4
    read_BTH = change(lambda ids: table[ids], torch.tensor([[1, 2]]))
    for expected in (0.2, 0.4, 0.4):
        change.climb((3 * read_BTH[..., 0]).sum(), 0.5)
        torch.testing.assert_close(change.change_BTH[0, :, 0], torch.full((2,), expected))
        assert change.change_BTH[..., 1:].abs().max() == 0
        read_BTH = change(lambda ids: table[ids], torch.tensor([[1, 2]]))


@pytest.mark.parametrize("steps", [1, 3])
def test_a_perturbation_stays_within_its_ball_and_off_the_padding(pair, steps):
    with torch.no_grad():
        pair[0].get_input_embeddings().weight[0] = 1.0  # the embedding at padding
    sequences, change, _, _ = climbed(pair, steps)
    lengths = pair[0].get_input_embeddings()(sequences.input_ids_BT).norm(dim=-1)
    found = change.change_BTH.norm(dim=-1)
    mask = sequences.attention_mask_BT.bool()
    assert found[~mask].abs().max() == 0
    assert (found[mask] <= 0.05 * lengths[mask] * 1.0001).all()
    inside = sequences.predictor_mask_BT
    if steps == 1:  # FGM: a step of full length wherever there is a gradient
        torch.testing.assert_close(found[inside], 0.05 * lengths[inside], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_perturbation_raises_the_loss(pair, steps):
    _, _, before, after = climbed(pair, steps)
    assert after > before * 1.05


def test_a_larger_ball_has_a_larger_loss(pair):
    assert climbed(pair, 1, epsilon=0.2)[3] > climbed(pair, 1)[3]


@pytest.mark.parametrize("teacher_sees", ["clean", "changed"])
def test_the_inner_loop_leaves_no_gradient_in_the_parameters(pair, teacher_sees):
    objective = AdversarialObjective(steps=2, teacher_sees=teacher_sees)
    loss(objective, *pair, toy.sequences(4))
    assert all(p.grad is None for p in pair[0].parameters())


def test_the_perturbation_has_no_gradient(pair):
    """The student's gradient is that of a fixed perturbation."""
    student, teacher = pair
    sequences = toy.sequences(5)
    loss(AdversarialObjective(), student, teacher, sequences).total.backward()
    found = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    change = Perturbation(0.05)
    seen = replace(sequences, embedding_change=change)
    signal = teacher.judge(sequences, ResponseObjective.teacher_needs)
    change.climb(ResponseObjective()(read(student, seen, toy.NUM_TOKENS), signal, seen).total, 1.0)
    change.change_BTH = change.change_BTH.detach().clone()
    ResponseObjective()(read(student, seen, toy.NUM_TOKENS), signal, seen).total.backward()
    for one, p in zip(found, student.parameters(), strict=True):
        torch.testing.assert_close(one, p.grad)


def test_a_teacher_that_is_moved_too_disagrees_more(pair):
    student, teacher = pair
    sequences = toy.sequences(8)
    clean = loss(AdversarialObjective(), student, teacher, sequences).total
    both = loss(AdversarialObjective(teacher_sees="changed"), student, teacher, sequences).total
    assert both > clean * 1.02


def test_batches_without_predicted_tokens(pair):
    student, teacher = pair
    empty = toy.sequences(3).without_loss(torch.ones(3, dtype=torch.bool))
    for objective in (MixObjective(), AdversarialObjective(), TokenDropoutObjective()):
        total = loss(objective, student, teacher, empty).total
        assert total == 0
        total.backward()


# ---- dropped tokens, and randomness ----


def test_tokens_are_dropped_at_the_rate_and_still_predicted():
    sequences = toy.sequences(400)
    seen = dropped(sequences, 0.25, START)
    assert torch.equal(seen.response_mask_BT, sequences.response_mask_BT)
    ones = torch.ones(toy.NUM_TOKENS, 4)
    kept = seen.embedding_change(lambda ids: ones[ids], seen.input_ids_BT)[..., 0]
    mask = sequences.attention_mask_BT.bool()
    assert kept[:, 0].min() == 1
    assert (1 - kept[:, 1:][mask[:, 1:]].mean()).item() == pytest.approx(0.25, abs=0.03)
    assert kept[~mask].min() == 1


def test_the_gradient_of_a_row_without_its_other_tokens_is_finite():
    """A state of 0 in each of thirty layers would have a gradient that overflows."""
    student = toy.model(layers=30)
    teacher = LocalTeacher(toy.teacher_model(), toy.tokenizer())
    objective = TokenDropoutObjective(rate=0.99)
    loss(objective, student, teacher, toy.sequences(6)).total.backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters())


@pytest.mark.parametrize(
    "objective",
    [MixObjective(), AdversarialObjective(steps=2), TokenDropoutObjective()],
    ids=lambda one: one.name,
)
def test_a_change_follows_from_seed_step_and_row(pair, objective):
    sequences = toy.sequences(6)
    kept = loss(objective, *pair, sequences).total
    assert loss(objective, *pair, sequences).total == kept
    assert loss(objective, *pair, sequences, step=1).total != kept
    assert loss(objective, *pair, sequences, seed=1).total != kept


def test_a_row_is_changed_the_same_in_any_micro_batch():
    sequences = toy.sequences(6)
    some = torch.tensor([4, 1])
    ones = torch.ones(toy.NUM_TOKENS, 4)
    whole, part = (
        dropped(one, 0.5, START).embedding_change(lambda ids: ones[ids], one.input_ids_BT)
        for one in (sequences, sequences.select(some))
    )
    width = part.shape[1]
    assert torch.equal(whole[some, :width], part)
    starts = [random_start(one, START) for one in (sequences, sequences.select(some))]
    first = starts[0]((6, sequences.input_ids_BT.shape[1], 8))
    assert torch.equal(first[some, :width], starts[1]((2, width, 8)))


# ---- with every teacher, and with every way to train ----

EVERY_TEACHER = every_teacher()


@pytest.mark.parametrize("name", EVERY_TEACHER)
def test_terms_add_up_with_every_teacher(tmp_path, name):
    """Further passes of the teacher change neither the other terms nor the student."""
    terms = [ResponseObjective, MixObjective, TokenDropoutObjective]
    if name in ("teacher-route", "teacher-curriculum", "teacher-context"):
        terms = [ResponseObjective, AdversarialObjective]

    def found(*made):
        options = EVERY_TEACHER[name]() | {"rows": dataset(7), "max_steps": 1}
        options |= {"objectives": [one() for one in made], "per_device_train_batch_size": 7}
        return gradient(tmp_path, **options)

    apart = sum(found(one) for one in terms)
    torch.testing.assert_close(found(*terms), apart, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("options", [{"bf16": True}, {"activation_checkpointing": True}])
def test_terms_add_up_in_half_precision_and_with_checkpointing(tmp_path, options):
    terms = [ResponseObjective, lambda: AdversarialObjective(epsilon=0.0), MixObjective]
    found = [gradient(tmp_path, objectives=[one()], **options) for one in terms]
    both = gradient(tmp_path, objectives=[one() for one in terms], **options)
    torch.testing.assert_close(both, sum(found), rtol=1e-2, atol=2e-3)
    torch.testing.assert_close(found[0], found[1], rtol=1e-2, atol=2e-3)


def test_an_adapter_learns_from_changed_inputs(tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="gaussian")
    torch.manual_seed(0)
    student = get_peft_model(toy.model(), config)
    before = weights(student)
    terms = [MixObjective(), AdversarialObjective(), TokenDropoutObjective()]
    trainer(tmp_path, student=student, objectives=terms, max_steps=2).train()
    assert (weights(student) != before).sum() > 0
    assert torch.equal(weights(student.get_base_model().lm_head), weights(toy.model().lm_head))


# ---- passes ----


@pytest.mark.parametrize(
    ("objective", "student", "teacher"),
    [
        (None, 1, 1),
        (MixObjective, 2, 2),
        (TokenDropoutObjective, 2, 2),
        (lambda: TokenDropoutObjective(teacher_sees="clean"), 2, 1),
        (AdversarialObjective, 3, 1),
        (lambda: AdversarialObjective(steps=3), 5, 1),
        (lambda: AdversarialObjective(teacher_sees="changed"), 3, 3),
    ],
    ids=["kd", "mixkd", "dropout", "clean", "fgm", "pgd", "both"],
)
def test_forward_passes_of_a_step(tmp_path, objective, student, teacher):
    """The table in docs/objectives.md, with the pass that all objectives share."""
    made = trainer(
        tmp_path,
        objectives=[ResponseObjective(), *([] if objective is None else [objective()])],
        eval_dataset=dataset(4, seed=3),
    )
    passes = spy(made.model.student.model, "forward")
    judged = spy(made.teacher.model.model, "forward")
    made.train()
    assert (len(passes), len(judged)) == (student, teacher)
    passes.clear(), judged.clear()
    made.evaluate()
    assert (len(passes), len(judged)) == (1, 1)  # a held-out loss is on unchanged inputs


def test_check_counts_the_activations_of_each_pass(tmp_path):
    teacher, student = toy.save_pair(tmp_path)

    def activations(*kinds):
        recipe = entries.recipe(
            teacher={"model": teacher},
            student={"model": student},
            objectives=[{"kind": kind} for kind in kinds],
        )
        return memory(recipe, dataset(2))["activations"]

    assert activations("response", "mixkd", "adversarial") == 3 * activations("response")


def test_a_held_out_loss_is_that_of_the_wrapped_objective(tmp_path):
    rows = dataset(4, seed=3)
    made = trainer(tmp_path / "a", objectives=[MixObjective()], eval_dataset=rows)
    plain = trainer(tmp_path / "b", eval_dataset=rows)
    assert made.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)


# ---- R2KD ----


def test_r2kd_without_pruning_is_correlation_with_the_plain_teacher(tmp_path, pair):
    """METHODS 16; on the unchanged and on the changed inputs."""
    objectives = [CorrelationObjective(), TokenDropoutObjective(CorrelationObjective())]
    plain = gradient(tmp_path / "plain", teacher=pair[1], objectives=objectives)
    teacher = PrunedTeacher(toy.teacher_model(), toy.tokenizer(), share=0.0)
    found = gradient(tmp_path / "pruned", teacher=teacher, objectives=objectives)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-6)
    cut = PrunedTeacher(toy.teacher_model(), toy.tokenizer(), share=0.3)
    other = gradient(tmp_path / "cut", teacher=cut, objectives=objectives)
    assert (other - plain).norm() > 1e-3


# ---- what is refused ----


REFUSED = {
    "route": {"kind": "route", "column": "c", "teachers": [{"model": "t", "name": "a"}]},
    "curriculum": {"kind": "curriculum", "teachers": [{"model": "t"}]},
    "multimodal": {"kind": "multimodal", "model": "t"},
    "reflexive": {"kind": "reflexive", "context": "{prompt} {solution}"},
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("objective", ["mixkd", "token_dropout"])
def test_a_recipe_refuses_a_teacher_that_cannot_read_changes(kind, objective):
    with pytest.raises(RecipeError, match=rf"kind {objective} changes .* of kind {kind} cannot"):
        entries.recipe(teacher=REFUSED[kind], objectives=[{"kind": objective}])
    clean = {"kind": "adversarial"}
    assert entries.recipe(teacher=REFUSED[kind], objectives=[clean]).objectives[0].epsilon == 0.05


def test_teachers_that_cannot_read_changes_are_refused_by_name(tmp_path, pair):
    routed = RoutedTeacher({"a": pair[1]}, dict.fromkeys(range(8), "a"))
    with pytest.raises(RecipeError, match="'mixkd' changes .* which RoutedTeacher cannot apply"):
        trainer(tmp_path, teacher=routed, objectives=[MixObjective()])
    prompts = {row: [5, 6] for row in range(8)}
    other = ReflexiveTeacher(pair[0], toy.tokenizer(), prompts=prompts)
    with pytest.raises(RecipeError, match="which ReflexiveTeacher cannot apply"):
        trainer(tmp_path, student=pair[0], teacher=other, objectives=[TokenDropoutObjective()])
    pruned = PrunedTeacher(toy.teacher_model(), toy.tokenizer())
    moved = AdversarialObjective(teacher_sees="changed")
    parked = LocalTeacher(park_layers(toy.teacher_model(), torch.device("cpu")), toy.tokenizer())
    for teacher in (pruned, parked):
        with pytest.raises(
            RecipeError, match="needs gradients of the teacher, .* Set teacher_sees"
        ):
            trainer(tmp_path, teacher=teacher, objectives=[moved])
    trainer(tmp_path, teacher=routed, objectives=[AdversarialObjective()]).train()


@pytest.mark.parametrize(
    ("section", "teacher", "wrong"),
    [
        ({"kind": "mixkd", "of": {"kind": "response", "weight": 2.0}}, {}, "'of.weight' would"),
        ({"kind": "mixkd", "of": {"kind": "cross_entropy"}}, {}, "cross_entropy"),
        (
            {"kind": "adversarial", "teacher_sees": "changed", "of": {"kind": "dist"}},
            {},
            "Set 'of: {kind: response}'",
        ),
        (
            {"kind": "adversarial", "teacher_sees": "changed"},
            {"placement": "parked"},
            "needs gradients of the teacher",
        ),
    ],
)
def test_sections_that_do_not_fit(section, teacher, wrong):
    with pytest.raises(RecipeError, match=wrong):
        entries.recipe(teacher={"model": "t"} | teacher, objectives=[section])


def test_a_kind_alone_names_the_wrapped_objective():
    short, long = (
        entries.recipe(objectives=[{"kind": "mixkd", "of": of}])
        for of in ("dist", {"kind": "dist"})
    )
    assert short == long


def test_objectives_that_cannot_be_wrapped():
    with pytest.raises(RecipeError, match="wraps an objective with weight 0.5"):
        MixObjective(ResponseObjective(weight=0.5))
    with pytest.raises(RecipeError, match="'cross_entropy' compares nothing with the teacher"):
        MixObjective(CrossEntropyObjective())
    for other in (CrdObjective(), MixObjective()):
        with pytest.raises(RecipeError, match=f"cannot wrap '{other.name}', which changes inputs"):
            TokenDropoutObjective(other)
    with pytest.raises(RecipeError, match="but 'correlation' is none"):
        AdversarialObjective(CorrelationObjective(), teacher_sees="changed")


def test_one_row_cannot_be_mixed_but_can_be_measured(tmp_path):
    with pytest.raises(TrainingError, match="'mixkd' compares at least 2 rows"):
        trainer(tmp_path, objectives=[MixObjective()], per_device_train_batch_size=1)
    trainer(
        tmp_path, objectives=[MixObjective()], eval_dataset=dataset(2), eval_strategy="steps",
        eval_steps=1, per_device_eval_batch_size=1,
    ).train()  # fmt: skip


def test_reentrant_checkpointing_is_refused_if_inputs_are_differentiated(tmp_path):
    options = {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": True},
    }
    with pytest.raises(TrainingError, match="which objective 'adversarial' needs"):
        trainer(tmp_path, objectives=[AdversarialObjective()], **options)


def test_checkpointing_gives_the_same_gradient(tmp_path):
    objectives = [AdversarialObjective(steps=2), MixObjective()]
    plain = gradient(tmp_path / "a", objectives=objectives)
    found = gradient(tmp_path / "b", objectives=objectives, activation_checkpointing=True)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-6)


def test_a_family_that_reads_more_than_embeddings_is_refused(tmp_path):
    student = toy.model()
    plain = student.model.forward

    def forward(input_ids=None, **options):
        output = plain(input_ids=input_ids, **options)
        if input_ids is not None:
            output.last_hidden_state = output.last_hidden_state + input_ids[..., None]
        return output

    student.model.forward = forward
    with pytest.raises(ModelError, match="LlamaForCausalLM reads more of a token than its emb"):
        check_embeddings(student)
    inside = EnsembleTeacher([LocalTeacher(one, toy.tokenizer()) for one in (toy.model(), student)])
    for parts in ({"student": student}, {"teacher": inside}):
        trainer(tmp_path, **parts, objectives=[ResponseObjective()])
        with pytest.raises(ModelError, match="reads more of a token"):
            trainer(tmp_path, **parts, objectives=[MixObjective()])


def test_the_wrapped_objective_of_a_section_has_its_options():
    section = {"kind": "mixkd", "of": {"kind": "response", "divergence": "jsd", "beta": 0.3}}
    recipe = entries.recipe(objectives=[section])
    assert recipes.build(recipes.parse_yaml(recipes.dump(recipe), "x")) == recipe
    (made,) = build_objectives(recipe.objectives)
    assert made.inner.divergence.keywords["beta"] == 0.3
