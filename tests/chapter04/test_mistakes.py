"""Each mistake shows in the number that its script measures, and its cure is silent."""

import mistake_table
from distlab import script


def test_each_mistake_shows_and_each_cure_cures():
    args = mistake_table.parse_args(["--preset", "smoke"])
    with script.run(args) as run:
        mistake_table.tabulate(run, args)
    assert all(check.ok for check in run.checks), run.checks
    rows = {row[0]: row for row in run.tables["mistakes"]["rows"]}
    assert len(rows) == 8
    assert rows["state dict on one rank"][1] == "ends with an error"
    assert rows["optimizer before sharding"][1] == "trains on in silence"


def test_each_script_marks_its_mistake():
    for name in mistake_table.ALL:
        text = (mistake_table.FOLDER / f"{name}.py").read_text(encoding="utf-8")
        assert text.count("# the mistake") == 1, name
        assert 35 <= len(text.splitlines()) <= 70, name
