"""A teacher that sees images, for a student that reads text alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llmdistill import recipe as recipes
from llmdistill.batch import Sequences
from llmdistill.data.collate import PromptDataset, collate
from llmdistill.data.validate import Rules
from llmdistill.errors import DataError, ModelError, RecipeError, VocabularyError
from llmdistill.evaluation.measure import Evaluation
from llmdistill.forward import teacher_signal
from llmdistill.generate import generate
from llmdistill.models.heads import split
from llmdistill.models.taps import Need
from llmdistill.rollouts.sampled import SampledRollout
from llmdistill.run import distill
from llmdistill.sampling import GREEDY, Draw, Writer
from llmdistill.teachers.multimodal import MultimodalTeacher, seen_of
from tests import toy
from tests.conformance import entries
from tests.support import vision
from tests.support.recipes import build_generation
from tests.training.helpers import trainer

NEEDS = frozenset({Need.DISTRIBUTION})


def rows_with(images):
    """Rows with one image, two, or none in turn."""
    lists = [[images[0]], images[:2], []]
    return [row | {"images": lists[i % 3]} for i, row in enumerate(toy.rows(8))]


def encoded(rows):
    rules = Rules(optional=("images",), keeps_messages=True)
    return PromptDataset.encode(
        ((f"row {i}", row) for i, row in enumerate(rows)), toy.tokenizer(), rules
    )


@pytest.fixture
def data(tmp_path):
    return encoded(rows_with(vision.pictures(tmp_path / "pictures")))


def teacher_of(data, **options):
    return MultimodalTeacher(
        vision.model(), vision.processor(), seen=seen_of(data.rows, "images"),
        tokenizer=toy.tokenizer(), **options,
    )  # fmt: skip


def batch(data):
    return Sequences.pack(
        [row.prompt_ids for row in data.rows],
        [row.response_ids for row in data.rows],
        [row.row_id for row in data.rows],
        writer=Writer.DATA,
        pad_id=0,
    )


def logits(teacher, sequences):
    found = teacher_signal(teacher, sequences, toy.NUM_TOKENS, NEEDS).distribution
    return found.serve()[0 : len(found)].clone()


def alone(row, images):
    """Logits of the response tokens of one row, from the model's own forward pass."""
    from PIL import Image

    model, processor = vision.model(), vision.processor()
    content = [{"type": "image"} for _ in images]
    content.append({"type": "text", "text": row.messages[-1]["content"]})
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    pictures = [Image.open(path).convert("RGB") for path in images]
    inputs = processor(
        text=text, images=pictures or None, return_tensors="pt", add_special_tokens=False
    )
    ids = torch.cat([inputs.pop("input_ids"), torch.tensor([row.response_ids])], 1)
    inputs.pop("attention_mask")
    inputs.pop("mm_token_type_ids", None)
    with torch.no_grad():
        found = model(input_ids=ids, **inputs).logits[0, :, : toy.NUM_TOKENS]
    return found[-len(row.response_ids) - 1 : -1]


def test_each_response_is_scored_after_the_teachers_own_prompt_with_its_images(data):
    """Prompts differ in length and in their numbers of images; responses are aligned row by row."""
    teacher = teacher_of(data)
    found = logits(teacher, batch(data))
    expected = [alone(row, [str(p) for p in teacher.seen[row.row_id].images]) for row in data.rows]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-3, atol=1e-3)


def test_the_images_matter(data, tmp_path):
    sequences = batch(data)
    first = logits(teacher_of(data), sequences)
    others = vision.pictures(tmp_path / "others", 5)[2:]
    second = logits(teacher_of(encoded(rows_with(others))), sequences)
    row_N = torch.arange(8).repeat_interleave(sequences.num_predicted)
    changed = (first - second).abs().amax(1) > 1e-3
    assert changed[row_N % 3 < 2].float().mean() > 0.9
    assert not changed[row_N % 3 == 2].any()


