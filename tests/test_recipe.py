"""Recipes: strict, typed and frozen; every mistake is named by its dotted path."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from llmdistill import recipe as recipes
from llmdistill.errors import RecipeError
from llmdistill.objectives.divergences import DIVERGENCES
from llmdistill.recipe import distributions, facts, rollouts, teachers
from llmdistill.recipe.generation import GenerationRecipe

MINIMAL = {
    "output": "runs/a",
    "teacher": {"kind": "local", "model": "org/teacher"},
    "student": {"model": "org/student"},
    "data": {"train": "train.jsonl"},
}
FULL = MINIMAL | {
    "seed": 7,
    "student": {"model": "org/student", "carve": {"layers": [0, 2, 5], "by": "even"}},
    "data": {"train": "org/rows:test", "hold_back": 3, "on_bad_row": "skip"},
    "rollout": {
        "kind": "mixed",
        "share": 0.25,
        "student": {"kind": "sampled", "sampling": {"temperature": 0.7, "top_k": 5}},
        "other": {"kind": "sampled", "by": "teacher", "samples": 2},
    },
    "objectives": [
        {"kind": "response", "divergence": "jsd", "beta": 0.1, "weight": 1e-5},
        {"kind": "cross_entropy", "weight": 0.5},
    ],
    "training": {"learning_rate": 1e-4, "max_steps": 3, "report_to": ["none"]},
}
YAML = """
output: runs/a
teacher: {kind: local, model: org/teacher}
student: {model: org/student}
data: {train: train.jsonl}
objectives:
  - {kind: response, divergence: jsd}
  - {kind: cross_entropy}
