"""Ranks as threads beside the student's code, with collectives that never wait for ever."""

import array
import gc
import threading
import types

import numpy as np
import torch

from distlab.lab.grade_student import rig

PATIENCE_S = 5.0
MOMENTS = {"plain": 0, "momentum": 1, "adam": 2}


class Ranks:
    """Collectives between threads; `calls` of each rank: (name, shape, dtype)."""

    def __init__(self, ranks):
        self.barrier = threading.Barrier(ranks)
        self.given = [None] * ranks
        self.calls = [[] for _ in range(ranks)]

    def collective(self, rank, name, combine):
        def call(tensor):
            self.calls[rank].append((name, tuple(tensor.shape), str(tensor.dtype)))
            self.given[rank] = tensor.detach().clone()
            self.wait(rank, name)
            result = combine(list(self.given))
            self.wait(rank, name)
            self.given[rank] = None
            return result

        return call

    def wait(self, rank, name):
        try:
            self.barrier.wait(PATIENCE_S)
        except threading.BrokenBarrierError:
            raise TimeoutError(
                f"rank {rank} waits in {name} for a rank that has failed or does not call"
            ) from None

    def run(self, work):
        """What `work(rank)` gives on each rank; the first error, which is no waiting rank's."""
        results, errors = [None] * len(self.calls), []

        def body(rank):
            try:
                results[rank] = work(rank)
            except BaseException as error:
                errors.append(error)
                self.barrier.abort()

        threads = [
            threading.Thread(target=body, args=(r,), daemon=True) for r in range(len(results))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(4 * PATIENCE_S)
            assert not thread.is_alive(), "a rank has not come to an end"
        errors.sort(key=lambda error: isinstance(error, TimeoutError))
        if errors:
            raise errors[0]
        return results


class Optimizer:
    """SGD, with momentum or not, or Adam, with AdamW's decay: torch.optim loads for seconds."""

    def __init__(self, tensors, kind, rate, decay):
        self.tensors, self.kind, self.rate, self.decay = list(tensors), kind, rate, decay
        moments = MOMENTS[kind]
        self.state = [[torch.zeros_like(one) for _ in range(moments)] for one in self.tensors]
        self.steps = 0

    @torch.no_grad()
    def step(self):
        self.steps += 1
        for one, moments in zip(self.tensors, self.state, strict=True):
            if one.grad is None:
                continue
            one.mul_(1 - self.rate * self.decay)
            change = one.grad
            if self.kind == "momentum":
                change = moments[0].mul_(0.9).add_(change)
            elif self.kind == "adam":
                first, second = moments
                first.lerp_(change, 0.2)
                second.lerp_(change.square(), 0.1)
                unbiased = (second / (1 - 0.9**self.steps)).sqrt()
                change = first / (1 - 0.8**self.steps) / (unbiased + 1e-8)
            one.sub_(change, alpha=self.rate)

    def zero_grad(self, set_to_none=True):
        for one in self.tensors:
            one.grad = None if set_to_none or one.grad is None else torch.zeros_like(one)


@rig
def train(sharded_optimizer, options, weights, gradients, ranks, needs_gradient, weigh):
    """What each rank did and held; `options` of an `Optimizer`, `gradients` by step and rank.

    Per rank: (weights after each step, part after each step, what held otherwise than promised,
    the tensors handed to make_optimizer by call, calls of collectives); and, with `weigh`, how many
    bytes all ranks together keep beside what they were given.
    """
    job, made = Ranks(ranks), [[] for _ in range(ranks)]
    copies = [weights.clone().requires_grad_(needs_gradient) for _ in range(ranks)]
    given = [[one.clone() for one in step] for step in gradients]
    before = storages() if weigh else {}

    def work(rank):
        def make_optimizer(tensors):
            tensors = list(tensors)
            for one in tensors:
                faults.update({"has a history"} if one.grad_fn is not None else ())
            made[rank].append([one.detach().clone() for one in tensors])
            held.extend(tensors)
            return Optimizer(tensors, *options)

        def reduce_scatter(parts):
            if any(part[len(weights) :].any() for part in parts):
                faults.add("the padding of a gradient is not zeros")
            whole = sum(part.double() for part in parts).to(parts[0].dtype)
            return whole.view(ranks, -1)[rank].clone()

        faults, held, after, parts = set(), [], [], []
        address = copies[rank].data_ptr()
        mine = sharded_optimizer(copies[rank], rank, ranks, make_optimizer)
        if not torch.equal(copies[rank], weights):
            faults.add("weights are changed before the first step")
        for step in given:
            mine.step(
                step[rank],
                job.collective(rank, "reduce_scatter", reduce_scatter),
                job.collective(rank, "all_gather", torch.cat),
            )
            after.append(copies[rank].detach().tolist())
            parts.append([one.detach().tolist() for one in held])
            if any(one.grad is not None for one in held):
                faults.add("a gradient is kept from step to step")
        if copies[rank].data_ptr() != address:
            faults.add("weights are in other memory than before")
        if copies[rank].requires_grad != needs_gradient:
            faults.add("the weights' requires_grad is changed")
        if not torch.is_grad_enabled():
            faults.add("gradients are switched off for all that follows")
        if any(one.untyped_storage().data_ptr() == address for one in held):
            faults.add("the part is no copy of the weights")
        kept[rank] = mine, held
        return after, parts, faults

    kept = [None] * ranks
    results = job.run(work)
    beside = sum(hidden_bytes(mine) for mine, _ in kept) if weigh else 0
    logged = {one.untyped_storage().data_ptr() for rank in made for call in rank for one in call}
    after = storages() if weigh else {}
    grown = sum(size for address, size in after.items() if address not in {*before, *logged})
    for rank in range(ranks):
        same = (torch.equal(a[rank], b[rank]) for a, b in zip(given, gradients, strict=True))
        if not all(same):
            results[rank][2].add("a gradient is changed")
    return [(*one, made[r], job.calls[r]) for r, one in enumerate(results)], grown + beside


def hidden_bytes(root):
    """The bytes of arrays, bytes and long lists of numbers that an object leads to."""
    seen, todo, found = set(), [root], 0
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, (type, types.ModuleType, types.FunctionType)):
            continue
        seen.add(id(one))
        if isinstance(one, (np.ndarray, bytes, bytearray, array.array)):
            found += memoryview(one).nbytes
        elif isinstance(one, (list, tuple)) and len(one) > 100:
            found += 4 * len(one)
        if not isinstance(one, torch.Tensor):
            todo += gc.get_referents(one)
    return found


def storages():
    """The bytes of all tensors' memory, by address."""
    found = {}
    gc.collect()
    for one in gc.get_objects():
        if type(one) in (torch.Tensor, torch.nn.Parameter):
            for tensor in (one, one.grad if one.is_leaf else None):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
    return found
