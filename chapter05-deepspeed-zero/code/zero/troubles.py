"""Errors that users of DeepSpeed report: each caused in a small job, and cured in another.

A trouble is a function of a `Case`, which runs on every rank. It raises, hangs, or returns what is
seen of it in one line; cured, it returns "". Where the mistake stands in the config, the function
is the same with both configs; where it stands in the code, it is the line that asks for
`case.cured`. `zero.rehearsal` runs them.
"""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.file_baton import FileBaton

from distlab.errors import RunError
from distlab.model import Llama, ModelConfig
from distlab.process import run_command
from distlab.runtime import Runtime
from distlab.spawning import spawn
from zero import operators
from zero.engine import begin, join, stage_config
from zero.known_keys import ACCUMULATE, TOTAL

VOCABULARY, WIDTH, SEQUENCES, LENGTH = 64, 32, 2, 8
Config = dict[str, Any]
TROUBLES: dict[str, "Trouble"] = {}


@dataclass(frozen=True)
class Case:
    """One run of a trouble on one rank."""

    job: Runtime
    config: Config
    cured: bool
    folder: Path  # of this run, for its files; all ranks have the same
    hang_after: Callable[[float], None]  # tell where this rank waits, and end it, after so long

    def begin(self, model: nn.Module | None = None, optimizer: Any = None) -> Any:
        return begin(model or tiny(), self.config, self.job, optimizer=optimizer)

    def loss(self, engine: Any, step: int = 0) -> Tensor:
        """The mean loss of this rank's sequences of a step."""
        draw = torch.Generator().manual_seed(1000 * step + self.job.rank)
        tokens = torch.randint(VOCABULARY, (SEQUENCES, LENGTH + 1), generator=draw)
        tokens = tokens.to(self.job.device)
        return engine(tokens[:, :-1], targets=tokens[:, 1:])

    def train(self, engine: Any, steps: int = 1) -> Any:
        for step in range(steps):
            engine.backward(self.loss(engine, step))
            engine.step()
        return engine


@dataclass(frozen=True)
class Trouble:
    """`act` with the config `bad`, and with `good` and what its function does when it is cured.

    `plan` is what check_config.py is told of the job beside its config; `prepare(folder, cured)`
    makes what has to be there before the job.
    """

    name: str
    act: Callable[[Case], str]
    cure: str
    bad: Config
    good: Config
    ranks: int = 2
    needs: tuple[str, ...] = ()  # operators
    plan: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[Path, bool], None] = lambda folder, cured: None

    def config(self, cured: bool) -> Config:
        return self.good if cured else self.bad


def trouble(bad: Config, cure: str, good: Config | None = None, **rest: Any) -> Callable[..., Any]:
    def keep(act: Callable[[Case], str]) -> Callable[[Case], str]:
        name = act.__name__
        TROUBLES[name] = Trouble(name, act, cure, bad, bad if good is None else good, **rest)
        return act

    return keep


def tiny(kind: type[Llama] = Llama) -> Llama:
    """The same on every rank."""
    torch.manual_seed(0)
    return kind(ModelConfig(VOCABULARY, WIDTH, 2 * WIDTH, 2, 2, 2, tie_word_embeddings=False))


def config(stage: int = 1, without: str = "", accumulate: int = 1, **zero: Any) -> Config:
    made = stage_config(stage, SEQUENCES, accumulate=accumulate, **zero)
    made.pop(without, None)
    return made


def offloading(torch_adam: bool = False, stage: int = 2, **where: str) -> Config:
    made = config(stage, offload_optimizer=where)
    made["optimizer"]["params"]["torch_adam"] = torch_adam
    return made


# Mistakes in the config.


@trouble(bad={**config(), TOTAL: 7}, good=config(), cure=f"leave out {TOTAL}")
def batch_sizes(case: Case) -> str:
    case.train(case.begin())
    return ""


