"""What `mapreduce_to_allreduce.py` says: results beside one process's, bytes beside formulas."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from _collectives_formulas import FORMULAS, chunk
from torch import Tensor

from distlab.run import Run
from distlab.runtime import Runtime

RECORD_BYTES, VALUE_BYTES, SIZE_BYTES = 8, 4, 8  # index and value, value, one partition's size
TOLERANCE = 1e-5  # float32: the same terms, added in another order


def report_words(
    run: Run,
    form: str,
    counts: Counter[str],
    expected: Counter[str],
    arrived: int,
    emitted: int,
    sent: int,
) -> None:
    """This rank's `counts` of the words that hash to it; records in, bytes emitted and sent."""
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, (counts, arrived, emitted, sent))
    workers = len(everybody)
    found = [count for counts, *_ in everybody for count in counts.items()]
    loads = [arrived for _, arrived, *_ in everybody]
    all_emitted = sum(emitted for *_, emitted, _ in everybody)
    all_sent = sum(sent for *_, sent in everybody)
    run.print(f"\nword count, {form}")
    run.metric(f"records_{form.replace(' ', '_')}", sum(loads), "", "into the shuffle")
    run.metric(
        f"busiest_reducer_{form.replace(' ', '_')}", max(loads) * workers / sum(loads), "",
        "times the mean number of records",
    )  # fmt: skip
    sizes = workers * (workers - 1) * SIZE_BYTES
    predicted = (workers - 1) / workers * all_emitted + sizes
    run.compare(f"bytes sent, {form}", predicted, all_sent, "B")
    run.check_equal("every word has one reducer", len(found), len(expected))
    run.check_equal("counts equal one process's", dict(found), dict(expected))


def report_gradients(
    run: Run,
    job: Runtime,
    combined: Tensor,
    one_process: Tensor,
    own_examples: int,
    sums: Mapping[str, np.ndarray],
    everywhere: Mapping[str, Tensor],
    sent: Mapping[str, int],
) -> None:
    """`sums` are this rank's chunk, `everywhere` the whole gradient; `sent` the bytes, by form."""
    run.print(f"\ngradient sum, {combined.numel():,} parameters")
    library = combined.clone()
    dist.all_reduce(library)
    own_chunk = one_process.tensor_split(job.world_size)[job.rank]
    for form, chunk_sum in sums.items():
        run.check_close(
            f"{form}: this rank's chunk equals one process's", chunk_sum, own_chunk,
            TOLERANCE, relative=True,
        )  # fmt: skip
    for form, whole in everywhere.items():
        run.check_close(
            f"{form} equals torch.distributed's all-reduce", whole, library,
            TOLERANCE, relative=True,
        )  # fmt: skip
        run.check_close(f"{form} equals one process", whole, one_process, TOLERANCE, relative=True)
    expected = formulas(combined.numel(), job.rank, job.world_size, own_examples)
    counted, predicted = totals(sent, job), totals(expected, job)
    ring = max(1, predicted["ring all-reduce"])
    rows = [[form, n, predicted[form], n / ring] for form, n in counted.items()]
    run.table(
        "bytes", ["gradient sum", "bytes sent", "formula", "of a ring's"], rows,
        caption=f"all {job.world_size} ranks together",
    )  # fmt: skip
    run.check_equal("each rank's bytes equal the formulas", dict(sent), expected)


def formulas(n: int, rank: int, workers: int, own_examples: int) -> dict[str, int]:
    """Bytes that a rank sends: all that it emits but its own chunk, and its partitions' sizes."""
    leaving = n - chunk(n, rank, workers)
    sizes = (workers - 1) * SIZE_BYTES
    return {
        "every example": own_examples * leaving * RECORD_BYTES + sizes,
        "combined": leaving * RECORD_BYTES + sizes,
        "without keys": leaving * VALUE_BYTES + sizes,
        "all-gather": FORMULAS["all-gather (ring)"].elements(n, rank, workers) * VALUE_BYTES,
        "ring all-reduce": FORMULAS["all-reduce (ring)"].elements(n, rank, workers) * VALUE_BYTES,
    }


def totals(sent: Mapping[str, int], job: Runtime) -> dict[str, int]:
    """The sums over the ranks."""
    counts = torch.tensor(list(sent.values()), device=job.device)
    dist.all_reduce(counts)
    return dict(zip(sent, counts.tolist(), strict=True))
