"""Chapter 1's first script: its handwritten gradient, its sums, and its checks."""

import json

import numpy as np
import pytest
import torch

import exact_gradient
from distlab.errors import UsageError


@pytest.mark.parametrize("axes", [None, (1,), (0, 1)], ids=["plain", "own", "everybody"])
def test_gradient_equals_autograd(axes):
    """Of the mean of the workers' losses; 1e-12: float64, some hundred terms."""
    text = exact_gradient.Text("stdlib", seed=1)
    parameters = text.new_parameters()
    shards = text.examples(60).shared_by(3)
    losses, own = exact_gradient.loss_and_gradients(parameters, shards, batch_norm=axes)
    twins = {name: torch.tensor(value, requires_grad=True) for name, value in parameters.items()}
    loss = torch_loss(twins, torch.tensor(shards.x), torch.tensor(shards.y), axes)
    loss.backward()
    assert abs(losses.mean() - loss.item()) < 1e-12
    for name, twin in twins.items():
        np.testing.assert_allclose(own[name].mean(axis=0), twin.grad.numpy(), atol=1e-12)


def torch_loss(twins, x, y, axes):
    w1, b1, w2, b2 = twins.values()
    sums = x @ w1
    if axes:
        variance = sums.var(axes, correction=0, keepdim=True)
        sums = (sums - sums.mean(axes, keepdim=True)) / (variance + 1e-5).sqrt()
    logits = torch.tanh(sums + b1) @ w2 + b2
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())


def test_examples_are_consecutive_characters_and_survive_cutting():
    text = exact_gradient.Text("stdlib", seed=0)
    batch = text.examples(12)
    seen = batch.x.reshape(12, -1, text.vocabulary).argmax(axis=-1)
    corpus = text.codes.astype(np.uint8).tobytes()
    for context, following in zip(seen, batch.y[0], strict=True):
        assert bytes([*context, following]) in corpus
    shards = batch.cut([7, 4, 1])
    assert [shard.y.shape for shard in shards] == [(1, 7), (1, 4), (1, 1)]
    np.testing.assert_array_equal(np.concatenate([s.x for s in shards], axis=1), batch.x)
    np.testing.assert_array_equal(batch.shared_by(4).x.reshape(batch.x.shape), batch.x)


def test_ring_and_tree_add_everything_in_their_own_order():
    vectors = np.array([[1e8, 1, 0, 0], [1, 1e8, 0, 0], [-1e8, 1, 3, 0], [1, -1e8, 0, 4]])
    vectors = vectors.astype(np.float32)
    one = np.float32(1)
    ring = exact_gradient.ring_sum(vectors)
    assert ring.tolist() == [((1e8 + one) - 1e8) + one, ((1e8 + one) - 1e8) + one, 3, 4]
    tree = exact_gradient.tree_sum(vectors)
    assert tree[2:].tolist() == [3, 4]
    integers = np.arange(32, dtype=np.float32).reshape(8, 4)  # exact in every order
    for total in (exact_gradient.ring_sum(integers), exact_gradient.tree_sum(integers)):
        assert total.tolist() == integers.sum(axis=0).tolist()


def test_all_checks_hold_at_smoke_size(tmp_path):
    record = tmp_path / "record.json"
    for workers in ("3", "8"):
        flags = ["--preset", "smoke", "--workers", workers, "--json", str(record)]
        assert exact_gradient.main(flags) == 0
    written = json.loads(record.read_text())
    assert len(written["checks"]) == 11 and all(check["ok"] for check in written["checks"])
    assert set(written["figures"]) == {"summation_order", "training"}
    assert [row[0] for row in written["tables"]["equal_shards"]["rows"]] == list(range(1, 9))


def test_a_mean_without_weights_is_noticed(monkeypatch, capsys):
    honest = exact_gradient.mean
    monkeypatch.setattr(exact_gradient, "mean", lambda own, weights=None: honest(own))
    assert exact_gradient.main(["--preset", "smoke", "--steps", "1"]) == 1
    assert "check: the weights b / B make it right … FAILED" in capsys.readouterr().out


def test_a_short_corpus_is_refused(tmp_path):
    (tmp_path / "note.txt").write_text("too short")
    with pytest.raises(UsageError, match="has 9 characters; use one of 1000 or more"):
        exact_gradient.main(["--preset", "smoke", "--corpus", str(tmp_path)])