@trouble(
    bad={**config(without=ACCUMULATE), "gradient_acumulation_steps": 4},
    good=config(accumulate=4),
    cure="spell it gradient_accumulation_steps",
)
def misspelt_key(case: Case) -> str:
    engine = case.train(case.begin(), steps=4)
    if engine.global_steps == 1:
        return ""
    return f"{engine.global_steps} optimizer steps in 4 micro-batches, not 1"


@trouble(bad=config(stage=2), good=config(stage=1), cure="stage 1", plan={"pipeline_stages": 2})
def pipeline_with_stage_2(case: Case) -> str:
    pipe = join(case.job).pipe
    layers = [nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)]
    model = pipe.PipelineModule(
        layers, num_stages=2, loss_fn=nn.MSELoss(), partition_method="uniform"
    )
    batch = torch.ones(SEQUENCES, WIDTH)
    case.begin(model).train_batch(iter([(batch, batch)]))
    return ""


@trouble(
    bad=config(),
    good=config(without="optimizer"),
    cure="remove the config's",
    plan={"client_optimizer": True},
)
def optimizer_twice(case: Case) -> str:
    model = tiny()
    engine = case.begin(model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.1))
    used = engine.get_lr()[0]
    wanted = case.config.get("optimizer", {}).get("params", {}).get("lr", used)
    return "" if used == wanted else f"trains with learning rate {used}, not the config's {wanted}"


@trouble(
    bad=offloading(device="cpu"),
    good=offloading(device="cpu", torch_adam=True),
    cure='build it, or "torch_adam": true',
)
def operator_missing(case: Case) -> str:
    os.environ["PATH"] = str(case.folder)  # as on a node that has no compiler
    model = tiny()
    join(case.job).initialize(
        model=model, model_parameters=model.parameters(), config=case.config,
        dist_init_required=False,
    )  # fmt: skip
    return ""


@trouble(
    bad=offloading(stage=3, device="nvme", nvme_path="not_mounted"),
    good=offloading(stage=3, device="nvme", nvme_path="."),
    cure="mount it, or name another",
    needs=(operators.CPU_ADAM, operators.PINNED, operators.ASYNC_IO),
)
def nvme_folder(case: Case) -> str:
    os.chdir(case.folder)
    case.train(case.begin())
    if not Path("not_mounted").exists():
        return ""
    return "nothing: DeepSpeed makes the folder, on the disk that happens to be there"


# Mistakes of the machine, and of the job before.


def _lock(folder: Path, cured: bool) -> None:
    (folder / operators.CPU_ADAM).mkdir()
    if not cured:
        (folder / operators.CPU_ADAM / "lock").touch()  # of a build that was killed


@trouble(bad=config(), cure="delete the file", ranks=1, prepare=_lock)
def stale_lock(case: Case) -> str:
    """What torch.utils.cpp_extension.load does before it compiles, and so DeepSpeed."""
    baton = FileBaton(str(operators.folder() / operators.CPU_ADAM / "lock"))
    case.hang_after(2.0)
    if not baton.try_acquire():
        baton.wait()
    return ""


