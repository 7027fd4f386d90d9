"""What a comparison found, in sentences that claim no more than its intervals support.

Made from matched.csv and costs.csv. A difference is called one where its 95% interval does not hold 0; the
intervals are of differences from one method (`Record.base`), so nothing is claimed of two others.
"""

from __future__ import annotations

from collections.abc import Sequence

from dpo_kit.comparison.record import Interval, Level, Record

# Of the methods that the base is above; of the others only the names are given.
NAMED_WITH_DIFFERENCE = 2


def signed(value: float) -> str:
    """Two decimals, a sign, and a true minus."""
    return f"{value:+.2f}".replace("-", "−")


def with_interval(found: Interval) -> str:
    return f"{signed(found.value)} [{signed(found.low)}, {signed(found.high)}]"


def side(level: Level) -> int:
    """1 where the base is better than the method beyond chance, -1 where it is worse, 0 where neither."""
    if level.below is None:
        return 0
    return 1 if level.below.low > 0 else -1 if level.below.high < 0 else 0


def central_level(record: Record) -> float | None:
    """The KL in the middle of the levels that at least half of the methods reach, the base among them.

    Where there is no such level, one that the most methods reach; None where two methods never meet.
    """
    reached = {level: record.matched(level) for level in record.levels}
    met = {level: found for level, found in reached.items() if len(found) > 1}
    if not met:
        return None
    usual = [level for level, found in met.items() if 2 * len(found) >= len(record.methods)]
    usual = [level for level in usual if record.base in met[level]] or usual
    usual = usual or [max(met, key=lambda level: len(met[level]))]
    middle = record.levels[len(record.levels) // 2]
    return min(usual, key=lambda level: abs(level - middle))


def lead(record: Record) -> list[str]:
    """What was found, in a few sentences, the most important first."""
    level = central_level(record)
    if level is None:
        return ["No two methods have reached the same KL yet, so there is nothing to compare."]
    found = record.matched(level)
    said = [*_at_level(record, level, found), *_over_levels(record), *_what_rl_costs(record, level)]
    return [*said, f"{intervals(record)}."]


def intervals(record: Record) -> str:
    """What the intervals are of, and what is not in them."""
    seeds = [len(method.get("seeds") or [0]) for method in record.section["methods"].values()]
    runs = f"a setting was run with up to {max(seeds)} seeds"
    if 2 * seeds.count(1) > len(seeds):
        runs = "each setting was run once" if max(seeds) == 1 else "most settings were run once"
    return f"Intervals are 95%, over prompts alone: {runs}, and how runs differ by seed is not in them"


def _at_level(record: Record, level: float, found: dict[str, Level]) -> list[str]:
    best = max(found.values(), key=lambda each: each.reward.value)
    start = "" if record.start is None else f" (the SFT policy: {signed(record.start.reward)})"
    place = f"At a KL of {level:g} nats from the SFT policy"
    name, value = record.label(best.method), with_interval(best.reward)
    said = [f"{place}, {name} has the highest mean true reward that was measured: {value}{start}."]
    base = found.get(record.base)
    if base is None:
        return [*said, f"{record.label(record.base)} does not reach that KL."]
    others = sorted((each for each in found.values() if each is not base), key=lambda e: -e.reward.value)
    stands = "It" if best is base else f"{record.label(record.base)} has {with_interval(base.reward)}. It"
    return [*said, *(f"{stands} {part}." for part in _against(record, others))]


def _against(record: Record, others: Sequence[Level]) -> list[str]:
    """How the base stands to the others at a level, the highest of them first."""
    groups: dict[int, list[str]] = {-1: [], 0: [], 1: []}
    for each in others:
        sign = side(each)
        name = record.label(each.method)
        if sign > 0 and len(groups[1]) >= NAMED_WITH_DIFFERENCE:
            groups[1].append(name)
        elif each.below is not None:
            found = each.below if sign >= 0 else _turned(each.below)
            groups[sign].append(f"{name} (by {with_interval(found)})")
    words = {-1: "lies below", 0: "is not to be told apart from", 1: "lies above"}
    return ["; it ".join(f"{words[sign]} {_joined(names)}" for sign, names in groups.items() if names)]


def _turned(found: Interval) -> Interval:
    return Interval(-found.value, -found.high, -found.low)


def _over_levels(record: Record) -> list[str]:
    """How often the base is better and worse, over all levels and methods."""
    meetings = [
        each for level in record.levels for each in record.matched(level).values() if each.below is not None
    ]
    if len({each.kl for each in meetings}) < 2:
        return []
    counts = {sign: sum(side(each) == sign for each in meetings) for sign in (1, 0, -1)}
    base = record.label(record.base)
    worse = [f"{record.label(each.method)} at {each.kl:g}" for each in meetings if side(each) < 0]
    said = (
        f"Over all KLs compared, {base} meets another method {times(len(meetings))}: it is above it "
        f"{times(counts[1])}, not to be told apart {times(counts[0])}, below it {times(counts[-1])}"
    )
    return [f"{said} ({_joined(worse)} nats)." if worse else f"{said}."]


def _what_rl_costs(record: Record, level: float) -> list[str]:
    """Time and work of a run of the best method with RL, beside those of the base."""
    rl = [each for method, each in record.matched(level).items() if record.with_rl(method)]
    costs = {row["method"]: row for row in record.costs}
    if not rl or record.with_rl(record.base):
        return []
    best = max(rl, key=lambda each: each.reward.value)
    mine, base = costs.get(best.method, {}), costs.get(record.base, {})
    ratios = {
        "the time": _ratio(mine.get("seconds"), base.get("seconds")),
        "the tokens computed": _ratio(mine.get("tokens"), base.get("tokens")),
    }
    said = [f"{ratio:.2g} times {what}" for what, ratio in ratios.items() if ratio is not None]
    if not said:
        return []
    return [
        f"A run of {record.label(best.method)}, with RL the highest measured at that KL, takes "
        f"{_joined(said)} of a run of {record.label(record.base)}{_left_out(record)}."
    ]


def _left_out(record: Record) -> str:
    """The work that is done once for all runs, which the costs of a run do not hold."""
    shared = [row["label"] for row in record.costs if row["method"] not in record.section["methods"]]
    names = [name if name.isupper() else name[:1].lower() + name[1:] for name in shared]
    return f"; what is made once for all runs is left out of both ({_joined(names)})" if names else ""


def times(count: int) -> str:
    """How often, in words."""
    return {0: "never", 1: "once", 2: "twice"}.get(count, f"{count} times")


def _ratio(value: str | None, other: str | None) -> float | None:
    return float(value) / float(other) if value and other and float(other) else None


def _joined(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]
