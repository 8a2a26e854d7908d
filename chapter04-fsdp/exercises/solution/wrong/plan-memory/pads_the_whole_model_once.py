"""Pads the model, not each unit."""

SAYS = "each unit is padded by itself"


def plan_memory(units, settings):
    from plan_memory import plan_memory

    plan, once = plan_memory(units, settings), plan_memory([sum(units)] if units else [], settings)
    return plan | {kind: once[kind] for kind in ("weights", "optimizer", "gradients")}
