"""The Modelfile of a student for Ollama: its file, its chat template and its end tokens.

Ollama does not read the Jinja templates of Hugging Face; it has another template language.  What a
template writes around the content of each role is found by rendering a few conversations, and is
compared with the template on others.  A template that is not such a row of turns is refused: a
model that reads another template than it was trained with writes worse, without an error.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from llmdistill.errors import DataError, ModelError
from llmdistill.models.chat import ChatTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]

ROLES = ("system", "user", "assistant")
SYSTEM, USER, ANSWER, NEXT = "Be brief.", "Name a colour.", "Blue.", "And a bird?"


@dataclasses.dataclass(frozen=True)
class Turns:
    """What a chat template writes before and after the content of each role.

    `opening` opens the turn of the assistant.  `default_system` is the system message of a
    conversation that has none.
    """

    around: Mapping[str, tuple[str, str]]
    opening: str
    default_system: str = ""

    def text(self, messages: Sequence[Message]) -> str:
        """Return a conversation with the turn of the assistant open."""
        if self.default_system and messages[0]["role"] != "system":
            messages = [_message("system", self.default_system), *messages]
        turns = [message["content"].join(self.around[message["role"]]) for message in messages]
        return "".join(turns) + self.opening


def modelfile(file: str, tokenizer: PreTrainedTokenizerBase, ends: Sequence[str]) -> str:
    """Return the Modelfile of a GGUF file in the same folder.

    `ends` are the texts of the tokens that end a response.  Raises ModelError for a chat template
    that Ollama's language cannot write in this way.
    """
    turns = turns_of(tokenizer)
    lines = [f"FROM ./{file}", f'TEMPLATE """{_go(turns)}"""']
    if turns.default_system:
        lines.append(f'SYSTEM """{turns.default_system}"""')
    lines += [f'PARAMETER stop "{end}"' for end in ends]
    return "\n".join(lines) + "\n"


def turns_of(tokenizer: PreTrainedTokenizerBase) -> Turns:
    """Return how the chat template of a tokenizer writes turns.

    Raises ModelError if it does not write one turn after the other.
    """
    if tokenizer.chat_template is None:
        raise _unknown(tokenizer, "it has no chat template")
    if "strftime_now" in str(tokenizer.chat_template):
        raise _unknown(tokenizer, "its chat template writes today's date")
    try:
        found = _read(tokenizer)
        for messages in _conversations():
            if found.text(messages) != _rendered(tokenizer, messages):
                raise _unknown(tokenizer, "its chat template is not a row of equal turns")
    except DataError as error:
        raise _unknown(tokenizer, str(error)) from error
    texts = [
        found.opening,
        found.default_system,
        *(t for pair in found.around.values() for t in pair),
    ]
    if any(mark in text for text in texts for mark in ("{{", '"""')):
        raise _unknown(tokenizer, "its chat template writes marks of Ollama's own language")
    return found


def _read(tokenizer: PreTrainedTokenizerBase) -> Turns:
    """Read the turns from renderings of which each has one more part than the one before."""
    start = [_message("system", SYSTEM), _message("user", USER)]
    asked = _rendered(tokenizer, start, opens=False)
    opened = _rendered(tokenizer, start)
    answered = _rendered(tokenizer, [*start, _message("assistant", ANSWER)], opens=False)
    more = [*start, _message("assistant", ANSWER), _message("user", NEXT)]
    longest = _rendered(tokenizer, more, opens=False)
    after_user, after_answer = asked.rpartition(USER)[2], answered.rpartition(ANSWER)[2]
    before_answer = _between(longest, USER, ANSWER).removeprefix(after_user)
    before_user = _between(longest, ANSWER, NEXT).removeprefix(after_answer)
    around = {
        "system": (
            asked.partition(SYSTEM)[0],
            _between(asked, SYSTEM, USER).removesuffix(before_user),
        ),
        "user": (before_user, after_user),
        "assistant": (before_answer, after_answer),
    }
    turns = Turns(around, opened.removeprefix(asked))
    # Without a system message, what is before the first turn can be a default one.
    before, after = around["system"]
    alone = _rendered(tokenizer, start[1:])
    default = alone.removesuffix(turns.text(start[1:])).removeprefix(before).removesuffix(after)
    return dataclasses.replace(turns, default_system=default)


def _conversations() -> list[list[Message]]:
    """Return conversations on which the turns are compared with the template."""
    user, answer = _message("user", "Why is the sea blue?"), _message("assistant", "It is deep.")
    talk = [user, answer, _message("user", "Thanks."), _message("assistant", "Bye."), user]
    return [
        [user],
        talk,
        [_message("system", "Rhyme."), user],
        [_message("system", "Rhyme."), *talk],
    ]


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, opens: bool = True
) -> str:
    """Return a conversation without the start token that llama.cpp writes before each text."""
    text = ChatTemplate(tokenizer).text(messages, opens=opens)
    if tokenizer("a")["input_ids"][0] != tokenizer.bos_token_id:
        return text
    if not text.startswith(tokenizer.bos_token):
        raise _unknown(tokenizer, "its chat template does not begin with the start token")
    return text.removeprefix(tokenizer.bos_token)


def _between(text: str, first: str, second: str) -> str:
    return text.partition(first)[2].partition(second)[0]


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _go(turns: Turns) -> str:
    """Return the turns in the language of Ollama's templates, which is Go's."""
    parts = []
    for number, role in enumerate(ROLES):
        before, after = turns.around[role]
        word = "else if" if number else "if"
        parts.append(f'{{{{ {word} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}')
    body = "".join(parts)
    return f"{{{{ range .Messages }}}}{body}{{{{ end }}}}{{{{ end }}}}{turns.opening}"


def _unknown(tokenizer: PreTrainedTokenizerBase, reason: str) -> ModelError:
    name = os.path.basename(str(tokenizer.name_or_path)) or "this tokenizer"
    return ModelError(
        f"cannot write a Modelfile for '{name}': {reason}. Export the format gguf, and write the "
        "TEMPLATE of the Modelfile by hand (https://docs.ollama.com/modelfile), or take it from a "
        "model of the same family in Ollama: ollama show MODEL."
    )
