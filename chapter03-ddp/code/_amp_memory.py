"""What autocast saves of a training step's memory, and what it does not: predicted and measured."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from distlab import predict
from distlab.measure import LiveBytes, tensor_bytes
from distlab.run import Run

if TYPE_CHECKING:
    from amp_ddp import Lab, Trainee

PARTS = ("weights", "gradients", "moments", "activations")
TOLERANCE = 0.15  # of the activations: the formula leaves out small tensors


def report_memory(run: Run, lab: "Lab", trainees: Mapping[str, "Trainee"]) -> None:
    """Bytes of a rank in each precision. Only the activations depend on it."""
    rows, worst = [], 0.0
    for name in ("float32", "bfloat16", "float16"):
        predicted = predicted_bytes(lab, "fp32" if name == "float32" else "autocast")
        measured = measured_bytes(lab, trainees[name])
        rows += [
            [name, part, p / 1e6, m / 1e6, 100 * (p - m) / m]
            for part, p, m in zip(PARTS, predicted, measured, strict=True)
        ]
        run.check_equal(f"{name}: weights, gradients and moments", measured[:3], predicted[:3])
        worst = max(worst, abs(predicted[3] - measured[3]) / measured[3])
    run.table("memory", ["precision", "bytes of", "MB*", "MB", "error %"], rows, "* predicted")
    run.check_below("the worst error of the activations' prediction", worst, TOLERANCE)


def predicted_bytes(lab: "Lab", precision: str) -> list[int]:
    a = lab.model.config.architecture
    state = predict.model_state(predict.total_parameters(a), precision, "adamw")
    local_batch = lab.batches.local_batch_size
    saved = predict.saved_activations(a, precision, lab.args.seq_len, local_batch)
    return [int(n) for n in (state.weights, state.gradients, state.optimizer, saved)]


def measured_bytes(lab: "Lab", trainee: "Trainee") -> list[int]:
    """Of the tensors themselves; the activations are what the forward pass leaves behind it."""
    ((input_ids, targets),) = lab.first_batches(1)
    with LiveBytes(lab.job.device) as live:
        loss = trainee.loss(trainee.replica.module, input_ids, targets)
        kept = live.bytes
    loss.backward()
    moments = [
        state[name]
        for state in trainee.optimizer.state.values()
        for name in ("exp_avg", "exp_avg_sq")
    ]
    gradients = [p.grad for p in trainee.parameters if p.grad is not None]
    sizes = [tensor_bytes(trainee.parameters), tensor_bytes(gradients), tensor_bytes(moments), kept]
    trainee.optimizer.zero_grad()
    return sizes