def _checkpoint_of_two_ranks(folder: Path, cured: bool) -> None:
    spawn(_save, 2, folder, timeout_s=60.0)
    if cured:
        tag = folder / "universal"
        command = ["-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        places = ["--input_folder", str(folder / "two"), "--output_folder", str(tag)]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
        done = run_command([sys.executable, *command, *places], environment, timeout_s=60.0)
        if done.status:
            raise RunError(f"ds_to_universal ended with status {done.status}: {done.stderr[-300:]}")
        (folder / "latest").write_text(tag.name, encoding="utf-8")


def _save(job: Runtime, folder: Path) -> None:
    case = Case(job, config(), False, folder, lambda seconds: None)
    case.train(case.begin()).save_checkpoint(str(folder), tag="two")


@trouble(
    bad=config(),
    good={**config(), "checkpoint": {"load_universal": True}},
    cure="ds_to_universal, load_universal",
    ranks=1,
    prepare=_checkpoint_of_two_ranks,
)
def world_size_changed(case: Case) -> str:
    engine = case.begin()
    engine.load_checkpoint(str(case.folder))
    return "" if engine.global_steps == 1 else "nothing was loaded"


# Mistakes in the code.


@trouble(
    bad={**config(), "fp16": {"enabled": True}},
    good={**config(), "bf16": {"enabled": True}},
    cure="bf16",
    ranks=1,
    plan={"device": "cuda"},
)
def loss_scale_at_its_minimum(case: Case) -> str:
    """A gradient of 70,000, which float16 does not reach, through DeepSpeed's own loss scaler."""
    join(case.job)
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler

    fp16 = DeepSpeedConfig(case.config).float16_config
    dtype = torch.float16 if fp16.enabled else torch.bfloat16
    arguments = fp16.dynamic_loss_scale_args()
    scaler = CreateLossScaler(dtype, fp16.loss_scale, fp16.loss_scale == 0, arguments)
    weight = nn.Parameter(torch.ones(1, dtype=dtype))
    for _ in range(30):
        loss = (weight * 250 * 280).sum()
        (gradient,) = torch.autograd.grad(scaler.scale_loss(loss), weight)
        scaler.update_scale(not gradient.isfinite().all())
    return ""


@trouble(bad=config(stage=0), cure="engine.backward(loss)")
def plain_backward(case: Case) -> str:
    engine = case.begin()
    loss = case.loss(engine)
    if case.cured:
        engine.backward(loss)
    else:
        loss.backward()
    engine.step()
    return ""


@trouble(bad=config(stage=2, accumulate=4), cure="engine.step() after every backward")
def step_at_boundaries_only(case: Case) -> str:
    engine = case.begin()
    for micro_batch in range(8):
        engine.backward(case.loss(engine, micro_batch))
        if case.cured or micro_batch % 4 == 3:
            engine.step()
    steps = engine.global_steps
    return "" if steps == 2 else f"{steps} optimizer steps in 8 micro-batches, not 2"


@trouble(bad=config(stage=3), cure="with zero.Init(): build the model")
def whole_model_on_every_rank(case: Case) -> str:
    zero = join(case.job).zero
    with zero.Init(config_dict_or_path=case.config, enabled=case.cured):
        model = tiny()
    here = sum(getattr(p, "ds_tensor", p).nbytes for p in model.parameters())
    whole = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in model.parameters())
    return "" if here < whole else f"{here:,} bytes of weights on each rank, of {whole:,} in all"


@trouble(
    bad=config(stage=3, stage3_param_persistence_threshold=0),
    cure="with zero.GatheredParameters([weight])",
)
def parameter_not_gathered(case: Case) -> str:
    zero = join(case.job).zero
    weight = case.begin().module.lm_head.weight
    with zero.GatheredParameters([weight], enabled=case.cured):
        norm = weight.norm().item()
    return "" if norm else f"lm_head.weight: {weight.shape}, norm {norm}"


class Branching(Llama):
    """A decoder with a layer that a rank may leave out."""

    takes_extra, always = True, False

    def __init__(self, shape: ModelConfig) -> None:
        super().__init__(shape)
        self.extra = nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor:  # type: ignore[override]
        hidden = self.model(input_ids)
        if self.takes_extra:
            hidden = self.extra(hidden)
        elif self.always:
            hidden = hidden + 0 * self.extra(hidden)
        return self._mean_loss(hidden, targets)


@trouble(
    bad=config(stage=3, stage3_param_persistence_threshold=0),
    cure="run it on all ranks, times 0",
)
def layer_unused_on_one_rank(case: Case) -> str:
    """A layer that no rank uses does no harm: its gradient is zero."""
    Branching.takes_extra, Branching.always = case.job.is_main, case.cured
    case.train(case.begin(tiny(Branching)), steps=2)
    return ""


@trouble(bad=config(), cure="save_checkpoint on every rank")
def saved_by_rank_0_alone(case: Case) -> str:
    engine = case.train(case.begin())
    if case.cured or case.job.is_main:
        engine.save_checkpoint(str(case.folder))
    case.train(engine)
    return ""
