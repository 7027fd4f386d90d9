"""Words and figures that the terminal and the page have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from dpo_kit.audit.findings import Account, Audit
from dpo_kit.pairs.schema import KINDS
from dpo_kit.pairs.statistics import Spread, Statistics
from dpo_kit.report.summary import duration, memory, number, percent
from dpo_kit.shown_text import visible

Form = Callable[[Any], str]


@dataclass(frozen=True, slots=True)
class LeftOut:
    """What was left out for one reason: so many rows, all their places, and how many of each source."""

    kind: str
    message: str
    mend: str
    places: list[str]
    by_source: dict[str, int]
    held_out: bool

    @property
    def count(self) -> int:
        return len(self.places)


def accounts(audit: Audit) -> list[Account]:
    """That of the training data, and of the held-out data where there are such."""
    return [audit, *([audit.held_out] if audit.held_out else [])]


def left_out(audit: Audit) -> Iterator[LeftOut]:
    """Why rows were left out, of each account the most frequent reason first."""
    for account in accounts(audit):
        for kind in account.counts:
            of_kind = [problem for problem in account.problems if problem.kind == kind]
            by_source = Counter(problem.place.file for problem in of_kind)
            places = [str(problem.place) for problem in of_kind]
            known, held_out = KINDS[kind], account is not audit
            yield LeftOut(kind, known.message, known.mend, places, dict(by_source.most_common()), held_out)


def by_source_in_words(reason: LeftOut) -> str:
    """`a.jsonl 3, b.jsonl 2`; nothing where there is one source."""
    if len(reason.by_source) < 2:
        return ""
    return ", ".join(f"{visible(file)} {count:,}" for file, count in reason.by_source.items())


LENGTH_COLUMNS = ("part", "median", "p95", "max")


def length_rows(seen: Statistics) -> list[tuple[str, ...]]:
    """`LENGTH_COLUMNS` of each part, in characters."""
    spreads = [(each.name, getattr(seen, each.name)) for each in fields(seen)]
    return [
        (_plain(name.removesuffix("_characters")), f"{it.median:,.0f}", f"{it.p95:,}", f"{it.max:,}")
        for name, it in spreads
        if isinstance(it, Spread) and name.endswith("_characters")
    ]


def token_rows(audit: Audit) -> tuple[tuple[str, ...], list[tuple[str, ...]]] | None:
    """Columns and rows of the percentiles of lengths in tokens; None where no tokenizer counted them."""
    lengths = (audit.figures.get("tokens") or {}).get("lengths") or {}
    found = {part: each["percentiles"] for part, each in lengths.items() if each.get("percentiles")}
    if not found:
        return None
    ranks = list(next(iter(found.values())))
    columns = ("part", *(_RANKS.get(str(rank), str(rank)) for rank in ranks))
    return columns, [
        (part, *(f"{percentiles.get(rank, 0):,.0f}" for rank in ranks)) for part, percentiles in found.items()
    ]


_RANKS = {"5": "p5", "25": "p25", "50": "median", "75": "p75", "95": "p95", "99": "p99", "100": "max"}


def facts(audit: Audit) -> list[str]:
    """What else there is to say of the rows, each in a few words."""
    seen, words = audit.statistics, []
    for each in fields(seen) if seen is not None else ():
        value, name = getattr(seen, each.name), _plain(each.name)
        if isinstance(value, Spread) and not each.name.endswith("_characters"):
            words.append(f"{name} of a list: {value.median:,.0f} (median), {value.max:,} (max)")
        elif isinstance(value, float):
            words.append(f"{name.removesuffix(' share')}: {value:.1%}")
        elif isinstance(value, int):
            words.append(f"{name}: {value:,}")
    if languages := languages_in_words(audit):
        words.append(f"languages, where they can be told: {languages}")
    return words


def languages_in_words(audit: Audit) -> str:
    """`English 97%, French 2%` of the texts whose language can be told, the mean over the sides."""
    sides = ((audit.figures.get("languages") or {}).get("languages_guessed") or {}).values()
    total: Counter[str] = Counter()
    for shares in sides:
        total.update({name: share for name, share in shares.items() if name != "unknown"})
    known = total.total()
    shares_of = [(name, share / known) for name, share in total.most_common(5)]
    return ", ".join(f"{visible(name)} {share:.0%}" for name, share in shares_of if share >= 0.01)


def setting_rows(audit: Audit) -> list[tuple[str, str]]:
    """Labels and values of what was asked for."""
    labels = {
        "sources": "sources", "held_out": "held-out sources", "options": "options", "tokenizer": "tokenizer",
        "max_length": "max_length", "overlong": "overlong", "batch_size": "batch_size", "model": "model",
        "date": "date", "dpo_kit": "dpo_kit",
    }  # fmt: skip
    there = {key: audit.settings[key] for key in labels if audit.settings.get(key) not in (None, {}, [])}
    return [(labels[key], visible(_said(value))) for key, value in there.items()]


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {each}" for name, each in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _plain(name: str) -> str:
    return name.replace("_", " ")


def plural(count: int, name: str) -> str:
    return f"{count:,} {name}" + ("" if count == 1 else "s")


def cost_rows(cost: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Labels and values of what the check `cost` estimated of an epoch, those that are there."""
    forms: dict[str, tuple[str, Form]] = {
        "batch_size": ("examples in a step", number),
        "steps": ("steps of an epoch", number),
        "distinct": ("distinct tokens, each computed once", number),
        "separate": ("tokens of sequences apart", number),
        "padded": ("tokens of padded micro-batches of 8 rows", number),
        "completions": ("tokens of replies", number),
        "saved_share": ("saved by the tree, rows shuffled", percent),
    }
    rows = _rows(cost, forms)
    if cost.get("padded") and cost.get("distinct"):
        rows.append(("saved by the tree, of padded ones", percent(1 - cost["distinct"] / cost["padded"])))
    rows += _rows(cost.get("orders") or {}, _ORDERS)
    if cost.get("sampled", 1) < 1:
        rows.append(("these are of a sample of the tokens", percent(cost["sampled"])))
    model = cost.get("model") or {}
    rows += _rows(model, _MODEL) + memory_rows(model.get("memory") or {})
    if model.get("uncounted"):
        rows.append(("layers whose arithmetic is not counted", visible(", ".join(model["uncounted"]))))
    return rows


