"""A script's contract: presets, exit statuses, and one line for each mistake."""

import argparse
import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from distlab import script
from distlab.errors import RunError, Skipped, UsageError

PRESETS = {
    "smoke": {"steps": 5, "rate": 0.1},
    "laptop": {"steps": 60, "rate": 0.2},
    "gpu": {"steps": 500, "rate": 0.3},
}

SCRIPT = '''"""A small script.

Run: python small.py
"""
from distlab import script

PRESETS = {"smoke": {"steps": 2}, "laptop": {"steps": 3}, "gpu": {"steps": 4}}

def main():
    parser = script.Parser(__doc__, PRESETS)
    parser.add_argument("--steps", type=script.positive_int)
    parser.add_argument("--ends", default="well")
    args = parser.parse_args()
    with script.run(args) as run:
        if args.ends == "usage":
            raise script.UsageError("--ends usage is wrong\\nbecause it is; use well")
        if args.ends == "flood":
            for number in range(100000):
                run.print(f"line {number}")
        run.check_equal("steps", args.steps, 3)
    return run.status

if __name__ == "__main__":
    script.exit(main)
'''


@pytest.fixture
def no_preset(monkeypatch):
    monkeypatch.delenv("LAB_PRESET", raising=False)
    monkeypatch.setattr("distlab.hardware.has_cuda", lambda: False)


@pytest.fixture
def small(tmp_path):
    """Starts the small script; every way in which a process ends, as a caller sees it."""
    path = tmp_path / "small.py"
    path.write_text(SCRIPT)

    def start(*words: str, **env: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, path, *words],
            env={**clean_environment(), **env},
            capture_output=True,
            text=True,
            timeout=30,
        )

    return start


def clean_environment() -> dict[str, str]:
    launcher = ("LAB_", "RANK", "WORLD_SIZE", "SLURM_", "TORCHELASTIC_")
    return {k: v for k, v in os.environ.items() if not k.startswith(launcher)}


def parser(presets=PRESETS) -> script.Parser:
    made = script.Parser("A script.", presets)
    made.add_argument("--steps", type=script.positive_int)
    made.add_argument("--rate", type=float)
    return made


def two_commands() -> script.Parser:
    made = script.Parser("A script.", {name: {"steps": 1, "batch": 2} for name in PRESETS})
    commands = made.add_subparsers(dest="command", required=True)
    commands.add_parser("train").add_argument("--steps", type=int)
    commands.add_parser("infer").add_argument("--batch", type=int)
    return made


@pytest.mark.parametrize(
    ("words", "variable", "cuda", "steps"),
    [
        ([], None, False, 60),
        ([], None, True, 500),
        ([], "smoke", True, 5),
        (["--preset", "gpu"], "smoke", False, 500),
        (["--preset=gpu"], "smoke", False, 500),
        (["--preset", "gpu", "--preset", "smoke"], None, False, 5),
        (["--steps", "7"], "smoke", False, 7),
        (["--steps", "7", "--preset", "gpu"], None, False, 7),
    ],
)
def test_a_flag_wins_over_the_preset_which_wins_over_the_variable_and_the_device(
    words, variable, cuda, steps, no_preset, monkeypatch
):
    monkeypatch.setattr("distlab.hardware.has_cuda", lambda: cuda)
    if variable:
        monkeypatch.setenv("LAB_PRESET", variable)
    args = parser().parse_args(words)
    assert args.steps == steps
    assert args.rate == PRESETS[args.preset]["rate"]


def test_a_preset_given_as_a_string_is_converted_like_a_flag(no_preset):
    presets = {name: {"steps": "12", "rate": 1.0} for name in PRESETS}
    assert parser(presets).parse_args([]).steps == 12


@pytest.mark.parametrize("wrong", ["smoke", "laptop", "gpu"])
def test_a_preset_that_sets_an_unknown_flag_is_found_whichever_preset_runs(wrong, no_preset):
    presets = {**PRESETS, wrong: {**PRESETS[wrong], "stpes": 1}}
    with pytest.raises(ValueError, match=f"preset {wrong} sets flags that do not exist.*stpes"):
        parser(presets).parse_args(["--preset", "smoke"])


