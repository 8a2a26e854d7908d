"""Task 4, read-profile: where the time of a training step goes, read from a Chrome trace."""

from pathlib import Path


def time_shares(trace: Path) -> dict[str, float]:
    """The shares of the profiled steps' time; they add up to 1.

    trace: a JSON file as torch.profiler's `export_chrome_trace` writes it: an object whose
    "traceEvents" is a list, in no particular order. What matters are its complete events
    ("ph": "X"), which have a category "cat", a "name", a start "ts" and a duration "dur" in
    microseconds. Other events ("M", "i", "s", "f") lack some of these.

    The time from the start of the first to the end of the last event of category
    "user_annotation" named "ProfilerStep#N" is divided; what lies outside does not count. Every
    instant of it belongs to the first of these that applies:
      "compute"        a kernel runs that is no collective (category "kernel")
      "communication"  a kernel runs whose name begins with "nccl"
      "input"          the loop waits for data: category "user_annotation", name "data"
      "launch"         none of these: the device waits for the CPU to launch something
    """
    raise NotImplementedError("read_profile.time_shares is yours to write")


def bottleneck(trace: Path) -> str:
    """The name of the largest share."""
    raise NotImplementedError("read_profile.bottleneck is yours to write")
