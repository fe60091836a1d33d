"""A WHERE expression that somebody typed: one expression, or refused before any server sees it. Pure."""

from __future__ import annotations

import re
from typing import Final

from knockwood.errors import UsageError

_DOLLAR: Final = re.compile(r"\$(?:[A-Za-z_\x80-\U0010ffff][\w\x80-\U0010ffff]*)?\$")
_HINT: Final = "write what would stand after WHERE, as in \"id = 7 and state = 'paid'\""


def checked_expression(text: str) -> str:
    """The expression, if brackets are balanced and no statement ends in it; raises UsageError.

    It is to be put into brackets of its own: what closes them, or comments them out, is refused.
    """
    depth = position = 0
    words = False
    while position < len(text):
        letter = text[position]
        if letter.isspace():
            position += 1
            continue
        end = _skipped(text, position)
        if end is not None:
            words = words or not text.startswith(("--", "/*"), position)
            position = end
            continue
        words = True
        if letter == ";":
            raise UsageError(
                "a semicolon outside of quotes: more than one expression", where=text, hint=_HINT
            )
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth < 0:
            raise UsageError("a bracket is closed that was not opened", where=text, hint=_HINT)
        position += 1
    if depth:
        raise UsageError("a bracket is not closed", where=text, hint=_HINT)
    if not words:
        raise UsageError("no expression", hint=_HINT)
    return text


def _skipped(text: str, position: int) -> int | None:
    """Where the quoted text or comment ends that begins here; None if none does."""
    letter = text[position]
    if letter in "'\"":
        before = text[position - 1 : position] if position else ""
        escapes = (
            letter == "'"
            and before in ("e", "E")
            and not re.match(r"[\w$]", text[position - 2 : position - 1])
        )
        return _quoted(text, position, escapes)
    if text.startswith("--", position):
        end = text.find("\n", position)
        return len(text) if end < 0 else end + 1
    if text.startswith("/*", position):
        return _comment(text, position)
    match = _DOLLAR.match(text, position) if letter == "$" else None
    if match and not re.match(r"[\w$]", text[position - 1 : position] if position else ""):
        end = text.find(match[0], match.end())
        if end < 0:
            raise UsageError("a quoted text does not end", where=text, hint=_HINT)
        return end + len(match[0])
    return None


def _quoted(text: str, position: int, escapes: bool) -> int:
    quote = text[position]
    position += 1
    while position < len(text):
        if (escapes and text[position] == "\\") or text.startswith(quote * 2, position):
            position += 2
        elif text[position] == quote:
            return position + 1
        else:
            position += 1
    raise UsageError("a quoted text does not end", where=text, hint=_HINT)


def _comment(text: str, position: int) -> int:
    depth = 0
    while position < len(text):
        if text.startswith("/*", position):
            depth, position = depth + 1, position + 2
        elif text.startswith("*/", position):
            depth, position = depth - 1, position + 2
            if not depth:
                return position
        else:
            position += 1
    raise UsageError("a comment does not end", where=text, hint=_HINT)
