"""From text to batches: token shards written in parallel, and a loader that is disjoint over ranks.

Before K machines can train a model, the text must be cut into tokens once, and dealt out so that no
two machines see the same part. Here real text becomes memory-mapped token shards, by 1, 2, 4 …
worker processes, and each promise is tried: the shards do not depend on how many workers wrote
them, a damaged folder is mended without doing the rest again, and the loader of K ranks gives each
window once, also when K changes in the middle.

Run:
    python chapter01-introduction/code/prepare_data.py
    python chapter01-introduction/code/prepare_data.py --corpus-mb 12 --workers 8
    python chapter01-introduction/code/prepare_data.py --corpus src --out build/my-shards

You should see: tokens/s growing with the workers up to the number of cores; a missing and a corrupt
shard made again in a fraction of the time; and 4 ranks that share no window.
"""

import hashlib
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from distlab import data, script
from distlab.display import quantity
from distlab.errors import RunError, UsageError
from distlab.run import Run

PRESETS = {
    "smoke": {"corpus_mb": 0.2, "vocab_size": 512, "workers": 2, "shard_kb": 16, "seq_len": 64},
    "laptop": {"corpus_mb": 2.0, "vocab_size": 4096, "workers": 4, "shard_kb": 128, "seq_len": 256},
    "gpu": {"corpus_mb": 12.0, "vocab_size": 32768, "workers": 8, "shard_kb": 256, "seq_len": 1024},
}
REPEATS = 3


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    with script.run(args) as run, tempfile.TemporaryDirectory(prefix="prepare_data-") as scratch:
        documents = data.read_corpus(args.corpus, int(args.corpus_mb * 1e6))
        training, _ = data.split_documents(documents)
        tokenizer = data.train_tokenizer(training, args.vocab_size)
        text_bytes = sum(len(document.encode()) for document in documents)
        run.metric("text", text_bytes, "B", f"{len(documents)} documents")
        if args.out:
            keep(run, args, documents, tokenizer)
        folders, full_seconds = scale_workers(run, args, documents, tokenizer, Path(scratch))
        tokens = read_back(run, folders[-1], documents, text_bytes)
        mend(run, args, documents, tokenizer, folders[-1], full_seconds)
        deal_out(run, args, tokens)
        change_world_size(run, args, tokens)
    return run.status


def parse_args(argv: list[str] | None) -> Namespace:
    parser = script.Parser(__doc__, PRESETS)
    data.add_data_flags(parser)
    group = parser.add_argument_group("shards")
    group.add_argument("--vocab-size", type=script.positive_int, metavar="V")
    group.add_argument("--workers", type=script.positive_int, metavar="W", help="the most to try")
    group.add_argument("--shard-kb", type=script.positive_int, metavar="KB", help="text of a shard")
    group.add_argument("--out", metavar="DIR", help="keep the shards there")
    group.add_argument("--ranks", type=script.positive_int, default=4, metavar="K")
    parser.set_defaults(batch_size=8)
    args = parser.parse_args(argv)
    if args.batch_size % args.ranks:
        raise UsageError(
            f"--batch-size {args.batch_size} is not divisible by --ranks {args.ranks}; "
            f"use --batch-size {args.ranks * max(1, args.batch_size // args.ranks)}"
        )
    return args


def keep(run: Run, args: Namespace, documents: Sequence[str], tokenizer: Tokenizer) -> None:
    """Write the shards into --out; those that are there already are kept."""
    try:
        written = write(args, documents, tokenizer, Path(args.out), args.workers)
    except UsageError as mistake:
        raise UsageError(f"--out {mistake}") from mistake
    run.print(f"{args.out}: {len(written.made)} shards made, {len(written.kept)} kept")


def scale_workers(
    run: Run, args: Namespace, documents: Sequence[str], tokenizer: Tokenizer, scratch: Path
) -> tuple[list[Path], float]:
    """Write the same shards with 1, 2, 4 … workers, in turns.

    Returns the last turn's folders, and the seconds that one worker needs for all shards.
    """
    counts = [1 << power for power in range(args.workers.bit_length()) if 1 << power < args.workers]
    counts.append(args.workers)
    written: dict[int, list[data.Written]] = {count: [] for count in counts}
    for repeat in run.progress(range(REPEATS), "writing shards"):
        for count in counts:
            folder = scratch / f"{repeat}-by-{count}"
            written[count].append(write(args, documents, tokenizer, folder, count))
    folders = [scratch / f"{REPEATS - 1}-by-{count}" for count in counts]
    opened = data.open_tokens(folders[0])
    total = len(opened) + len(opened.validation)
    seconds = {count: float(np.median([w.seconds for w in written[count]])) for count in counts}
    starts = {
        count: float(np.median([w.start_seconds for w in written[count]])) for count in counts
    }
    speeds = {count: total / seconds[count] for count in counts}
    run.table(
        "workers",
        ["workers", "tokens/s", "speed-up", "writing (s)", "before: starting them (s)"],
        [
            [c, speeds[c], speeds[c] / speeds[counts[0]], seconds[c], round(starts[c], 3)]
            for c in counts
        ],
        caption=f"median of {REPEATS}; {total:,} tokens in {len(written[1][0].made)} shards",
    )
    run.metric("tokens_per_second", max(speeds.values()), "tok/s", "the fastest")
    run.figure(
        "workers", kind="line", title="Tokenizing in parallel",
        x_label="worker processes", y_label="tokens/s",
        series=[
            {"label": "measured", "x": counts, "y": [speeds[c] for c in counts]},
            {"label": "ideal", "x": counts, "y": [c * speeds[counts[0]] for c in counts]},
        ],
    )  # fmt: skip
    run.check_equal(
        "the shards do not depend on the number of workers",
        [contents(folder) for folder in folders],
        [contents(folders[0])] * len(folders),
    )
    return folders, seconds[1]


