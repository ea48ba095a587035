"""What caching would take, as people read it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxvlm.amount import amount
from mlxvlm.cli.progress import duration

if TYPE_CHECKING:
    from mlxvlm.cache.plan import Plan


def plan_line(plan: Plan, out: Path) -> str:
    """The plan in one line."""
    hours = f" in about {duration(plan.seconds)}" if plan.seconds else ""
    return (
        f"{out}: {plan.pictures:,} pictures, {plan.views:,} views, {amount(plan.bytes)}{hours}; "
        f"{amount(plan.free)} free."
    )


def plan_table(plan: Plan, out: Path) -> str:
    """The plan, and what every codec and pool would come to."""
    spread = f" (within {plan.spread:.1%}, 95% sure)" if plan.spread else ""
    lines = [
        ("pictures", f"{plan.pictures:,}" + (f" ({plan.known:,} more are there already)")),
        ("views", f"{plan.views:,}{spread}"),
        ("bytes", f"{amount(plan.bytes)}{spread}"),
        ("time", _time(plan)),
        ("free", f"{amount(plan.free)} on the disk of {out}"),
    ]
    if plan.unreadable:
        lines.append(("bad", f"{plan.unreadable:,} of {plan.sampled:,} looked at"))
    if not plan.known:
        lines[0] = ("pictures", f"{plan.pictures:,}")
    if plan.limited:
        lines.insert(1, ("", f"{plan.limited:,} of them in fewer tiles, for rows of several"))
    text = [f"{name:<10}{value}" for name, value in lines]
    if not plan.options:
        return "\n".join(text)
    pools = list(dict.fromkeys(option.pool for option in plan.options))
    tokens = {option.pool: option.tokens for option in plan.options}
    heads = [f"--pool {p}" + (f", {tokens[p]} tokens" if tokens[p] else "") for p in pools]
    text += ["", f"{'--codec':<10}" + "".join(f"{head:>26}" for head in heads)]
    for codec in dict.fromkeys(option.codec for option in plan.options):
        found = {o.pool: o for o in plan.options if o.codec == codec}
        cells = []
        for pool in pools:
            one = found[pool]
            mark = " <" if (codec, pool) == (plan.codec, plan.pool) else "  "
            big = "!" if one.bytes > plan.free / 2 else ""
            cells.append(f"{big + amount(one.bytes):>24}{mark}")
        text.append(f"{codec:<10}" + "".join(cells))
    if any(option.bytes > plan.free / 2 for option in plan.options):
        text.append("! more than half of the free disk: needs --yes")
    return "\n".join(line.rstrip() for line in text)


def describe_plan(plan: Plan, out: Path) -> dict[str, Any]:
    """The plan as plain JSON."""
    seconds = plan.seconds
    return {
        "out": str(out),
        **dataclasses.asdict(plan),
        "seconds": None if seconds is None else round(seconds, 3),
        "too_large": plan.too_large,
    }


def _time(plan: Plan) -> str:
    if plan.seconds is None or plan.encode_rate is None or plan.read_rate is None:
        return "too few pictures to tell"
    return (
        f"{duration(plan.seconds)} ({_rate(plan.encode_rate)} pictures/s encoded, "
        f"{_rate(plan.read_rate)} read)"
    )


def _rate(rate: float) -> str:
    """Two digits, and no exponent: 0.53, 6.7, 380, 12,000."""
    rounded = float(f"{rate:.2g}")
    return f"{rounded:,.0f}" if rounded >= 10 else f"{rounded:g}"
