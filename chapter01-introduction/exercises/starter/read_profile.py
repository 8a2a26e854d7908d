"""Task 4, read-profile: where the time of a training step goes, read from a Chrome trace."""

from pathlib import Path


def time_shares(trace: Path) -> dict[str, float]:
    """The shares of the profiled steps' time; they add up to 1.

    trace: a JSON file as torch.profiler's `export_chrome_trace` writes it: an object whose
    "traceEvents" is a list, in no particular order. What matters are its complete events
    ("ph": "X"), which have a category "cat", a "name", a start "ts" and a duration "dur" in
    microseconds, either of which may be a fraction. Other events ("M", "i", "s", "f") lack some of
    these, and count for nothing, whatever their category.

    The time from the start of the first to the end of the last event of category
    "user_annotation" named "ProfilerStep#N" is divided, gaps between steps included; what lies
    outside does not count, nor does the part outside of an event that crosses a border. Every
    instant of it belongs to the first of these that applies, told by category and name together:
      "compute"        a kernel runs that is no collective (category "kernel")
      "communication"  a kernel runs whose name begins with "nccl" (a collective)
      "input"          the loop waits for data: category "user_annotation", name just "data"
      "launch"         none of these: the device waits for the CPU to launch something
    Copies (category "gpu_memcpy") are none of the first three. The file is only read.
    """
    raise NotImplementedError("read_profile.time_shares is yours to write")


def bottleneck(trace: Path) -> str:
    """The name of the largest share; of equal ones that which `time_shares` lists first."""
    raise NotImplementedError("read_profile.bottleneck is yours to write")
