"""Ordinary prompts, replies and servers: one odd thing costs one row, and is counted."""

from __future__ import annotations

import json

import pytest
import torch

from llmdistill import recipe as recipes
from llmdistill.data.formats import to_examples
from llmdistill.decoding.batches import TOKENS_PER_ROW, by_tokens
from llmdistill.errors import DataError, TeacherError
from llmdistill.evaluation.words import plain_words
from llmdistill.generate import generate
from llmdistill.instruct import filters
from llmdistill.instruct.requests import Asked, Request, user
from llmdistill.instruct.responders import TOO_LONG, LocalResponder
from llmdistill.instruct.tasks import Task
from llmdistill.models.thinking import spoken_thinking
from llmdistill.models.vocabulary import num_tokens
from llmdistill.sampling import Sampling
from llmdistill.teachers.local import LocalTeacher
from tests import toy
from tests.support import families
from tests.support.files import read_jsonl, write_jsonl
from tests.support.servers import Handler

slow = pytest.mark.slow


def generation(tmp_path, teacher, prompts=None, **changes):
    write_jsonl(
        tmp_path / "p.jsonl",
        prompts or [{"prompt": f"tell of {i}"} for i in "abcd"] + [{"prompt": "hard"}],
    )
    given = {
        "output": str(tmp_path / "set"), "teacher": teacher, "filters": [{"kind": "truncated"}], "test_share": 0.0,
        "generator": {"kind": "answer", "prompts": str(tmp_path / "p.jsonl"), "answering": {"max_new_tokens": 8}},
    }  # fmt: skip
    return recipes.build_part(recipes.GenerationRecipe, given | changes, "recipe")


def remote(server, **options):
    return {"kind": "remote", "model": "m", "url": server.url, "retries": 1} | options


@pytest.fixture
def says(monkeypatch):
    """Let the server answer the hard question with this message and finish reason."""

    def to_the_hard(message, reason):
        plain = Handler.answer

        def answer(self, body, **changes):
            if "hard" not in body["messages"][-1]["content"]:
                return plain(self, body, **changes)
            choice = {
                "index": 0,
                "finish_reason": reason,
                "message": {"role": "assistant"} | message,
            }
            return self.send(
                200, {"id": "1", "object": "x", "created": 0, "model": "m", "choices": [choice]}
            )

        monkeypatch.setattr(Handler, "answer", answer)

    return to_the_hard


# ---- replies ----


@slow
@pytest.mark.parametrize(
    ("message", "reason", "dropped"),
    [
        ({"content": None, "reasoning_content": "let me see"}, "length", {"only thinking": 1}),
        ({"content": None}, "length", {"empty answer": 1}),
        ({"content": "", "reasoning": "let me see"}, "stop", {"only thinking": 1}),
        ({"content": ""}, "stop", {"empty answer": 1}),
        ({"content": None, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "w", "arguments": "{}"}}]}, "tool_calls", {"tool call in place of a text": 1}),
        ({"content": "<think>\nlet me"}, "length", {"only thinking": 1}),
        ({"content": None}, "stop", {"empty answer": 1}),
        ({"content": "Par"}, "abort", {"failed on the server": 1}),
        ({"content": "Par"}, "MAX_TOKENS", {"truncated": 1}),
        ({"content": [{"type": "text", "text": "Pa"}, {"type": "text", "text": "ris"}]}, "stop", {}),
        ({"content": "Paris", "reasoning": {"a": 1}}, "stop", {}),
        ({"content": 3}, "stop", {"unusable reply": 1}),
        ({"content": "Paris"}, "eos_token", {}),
        ({"content": "Paris"}, "stop_sequence", {}),
        ({"content": "Paris"}, None, {}),
        ({"content": "Paris"}, "", {}),
        ({"content": "Paris"}, "length", {"truncated": 1}),
    ],
)  # fmt: skip
def test_an_odd_reply_costs_its_row_alone(server, tmp_path, says, message, reason, dropped):
    says(message, reason)
    made = generate(generation(tmp_path, remote(server)))
    assert made.counts.dropped == dropped
    assert made.counts.kept == 5 - sum(dropped.values())


@slow
def test_an_unknown_reason_to_end_is_named_once(server, tmp_path, says, caplog):
    says({"content": "Paris"}, "eos_token")
    generate(generation(tmp_path, remote(server), [{"prompt": f"hard {i}"} for i in range(3)]))
    assert caplog.text.count("finish_reason 'eos_token'") == 1


# ---- thinking ----

THOUGHT = "some thought\n</think>\n\nParis"


