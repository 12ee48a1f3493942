"""The words of a text in any language, to count and to compare."""

from __future__ import annotations

import re
import unicodedata

# Scripts without spaces between words: Thai, Lao, Myanmar, Khmer, kana and Chinese characters.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0002ffff"
)
# Marks that belong to the letter before them, such as vowel signs.
_MARKS = "".join(chr(n) for n in range(0x300, 0x10000) if unicodedata.category(chr(n))[0] == "M")
_CHARACTER = re.compile(f"[{_UNSPACED}]")
_PART = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")
_PLAIN_PART = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}_])[\w{_MARKS}])+")
CHARACTERS_OF_A_WORD = 2  # of a script without spaces, roughly


def words(text: str) -> list[str]:
    """Return the parts between white space; each character of a script without spaces is a part."""
    return _PART.findall(text)


def plain_words(text: str) -> list[str]:
    """Return the words in lower case without punctuation.

    Composed and decomposed characters are the same.  For ASCII text the words are the tokens of
    `rouge_score`.
    """
    return _PLAIN_PART.findall(unicodedata.normalize("NFC", text.lower()))


def count_words(text: str) -> int:
    """Return the number of words, where two characters of a script without spaces make one."""
    parts = words(text)
    characters = sum(bool(_CHARACTER.fullmatch(part)) for part in parts)
    return len(parts) - characters + -(-characters // CHARACTERS_OF_A_WORD)
