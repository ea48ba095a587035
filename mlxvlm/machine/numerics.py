"""Whether this GPU computes what the CPU does, layer by layer.

A model answers about a picture on the CPU in float32, and what goes into each of its layers and
comes out is kept. Then the GPU is given the same inputs, one layer at a time, in each dtype that is
used there. So a wrong layer is told apart from those behind it, which a comparison of whole runs
would blame as well. Beside the model's layers stand the operations that Metal does by kernels of
its own and that have been wrong before: attention and its gradients, products with 4-bit weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from ..attention import attention
from ..images.picture import Picture
from ..language.forward import blocks_of, embedding, head, head_module, hidden_states, trunk
from ..model import VLM
from ..vision.encoder import DTYPES as TOWER_DTYPES

# Largest difference that is no fault, of the largest value. float32: TF32 keeps ten bits. Ours are
# several times what MLX's own tests allow one operation, since a layer is a dozen.
TOLERANCES = {mx.float32: 5e-3, mx.bfloat16: 4e-2, mx.float16: 1e-2}
QUESTION = "what is in the picture?"
# Attention of SigLIP-So400m and of most decoders, at lengths of Metal's two kernels.
HEAD_DIMS, LENGTHS = (64, 72, 128), (8, 40)

Calls = dict[str, tuple[tuple[Any, ...], dict[str, Any], mx.array]]


@dataclass
class Difference:
    """Of one layer, in one dtype: the largest difference, and its share of the largest value; inf
    where it is not finite, or the GPU failed, with the reason."""

    part: str
    layer: str
    dtype: str
    relative: float
    tolerance: float
    failure: str = ""

    @property
    def wrong(self) -> bool:
        return not self.relative <= self.tolerance


def compare(
    load: Callable[[], VLM],
    device: Any = mx.gpu,
    dtypes: tuple[mx.Dtype, ...] = (mx.float32, mx.bfloat16, mx.float16),
) -> list[Difference]:
    """Differences of `device` from the CPU in float32: layers in order, in each dtype in turn.

    load: gives the model, afresh at each call. A tower is not run in float16, which it overflows.
    """
    with mx.stream(mx.cpu):
        sound = load()
        sound.set_dtype(mx.float32)
        calls = record(sound)
        mx.eval(list(calls.values()))
    out: list[Difference] = []
    for dtype in dtypes:
        other = load()
        for part in ("vision", "projector", "language"):
            if part != "vision" or dtype in TOWER_DTYPES:
                other[part].set_dtype(dtype)
        for name, unit in units(other).items():
            part = name.split(".")[0]
            if name in calls and (part != "vision" or dtype in TOWER_DTYPES):
                args, kwargs, wanted = calls[name]
                given = (_cast((args, kwargs), dtype), unit)
                out.append(_difference(name, dtype, device, wanted, _call, *given))
    for name, operation in OPERATIONS.items():
        with mx.stream(mx.cpu):
            wanted = operation(mx.float32)
            mx.eval(wanted)
        for dtype in dtypes:
            out.append(_difference(f"operations.{name}", dtype, device, wanted, operation, dtype))
    return out


def by_layer(found: Sequence[Difference]) -> dict[tuple[str, str], dict[str, Difference]]:
    """(part, layer) -> dtype -> the worst of its pieces; a block is one layer."""
    out: dict[tuple[str, str], dict[str, Difference]] = {}
    for one in found:
        names = one.layer.split(".")
        block = next((i for i, name in enumerate(names) if name.isdecimal()), None)
        layer = one.layer if block is None else " ".join(names[block - 1 : block + 1])
        row = out.setdefault((one.part, layer), {})
        if one.dtype not in row or one.relative > row[one.dtype].relative:
            row[one.dtype] = one
    return out


def record(vlm: VLM) -> Calls:
    """What goes into each of `units` and comes out, in one answer's first step about a picture."""
    calls: Calls = {}
    side = vlm.config.vision.image_size
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    messages = [{"role": "user", "content": QUESTION}]
    prompt = vlm.tokenize(messages, [Picture([noise], size=(side, side))])
    with _recording(units(vlm), calls):
        hidden, _ = hidden_states(vlm.language, vlm.embed(prompt.tokens, prompt.pictures))
        logits = head(vlm.language, hidden)
    calls["language.head"] = ((hidden,), {}, logits)
    return calls


def units(vlm: VLM) -> dict[str, Callable[..., Any]]:
    """The pieces that are compared, by name, in order: blocks fall into norms, attention and MLP,
    and whatever stands beside the blocks is a piece of its own."""
    found: dict[str, Callable[..., Any]] = {}
    for part in ("vision", "projector"):
        found |= dict(_pieces(vlm[part], part))
    lm = vlm.language
    found["language.embedding"] = embedding(lm)
    for number, block in enumerate(blocks_of(lm)):
        found |= dict(_pieces(block, f"language.layers.{number}"))
    beside = {id(embedding(lm)), id(head_module(lm)), *map(id, blocks_of(lm))}
    for name, child in trunk(lm).children().items():
        if isinstance(child, nn.Module) and id(child) not in beside:
            found[f"language.{name}"] = child
    found["language.head"] = lambda hidden: head(lm, hidden)
    return found


