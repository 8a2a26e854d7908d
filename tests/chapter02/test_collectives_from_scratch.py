"""Every collective equals the library's, costs what its formula says, and notices when not."""

import pytest
import torch

import collectives_from_scratch as own
from distlab import script
from distlab.spawning import spawn
from parallelism import trials
from parallelism.collectives import FORMULAS, Wire, pipelined_ring_all_reduce, ring_all_reduce

SMOKE = ["--preset", "smoke", "--device", "cpu"]
ODD = [*SMOKE, "--bytes", "4001"]  # no type's size divides it


@pytest.mark.parametrize("world_size", [1, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_all_sizes_and_types_equal_the_library_and_the_formulas(world_size):
    for checks, table in spawn(run_script, world_size, ODD, timeout_s=120):
        assert [name for name, ok in checks if not ok] == []
        assert len(checks) == 10 and len(table) == 8


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 5, 6, 7, 8])
def test_other_world_sizes_with_fewer_types(world_size):
    for checks, _ in spawn(run_script, world_size, ODD, two_types, timeout_s=120):
        assert [name for name, ok in checks if not ok] == []


def two_types():
    trials.FLOATS, trials.INTEGERS = [torch.bfloat16], [torch.int64]


@pytest.mark.slow
def test_every_root_and_slices_of_sizes_drawn_at_random():
    spawn(sum_random_sizes, 5, timeout_s=120)


def sum_random_sizes(job):
    generator = torch.Generator().manual_seed(job.world_size)
    for root in range(job.world_size):
        n, slice_bytes = (int(torch.randint(1, 200, (), generator=generator)) for _ in range(2))
        mine = torch.arange(n) * (job.rank + 1)
        total = torch.arange(n) * job.world_size * (job.world_size + 1) // 2
        assert own.tree_broadcast(Wire(job), mine.clone(), root).equal(torch.arange(n) * (root + 1))
        reduced = own.tree_reduce(Wire(job), mine.clone(), root)
        assert job.rank != root or reduced.equal(total)
        for all_reduce in own.ALL_REDUCES.values():
            assert all_reduce(Wire(job), mine.clone()).equal(total)
        staged = Wire(job)
        staged.staged = True  # as with gloo and a GPU, but here the host's copy is the tensor
        assert pipelined_ring_all_reduce(staged, mine.clone(), slice_bytes).equal(total)


def test_a_wrong_sum_and_a_message_too_many_are_noticed():
    checks, _ = spawn(run_script, 2, SMOKE, spoil_ring, timeout_s=120)[0]
    assert [name for name, ok in checks if not ok] == [
        "all-reduce (ring) equals torch.distributed's",
        "all-reduce (tree) equals torch.distributed's",
        "steps and bytes of each rank equal the formulas",
        "all ranks hold the same bits after an all-reduce",
    ]


def spoil_ring():
    """A ring that adds one to what it has on rank 0, and a tree that forgets rank 1's part."""

    def one_more(wire, tensor):
        ring_all_reduce(wire, tensor)
        tensor += wire.rank == 0
        return tensor

    def rank_zeros_part(wire, tensor):
        return own.tree_broadcast(wire, tensor)

    own.ALL_REDUCES["all-reduce (ring)"] = one_more
    own.ALL_REDUCES["all-reduce (tree)"] = rank_zeros_part


@pytest.mark.slow
def test_the_race_times_every_all_reduce_and_checks_the_ratio_that_is_asked_for():
    flags = [*SMOKE, "--compare-with-library", "--bytes", "64KiB", "--link-gbit", "1"]
    (checks, rows), *_ = spawn(run_script, 2, [*flags, "--min-ratio", "1e-6"], timeout_s=120)
    assert checks == [("the pipelined ring keeps up with the library", True)]
    assert len(rows) == 6 and all(row[1] > 0 for row in rows)
    (checks, _), *_ = spawn(run_script, 2, [*flags, "--min-ratio", "1e6"], timeout_s=120)
    assert checks == [("the pipelined ring keeps up with the library", False)]


def run_script(job, argv, change=lambda: None):
    """The script's own run on this rank: its checks, and its table."""
    change()
    args = own.parse_args(argv)
    with script.run(args) as run:
        own.show(run, args, job)
    (table,) = run.tables.values()
    return [(check.name, check.ok) for check in run.checks], table["rows"]


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_formulas_are_the_alpha_beta_models_for_a_power_of_two(workers):
    """alpha = 1 and beta = 0 count the steps; the other way round the bytes on the longest path."""
    n = 64 * workers
    for name, formula in FORMULAS.items():
        ranks = range(workers)
        assert max(formula.steps(n, r, workers) for r in ranks) == formula.seconds(n, workers, 1, 0)
        most = max(formula.elements(n, r, workers) for r in ranks)
        path = formula.seconds(n, workers, 0, 1)
        assert most == (path / 2 if name == "all-reduce (tree)" else path)  # half of it is received


def test_ring_and_tree_send_the_same_in_all_and_recursive_doubling_more():
    """All that the ranks of an all-reduce send together is at least 2·(K-1)·n: the ring's."""
    for workers in range(1, 9):
        for n in (0, 1, 7, 100):
            sent = {
                name: sum(formula.elements(n, r, workers) for r in range(workers))
                for name, formula in FORMULAS.items()
            }
            assert sent["broadcast (tree)"] == (workers - 1) * n
            assert sent["all-reduce (ring)"] == sent["all-reduce (tree)"] == 2 * (workers - 1) * n
            assert sent["all-reduce (recursive doubling)"] >= sent["all-reduce (tree)"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--repeats", "2"], "--repeats 2 gives no median; use 3 or more"),
        (["--min-ratio", "0.9"], "are about time; add --compare-with-library"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused(flags, message):
    with pytest.raises(script.UsageError, match=message):
        own.parse_args([*SMOKE, *flags])


@pytest.mark.parametrize("size", ["0", "16 MiB", "16mib", "-4", "4iB", "many"])
def test_a_size_that_is_none_is_refused_in_one_line(capsys, size):
    with pytest.raises(SystemExit, match="2"):
        own.parse_args([*SMOKE, f"--bytes={size}"])
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "is no size; use one such as 64KiB or 16MiB" in said


def test_sizes_are_read_as_written():
    written = {"4096": 4096, "4B": 4, "64KiB": 2**16, "16MiB": 2**24, "1GB": 10**9}
    for text, size in written.items():
        assert own.parse_args([*SMOKE, "--bytes", text]).bytes == size