def test_all_three_presets_are_wanted(no_preset):
    with pytest.raises(ValueError, match="gpu"):
        script.Parser("A script.", {"smoke": {}, "laptop": {}})


@pytest.mark.parametrize(
    "words",
    [["--steps", "0"], ["--steps", "two"], ["--step", "3"], ["--preset", "huge"], ["--preset"]],
)
def test_a_wrong_argument_is_one_line_and_status_2(words, no_preset, capsys):
    with pytest.raises(SystemExit) as end:
        parser().parse_args(words)
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1


def test_a_wrong_lab_preset_names_the_right_ones(no_preset, monkeypatch, capsys):
    monkeypatch.setenv("LAB_PRESET", "big")
    with pytest.raises(SystemExit) as end:
        parser().parse_args([])
    assert end.value.code == 2
    expected = "error: LAB_PRESET=big is no preset; use smoke, laptop, gpu\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    "words",
    [
        ["--json", "r.json", "--preset", "gpu", "train"],
        ["train", "--json", "r.json", "--preset", "gpu"],
        ["--preset", "gpu", "train", "--json", "r.json"],
        ["--preset", "smoke", "train", "--json", "r.json", "--preset", "gpu"],
    ],
)
def test_common_flags_stand_before_or_after_the_subcommand(words, no_preset):
    args = two_commands().parse_args(words)
    assert (args.json, args.preset, args.command) == ("r.json", "gpu", "train")
    assert args.figures is None


def test_a_subcommand_takes_the_preset_values_of_its_own_flags_only(no_preset):
    train, infer = two_commands().parse_args(["train"]), two_commands().parse_args(["infer"])
    assert train.steps == 1 and "batch" not in train
    assert infer.batch == 2 and "steps" not in infer


@pytest.mark.parametrize("words", [[], ["fly"], ["train", "--batch", "2"], ["train", "--st", "2"]])
def test_a_wrong_subcommand_is_one_line_and_status_2(words, no_preset, capsys):
    with pytest.raises(SystemExit) as end:
        two_commands().parse_args(words)
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("convert", "good", "bad"),
    [
        (script.positive_int, {"1": 1, "12": 12}, ["0", "-1", "1.5", "", "x", "1e3"]),
        (script.non_negative_int, {"0": 0, "3": 3}, ["-1", "0.0"]),
        (script.positive_float, {"1e-9": 1e-9, "3": 3.0}, ["0", "-1", "nan", "inf", "x"]),
        (script.fraction, {"0": 0.0, "1": 1.0, "0.5": 0.5}, ["-0.1", "1.1", "nan", "x"]),
    ],
)
def test_argument_types(convert, good, bad):
    for text, value in good.items():
        assert convert(text) == value
    for text in bad:
        with pytest.raises(script.argparse.ArgumentTypeError, match="is not a"):
            convert(text)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UsageError("--tp 3 is wrong;\n  use 2"), 2, "error: --tp 3 is wrong; use 2\n"),
        (RunError("shard 3 is corrupt"), 1, "error: shard 3 is corrupt\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out.bin"),
            1,
            "error: the disk is full while writing out.bin; free some space and run again\n",
        ),
        (
            OSError(errno.EFBIG, "File too large", "out.bin"),
            1,
            "error: a file would be larger than this process may write while writing out.bin; "
            "raise the limit (ulimit -f)\n",
        ),
        (
            OSError(errno.EAGAIN, "Resource temporarily unavailable"),
            1,
            f"error: can't start a process; {script.MORE_PROCESSES}\n",
        ),
        (
            RuntimeError("can't start new thread"),
            1,
            f"error: can't start new thread; {script.MORE_PROCESSES}\n",
        ),
        (
            OSError(errno.EMFILE, "Too many open files", "out.bin"),
            1,
            "error: Too many open files, of this process or machine; "
            "raise the limit (ulimit -n 4096) and run again\n",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            1,
            "error: the disk is full; free some space and run again\n",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "x"),
            1,
            "error: x: Permission denied; run this as its owner, or in a copy of the checkout "
            "that is yours\n",
        ),
    ],
)
def test_each_way_to_fail_has_its_status_and_one_line(error, status, message, capsys):
    def main() -> int:
        raise error

    assert script.status_of(main) == status
    assert capsys.readouterr() == ("", message)


