"""The prompts that a teacher reads.

They are as short as possible, because small teachers follow short prompts better.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmdistill.instruct.parse import NO_INPUT, one_line, write_task
from llmdistill.instruct.tasks import Task


def task_list(examples: Sequence[Task], count: int) -> str:
    """Return a prompt that asks to continue a list of tasks up to number `count`.

    Taori et al. 2023, Alpaca.
    """
    listed = "".join(write_task(i + 1, task) for i, task in enumerate(examples))
    new = count - len(examples)
    return (
        f"Here is a list of tasks that people gave to a text assistant. Write "
        f"{'one more task' if new == 1 else f'{new} more tasks'} in exactly this form.\n"
        "- Each task has another topic and another verb than those before it.\n"
        "- Mix questions with requests, easy with hard, short with long.\n"
        "- A program that reads and writes text can do it: nothing to see, hear, open or visit.\n"
        "- The instruction is one or two sentences in the language of the tasks below.\n"
        f"- The input is a real example of at most 100 words, or {NO_INPUT} where none is needed.\n"
        "- The output is a correct answer of at most 100 words.\n\n"
        f"{listed}"
    )


def instruction_list(examples: Sequence[str]) -> str:
    """Return a prompt that asks to continue a list of instructions.

    Wang et al. 2023, Self-Instruct.
    """
    listed = "\n".join(f"{i + 1}. {one_line(text)}" for i, text in enumerate(examples))
    return (
        "Go on with this list of tasks for a text assistant. Each new one is different from all "
        f"before it, stands on one line and is in the same language.\n\n{listed}"
    )


def is_classification(instruction: str, examples: Sequence[Task]) -> str:
    """Return a prompt that asks whether an instruction can only be answered by a few fixed labels.

    The examples say of themselves whether they can.
    """
    shown = "\n".join(
        f"Task: {one_line(task.instruction)}\nFixed answers: {'yes' if task.classifies else 'no'}"
        for task in examples
    )
    return (
        "Can each answer to the task only be one of a few fixed choices? Say yes or no.\n\n"
        f"{shown}\nTask: {one_line(instruction)}\nFixed answers:"
    )


def instance(instruction: str, *, output_first: bool, count: int = 1) -> str:
    """Return a prompt that asks for inputs and their outputs, at most `count` of them.

    For classification, use `output_first`: if the input came first, most inputs would get the same
    label (Wang et al. 2023, Self-Instruct).
    """
    fields = ("Output", "Input") if output_first else ("Input", "Output")
    first = "Choose one possible answer, then write an input that it is right for."
    plain = "Write an example input, then the right answer to it."
    several = f" Write up to {count} examples, each with another input." if count > 1 else ""
    return (
        f"Task: {instruction}\n\n{first if output_first else plain}{several} If the task needs no "
        f"input, write {NO_INPUT}. Use this form:\n{fields[0]}: ...\n{fields[1]}: ..."
    )


def rewritten(task: Task) -> str:
    """Return a prompt that asks for an answer in the teacher's own words (SDFT)."""
    return (
        f"Question:\n{task.prompt}\n\nA correct answer:\n{task.output}\n\n"
        "Answer the question in your own words. Keep every fact and the result of the answer "
        "above, and do not mention it."
    )


def harder(task: Task) -> str:
    """Return a prompt that asks for a harder variant of a task."""
    return (
        f"{task.prompt}\n\nWrite a new task from the same field as the one above that is harder: "
        "it needs one more step or one more condition. Write the task alone, in one or two "
        "sentences."
    )


def constrained(task: Task) -> str:
    """Return a prompt that asks to add a constraint to a task (WizardLM)."""
    return (
        f"{task.prompt}\n\nWrite the task above with one more constraint or requirement. Keep the "
        "rest of it, and write the task alone."
    )


def deeper(task: Task) -> str:
    """Return a prompt that asks for a task that goes deeper (WizardLM)."""
    return (
        f"{task.prompt}\n\nWrite the task above so that it asks more: the same matter, but deeper "
        "or from more sides. Write the task alone."
    )


def concrete(task: Task) -> str:
    """Return a prompt that asks to put specific things in place of general ones (WizardLM)."""
    return (
        f"{task.prompt}\n\nWrite the task above with specific names, numbers or things in place of "
        "its general words. Write the task alone."
    )


def reasoning(task: Task) -> str:
    """Return a prompt that asks for a task that needs several steps of reasoning (WizardLM)."""
    return (
        f"{task.prompt}\n\nWrite the task above so that it can only be solved in several steps of "
        "reasoning. Write the task alone."
    )


def quality(task: Task) -> str:
    """Return a prompt that asks a judge to score an answer from 1 to 10."""
    return (
        f"{_conversation(task)}\n\nAnswer:\n{task.output}\n\nHow good is the answer? Score it from "
        "1 (useless) to 10 (right, complete and clear). Reply with the number alone."
    )


def difficulty(task: Task) -> str:
    """Return a prompt that asks a judge to score the difficulty of a question from 1 to 10."""
    return (
        f"{_conversation(task)}\n\nHow difficult is this question? Score it from 1 (anybody can "
        "answer it) to 10 (few experts can). Reply with the number alone."
    )


def _conversation(task: Task) -> str:
    """Return a question as text, after the messages before it if there are any."""
    before = "".join(f"{m['role'].title()}:\n{m['content']}\n\n" for m in task.messages_before)
    return f"{before}Question:\n{task.prompt}"


def rarer(task: Task) -> str:
    """Return a prompt that asks for a rare task of the same field and difficulty (Lion)."""
    return (
        f"{task.prompt}\n\nWrite a new task from the same field and as difficult as the one above, "
        "but much less common. Write the task alone, in one or two sentences."
    )


def compared(task: Task, first: str, second: str) -> str:
    """Return a prompt that asks a referee to score two answers from 1 to 10 (Lion)."""
    return (
        f"Question:\n{task.prompt}\n\nAnswer 1:\n{first}\n\nAnswer 2:\n{second}\n\n"
        "Score each answer from 1 to 10 for being right, helpful and complete; their order and "
        "length must not matter. Reply with the two numbers alone."
    )


def alike(task: Task) -> str:
    """Return a prompt that asks for a new task of the same field and kind (Lion)."""
    return (
        f"{task.prompt}\n\nWrite a new task from the same field and of the same kind as the one "
        "above. Write the task alone, in one or two sentences."
    )