training: {learning_rate: 1e-4}
"""


def with_value(path: tuple, value: object, base: dict = FULL) -> dict:
    """A copy of a full recipe with one value set deep inside."""
    data = copy.deepcopy(base)
    here = data
    for step in path[:-1]:
        here = here[step]
    here[path[-1]] = value
    return data


def message(data: dict) -> str:
    with pytest.raises(RecipeError) as caught:
        recipes.build(data)
    return str(caught.value)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(YAML)
    return path


# ---- unknown keys, wrong types, ranges ----


@pytest.mark.parametrize(
    ("path", "dotted", "meant"),
    [
        (("sed",), "sed", "seed"),
        (("teacher", "modle"), "teacher.modle", "model"),
        (("student", "carv"), "student.carv", "carve"),
        (("student", "carve", "layer"), "student.carve.layer", "layers"),
        (("data", "trian"), "data.trian", "train"),
        (("rollout", "shar"), "rollout.shar", "share"),
        (("rollout", "student", "samplin"), "rollout.student.samplin", "sampling"),
        (("rollout", "student", "sampling", "topk"), "rollout.student.sampling.topk", "top_k"),
        (("rollout", "other", "sample"), "rollout.other.sample", "samples"),
        (("objectives", 0, "temprature"), "objectives[0].temprature", "temperature"),
        (("objectives", 1, "wieght"), "objectives[1].wieght", "weight"),
        (("training", "lerning_rate"), "training.lerning_rate", "learning_rate"),
        (("evaluate", "every_step"), "evaluate.every_step", "every_steps"),
    ],
)
def test_an_unknown_key_is_named_with_its_path_and_a_suggestion(path, dotted, meant):
    data = with_value(path, 1, FULL | {"evaluate": {}})
    assert f"unknown key '{dotted}'. Did you mean '{meant}'?" in message(data)


def test_an_unknown_key_like_no_other_lists_the_known_ones():
    assert "Known keys: kind, model, revision" in message(with_value(("teacher", "zzz"), 1))


@pytest.mark.parametrize(
    ("path", "value", "dotted"),
    [
        (("seed",), "1", "seed"),
        (("seed",), True, "seed"),
        (("seed",), 1.0, "seed"),
        (("seed",), -1, "seed"),
        (("output",), 3, "output"),
        (("teacher",), "org/teacher", "teacher"),
        (("teacher", "kind"), "remote", "teacher.kind"),
        (("teacher", "dtype"), "int8", "teacher.dtype"),
        (("data", "hold_back"), -1, "data.hold_back"),
        (("data", "max_prompt_tokens"), 0, "data.max_prompt_tokens"),
        (("data", "format"), "csv", "data.format"),
        (("rollout",), {"kind": "fixt"}, "rollout.kind"),
        (("rollout", "share"), 1.1, "rollout.share"),
        (("rollout", "other"), {"kind": "mixed"}, "rollout.other.kind"),
        (("rollout", "student", "sampling", "top_p"), 0.0, "rollout.student.sampling.top_p"),
        (("rollout", "student", "max_new_tokens"), 0, "rollout.student.max_new_tokens"),
        (("objectives",), [], "objectives"),
        (("objectives", 0), "forward_kl", "objectives[0]"),
        (("objectives", 0), {"divergence": "jsd"}, "objectives[0].kind"),
        (("objectives", 0, "beta"), 1.5, "objectives[0].beta"),
        (("objectives", 0, "temperature"), 0.0, "objectives[0].temperature"),
        (("objectives", 0, "temperature"), float("nan"), "objectives[0].temperature"),
        (("objectives", 1, "weight"), "1", "objectives[1].weight"),
        (("training",), None, "training"),
    ],
)
def test_a_wrong_value_is_named_with_its_path(path, value, dotted):
    assert f"'{dotted}'" in message(with_value(path, value))


@pytest.mark.parametrize("layers", ["three", True, [1, "a"]])
def test_wrong_layers_are_named_as_the_user_wrote_them(layers):
    said = message(with_value(("student", "carve", "layers"), layers))
    assert "'student.carve.layers" in said
    assert "layers.int" not in said


@pytest.mark.parametrize("key", ["output", "teacher", "student", "data"])
def test_a_missing_key_is_named(key):
    assert f"'{key}' is missing" in message({k: v for k, v in FULL.items() if k != key})


def test_all_mistakes_are_said_at_once():
    said = message(with_value(("objectives", 0, "beta"), 2.0, FULL | {"seed": -1}))
    assert "'seed'" in said
    assert "'objectives[0].beta'" in said


def test_a_key_that_is_no_text_is_an_unknown_key():
    assert "unknown key" in message(MINIMAL | {1: 2})


def test_a_divergence_gets_only_its_own_options():
    said = message(with_value(("objectives", 0, "divergence"), "reverse_kl"))
    assert "divergence 'reverse_kl' has no option 'beta'" in said


@pytest.mark.parametrize(
    ("divergence", "option", "value"),
    [("jsd", "beta", 1.5), ("skew_forward_kl", "alpha", -0.1), ("alpha_beta", "beta", 0.0)],
)
def test_options_of_divergences_have_bounds(divergence, option, value):
    objective = {"kind": "response", "divergence": divergence, option: value}
    said = message(MINIMAL | {"objectives": [objective]})
    assert f"'objectives[0].{option}'" in said
    assert f"of divergence '{divergence}' should be" in said
    assert f"got {value:g}" in said


def test_an_unknown_divergence_is_named_with_a_suggestion():
    said = message(with_value(("objectives", 0, "divergence"), "revers_kl"))
    assert "Did you mean 'reverse_kl'?" in said


def test_eval_rows_have_one_source():
    assert "not both" in message(with_value(("data", "eval"), "eval.jsonl"))


def test_a_student_has_no_number_of_samples():
    said = message(with_value(("rollout", "student", "samples"), 2))
    assert "'rollout.student'" in said
    assert "samples" in said


def test_divergences_read_from_source_are_the_real_table():
    assert list(distributions.DIVERGENCES.entries) == list(DIVERGENCES)
    assert list(distributions.DIVERGENCES.options("jsd")) == ["beta", "temperature"]


def test_a_recipe_is_frozen():
    recipe = recipes.build(FULL)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        recipe.objectives[0].beta = 0.9


# ---- training arguments ----


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("warmup_ratio", 0.1, "warmup_steps"),
        ("no_cuda", True, "use_cpu"),
        ("output_dir", "x", "llmdistill sets it. Set 'output' instead"),
        ("hub_token", "hf_secret", "do not belong in a recipe"),
        ("max_steps", True, "should be int, got True"),
        ("max_steps", "3", "should be int"),
        ("max_steps", 3.0, "should be int"),
        ("learning_rate", "1e-4", "should be float"),
        ("learning_rate", True, "should be float"),
        ("bf16", 1, "should be bool"),
        ("max_steps", None, "should be int"),
    ],
)
def test_a_wrong_training_argument_says_what_to_do(key, value, said):
    got = message(MINIMAL | {"training": {key: value}})
    assert f"'training.{key}'" in got
    assert said in got


def test_an_owned_key_does_not_repeat_its_value():
    assert "hf_secret" not in message(MINIMAL | {"training": {"hub_token": "hf_secret"}})


@pytest.mark.parametrize(("key", "value"), [("learning_rate", 1), ("bf16", True), ("max_steps", 3)])
def test_a_right_training_argument_is_kept(key, value):
    assert recipes.build(MINIMAL | {"training": {key: value}}).training == {key: value}


def test_training_fields_are_those_of_transformers():
    import dataclasses

    from transformers import TrainingArguments

    real = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert {name for name in real if name[0] != "_"} == set(facts.training_fields())
    assert set(facts.OWNED) <= real


# ---- YAML ----


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("-2E3", -2000.0), ("1.5e-3", 1.5e-3), (".5", 0.5), ("3", 3), ("1.0", 1.0)],
)
def test_numbers_are_read_as_people_write_them(text, value):
    found = recipes.parse_yaml(f"a: {text}", "here")["a"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["1e", "e4", "1-4", "v1e-4", "."])
def test_what_only_looks_like_a_float_stays_text(text):
    assert recipes.parse_yaml(f"a: {text}", "here") == {"a": text}


@pytest.mark.parametrize(
    "text", ["a: 1\nb: 2\na: 3", "x:\n  - {a: 1, a: 1}", "x: {y: {a: 1, a: 2}}"]
)
def test_a_key_that_stands_twice_is_refused(text):
    with pytest.raises(RecipeError, match=r"here: .*key 'a' appears twice in the mapping at line"):
        recipes.parse_yaml(text, "here")


@pytest.mark.parametrize(
    "text",
    ["a: [", "a: 1\n---\nb: 1", "a: !!python/name:os.system", "a: \x07", "a: 2024-13-45", "a: 0b_"],
    ids=["open", "two documents", "python", "control character", "no such date", "no digits"],
)
def test_bad_yaml_is_a_recipe_error(text):
    with pytest.raises(RecipeError, match="here: not valid YAML"):
        recipes.parse_yaml(text, "here")


# ---- files and overrides ----


def test_a_file_is_read(file):
    recipe = recipes.load(file)
    assert recipe.training == {"learning_rate": 1e-4}
    assert [o.kind for o in recipe.objectives] == ["response", "cross_entropy"]
    assert recipe.rollout == rollouts.FixedRecipe()


@pytest.mark.parametrize(("text", "said"), [("- 1", "list"), ("", "NoneType"), ("hello", "str")])
def test_a_recipe_is_a_mapping(tmp_path, text, said):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=f"recipe.yaml: .*got {said}"):
        recipes.load(path)


def test_a_recipe_in_another_encoding_is_a_recipe_error(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(YAML.replace("runs/a", "runs/\u00e9").encode("latin-1"))
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        recipes.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"no such recipe: .*none\.yaml"):
        recipes.load(tmp_path / "none.yaml")


def test_overrides_reach_mappings_and_lists(file):
    recipe = recipes.load(
        file,
        [
            "seed=3",
            "objectives.0.beta=0.25",
            "objectives.1={kind: response, divergence: reverse_kl}",
            "training.learning_rate=2e-5",
            "training.max_steps=4",
            "evaluate.max_new_tokens=5",  # a mapping that the file does not have
            "output=a=b",
        ],
    )
    assert recipe.seed == 3
    assert recipe.objectives[0].beta == 0.25
    assert recipe.objectives[1].divergence == "reverse_kl"
    assert recipe.training == {"learning_rate": 2e-5, "max_steps": 4}
    assert recipe.evaluate.max_new_tokens == 5
    assert recipe.output == "a=b"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed", "not of the form"),
        ("=1", "not of the form"),
        ("objectives.2.beta=1", "'2' is not an index of a list of length 2"),
        ("objectives.-1.beta=1", "'-1' is not an index"),
        ("objectives.x=1", "'x' is not an index"),
        ("output.x=1", "'output' is 'runs/a', not a mapping or list"),
        ("output.x.y=1", "not a mapping or list"),
        ("seed=[", "not valid YAML"),
        ("objectives.0.temprature=1", r"unknown key 'objectives\[0\].temprature'"),
        ("seed=x", "'seed'"),
    ],
)
def test_a_wrong_override_is_named(file, override, said):
    with pytest.raises(RecipeError, match=said):
        recipes.load(file, [override])


@pytest.mark.parametrize("data", [MINIMAL, FULL])
def test_a_dumped_recipe_reads_back_equal(data, tmp_path):
    recipe = recipes.build(data)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipes.dump(recipe))
    assert recipes.load(path) == recipe


def test_the_full_recipe_differs_from_the_defaults_where_it_says_so():
    """Guards the round trip above: a dump that forgot values would still read back as defaults."""
    recipe = recipes.build(FULL)
    assert recipe.rollout.other.samples == 2
    assert recipe.objectives[0].weight == 1e-5
    assert recipe.student.carve.layers == [0, 2, 5]


def test_reading_a_recipe_imports_nothing_heavy(file):
    code = (
        "import sys; from llmdistill import recipe; "
        f"recipe.load({str(file)!r}, ['training.max_steps=3']); "
        "print([m for m in ('torch', 'transformers', 'datasets', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("text", "value"),
    [("no", "no"), ("on", "on"), ("true", True), ("False", False), ("1e-4", 1e-4)],
)
def test_words_are_words_and_numbers_are_numbers(text, value):
    """`save_strategy: no` is a strategy, not a false."""
    assert recipes.parse_yaml(text, "here") == value


# ---- where rows come from ----


def test_a_source_may_be_a_name_or_several():
    name = recipes.build(MINIMAL).data.train
    assert [source.source for source in name] == ["train.jsonl"]
    given = ["a.jsonl", {"source": "b.csv", "weight": 2.0, "columns": {"prompt": "q"}}]
    first, second = recipes.build(MINIMAL | {"data": {"train": given}}).data.train
    assert (first.source, first.weight, first.format) == ("a.jsonl", 1.0, "auto")
    assert (second.source, second.weight, second.columns) == ("b.csv", 2.0, {"prompt": "q"})


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"train": []}, "'data.train'"),
        ({"train": [{"source": "a", "form": "x"}]}, "unknown key 'data.train[0].form'"),
        ({"train": ["a", {"source": "b", "weight": 0}]}, "'data.train[1].weight'"),
        ({"train": 3}, "'data.train'"),
        ({"train": "a", "streaming": True}, "recipe: 'data.streaming' needs 'training.max_steps'"),
        (
            {"train": "a", "streaming": True, "hold_back": 2},
            "'streaming' cannot be combined with 'hold_back' or with weights",
        ),
        (
            {"train": [{"source": "a", "weight": 2.0}], "streaming": True},
            "'streaming' cannot be combined with 'hold_back' or with weights",
        ),
    ],
)
def test_sources_that_cannot_be_are_named(data, said):
    assert said in message(MINIMAL | {"data": data})


def test_a_stream_with_a_number_of_steps_is_fine():
    data = {"data": {"train": "a", "streaming": True}, "training": {"max_steps": 3}}
    assert recipes.build(MINIMAL | data).data.streaming


SHARDED = {"model": "org/teacher", "placement": "sharded"}
STREAMED = {"data": {"train": "a", "streaming": True}, "training": {"max_steps": 3}}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"teacher": {"kind": "route", "column": "c", "teachers": [SHARDED | {"name": "a"}]}},
            "a teacher of kind route depends on rows, and ranks with different rows would wait",
        ),
        (
            {"teacher": {"kind": "curriculum", "teachers": [SHARDED]}},
            "a teacher of kind curriculum depends on rows",
        ),
        (
            STREAMED | {"teacher": SHARDED, "rollout": {"kind": "sampled", "by": "teacher"}},
            "the teacher writes the responses to a stream, and ranks",
        ),
        ({"teacher": SHARDED | {"kind": "online"}}, "Remove 'quantization', 'placement'"),
        ({"teacher": SHARDED | {"device": "cuda:1"}}, "chooses the devices itself"),
        ({"teacher": {"model": "t", "offload": True}}, "It is now called 'placement'"),
    ],
)
def test_a_placement_that_cannot_work_is_refused(given, said):
    assert said in message(MINIMAL | given)


def test_a_sharded_teacher_that_all_ranks_run_equally_often_is_fine():
    assert recipes.build(MINIMAL | {"teacher": SHARDED}).teacher.placement == "sharded"
    assert recipes.build(MINIMAL | STREAMED | {"teacher": SHARDED})
    both = {"kind": "ensemble", "teachers": [SHARDED, SHARDED]}
    assert recipes.build(MINIMAL | {"teacher": both, "rollout": {"kind": "fixed"}})


def test_generation_shares_the_rows_and_refuses_a_sharded_teacher():
    given = {"output": "a", "target": 2, "generator": {"kind": "answer", "prompts": "p.jsonl"}}
    with pytest.raises(ValidationError, match="ask the teacher for different rows"):
        GenerationRecipe.model_validate(given | {"teacher": SHARDED})


# ---- schedules and replay ----


def with_rollout(**rollout):
    return MINIMAL | {"rollout": rollout}


def test_a_share_is_a_number_or_a_schedule():
    share = recipes.build(with_rollout(kind="mixed", share=1)).rollout.share
    assert (share.kind, share.value) == ("constant", 1.0)
    linear = {"kind": "linear", "start": 1.0, "end": 0.0}
    recipe = recipes.build(with_rollout(kind="mixed", share=linear))
    assert (recipe.rollout.share.start, recipe.rollout.share.end) == (1.0, 0.0)
    assert recipes.build(recipes.parse_yaml(recipes.dump(recipe), "x")) == recipe


@pytest.mark.parametrize(
    ("rollout", "said"),
    [
        ({"kind": "mixed", "share": 2}, "'rollout.share': should be less than or equal"),
        ({"kind": "mixed", "share": "x"}, "'rollout.share': should be a valid number"),
        ({"kind": "mixed", "share": {"kind": "linear", "start": 1}}, "'rollout.share.end' is miss"),
        ({"kind": "mixed", "share": {"kind": "linea"}}, "'rollout.share.kind' should be one of"),
        ({"kind": "mixed", "share": {"kind": "adaptive"}}, "Set 'evaluate.every_steps'"),
        ({"kind": "replay", "rollout": {"kind": "sampled", "by": "teacher"}}, "'rollout': a teac"),
        ({"kind": "replay", "capacity": 0}, "'rollout.capacity'"),
        (
            {"kind": "interleaved", "top_p": 0.9},
            "'rollout.top_p': accept 'top_k' has no option 'top_p'. Its options are: top_k",
        ),
        (
            {"kind": "interleaved", "accept": "mixture", "top_k": 5},
            "'rollout.top_k': accept 'mixture' has no option 'top_k'. Its options are: teacher_share",
        ),
        (
            {"kind": "interleaved", "accept": "topk"},
            "'rollout.accept' should be one of top_k, top_p, mixture, switch, got 'topk'. Did you mean 'top_k'?",
        ),
        ({"kind": "interleaved", "top_k": -1}, "'rollout.top_k'"),
        ({"kind": "interleaved", "block_size": 0}, "'rollout.block_size"),
        ({"kind": "interleaved", "block_size": "large"}, "'rollout.block_size"),
        (
            {"kind": "interleaved", "student_sampling": {"continuous": True}},
            "'rollout.student_sampling.continuous'",
        ),
        ({"kind": "interleaved", "top_q": 1}, "'rollout.top_q'"),
    ],
)
def test_wrong_schedules_are_named(rollout, said):
    assert said in message(MINIMAL | {"rollout": rollout})


# ---- what must fit together ----

HELD = {"train": "train.jsonl", "hold_back": 2}
STREAM = {"train": "train.jsonl", "streaming": True}


@pytest.mark.parametrize(
    ("changes", "message_part"),
    [
        ({"student": {"model": "a", "carve": {}}}, "set 'layers', 'mlp_width' or 'heads'"),
        ({"student": {"model": "a", "quantization": "bnb_4bit"}}, "save: adapter"),
        ({"student": {"model": "a", "quantization": "bnb_4bit", "peft": {}}}, "save: adapter"),
        ({"student": {"model": "a", "quantization": "int3"}}, "'student.quantization'"),
        ({"teacher": {"kind": "adapter_off"}}, "is the base model under the student's adapter"),
        ({"teacher": {"kind": "adapter_off", "model": "a"}}, "unknown key 'teacher.model'"),
        ({"evaluate": {"patience": 2}}, "'patience' needs 'every_steps'"),
        ({"evaluate": {"every_steps": 5}}, "needs 'data.eval' or 'data.hold_back'"),
        ({"training": {"eval_on_start": True}}, "needs 'data.eval' or 'data.hold_back'"),
        (
            {
                "data": HELD,
                "evaluate": {"patience": 2, "every_steps": 5},
                "training": {"save_steps": 4},
            },
            "Remove 'training.save_steps'",
        ),
        ({"data": HELD | {"turns": "all"}}, "a held-out turn would appear as context"),
        (
            {"data": STREAM, "training": {"max_steps": 3, "dataloader_num_workers": 2}},
            "would read the whole stream",
        ),
        (
            {
                "data": STREAM,
                "training": {"max_steps": 3, "train_sampling_strategy": "group_by_length"},
            },
            "a stream is read in its own order",
        ),
        ({"training": {"label_smoothing_factor": 0.1}}, "would have no effect"),
        ({"training": {"use_liger_kernel": True}}, "would have no effect"),
        ({"evaluate": {"answer_pattern": "("}}, "is not a valid regular expression"),
        ({"evaluate": {"answer_pattern": "(a)(b)"}}, "has 2 groups, but may have one at most"),
    ],
)
def test_answers_that_do_not_fit_together(changes, message_part):
    assert message_part in message(MINIMAL | changes)


def test_a_teacher_without_a_kind_is_a_local_one():
    assert recipes.build(MINIMAL | {"teacher": {"model": "a"}}).teacher.kind == "local"


def test_the_base_under_an_adapter_is_a_teacher():
    changes = {"teacher": {"kind": "adapter_off"}, "student": {"model": "a", "peft": {}}}
    assert recipes.build(MINIMAL | changes).teacher_source == ("a", None)


def test_a_quantised_base_carries_an_adapter():
    student = {"model": "a", "quantization": "bnb_4bit", "peft": {"save": "adapter"}}
    assert recipes.build(MINIMAL | {"student": student}).student.quantization == "bnb_4bit"


def test_a_sampler_of_skd_keeps_the_other_default():
    given = with_rollout(kind="interleaved", student_sampling={"temperature": 0.7})
    rollout = recipes.build(given).rollout
    assert (rollout.student_sampling.temperature, rollout.student_sampling.top_p) == (0.7, 0.5)
    given = with_rollout(kind="interleaved", teacher_sampling={"top_p": 0.9})
    rollout = recipes.build(given).rollout
    assert (rollout.teacher_sampling.temperature, rollout.teacher_sampling.top_p) == (0.2, 0.9)


def test_an_option_left_blank_takes_its_default():
    assert recipes.build(with_rollout(kind="interleaved", top_k=None)).rollout.top_k == 25


def test_the_result_of_a_sentence_is_its_last_number():
    path = Path(__file__).parents[1] / "recipes" / "skd.yaml"
    pattern = recipes.load(path).evaluate.answer_pattern
    for text in (
        "#### 18",
        "She makes 9 * 2 = $18 every day.",
        "He has 18 apples, as asked.",
        "18.0 or 18",
    ):
        assert re.findall(pattern, text)[-1] == "18"
    assert re.findall(pattern, "It is 1,250.5 in all.") == ["1,250.5"]


def test_a_recipe_with_every_documented_key_is_valid():
    """Every key that users have been shown."""
    given = recipes.parse_yaml(
        """
        seed: 0
        output: runs/skd_cpu
        teacher: {kind: local, model: smollm2-135m-instruct, dtype: bfloat16}
        student: {model: smollm2-135m-instruct, carve: {layers: 20, by: influence}}
        data: {train: train.jsonl, eval: heldout.jsonl, format: alpaca, max_prompt_tokens: 256}
        rollout:
          kind: interleaved
          top_k: 25
          block_size: auto
          max_new_tokens: 128
          student_sampling: {temperature: 0.5, top_p: 0.5}
          teacher_sampling: {temperature: 0.2, top_p: 0.5}
        objectives: [{kind: response, divergence: forward_kl, temperature: 1.0, weight: 1.0}]
        training: {learning_rate: 1.0e-4, per_device_train_batch_size: 8, max_steps: 200, bf16: true}
        evaluate: {max_new_tokens: 96, every_steps: 50}
        """,
        "x",
    )
    assert recipes.build(given).data.format == "alpaca"


def test_an_objective_that_the_teacher_cannot_serve_is_refused_when_it_is_read(monkeypatch):
    """Both are named, before any model is loaded."""
    provides = property(lambda self: frozenset({"distribution"}))
    monkeypatch.setattr(teachers.LocalTeacherRecipe, "provides", provides)
    assert recipes.build(MINIMAL | {"objectives": [{"kind": "response"}]})
    said = message(MINIMAL | {"objectives": [{"kind": "response"}, {"kind": "hidden"}]})
    assert "objectives[1] of kind hidden needs hidden from the teacher" in said
    assert "a teacher of kind local provides distribution" in said


def test_a_temperature_goes_only_to_a_divergence_that_takes_one(monkeypatch):
    assert distributions.ResponseRecipe(temperature=2.0).options() == {"temperature": 2.0}
    monkeypatch.setattr(distributions.ResponseRecipe, "_takes_temperature", False)
    assert distributions.ResponseRecipe().options() == {}
    said = message(MINIMAL | {"objectives": [{"kind": "response", "temperature": 2.0}]})
    assert "divergence 'forward_kl' has no temperature" in said


def test_weights_are_not_negative_and_do_not_all_end_at_zero():
    fading = {"kind": "response", "weight": {"kind": "linear", "start": 1, "end": 0}}
    measured = MINIMAL | {"data": HELD, "evaluate": {"every_steps": 5}}
    assert recipes.build(MINIMAL | {"objectives": [fading]})
    assert recipes.build(measured | {"objectives": [fading, {"kind": "cross_entropy"}]})
    assert "which are all 0. Let at least one weight end above 0" in message(
        measured | {"objectives": [fading]}
    )
    assert "'objectives[0].weight'" in message(
        MINIMAL | {"objectives": [fading | {"weight": -1.0}]}
    )
    said = message(MINIMAL | {"objectives": [fading | {"weight": {"start": 1, "end": 0}}]})
    assert "'objectives[0].weight.kind' should be one of 'linear', 'cosine'" in said


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        (r"#### (-?\d+)", r"#### (-?\d+)"),
        (r"Answer #(\d+)", r"Answer #(\d+)"),
        (r"'#### (\d+)'", r"#### (\d+)"),
        (r"(\d+)", r"(\d+)"),
    ],
)
def test_a_hash_in_an_override_starts_no_comment(file, text, pattern):
    """`#### (...)` is GSM8K's pattern, and was read as nothing."""
    recipe = recipes.load(file, [f"evaluate.answer_pattern={text}"])
    assert recipe.evaluate.answer_pattern == pattern


@pytest.mark.parametrize("steps", [0, -3])
def test_a_number_of_steps_is_above_zero(steps):
    assert "'training.max_steps': should be 1 or more" in message(
        FULL | {"training": {"max_steps": steps}}
    )
