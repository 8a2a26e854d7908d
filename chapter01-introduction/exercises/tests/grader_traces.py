"""Chrome traces as torch.profiler writes them, small, and with a planted bottleneck."""

import json
import random


def write(folder, events, chance, warm_up=True):
    """Write a trace with these events, and those that every trace has, in an order by chance."""
    first = min(event["ts"] for event in events)
    always = [
        {"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "args": {"name": "python"}},
        {"ph": "i", "name": "Iteration Start: PyTorch Profiler", "ts": 1, "pid": 1, "tid": 0},
        {"ph": "i", "cat": "kernel", "name": "a mark", "ts": first + 1, "pid": 0, "tid": 7},
        {"ph": "s", "id": 7, "cat": "ac2g", "name": "ac2g", "ts": 120, "pid": 1, "tid": 1},
    ]
    if warm_up:  # before the first profiled step
        always += [
            complete("kernel", "warm_up_kernel", first - 100, 90),
            complete("user_annotation", "data", first - 10, 10),
        ]
    everything = [*always, *events]
    path = folder / f"trace-{chance.integers(10**9)}.json"
    shuffled = [everything[i] for i in chance.permutation(len(everything))]
    path.write_text(json.dumps({"schemaVersion": 1, "traceEvents": shuffled}), encoding="utf-8")
    return path


def complete(category, name, start, duration, stream=7):
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "ts": start,
        "dur": duration,
        "pid": 0 if category == "kernel" else 1,
        "tid": stream if category == "kernel" else 1,
        "args": {},
    }


def step(number, start, duration):
    """A profiled step, and its mirror on the device, which starts late."""
    name = f"ProfilerStep#{number}"
    return [
        complete("user_annotation", name, start, duration),
        complete("gpu_user_annotation", name, start + 5, duration + 50),
        complete("cpu_op", "aten::mm", start + 1, duration / 2),
        complete("cuda_runtime", "cudaLaunchKernel", start + 2, 3),
    ]


def data(start, duration):
    return complete("user_annotation", "data", start, duration)


def kernel(start, duration, stream=7):
    return complete("kernel", "ampere_sgemm_128x64_tn", start, duration, stream)


def collective(start, duration):
    return complete("kernel", "ncclDevKernel_AllReduce_Sum_f32_RING_LL", start, duration, 20)


def planted(cause, seed):
    """The events of three steps of about 1 ms each that spend most of it on `cause`."""
    jitter = random.Random(seed)
    weights = {"input": 0.1, "launch": 0.1, "compute": 0.15, "communication": 0.1} | {cause: 0.5}
    events, now = [], 100.0
    for number in range(3):
        begin = now
        lengths = {name: 1000 * w * jitter.uniform(0.9, 1.1) for name, w in weights.items()}
        events.append(data(now, lengths["input"]))
        now += lengths["input"]
        for _ in range(20):  # each kernel waits for its launch, then runs
            now += lengths["launch"] / 20
            events.append(kernel(now, lengths["compute"] / 20))
            events.append(kernel(now, lengths["compute"] / 40, stream=8))
            now += lengths["compute"] / 20
        events.append(collective(now - lengths["compute"] / 40, lengths["communication"]))
        now += lengths["communication"]
        events += step(number, begin, now - begin)
    return events