def test_without_images_it_is_the_text_part_of_the_model(tmp_path):
    """N13: with nothing to see it is plain distillation."""
    data = encoded([row | {"images": []} for row in toy.rows(6)])
    found = logits(teacher_of(data), batch(data))
    model = vision.model()
    backbone, head = split(model)
    sequences = batch(data)
    with torch.no_grad():
        states = backbone.language_model(
            input_ids=sequences.input_ids_BT, attention_mask=sequences.attention_mask_BT
        ).last_hidden_state
    expected = head.narrow(toy.NUM_TOKENS)(states[sequences.predictor_mask_BT])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_the_student_never_receives_a_pixel(data, tmp_path):
    student = toy.model()
    seen = []
    student.model.register_forward_pre_hook(
        lambda _module, _args, options: seen.append(options), with_kwargs=True
    )
    made = trainer(tmp_path, student=student, teacher=teacher_of(data), rows=data, max_steps=2)
    seen.clear()  # of the checks before the first step
    made.train()
    assert made.state.log_history[0]["loss"] > 0.1
    assert len(seen) == 2
    for options in seen:
        assert not any("pixel" in name or "image" in name for name in options)
        assert options["input_ids"].max() < toy.NUM_TOKENS


@pytest.mark.parametrize("by", ["student", "teacher"])
def test_either_model_writes_the_responses(data, tmp_path, by):
    rollout = SampledRollout(by, max_new_tokens=4)
    made = trainer(tmp_path, teacher=teacher_of(data), rows=data, rollout=rollout)
    made.train()
    assert made.state.log_history[0]["loss"] > 0.1


def test_it_writes_what_it_sees(data):
    teacher, prompts = teacher_of(data), collate(data.rows)
    written = teacher.write(prompts, GREEDY, max_new_tokens=4, draw=Draw(0))
    assert [ids[: len(row.prompt_ids)] for ids, row in zip(
        written.input_ids_BT.tolist(), data.rows, strict=True)] == [r.prompt_ids for r in data.rows]  # fmt: skip
    for row, ids in zip(data.rows[:3], written.responses()[:3], strict=True):
        from dataclasses import replace

        images = [str(path) for path in teacher.seen[row.row_id].images]
        again = alone(replace(row, response_ids=ids), images).argmax(-1).tolist()
        assert again == ids


def test_a_student_is_measured_against_what_the_teacher_sees(data):
    evaluation = Evaluation(teacher_of(data), collate(data.rows[:3]), max_new_tokens=4, seed=0)
    assert evaluation.teacher_figures() == {}
    assert evaluation.measure(toy.model()).figures.kl_teacher_text > 0.1


def test_control_tokens_in_a_message_are_text(tmp_path):
    images = vision.pictures(tmp_path)
    rows = [{"instruction": "an <image> of <|im_end|>", "output": "a", "images": [images[0]]}]
    data = encoded(rows)
    inputs = teacher_of(data)._processed(list(teacher_of(data).seen.values()), side="right")
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(toy.NUM_TOKENS) == vision.IMAGE_TOKENS
    assert ids.count(2) == 1


# ---- what is refused ----


def test_a_missing_image_and_a_file_that_is_none_are_named(tmp_path):
    (image, *_) = vision.pictures(tmp_path)
    text = tmp_path / "notes.png"
    text.write_text("no image")
    cut = tmp_path / "cut.png"
    cut.write_bytes(Path(image).read_bytes()[:40])
    for value, wrong in (
        ([image, str(tmp_path / "gone.png")], r"row 1: the image '.*gone.png' does not exist"),
        (str(text), r"row 1: '.*notes.png' is no image that can be read"),
        (str(cut), r"row 1: '.*cut.png' is no image that can be read"),
        (7, "row 1: 'images' must be the path of an image or a list of paths, got 7"),
        ([3], "row 1: 'images' must be the path of an image or a list"),
    ):
        rows = [row | {"images": image} for row in toy.rows(2)]
        rows[1]["images"] = value
        with pytest.raises(DataError, match=wrong):
            seen_of(encoded(rows).rows, "images")


@pytest.mark.parametrize("value", [None, "", []])
def test_a_row_may_have_no_images(value):
    rows = [row | {"images": value} for row in toy.rows(1)] + toy.rows(1)  # the last lacks them
    found = seen_of(encoded(rows).rows, "images")
    assert [one.images for one in found.values()] == [(), ()]


def test_options_reach_the_template_of_the_teacher(data):
    template = vision.TEMPLATE.replace("assistant\n", "assistant{{ mood }}\n")
    processor = vision.processor()
    processor.chat_template = template
    teacher = MultimodalTeacher(vision.model(), processor, template_options={"mood": " calm"})
    seen = list(seen_of(data.rows, "images").values())[:1]
    ids = teacher._processed(seen, side="right")["input_ids"][0]
    assert "assistant calm\n" in processor.tokenizer.decode(ids)


