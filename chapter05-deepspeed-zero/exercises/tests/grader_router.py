"""Gradients do not leave their process: they are computed beside the student's code."""

import torch

from distlab.lab.grade_student import rig


@rig
def routed(route, logits, factor, upstream):
    """(expert, place, gate, the logits' gradient or None, whether the logits were changed)."""
    leaf = logits.clone().requires_grad_()
    expert, place, gate = route(leaf, factor)
    gradient = gradient_of((gate * upstream).sum(), leaf)
    return expert, place, gate.detach(), gradient, not torch.equal(leaf.detach(), logits)


@rig
def lost(balancing_loss, logits):
    """(loss, the logits' gradient or None, whether the logits were changed)."""
    leaf = logits.clone().requires_grad_()
    loss = balancing_loss(leaf)
    gradient = gradient_of(loss, leaf)
    return loss.detach(), gradient, not torch.equal(leaf.detach(), logits)


def gradient_of(scalar, leaf):
    if not scalar.requires_grad:
        return None
    scalar.backward()
    return leaf.grad
