"""MapReduce's shuffle, first for words, then for gradients: what is left of it is the all-reduce.

MapReduce maps each rank's own data to (key, value) records, partitions them by key, shuffles (every
rank sends each partition to its owner) and reduces by key. Counting words is that. Summing
gradients is that too, with a parameter's index for a key, and then two things can go: the records
of single examples (a combiner adds them up before the shuffle), and the keys (every rank has every
key, in order, so that the place in a contiguous partition says it). What is left is a
reduce-scatter and, since every rank wants the whole sum, an all-gather: an all-reduce.

Run:
    torchrun --nproc_per_node=4 chapter02-gpu-hardware-parallelism/code/mapreduce_to_allreduce.py
    torchrun --nproc_per_node=3 chapter02-gpu-hardware-parallelism/code/mapreduce_to_allreduce.py

You should see: word counts equal to one process's, a gradient equal to one process's and to
torch.distributed's all-reduce, and the bytes that each form sends, counted and by formula.
"""

import re
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn

from distlab import data, runtime, script
from distlab.errors import UsageError
from distlab.model import add_model_flags, config_from_args, model_from_args
from distlab.run import Run
from distlab.runtime import Runtime
from parallelism.collectives import Wire, all_gather, ring_all_reduce
from parallelism.traffic import Traffic
from parallelism.trials import report_gradients, report_words

PRESETS = {
    "smoke": {"model": "smoke", "corpus_mb": 0.2, "seq_len": 16, "batch_size": 10},
    "laptop": {"model": "smoke", "corpus_mb": 4.0, "seq_len": 64, "batch_size": 18},
    "gpu": {"model": "laptop", "corpus_mb": 12.0, "seq_len": 256, "batch_size": 18},
}
WORD = re.compile(r"[^\W\d]\w*")
RECORD = np.dtype([("index", "<i4"), ("value", "<f4")])  # a parameter, and a part of its gradient
Pairs = Iterable[tuple[str, int]]


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with (
        script.run(args) as run,
        runtime.distributed(args.backend, args.timeout, args.seed, args.device) as job,
    ):
        show(run, args, job)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    add_model_flags(parser)
    data.add_data_flags(parser)
    runtime.add_runtime_flags(parser)
    return parser.parse_args(argv)


def show(run: Run, args: Namespace, job: Runtime) -> None:
    if args.batch_size < job.world_size:
        raise UsageError(
            f"--batch-size {args.batch_size} leaves a rank without an example; "
            f"use {job.world_size} or more"
        )
    run.print(f"job: {job.world_size} rank(s), {job.backend} on {job.device.type}")
    count_words(run, args, job)
    sum_gradients(run, args, job)


def shuffle(traffic: Traffic, partitions: list[np.ndarray], job: Runtime) -> list[np.ndarray]:
    """Partition r goes to rank r: what each rank has sent here, as bytes, in the ranks' order."""
    place = "cpu" if job.backend == "gloo" else job.device
    sizes = torch.tensor([partition.nbytes for partition in partitions], device=place)
    incoming = traffic.all_to_all(sizes).tolist()
    sent = np.concatenate([partition.view(np.uint8) for partition in partitions])
    arrived = traffic.all_to_all(torch.from_numpy(sent).to(place), incoming, sizes.tolist())
    return np.split(arrived.cpu().numpy(), np.cumsum(incoming)[:-1])


def count_words(run: Run, args: Namespace, job: Runtime) -> None:
    documents = data.read_corpus(args.corpus, int(args.corpus_mb * 1e6))
    own = documents[job.rank :: job.world_size]
    expected = reduce_words(map_words(documents))
    for form, pairs in {
        "every occurrence": list(map_words(own)),
        "combined": list(reduce_words(map_words(own)).items()),  # a reducer, before the shuffle
    }.items():
        traffic = Traffic()
        partitions = [encode(part) for part in partition_by_hash(pairs, job.world_size)]
        arrived = [pair for sent in shuffle(traffic, partitions, job) for pair in decode(sent)]
        counts = reduce_words(arrived)
        emitted = sum(partition.nbytes for partition in partitions)
        report_words(run, form, counts, expected, len(arrived), emitted, int(traffic.total))


def map_words(documents: Iterable[str]) -> Iterator[tuple[str, int]]:
    for document in documents:
        for word in WORD.findall(document):
            yield word, 1


