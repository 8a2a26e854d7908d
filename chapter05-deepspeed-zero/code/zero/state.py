"""A training run's state in a neutral form: what every kind of checkpoint can be read into.

    weights and AdamW's two moments, whole, by the parameters' names; how many updates AdamW has
    made; its settings by groups of parameters; the step; the rest of the run as fields.

On a disk this is the kind `ddp`: safetensors and JSON, with their SHA-256.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distlab.errors import RunError, UsageError
from distlab.model import Llama
from distlab.model_config import ModelConfig, config_from_json, config_to_json

MOMENTS = ("exp_avg", "exp_avg_sq")
HOW = {"foreach", "fused", "capturable", "differentiable"}  # a step is computed, not what
FIELDS = ("loader", "flags", "config")  # what is carried beside tensors, where a source has it
Tensors = dict[str, Tensor]


@dataclass
class State:
    """`moments[key][name]` is float32 as `weights[name]` is; a tied weight has its first name."""

    step: int
    updates: int
    weights: Tensors
    moments: dict[str, Tensors]
    groups: list[dict[str, Any]]  # AdamW's settings; see `names_of_groups`
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> ModelConfig:
        return config_from_json(self.fields["config"], "the checkpoint")

    def named_groups(self) -> list[tuple[dict[str, Any], list[str]]]:
        shapes = {name: tuple(tensor.shape) for name, tensor in self.weights.items()}
        return list(zip(self.groups, names_of_groups(shapes, len(self.groups)), strict=True))

    def fitted(self, config: ModelConfig) -> "State":
        """This state in the model's order; its own `config` goes before the one that is given.

        Raises `UsageError` naming the first tensor that the model has otherwise, or not, and
        `RunError` for one that is not float32.
        """
        own = self.fields.get("config")
        config = config_from_json(own, "the checkpoint") if own else config
        with torch.device("meta"):
            shapes = {name: tuple(p.shape) for name, p in Llama(config).named_parameters()}
        for what, tensors in {"weight": self.weights, **self.moments}.items():
            for name in [*shapes, *tensors]:
                there = tuple(tensors[name].shape) if name in tensors else "missing"
                if there != shapes.get(name, "missing"):
                    raise UsageError(
                        f"the checkpoint is of another model: the {what} of {name} is {there} in "
                        f"it and {shapes.get(name, 'missing')} by --model; use the model flags "
                        "that it was trained with"
                    )
            if narrow := [name for name, t in tensors.items() if t.dtype != torch.float32]:
                raise RunError(f"the {what} of {narrow[0]} is {tensors[narrow[0]].dtype}; only "
                               "float32 state is converted")  # fmt: skip
        weights = {name: self.weights[name] for name in shapes}
        moments = {key: {name: self.moments[key][name] for name in shapes} for key in MOMENTS}
        fields = {**self.fields, "config": config_to_json(config)}
        return State(self.step, self.updates, weights, moments, self.groups, fields)


def names_of_groups(shapes: Mapping[str, tuple[int, ...]], count: int) -> list[list[str]]:
    """The parameters by groups, as the training scripts have them: matrices, which decay, and the
    rest, which do not; or all in one. Raises `RunError` for another number of groups."""
    if count == 1:
        return [list(shapes)]
    if count != 2:
        raise RunError(f"its optimizer has {count} groups of parameters; 1 and 2 are known here")
    return [[n for n, s in shapes.items() if (len(s) == 2) == matrix] for matrix in (True, False)]


def settings_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """What AdamW needs to know of a group, and nothing of who computes the step."""
    defaults = torch.optim.AdamW([torch.zeros(1)]).defaults
    known = {key: group.get(key, value) for key, value in defaults.items() if key not in HOW}
    return {key: list(v) if isinstance(v, tuple) else v for key, v in known.items()}


def one_count(counts: Mapping[str, float]) -> int:
    """The updates of all parameters; ZeRO's flat partitions have room for one number only."""
    if len(different := set(counts.values())) != 1:
        raise RunError(f"its parameters have had different numbers of updates: {different}")
    return int(different.pop())


def anew(weights: Tensors) -> dict[str, Tensors]:
    """The moments of a run that begins: zero."""
    return {key: {name: torch.zeros_like(w) for name, w in weights.items()} for key in MOMENTS}


def differing(one: State, other: State) -> list[str]:
    """What is not the same in both, bit for bit; nothing is rounded on the way."""
    wrong = [n for n in ("step", "updates", "groups") if getattr(one, n) != getattr(other, n)]
    wrong += [f"field {n}" for n, value in one.fields.items() if other.fields.get(n) != value]
    kinds = {"weights": (one.weights, other.weights)}
    kinds |= {key: (one.moments[key], other.moments[key]) for key in MOMENTS}
    for kind, (mine, theirs) in kinds.items():
        names = {**mine, **theirs}
        wrong += [f"{kind} of {n}" for n in names if not _same(mine.get(n), theirs.get(n))]
    return wrong


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None or one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
