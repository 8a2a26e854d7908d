"""What the forward pass keeps for the backward pass, and the peak of the two.

The Llama block as autograd saves it in `distlab.model`, bytes per token; b bytes per element of the
compute precision, float32 where a 4 stands (found with torch.autograd.graph.saved_tensors_hooks,
and compared with a run by `estimate_resources.py --verify`):

    each norm      (4 + 2b)·H + 4     its input in float32, the normalized and the scaled vector
    attention      b·(2Q + 2KV) + 4h  queries, output; keys, values; one log-sum-exp per head
    SwiGLU         b·4I               gate, silu(gate), up, and their product
    output, loss   (4 + 2b)·H + 4 + 4V  the final norm; the log-probabilities in float32

The fused attention kernels store no T x T scores (FlashAttention, arXiv 2205.14135). What else
changes these numbers:

- Recomputation. "full" keeps a block's input only (Chen et al., arXiv 1604.06174). "selective"
  keeps the input, attention's output and every second matrix product, and computes the rest again
  (torchtitan, `activation_checkpoint.mode = selective`, option op). The selective recomputation of
  Korthikanti et al. leaves out the T x T scores, which fused attention does not have anyway.
- Kernels. "fused-norms": a norm written as one kernel keeps its input, its output and a scale, all
  in the compute precision (torch.nn.RMSNorm on CUDA; torchtitan's fused_rmsnorm). "compiled":
  torch.compile's partitioner keeps the operands of the matrix products and makes silu(gate) again.
  Source: He, "Min-cut optimal(*) recomputation with AOTAutograd", dev-discuss.pytorch.org, 2022;
  a block of hidden size 128 (torch 2.13) keeps these bytes exactly. "compiled-loss": the loss too,
  which then keeps the logits in the compute precision and writes one gradient of them, with no
  float32 vector in between.
"""

from functools import lru_cache
from typing import Literal

from distlab.predict.architecture import Architecture
from distlab.predict.memory import PRECISIONS
from distlab.predict.params import Split, attention_weights, mlp_weights, stage_layers

Recompute = Literal["none", "selective", "full"]
Kernels = Literal["eager", "fused-norms", "compiled", "compiled-loss"]


def layer_activations(
    a: Architecture, layer: int, precision: str, kernels: Kernels = "eager"
) -> Split:
    """Bytes per token that one block saves, split as tensor parallelism splits them.

    Norms see the whole hidden vector on every rank; heads and the MLP's inner vectors are divided
    (Megatron-LM without sequence parallelism; Korthikanti et al., arXiv 2205.05198, section 4.2).
    """
    b = PRECISIONS[precision].compute
    vectors = 4 if a.gated_mlp else 2
    norm = _norm(a, a.hidden_size, precision)
    if kernels != "eager":
        norm = min(norm, 2 * b * a.hidden_size + 4)
    if kernels in ("compiled", "compiled-loss") and a.gated_mlp:
        vectors = 3
    return Split(0, 2 * norm) + _attention(a, precision) + _mlp(a, layer, precision, vectors)


def head_activations(a: Architecture, precision: str, kernels: Kernels = "eager") -> Split:
    """Bytes per token of the final norm and the loss that are saved: 4·V for log-probabilities.

    A compiled loss saves the logits in the compute precision instead.
    """
    element = PRECISIONS[precision].compute if kernels == "compiled-loss" else 4
    return Split(element * a.vocab_size, _norm(a, a.hidden_size, precision))


def loss_peak(a: Architecture, precision: str, kernels: Kernels = "eager", tp: int = 1) -> Split:
    """Bytes per token at the start of the backward pass: three float32 vectors of V.

    The log-probabilities, their gradient and the logits' gradient exist together then. Divided
    over tp they are four: torch's `loss_parallel` adds the exponentials to the gradient in a
    vector of its own (torch/distributed/tensor/parallel/loss.py, `_nll_loss_and_log_softmax_
    backward`). A compiled loss has the logits and their gradient, in the compute precision.
    """
    element = 12 if tp == 1 else 16
    if kernels == "compiled-loss":
        element = 2 * PRECISIONS[precision].compute
    return Split(element * a.vocab_size, _norm(a, a.hidden_size, precision))


def saved_activations(
    a: Architecture,
    precision: str,
    seq_len: int,
    batch: int,
    recompute: Recompute = "none",
    kernels: Kernels = "eager",
) -> float:
    """Bytes that one GPU holds for the backward pass of `batch` sequences when the forward ends."""
    tokens = batch * seq_len
    layers = range(a.num_hidden_layers)
    kept = _kept(a, layers, precision, recompute, kernels)
    per_token = kept + head_activations(a, precision, kernels)
    copies = _weight_copies(a, () if recompute == "full" else layers, precision, head=True)
    return tokens * per_token.total + _rope_tables(a, seq_len, precision) + copies.total


