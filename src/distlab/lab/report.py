"""`lab report [--recorded]`: one HTML page of what ran here, or of what the chapters recorded.

The page needs nothing beside itself: no script, no network, no file. It opens from a disk, from a
mail, and from a web server.
"""

import argparse
import tempfile
import webbrowser
from base64 import b64encode
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from distlab import record
from distlab.display import number, quantity
from distlab.errors import RunError
from distlab.files import refuse_unwritable_file, repo_root, write_text
from distlab.lab.lessons import SCRIPT, Chapter, chapters
from distlab.lab.listing import summary
from distlab.lab.running import runs_folder
from distlab.script import OneLineParser


@dataclass(frozen=True)
class Figure:
    """A drawn figure: `source` is a data URI, so that the page needs no other file."""

    title: str
    source: str


@dataclass(frozen=True)
class Entry:
    """One run as the page shows it: its record, and what is not in the record."""

    anchor: str
    script: str
    shows: str
    record: dict[str, Any]
    figures: list[Figure]

    @property
    def failed(self) -> list[dict[str, Any]]:
        return [item for item in self.record["checks"] if not item["ok"]]

    @property
    def arguments(self) -> str:
        """What its command says after the script, to tell two runs of one script apart."""
        return str(self.record["command"].partition(self.script)[2]).strip()


@dataclass(frozen=True)
class Part:
    """One chapter's runs, in the order in which its lesson has them."""

    chapter: Chapter
    entries: list[Entry]


def report(argv: list[str] | None = None) -> int:
    """Write the page and print its path; raises `RunError` where there is nothing to show."""
    args = _parse(argv)
    out = _writable(args.out)
    parts = list(read_parts(args.recorded))
    if not parts:
        raise RunError(
            "no chapter has recorded runs yet; record one: python3 scripts/lab.py record 1"
            if args.recorded
            else "nothing has run here yet; run a chapter: python3 scripts/lab.py run 1"
        )
    write_text(out, render(parts, args.recorded))
    print(f"report: {out}")
    if args.open and not webbrowser.open(out.as_uri()):
        raise RunError(f"no browser could be started here; open {out} yourself")
    return 0


def read_parts(recorded: bool) -> Iterator[Part]:
    """The chapters that have runs: those of `lab run` on this machine, or those in results/."""
    count = 0
    for one in chapters():
        folder = one.folder / "results" if recorded else runs_folder(one)
        entries = []
        for made in in_reading_order(one, newest_of_each(folder)):
            count += 1
            entries.append(entry(made, f"run-{count}"))
        if entries:
            yield Part(one, entries)


def newest_of_each(folder: Path) -> list[dict[str, Any]]:
    """The records in `folder`; of two runs of one command the later one."""
    newest: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted(folder.rglob("*.json")):
        made = record.load(path)
        key = (made["command"], path.name)  # x.json and x-2.json are two runs of one block
        if key not in newest or newest[key]["date"] <= made["date"]:
            newest[key] = made
    return list(newest.values())


def in_reading_order(one: Chapter, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """`records` as the chapter's lesson has their scripts, then by time."""
    scripts = list(dict.fromkeys(name for block in one.blocks() for name in block.scripts))
    place = {name: index for index, name in enumerate(scripts)}
    return sorted(records, key=lambda made: (place.get(_script(made), len(place)), made["date"]))


def entry(made: dict[str, Any], anchor: str) -> Entry:
    """One record made ready: its script's summary looked up, its figures drawn."""
    script = _script(made)
    path = repo_root() / script
    return Entry(anchor, script, summary(path) if path.is_file() else "", made, draw_figures(made))


def _script(made: dict[str, Any]) -> str:
    """The script that a record's command runs; for any other command, the whole command."""
    match = SCRIPT.search(made["command"])
    return match[0] if match else str(made["command"])


def draw_figures(made: dict[str, Any]) -> list[Figure]:
    """The figures of a record as SVG images.

    An image of its own keeps the ids of one drawing apart from those of the next.
    """
    if not made["figures"]:
        return []
    from distlab.figure import draw

    drawn = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figure.svg"
        for spec in made["figures"].values():
            draw(spec, path)
            data = b64encode(path.read_bytes()).decode()
            drawn.append(Figure(spec["title"], f"data:image/svg+xml;base64,{data}"))
    return drawn


def render(parts: Sequence[Part], recorded: bool) -> str:
    """The page, complete; every text from a record is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(quantity=quantity, number=number, percent=_percent, words=_words)
    entries = [item for part in parts for item in part.entries]
    records = [item.record for item in entries]
    repeated = Counter(item.script for item in entries)
    return environment.get_template("report.html").render(
        parts=parts,
        recorded=recorded,
        now=datetime.now(UTC),
        first=_moment(min(made["date"] for made in records)),
        last=_moment(max(made["date"] for made in records)),
        commits=list(dict.fromkeys(made["commit"] or "unknown" for made in records)),
        scripts=len(repeated),
        repeated={script for script, count in repeated.items() if count > 1},
        checks=sum(len(made["checks"]) for made in records),
        failures=[(item, failed) for item in entries for failed in item.failed],
        seconds=sum(made["seconds"] for made in records),
        hardware=distinct(map(hardware, records)),
        software=distinct(map(software, records)),
        hardware_of=hardware,
        software_of=software,
        moment=_moment,
        minute=timedelta(minutes=1),
    )


def hardware(made: dict[str, Any]) -> dict[str, str]:
    """The machine of a record, as the rows of a table."""
    machine = made["machine"]
    kinds = Counter((gpu["name"], gpu["memory_bytes"]) for gpu in machine["gpus"])
    gpus = [
        f"{count} × {name}" + (f", {memory / 2**30:.0f} GiB" if memory else "")
        for (name, memory), count in kinds.items()
    ]
    driver = {"GPU driver": machine["driver"]} if machine["driver"] else {}
    return {
        "Processor": machine["cpu"],
        "Cores": str(machine["cores"]),
        "Memory": f"{machine['memory_bytes'] / 2**30:.0f} GiB",
        "GPU": " + ".join(gpus) or "none used",
        **driver,
        "System": machine["os"],
    }


def software(made: dict[str, Any]) -> dict[str, str]:
    """The versions that a record's run had, as the rows of a table."""
    machine = made["machine"]
    libraries = {"cuda": machine["cuda"], "nccl": machine["nccl"]}
    return {**made["versions"], **{k: v for k, v in libraries.items() if v}}


def distinct(tables: Iterator[dict[str, str]]) -> list[dict[str, str]]:
    """Each of `tables` once, in order."""
    found: list[dict[str, str]] = []
    for table in tables:
        if table not in found:
            found.append(table)
    return found


def _moment(date: str) -> datetime:
    return datetime.fromisoformat(date).astimezone(UTC)


def _percent(error: float | None) -> str:
    return "—" if error is None else f"{100 * error:+.1f} %"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _writable(out: str | None) -> Path:
    """The page's path, found fit before the figures are drawn."""
    path = Path(out) if out else repo_root() / "build" / "report.html"
    refuse_unwritable_file("--out", path)
    return path.resolve()


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser("lab report", description=__doc__)
    parser.add_argument("--recorded", action="store_true", help="the chapters' results/ instead")
    parser.add_argument("--out", metavar="FILE", help="the page; default: build/report.html")
    parser.add_argument("--open", action="store_true", help="open it in the browser")
    return parser.parse_args(argv)