def partition_by_hash(pairs: Pairs, workers: int) -> list[list[tuple[str, int]]]:
    """A word's hash says who counts it. Not Python's own hash(): it differs between processes."""
    partitions: list[list[tuple[str, int]]] = [[] for _ in range(workers)]
    for word, count in pairs:
        partitions[crc32(word.encode()) % workers].append((word, count))
    return partitions


def reduce_words(pairs: Pairs) -> Counter[str]:
    total: Counter[str] = Counter()
    for word, count in pairs:
        total[word] += count
    return total


def encode(pairs: Pairs) -> np.ndarray:
    text = "".join(f"{word}\t{count}\n" for word, count in pairs)
    return np.frombuffer(text.encode(), dtype=np.uint8)


def decode(sent: np.ndarray) -> Iterator[tuple[str, int]]:
    for line in sent.tobytes().decode().split("\n")[:-1]:
        word, count = line.split("\t")
        yield word, int(count)


def sum_gradients(run: Run, args: Namespace, job: Runtime) -> None:
    """The gradient's sum over the examples in three shuffles, an all-gather and a ring."""
    tokens = data.prepare_from_args(args, config_from_args(args).vocab_size)
    model = model_from_args(args, job.device)
    batch = next(data.Loader(tokens, args.seq_len, args.batch_size, device=job.device))
    own = [part.tensor_split(job.world_size)[job.rank] for part in batch]
    gradients = [gradient(model, x[None], y[None]) for x, y in zip(*own, strict=True)]
    combined = torch.stack(gradients).sum(dim=0)
    one_process = args.batch_size * gradient(model, *batch)  # of the mean, so B times it

    chunks = combined.tensor_split(job.world_size)
    begin = sum(chunk.numel() for chunk in chunks[: job.rank])
    sums, sent = {}, {}
    for form, emit, reduce in [
        ("every example", lambda: by_index(gradients, job.world_size), reduce_records),
        ("combined", lambda: by_index([combined], job.world_size), reduce_records),
        ("without keys", lambda: [chunk.cpu().numpy() for chunk in chunks], reduce_values),
    ]:
        traffic = Traffic()
        arrived = shuffle(traffic, emit(), job)
        sums[form] = reduce(arrived, begin, chunks[job.rank].numel())
        sent[form] = int(traffic.total)
    gathering, ring = Wire(job), Wire(job)
    whole = torch.zeros_like(combined)
    whole[begin : begin + chunks[job.rank].numel()] = torch.from_numpy(sums["without keys"])
    everywhere = {
        "reduce-scatter and all-gather": all_gather(gathering, whole),
        "ring all-reduce": ring_all_reduce(ring, combined.clone()),
    }
    sent |= {"all-gather": gathering.sent, "ring all-reduce": ring.sent}
    report_gradients(run, job, combined, one_process, len(gradients), sums, everywhere, sent)


def gradient(model: nn.Module, input_ids: Tensor, targets: Tensor) -> Tensor:
    """The gradient of the mean loss on [batch, seq] tokens, all parameters in a row."""
    loss = model(input_ids, targets=targets)
    parts = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([part.flatten() for part in parts])


def by_index(gradients: list[Tensor], workers: int) -> list[np.ndarray]:
    """A record for each parameter of each of `gradients`, partitioned into runs of indices."""
    indices = torch.arange(gradients[0].numel()).tensor_split(workers)
    partitions = [np.empty((len(gradients), len(own)), RECORD) for own in indices]
    for partition, own in zip(partitions, indices, strict=True):
        partition["index"] = own.numpy()
        for row, whole in zip(partition, gradients, strict=True):
            row["value"] = whole[own].cpu().numpy()
    return [partition.ravel() for partition in partitions]


def reduce_records(arrived: list[np.ndarray], begin: int, size: int) -> np.ndarray:
    """The sum of the values for each of the `size` indices from `begin` on."""
    records = np.concatenate([sent.view(RECORD) for sent in arrived])
    return np.bincount(records["index"] - begin, records["value"], minlength=size)


def reduce_values(arrived: list[np.ndarray], begin: int, size: int) -> np.ndarray:
    """The same where a value's place says its index."""
    return np.sum([sent.view(np.float32) for sent in arrived], axis=0)


if __name__ == "__main__":
    script.exit(main)