def peak_activations(
    a: Architecture,
    precision: str,
    seq_len: int,
    batch: int,
    recompute: Recompute = "none",
    tp: int = 1,
    pp: int = 1,
    stage: int = 0,
    micro_batches: int = 1,
    chunks: int = 1,
    sequence_parallel: bool = False,
    kernels: Kernels = "eager",
    sharded: bool = False,
) -> float:
    """The most bytes that forward and backward need on one GPU beside the model's state.

    A 1F1B pipeline holds min(p - stage, m) micro-batches of its layers at once (Narayanan et al.,
    arXiv 2104.04473, section 2.2); for more `chunks` see `micro_batches_in_flight`. With sequence
    parallelism tp divides all activations (Korthikanti et al., arXiv 2205.05198, equation 4). With
    recomputation one layer at a time is computed again. On top comes the larger of what the loss
    and what the backward pass of one layer need. With few tokens the end of the backward pass can
    need more: see `table_gradients`. `sharded` weights are gathered in the compute precision, so
    that autocast makes no copies.
    """
    layers = stage_layers(a.num_hidden_layers, pp, stage)
    last = stage == pp - 1
    in_flight = micro_batches_in_flight(pp, stage, micro_batches, chunks)

    def per_rank(activations: Split) -> float:
        return activations.total / tp if sequence_parallel else activations.per_rank(tp)

    kept = in_flight * per_rank(_kept(a, layers, precision, recompute, kernels))
    if not last:  # its output waits for its gradient, as torch.distributed.pipelining keeps it
        kept += in_flight * per_rank(Split(0, PRECISIONS[precision].compute * a.hidden_size))
    loss = per_rank(loss_peak(a, precision, kernels, tp)) if last else 0.0
    peaks = _layer_peaks(a, layers, precision, recompute, kernels)
    backward = max(per_rank(one) for one in peaks)
    copied = layers[-1:] if recompute == "full" else layers
    copies = Split(0) if sharded else _weight_copies(a, copied, precision, head=last)
    tokens = batch * seq_len
    tables = _rope_tables(a, seq_len, precision)
    output, waiting, final = (g.per_rank(tp) for g in table_gradients(a, precision, pp, stage))
    product = per_rank(_logits_gradient(a, precision, kernels)) if last else 0.0
    highest = max(
        tokens * (kept + loss),
        tokens * (kept + product) + output,
        tokens * (kept + backward) + waiting,
    )
    return max(highest + tables + copies.per_rank(tp), final)


def micro_batches_in_flight(pp: int, stage: int, micro_batches: int, chunks: int = 1) -> float:
    """How many micro-batches' activations of all its layers a pipeline stage holds at most.

    1F1B: min(p - stage, m). Interleaved, with v chunks of 1/v of the stage's layers: the warm-up's
    2·(p - stage - 1) + (v - 1)·p chunks and the one at work, of v·m in all; on stage 0 that is
    1 + (p - 1)/(p·v) times what 1F1B holds. Source: Narayanan et al. (arXiv 2104.04473), section
    2.2; Korthikanti et al. (arXiv 2205.05198), section 4.2.3.
    """
    if chunks == 1:
        return min(pp - stage, micro_batches)
    held = 2 * (pp - stage - 1) + (chunks - 1) * pp + 1
    return min(held, micro_batches * chunks) / chunks


def table_gradients(
    a: Architecture, precision: str, pp: int = 1, stage: int = 0
) -> tuple[Split, Split, Split]:
    """Bytes of new gradients of the output matrix and the embedding, V·H each, at three moments.

    A new gradient exists beside the one that it is added to. The output matrix's is made first. If
    it is tied to the embedding (on one GPU), it waits through the backward pass for the
    embedding's, the last; then both and their sum exist together. With few tokens per step these
    outweigh the activations. Found with `distlab.measure.LiveBytes`.
    """
    one = Split(PRECISIONS[precision].gradient * a.vocab_size * a.hidden_size)
    if a.tie_word_embeddings and pp == 1:
        return one, one, one * 3
    first, last = stage == 0, stage == pp - 1
    return one * last, Split(0), one * first


def _logits_gradient(a: Architecture, precision: str, kernels: Kernels) -> Split:
    """Bytes per token that the output product's backward finds: its gradient, the final norm."""
    return head_activations(a, precision, kernels)


def gpt_block_activations(
    hidden: int, heads: int, seq_len: int, batch: int, tp: int = 1,
    sequence_parallel: bool = False, recompute: Recompute = "none",
) -> float:  # fmt: skip
    """Bytes of one GPT block with dropout, unfused attention, 16 bits: s·b·h·(34 + 5·a·s/h).

    With tensor parallelism s·b·h·(10 + 24/t + 5·a·s/(h·t)); with sequence parallelism too, all of
    it / t; recompute "selective" drops the 5·a·s/h of attention; "full" leaves the input, 2·s·b·h.
    Source: Korthikanti et al. (arXiv 2205.05198), equations 1 to 6 and table 2.
    """
    unit = seq_len * batch * hidden
    if recompute == "full":
        return 2.0 * unit
    scores = 5 * heads * seq_len / hidden if recompute == "none" else 0.0
    if sequence_parallel:
        return unit * (34 + scores) / tp
    return unit * (10 + (24 + scores) / tp)


