"""The elements of all parameters together."""

SAYS = "expected"


def largest_model(settings, parameters, device, host, file):
    from stage_memory import largest_model

    return parameters * largest_model(settings, parameters, device, host, file)
