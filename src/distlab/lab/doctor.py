"""`lab doctor [--json]`: what this machine has, what is missing, and the command that mends it."""

import argparse
import dataclasses
import json
from typing import Any

from distlab.display import text_table
from distlab.hardware import Machine, machine, machine_line
from distlab.lab.needs import (
    Need,
    chapter_rows,
    in_words,
    install_line,
    missing_system_packages,
    needs,
    remedies,
)
from distlab.script import OneLineParser

__all__ = ["doctor", "install_line", "missing_system_packages"]


def doctor(argv: list[str]) -> int:
    """Tell; the status is 0 whatever is missing, since much of it is a matter of choice."""
    args = _parse(argv)
    here, wanted = machine(), needs()
    found = [need.probe() for need in wanted]
    if args.json:
        print(json.dumps(_as_json(here, wanted, found), indent=1, ensure_ascii=False))
        return 0
    print(f"machine: {machine_line(here)}")
    print(text_table(["need", "chapters", "for", "found"], _rows(wanted, found)))
    print(text_table(["chapter", "title", "missing"], chapter_rows(wanted, found)))
    if mending := remedies(wanted, found):
        print(text_table(["missing", "chapters", "the command that mends it"], mending))
    return 0


def _rows(wanted: list[Need], found: list[str | None]) -> list[list[str]]:
    return [
        [need.what, in_words(need.chapters), need.purpose, what or "missing"]
        for need, what in zip(wanted, found, strict=True)
    ]


def _as_json(here: Machine, wanted: list[Need], found: list[str | None]) -> dict[str, Any]:
    return {
        "machine": dataclasses.asdict(here),
        "needs": [
            {
                "what": need.what,
                "chapters": need.chapters,
                "purpose": need.purpose,
                "found": what,
                "remedy": need.remedy if what is None else "",
            }
            for need, what in zip(wanted, found, strict=True)
        ],
        "missing_system_packages": missing_system_packages(),
    }


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser("lab doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(argv)
