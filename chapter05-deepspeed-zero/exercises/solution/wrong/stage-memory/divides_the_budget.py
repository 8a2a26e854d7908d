"""Bytes of the budget by the bytes of an element: padding does not divide so."""

SAYS = "expected"


def largest_model(settings, parameters, device, host, file):
    from stage_memory import largest_model, stage_memory

    most = largest_model(settings, parameters, device, host, file)
    if settings.offload != "none" or most == 0:
        return most
    million = stage_memory([10**6 * settings.ranks] * parameters, settings)["device"]
    return device * 10**6 * settings.ranks // million
