"""Read tasks from what a teacher wrote.  Incomplete items are dropped.

The teacher is asked for items of this form:

###
4. Instruction: ...
4. Input:
<noinput>
4. Output:
...

Chat models change the layout: blank lines, bold names, other marks, a fence around the list, or a
remark at its end.  Such replies are read as well.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from llmdistill.instruct.tasks import Task

BETWEEN = "###"
NO_INPUT = "<noinput>"
UNPARSABLE, TRUNCATED = "unparsable", "truncated"
FIELDS = ("Instruction", "Input", "Output")

# Runs of decoration are bounded, because a teacher that loops can write thousands of signs.
_DECORATION = r"[ \t*_`>#-]{0,12}"  # of Markdown, around a number or a name
_NUMBER = r"(?P<number>\d{1,4})[.):、．]?"
_NAMES = "|".join(FIELDS)
# The name of a field at the start of a line: "4. Input:", "**Input**:", "### 4) Input 4:".
_FIELD = re.compile(
    rf"^{_DECORATION}(?:{_NUMBER})?{_DECORATION}(?P<name>{_NAMES}|(?<=[\d.):] )(?i:{_NAMES}))\b"
    rf"(?:[ \t]{{0,4}}\d{{1,4}})?{_DECORATION}[:：][*_`]*"
    # In a heading or in bold type, the name may be alone on its line.
    rf"|^[ \t]{{0,8}}(?:#{{1,6}}[ \t]*\**|\*\*)(?P<alone>{_NAMES})\**[ \t]*$",
    re.MULTILINE,
)
# A line that only marks the start of an item: "###", "### 5", "**Task 5**", "### Task 5: Birds".
_MARK = re.compile(
    r"^[ \t]{0,8}(?:#{1,6}[ \t]*(?:\d{1,4}[.):]?)?"
    r"|(?:#{1,6}[ \t]*)?\**(?:Task|Item|Example)[ \t]*\d{1,4}[.:]?\**:?"
    r"|#{1,6}[ \t]*\**(?:Task|Item|Example)[ \t]*\d{1,4}\b.{0,80})[ \t]*$",
    re.MULTILINE | re.IGNORECASE,
)
_NUMBER_LINE = re.compile(r"[ \t]{0,8}\**\d{1,4}[.):]\**[ \t]*")
_RULE = re.compile(r"^[ \t]*(?:-{3,}|\*{3,}|_{3,}|={3,})[ \t]*$")
_FENCE = re.compile(r"^[ \t]*(?:```|~~~).*$", re.MULTILINE)
_EMPTY = re.compile(
    r"""(?:(?:no|no\ additional)[ _-]?inputs?(?:\ (?:is\ )?(?:needed|required|provided|given))?
    |(?:none|nothing)(?:\ (?:is\ )?(?:needed|required|provided|given|necessary))?
    |not\ (?:needed|required|provided|given|necessary|applicable)
    |null|nil|n/?a|empty|keine?(?:\ (?:eingabe|input))?|aucune?|pas\ d['\u2019]entrée|sin\ entrada
    |ningun[ao]|nessuno|нет(?:\ ввода)?|无(?:输入)?|入力なし|なし|[-\u2013\u2014]+)?""",
    re.IGNORECASE | re.VERBOSE,
)
_AROUND = "<(\\[{\"'`*_>)]}.。 \t\n"  # around such a word
LONGEST_EMPTY = 60  # characters of an input that says that there is none
_TASK = r"(?:tasks?|instructions?|prompts?|questions?|versions?|varia(?:nt|tion)s?|examples?)"
# The last paragraph of a list, if it is about the list.
_REMARK = re.compile(
    r"(?:let me know if you(?:['\u2019]d)?(?: would)?(?: need| want| like)?(?: to (?:see|have))?"
    rf"(?: any| some)? (?:more|another)(?: {_TASK}| one| of these)?"
    rf"|(?:these|those|the above|here are)(?: \d+)?(?: new| example)* {_TASK}\b[^:\n]*"
    rf"|i hope (?:these|this) (?:{_TASK}|list|helps?)\b[^:\n]*"
    r"|would you like (?:some more|more|another|me to)\b[^:\n]*"
    rf"|\(?this (?:new |harder |revised )?{_TASK}\b[^:\n]*"
    r"|[*_]{0,2}(?:explanation|note|reasoning|changes?)(?:[*_]{0,2}:|:[*_]{0,2}).*)[.!?)*_]*",
    re.IGNORECASE,
)
# A line before the text that was asked for: a greeting, or what it announces.
_GREETING = r"(?:sure|certainly|of course|absolutely|okay|ok|great|klar|gerne|natürlich|bien sûr"
_GREETING += r"|claro|por supuesto|certo|конечно|好的|当然|はい|もちろん|承知しました)"
_ANNOUNCED = (
    r"(?:here(?:['\u2019]s| is| are)\b[^:\n]{0,60}\b(?:task|instruction|prompt|question|version"
    r"|variant|variation|example|one)s?\b[^:\n]{0,40}"
    r"|(?:hier (?:ist|sind)|voici|aquí|ecco|вот|以下)[^:：\n]{0,60})"
)
_PREFACE = re.compile(
    rf"(?:{_GREETING}[!,.:：！，。][^:：\n]{{0,80}}|{_ANNOUNCED})[:：!！]?|{_GREETING}[:：!！]",
    re.IGNORECASE,
)
_OPENING = re.compile(rf"(?:{_GREETING}[!,.]\s*)?{_ANNOUNCED}[:：]\s*", re.IGNORECASE)
_LABEL = re.compile(
    rf"{_DECORATION}(?:(?:your|the|my)\s+)?(?:(?:new|harder|rarer|rare|similar|revised|rewritten"
    rf"|evolved)\s+)*(?:task|instruction|prompt|question|aufgabe|frage|tâche|tarea|pregunta|compito"
    rf"|задание|задача|вопрос|任务|问题|タスク|質問)(?:\s+\d{{1,4}})?(?:\s+is)?{_DECORATION}"
    rf"(?:[:：]{_DECORATION}\n*|[ \t]*\n+)",
    re.IGNORECASE,
)
_QUOTES = (
    ('"', '"'),
    ("\u201c", "\u201d"),
    ("\u201e", "\u201c"),
    ("«", "»"),
    ("「", "」"),
    ("**", "**"),
)
# The number of an item in a list: "9.", "**9.**", "### 9)", "Task 9:", "9 - ".
_ITEM = re.compile(
    r"^(?P<indent>[ \t]{0,20})(?:#{1,6}[ \t]*)?[*_]{0,3}(?:Task[ \t]+)?(?P<number>\d{1,4})"
    r"(?:(?P<sign>[.):、．])[*_]{0,3}(?=\s|[^\x00-\x7f]|[A-Z\"'(])|[ \t]+[-\u2013](?=\s))",
    re.MULTILINE,
)
_BULLET = re.compile(r"^[-*\u2022][ \t]+", re.MULTILINE)
SKIPPED = 2  # numbers that a numbered list may leave out


class Parsed(NamedTuple):
    """Tasks of a text, and the number of items that were dropped, by reason."""

    tasks: list[Task]
    dropped: Mapping[str, int] = {}


def write_task(number: int, task: Task) -> str:
    """Return a task as item `number` of a list."""
    return (
        f"{BETWEEN}\n{number}. Instruction: {one_line(task.instruction)}\n{number}. Input:\n"
        f"{task.input or NO_INPUT}\n{number}. Output:\n{task.output}\n"
    )


def one_line(instruction: str) -> str:
    """Return an instruction as one line of a list, without a colon at its end."""
    return " ".join(instruction.split()).rstrip(":")


def parse_tasks(text: str, *, truncated: bool = False) -> Parsed:
    """Return the tasks of a list, in order.

    An item is a task if it has each field once, in the order of `FIELDS`, and its instruction is
    not empty.  If the text is `truncated`, the last item is dropped as incomplete.
    """
    items = _items(normalised(text))
    dropped = Counter({TRUNCATED: 1} if truncated and items else {})
    whole = items[:-1] if truncated else items
    found = [_task(item, is_last=item is items[-1]) for item in whole]
    tasks = [task for task in found if task is not None]
    return Parsed(tasks, dropped + Counter({UNPARSABLE: len(found) - len(tasks)}))


def unfenced(text: str) -> str:
    """Return the text without a fence around all of it."""
    lines = text.strip().split("\n")
    is_fenced = len(lines) > 2 and _FENCE.match(lines[0]) and _FENCE.fullmatch(lines[-1])
    inner = "\n".join(lines[1:-1])
    return inner.strip() if is_fenced and not _FENCE.search(inner) else text


def parse_question(text: str) -> Task | None:
    """Return the instruction and input of the first item of a text, without an output.

    Returns None if there is no instruction, or if it holds a field that could not be read.
    """
    fields: dict[str, str] = {}
    text = normalised(text)
    found = list(_FIELD.finditer(text))
    for field, value in zip(found, _values(text, found), strict=True):
        name, before = _name(field), fields.get("Instruction", "")
        if name == "Instruction" and (_is_preface(before) or before.isdigit()):
            fields = {}
        elif name == "Instruction" and before and "Input" in fields:
            break  # the next item
        # The first value counts that is not empty: some teachers repeat the field that they
        # continue.
        fields[name] = fields.get(name) or value
    instruction = re.sub(r"^\d{1,4}[.)]\s+", "", fields.get("Instruction", ""))
    if re.search(rf"(?:{'|'.join(FIELDS)})\**[:：]|{NO_INPUT}", instruction):
        return None
    return _made(instruction, fields.get("Input", ""), "")


def parse_instances(text: str) -> list[tuple[str, str]] | None:
    """Return the inputs and outputs of a reply with `Input:` and `Output:` in either order.

    An output alone has no input.  Returns None if a field is missing or repeated.
    """
    text = normalised(text)
    found = [field for field in _FIELD.finditer(text) if _name(field) != "Instruction"]
    names, values = [_name(field) for field in found], _values(text, found)
    if names and set(names) == {"Output"}:
        return [("", value) for value in values]
    if not names or len(names) % 2 or any(a == b for a, b in pairwise(names)):
        return None
    pairs = list(zip(values[::2], values[1::2], strict=True))
    ordered = pairs if names[0] == "Input" else [(given, output) for output, given in pairs]
    return [("" if is_no_input(given) else given, output) for given, output in ordered]


def parse_list(text: str) -> list[str]:
    """Return the items of a numbered list.  An item may have several lines, and lists inside it."""
    text = normalised(text)
    marks = list(_ITEM.finditer(text))
    if not marks:
        return []
    chosen = [marks[0]]
    numbers = [int(mark["number"]) for mark in marks]
    # A server that was not told where the list begins counts again from 1.
    number = numbers[0] if numbers[0] + 1 in numbers or 2 not in numbers else 1
    for place, (mark, found) in enumerate(zip(marks, numbers, strict=True)):
        later = {
            int(one["number"]) for one in marks[place + 1 :] if one["sign"] == marks[0]["sign"]
        }
        # Other numbers, and other signs while the own ones go on, belong to a list in the item.
        if place == 0 or (mark["sign"] != marks[0]["sign"] and number + 1 in later):
            continue
        if (
            number < found <= number + 1 + SKIPPED
            and len(mark["indent"]) <= len(chosen[0]["indent"]) + 1
        ):
            chosen.append(mark)
            number = found
    items = _values(text, chosen)
    if len(items) == 1 and len(bullets := _BULLET.split(items[0])) > 2:
        items = [_value(bullet, is_last=False) for bullet in bullets[1:]]
    lines = ["\n".join(line.strip() for line in item.splitlines()) for item in items]
    return [unwrapped(item) for item in lines if item]


def asked_text(text: str) -> str:
    """Return a task that a teacher wrote, without preface, label, quotes and closing remark."""
    text = _without_remark(normalised(text).strip())
    first, _, rest = text.partition("\n")
    if rest.strip() and _is_preface(first):
        text = rest.strip()
    text = unwrapped(unfenced(text))
    if (opening := _OPENING.match(text)) and text[opening.end() :].strip():
        text = text[opening.end() :].strip()
    if (label := _LABEL.match(text)) and text[label.end() :].strip():
        text = text[label.end() :].strip()
    if len(_ITEM.findall(text)) == 1:  # the only item of a list
        text = re.sub(r"^\d{1,4}[.)]\s+", "", text)
    return unwrapped(text)


def after_start(start: str, text: str) -> str:
    """Return the part of a server's reply after `start`, the text that it should continue.

    A server is not told how its reply should start.  The model may continue from there, in
    which case the first numbered item has a later number.  Or it repeats the start, perhaps after a
    greeting, or counts again from 1; then everything up to and including that item's mark is cut.
    """
    last = re.match(r"(\d+)[.)]? ?(.*)", start.rpartition("\n")[2])
    if last is None:
        return text
    text, number = normalised(text), int(last[1])
    if not last[2]:
        marks = list(_ITEM.finditer(text))
        numbers = [int(mark["number"]) for mark in marks]
        goes_on = number + 1 in numbers and number not in numbers
        is_start = bool(marks) and numbers[0] <= number and not goes_on
        return text[marks[0].end() :] if is_start else text
    name = last[2].rstrip(":")
    fields = list(_FIELD.finditer(text))
    # Other fields before the first one of this name belong to the item that was begun.
    is_start = bool(fields) and _name(fields[0]) == name and int(fields[0]["number"] or 0) <= number
    return text[fields[0].end() :] if is_start else text


def is_no_input(text: str) -> bool:
    """Whether the text of an input says that there is none."""
    return len(text) <= LONGEST_EMPTY and _EMPTY.fullmatch(text.strip(_AROUND)) is not None


def normalised(text: str) -> str:
    """Return the text with the line ends of this machine's text files."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def unwrapped(text: str) -> str:
    """Return the text without quotation marks or bold type around all of it."""
    for opening, closing in _QUOTES:
        inner = text[len(opening) : -len(closing)]
        is_around = text.startswith(opening) and text.endswith(closing) and len(text) > 2
        if is_around and opening not in inner and closing not in inner:
            return inner.strip()
    return text


def _name(field: re.Match[str]) -> str:
    """Return the name of a field, as in `FIELDS`."""
    return str(field["name"] or field["alone"]).capitalize()


def _items(text: str) -> list[str]:
    """Return the items of a list, each with its fields."""
    fields = list(_FIELD.finditer(text))
    starts = [field for field in fields if _name(field) == "Instruction"]
    # Within a numbered list, a line "Instruction:" belongs to an answer.
    if sum(start["number"] is not None for start in starts) > 1:
        starts = [start for start in starts if start["number"] is not None]
    places: list[int] = []
    opened = None  # number of an item that begins with another field
    for field in fields:
        before = _line_before(text, field.start())
        if _MARK.search(before) or _NUMBER_LINE.fullmatch(before):
            opened = field["number"] if _name(field) != "Instruction" else None
            places.append(field.start())
        elif field in starts and (opened is None or field["number"] != opened):
            places.append(field.start())
    parts = [text[a:b] for a, b in pairwise([0, *places, len(text)])]
    return [part for part in parts if not all(map(_is_frame, part.split("\n")))]


def _is_frame(line: str) -> bool:
    """Whether a line belongs to no item."""
    return _is_of_list(line) or bool(_NUMBER_LINE.fullmatch(line) or _FENCE.match(line))


def _line_before(text: str, place: int) -> str:
    """Return the last line before a place that is not blank."""
    return text[:place].rstrip().rpartition("\n")[2]


def _task(item: str, *, is_last: bool) -> Task | None:
    """Return an item as a task, or None if a field is missing, repeated or out of order."""
    for fields in _candidates(item):
        if tuple(map(_name, fields)) == FIELDS:
            values = _values(item, fields, is_last=is_last)
            return _made(*values)
    return None


def _candidates(item: str) -> Iterator[Sequence[re.Match[str]]]:
    """Yield the lines that may be the fields of an item, the surest ones first."""
    fields = list(_FIELD.finditer(item))
    if fields:
        yield [field for field in fields if field["number"] == fields[0]["number"]]
        yield [field for field in fields if field["number"]]
        yield fields


def _values(text: str, marks: Sequence[re.Match[str]], *, is_last: bool = True) -> list[str]:
    """Return the text after each mark up to the next one; a list may end after the last one."""
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    return [
        _value(text[mark.end() : end], is_last=is_last and mark is marks[-1])
        for mark, end in zip(marks, ends, strict=False)
    ]


def _value(text: str, *, is_last: bool) -> str:
    """Return the text of a field without what belongs to the list around it."""
    text = _without_remark(text.strip()) if is_last else text.strip()
    lines = text.split("\n")
    while lines and (_is_of_list(lines[-1]) or _is_open_fence(lines)):
        lines.pop()
    if not is_last and len(lines) > 1 and _NUMBER_LINE.fullmatch(lines[-1]):
        lines.pop()  # the number of the next item
    value = "\n".join(lines).strip()
    return value.removesuffix("**").rstrip() if value.count("**") % 2 else value


def _is_of_list(line: str) -> bool:
    """Whether a line only separates items."""
    return not line.strip() or any(kind.fullmatch(line) for kind in (_MARK, _RULE))


def _is_open_fence(lines: Sequence[str]) -> bool:
    """Whether the last line is a fence without its other half: it closes the whole list."""
    fences = sum(_FENCE.match(line) is not None for line in lines)
    return _FENCE.match(lines[-1]) is not None and fences % 2 == 1


def _without_remark(text: str) -> str:
    """Return a text without the paragraphs at its end that are about the list."""
    lines = text.split("\n")
    while len(lines) > 1 and _is_of_list(lines[-2]):  # a blank line, a mark or a rule
        after_mark = len(lines) > 2 and not lines[-2].strip() and _MARK.fullmatch(lines[-3])
        if not after_mark and _REMARK.fullmatch(lines[-1].strip()) is None:
            break
        lines.pop()
        while len(lines) > 1 and not lines[-1].strip():
            lines.pop()
    return "\n".join(lines)


def _is_preface(text: str) -> bool:
    """Whether a line only greets, or announces what follows it."""
    return _PREFACE.fullmatch(text.strip(" *_")) is not None


def _made(instruction: str, given: str, output: str) -> Task | None:
    """Return a task, or None without an instruction; an input that says "none" becomes empty."""
    given = "" if is_no_input(given) else given
    return Task(instruction, given, output) if instruction else None
