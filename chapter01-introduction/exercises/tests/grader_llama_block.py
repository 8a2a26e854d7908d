"""One Llama block, every operation in the open, so that each saved tensor can be found."""

import torch
from torch import nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight; [batch, seq, hidden] in and out."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        scale = torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5)  # [batch, seq, 1]
        return (x * scale) * self.weight


class LlamaBlock(nn.Module):
    """RMSNorm, attention with grouped queries, RMSNorm, SwiGLU; no rotary embedding, no bias."""

    def __init__(self, hidden_size, intermediate_size, num_heads, num_kv_heads):
        super().__init__()
        self.heads, self.kv_heads = num_heads, num_kv_heads
        self.head_dim = hidden_size // num_heads
        kv_size = num_kv_heads * self.head_dim
        self.input_norm = RMSNorm(hidden_size)
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.mlp_norm = RMSNorm(hidden_size)
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x):
        x = x + self.attention(self.input_norm(x))
        return x + self.mlp(self.mlp_norm(x))

    def attention(self, x):
        batch, seq, hidden = x.shape
        groups = self.heads // self.kv_heads
        # queries of one group share a key/value head: [batch, kv_heads, groups * seq, head_dim]
        q = self.q_proj(x).view(batch, seq, self.kv_heads, groups, self.head_dim)
        q = q.permute(0, 2, 3, 1, 4).reshape(batch, self.kv_heads, groups * seq, self.head_dim)
        k = self.k_proj(x).view(batch, seq, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, seq, self.kv_heads, self.head_dim).transpose(1, 2)
        scores = q @ k.transpose(2, 3) * self.head_dim**-0.5
        mask = x.new_full((seq, seq), float("-inf")).triu(1).repeat(groups, 1)
        probabilities = (scores + mask).softmax(-1)
        mixed = probabilities @ v  # [batch, kv_heads, groups * seq, head_dim]
        mixed = mixed.view(batch, self.kv_heads, groups, seq, self.head_dim)
        return self.o_proj(mixed.permute(0, 3, 1, 2, 4).reshape(batch, seq, hidden))

    def mlp(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
