"""Reading a lesson: every block with its words and its output, or an error with its line."""

import pytest

from distlab.errors import RunError, UsageError
from distlab.lab import lessons
from distlab.lab.lessons import Chapter, chapter, chapters, read_blocks

LESSON = """# Title

Text with `bash` in it.

```bash
python chapter03-ddp/code/train_ddp.py --steps 3
python chapter03-ddp/code/more/run-all.sh && python chapter03-ddp/code/train_ddp.py
```

```output
loss: 3.2

done
```

## Serving

```bash env=vllm gpus=2 background ready=http://127.0.0.1:8000/health?a=b
torchrun --nproc_per_node=2 chapter06-vllm/code/serve.py
torchrun --nproc-per-node 4 chapter06-vllm/exercises/starter/x.py
```

- in a list:

  ```bash exit=2 record=wrong
  false
  ```
  ```output
  error: no
  ```

```bash norun
# Needs eight machines.
sbatch big.sh
```

```python
print("not a command")
```

```bash
true
```

Between them stands text.

```output
not its output
```

~~~~bash
cat <<'END'
```bash
END
~~~~
"""


@pytest.fixture
def lesson(tmp_path, monkeypatch):
    """Writes a lesson into a checkout of its own."""
    monkeypatch.setattr(lessons, "repo_root", lambda: tmp_path)
    path = tmp_path / "chapter03-ddp" / "main.md"
    path.parent.mkdir()

    def write(text: str):
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_every_bash_block_is_read_with_its_words(lesson):
    first, server, wrong, big, plain, quoting = read_blocks(lesson(LESSON))

    assert first.id == "chapter03-ddp/main.md:5"
    assert (first.env, first.gpus, first.exit, first.record) == ("core", 0, 0, None)
    assert not first.background and not first.norun and first.ranks == 1
    assert first.scripts == [
        "chapter03-ddp/code/train_ddp.py",
        "chapter03-ddp/code/more/run-all.sh",
    ]
    assert first.output == "loss: 3.2\n\ndone\n"

    assert server.background and server.ready == "http://127.0.0.1:8000/health?a=b"
    assert (server.env, server.gpus, server.ranks) == ("vllm", 2, 4)
    assert server.scripts == [
        "chapter06-vllm/code/serve.py",
        "chapter06-vllm/exercises/starter/x.py",
    ]
    assert server.output is None

    assert (wrong.text, wrong.exit, wrong.record) == ("false\n", 2, "wrong")
    assert wrong.output == "error: no\n"
    assert big.norun and big.reason == "Needs eight machines."
    assert plain.text == "true\n" and plain.output is None
    assert "```bash" in quoting.text
    assert [b.section for b in (first, server, wrong, big)] == [1, 2, 2, 2]


def test_the_lines_of_an_output_are_those_of_its_text(lesson):
    path = lesson(LESSON)
    lines = path.read_text().splitlines(keepends=True)
    for block in read_blocks(path):
        assert "bash" in lines[block.line - 1]
        if block.output is not None:
            begin, end = block.output_lines
            text = "".join(line.removeprefix("  ") for line in lines[begin:end])
            assert text == block.output


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("gpu=2", r"unknown word 'gpu=2'; known: background, norun, slurm, env=…, exit=…, gpus=…"),
        ("gpus", "unknown word 'gpus'"),
        ("background=yes", "unknown word 'background=yes'"),
        ("Norun", "unknown word 'Norun'"),
        ("gpus=two", "gpus=two is no number"),
        ("exit=", "exit= is no number"),
        ("gpus=-1", "gpus=-1 is no number"),
        ("background", "a background block says ready=URL"),
        ("norun", "a norun block begins with a comment: the reason"),
    ],
)
def test_a_malformed_block_is_refused_with_its_line(words, told, lesson):
    path = lesson(f"# Title\n\n```bash {words}\ntrue\n```\n")
    with pytest.raises(RunError) as error:
        read_blocks(path)
    assert str(error.value).startswith(f"{path}:3: {told}")


@pytest.mark.parametrize(
    ("words", "nodes", "slurm"),
    [("", 0, False), ("nodes=4", 4, False), ("slurm", 2, True), ("slurm nodes=3", 3, True)],
)
def test_a_block_may_ask_for_nodes_and_for_slurm(words, nodes, slurm, lesson):
    (block,) = read_blocks(lesson(f"```bash {words}\ntrue\n```\n"))
    assert (block.nodes, block.slurm) == (nodes, slurm)


def test_an_output_says_which_of_its_lines_are_free(lesson):
    shown = "```bash\ntrue\n```\n```output {}\nsample: x\n```\n"
    (block,) = read_blocks(lesson(shown.format("free=sample,verdict")))
    assert block.free == ("sample", "verdict") and block.output == "sample: x\n"
    with pytest.raises(RunError, match="main.md:4: unknown word after output: fre=sample"):
        read_blocks(lesson(shown.format("fre=sample")))


@pytest.mark.parametrize("text", ["", "#\nsbatch x", "#  \n"])
def test_norun_without_a_reason_is_refused(text, lesson):
    with pytest.raises(RunError, match="main.md:1: a norun block begins with a comment"):
        read_blocks(lesson(f"```bash norun\n{text}\n```\n"))


def test_a_lesson_without_blocks_and_one_that_never_closes_its_fence(lesson):
    assert read_blocks(lesson("# Only text\n")) == []
    (block,) = read_blocks(lesson("```bash\ntrue"))
    assert block.text == "true"


def test_chapters_are_eleven_and_written_where_they_have_a_lesson(lesson, tmp_path):
    lesson(LESSON)
    found = chapters()
    assert [one.number for one in found] == list(range(1, 12))
    assert [one.number for one in found if one.written] == [3]
    assert len(found[2].blocks()) == 6 and found[0].blocks() == []


@pytest.mark.parametrize("name", ["3", "03", "chapter03-ddp", "chapter03-ddp/", "ddp"])
def test_a_chapter_has_several_names(name, lesson):
    lesson(LESSON)
    assert chapter(name).number == 3


@pytest.mark.parametrize("name", ["0", "12", "", "dd", "chapter3", "three"])
def test_an_unknown_chapter_is_refused(name, lesson):
    lesson(LESSON)
    with pytest.raises(UsageError, match="there is no chapter .*from 1 to 11"):
        chapter(name)


def test_a_chapter_that_is_not_written_says_which_are(lesson):
    lesson(LESSON)
    with pytest.raises(UsageError, match="chapter 4 is not written yet; ready: 3"):
        chapter("4")


def test_scripts_of_a_chapter_leave_out_helpers_and_data(tmp_path):
    code = tmp_path / "code"
    (code / "engine").mkdir(parents=True)
    for name in ("b.py", "a.sh", "_helper.py", "notes.txt", "engine/part.py"):
        (code / name).write_text("")
    found = Chapter(1, tmp_path, "A chapter").scripts()
    assert [path.name for path in found] == ["a.sh", "b.py"]
