"""The one attention of the encoders and projectors.

Every attention that is ours goes through `attention`, because Metal's kernels have a trap that no
other backend shows (see there).
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

# Metal's short-query kernel serves up to so many queries, and gives a backward no log-sum-exp.
SHORT_QUERIES = 8


def attention(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | str | None = None
) -> mx.array:
    """softmax(q kᵀ · scale + mask) v, over [B, heads, L, head_dim]; "causal" aligns the last query
    with the last key.

    MLX 0.32 on Metal raises in the backward pass of attention with at most 8 queries and no array
    mask, so few queries get their mask as an array: the unfused kernels, and right gradients.
    """
    if q.shape[2] <= SHORT_QUERIES and not isinstance(mask, mx.array):
        keys = mx.arange(k.shape[2])[None]
        last = (
            k.shape[2]
            if mask is None
            else mx.arange(q.shape[2])[:, None] + (k.shape[2] - q.shape[2] + 1)
        )
        mask = mx.broadcast_to(keys < last, (1, 1, q.shape[2], k.shape[2]))
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)


class SelfAttention(nn.Module):
    """Multi-head self-attention with biases, under Hugging Face's SigLIP and CLIP names."""

    def __init__(self, hidden_size: int, num_heads: int, bias: bool = True):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (hidden_size // num_heads) ** -0.5
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=bias)

    def __call__(self, x: mx.array, mask: mx.array | str | None = None) -> mx.array:
        B, L, D = x.shape

        def heads(y: mx.array) -> mx.array:
            return y.reshape(B, L, self.num_heads, -1).transpose(0, 2, 1, 3)

        out = attention(
            heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x)), self.scale, mask
        )
        return self.out_proj(out.transpose(0, 2, 1, 3).reshape(B, L, D))


class PackedAttention(nn.Module):
    """Cross-attention with torch.nn.MultiheadAttention's parameters: q, k and v in one matrix."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        bound = (6 / (4 * hidden_size)) ** 0.5
        self.in_proj_weight = mx.random.uniform(-bound, bound, (3 * hidden_size, hidden_size))
        self.in_proj_bias = mx.zeros((3 * hidden_size,))
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def __call__(
        self, query: mx.array, keys: mx.array, values: mx.array, mask: mx.array | None = None
    ) -> mx.array:
        """query [N, Q, D] looks at keys and values [N, L, D] -> [N, Q, D]; mask: bool, True where
        it may, as `attention` takes it. One query [1, Q, D] may serve all N."""
        N, _, D = keys.shape
        weights = mx.split(self.in_proj_weight, 3)
        biases = mx.split(self.in_proj_bias, 3)

        def heads(y: mx.array, i: int) -> mx.array:
            y = y @ weights[i].T + biases[i]
            return y.reshape(*y.shape[:2], self.num_heads, -1).transpose(0, 2, 1, 3)

        q = heads(query, 0)
        q = mx.broadcast_to(q, (N, *q.shape[1:]))
        scale = (D // self.num_heads) ** -0.5
        out = attention(q, heads(keys, 1), heads(values, 2), scale, mask)
        return self.out_proj(out.transpose(0, 2, 1, 3).reshape(N, -1, D))
