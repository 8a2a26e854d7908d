"""Several calls of a tree at once: one question to the student's process instead of many."""

from distlab.lab.grade_student import rig


@rig
def asked_and_seen(tree, method, *arguments):
    """(what the method returned, the paths of the tree afterwards)."""
    return getattr(tree, method)(*arguments), tree.paths()


@rig
def cut_at_every_token(tree, length):
    """A sequence of so many tokens, matched at each of its lengths, then inserted with one more.

    How many pages were known then, the values, and the paths.
    """
    tokens = list(range(length))
    tree.insert(tokens, tokens)
    for stop in range(length - 1, 0, -1):
        tree.match(tokens[:stop])
    longer = (*tokens, length)
    return tree.insert(longer, longer), tree.match(longer), tree.paths()


@rig
def evictor_asked(evictor, method, *arguments):
    """(what the method returned, evictable, protected)."""
    return getattr(evictor, method)(*arguments), evictor.evictable, evictor.protected
