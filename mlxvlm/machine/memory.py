"""How much memory a graph needs, worked out as MLX's evaluation would go, array by array.

MLX orders the operations of an evaluation from its results backwards, in a breadth of 20, and
hands them to a queue. An array's buffer is free once everything that reads it has run, an operation
may write into a buffer that nobody else needs, and views take nothing. The thread that allocates
runs ahead of the queue by up to a hundred and more small tasks, so buffers live somewhat longer
than they must. All this is followed here, with the rules of the CPU backend; Metal's differ in the
length of its queue and in its fused kernels, so a figure for it is an estimate.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .trace import Graph, Op, Shape

# MLX_BFS_MAX_WIDTH's default.
BREADTH = 20
# scheduler: MAX_ACTIVE_TASKS, and dispatches counted as one of them.
ACTIVE_TASKS = 10
DISPATCHES_PER_TASK = 10

Label = Callable[[int], str]


@dataclass
class Peak:
    """The most bytes held at once, and what they were: label -> bytes. phases: the most in each."""

    bytes: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    phases: list[int] = field(default_factory=list)


@dataclass(eq=False)
class _Buffer:
    bytes: int
    label: str
    users: int = 0  # arrays that lie in it, and queued tasks that hold it


@dataclass
class _Array:
    buffer: _Buffer
    strides: Shape
    data_size: int  # elements of the buffer that it spans


def peak(
    graph: Graph,
    phases: Sequence[Sequence[int]],
    label: Label,
    held: Sequence[int] = (),
    dropped: Sequence[int] = (),
) -> Peak:
    """The peak of evaluating `phases` of results one after the other.

    label: the part that an array belongs to. held: arrays that the caller keeps to the end, beside
    results and constants. dropped: those that it keeps until the last phase begins. Buffers of all
    others may be overwritten by what reads them last.
    """
    return _Run(graph, label, held, dropped).peak(phases)


class _Run:
    def __init__(self, graph: Graph, label: Label, held: Sequence[int], dropped: Sequence[int]):
        self.graph, self.label = graph, label
        self.dropped = set(dropped)
        self.made_by = graph.producers()
        self.arrays: dict[int, _Array] = {}
        self.uses: dict[int, int] = {}
        self.now = self.here = 0
        self.parts: dict[str, int] = {}
        self.most = Peak()
        self.queue: deque[tuple[int, list[_Buffer]]] = deque()
        self.dispatched = 0
        for number in (*set(held), *self.dropped, *graph.constants):
            self.uses[number] = self.uses.get(number, 0) + 1
        for op in graph.ops:
            for number in op.inputs:
                self.uses[number] = self.uses.get(number, 0) + 1
        for number in (*graph.inputs, *graph.constants):
            if self.uses.get(number):
                self._new(number)

    def peak(self, phases: Sequence[Sequence[int]]) -> Peak:
        highest: list[int] = []
        for index, results in enumerate(phases):
            self.here = self.now
            for number in self.dropped if index == len(phases) - 1 else ():
                self._release(number)
            for number in results:
                self.uses[number] = self.uses.get(number, 0) + 1
            for place in self._tape(results):
                self._evaluate(self.graph.ops[place])
            self._finish(self.dispatched)
            highest.append(self.here)
        self.most.phases = highest
        return self.most

    def _tape(self, results: Sequence[int]) -> list[int]:
        """Places of the operations in the order in which MLX evaluates them."""
        degree: dict[int, int] = {}
        stack: list[int] = []

        def visit(number: int) -> None:
            place = self.made_by.get(number)
            if place is None or number in self.arrays:
                return
            if place in degree:
                degree[place] += 1
            else:
                degree[place] = 1
                stack.append(place)

        for number in results:
            visit(number)
        while stack:
            for number in self.graph.ops[stack.pop()].inputs:
                visit(number)
        tape: list[int] = []
        waiting: list[tuple[Sequence[int], int]] = [(results, 0)]
        level = 0
        while degree and (level < len(tape) or waiting):
            if level >= len(tape):
                inputs, start = waiting.pop()
            else:
                inputs, start = self.graph.ops[tape[level]].inputs, 0
                level += 1
            for j in range(start, len(inputs)):
                place = self.made_by.get(inputs[j])
                if place is None or inputs[j] in self.arrays:
                    continue
                if len(tape) - level >= BREADTH:
                    waiting.append((inputs, j))
                    break
                degree[place] -= 1
                if not degree[place]:
                    del degree[place]
                    tape.append(place)
        return tape[::-1]

    def _evaluate(self, op: Op) -> None:
        before = [self.arrays[number].buffer for number in op.inputs]
        temporaries: list[_Buffer] = []
        work = _RULES.get(op.name, _fresh)(self, op, temporaries)
        after = {id(self.arrays[number].buffer) for number in op.outputs}
        self.dispatched += 1 + bool(work) + len(temporaries)
        holding = {id(b): b for b in before if id(b) not in after}
        for buffer in holding.values():
            buffer.users += 1
        self.queue.append((self.dispatched, [*holding.values(), *temporaries]))
        for number in op.inputs:
            self._release(number)
        for number in op.outputs:
            if not self.uses.get(number):
                self.uses[number] = 1
                self._release(number)
        marks = self.dispatched // DISPATCHES_PER_TASK - ACTIVE_TASKS
        self._finish(marks * DISPATCHES_PER_TASK)

    def _finish(self, upto: int) -> None:
        """The queue has come to its `upto`-th task."""
        while self.queue and self.queue[0][0] <= upto:
            for buffer in self.queue.popleft()[1]:
                self._drop(buffer)

    def _release(self, number: int) -> None:
        self.uses[number] -= 1
        if not self.uses[number] and number in self.arrays:
            self._drop(self.arrays.pop(number).buffer)

    def _drop(self, buffer: _Buffer) -> None:
        buffer.users -= 1
        if not buffer.users:
            self.now -= buffer.bytes
            self.parts[buffer.label] -= buffer.bytes

    def allocate(self, size: int, label: str) -> _Buffer:
        buffer = _Buffer(size, label, 1)
        self.now += size
        self.parts[label] = self.parts.get(label, 0) + size
        self.here = max(self.here, self.now)
        if self.now > self.most.bytes:
            self.most = Peak(self.now, {k: v for k, v in self.parts.items() if v})
        return buffer

    def _new(self, number: int, strides: Shape | None = None, data_size: int | None = None) -> None:
        """A buffer of its own; row by row where no strides are given."""
        shape = self.graph.shapes[number]
        count = math.prod(shape) if data_size is None else data_size
        buffer = self.allocate(count * self.graph.itemsizes[number], self.label(number))
        self.arrays[number] = _Array(buffer, strides or _rows(shape), count)

    def share(self, number: int, source: int, strides: Shape, data_size: int | None = None) -> None:
        """A view of what `source` lies in."""
        found = self.arrays[source]
        found.buffer.users += 1
        size = found.data_size if data_size is None else data_size
        self.arrays[number] = _Array(found.buffer, strides, size)

    def free(self, source: int, number: int) -> bool:
        """Whether `number` may be written where `source` lies."""
        found = self.arrays[source]
        return (
            self.uses[source] == 1
            and found.buffer.users == 1
            and self.graph.itemsizes[source] == self.graph.itemsizes[number]
            and found.buffer.bytes <= self.graph.nbytes(number) + 4096
        )

    def rowwise(self, number: int) -> bool:
        shape, found = self.graph.shapes[number], self.arrays[number]
        return _same_strides(shape, found.strides, _rows(shape))

    def dense(self, number: int) -> bool:
        """Whether it fills its buffer without holes, in whatever order of axes."""
        shape, found = self.graph.shapes[number], self.arrays[number]
        axes = sorted((-s, n) for s, n in zip(found.strides, shape, strict=True) if n > 1 and s)
        size = 1
        for stride, n in reversed(axes):
            if -stride != size:
                return False
            size *= n
        return size == found.data_size or found.data_size == 1


def _view(strides: Callable[[_Run, Op], Shape]) -> Callable[..., bool]:
    def rule(run: _Run, op: Op, temporaries: list[_Buffer]) -> bool:
        run.share(op.outputs[0], op.inputs[0], strides(run, op))
        return False

    return rule


def _fresh(run: _Run, op: Op, temporaries: list[_Buffer]) -> bool:
    for number in op.outputs:
        run._new(number)
    return True


def _pass_on(run: _Run, op: Op, temporaries: list[_Buffer]) -> bool:
    for out, source in zip(op.outputs, op.inputs, strict=False):
        run.share(out, source, run.arrays[source].strides)
    return False


def _transforms(run: _Run, op: Op, temporaries: list[_Buffer]) -> bool:
    sources = op.inputs[len(op.inputs) - len(op.outputs) :]
    for out, source in zip(op.outputs, sources, strict=True):
        run.share(out, source, run.arrays[source].strides)
    return False


def _unary(run: _Run, op: Op, temporaries: list[_Buffer]) -> bool:
    source, out = op.inputs[0], op.outputs[0]
    if not run.dense(source):
        run._new(out)
    elif run.free(source, out):
        run.share(out, source, run.arrays[source].strides)
    else:
        found = run.arrays[source]
        run._new(out, found.strides, found.data_size)
    return True


def _elementwise(run: _Run, op: Op, temporaries: list[_Buffer]) -> bool:
    out = op.outputs[0]
    count = math.prod(run.graph.shapes[out])
    full = [a for a in op.inputs if run.arrays[a].data_size == count and run.dense(a)]
    scalars = [a for a in op.inputs if run.arrays[a].data_size == 1]
    if len(scalars) == len(op.inputs):
        run._new(out, (0,) * len(run.graph.shapes[out]), 1)
        return True
    alike = len(full) + len(scalars) == len(op.inputs) and (
        len({run.arrays[a].strides for a in full}) == 1
    )
    for source in full:
        if (alike or run.rowwise(source)) and run.free(source, out):
            run.share(out, source, run.arrays[source].strides)
            return True
    run._new(out, run.arrays[full[0]].strides if alike and full else None)
    return True


def _matmul(run: _Run, op: Op, temporaries: list[_Buffer]) -> bool:
    for source in op.inputs[:2]:
        shape, strides = run.graph.shapes[source], run.arrays[source].strides
        rows, columns = shape[-2:]
        straight = strides[-1] == 1 and (rows == 1 or strides[-2] == columns)
        turned = strides[-2] == 1 and (columns == 1 or strides[-1] == rows)
        if not (straight or turned) and not run.rowwise(source):
            label = run.label(source)
            temporaries.append(run.allocate(run.graph.nbytes(source), label))
    return _fresh(run, op, temporaries)


def _softmax(run: _Run, op: Op, temporaries: list[_Buffer]) -> bool:
    source, out = op.inputs[0], op.outputs[0]
    if run.dense(source) and run.arrays[source].strides[-1] == 1:
        return _unary(run, op, temporaries)
    run._new(out)
    return True


def _update(run: _Run, op: Op, temporaries: list[_Buffer]) -> bool:
    """A copy of the first input, written into; in place where it may."""
    source, out = op.inputs[0], op.outputs[0]
    if run.free(source, out) and run.rowwise(source):
        run.share(out, source, run.arrays[source].strides)
    else:
        run._new(out)
    return True


def _reshape(run: _Run, op: Op, temporaries: list[_Buffer]) -> bool:
    source, out = op.inputs[0], op.outputs[0]
    shape = run.graph.shapes[out]
    strides = (
        _rows(shape)
        if run.rowwise(source)
        else _reshaped(run.graph.shapes[source], run.arrays[source].strides, shape)
    )
    if strides is None:
        run._new(out)
        return True
    run.share(out, source, strides)
    return False


def _contiguous(run: _Run, op: Op, temporaries: list[_Buffer]) -> bool:
    if run.rowwise(op.inputs[0]):
        return _pass_on(run, op, temporaries)
    return _fresh(run, op, temporaries)


def _broadcast(run: _Run, op: Op) -> Shape:
    before, after = run.graph.shapes[op.inputs[0]], run.graph.shapes[op.outputs[0]]
    strides = run.arrays[op.inputs[0]].strides
    lead = len(after) - len(before)
    kept = (s if n == m else 0 for s, n, m in zip(strides, before, after[lead:], strict=True))
    return (0,) * lead + tuple(kept)


def _transpose(run: _Run, op: Op) -> Shape:
    strides = run.arrays[op.inputs[0]].strides
    return tuple(strides[axis] for axis in op.settings[0])


def _expand(run: _Run, op: Op) -> Shape:
    strides = list(run.arrays[op.inputs[0]].strides)
    for axis in op.settings[0]:
        strides.insert(axis, 1)
    return tuple(strides)


def _squeeze(run: _Run, op: Op) -> Shape:
    strides = run.arrays[op.inputs[0]].strides
    return tuple(s for axis, s in enumerate(strides) if axis not in op.settings[0])


def _slice(run: _Run, op: Op, temporaries: list[_Buffer]) -> bool:
    steps = op.settings[2] if len(op.settings) > 2 else (1,) * len(run.graph.shapes[op.outputs[0]])
    strides = run.arrays[op.inputs[0]].strides
    count = math.prod(run.graph.shapes[op.outputs[0]])
    run.share(
        op.outputs[0],
        op.inputs[0],
        tuple(s * t for s, t in zip(strides, steps, strict=True)),
        min(count, run.arrays[op.inputs[0]].data_size),
    )
    return False


def _split(run: _Run, op: Op, temporaries: list[_Buffer]) -> bool:
    for out in op.outputs:
        count = math.prod(run.graph.shapes[out])
        run.share(out, op.inputs[0], run.arrays[op.inputs[0]].strides, count)
    return False


def _rows(shape: Shape) -> Shape:
    strides, size = [], 1
    for n in reversed(shape):
        strides.append(size)
        size *= n
    return tuple(reversed(strides))


def _same_strides(shape: Shape, a: Shape, b: Shape) -> bool:
    return all(n == 1 or s == t for n, s, t in zip(shape, a, b, strict=True))


def _reshaped(shape: Shape, strides: Shape, wanted: Shape) -> Shape | None:
    """Strides of a reshape without a copy, or None."""
    sizes: list[int] = []
    steps: list[int] = []
    for n, s in zip(shape, strides, strict=True):
        if n == 1:
            continue
        if sizes and steps[-1] == n * s:
            sizes[-1], steps[-1] = sizes[-1] * n, s
        else:
            sizes.append(n)
            steps.append(s)
    out: list[int] = []
    at = 0
    for n in wanted:
        if n == 1:
            out.append(out[-1] if out else 1)
        elif at < len(sizes) and sizes[at] % n == 0:
            sizes[at] //= n
            out.append(sizes[at] * steps[at])
            at += sizes[at] == 1
        else:
            return None
    return tuple(out)


_RULES: dict[str, Callable[[_Run, Op, list[_Buffer]], bool]] = {
    **dict.fromkeys(("Broadcast", "BroadcastAxes"), _view(_broadcast)),
    "Transpose": _view(_transpose),
    "ExpandDims": _view(_expand),
    "Squeeze": _view(_squeeze),
    "Slice": _slice,
    "Split": _split,
    **dict.fromkeys(("Copy", "StopGradient", "Depends"), _pass_on),
    "CustomTransforms": _transforms,
    "Contiguous": _contiguous,
    **dict.fromkeys(("Reshape", "Flatten", "Unflatten"), _reshape),
    **dict.fromkeys(
        "AsType Square Sqrt Rsqrt Exp Log Log1p Expm1 Sin Cos Tan Tanh Sinh Cosh Sigmoid Negative "
        "Abs Sign Erf ErfInv Floor Ceil Round LogicalNot BitwiseInvert".split(),
        _unary,
    ),
    **dict.fromkeys(
        "Add Subtract Multiply Divide Maximum Minimum Power LogAddExp Select Remainder Equal "
        "NotEqual Greater GreaterEqual Less LessEqual LogicalAnd LogicalOr BitwiseBinary".split(),
        _elementwise,
    ),
    "Matmul": _matmul,
    "AddMM": _matmul,
    "Softmax": _softmax,
    **dict.fromkeys(("SliceUpdate", "Scatter", "ScatterAxis"), _update),
}
