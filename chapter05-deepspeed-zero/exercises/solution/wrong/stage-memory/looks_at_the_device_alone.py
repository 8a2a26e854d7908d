"""What is offloaded is taken for free."""

SAYS = "the host is full"


def largest_model(settings, parameters, device, host, file):
    from stage_memory import largest_model

    return largest_model(settings, parameters, device, 10**40, 10**40)
