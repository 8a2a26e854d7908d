"""Where the number of ranks stays, each keeps what it has: true in one stage, not across."""

SAYS = "expected the copies"


def copies_to(target, sizes, sources, targets):
    from migration_map import copies_to

    copies = copies_to(target, sizes, sources, targets)
    if sources != targets:
        return copies
    return [(target, there, there + b - a, n, there) for _, a, b, n, there in copies]