@pytest.mark.parametrize(
    ("text", "is_open", "found"),
    [
        ("Paris", False, ("", "Paris")),
        ("<think>\nhm\n</think>\n\nParis", False, ("hm", "Paris")),
        ("some thought</think>\n\nParis", False, ("some thought", "Paris")),
        ("hm\n</think>\n\nParis", True, ("hm", "Paris")),
        ("[THINK]hm[/THINK]Paris", False, ("hm", "Paris")),
        ("hm, the limit", True, ("hm, the limit", "")),
        ("<think>hm, the limit", False, ("hm, the limit", "")),
        ("The tag </think> closes it.", False, ("", "The tag </think> closes it.")),
        ("<think>\n\n</think>\n\nParis", False, ("", "Paris")),
        (
            "Write:\n<think>\nplan\n</think>\nthen.",
            False,
            ("", "Write:\n<think>\nplan\n</think>\nthen."),
        ),
    ],
)
def test_thinking_is_told_apart_from_the_answer(text, is_open, found):
    assert spoken_thinking(text, is_open=is_open) == found


@slow
@pytest.mark.parametrize("rule", ["keep", "drop"])
@pytest.mark.parametrize("form", ["messages", "alpaca"])
@pytest.mark.parametrize(
    "message",
    [{"content": THOUGHT}, {"content": f"<think>\n{THOUGHT}"}, {"content": f"<think>\n{THOUGHT}", "reasoning": "some thought"}, {"content": "Paris", "reasoning_content": "some thought"}, {"content": "Paris", "reasoning": "some thought"}],
)  # fmt: skip
def test_thinking_is_kept_whole_or_dropped(server, tmp_path, says, message, rule, form, caplog):
    says(message, "stop")
    with caplog.at_level("INFO", "llmdistill"):
        made = generate(generation(tmp_path, remote(server), thinking=rule, format=form))
    (row,) = (r for r in read_jsonl(made.folder / "train.jsonl") if "hard" in json.dumps(r))
    (example,) = to_examples(row, "x")
    tags = "<think>\nsome thought\n</think>\n\n"
    if form == "alpaca":
        assert row["output"] == ("" if rule == "drop" else tags) + "Paris"
    else:
        more = {} if rule == "drop" else {"reasoning_content": "some thought"}
        assert (example.response, example.more) == ("Paris", more)
    assert f"{'saved with' if rule == 'keep' else 'dropped from'} 1 rows" in caplog.text


@pytest.fixture(scope="module")
def thinker():
    """A teacher whose template opens the thinking."""
    made = families.tokenizer("deepseek-r1-distill")
    return LocalTeacher(toy.teacher_model(rows=num_tokens(made)), made)


def written(thinker, monkeypatch, text, **request):
    """The reply of a teacher that writes this text."""
    ids = thinker.tokenizer(text, add_special_tokens=False)["input_ids"]

    def write(prompts, *args, **options):
        from llmdistill.batch import Sequences
        from llmdistill.sampling import Writer

        written.prompt = thinker.tokenizer.decode(prompts.ids()[0])
        return Sequences.pack(prompts.ids(), [ids], [0], writer=Writer.TEACHER, pad_id=0)

    monkeypatch.setattr(thinker, "write", write)
    asked = Request(user("Capital?"), Sampling(), 40, **request)
    return LocalResponder(thinker, seed=0).respond([Asked(0, 0, 0, asked)])[0]


def test_a_teacher_on_this_machine_that_thinks(thinker, monkeypatch):
    end = "<\uff5cend\u2581of\u2581sentence\uff5c>"
    reply = written(thinker, monkeypatch, f"hm\n</think>\n\nParis{end}")
    assert (reply.thinking, reply.text, reply.truncated) == ("hm", "Paris", False)
    assert written.prompt.endswith("<think>\n")
    reply = written(thinker, monkeypatch, "hm, it goes on")
    assert (reply.thinking, reply.text, reply.truncated) == ("hm, it goes on", "", True)
    reply = written(thinker, monkeypatch, f" a bird{end}", start="4. Instruction:")
    assert (reply.thinking, reply.text) == ("", " a bird")
    assert written.prompt.endswith("<think>\n\n</think>\n\n4. Instruction:")


# ---- a server that refuses a parameter ----


