"""The peak of every mode is what its plan says, and the recorder sees what was really held."""

import torch

import memory_profile
from distlab import script
from distlab.measure import tensor_bytes
from distlab.spawning import spawn
from fsdp.memory_timeline import KINDS, MemoryTimeline


def profiled(job, argv):
    args = memory_profile.parse_args(argv)
    with script.run(args) as run:
        memory_profile.profile(run, args, job)
    return run.tables["peaks"], run.figures, [(check.name, check.ok) for check in run.checks]


def test_each_mode_holds_what_its_plan_says():
    table, figures, checks = spawn(profiled, 4, ["--preset", "smoke"], timeout_s=250)[0]
    rows = {row[0]: dict(zip(table["columns"], row, strict=True)) for row in table["rows"]}
    assert set(rows) == set(memory_profile.MODES)
    assert all(ok for _, ok in checks)
    whole = rows["ddp"]["weights"]
    for mode, row in rows.items():
        assert sum(row[kind] for kind in KINDS) <= 1.001 * row["peak measured, MB"]
        if mode != "ddp":
            assert abs(row["weights"] - whole / 4) < 0.01 * whole
    assert rows["root"]["gathered"] >= 1.99 * whole > rows["grad"]["gathered"]
    assert rows["grad"]["gathered"] > rows["partial"]["gathered"] > 0
    assert len(figures["full"]["series"]) == len(KINDS)


def test_the_recorder_sees_what_lives():
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    with MemoryTimeline(model, optimizer, {}) as timeline:
        kept = torch.ones(1000) * 2
        torch.zeros(5000)
        timeline.mark("end")
    held = timeline.by_kind()
    assert held["weights"][-1] == tensor_bytes(model.parameters())
    assert held["activations"][-1] >= 20_000, "the last operator's result lived as it returned"
    assert max(held["activations"]) < 4 * (3000 + 5000)
    assert timeline.phase(0) == "end" and kept.numel() == 1000