def write(
    args: Namespace, documents: Sequence[str], tokenizer: Tokenizer, folder: Path, workers: int
) -> data.Written:
    return data.write_shards(
        documents, tokenizer, args.vocab_size, folder, workers, args.shard_kb * 1000
    )


def contents(folder: Path) -> str:
    """SHA-256 of every file's name and bytes."""
    whole = hashlib.sha256()
    for path in sorted(folder.glob("[!.]*")):
        whole.update(path.name.encode() + path.read_bytes())
    return whole.hexdigest()


def read_back(run: Run, folder: Path, documents: Sequence[str], text_bytes: int) -> data.Tokens:
    """Check every shard against its SHA-256, and decode the tokens to the text they came from."""
    tokens = data.open_tokens(folder)
    count = tokens.verify()
    run.print(f"{count} shards read back: every SHA-256 is the index's")
    texts = [
        "".join(
            tokens.tokenizer.decode(shard.tolist(), skip_special_tokens=False)
            for shard in split.shards
        )
        for split in (tokens, tokens.validation)
    ]
    expected = ["".join(d + data.END_OF_TEXT for d in s) for s in data.split_documents(documents)]
    run.check_true("the tokens decode to the text", texts == expected, f"{text_bytes:,} bytes")
    total = len(tokens) + len(tokens.validation)
    run.metric("bytes_per_token", text_bytes / total, "", f"{tokens.shards[0].itemsize} B stored")
    run.metric("unigram_entropy", tokens.unigram_entropy(), "nats", "of the training tokens")
    return tokens


def mend(
    run: Run,
    args: Namespace,
    documents: Sequence[str],
    tokenizer: Tokenizer,
    folder: Path,
    full_seconds: float,
) -> None:
    """Lose one shard, flip a bit in another, and see what is told and what is made again."""
    before, shards = contents(folder), sorted(folder.glob("*.bin"))
    shards[0].unlink()
    corrupt = bytearray(shards[1].read_bytes())
    corrupt[len(corrupt) // 2] ^= 1
    shards[1].write_bytes(corrupt)
    try:
        data.open_tokens(folder)
    except RunError as told:
        run.print(f"opening the damaged folder: {str(told).replace(str(folder), 'DIR')}")
    written = write(args, documents, tokenizer, folder, workers=1)
    count, kept, everything = len(written.made), len(written.kept), quantity(full_seconds, "s")
    run.metric("mending", written.seconds, "s", f"{count} made, {kept} kept; all took {everything}")
    run.check_equal(
        "only the missing and the corrupt shard were made again",
        written.made,
        [shard.name for shard in shards[:2]],
    )
    run.check_true("the mended folder is the one before", contents(folder) == before, "SHA-256")


def deal_out(run: Run, args: Namespace, tokens: data.Tokens) -> None:
    """Every rank's windows in the first epoch: disjoint, and all of them."""
    ranks = loaders(args, tokens, args.ranks)
    windows = ranks[0].num_windows
    starts = range(0, windows - args.batch_size + 1, args.batch_size)
    seen = [np.concatenate([rank.window_indices(at) for at in starts]) for rank in ranks]
    run.table(
        "ranks",
        ["rank", "windows", "the first", "shared with other ranks"],
        [
            [rank, len(mine), str(mine[:4].tolist()), shared(mine, seen, rank)]
            for rank, mine in enumerate(seen)
        ],
        caption=f"{windows} windows of {args.seq_len} tokens, global batch {args.batch_size}",
    )
    everything = np.concatenate(seen)
    run.check_equal("no window comes twice in an epoch", len(set(everything)), len(everything))
    run.check_below("windows left for the next epoch", windows - len(everything), args.batch_size)


def shared(mine: np.ndarray, seen: Sequence[np.ndarray], rank: int) -> int:
    others = np.concatenate([*seen[:rank], *seen[rank + 1 :], np.array([], dtype=np.int64)])
    return len(np.intersect1d(mine, others))


def change_world_size(run: Run, args: Namespace, tokens: data.Tokens) -> None:
    """Stop K ranks in the middle of an epoch and go on with one: the same global batches."""
    uninterrupted, stopped = loaders(args, tokens, 1), loaders(args, tokens, args.ranks)
    for _ in range(3):
        global_batch(stopped), global_batch(uninterrupted)
    resumed = loaders(args, tokens, 1)
    resumed[0].load_state_dict(stopped[0].state_dict())
    run.check_equal(
        f"stopped with {args.ranks} ranks, resumed with 1: the next 3 global batches",
        [global_batch(resumed) for _ in range(3)],
        [global_batch(uninterrupted) for _ in range(3)],
    )


def loaders(args: Namespace, tokens: data.Tokens, world_size: int) -> list[data.Loader]:
    return [
        data.Loader(tokens, args.seq_len, args.batch_size, rank, world_size)
        for rank in range(world_size)
    ]


def global_batch(ranks: Sequence[data.Loader]) -> np.ndarray:
    """The ranks' next inputs put together, int64 [batch, seq]."""
    return np.concatenate([next(rank)[0].numpy() for rank in ranks])


if __name__ == "__main__":
    script.exit(main)