def _pieces(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    children: dict[str, Any] = module.children()
    for name, child in children.items():
        if isinstance(child, list):
            for number, block in enumerate(child):
                yield from _pieces(block, f"{path}.{name}.{number}")
        elif any(isinstance(c, list) for m in child.modules() for c in m.children().values()):
            yield from _pieces(child, f"{path}.{name}")
        else:
            yield f"{path}.{name}", child


@contextmanager
def _recording(wanted: dict[str, Callable[..., Any]], calls: Calls) -> Iterator[None]:
    # Python looks a call up in the class, so each module has one of its own for the time.
    modules = {name: module for name, module in wanted.items() if isinstance(module, nn.Module)}
    kept = {name: type(module) for name, module in modules.items()}

    def recorder(name: str, base: Any) -> type:
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            out = base.__call__(self, *args, **kwargs)
            calls[name] = (args, kwargs, out)
            return out

        return type(base.__name__, (base,), {"__call__": run, "__module__": base.__module__})

    for name, module in modules.items():
        module.__class__ = recorder(name, kept[name])
    try:
        yield
    finally:
        for name, module in modules.items():
            module.__class__ = kept[name]


def _difference(
    name: str,
    dtype: mx.Dtype,
    device: Any,
    wanted: mx.array,
    work: Callable[..., mx.array],
    *given: Any,
) -> Difference:
    part, _, layer = name.partition(".")
    failure = ""
    try:
        with mx.stream(device):
            found = work(*given).astype(mx.float32)
            mx.eval(found)
        relative = _relative(np.array(found), np.array(wanted))
    except RuntimeError as error:
        relative, failure = float("inf"), str(error).splitlines()[0]
    told = str(dtype).removeprefix("mlx.core.")
    return Difference(part, layer, told, relative, TOLERANCES[dtype], failure)


def _relative(found: np.ndarray, wanted: np.ndarray) -> float:
    if found.shape != wanted.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found - wanted).max() / max(float(np.abs(wanted).max()), 1e-30))


def _call(given: tuple[tuple[Any, ...], dict[str, Any]], unit: Callable[..., Any]) -> mx.array:
    args, kwargs = given
    return unit(*args, **kwargs)


def _cast(tree: Any, dtype: mx.Dtype) -> Any:
    def cast(x: Any) -> Any:
        floating = isinstance(x, mx.array) and mx.issubdtype(x.dtype, mx.floating)
        return x.astype(dtype) if floating else x

    return tree_map(cast, tree)


def _noise(*shape: int, seed: int = 0) -> mx.array:
    """Normal float32 values that every dtype can hold, so that only computing makes differences."""
    # Through the host: devices may draw different last bits.
    values = mx.array(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))
    return _rounded(values)


def _rounded(values: mx.array) -> mx.array:
    return values.astype(mx.bfloat16).astype(mx.float32)


def _attention(dtype: mx.Dtype) -> mx.array:
    return mx.concatenate([_attend(*case, dtype).reshape(-1) for case in _cases()])


def _attention_gradients(dtype: mx.Dtype) -> mx.array:
    out = []
    for length, dim in _cases():
        arrays = [_noise(1, 2, length, dim, seed=s).astype(dtype) for s in range(4)]

        def loss(q: mx.array, k: mx.array, v: mx.array, weight: mx.array = arrays[3]) -> mx.array:
            found = attention(q, k, v, q.shape[-1] ** -0.5, "causal")
            return (found.astype(mx.float32) * weight.astype(mx.float32)).sum()

        out += [g.reshape(-1) for g in mx.grad(loss, argnums=(0, 1, 2))(*arrays[:3])]
    return mx.concatenate(out)


def _attend(length: int, dim: int, dtype: mx.Dtype) -> mx.array:
    q, k, v = (_noise(1, 2, length, dim, seed=s).astype(dtype) for s in range(3))
    return attention(q, k, v, dim**-0.5, "causal")


def _cases() -> list[tuple[int, int]]:
    return [(length, dim) for length in LENGTHS for dim in HEAD_DIMS]


def _quantised(dtype: mx.Dtype, transpose: bool) -> mx.array:
    """Rows times a 4-bit matrix, as a forward pass has it, or its transpose, as a backward one."""
    with mx.stream(mx.cpu):
        w, scales, biases = mx.quantize(_noise(128, 128), group_size=64, bits=4)
        mx.eval(w, scales, biases)
    rows = _noise(40, 128, seed=1).astype(dtype)
    scales, biases = (_rounded(part).astype(dtype) for part in (scales, biases))
    return mx.quantized_matmul(rows, w, scales, biases, transpose, group_size=64, bits=4)


OPERATIONS: dict[str, Callable[[mx.Dtype], mx.array]] = {
    "attention": _attention,
    "attention's gradients": _attention_gradients,
    "product with 4-bit weights": lambda dtype: _quantised(dtype, True),
    "its gradient": lambda dtype: _quantised(dtype, False),
}
