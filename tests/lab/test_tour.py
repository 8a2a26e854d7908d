"""The tour types its lesson's commands, and an interrupted one goes on where it was."""

import pytest

from distlab.lab import blocks, lessons, tour

LESSON = """# The tour

```bash
echo one >> {folder}/typed && echo one
```

```bash
echo two >> {folder}/typed && test -e {folder}/cured && echo two
```
"""


@pytest.fixture
def typed(tmp_path, monkeypatch):
    """The commands that a tour of two steps has typed; the second fails until it is cured."""
    for module in (tour, blocks, lessons):
        monkeypatch.setattr(module, "repo_root", lambda: tmp_path)
    monkeypatch.setattr(tour, "FOLDER", tmp_path / "build" / "tour")
    (tmp_path / "tour.md").write_text(LESSON.format(folder=tmp_path))
    return lambda: (tmp_path / "typed").read_text().split()


def test_a_tour_that_did_not_end_goes_on_where_it_was(typed, tmp_path, capsys):
    assert tour.main(["--preset", "smoke"]) == 1
    assert "what failed is tried again by the next" in capsys.readouterr().out
    (tmp_path / "cured").touch()
    assert tour.main(["--preset", "smoke"]) == 0
    assert "tour: 1 of 2 steps were done before" in capsys.readouterr().out
    assert typed() == ["one", "two", "two"]


def test_the_next_tour_after_one_that_ended_begins_afresh(typed, tmp_path):
    (tmp_path / "cured").touch()
    (tmp_path / "build" / "tour").mkdir(parents=True)
    (tmp_path / "build" / "tour" / "model").touch()  # of an older tour
    assert [tour.main(["--preset", "smoke"]) for _ in range(2)] == [0, 0]
    assert typed() == ["one", "two"] * 2
    assert not (tmp_path / "build" / "tour" / "model").exists()


@pytest.mark.parametrize("flags", [["--preset", "laptop"], ["--preset", "smoke", "--afresh"]])
def test_another_size_or_afresh_takes_nothing_from_before(typed, tmp_path, flags):
    assert tour.main(["--preset", "smoke"]) == 1
    (tmp_path / "cured").touch()
    assert tour.main(flags) == 0
    assert typed() == ["one", "two", "one", "two"]


def test_ctrl_c_keeps_what_is_done(typed, tmp_path, monkeypatch, capsys):
    (tmp_path / "cured").touch()
    play = tour.play

    def interrupted(*arguments):
        yield next(play(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(tour, "play", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tour.main(["--preset", "smoke"])
    assert "tour: interrupted; the next one goes on here" in capsys.readouterr().out
    monkeypatch.setattr(tour, "play", play)
    assert tour.main(["--preset", "smoke"]) == 0
    assert typed() == ["one", "two"]
