"""Read the lessons: every command of README.md and of each chapter's main.md, and what it needs.

A lesson's fenced `bash` blocks are the truth about how things run; `lab run`, `lab list`, the tests
and the chapter table are all derived from what this module reads. After the word bash, a block's
info string says what the block needs:

    env=vllm           the environment it runs in (default core)
    gpus=2             GPUs it cannot do without
    nodes=2            run on each node of a virtual cluster, as on so many machines
    slurm              run once, on the head of a cluster (of nodes=…, else 2) with a real Slurm
    background         a server that the later blocks of its section use; with
    ready=URL          the address that answers 200 when the server is ready
    exit=2             the status it is meant to end with (default 0)
    record=NAME        `lab record` keeps its run as results/NAME.json
    norun              no test can run it; its first line is a comment with the reason

An `output` block right after it shows a real run. `output free=sample,verdict` says that of lines
beginning with `sample: ` and `verdict: ` what follows is another on each machine or at each preset;
it stands beside the output so that a reader of the lesson's source knows what is compared.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

from distlab.errors import RunError, UsageError
from distlab.files import repo_root

SCRIPT = re.compile(r"chapter\d\d-[\w-]+/(?:code|exercises)/[\w/-]+\.(?:py|sh)")
RANKS = re.compile(r"--nproc[_-]per[_-]node[= ](\d+)")
_FLAGS = {"background", "norun", "slurm"}
_SETTINGS = {"env", "gpus", "nodes", "ready", "exit", "record"}
_COUNTS = ("gpus", "nodes", "exit")
_SLURM_NODES = 2


@dataclass(frozen=True)
class Block:
    """One fenced bash block of a lesson."""

    lesson: Path
    line: int  # of its opening fence, from 1
    section: int  # the lesson's heading that it stands under, counted from 0
    text: str
    env: str = "core"
    gpus: int = 0
    nodes: int = 0
    slurm: bool = False
    background: bool = False
    ready: str | None = None
    exit: int = 0
    record: str | None = None
    norun: bool = False
    output: str | None = None
    free: tuple[str, ...] = ()  # the words that begin lines of the output which may differ
    output_lines: tuple[int, int] | None = None  # of the output's text in the lesson, end exclusive

    @property
    def id(self) -> str:
        return f"{self.lesson.relative_to(repo_root())}:{self.line}"

    @property
    def scripts(self) -> list[str]:
        """The chapter scripts that it runs, as paths from the repository's root."""
        return list(dict.fromkeys(SCRIPT.findall(self.text)))

    @property
    def ranks(self) -> int:
        """The most processes that one of its torchrun lines starts on a node."""
        return max([1, *(int(count) for count in RANKS.findall(self.text))])

    @property
    def reason(self) -> str:
        """Why no test can run it, for a `norun` block."""
        return self.text.splitlines()[0].lstrip("# ") if self.text else ""


@dataclass(frozen=True)
class Chapter:
    """One chapter's folder."""

    number: int
    folder: Path
    title: str
    written: bool = False

    @property
    def lesson(self) -> Path:
        return self.folder / "main.md"

    def blocks(self) -> list[Block]:
        return read_blocks(self.lesson) if self.written else []

    def records(self) -> list[Path]:
        """The lesson's own records; NAME@GPU.json are other machines' (scripts/gpu_check.sh)."""
        results = self.folder / "results"
        return [path for path in sorted(results.glob("*.json")) if "@" not in path.stem]

    def scripts(self) -> list[Path]:
        """The runnable scripts in code/: Python and shell, not those whose names begin with `_`."""
        code = self.folder / "code"
        return sorted(
            path
            for pattern in ("*.py", "*.sh")
            for path in code.glob(pattern)
            if not path.name.startswith("_")
        )


TITLES = {
    1: ("introduction", "Introduction to modern distributed AI"),
    2: ("gpu-hardware-parallelism", "GPU hardware, networking and parallelism"),
    3: ("ddp", "Distributed data parallel training"),
    4: ("fsdp", "Fully sharded data parallel training"),
    5: ("deepspeed-zero", "DeepSpeed and ZeRO"),
    6: ("vllm", "Inference with vLLM"),
    7: ("sglang", "SGLang and advanced inference"),
    8: ("kubernetes", "Kubernetes for AI"),
    9: ("serving-stack", "A production serving stack"),
    10: ("benchmarking", "Benchmarking distributed systems"),
    11: ("federated-edge", "Federated learning and the edge"),
}


