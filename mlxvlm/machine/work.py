"""What a picture and a token cost a model: operations, and bytes that must be read.

Both come from the graph that MLX makes of the model's own code (`trace`), so that they hold for
every decoder and projector. For the usual ones they come to, with T tokens of width D, MLPs of
width I and n layers:

    encoder, FLOPs a view      2 T D 3 P^2  +  n (2 T (4 D^2 + 2 D I)  +  4 T^2 D)
    projector, FLOPs a view    2 T (parameters of its linear layers)  +  4 T^2 D a block
    decoder, FLOPs a token     2 (parameters of its linear layers)  +  4 D (tokens before it) a
                               layer; the head's 2 D V where logits are asked for, which in a prompt
                               is the last token alone
    decoder, bytes a token     its weights as stored, without the table of embeddings (one row of
                               it) unless the head is tied to it; of a mixture of experts those that
                               one token goes to; and the keys and values of the tokens before it:
                               2 (heads of keys) (width of a head) n (bytes of a value) each
    a step of training         forward and backward of what trains, and what its gradients pass
                               through, as `step` has it

Only matrix products and convolutions count. Attention counts as a full square, causal or not.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import mlx.core as mx

from ..language.forward import embedding
from ..language.kv import KVSettings, arrays_of, make_caches
from ..model import VLM
from .trace import Graph, Op, trace

# Operations that only look at an array otherwise.
VIEWS = {"Transpose", "Reshape", "ExpandDims", "Squeeze", "StopGradient", "Broadcast", "Flatten"}
EXPERTS = {"GatherMM", "GatherQMM"}


def encoder_flops(vlm: VLM, views: int = 1) -> float:
    """FLOPs of the tower for so many views."""
    side = vlm.config.vision.image_size
    dtype = vlm.vision.embeddings.patch_embedding.weight.dtype
    pixels = mx.zeros((views, side, side, 3), dtype)
    return trace(lambda pixels: [vlm.encoder.run(pixels)], [pixels]).flops()


def projector_flops(vlm: VLM, views: int = 1) -> float:
    """FLOPs of the projector for so many views."""
    encoder = vlm.encoder
    features = mx.zeros((views, encoder.tokens, encoder.width), encoder.dtype)
    return trace(lambda x: [vlm.projector(x)], [features]).flops()


def prefill_flops(vlm: VLM, length: int) -> float:
    """FLOPs of the language model from a prompt of so many embeddings to the first logits.

    As generation has it: of all tokens but the last, only their state is computed.
    """
    lm: Any = vlm.language

    def read(x: mx.array) -> list[mx.array]:
        caches = make_caches(lm, KVSettings())
        ids = mx.zeros(x.shape[:2], mx.int32)
        if length > 1:
            lm(ids[:, :-1], cache=caches, input_embeddings=x[:, :-1])
        state = arrays_of(caches) if length > 1 else []
        return [lm(ids[:, -1:], cache=caches, input_embeddings=x[:, -1:]), *state]

    return trace(read, [_embeddings(vlm, length)]).flops()


def decode_work(vlm: VLM) -> tuple[float, float]:
    """(FLOPs, bytes of weights) of one token with nothing before it."""
    lm: Any = vlm.language
    table = embedding(lm)

    def step(ids: mx.array) -> list[mx.array]:
        return [lm(ids, input_embeddings=table(ids))]

    graph = trace(step, [mx.zeros((1, 1), mx.int32)])
    return graph.flops(), bytes_read(graph)


def bytes_read(graph: Graph) -> float:
    """Bytes of its constants that a graph reads: of a table the rows that are looked up, of experts
    those that are chosen, and everything else whole."""
    users: dict[int, list[tuple[Op, int]]] = defaultdict(list)
    for op in graph.ops:
        for place, number in enumerate(op.inputs):
            users[number].append((op, place))

    def share(number: int) -> float:
        return max((_share(op, place) for op, place in users[number]), default=0.0)

    def _share(op: Op, place: int) -> float:
        if op.name in VIEWS:
            return share(op.outputs[0])
        whole = max(1, math.prod(graph.shapes[op.inputs[place]]))
        if op.name == "Gather" and place == 0:
            return min(1.0, math.prod(graph.shapes[op.outputs[0]]) / whole)
        if op.name in EXPERTS and 0 < place < len(op.inputs) - 2:
            chosen = math.prod(graph.shapes[op.inputs[-1]])
            return min(1.0, chosen / graph.shapes[op.inputs[place]][0])
        return 1.0

    return sum(share(number) * graph.nbytes(number) for number in graph.constants)


def _embeddings(vlm: VLM, length: int) -> mx.array:
    found = embedding(vlm.language)(mx.zeros((1, 1), mx.int32))
    return mx.zeros((1, length, found.shape[-1]), found.dtype)
