"""What a teacher is told.  Small teachers follow short prompts: nothing here is longer than it
must be.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmdistill.instruct.parse import NO_INPUT, write_task
from llmdistill.instruct.tasks import Task


def task_list(examples: Sequence[Task], count: int) -> str:
    """Asks to go on with a list of tasks, up to `count` of them (Alpaca)."""
    listed = "".join(write_task(i + 1, task) for i, task in enumerate(examples))
    new = count - len(examples)
    return (
        f"Here is a list of tasks that people gave to a text assistant. Write "
        f"{'one more task' if new == 1 else f'{new} more tasks'} in exactly this form.\n"
        "- Each task has another topic and another verb than those before it.\n"
        "- Mix questions with requests, easy with hard, short with long.\n"
        "- A program that reads and writes text can do it: nothing to see, hear, open or visit.\n"
        "- The instruction is one or two sentences of English.\n"
        f"- The input is a real example of at most 100 words, or {NO_INPUT} where none is needed.\n"
        "- The output is a correct answer of at most 100 words.\n\n"
        f"{listed}"
    )


def instruction_list(examples: Sequence[str]) -> str:
    """Asks to go on with a list of instructions alone (Self-Instruct)."""
    listed = "\n".join(f"{i + 1}. {text}" for i, text in enumerate(examples))
    return (
        "Go on with this list of tasks for a text assistant. Each new one is different from all "
        f"before it and stands on one line.\n\n{listed}"
    )


def is_classification(instruction: str, examples: Sequence[Task], labels: Sequence[bool]) -> str:
    """Asks whether the answers are a few fixed labels."""
    shown = "\n".join(
        f"Task: {task.instruction}\nFixed answers: {'yes' if label else 'no'}"
        for task, label in zip(examples, labels, strict=True)
    )
    return (
        "Can each answer to the task only be one of a few fixed choices? Say yes or no.\n\n"
        f"{shown}\nTask: {instruction}\nFixed answers:"
    )


def instance(instruction: str, *, output_first: bool) -> str:
    """Asks for an input and its output; where answers are labels, for the label first, so that not
    all inputs get the same one.
    """
    fields = ("Output", "Input") if output_first else ("Input", "Output")
    first = "Choose one possible answer, then write an input that it is right for."
    plain = "Write an example input, then the right answer to it."
    return (
        f"Task: {instruction}\n\n{first if output_first else plain} If the task needs no input, "
        f"write {NO_INPUT}. Use this form:\n{fields[0]}: ...\n{fields[1]}: ..."
    )


def rewritten(task: Task) -> str:
    """Asks for a given answer in the teacher's own words (SDFT)."""
    return (
        f"Question:\n{task.prompt}\n\nA correct answer:\n{task.output}\n\n"
        "Answer the question in your own words. Keep every fact and the result of the answer "
        "above, and do not mention it."
    )


def harder(task: Task) -> str:
    """Asks for a more demanding variant."""
    return (
        f"{task.prompt}\n\nWrite a new task from the same field as the one above that is harder: "
        "it needs one more step or one more condition. Write the task alone, in one or two "
        "sentences."
    )


def rarer(task: Task) -> str:
    """Asks for a task of the same field and difficulty that hardly anyone asks for (Lion)."""
    return (
        f"{task.prompt}\n\nWrite a new task from the same field and as difficult as the one above, "
        "but much less common. Write the task alone, in one or two sentences."
    )


def compared(task: Task, first: str, second: str) -> str:
    """Asks a referee for two scores (Lion)."""
    return (
        f"Question:\n{task.prompt}\n\nAnswer 1:\n{first}\n\nAnswer 2:\n{second}\n\n"
        "Score each answer from 1 to 10 for being right, helpful and complete; their order and "
        "length must not matter. Reply with the two numbers alone."
    )


def alike(task: Task) -> str:
    """Asks for another task of the same field and kind (Lion)."""
    return (
        f"{task.prompt}\n\nWrite a new task from the same field and of the same kind as the one "
        "above. Write the task alone, in one or two sentences."
    )
