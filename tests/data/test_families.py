"""What is trained is what the template of each family writes, to the token."""

from __future__ import annotations

import json

import pytest

from llmdistill.data.formats import to_examples
from llmdistill.data.pairing import Pairing
from llmdistill.data.render import render
from llmdistill.errors import DataError, VocabularyError
from llmdistill.models.chat import template_ends
from tests.support.families import FAMILIES, tokenizer

pytestmark = pytest.mark.upgrade

ASKED = {"role": "user", "content": "Capital of France?"}
TEMPLATED = [name for name, family in FAMILIES.items() if family.template is not None]
THINKS = {"qwen3", "qwen3-base"}  # its template writes thinking that a message states in a field
OPENS = "deepseek-r1-distill"  # its template opens the thinking of an answer itself
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}
FORGED = "<|im_end|><|eot_id|><end_of_turn></s><｜end▁of▁sentence｜>"


def answered(content, **more):
    return {"messages": [ASKED, {"role": "assistant", "content": content, **more}]}


def rendered(name, row):
    (example,) = to_examples(row, "rows.jsonl:1")
    return render(tokenizer(name), example)


def own_ids(name, messages, **options):
    """What the template itself writes."""
    made = tokenizer(name)
    text = made.apply_chat_template(messages, tokenize=False, **options)
    return made(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", [name for name in TEMPLATED if name != OPENS])
def test_an_answer_is_trained_as_its_template_writes_it(name):
    row = answered("Paris.")
    prompt, answer = rendered(name, row)
    whole = own_ids(name, row["messages"])
    assert prompt == own_ids(name, [ASKED], add_generation_prompt=True)
    assert prompt + answer == whole[: len(prompt) + len(answer)]
    assert {answer[-1]} == template_ends(tokenizer(name))
    assert tokenizer(name).decode(whole[len(prompt) + len(answer) :]).strip() == ""


@pytest.mark.parametrize(
    "row",
    [
        answered("<think>\nIt is big.\n</think>\n\nParis."),
        answered("Paris.", reasoning_content="It is big."),
        answered("Paris.", thinking="It is big."),
        answered("Paris.", reasoning="It is big."),
    ],
    ids=["text", "reasoning_content", "thinking", "reasoning"],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_thinking_is_trained_whichever_way_a_row_states_it(name, row):
    prompt, answer = rendered(name, row)
    made = tokenizer(name)
    space = " " if name == "mistral-instruct" else ""
    text = f"{space}<think>\nIt is big.\n</think>\n\nParis."
    if name == OPENS:
        assert made.decode(prompt).endswith("<｜Assistant｜><think>\n")
        text = text.removeprefix("<think>\n")
    # Tags are control tokens wherever the tokenizer has such, and never spelled out.
    assert answer[:-1] == made(text, add_special_tokens=False)["input_ids"]
    if name in THINKS:
        assert prompt + answer == own_ids(name, row["messages"])[: len(prompt) + len(answer)]


@pytest.mark.parametrize("content", ["Paris.", "<think>\n\n</think>\n\nParis."])
def test_an_answer_without_thinking_closes_the_thinking_that_its_template_opens(content):
    prompt, answer = rendered(OPENS, answered(content))
    made = tokenizer(OPENS)
    assert made.decode(prompt + answer).endswith(
        "<｜Assistant｜><think>\n\n</think>\n\nParis.<｜end▁of▁sentence｜>"
    )
    assert made.convert_tokens_to_ids("</think>") in answer


@pytest.mark.parametrize("name", [OPENS, *sorted(THINKS)])
def test_thinking_without_its_opening_tag_is_thinking_where_the_template_knows_it(name):
    """Servers return it so for models whose template opens the thinking."""
    whole = rendered(name, answered("<think>\nIt is big.\n</think>\n\nParis."))
    assert rendered(name, answered("It is big.\n</think>\n\nParis.")) == whole


def test_earlier_thinking_is_left_to_the_template():
    row = {"messages": [ASKED, *answered("<think>\nBig.\n</think>\n\nParis.")["messages"][1:]]}
    row["messages"] += [{"role": "user", "content": "And Spain?"}]
    for name in (OPENS, *THINKS):
        prompt, _ = rendered(name, row)
        assert "Big." not in tokenizer(name).decode(prompt)
    prompt, _ = rendered("smollm3", row)
    assert tokenizer("smollm3").convert_tokens_to_ids("<think>") in prompt


def test_an_answer_that_its_template_would_cut_is_whole_or_refused():
    """Both templates cut everything before the last closing tag."""
    row = answered("<think>\nBig.\n</think>\n\nPar</think>is.")
    _, answer = rendered("qwen3", row)  # the thinking is given in its field, so nothing is cut
    assert tokenizer("qwen3").decode(answer).endswith("\n\nPar</think>is.<|im_end|>")
    with pytest.raises(DataError, match="leaves out the thinking of the answer, or a part of it"):
        rendered(OPENS, row)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "row",
    [
        answered(f"yo {FORGED}"),
        answered(f"<think>\n{FORGED}\n</think>\n\nyo {FORGED}"),
        answered("yo", reasoning_content=FORGED),
    ],
)
def test_control_tokens_in_an_answer_with_thinking_stay_text(name, row):
    """S5."""
    _, answer = rendered(name, row)
    made = tokenizer(name)
    special = {i for i, token in made.added_tokens_decoder.items() if token.special}
    assert [i for i in answer if i in special] == [answer[-1]]


# ---- tools ----


def call(arguments):
    return {"type": "function", "function": {"name": "weather", "arguments": arguments}}


@pytest.mark.parametrize("arguments", ['{"city": "Oslo"}', {"city": "Oslo"}])
@pytest.mark.parametrize("content", [None, ""])
@pytest.mark.parametrize(
    "name", ["qwen2.5-instruct", "qwen3", "mistral-instruct", "llama-3.1-instruct"]
)
def test_a_call_is_trained_as_its_template_writes_it(name, content, arguments):
    spoken = {"role": "assistant", "content": content, "tool_calls": [call(arguments)]}
    prompt, answer = rendered(name, {"tools": [TOOL], "messages": [ASKED, spoken]})
    made = tokenizer(name)
    kept = {**spoken, "tool_calls": [call({"city": "Oslo"})]}
    whole = own_ids(name, [ASKED, kept], tools=[TOOL])
    assert prompt + answer == whole[: len(prompt) + len(answer)]
    assert '{"city": "Oslo"}' in made.decode(answer)
    assert "weather" in made.decode(prompt)


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_what_follows_a_call_is_trained_after_it(tools):
    spoken = {"role": "assistant", "content": "", "tool_calls": [call("{}")]}
    told = [{"role": "tool", "content": "7 degrees"}, {"role": "assistant", "content": "7."}]
    row = {"tools": tools, "messages": [ASKED, spoken, *told]}
    prompt, answer = rendered("qwen3", row)
    made = tokenizer("qwen3")
    assert "<tool_call>" in made.decode(prompt)
    assert made.decode(answer).endswith("7.<|im_end|>")
    turns = to_examples(row, "x", every_turn=True)
    assert ["tool_calls" in one.more for one in turns] == [True, False]


@pytest.mark.parametrize("name", ["gemma-3-instruct", "phi-4", "smollm2-instruct"])
def test_a_template_that_writes_no_tools_is_refused(name):
    spoken = {"role": "assistant", "content": None, "tool_calls": [call("{}")]}
    with pytest.raises(DataError, match=r"does not write tools \(such as 'weather'\)"):
        rendered(name, {"tools": [TOOL], "messages": [ASKED, spoken]})
    with pytest.raises(DataError, match=r"does not write tool calls \(such as 'weather'\)"):
        rendered(name, {"messages": [ASKED, spoken]})


# ---- pairs ----

VOCABULARIES = {name: frozenset(family.tokens) for name, family in FAMILIES.items()}
PAIRS = [
    (teacher, student)
    for teacher in FAMILIES
    for student in FAMILIES
    if VOCABULARIES[teacher] == VOCABULARIES[student]
]


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_a_pair_reads_the_same_ids_or_is_refused_with_the_key(teacher, student):
    (example,) = to_examples(answered("Paris."), "rows.jsonl:1")
    ours, theirs = (render(tokenizer(name), example) for name in (teacher, student))
    pairing = Pairing(tokenizer(student), [tokenizer(teacher)])
    if ours == theirs:
        pairing.check(example)
        return
    with pytest.raises(VocabularyError, match=r"rows\.jsonl:1: .*After ") as caught:
        pairing.check(example)
    dates = {"llama-3.1-instruct", "llama-3.2-instruct"}
    key = "data.chat_template_kwargs" if {teacher, student} == dates else "student.tokenizer"
    assert key in str(caught.value)


def test_a_date_for_both_makes_a_pair():
    names = ("llama-3.1-instruct", "llama-3.2-instruct")
    (example,) = to_examples(answered("Paris."), "x")
    teacher, student = map(tokenizer, names)
    Pairing(student, [teacher], {"date_string": "1 Jan 2026"}).check(example)


def test_only_the_rows_of_the_run_decide():
    """A default system message does not matter if every row has a system message."""
    told = {"messages": [{"role": "system", "content": "Be brief."}, ASKED]}
    plain = FAMILIES["smollm2-instruct"]._replace(template=FAMILIES["qwen3"].template)
    student, teacher = tokenizer(plain, "student"), tokenizer("smollm2-instruct")
    pairing = Pairing(student, [teacher])
    pairing.check(*to_examples(told, "x"))
    with pytest.raises(VocabularyError, match="You are a helpful"):
        pairing.check(*to_examples({"prompt": "hi"}, "x"))


def test_plain_text_needs_no_template():
    student, teacher = tokenizer("smollm2-base"), tokenizer("smollm2-instruct")
    pairing = Pairing(student, [teacher])
    with pytest.raises(VocabularyError):
        pairing.check(*to_examples({"text": "hi"}, "x"))  # its end token differs
    teacher.eos_token = student.eos_token
    teacher.bos_token = student.bos_token
    Pairing(student, [teacher]).check(*to_examples({"text": "hi"}, "x"))


def test_a_shape_that_comes_late_is_compared_too():
    student = tokenizer("qwen3")
    teacher = tokenizer(FAMILIES["qwen3"]._replace(template=FAMILIES["smollm2-instruct"].template))
    pairing = Pairing(student, [student])
    for _ in range(20):
        pairing.check(*to_examples({"prompt": "hi"}, "x"))
    pairing.teachers = [teacher]
    pairing.check(*to_examples({"prompt": "hi"}, "x"))  # seen often enough
    with pytest.raises(VocabularyError):
        pairing.check(*to_examples(answered("yo", thinking="hm"), "x"))


# ---- thinking that a template or a row states in an odd way ----

_FIELD = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n"
    "{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
BY_FIELD = FAMILIES["qwen3"]._replace(template=_FIELD)
MAGISTRAL = FAMILIES["mistral-instruct"]._replace(
    tokens=FAMILIES["mistral-instruct"].tokens | {"[THINK]": True, "[/THINK]": True},
    template=FAMILIES["mistral-instruct"].template
    + "{# [THINK] [/THINK] #}{{ '[THINK][/THINK]' if show }}",
)


@pytest.mark.parametrize(
    "row",
    [answered("<think>\nhm\n</think>\n\nyo"), answered("yo", thinking="hm"), answered("<think>\nhm\n</think>\n\nyo", reasoning_content="hm")],
)  # fmt: skip
@pytest.mark.parametrize("family", [BY_FIELD, FAMILIES["qwen3"], FAMILIES["smollm3"]])
def test_thinking_is_written_once(family, row):
    made = tokenizer(family)
    prompt, answer = render(made, to_examples(row, "x")[0])
    whole = made.decode(prompt + answer)
    assert whole.endswith("<think>\nhm\n</think>\n\nyo<|im_end|>")
    assert whole.count("<think>") == 1


def test_the_tags_are_those_of_the_template():
    made = tokenizer(MAGISTRAL)
    _, answer = render(made, to_examples(answered("yo", thinking="hm"), "x")[0])
    assert made.decode(answer) == " [THINK]\nhm\n[/THINK]\n\nyo</s>"
    assert made.convert_tokens_to_ids("[THINK]") in answer


@pytest.mark.parametrize("name", ["qwen3", OPENS, "llama-3.1-instruct", "gpt2"])
@pytest.mark.parametrize(
    ("row", "said"),
    [
        (answered("<think>\nhm, cut off"), "is not closed"),
        (answered("<think>\nhm\n</think>\n\nyo", thinking="other"), "and they differ"),
    ],
)
def test_thinking_that_cannot_be_meant_is_refused(name, row, said):
    with pytest.raises(DataError, match=said):
        rendered(name, row)


def test_thinking_behind_a_closed_block_is_refused():
    (example,) = to_examples(answered("yo", thinking="hm"), "x")
    with pytest.raises(DataError, match="enable_thinking"):
        render(tokenizer("qwen3"), example, {"enable_thinking": False})


def test_tools_can_be_an_option_of_the_recipe():
    (example,) = to_examples(answered("yo"), "x")
    prompt, _ = render(tokenizer("qwen3"), example, {"tools": [TOOL]})
    assert "weather" in tokenizer("qwen3").decode(prompt)


def test_a_token_that_is_added_later_is_a_control_token():
    made = tokenizer("qwen3")
    (example,) = to_examples({"prompt": "hi <|new|>"}, "x")
    render(made, example)
    made.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    prompt, _ = render(made, example)
    assert made.convert_tokens_to_ids("<|new|>") not in prompt


def test_every_row_is_compared_if_the_templates_differ():
    trims = FAMILIES["smollm2-instruct"].template.replace("m.content }}", "m.content | trim }}")
    teacher = tokenizer(FAMILIES["smollm2-instruct"]._replace(template=trims))
    pairing = Pairing(tokenizer("smollm2-instruct"), [teacher])
    for _ in range(20):
        pairing.check(*to_examples({"prompt": "hi"}, "x"))
    with pytest.raises(VocabularyError):
        pairing.check(*to_examples({"prompt": "hi\n"}, "x"))


# ---- traits that were met in other families ----

CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chatml(template):
    return tokenizer(FAMILIES["qwen3"]._replace(template=template))


def called(*cities, content=None):
    calls = [call({"city": city}) for city in cities]
    return {"messages": [ASKED, {"role": "assistant", "content": content, "tool_calls": calls}]}


@pytest.mark.parametrize(
    "template",
    [
        CALLS.replace("m.tool_calls or []", "[]"),  # it writes tools alone, or none
        CALLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"),  # the first one alone
    ],
)
def test_a_call_that_the_template_leaves_out_is_refused(template):
    """Also if its name is elsewhere: in a question, or in another call."""
    made = chatml("{{ tools | tojson if tools }}" + template)
    row = called("Rome", "Paris")
    row["messages"][0] = {"role": "user", "content": "What is the weather?"}
    with pytest.raises(DataError, match="does not write tool calls"):
        render(made, to_examples(row | {"tools": [TOOL]}, "x")[0])


def test_arguments_are_written_in_one_way():
    """A template that joins the content needs a text there, and still gets objects."""
    made = chatml(CALLS.replace("{{ m.content }}", "{{ '' + m.content }}"))
    answers = [render(made, to_examples(called("Rome", content=c), "x")[0])[1] for c in (None, "")]
    assert answers[0] == answers[1]
    assert made.decode(answers[0]) == 'weather({"city": "Rome"})<|im_end|>'


def test_a_text_before_a_call_is_not_lost():
    with pytest.raises(DataError, match="leaves out"):
        rendered("mistral-instruct", called("Rome", content="Let me look."))
    _, answer = rendered("qwen3", called("Rome", content="Let me look."))
    assert "Let me look." in tokenizer("qwen3").decode(answer)


@pytest.mark.parametrize(
    "text", ["Use `<think>` and `</think>` tags.", "Think:<think>\nhm\n</think>\n\nyo"]
)
def test_a_text_about_tags_is_whole_or_refused(text):
    for name in TEMPLATED:
        try:
            _, answer = rendered(name, answered(text))
        except DataError:
            continue
        assert text in tokenizer(name).decode(answer)


def test_thinking_goes_where_the_template_has_a_place_for_it():
    channels = (
        "{% for m in messages %}{% if m.thinking %}<|im_start|>analysis\n{{ m.thinking }}<|im_end|>{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}{% endif %}"
    )
    rows = [answered("yo", thinking="hm"), answered("<think>\nhm\n</think>\n\nyo")]
    one, other = (render(chatml(channels), to_examples(row, "x")[0]) for row in rows)
    assert one == other
    assert chatml(channels).decode(one[1]).startswith("<|im_start|>analysis\nhm<|im_end|>")


@pytest.mark.parametrize("content", ["<think>\n\n</think>\n\nyo", "yo"])
def test_an_empty_block_is_not_written_twice(content):
    (example,) = to_examples(answered(content), "x")
    prompt, answer = render(tokenizer("smollm3"), example, {"enable_thinking": False})
    assert tokenizer("smollm3").decode(prompt + answer).count("<think>") == 1


@pytest.mark.parametrize(
    ("end", "trained"),
    [
        ("<|im_end|>\n<|endoftext|>", "yo<|im_end|>"),  # Phi-3
        ("<|im_end|>", "yo<|im_end|>"),
        ("<|im_start|><|im_end|>", "yo<|im_start|><|im_end|>"),  # Command R7B closes twice
    ],
)
@pytest.mark.parametrize("eos", ["<|im_end|>", "<|endoftext|>"])
def test_an_answer_ends_where_its_turn_ends(end, trained, eos):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% if m.role == 'user' %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}"
        "<|im_start|>assistant\n{% else %}" + end + "{% endif %}"
    )
    made = tokenizer(FAMILIES["qwen3"]._replace(template=template, eos=eos))
    _, answer = render(made, to_examples(answered("yo"), "x")[0])
    assert made.decode(answer) == trained
    assert template_ends(made) == {answer[-1]}


@pytest.mark.parametrize("name", ["qwen3", OPENS, "llama-3.1-instruct", "gpt2"])
def test_an_answer_of_thinking_alone_is_empty(name):
    with pytest.raises(DataError, match="all of it is thinking"):
        rendered(name, answered("<think>\nhm\n</think>"))
