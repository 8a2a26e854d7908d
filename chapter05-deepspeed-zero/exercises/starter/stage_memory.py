"""Task 3, stage-memory: the bytes that a rank keeps, in each stage of ZeRO, and where they are."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """How a model is trained; the grader hands over objects like this."""

    stage: int  # of ZeRO: 0 to 3
    ranks: int  # that share a model
    precision: str  # "fp32" or "mixed"
    offload: str  # of the optimizer: "none", "cpu" or "nvme"
    buffers: int  # in host memory, for "nvme" alone: nothing else looks at it


def stage_memory(sizes: Sequence[int], settings: Settings) -> dict[str, int]:
    """The bytes that a rank keeps between backward and step: "device", "host" and "file".

    `sizes` are the elements of each parameter. Adam keeps two moments of 4 bytes for each element:

                weights   gradients   optimizer
      fp32      4         4           8, the moments
      mixed     2         2           12, the moments and a float32 copy of the weights

    Stage 1 gives each rank a K-th of the optimizer's bytes to keep, stage 2 of the gradients' too,
    and stage 3 also of the weights'. What is not divided is kept whole. In stages 1 and 2 all
    parameters lie in one flat buffer, padded to a multiple of the ranks; whole weights and whole
    gradients are then as long as the padded buffer. In stage 3 every parameter is padded alone.
    In stage 0 nothing is padded. Buckets and what is gathered for a moment do not count.

      "none"  everything is on the device
      "cpu"   stages 1 to 3: the optimizer's bytes are on the host, and so are the gradients of this
              rank's part, which the host's optimizer reads. In stages 2 and 3 there are then no
              gradients on the device; in stage 1 the whole ones are there as well.
      "nvme"  stage 3: as "cpu", but the optimizer's bytes are in a file. To pass through, they have
              `buffers` buffers on the host, each as large as the optimizer's bytes of the largest
              parameter on this rank.

    Exact ints of Python, up to models of 10**18 elements. ValueError is raised for what is not
    named above: other stages, precisions and ways to offload; "cpu" in stage 0, "nvme" in stages 0
    to 2; fewer ranks than 1; and with "nvme" fewer buffers than 1.
    """
    raise NotImplementedError("stage_memory.stage_memory is yours to write")


def largest_model(settings: Settings, parameters: int, device: int, host: int, file: int) -> int:
    """The most elements that each of so many equally large parameters can have in these bytes.

    A model fits where a rank keeps at most `device`, `host` and `file` bytes of each kind; 0 where
    not even one element fits. ValueError is raised as in `stage_memory`, and for fewer parameters
    than 1. `settings` is not changed.
    """
    raise NotImplementedError("stage_memory.largest_model is yours to write")