@slow
@pytest.mark.parametrize(
    ("parameter", "status", "message"),
    [
        ("max_tokens", 400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens'"),
        ("seed", 422, "extra_forbidden: seed"),
        ("top_p", 400, "use either temperature or top_p"),
    ],
)
def test_a_refused_parameter_is_named_with_the_key(
    server, tmp_path, monkeypatch, caplog, parameter, status, message
):
    plain = Handler.answer

    def answer(self, body, **changes):
        if parameter in body:
            return self.send(status, {"error": {"message": message}})
        return plain(self, body, **changes)

    monkeypatch.setattr(Handler, "answer", answer)
    with pytest.raises(TeacherError, match="answered none of 5 requests"):
        generate(generation(tmp_path, remote(server)))
    assert f"teacher.leave_out: [{parameter}]" in caplog.text
    left_out = generation(tmp_path, remote(server, leave_out=[parameter]))
    assert generate(left_out, resume=True).counts.kept == 5
    server.asked.clear()
    renamed = remote(server, rename={parameter: "max_completion_tokens"})
    generate(generation(tmp_path, renamed, output=str(tmp_path / "again")))
    assert all("max_completion_tokens" in body for _, body in server.asked)


# ---- prompts ----


@slow
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "hi \\ud83d"}', "not valid Unicode"),
        ('{"prompt": "hi"', "not valid JSON"),
        ('{"prompt": 3}', "'prompt' must be non-empty text"),
        ('{"text": "no question"}', "plain text has no question"),
    ],
)
def test_one_bad_prompt_is_named_or_skipped(pair, tmp_path, line, said, caplog):
    teacher = {"model": pair[0], "dtype": "float32"}
    generation(tmp_path, teacher)
    lines = (tmp_path / "p.jsonl").read_text().splitlines()
    (tmp_path / "p.jsonl").write_text("\n".join([*lines[:2], line, *lines[2:]]))

    def recipe(**changes):
        made = generation(tmp_path, teacher, filters=[], **changes)
        (tmp_path / "p.jsonl").write_text("\n".join([*lines[:2], line, *lines[2:]]))
        return made

    with pytest.raises(DataError, match=r"p\.jsonl:3: .*on_bad_row: skip") as caught:
        generate(recipe())
    assert said in str(caught.value)
    made = generate(recipe(on_bad_row="skip"))
    assert made.counts.made == 5
    assert "1 malformed rows are skipped" in caplog.text


@slow
@pytest.mark.parametrize("form", ["messages", "alpaca"])
def test_a_context_is_answered_in_and_saved(pair, tmp_path, form, monkeypatch):
    context = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "a."},
    ]
    asked = [*context, {"role": "user", "content": "b?"}]
    seen = []
    original = LocalResponder._prompt
    monkeypatch.setattr(
        LocalResponder, "_prompt", lambda s, r: seen.append(r.messages) or original(s, r)
    )
    teacher = {"model": pair[0], "dtype": "float32"}
    recipe = generation(
        tmp_path, teacher, [{"messages": asked}, {"prompt": "c?"}], filters=[], format=form
    )
    made = generate(recipe)
    assert tuple(asked) in seen
    for name in ("train.jsonl", "train.parquet"):
        from llmdistill.data.sources import read

        rows = [row for _, row in read(str(made.folder / name))]
        prompts = [list(to_examples(row, "x")[0].prompt) for row in rows]
        assert [{k: m[k] for k in ("role", "content")} for m in prompts[0]] == asked


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {
                "messages": [
                    {"role": "assistant", "content": "Hello!"},
                    {"role": "user", "content": "q"},
                ]
            },
            "an optional system message",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "q"}]},
            "an optional system message",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "tool_calls": [{"function": {"name": "w"}}]},
                    {"role": "tool", "content": "7"},
                ]
            },
            "generate does not use tools",
        ),
        ({"prompt": "q", "tools": [{"function": {"name": "w"}}]}, "generate does not use tools"),
    ],
)
def test_a_prompt_that_cannot_be_asked_is_named(tmp_path, row, said):
    from llmdistill.instruct.task_sources import read_tasks

    write_jsonl(tmp_path / "p.jsonl", [row])
    with pytest.raises(DataError, match=rf"p\.jsonl:1: .*{said}"):
        read_tasks([recipes.SourceRecipe(source=str(tmp_path / "p.jsonl"))], takes_context=True)


def test_fields_of_prompts_that_nothing_reads_are_named(tmp_path, caplog):
    from llmdistill.instruct.task_sources import read_tasks

    write_jsonl(tmp_path / "p.jsonl", [{"prompt": "q", "history": [["a", "b"]], "answer": "z"}])
    read_tasks([recipes.SourceRecipe(source=str(tmp_path / "p.jsonl"))])
    assert "fields of prompts that nothing reads: history, answer" in caplog.text


def test_a_conversation_that_the_template_rejects_costs_its_row(caplog):
    made = toy.tokenizer()
    made.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + toy.TEMPLATE
    )
    teacher = LocalTeacher(toy.teacher_model(), made)
    told = ({"role": "system", "content": "x"}, *user("hi"))
    asked = [
        Asked(0, 0, 0, Request(user("hi"), Sampling(), 4)),
        Asked(1, 0, 0, Request(told, Sampling(), 4)),
    ]
    replies = LocalResponder(teacher, seed=0).respond(asked)
    assert [reply.refused for reply in replies] == ["", "rejected by the chat template"]
    assert "call 1: " in caplog.text


