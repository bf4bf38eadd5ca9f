"""Shared experts inside the op of the routed ones: a recorded program rewritten for the native backend.

The network (model/moe.py) adds what four ops make of the shared experts to what one op makes of the routed ones. Those
read the same rows and add to the same sums, so one op can do both: then a member of the team that finds no more of the
shared ones goes on with the routed ones, and of seven waits for the whole team four are left.

Such an op is named for the function that recorded its parts, `blk.3.mixture`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from kvfold.model.program import OpRecord, Program, Segment, Value
from kvfold.quant.activations import Rounding, experts_round, rounding_for
from kvfold.quant.tensor import Weight, Weights, matrices

Handles = tuple[int, ...]
"""Of gate, up and down."""


def with_shared_experts_inside(program: Program, weights: Weights, *, rounds_activations: bool) -> Program:
    """The same network where every mixture whose matrices are multiplied alike is one op."""

    def alike(routed: Handles, shared: Handles) -> bool:
        names = [program.weight_names[handle] for handle in (*routed, *shared)]
        return _are_alike([weights[name] for name in names], rounds_activations)

    return replace(program, segments=tuple(_joined(segment, alike) for segment in program.segments))


def _are_alike(weights: list[Weight], rounds_activations: bool) -> bool:
    """Whether one op rounds what gate, up and down of routed and of shared experts are multiplied by as their own ops
    would: quant/activations.experts_round."""
    parts = [matrices(weight) for weight in weights]
    if any(len(part) > 1 for part in parts[3:]):
        return False
    types = [part[0].type for part in parts]
    if not rounds_activations:
        return True
    if experts_round(*types[:3]):
        return experts_round(*types[3:])
    return all(rounding_for(type) is Rounding.NONE for type in types[3:])


def _joined(segment: Segment, alike: Callable[[Handles, Handles], bool]) -> Segment:
    ops: list[OpRecord | None] = list(segment.ops)
    for at, op in enumerate(segment.ops):
        parts = _parts_of_mixture(segment, op, at) if op.kind == "add" else None
        if parts is None:
            continue
        experts, *shared = parts
        mixture, (gate, up, _, down) = segment.ops[experts], (segment.ops[part].weights for part in shared)
        routed = mixture.weights[:3]
        if alike(routed, (*gate, *up, *down)):
            name = f"{mixture.name.rpartition('.')[0]}.mixture"
            ops[experts] = replace(mixture, name=name, outputs=op.outputs, weights=(*routed, *gate, *up, *down))
            for part in (*shared, at):
                ops[part] = None
    return _with_ops(segment, [op for op in ops if op is not None])


def _parts_of_mixture(segment: Segment, add: OpRecord, at: int) -> tuple[int, int, int, int, int] | None:
    """The ops of the mixture that ends with this `add`: experts, gate, up, swiglu, down. None where it adds something
    else, or where something else reads what is between them."""

    def maker(value: Value, kind: str, reader: int) -> int | None:
        """The op of this kind that makes a value for no other than `reader`, the last to see it."""
        buffer = segment.buffers[value.buffer]
        readers = sum(value.buffer == seen.buffer for op in segment.ops for seen in op.inputs)
        made = buffer.first >= 0 and segment.ops[buffer.first].kind == kind
        return buffer.first if made and readers == 1 and buffer.last == reader else None

    experts, down = (maker(value, kind, at) for value, kind in zip(add.inputs, ("experts", "linear"), strict=True))
    swiglu = maker(segment.ops[down].inputs[0], "swiglu", down) if down is not None else None
    if experts is None or down is None or swiglu is None:
        return None
    gate, up = (maker(value, "linear", swiglu) for value in segment.ops[swiglu].inputs)
    if (
        gate is None
        or up is None
        or any(segment.ops[op].inputs != segment.ops[experts].inputs[:1] for op in (gate, up))
    ):
        return None
    return experts, gate, up, swiglu, down


def _with_ops(segment: Segment, ops: list[OpRecord]) -> Segment:
    """These ops of a segment over the buffers that they use."""
    lives: dict[int, tuple[int, int]] = {0: (-1, -1)}  # by old number; x arrives with the segment

    def touch(value: Value, now: int) -> None:
        lives[value.buffer] = lives.get(value.buffer, (now, now))[0], now

    for now, op in enumerate(ops):
        for value in (*op.inputs, *op.outputs):
            touch(value, now)
    for value in (*([segment.x_out] if segment.x_out else []), *(value for _, value in segment.outputs)):
        touch(value, len(ops))
    numbers = {old: new for new, old in enumerate(lives)}

    def moved(value: Value) -> Value:
        return replace(value, buffer=numbers[value.buffer])

    def moved_all(values: tuple[Value, ...]) -> tuple[Value, ...]:
        return tuple(moved(value) for value in values)

    return Segment(
        segment.name,
        tuple(replace(op, inputs=moved_all(op.inputs), outputs=moved_all(op.outputs)) for op in ops),
        tuple(replace(segment.buffers[old], first=first, last=last) for old, (first, last) in lives.items()),
        moved(segment.x_out) if segment.x_out else None,
        tuple((name, moved(value)) for name, value in segment.outputs),
    )