def test_skipped_says_why_on_standard_output(capsys):
    def main() -> int:
        raise Skipped("no GPU here")

    assert script.status_of(main) == 77
    assert capsys.readouterr() == ("SKIPPED: no GPU here\n", "")


@pytest.mark.parametrize("error", [ValueError("bug"), OSError(errno.EIO, "Input/output error")])
def test_a_bug_keeps_its_traceback(error):
    def main() -> int:
        raise error

    with pytest.raises(type(error)):
        script.status_of(main)


def test_a_broken_pipe_that_is_not_our_output_is_not_hidden():
    def main() -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        script.status_of(main)


@pytest.mark.parametrize("status", [0, 1])
def test_exit_ends_with_the_status_of_main(status):
    with pytest.raises(SystemExit) as end:
        script.exit(lambda: status)
    assert end.value.code == status


def test_a_script_ends_with_0_when_its_checks_hold_and_with_1_when_one_fails(small):
    good, bad = small("--preset", "laptop"), small("--preset", "smoke")
    assert (good.returncode, bad.returncode) == (0, 1)
    assert good.stdout.splitlines()[1:] == ["check: steps … ok (3)"]
    assert bad.stdout.splitlines()[1:] == ["check: steps … FAILED (2, expected 3)"]
    assert good.stderr == bad.stderr == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ends", "usage"], "error: --ends usage is wrong because it is; use well\n"),
        (["--steps", "0"], "error: argument --steps: '0' is not a whole number of at least 1\n"),
    ],
)
def test_a_users_mistake_in_a_script_is_one_line_and_status_2(words, message, small):
    done = small(*words)
    assert (done.returncode, done.stderr) == (2, message)


def test_output_into_a_closed_pipe_ends_without_a_traceback(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(SCRIPT)
    command = (
        f"{sys.executable} {path} --ends flood --preset laptop | head -n 3; echo ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(
        ["bash", "-c", command],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.stdout.splitlines()[1:] == ["line 0", "line 1", "1"]
    assert done.stderr == ""


def test_help_shows_the_docstring_and_does_not_run(small):
    done = small("--help")
    assert done.returncode == 0
    assert "Run: python small.py" in done.stdout and "--json FILE" in done.stdout


def test_the_bench_is_imported_without_torch():
    code = "import sys, distlab.script; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=30).returncode == 0


def test_errors_are_the_same_classes_everywhere():
    assert (script.UsageError, script.RunError, script.Skipped) == (UsageError, RunError, Skipped)
    assert Path(script.__file__).name == "script.py"


@pytest.mark.parametrize("words", [["--out", ""], ["--out="]])
def test_an_empty_value_is_refused_since_a_shell_s_variable_may_be_unset(words, capsys):
    parser = script.Parser(None, PRESETS)
    parser.add_argument("--out", metavar="DIR")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rate", type=float)
    assert parser.parse_args(["--preset", "smoke"]).out is None
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--preset", "smoke", *words])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: --out is empty; give it a value, or leave it out\n"


def test_numbers_that_no_generator_and_no_clock_takes_are_refused():
    assert script.seed("0") == 0 and script.seed(str(2**63 - 1)) == 2**63 - 1
    assert script.seconds("0.5") == 0.5 and script.non_negative_float("0") == 0
    for convert, text in [
        (script.seed, "-1"), (script.seed, str(2**63)), (script.seed, "1.5"),
        (script.seconds, "1e30"), (script.seconds, "0"), (script.seconds, "nan"),
        (script.non_negative_float, "-1"), (script.non_negative_float, "nan"),
        (script.non_negative_float, "inf"),
    ]:  # fmt: skip
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is not a "):
            convert(text)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_sizes_beyond_the_memory_end_in_one_line(library, capsys):
    too_many = {"numpy": lambda: np.empty(2**57), "torch": lambda: torch.empty(2**57)}

    def main() -> int:
        return len(too_many[library]())

    assert script.status_of(main) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: there is not enough memory (") and told.count("\n") == 1
