"""What a job's log says of a mistake: the line that decides, what it means, and what to do."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from distlab.errors import UsageError
from zero import operators


@dataclass(frozen=True)
class Message:
    """A line that DeepSpeed, torch or gloo writes when this has happened, and what to do."""

    name: str
    pattern: str
    cure: str


MESSAGES = (
    Message("batch sizes", r"Check batch related parameters", "run check_config.py on the config"),
    Message("pipeline", r"ZeRO-2 and ZeRO-3 are incompatible with pipeline", "use stage 1"),
    Message(
        "unknown keys", r"Extra inputs are not permitted", "run check_config.py on the config"
    ),
    Message(
        "automatic values", r"not supported between instances of 'str' and '(int|float)'",
        'give numbers in place of "auto"',
    ),
    Message(
        "loss scale", r"Current loss scale already at minimum",
        "look for infinite or NaN losses in the data first, then use bf16",
    ),
    Message("precision", r"Type fp16 is not supported on your device", "use bf16"),
    Message(
        "operator missing", r"requires the \w+ op|Unable to JIT load the \w+ op", operators.CURE
    ),
    Message(
        "stale lock", r"file_baton\.py.* in wait|Waited on lock file",
        "delete the file lock in $TORCH_EXTENSIONS_DIR/OPERATOR",
    ),
    Message(
        "world size changed", r"checkpoint being loaded used a DP world size of \d+",
        "convert it with deepspeed.checkpoint.ds_to_universal, load with load_universal",
    ),
    Message(
        "plain backward", r"Direct calls to tensor\.backward\(\)|backward\(\) was called directly",
        "call engine.backward(loss)",
    ),
    Message(
        "parameter not gathered", r"inconsistent tensor size, expected tensor \[0\]|Size\(\[0\]\)",
        "read it within deepspeed.zero.GatheredParameters([parameter])",
    ),
    Message(
        "ranks part ways", r"collective mismatch in your code",
        "let every rank run the same modules in the same order",
    ),
    Message(
        "one rank alone", r"Timed out waiting \d+ms",
        "every rank calls save_checkpoint, and what else is collective",
    ),
)  # fmt: skip


def read_log(path: str, flag: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"{flag} {path}: {error.strerror}; give what a job wrote") from None


def found_in(log: str) -> Iterator[tuple[Message, str]]:
    """The messages in a log, each with the first line that has it and is not a traceback's code."""
    lines = [line.strip() for line in log.splitlines()]
    said = [line for line in lines if not line.startswith(("raise ", "assert "))]
    for message in MESSAGES:
        if line := next((line for line in said if re.search(message.pattern, line)), ""):
            yield message, line


def brief(line: str, most: int = 80) -> str:
    """A message without the places in its library's source, cut after `most` characters."""
    line = re.sub(r"what\(\):\s*|\[[^][]*/[^][]*\]\s*|(?<=\")/\S*site-packages/", "", line)
    line = re.sub(r"\b(?:\w+\.)+(?=\w+Exception:)", "", line)
    return line if len(line) <= most else line[:most].rsplit(" ", 1)[0] + " ..."