def chapters() -> list[Chapter]:
    """All eleven chapters; `written` where the folder has its main.md."""
    found = []
    for number, (slug, title) in TITLES.items():
        folder = repo_root() / f"chapter{number:02d}-{slug}"
        found.append(Chapter(number, folder, title, (folder / "main.md").is_file()))
    return found


def chapter(wanted: str) -> Chapter:
    """The chapter `3`, `03`, `chapter03-ddp` or `ddp`.

    Raises `UsageError` when there is none, or when it is not written yet.
    """
    for candidate in chapters():
        slug = candidate.folder.name
        if wanted.rstrip("/") in (
            str(candidate.number),
            f"{candidate.number:02d}",
            slug,
            slug[10:],
        ):
            if not candidate.written:
                ready = ", ".join(str(c.number) for c in chapters() if c.written)
                raise UsageError(f"chapter {candidate.number} is not written yet; ready: {ready}")
            return candidate
    raise UsageError(f"there is no chapter {wanted!r}; use a number from 1 to {len(TITLES)}")


def all_blocks() -> list[Block]:
    """Every block of README.md, of the tour and of each written chapter, in reading order."""
    lessons = [repo_root() / "README.md", repo_root() / "tour.md"]
    lessons += [c.lesson for c in chapters() if c.written]
    return [block for lesson in lessons if lesson.is_file() for block in read_blocks(lesson)]


def read_blocks(lesson: Path) -> list[Block]:
    """The bash blocks of one lesson. Raises `RunError` naming the line of a malformed one."""
    tokens = MarkdownIt().parse(lesson.read_text(encoding="utf-8"))
    return list(_blocks(lesson, tokens))


def _blocks(lesson: Path, tokens: list[Token]) -> Iterator[Block]:
    section = 0
    for index, token in enumerate(tokens):
        section += token.type == "heading_open"
        words = token.info.split() if token.type == "fence" else []
        if not words or words[0] != "bash" or token.map is None:
            continue
        line = token.map[0] + 1
        settings = _settings(lesson, line, words[1:])
        following = tokens[index + 1] if index + 1 < len(tokens) else None
        shown = following.info.split() if following and following.type == "fence" else []
        if following and shown[:1] == ["output"]:
            assert following.map is not None
            settings["output"] = following.content
            settings["free"] = _free(lesson, following.map[0] + 1, shown[1:])
            settings["output_lines"] = (following.map[0] + 1, following.map[1] - 1)
        block = Block(lesson, line, section, token.content, **settings)
        if block.norun and not (block.text.startswith("#") and block.reason):
            raise RunError(f"{lesson}:{line}: a norun block begins with a comment: the reason")
        if block.background and not block.ready:
            raise RunError(f"{lesson}:{line}: a background block says ready=URL")
        yield block


def _free(lesson: Path, line: int, words: list[str]) -> tuple[str, ...]:
    """The words of `output free=WORD,WORD`."""
    if any(not word.startswith("free=") for word in words):
        raise RunError(
            f"{lesson}:{line}: unknown word after output: {' '.join(words)}; known: free=…"
        )
    return tuple(each for word in words for each in word.removeprefix("free=").split(","))


def _settings(lesson: Path, line: int, words: list[str]) -> dict:
    settings: dict = {}
    for word in words:
        key, has_value, value = word.partition("=")
        if key not in (_SETTINGS if has_value else _FLAGS):
            known = ", ".join(sorted(_FLAGS) + [f"{name}=…" for name in sorted(_SETTINGS)])
            raise RunError(f"{lesson}:{line}: unknown word {word!r}; known: {known}")
        if key in _COUNTS and not value.isdecimal():
            raise RunError(f"{lesson}:{line}: {word} is no number")
        settings[key] = (int(value) if key in _COUNTS else value) if has_value else True
    if settings.get("slurm"):
        settings.setdefault("nodes", _SLURM_NODES)
    return settings
