"""Task 3, one-f-one-b: in which order a pipeline stage works on its micro-batches."""


def one_f_one_b(stage: int, num_stages: int, num_micro_batches: int) -> list[tuple[str, int]]:
    """The actions of `stage` (0 is the first), in order: tuples ("F", i) and ("B", i).

    ("F", i) takes micro-batch i forward through this stage: it waits for the stage before to have
    done so. ("B", i) takes it backward: it waits for the stage after, and for this stage's own F.
    Micro-batches go forward in the order 0, 1, 2, …, and backward in the same order.

    In 1F1B (Narayanan et al., arXiv 2104.04473, section 2.2) a stage first takes as many
    micro-batches forward as there are stages behind it, then alternates one forward, one backward,
    and finishes with the backwards that are left. It then holds the activations of at most
    num_stages - stage micro-batches at a time. num_micro_batches may be smaller than num_stages,
    and 0, which gives an empty list.
    """
    raise NotImplementedError("one_f_one_b.one_f_one_b is yours to write")
