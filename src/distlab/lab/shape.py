"""Compare what a command prints with what the lesson shows, by shape: same lines, numbers free.

Free are numbers with their units, the width of columns, how often a line of the same shape is
repeated (a table has more rows at another preset), the names of torch's operators, and what stands
after `machine: ` and `job: ` at the beginning of a line, or after a word that the lesson's output
block names (`output free=sample`). What the nodes of a cluster print at once is compared node by
node. Lines of torch's log, which depend on the reader's environment, count as not printed.
"""

import difflib
import re
from collections.abc import Sequence

from distlab.check import UNJUDGED

NODE = re.compile(r"(node\d+)\| ")
FREE = ("machine", "job")  # everywhere: what runs the command, on which machine
_LOG = re.compile(r"(?:node\d+\| )?[IWE]\d{4} \d\d:\d\d:\d\d\.\d+ ")  # W1121 11:04:35.106000
_OPERATOR = re.compile(r"\baten::\w+")
_UNJUDGED = re.compile(rf"((?:node\d+\| )?check: .* … ok) \({UNJUDGED}")
_UNIT = r"(?:[KMGTPE]?(?:B|FLOP|bit|params|tok)(?:/s)?|[nµm]?s|min|h|%)"
_DIGITS = r"\d+(?:,\d{3})*\.?\d*(?:e[-+]?\d+)?"
_NONE = r"(?:nan|inf|unknown)(?!\w)|(?<!\S)—(?!\S)"  # how `distlab.display` shows what is no number
_NUMBER = re.compile(rf"(?<!\w)[-+−]?(?:{_DIGITS}|{_NONE})(?:\s?{_UNIT}(?![\w/]))?")


def without_log(text: str) -> str:
    """`text` without the lines of torch's log, such as torchrun's advice on OMP_NUM_THREADS."""
    lines = text.splitlines(keepends=True)
    return "".join(line for line in lines if not _LOG.match(line))


def shape(text: str, free: Sequence[str] = ()) -> list[str]:
    """The shape of a text, a line each; `free` as in `difference`."""
    begins_free = re.compile(rf"((?:node\d+\| )?(?:{'|'.join([*FREE, *free])})): ")
    lines: list[str] = []
    for line in sorted(without_log(text).splitlines(), key=_node):
        line = f"{word[1]}: …" if (word := begins_free.match(line)) else _line_shape(line)
        if line and (not lines or lines[-1] != line):
            lines.append(line)
    return lines


def _node(line: str) -> str:
    """The node that printed the line, empty for a line of no node."""
    return node[1] if (node := NODE.match(line)) else ""


def _without_judgement(lines: list[str], unjudged: set[str]) -> list[str]:
    """The lines of these checks without what they say after their name and ok."""
    names = [next((name for name in unjudged if line.startswith(name)), None) for line in lines]
    return [line if name is None else name for line, name in zip(lines, names, strict=True)]


def _line_shape(line: str) -> str:
    line = _NUMBER.sub("#", _OPERATOR.sub("aten::…", line))
    line = re.sub(r"[─━]+", "─", line)
    return re.sub(r"\s+", " ", line).strip()


def difference(shown: str, printed: str, free: Sequence[str] = ()) -> str:
    """What differs in shape between the lesson's output and a run's; empty where nothing does.

    Lines that begin with a word of `free` and a colon may differ in all that follows. A check that
    the run did not judge, for its size, must be one of the lesson's and ok there.
    """
    one, other = shape(shown, free), shape(printed, free)
    unjudged = {found[1] for line in other if (found := _UNJUDGED.match(line))}
    one, other = (_without_judgement(lines, unjudged) for lines in (one, other))
    return "\n".join(difflib.unified_diff(one, other, "main.md", "this run", lineterm="", n=1))
