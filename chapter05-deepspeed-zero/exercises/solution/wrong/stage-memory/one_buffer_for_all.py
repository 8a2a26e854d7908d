"""Buffers as large as everything in the file."""

SAYS = "buffers of 3"


def stage_memory(sizes, settings):
    from stage_memory import stage_memory

    found = stage_memory(sizes, settings)
    if settings.offload == "nvme":
        part = stage_memory([sum(sizes)], settings)["host"]
        found["host"] = part
    return found
