"""A Llama as the list of layers that DeepSpeed's PipelineModule takes, and a stage's paced time."""

import contextlib
import io
import time
from copy import deepcopy
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from distlab.layers import rope_tables
from distlab.model import Llama
from distlab.runtime import Runtime
from zero.engine import join


class Part(nn.Module):
    """A copy of one part of `whole`, which knows what its parameters are called there."""

    def __init__(self, whole: Llama, name: str) -> None:
        super().__init__()
        self.config, self.name = whole.config, name
        self.part: Any = deepcopy(whole.get_submodule(name))

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)


class Block(Part):
    """It makes its own rotary tables: only one tensor goes from layer to layer."""

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x, rope_tables(self.config, 0, x.shape[1], x.device, x.dtype))


def logits(embedding: Part, hidden: Tensor) -> Tensor:
    """What the tied embedding does at the other end."""
    return F.linear(hidden, embedding.part.weight)


def mean_loss(scores: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, 1).float(), targets.flatten())


def cut(whole: Llama, stages: int, job: Runtime, method: str = "type:Block") -> Any:
    """This rank's stage of `whole`; ranks that the stages leave over are replicas of them."""
    join(job)
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    config, shared = whole.config, {"tied_weight_attr": "part.weight"}
    tied = partial(TiedLayerSpec, "embedding", Part, whole, "model.embed_tokens", **shared)
    blocks = (f"model.layers.{i}" for i in range(config.num_hidden_layers))
    layers = [
        tied(), *(LayerSpec(Block, whole, name) for name in blocks),
        LayerSpec(Part, whole, "model.norm"),
        tied(forward_fn=logits) if config.tie_word_embeddings
        else LayerSpec(Part, whole, "lm_head"),
    ]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the layers
        return PipelineModule(layers, stages, loss_fn=mean_loss, partition_method=method)


def weights_of(stage: nn.Module) -> dict[str, Tensor]:
    """Copies of the stage's weights, by their names in the whole model."""
    return {
        f"{part.name}.{name}": weight.detach().clone()
        for part in stage.modules()
        if isinstance(part, Part)
        for name, weight in part.part.named_parameters()
    }


class Paced:
    """Gives every forward pass of the engine's stage `seconds`, and every backward twice that.

    It computes, then sleeps until its time is over: stages cost the same, as the formula assumes,
    and four of them on two processors take the time of four devices.
    """

    def __init__(self, engine: Any, seconds: float, job: Runtime) -> None:
        from deepspeed.runtime.pipe import schedule

        self.passes: list[tuple[float, float]] = []  # when each began and ended
        self.job, self.late = job, 0.0  # seconds by which computing took longer than its time
        methods = dict(type(engine)._INSTRUCTION_MAP)
        for kind, length in ((schedule.ForwardPass, seconds), (schedule.BackwardPass, 2 * seconds)):
            methods[kind] = self._paced(methods[kind], length)
        engine._INSTRUCTION_MAP = methods  # of this engine alone

    def _paced(self, method: Any, seconds: float) -> Any:
        def run(engine: Any, buffer_id: int) -> None:
            began = time.perf_counter()
            method(engine, buffer_id)
            self.job.synchronize()
            left = began + seconds - time.perf_counter()
            self.late = max(self.late, -left)
            time.sleep(max(0.0, left))
            self.passes.append((began, time.perf_counter()))

        return run
