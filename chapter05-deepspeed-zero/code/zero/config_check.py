"""What is wrong with a DeepSpeed config, found before a job starts; or with a job, from its log.

DeepSpeed refuses some mistakes after the model is built and the ranks have met, ignores others in
silence, and hangs on a few. A check here is a function of a `Plan` that yields a line for each
mistake it finds: what it is; the remedy. `FINDINGS` are all of them.
"""

import difflib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch

from distlab.host import usable_memory
from zero import messages, operators
from zero.known_keys import BATCH, MICRO, TOTAL, ask_deepspeed

IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")
BUCKETS = ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size")
SECTIONS = (
    "zero_optimization", "optimizer", "optimizer.params", "scheduler", "scheduler.params", "fp16",
    "bf16", "data_types", "activation_checkpointing", "aio", "checkpoint", "flops_profiler",
    "comms_logger", "tensorboard", "wandb", "csv_monitor", "comet", "pipeline",
)  # fmt: skip
SCHEDULERS = ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle", "LRRangeTest")
MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}
HALVINGS = 5  # of the loss scale, that a healthy run may need before it has found its own


@dataclass(frozen=True)
class Plan:
    """A config and what the job that is to use it looks like."""

    config: Mapping[str, Any]
    world_size: int
    device: str = "cpu"
    pipeline_stages: int = 1
    client_optimizer: bool = False  # the script gives deepspeed.initialize an optimizer
    auto_filled: bool = False  # the script replaces "auto" values, as Hugging Face's Trainer does
    log: str = ""
    remedy_of_auto: str = "give numbers, or --auto-filled where the script does"
    extensions: Path = field(default_factory=operators.folder)
    memory: int = field(default_factory=usable_memory)  # of a rank's device, bytes

    def section(self, *names: str) -> dict[str, Any]:
        """A part of the config; empty where it is missing, or no section."""
        found: Any = self.config
        for name in names:
            found = found.get(name) if isinstance(found, Mapping) else None
        return dict(found) if isinstance(found, Mapping) else {}

    @property
    def zero(self) -> dict[str, Any]:
        return self.section("zero_optimization")

    @property
    def stage(self) -> int:
        stage = self.zero.get("stage", 0)
        return stage if isinstance(stage, int) else 0

    def on(self, name: str) -> bool:
        return self.section(name).get("enabled") is True

    def has_operator(self, name: str) -> bool:
        return (self.extensions / name / f"{name}.so").exists()

    def offloaded_to(self, part: str) -> str:
        return str(self.section("zero_optimization", f"offload_{part}").get("device", "none"))


@dataclass(frozen=True)
class Finding:
    name: str
    text: str

    def __str__(self) -> str:
        """In one line, whatever keys and values the config has."""
        text = re.sub(r"\S{80,}", lambda long: f"{long[0][:60]}…", " ".join(self.text.split()))
        return f"{self.name}: {text}"


def check(plan: Plan) -> list[Finding]:
    """All that is found. What DeepSpeed itself refuses is asked last, for what no other names."""
    found = [
        Finding(one.__name__.replace("_", " "), text) for one in FINDINGS for text in one(plan)
    ]
    return found or [Finding("refused", text) for text in refused(plan)]


def unknown_keys(plan: Plan) -> Iterator[str]:
    """DeepSpeed forbids them in most sections; at the top level it does not even look."""
    asking = ask_deepspeed(plan.config)
    for path, known in asking.unknown.items():
        name = path.split(".")[-1]
        near = difflib.get_close_matches(name, sorted(known), n=1)
        remedy = f"did you mean {near[0]}?" if near else "remove it"
        yield f"{path} is no key of DeepSpeed's; {remedy}"


def sections(plan: Plan) -> Iterator[str]:
    """DeepSpeed's own refusal of them names no key, or is a traceback."""
    for path in SECTIONS:
        *around, name = path.split(".")
        above = plan.section(*around) if around else plan.config
        if name in above and not isinstance(above[name], Mapping):
            yield f"{path} {above[name]!r} is no section; write an object, {{…}}, or leave it out"


def switches(plan: Plan) -> Iterator[str]:
    """A text is true to Python, "false" too."""
    for name in plan.config:
        value = plan.section(name).get("enabled", False)
        if not isinstance(value, bool) and value != "auto":
            yield f"{name}.enabled {value!r} is neither true nor false; write it without quotes"


def values(plan: Plan) -> Iterator[str]:
    """What DeepSpeed reads without a look, and fails on when it trains."""
    if not _positive_or_none(every := plan.config.get("steps_per_print")):
        yield f"steps_per_print {every!r} is no whole number of at least 1; give one"
    dtype = plan.section("data_types").get("grad_accum_dtype")
    if dtype not in (None, "auto", "fp32", "fp16", "bf16"):
        yield f"data_types.grad_accum_dtype {dtype!r} is none; use fp32, fp16 or bf16"
    name = plan.section("scheduler").get("type")
    known = (*SCHEDULERS, *torch.optim.lr_scheduler.__all__)
    if name is not None and name != "auto" and name not in known:
        yield f"scheduler.type {name!r} is none; use one of {', '.join(SCHEDULERS)}"
    for monitor, module in MONITORS.items():
        if plan.on(monitor) and find_spec(module) is None:
            yield f"{monitor} is enabled and not installed; pip install {module}, or remove it"


