"""On every mesh of data and tensor ranks the model trains as in one process, and sends as told."""

import pytest

import fsdp_tensor_parallel
from distlab import script
from distlab.errors import UsageError
from distlab.spawning import spawn


def compared(job, argv):
    args = fsdp_tensor_parallel.parse_args(["--preset", "smoke", "--layers", "1", *argv])
    with script.run(args) as run:
        fsdp_tensor_parallel.compare_meshes(run, args, job)
    return run.tables["meshes"]["rows"], [check.ok for check in run.checks]


def test_both_axes_train_as_one_process_and_send_what_the_formulas_say():
    rows, checks = spawn(compared, 4, ["--steps", "2", "--tensor-parallel", "2"], timeout_s=250)[0]
    assert [row[0] for row in rows] == ["2 x 2"] and checks == [True, True]
    assert rows[0][4] > 0 < rows[0][6]


def test_each_axis_alone_and_an_output_matrix_of_its_own():
    rows, checks = spawn(compared, 2, ["--steps", "2", "--untied"], timeout_s=250)[0]
    assert [row[0] for row in rows] == ["2 x 1", "1 x 2"] and checks == [True, True]
    data, tensor = ([row[column] for row in rows] for column in (4, 6))
    assert data[0] > data[1] == 0 == tensor[0] < tensor[1]


@pytest.mark.parametrize(
    ("argv", "degree", "told"),
    [
        ([], 8, "8 does not divide 12 ranks; use 1, 2, 4"),
        ([], 3, "3 does not divide 8 heads; use 1, 2, 4"),
        (["--heads", "12", "--hidden-size", "96"], 3, "3 does not divide 4 kv heads; use 1, 2, 4"),
        ([], 1, "--batch-size 8 is not divisible by 12 ranks along data; use 12"),
    ],
)
def test_degrees_that_do_not_divide_are_refused(argv, degree, told):
    args = fsdp_tensor_parallel.parse_args(["--preset", "smoke", *argv])
    args.tensor_parallel = [degree]
    with pytest.raises(UsageError, match=told):
        fsdp_tensor_parallel.refuse(args, 12)
