"""The function that computes a model's attention: asked for by name, refused with a reason."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText, Gemma3Config

from llmdistill import recipe as recipes
from llmdistill.data.collate import PromptDataset
from llmdistill.data.validate import Row
from llmdistill.errors import ModelError
from llmdistill.models import kernels
from llmdistill.models.build import build_student
from llmdistill.models.carve import Plan, carve
from llmdistill.models.load import load_model
from llmdistill.models.taps import Need, taps
from llmdistill.recipe import self_teachers
from llmdistill.recipe.teachers import LocalTeacherRecipe
from llmdistill.run import load_pair
from llmdistill.teachers.build import build_teacher
from llmdistill.teachers.local import LocalTeacher
from tests import toy
from tests.support import vision
from tests.support.attention import NAME, by_lengths
from tests.support.models import family

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
IDS_BT = torch.arange(1, 8)[None]


def load(path, implementation, **options):
    return load_model(path, device="cpu", attn_implementation=implementation, **options)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_model_attends_as_it_was_asked_to(pair, implementation):
    model = load(pair[1], implementation)
    assert model.config._attn_implementation == implementation
    assert model.base_model.layers[0].self_attn.config._attn_implementation == implementation


def test_auto_is_what_transformers_chooses(pair):
    assert load_model(pair[1], device="cpu").config._attn_implementation == "sdpa"
    assert load(pair[1], "auto").config._attn_implementation == "sdpa"


def test_a_teacher_takes_it(pair):
    teacher = LocalTeacher.load(pair[0], device="cpu", attn_implementation="eager")
    assert teacher.model.config._attn_implementation == "eager"


def test_a_model_that_sees_has_it_in_its_text_side(tmp_path):
    vision.model().save_pretrained(tmp_path)
    whole = load(str(tmp_path), "eager", sees_images=True)
    assert whole.get_decoder().layers[0].self_attn.config._attn_implementation == "eager"


def test_the_text_side_alone_has_it(tmp_path):
    texts, images = vision.GEMMA_TEXT, vision.GEMMA_IMAGES
    config = Gemma3Config(text_config=texts, vision_config=images, mm_tokens_per_image=4)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    text = load(str(tmp_path), "eager")
    assert text.config._attn_implementation == "eager"
    assert text.base_model.layers[0].self_attn.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("implementation", "device", "said"),
    [
        ("flash", CPU, "unknown attn_implementation 'flash'. Use one of auto, eager, sdpa, flash_"),
        ("flash_attention_2", CPU, "it needs a GPU, and the device is the CPU. Use 'attn_implem"),
        ("flash_attention_3", CPU, "it needs a GPU, and the device is the CPU"),
        ("flex_attention", CPU, "it needs a GPU, and the device is the CPU"),
        ("flash_attention_2", GPU, "it needs the package flash-attn or kernels. Install it"),
        ("flash_attention_3", GPU, "it needs the package flash-attn-3 or kernels. Install it"),
        ("kernels-community/flash-attn", CPU, "it needs the package kernels. Install it with pip"),
    ],
)
def test_what_cannot_run_here_is_refused(monkeypatch, implementation, device, said):
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="cannot load 'some/model'") as refused:
        kernels.require_attention("some/model", implementation, device)
    assert said in str(refused.value)


@pytest.mark.parametrize("implementation", kernels.IMPLEMENTATIONS)
def test_nothing_is_refused_where_all_is_installed(monkeypatch, implementation):
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: object())
    kernels.require_attention("some/model", implementation, GPU)


def test_load_model_refuses_before_it_reads_the_weights(pair):
    with pytest.raises(ModelError, match="it needs a GPU"):
        load(pair[1], "flash_attention_2")


def test_a_class_that_does_not_support_it_is_named(tmp_path):
    """GPT-Neo implements its own attention and has no sdpa."""
    family("GPTNeo", attention_types=[[["global"], 2]], num_layers=2).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="GPTNeoForCausalLM does not support") as refused:
        load(str(tmp_path), "sdpa")
    assert str(refused.value).endswith(f"yet. {kernels.ADVICE}")
    assert "issues" not in str(refused.value)
    assert load(str(tmp_path), "auto").config._attn_implementation == "eager"


def test_other_errors_are_not_blamed_on_the_attention(tmp_path):
    vision.model().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="Unrecognized configuration class") as refused:
        load(str(tmp_path), "eager")
    assert kernels.ADVICE not in str(refused.value)


def test_carving_adapters_and_taps_keep_it(pair):
    model = load(pair[1], "eager", dtype="float32")
    carved = carve(model, Plan(layers=[0, 2], heads=2), IDS_BT, torch.ones_like(IDS_BT))
    adapted = get_peft_model(carved, LoraConfig(r=2, target_modules=["q_proj"]))
    assert adapted.get_base_model().config._attn_implementation == "eager"
    with taps(adapted, [Need.QUERIES.after(1)]) as found:
        adapted(input_ids=IDS_BT)
    assert found[Need.QUERIES.after(1)].shape == (1, 7, 16)


def test_an_adapter_on_disk_has_it_on_its_base(pair, tmp_path):
    base = load(pair[1], "auto", dtype="float32")
    base.config.name_or_path = base.name_or_path = pair[1]
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.peft_config["default"].base_model_name_or_path = pair[1]
    assert isinstance(adapted, PeftModel)
    adapted.save_pretrained(tmp_path)
    assert load(str(tmp_path), "eager").config._attn_implementation == "eager"


def test_an_exported_model_does_not_name_it(pair, tmp_path):
    load(pair[1], "eager").save_pretrained(tmp_path)
    assert "attn_implementation" not in (tmp_path / "config.json").read_text()
    assert load(str(tmp_path), "auto").config._attn_implementation == "sdpa"


# ---- recipes ----


def test_a_recipe_sets_it_for_teacher_and_student(pair):
    student = recipes.StudentRecipe(model=pair[1], attn_implementation="eager")
    sample = (IDS_BT, torch.ones_like(IDS_BT))
    built = build_student(student, base=None, sample=sample, device="cpu", seed=0)
    assert built.config._attn_implementation == "eager"
    teacher = LocalTeacherRecipe(model=pair[0], device="cpu", attn_implementation="eager")
    assert build_teacher(teacher).model.config._attn_implementation == "eager"


def test_each_assistant_teaches_as_the_first_teacher():
    first = LocalTeacherRecipe(model="a", attn_implementation="eager")
    assert self_teachers._student_of("run", first).attn_implementation == "eager"


@pytest.mark.parametrize("name", [*kernels.IMPLEMENTATIONS, "kernels-community/flash-attn2"])
def test_a_recipe_takes_the_names_of_the_table_and_of_the_hub(name):
    assert recipes.StudentRecipe(model="a", attn_implementation=name).attn_implementation == name


def test_a_recipe_refuses_other_names_with_the_closest_one():
    with pytest.raises(ValueError, match="or a kernel of the Hub .* Did you mean 'sdpa'"):
        recipes.StudentRecipe(model="a", attn_implementation="spda")


@pytest.mark.parametrize(("of_teacher", "of_student"), [("eager", "sdpa"), ("sdpa", "eager")])
def test_a_student_carved_out_of_the_teacher_attends_in_its_own_way(pair, of_teacher, of_student):
    model = {"model": pair[0], "dtype": "float32"}
    recipe = recipes.build(
        {
            "data": {"train": "rows.jsonl"},
            "output": "run",
            "teacher": model | {"device": "cpu", "attn_implementation": of_teacher},
            "student": model | {"carve": {"layers": [0, 1]}, "attn_implementation": of_student},
            "training": {"use_cpu": True},
        }
    )
    rows = PromptDataset([Row(0, (3, 4, 5), (6, 7))])
    teacher, student = load_pair(recipe, toy.tokenizer(), rows)
    assert teacher.model.config._attn_implementation == of_teacher
    assert student.config._attn_implementation == of_student


# ---- flash attention and float32 ----


@torch.no_grad()
def test_a_float32_model_uses_flash_attention_under_autocast_alone(pair):
    expected = load(pair[1], "sdpa", dtype="float32")(input_ids=IDS_BT).logits
    with by_lengths(torch.bfloat16) as calls:
        model = load(pair[1], NAME, dtype="float32")
        assert torch.equal(model(input_ids=IDS_BT).logits, expected)
        assert calls == []
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=IDS_BT)
        assert len(calls) == 3
        assert torch.equal(model(input_ids=IDS_BT).logits, expected)


@torch.no_grad()
def test_a_bfloat16_model_always_uses_it(pair):
    with by_lengths(torch.bfloat16) as calls:
        load(pair[1], NAME, dtype="bfloat16")(input_ids=IDS_BT)
        assert len(calls) == 3