@lru_cache(maxsize=4096)
def _kept(
    a: Architecture, layers: range, precision: str, recompute: Recompute, kernels: Kernels
) -> Split:
    kept = Split(0)
    for layer in layers:
        kept += _layer_kept(a, layer, precision, recompute, kernels)
    return kept


def _layer_kept(
    a: Architecture, layer: int, precision: str, recompute: Recompute, kernels: Kernels
) -> Split:
    """What one block keeps from its forward pass for its backward pass."""
    if recompute == "none":
        return layer_activations(a, layer, precision, kernels)
    b = PRECISIONS[precision].compute
    block_input = Split(0, b * a.hidden_size)
    if recompute == "full":
        return block_input
    # Of the products q, k, v, output, (gate,) up, down those at odd places are kept: q, v, gate and
    # down, or q, v and up; and what fused attention gives, with its log-sum-exp.
    attention = b * (a.query_size + a.value_size + a.key_value_size) + 4 * a.num_attention_heads
    down = b * a.hidden_size if a.gated_mlp else 0
    return block_input + Split(attention + b * _inner_size(a, layer), down)


@lru_cache(maxsize=4096)
def _layer_peaks(
    a: Architecture, layers: range, precision: str, recompute: Recompute, kernels: Kernels
) -> tuple[Split, ...]:
    """One for each kind of layer: with its experts, or without."""
    kinds = {a.is_sparse(layer): layer for layer in layers}
    return tuple(_layer_peak(a, layer, precision, recompute, kernels) for layer in kinds.values())


def _layer_peak(
    a: Architecture, layer: int, precision: str, recompute: Recompute, kernels: Kernels
) -> Split:
    """A layer's backward pass: two MLP gradients and the residual's; with recomputation also what
    the layer computes again."""
    inner = _inner_size(a, layer) * PRECISIONS[precision].compute
    gradients = Split(2 * inner, PRECISIONS[precision].compute * a.hidden_size)
    if recompute == "none":
        return gradients
    again = layer_activations(a, layer, precision, kernels)
    if recompute == "selective":
        again += _layer_kept(a, layer, precision, recompute, kernels) * -1
    return gradients + again


def _attention(a: Architecture, precision: str) -> Split:
    b = PRECISIONS[precision].compute
    split = Split(b * 2 * a.query_size + 4 * a.num_attention_heads)
    if a.latent is not None:  # keys and values of every head are expanded from the latent vector
        split = Split(b * 2 * (a.query_size + a.value_size) + 4 * a.num_attention_heads)
        for width in (a.latent.q_lora_rank or 0, a.latent.kv_lora_rank):
            split += Split(0, _norm(a, width, precision))
        return split
    split += Split(b * 2 * a.key_value_size)
    if a.qk_norm:
        split += Split((4 + b) * (a.query_size + a.key_value_size))
    return split


def _mlp(a: Architecture, layer: int, precision: str, vectors: int) -> Split:
    """So many inner vectors. Experts keep each token k times more, in and out."""
    b = PRECISIONS[precision].compute
    inner = Split(b * vectors * _inner_size(a, layer))
    if not a.is_sparse(layer) or a.experts is None:
        return inner
    copies = b * 2 * a.experts.experts_per_token * a.hidden_size
    return inner + Split(0, copies + 8 * a.experts.num_experts)


def _inner_size(a: Architecture, layer: int) -> int:
    if not a.is_sparse(layer) or a.experts is None:
        return a.intermediate_size
    e = a.experts
    return e.experts_per_token * e.intermediate_size + e.shared_intermediate_size


def _norm(a: Architecture, width: int, precision: str) -> float:
    """RMSNorm in float32 keeps three vectors and a scale; the fused LayerNorm two, and mean and
    deviation."""
    b = PRECISIONS[precision].compute
    return 2 * b * width + 8 if a.layer_norm else (4 + 2 * b) * width + 4


def _rope_tables(a: Architecture, seq_len: int, precision: str) -> float:
    if a.learned_positions:
        return 0.0
    width = a.head_dim if a.latent is None else a.latent.qk_rope_head_dim
    return 2 * seq_len * width * PRECISIONS[precision].compute


@lru_cache(maxsize=4096)
def _weight_copies(a: Architecture, layers: range | tuple[()], precision: str, head: bool) -> Split:
    """torch.autocast's bfloat16 copies of the float32 matrices, saved with the activations."""
    if precision != "autocast":
        return Split(0)
    copies = Split(a.vocab_size * a.hidden_size if head else 0)
    for layer in layers:
        copies += attention_weights(a) + mlp_weights(a, layer)
    return copies * PRECISIONS[precision].compute
