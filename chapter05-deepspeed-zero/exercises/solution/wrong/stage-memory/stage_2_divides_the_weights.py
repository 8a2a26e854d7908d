"""Takes stage 2 for what divides the weights, and stage 3 for the gradients."""

SAYS = "published are"


def stage_memory(sizes, settings):
    from types import SimpleNamespace

    from stage_memory import stage_memory

    stage = {2: 3}.get(settings.stage, settings.stage)
    stage_memory(sizes, settings)
    return stage_memory(sizes, SimpleNamespace(**{**vars(settings), "stage": stage}))