def test_rewriting_takes_no_context(tmp_path):
    from llmdistill.instruct.task_sources import read_tasks

    write_jsonl(tmp_path / "p.jsonl", [{"system": "Be brief.", "prompt": "hi"}])
    with pytest.raises(DataError, match=r"p\.jsonl:1: a task must have a single user turn"):
        read_tasks([recipes.SourceRecipe(source=str(tmp_path / "p.jsonl"))])


# ---- long prompts ----


def test_batches_are_bounded_by_tokens():
    lengths = [10] * 63 + [6000]
    found = list(by_tokens(lengths, 8, 32))
    assert [len(batch) for batch in found] == [32, 31, 1]
    assert sorted(place for batch in found for place in batch) == list(range(64))
    for batch in by_tokens([3000, 10, 5000, 10, 10, 70_000, 1], 100, 4):
        longest = max([3000, 10, 5000, 10, 10, 70_000, 1][place] for place in batch)
        assert len(batch) == 1 or len(batch) * (longest + 100) <= 4 * TOKENS_PER_ROW
    assert list(by_tokens([], 8, 4)) == []


def test_a_prompt_beyond_the_context_is_counted_and_never_read():
    teacher = LocalTeacher(toy.teacher_model(), toy.tokenizer())  # 512 positions
    asked = [
        Asked(i, 0, 0, Request(user(text), Sampling(), 4))
        for i, text in enumerate(["hi", "x" * 600, "yo"])
    ]
    replies = LocalResponder(teacher, seed=0).respond(asked)
    assert [reply.refused for reply in replies] == ["", TOO_LONG, ""]


# ---- filters ----

CODE = """Here you are:

```c
int main(void) {
    for (int i = 0; i < 3; i++) {
        printf("%d", i);
    }
    for (int i = 0; i < 3; i++) {
        printf("%d", i);
    }
    return 0;
}
```
"""
CHINESE = "请写一首关于春天的诗歌，要有四句话。"
LANGUAGES = [
    CHINESE, "Напиши короткое стихотворение о весне", "Écris un court poème sur le printemps",
    "¿Cuál es la capital de Francia?", "春についての短い詩を書いてください。", "เขียนบทกวีสั้น ๆ เกี่ยวกับฤดูใบไม้ผลิ",
    "اكتب قصيدة قصيرة عن الربيع", "봄에 관한 짧은 시를 써 주세요", "「春」という言葉を説明してください。",
]  # fmt: skip


@pytest.mark.parametrize("text", LANGUAGES)
def test_the_default_filters_keep_every_language(text):
    one = Task(text, "", f"{text} 春 {text}"[: len(text)])
    for kind in (filters.Length(), filters.OddStart(), filters.RepeatedLines()):
        assert kind.reason(one) is None, kind


def test_correct_code_does_not_repeat_itself():
    assert filters.RepeatedLines().reason(Task("a", "", CODE)) is None
    looping = "```\n" + "x = x + 1\n" * 40 + "```"
    assert filters.RepeatedLines().reason(Task("a", "", looping)) == "repeats itself"
    tildes = CODE.replace("```c", "~~~").replace("```", "~~~")
    assert filters.RepeatedLines().reason(Task("a", "", tildes)) is None
    unclosed = "```py\n" + "\n".join(f"call({i % 7})" for i in range(20))
    assert filters.RepeatedLines().reason(Task("a", "", unclosed)) is None
    assert (
        filters.RepeatedLines().reason(Task("a", "", f"{CODE}\n" + "la la la la " * 9))
        == "repeats itself"
    )


@pytest.mark.parametrize("text", ["春天来了。" * 9, "я знаю это точно " * 9])
def test_text_that_repeats_itself_is_found_in_any_language(text):
    assert filters.RepeatedLines().reason(Task("a", "", text)) == "repeats itself"


@slow
def test_a_filter_that_drops_most_of_a_round_is_named_at_once(server, tmp_path, caplog):
    recipe = generation(tmp_path, remote(server), filters=[{"kind": "length", "min_words": 9}])
    with pytest.raises(DataError, match="no row was kept of 5 tasks"):
        generate(recipe)
    assert "the filter 'length' dropped 5 of 5 tasks of a round" in caplog.text


def test_a_mark_belongs_to_its_letter():
    assert plain_words("हिन्दी भाषा में लिखो") == ["हिन्दी", "भाषा", "में", "लिखो"]
    assert plain_words("The Cat's hat_2, naïve!") == ["the", "cat", "s", "hat", "2", "naïve"]


def test_rouge_sees_texts_of_any_language():
    near = filters.Rouge(0.7, [CHINESE])
    assert near.reason(Task(CHINESE + "好")) == "too similar"
    assert near.reason(Task("请解释一下量子力学的基本概念")) is None
    torch.manual_seed(0)
