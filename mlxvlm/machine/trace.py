"""What a function of arrays computes, operation by operation, without computing it.

MLX is lazy: calling a function on arrays makes a graph of operations with their shapes and dtypes,
and nothing is computed, nor any weight read, before somebody asks for a value. `trace` hands out
that graph. So a plan follows the code that trains, whatever it does, without formulas beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

Shape = tuple[int, ...]


@dataclass
class Op:
    """One operation: its MLX name, arrays by number, and its settings as MLX exports them."""

    name: str
    inputs: list[int]
    outputs: list[int]
    settings: list[Any] = field(default_factory=list)


@dataclass
class Graph:
    """Operations, in no order that matters.

    shapes, itemsizes: of every array, by number. inputs, outputs: of the function; an output may be
    an input, or stand twice. constants: arrays that the function made from host values.
    """

    ops: list[Op] = field(default_factory=list)
    shapes: dict[int, Shape] = field(default_factory=dict)
    itemsizes: dict[int, int] = field(default_factory=dict)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    constants: list[int] = field(default_factory=list)

    def add(self, shape: Shape, itemsize: int) -> int:
        number = len(self.shapes)
        self.shapes[number], self.itemsizes[number] = tuple(shape), itemsize
        return number

    def nbytes(self, number: int) -> int:
        return math.prod(self.shapes[number]) * self.itemsizes[number]

    def flops(self, only: set[int] | None = None) -> float:
        """Multiplications and additions of matrix products and convolutions; all else is small.

        only: operations, by their place in `ops`.
        """
        return sum(_flops(self, op) for i, op in enumerate(self.ops) if only is None or i in only)

    def producers(self) -> dict[int, int]:
        """Array -> place in `ops` of what makes it."""
        return {out: place for place, op in enumerate(self.ops) for out in op.outputs}

    def behind(self, arrays: Sequence[int], stop: Sequence[int] = ()) -> set[int]:
        """Places of the operations that `arrays` need, not looking behind `stop`."""
        made_by, ends = self.producers(), set(stop)
        found: set[int] = set()
        todo = [a for a in arrays if a not in ends]
        while todo:
            place = made_by.get(todo.pop())
            if place is None or place in found:
                continue
            found.add(place)
            todo += [a for a in self.ops[place].inputs if a not in ends]
        return found


def trace(function: Callable[..., list[mx.array]], arrays: Sequence[mx.array]) -> Graph:
    """The graph of `function(*arrays)`, which returns a list of arrays.

    arrays: may be lazy, and stay so. Where the function checkpoints a part of itself, the graph
    computes that part twice, as the real one does.
    """
    graph = Graph()
    numbers: dict[str, int] = {}
    regions: list[tuple[str, int, int]] = []  # kind, and how many inputs and outputs, of each part
    count = 0

    def number(name: str, shape: Shape, dtype: Any) -> int:
        if name not in numbers:
            numbers[name] = graph.add(shape, dtype.size)
        return numbers[name]

    def whole(*given: mx.array) -> list[mx.array]:
        nonlocal count
        regions.clear()
        with _recorded() as parts:
            results = list(function(*given))
        count = len(results)
        for kind, ins, outs in parts:
            regions.append((kind, len(ins), len(outs)))
            results += [*ins, *outs]
        return results

    def receive(message: dict[str, Any]) -> None:
        kind = message["type"]
        if kind in ("inputs", "outputs"):
            found = [number(*entry) for entry in message[kind]]
            setattr(graph, kind, found)
        elif kind == "constants":
            graph.constants = [number(name, a.shape, a.dtype) for name, a in message["constants"]]
        elif kind == "primitive":
            ins = [number(*entry) for entry in message["inputs"]]
            outs = [number(*entry) for entry in message["outputs"]]
            graph.ops.append(Op(message["name"], ins, outs, message["arguments"]))

    mx.export_function(receive, whole, *arrays)
    _part_fills(graph)
    found, graph.outputs = graph.outputs[count:], graph.outputs[:count]
    parts: list[tuple[str, list[int], list[int]]] = []
    for kind, ins, outs in regions:
        parts.append((kind, found[:ins], found[ins : ins + outs]))
        found = found[ins + outs :]
    _part_shared(graph, [(ins, outs) for kind, ins, outs in parts if kind == "checkpoint"])
    for kind, ins, outs in parts:
        (_recompute if kind == "checkpoint" else _substitute)(graph, ins, outs)
    # What nothing needs, such as the end of a second pass, is never computed.
    needed = graph.behind(graph.outputs)
    graph.ops = [op for place, op in enumerate(graph.ops) if place in needed]
    return graph


Part = tuple[str, list[mx.array], list[mx.array]]


@contextmanager
def _recorded() -> Iterator[list[Part]]:
    """Leaves out what MLX cannot export, and notes what goes into each part and what comes out:
    checkpoints, and functions with gradients of their own. Both are put into the graph afterwards.
    """
    parts: list[Part] = []
    real = mx.checkpoint, mx.custom_function

    def checkpoint(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            out = function(*args, **kwargs)
            parts.append(("checkpoint", _arrays([args, kwargs]), _arrays([out])))
            return out

        return run

    mx.checkpoint = checkpoint  # type: ignore[assignment]
    mx.custom_function = partial(_Custom, parts)  # type: ignore[assignment]
    try:
        yield parts
    finally:
        mx.checkpoint, mx.custom_function = real


class _Custom:
    """An `mx.custom_function` of arrays, whose gradients come from its first output, a scalar.

    The value gets a term, sum(argument * gradient), whose own gradients are the function's;
    `_substitute` takes the term out of the graph again.
    """

    def __init__(self, parts: list[Part], function: Callable[..., Any]):
        self.parts, self.function = parts, function
        self.backward: Callable[..., Any] = lambda primals, cotangents, outputs: ()

    def vjp(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        self.backward = backward
        return backward

    def __call__(self, *args: mx.array) -> tuple[mx.array, ...]:
        still = [mx.stop_gradient(a) for a in args]
        value, *rest = self.function(*still)
        ones = [mx.ones_like(a) for a in (value, *rest)]
        found = self.backward(still, ones, (value, *rest))
        term = mx.array(0.0)
        for a, gradient in zip(args, found, strict=True):
            term = term + (a * mx.stop_gradient(gradient).astype(a.dtype)).sum()
        out = mx.stop_gradient(value) + term
        self.parts.append(("custom", [*args, value], [out]))
        return out, *map(mx.stop_gradient, rest)


def _arrays(tree: Any) -> list[mx.array]:
    return [leaf for _, leaf in tree_flatten(tree) if isinstance(leaf, mx.array)]


def _part_fills(graph: Graph) -> None:
    """Gives each user of an array of zeros one of its own: an export merges those that are alike,
    and none of the merged ones could be written into."""
    fills = {op.outputs[0]: op for op in graph.ops if op.name == "Full"}
    taken: set[int] = set()
    for op in list(graph.ops):
        for at, number in enumerate(op.inputs):
            if number not in fills:
                continue
            if number in taken:
                own = graph.add(graph.shapes[number], graph.itemsizes[number])
                graph.ops.append(Op("Full", fills[number].inputs, [own], fills[number].settings))
                op.inputs[at] = own
            taken.add(number)


def _part_shared(graph: Graph, parts: list[tuple[list[int], list[int]]]) -> None:
    """Gives each part operations of its own: an export merges those that are alike in several."""
    taken: set[int] = set()
    for ins, outs in parts:
        inside = graph.behind(outs, ins)
        shared = sorted(inside & taken)
        own = {
            a: graph.add(graph.shapes[a], graph.itemsizes[a])
            for place in shared
            for a in graph.ops[place].outputs
        }
        for place in inside:
            op = graph.ops[place]
            inputs = [own.get(a, a) for a in op.inputs]
            if place in taken:
                graph.ops.append(Op(op.name, inputs, [own[a] for a in op.outputs], op.settings))
            else:
                op.inputs = inputs
        taken |= inside


def _substitute(graph: Graph, ins: list[int], outs: list[int]) -> None:
    """Lets the value of a function with gradients of its own be what it is without `_Custom`'s."""
    op = graph.ops[graph.producers()[outs[0]]]
    op.name, op.inputs, op.settings = "CustomTransforms", ins, []


