"""Finds out whether a JSON object has one of some keys twice: exactly, and without building the object.

Parsers take the last value or the first, without a word. Counting a name in the text is quick, and tells
of nearly every object that there is nothing to find. It is a suspicion only: the name may belong to an
object inside this one, be a value, or be written with escapes. Then the text's brackets are counted.
Time and memory grow with the text, whatever it holds.
"""

import re
from collections.abc import Iterable

# A letter or an underscore that is written as an escape.
_ESCAPED_LETTER = re.compile(rb"\\u00(?:5[fF]|[46][1-9a-fA-F]|[57][0-9aA])")
_OPENING, _CLOSING = b"{", b"}"
_BRACKETS = bytes.maketrans(b"[]", b"{}")


class UniqueKeys:
    """Names that an object may have as keys once only. They consist of letters and underscores."""

    def __init__(self, names: Iterable[str]) -> None:
        """At most eight names."""
        # A byte for each name that neither stands in JSON nor means anything in an outline.
        self._marks = {name: bytes((mark,)) for mark, name in enumerate(names, start=1)}
        self._keys = {_key(name): mark for name, mark in self._marks.items()}
        self._irrelevant = bytes(set(range(256)) - set(b'"{}[]:,') - set(b"".join(self._marks.values())))
        self._escapes = {
            f"\\u00{digits}".encode(): letter.encode()
            for letter in sorted(set("".join(self._marks)))
            for digits in {f"{ord(letter):02x}", f"{ord(letter):02X}"}
        }

    def may_repeat(self, text: bytes) -> bool:
        """Tell whether a name stands in the text twice, at whatever place, or may be hidden in it."""
        if max(map(text.count, self._keys)) > 1:
            return True
        return b"\\u00" in text and _ESCAPED_LETTER.search(text) is not None

    def repeated(self, text: bytes) -> str | None:
        """Return a name that the object has as a key more than once; None if it has none.

        text: the object as JSON, known to be right.
        """
        outline = self._outline(text)
        for name, mark in self._marks.items():
            if outline.count(mark) > 1 and _is_own_key_twice(outline, mark + b":"):
                return name
        return None

    def _outline(self, text: bytes) -> bytes:
        """Return the punctuation outside of texts, and a mark for each text that is one of our names."""
        text = text.replace(b"\\\\", b"//")  # whatever backslash is left begins an escape
        if _ESCAPED_LETTER.search(text):
            for escape, letter in self._escapes.items():
                text = text.replace(escape, letter)
        text = text.replace(b'\\"', b"//")  # whatever quote is left begins or ends a text
        for key, mark in self._keys.items():
            text = text.replace(key, mark)
        text = text.translate(_BRACKETS, self._irrelevant)
        text = text.replace(b'""', b"")  # many of them; whether anything else stands in a text stays as it is
        return b"".join(text.split(b'"')[::2])


def _key(name: str) -> bytes:
    return f'"{name}"'.encode()


def _is_own_key_twice(outline: bytes, key: bytes) -> bool:
    depth = found = 0
    for before in outline.split(key)[:-1]:
        depth += before.count(_OPENING) - before.count(_CLOSING)
        found += depth == 1
        if found > 1:
            return True
    return False