def stage(plan: Plan) -> Iterator[str]:
    value = plan.zero.get("stage", 0)
    if value != "auto" and (type(value) is not int or value not in range(4)):
        yield f"zero_optimization.stage {value!r} is none; use 0, 1, 2 or 3"


def batch_sizes(plan: Plan) -> Iterator[str]:
    """train_batch_size = micro-batch x accumulation x ranks; DeepSpeed fills in what is missing."""
    given = [plan.config.get(name) for name in BATCH]
    if "auto" in given:
        return
    if wrong := [n for n, v in zip(BATCH, given, strict=True) if not _positive_or_none(v)]:
        yield f"{wrong[0]} {plan.config[wrong[0]]!r} is no whole number of at least 1; give one"
        return
    total, micro, accumulate = given
    ranks = max(1, plan.world_size // plan.pipeline_stages)
    if total is None and micro is None:
        yield f"neither {TOTAL} nor {MICRO} is given; give one of them"
        return
    if total is None:
        return
    per_step = (micro or 1) * (accumulate or 1) * ranks
    exact = micro is not None and accumulate is not None
    if total == per_step or (not exact and total % per_step == 0):
        return
    below, above = total // per_step * per_step, (total // per_step + 1) * per_step
    fits = f"{per_step}" if exact else f"{below} or {above}" if below else f"{above}"
    shown = f"micro-batch {micro or 'any'} x accumulation {accumulate or 'any'} x {ranks} ranks"
    yield f"{TOTAL} {total} is not {shown}; leave it out, or use {fits}"


def _positive_or_none(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0)


def automatic_values(plan: Plan) -> Iterator[str]:
    """Hugging Face's Trainer replaces them by its own arguments; DeepSpeed takes them for text."""
    if not plan.auto_filled and (names := sorted(_having(plan.config, "auto"))):
        yield (
            f'"auto" in {", ".join(names)}: some scripts replace it, as the Trainer does, and '
            f"DeepSpeed does not; {plan.remedy_of_auto}"
        )


def _having(config: Mapping[str, Any], wanted: str, path: str = "") -> Iterator[str]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _having(value, wanted, f"{path}{name}.")
        elif value == wanted or (isinstance(value, list) and wanted in value):
            yield path + name


def pipeline(plan: Plan) -> Iterator[str]:
    if (plan.pipeline_stages > 1 or plan.section("pipeline")) and plan.stage >= 2:
        yield (
            f"a pipeline keeps the gradients of many micro-batches, and ZeRO stage {plan.stage} "
            "divides them after each; use stage 1"
        )
    if plan.world_size % plan.pipeline_stages:
        yield (
            f"{plan.pipeline_stages} pipeline stages do not divide {plan.world_size} ranks; "
            f"use a divisor of {plan.world_size}"
        )


def precision(plan: Plan) -> Iterator[str]:
    if plan.on("fp16") and plan.on("bf16"):
        yield "fp16 and bf16 are both enabled; keep bf16, or fp16 on a card that has no bf16"
    if plan.on("fp16") and plan.device == "cpu":
        yield (
            'fp16 on a CPU: DeepSpeed refuses it on most processors; use "bf16": {"enabled": true}'
        )


def loss_scale(plan: Plan) -> Iterator[str]:
    """A gradient above 65504 is infinite in float16: the scale must be able to fall until it fits.

    At its minimum DeepSpeed ends the run; a fixed scale it keeps, and skips every step from then.
    """
    fp16 = plan.section("fp16")
    fixed, power = fp16.get("loss_scale", 0), fp16.get("initial_scale_power", 16)
    least = fp16.get("min_loss_scale", 1)
    if not plan.on("fp16") or not all(isinstance(v, (int, float)) for v in (fixed, power, least)):
        return
    if fixed:
        yield f"fp16.loss_scale {fixed} never falls when gradients overflow; use 0, which adapts"
    elif least > 0 and power - HALVINGS < math.log2(least):
        yield (
            f"fp16.initial_scale_power {power} leaves fewer than {HALVINGS} halvings above "
            f"min_loss_scale {least}; use 16 and 1"
        )


def optimizer_twice(plan: Plan) -> Iterator[str]:
    """The script's wins, without a word, and the config's learning rate is nobody's."""
    if plan.client_optimizer and (one := plan.section("optimizer")):
        yield (
            f"the script gives an optimizer and so does the config ({one.get('type')}): the "
            "config's is ignored; remove one of them"
        )


def operator_missing(plan: Plan) -> Iterator[str]:
    """Without it DeepSpeed compiles for minutes at first use, or fails where there is no g++."""
    devices = {part: plan.offloaded_to(part) for part in ("optimizer", "param")}
    optimizer = plan.section("optimizer")
    parameters = plan.section("optimizer", "params")
    torchs = parameters.get("torch_adam") is True
    adam = str(optimizer.get("type", "")).lower() in ("adam", "adamw")
    if devices["optimizer"] in ("cpu", "nvme") and adam and not torchs:
        yield from _unbuilt(plan, operators.CPU_ADAM, "offload_optimizer")
    elif adam and not torchs and not plan.has_operator("fused_adam"):
        yield (
            f'optimizer {optimizer["type"]} without "torch_adam": DeepSpeed compiles its fused '
            "Adam at first use, for minutes; set optimizer.params.torch_adam to true"
        )
    for part, device in devices.items():
        if device == "nvme":
            for name in (operators.PINNED, operators.ASYNC_IO):
                yield from _unbuilt(plan, name, f"offload_{part} to nvme")


def _unbuilt(plan: Plan, name: str, wanted_by: str) -> Iterator[str]:
    if not plan.has_operator(name):
        yield f"{wanted_by} needs the operator {name}, which is not built; {operators.CURE}"


def stale_lock(plan: Plan) -> Iterator[str]:
    """torch's build waits for this file to go, without a limit and without a word."""
    for lock in sorted(plan.extensions.glob("*/lock")):
        yield (
            f"{lock} is a build's lock: every job waits for it without end; "
            "if nothing compiles now, delete it"
        )


def nvme_folder(plan: Plan) -> Iterator[str]:
    for part in ("optimizer", "param"):
        if plan.offloaded_to(part) != "nvme":
            continue
        key = f"offload_{part}.nvme_path"
        given = plan.section("zero_optimization", f"offload_{part}").get("nvme_path")
        if not isinstance(given, str) or not given.strip():
            yield f"{key} is missing; give a folder on an NVMe disk"
            continue
        folder = Path(given)
        if not folder.is_dir():
            yield f"{key} {folder} is no folder; create it on an NVMe disk"
        elif not os.access(folder, os.W_OK):
            yield f"{key} {folder} is not writable; use a folder of yours"
        elif (kind := _file_system(folder)) in IN_MEMORY:
            yield f"{key} {folder} is a {kind}: memory, not a disk; use a folder on an NVMe disk"


def _file_system(folder: Path) -> str:
    """The type of the file system that holds `folder`: of the deepest mount above it."""
    place = folder.resolve()
    mounts = {Path(one.mountpoint): one.fstype for one in psutil.disk_partitions(all=True)}
    return next((mounts[one] for one in (place, *place.parents) if one in mounts), "")


def stage_3_only(plan: Plan) -> Iterator[str]:
    """DeepSpeed takes them in any stage, and does nothing with them below stage 3."""
    if plan.stage == 3:
        return
    if plan.offloaded_to("optimizer") == "nvme":
        yield (
            f"zero_optimization.offload_optimizer to nvme does nothing in stage {plan.stage}; "
            "use stage 3, or the device cpu"
        )
    for name in sorted(plan.zero):
        offload = name == "offload_param" and plan.offloaded_to("param") != "none"
        if name.startswith("stage3_") or offload:
            yield (
                f"zero_optimization.{name} does nothing in stage {plan.stage}; "
                "use stage 3, or remove it"
            )


def bucket_sizes(plan: Plan) -> Iterator[str]:
    """A bucket counts elements, and overlap_comm keeps two of the one that reduces."""
    width = 2 if plan.on("fp16") or plan.on("bf16") else 4
    for name in BUCKETS:
        elements = plan.zero.get(name)
        if isinstance(elements, (int, float)) and elements * width > plan.memory:
            size = min(elements, 10**18) * width / 1e9
            yield (
                f"zero_optimization.{name} {elements} is {size:.0f} GB, "
                f"and a rank's device has {plan.memory / 1e9:.0f} GB; use 5e8 or less"
            )


def known_messages(plan: Plan) -> Iterator[str]:
    for message, line in messages.found_in(plan.log):
        yield f'the log has "{line}", which is "{message.name}"; {message.cure}'


FINDINGS: list[Callable[[Plan], Iterator[str]]] = [
    sections, switches, values, unknown_keys, stage, batch_sizes, automatic_values, pipeline,
    precision, loss_scale, optimizer_twice, operator_missing, stale_lock,
    nvme_folder, stage_3_only, bucket_sizes, known_messages,
]  # fmt: skip


def refused(plan: Plan) -> Iterator[str]:
    if said := ask_deepspeed(plan.config).refusal:
        yield f"DeepSpeed refuses the config: {said.rstrip('. ')}; correct or remove it"
