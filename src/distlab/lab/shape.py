"""Compare what a command prints with what the lesson shows, by shape: same lines, numbers free.

Free are numbers with their units, everything after `machine:`, the width of columns, and how often
a line of the same shape is repeated (a table has more rows at another preset).
"""

import difflib
import re

_UNIT = r"(?:[KMGTPE]?(?:B|FLOP|bit|params|tok)(?:/s)?|[nµm]?s|min|h|%)"
_DIGITS = r"\d[\d,]*\.?\d*(?:e[-+]?\d+)?"
_NONE = r"(?:nan|inf|unknown)(?!\w)|(?<!\S)—(?!\S)"  # how `distlab.display` shows what is no number
_NUMBER = re.compile(rf"(?<!\w)[-+−]?(?:{_DIGITS}|{_NONE})(?:\s?{_UNIT}(?![\w/]))?")


def shape(text: str) -> list[str]:
    """The shape of a text, a line each."""
    lines: list[str] = []
    for line in text.splitlines():
        line = _line_shape(line)
        if line and (not lines or lines[-1] != line):
            lines.append(line)
    return lines


def _line_shape(line: str) -> str:
    if line.startswith("machine:"):
        return "machine: …"
    line = _NUMBER.sub("#", line)
    line = re.sub(r"[─━]+", "─", line)
    return re.sub(r"\s+", " ", line).strip()


def difference(shown: str, printed: str) -> str:
    """What differs in shape between the lesson's output and a run's; empty where nothing does."""
    return "\n".join(
        difflib.unified_diff(shape(shown), shape(printed), "main.md", "this run", lineterm="", n=1)
    )