def _recompute(graph: Graph, ins: list[int], outs: list[int]) -> None:
    """Lets whatever needs the inside of a part, later than the part itself, compute it again."""
    inside = graph.behind(outs, ins)
    made = {a for place in inside for a in graph.ops[place].outputs} - set(outs)
    users = [
        op
        for place, op in enumerate(graph.ops)
        if place not in inside and not made.isdisjoint(op.inputs)
    ]
    if not users:
        return
    again = {a: graph.add(graph.shapes[a], graph.itemsizes[a]) for a in {*ins, *made, *outs}}
    # As MLX has it: the second pass starts from the inputs once the outputs are there.
    ends = list(dict.fromkeys(ins))
    graph.ops.append(Op("Depends", [*ends, *outs], [again[a] for a in ends]))
    for place in sorted(inside):
        op = graph.ops[place]
        sources = [again.get(a, a) for a in op.inputs]
        graph.ops.append(Op(op.name, sources, [again[a] for a in op.outputs], op.settings))
    for op in users:
        op.inputs = [again[a] if a in made else a for a in op.inputs]
    # The first pass sees its inputs through a StopGradient, and its outputs are passed on.
    inner = {a: graph.add(graph.shapes[a], graph.itemsizes[a]) for a in {*ends, *outs}}
    for place in inside:
        op = graph.ops[place]
        op.inputs = [inner.get(a, a) for a in op.inputs]
        op.outputs = [inner.get(a, a) for a in op.outputs]
    graph.ops += [Op("StopGradient", [a], [inner[a]]) for a in ends]
    graph.ops.append(Op("CustomTransforms", [*ends, *(inner[a] for a in outs)], list(outs)))


def _flops(graph: Graph, op: Op) -> float:
    shapes = [graph.shapes[a] for a in op.inputs]
    out = math.prod(graph.shapes[op.outputs[0]])
    if op.name in ("Matmul", "AddMM", "QuantizedMatmul", "GatherMM", "GatherQMM", "QQMatmul"):
        return 2.0 * out * shapes[0][-1]
    if op.name == "Convolution":
        return 2.0 * out * math.prod(shapes[1][1:])
    if op.name == "ScaledDotProductAttention":
        return 4.0 * out * shapes[1][-2]
    if op.name == "ScaledDotProductAttentionVJP":
        return 10.0 * math.prod(shapes[0]) * shapes[1][-2]
    return 0.0