def memory_rows(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Labels and values of the memory that training takes; what is without activations is called so."""
    unknown = "least" in figures and figures.get("activations_per_token") is None
    rows = []
    for key, (label, form) in _MEMORY.items():
        if figures.get(key) is not None:
            without = " (without activations)" if unknown and key in ("least", "whole_step") else ""
            rows.append((label + without, form(figures[key])))
    return rows


_ORDERS: dict[str, tuple[str, Form]] = {
    "by_prompt": ("saved with group_by_prompt", percent),
    "file": ("saved in the order of the data", percent),
}
_MODEL: dict[str, tuple[str, Form]] = {
    "parameters": ("parameters of the model", number),
    "device": ("device", visible),
    "dtype": ("computes in", visible),
    "flops": ("least arithmetic of an epoch", lambda flops: f"{flops / 1e12:,.3g} TFLOP"),
    "flops_per_second": ("rate of matrix products, measured", lambda rate: f"{rate / 1e9:,.0f} GFLOP/s"),
    "seconds": ("time of an epoch, estimated", lambda span: " to ".join(map(duration, span))),
}
_MEMORY: dict[str, tuple[str, Form]] = {
    "weights": ("memory: weights", memory),
    "gradients": ("memory: gradients", memory),
    "moments": ("memory: moments of Adam", memory),
    "activations_per_token": ("memory: activations of a token", lambda size: f"{size / 1024:,.0f} KiB"),
    "least": ("memory in the smallest micro-batches", memory),
    "whole_step": ("memory with the largest step at once", memory),
    "machine": ("memory of this machine", memory),
}


def _rows(figures: Mapping[str, Any], forms: Mapping[str, tuple[str, Form]]) -> list[tuple[str, str]]:
    there = {key: figures[key] for key in forms if figures.get(key) is not None}
    return [(forms[key][0], forms[key][1](value)) for key, value in there.items()]
