"""Task 3, stage-memory: the reference solution."""

WIDTHS = {"fp32": (4, 4, 8), "mixed": (2, 2, 12)}
FIRST_STAGE = {"none": 0, "cpu": 1, "nvme": 3}


def stage_memory(sizes, settings):
    s = settings
    check(s)
    weight, gradient, optimizer = WIDTHS[s.precision]
    parts = [-(-size // s.ranks) for size in (sizes if s.stage == 3 else [sum(sizes)])]
    part = sum(parts)
    whole = part * s.ranks if s.stage else sum(sizes)
    weights, gradients, state = (
        width * (part if s.stage >= first else whole)
        for width, first in ((weight, 3), (gradient, 2), (optimizer, 1))
    )
    if s.offload == "none":
        return {"device": weights + gradients + state, "host": 0, "file": 0}
    device = weights + (gradients if s.stage == 1 else 0)
    if s.offload == "cpu":
        return {"device": device, "host": part * gradient + state, "file": 0}
    buffers = s.buffers * max(parts, default=0) * optimizer
    return {"device": device, "host": part * gradient + buffers, "file": state}


def check(s):
    if s.stage not in range(4) or s.ranks < 1 or s.precision not in WIDTHS:
        raise ValueError(f"stage {s.stage} on {s.ranks} ranks in {s.precision}")
    if s.offload not in FIRST_STAGE or s.stage < FIRST_STAGE[s.offload]:
        raise ValueError(f"offload to {s.offload} in stage {s.stage}")
    if s.offload == "nvme" and s.buffers < 1:
        raise ValueError(f"{s.buffers} buffers")


def largest_model(settings, parameters, device, host, file):
    if parameters < 1:
        raise ValueError(f"{parameters} parameters")

    def fits(size):
        kept = stage_memory([size] * parameters, settings)
        return kept["device"] <= device and kept["host"] <= host and kept["file"] <= file

    step = 1
    while fits(step):
        step *= 2
    size = 0
    while step:
        if fits(size + step):
            size += step
        step //= 2
    return size
