"""Whether each loss of a rank is finite, and if not, in which line of its code that began."""

import ast
import functools
import inspect
import math
import textwrap
from types import FrameType
from typing import TYPE_CHECKING, Any

import diagnose_frames as frames
from torch import Tensor

if TYPE_CHECKING:
    from diagnose_agent import Agent


def losses(agent: "Agent") -> None:
    """Whether each loss was finite when its backward pass began; on GPUs the last one is looked at,
    since looking at this one would wait for the GPU."""
    backward = Tensor.backward
    last: list[tuple[int, Tensor]] = []

    @functools.wraps(backward)
    def watched(loss: Tensor, *args: Any, **options: Any) -> None:
        agent.counts["backward"] += 1
        number = agent.counts["backward"]
        if loss.numel() == 1 and agent.listening:
            last.append((number, loss.detach()))
            if not loss.is_cuda or len(last) > 1:
                number, value = last.pop(0)
                if not math.isfinite(value.item()):
                    told = (
                        culprit(frames.own_frame()) if number == agent.counts["backward"] else None
                    )
                    agent.tell("loss", number=number, place=frames.caller(), culprit=told)
        try:
            backward(loss, *args, **options)
        except RuntimeError as error:  # of DDP's collectives, which no other hook sees
            agent.tell("failed", op="backward", error=str(error)[:500], place=frames.caller())
            raise

    Tensor.backward = watched  # type: ignore[method-assign, assignment]


def culprit(frame: FrameType | None) -> dict[str, Any] | None:
    """The first of a function's tensors, as its lines assign them, that is not finite."""
    if frame is None:
        return None
    try:
        lines, begin = inspect.getsourcelines(frame.f_code)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, SyntaxError):
        return None
    begin = max(begin, 1)
    assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    for node in sorted(assigned, key=lambda node: node.lineno):
        parts = [part for target in node.targets for part in ast.walk(target)]
        for name in [part.id for part in parts if isinstance(part, ast.Name)]:
            value = frame.f_locals.get(name)
            if isinstance(value, Tensor) and value.is_floating_point() and not _finite(value):
                line = begin + node.lineno - 1
                return {
                    "name": name,
                    "place": (frame.f_code.co_filename, line, frame.f_code.co_name),
                }
    return None


def _finite(value: Tensor) -> bool:
    return bool(value.detach().isfinite().all())