def test_relative_paths_start_from_the_folder(tmp_path):
    vision.pictures(tmp_path / "pictures")
    rows = [row | {"images": "1.png"} for row in toy.rows(2)]
    found = seen_of(encoded(rows).rows, "images", tmp_path / "pictures")
    assert found[0].images == (tmp_path / "pictures" / "1.png",)


def test_other_vocabularies_are_refused():
    other = toy.tokenizer("stranger")
    other.add_tokens(["<new>"])
    with pytest.raises(VocabularyError, match=r"token '<new>' has id 259 in student 'stranger'"):
        MultimodalTeacher(vision.model(), vision.processor(), tokenizer=other)
    processor = vision.processor()
    processor.chat_template = processor.tokenizer.chat_template = None
    with pytest.raises(ModelError, match="has no chat template"):
        MultimodalTeacher(vision.model(), processor)


def test_what_it_cannot_do_is_refused_when_the_recipe_is_read():
    given = {"kind": "multimodal", "model": "v"}
    for parts, wrong in (
        ({"rollout": {"kind": "interleaved"}}, "cannot write token by token"),
        ({"objectives": [{"kind": "hidden"}]}, "needs hidden from the teacher"),
        ({"teacher": given | {"placement": "parked"}}, "needs plain weights on one device"),
        ({"data": {"train": "x", "streaming": True}, "training": {"max_steps": 1}}, "streaming"),
    ):
        with pytest.raises(RecipeError, match=wrong):
            entries.recipe(**{"teacher": given} | parts)
    generation = {"output": "o", "teacher": given, "target": 3}
    with pytest.raises(RecipeError, match="answers prompts with images"):
        build_generation(generation | {"generator": {"kind": "magpie"}})
    answer = {"kind": "answer", "prompts": "p.jsonl", "samples": 2, "best_by": "likelihood"}
    with pytest.raises(RecipeError, match="gives no log-probabilities"):
        build_generation(generation | {"generator": answer})


# ---- whole runs ----


def test_a_run_trains_a_text_student_from_rows_with_images(pair, tmp_path):
    rows = rows_with(vision.pictures(tmp_path / "pictures"))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipes.build({
        "output": str(tmp_path / "run"),
        "teacher": {"kind": "multimodal", "model": vision.save(tmp_path / "v"), "dtype": "float32"},
        "student": {"model": pair[1]},
        "data": {"train": str(tmp_path / "rows.jsonl"), "hold_back": 2},
        "training": {"use_cpu": True, "max_steps": 2, "save_strategy": "no"},
        "evaluate": {"max_new_tokens": 4},
    })  # fmt: skip
    result = distill(recipe, show_progress=False)
    assert result.evaluation["after"].kl_teacher_text > 0
    assert "it also saw images" in (result.student / "README.md").read_text()


def test_captions_are_generated_from_images(pair, tmp_path):
    """The same question about three images: three rows, each with its image.  A student then learns
    from them, and from a row without an image.
    """
    images = vision.pictures(tmp_path / "pictures")
    prompts = [{"instruction": "Describe it.", "picture": image} for image in images]
    prompts.append({"instruction": "Say hello."})
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    recipe = build_generation({
        "output": str(tmp_path / "set"),
        "teacher": {
            "kind": "multimodal", "model": vision.save(tmp_path / "v"), "dtype": "float32",
            "images": "picture",
        },
        "generator": {
            "kind": "answer", "prompts": str(tmp_path / "prompts.jsonl"),
            "answering": {"max_new_tokens": 6, "sampling": {"temperature": 0.0}},
        },
        "filters": [], "format": "alpaca", "test_share": 0.0,
    })  # fmt: skip
    made = generate(recipe)
    assert made.sizes == {"train": 4}
    lines = (tmp_path / "set" / "train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert sorted(row["picture"] for row in rows) == [[], *([image] for image in sorted(images))]
    assert len({row["output"] for row in rows}) > 1
    student = recipes.build({
        "output": str(tmp_path / "run"), "teacher": recipe.teacher.model_dump(),
        "student": {"model": pair[1]}, "data": {"train": str(tmp_path / "set" / "train.jsonl")},
        "training": {"use_cpu": True, "max_steps": 1, "save_strategy": "no"},
    })  # fmt: skip
    assert (distill(student, show_progress=False).student / "model.safetensors").is_file()
    row = {"instruction": "Describe it.", "picture": ["gone.png"]}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(row) + "\n")
    other = build_generation(recipe.model_dump() | {"output": str(tmp_path / "other")})
    with pytest.raises(DataError, match=r"prompt 0: the image '.*gone.png' does not exist"):
        generate(other)
