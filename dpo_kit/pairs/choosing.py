"""What is made of judgements that are not plain pairs: ranked lists, votes, ties, margins, weights.

A canonical row of any kind -> the rows that are loaded, and what the options leave out. Reads nothing and
checks no text: that is `formats`' and `canonical`'s.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from itertools import combinations, pairwise
from typing import Any

from dpo_kit.errors import InputError
from dpo_kit.pairs.kinds import KINDS_OF_ROWS, LISTS, PAIRS, UNPAIRED, Kind
from dpo_kit.pairs.options import LoadOptions
from dpo_kit.pairs.schema import BadRow, finite

Row = dict[str, Any]
_ROWS: dict[str, str] = {kind.name: kind.rows for kind in KINDS_OF_ROWS}


def require_effect(kind: Kind, options: LoadOptions, file: str) -> None:
    """Raises `InputError` for an option that would do nothing to this file's rows, which are of this kind."""
    made = kind_made(kind, options)
    # Losses on lists learn from pairs too, as lists of two: those stay as they are.
    wanted = {"lists": (LISTS, PAIRS), "unpaired": (UNPAIRED,)}.get(options.shape, (made,))
    if made not in wanted:
        raise InputError(
            f"the rows are {kind.rows}, of which no {_ROWS[options.shape]} can be made",
            file=file,
            field="shape",
            mend=f"Leave shape out to load {PAIRS.rows} (a recipe sets it to what its loss learns from)",
        )
    for name in ("min_margin", "weights"):
        value = getattr(options, name)
        if made != PAIRS and value not in (None, "given"):
            raise InputError(
                f"it is for pairs, and these rows are loaded as {made.rows}",
                file=file,
                field=name,
                mend=f"Leave {name} out, or set shape to pairs",
            )
    if kind == LISTS and options.weights == "agreement":
        raise InputError(
            "agreement is of votes, and the rows are ranked lists",
            file=file,
            field="weights",
            mend="Set weights to margin, or leave it out",
        )


def kind_made(kind: Kind, options: LoadOptions) -> Kind:
    """The kind of the rows that `made_of` gives."""
    return PAIRS if kind == LISTS and options.shape != "lists" else kind


def made_of(row: Row, kind: Kind, options: LoadOptions) -> tuple[list[Row], list[str]]:
    """One checked row -> the rows that are loaded, and the kind (`schema.KINDS`) of each one left out.

    Raises `BadRow` where the options ask for what the row has not: a margin, or one that can be a weight.

    `row` is canonical; a pair may have `preference`, the share of the votes for its chosen reply in
    [0.5, 1]; a list has `ranks` beside its scores where it came with ranks alone. The rows are the caller's
    to change; the given one is among them where there is nothing to choose.
    """
    is_list = kind == LISTS
    if is_list and options.shape == "lists":
        if len(set(row["scores"])) < 2:
            return [], ["all_tied"]
        return [{name: value for name, value in row.items() if name != "ranks"}], []
    if not is_list and not (_is_weighed(row, options) and kind == PAIRS):
        return [row], []
    made: list[Row] = []
    left_out = []
    for pair in _candidates(row, options) if is_list else [row]:
        share = pair.get("preference", 1.0)
        if pair["chosen"] == pair["rejected"]:
            left_out.append("same_reply_in_list")
        elif share == 0.5 and options.ties == "drop":
            left_out.append("tie")
        elif share != 0.5 and options.min_margin is not None and _strength(pair) < options.min_margin:
            left_out.append("below_min_margin")
        else:
            made += _weighted(pair, share, options)
    return made, left_out


def _is_weighed(pair: Row, options: LoadOptions) -> bool:
    """Whether something must be asked of a pair before it is loaded as it is."""
    return "preference" in pair or options.min_margin is not None or options.weights != "given"


def _weighted(pair: Row, share: float, options: LoadOptions) -> Iterator[Row]:
    """The pair with its weight; and the other way round where that has a share of the votes."""
    factor = 1.0
    if share != 0.5 and options.weights == "margin":
        factor = _strength(pair)
        if factor < 0:
            raise BadRow(
                f"the margin is {factor}, and a weight must not be below 0",
                field="margin",
                mend="Exchange the replies, set min_margin to 0 to leave such pairs out, or set no weights",
            )
    elif share != 0.5 and options.weights == "agreement":
        if "preference" not in pair:
            raise BadRow(
                "agreement is of votes, and the row has none",
                field="weights",
                mend="Leave weights out, or set it to margin",
            )
        factor = 2 * share - 1
    both = share == 0.5 or (options.votes == "share" and share < 1)
    plain = {name: value for name, value in pair.items() if name != "preference"}
    if factor == 1.0 and not both:
        yield plain
        return
    weight = finite(plain.get("weight", 1.0) * factor, "weight")
    yield {**plain, "weight": weight * share if both else weight}
    if both:
        yield {**turned(plain), "weight": weight * (1 - share)}


def _strength(pair: Mapping[str, Any]) -> float:
    """How far the pair's replies lie apart: in score, else in rank, else in votes."""
    if pair.get("margin") is not None:
        return float(pair["margin"])
    if pair.get("chosen_rank") is not None and pair.get("rejected_rank") is not None:
        return float(pair["rejected_rank"] - pair["chosen_rank"])
    if "preference" in pair:
        return float(2 * pair["preference"] - 1)
    raise BadRow(
        "margins are looked at, and the row has neither scores, ranks nor votes",
        field="margin",
        mend="Leave out min_margin and weights, or give a column 'margin'",
    )


def turned(pair: Row) -> Row:
    """The pair with its replies exchanged."""
    turned = {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]}
    if "margin" in pair:
        turned["margin"] = 0.0 - pair["margin"]  # which of 0 is 0, and not -0
    for name, other in (("chosen_rank", "rejected_rank"), ("rejected_rank", "chosen_rank")):
        if name in pair:
            turned[other] = pair[name]
    return turned


def _candidates(row: Row, options: LoadOptions) -> list[Row]:
    """The pairs of a ranked list that `options.pairs` names, the better reply chosen; ties with share 0.5."""
    replies, scores, ranks = row["completions"], row["scores"], row.get("ranks")
    order = sorted(range(len(replies)), key=lambda i: -scores[i])
    places = list(pairwise(order) if options.pairs == "adjacent" else combinations(order, 2))
    if options.pairs == "best_worst":
        places = [(order[0], order[-1])]
    elif options.pairs.startswith("random:"):
        seed = f"{options.seed} {prompt_digest(row['prompt'])}"
        distinct = [(i, j) for i, j in places if scores[i] != scores[j] or options.ties == "half"]
        wanted = min(int(options.pairs.removeprefix("random:")), len(distinct))
        drawn = random.Random(seed).sample(range(len(distinct)), wanted)
        places = [distinct[at] for at in sorted(drawn)]
    common = {name: row[name] for name in row if name not in ("completions", "scores", "ranks")}
    common.setdefault("prompt_id", prompt_digest(row["prompt"]))
    made = []
    for i, j in places:
        pair = {**common, "chosen": replies[i], "rejected": replies[j]}
        if ranks is None:
            pair["margin"] = finite(scores[i] - scores[j], "scores")
        else:
            pair |= {"chosen_rank": ranks[i], "rejected_rank": ranks[j]}
        if scores[i] == scores[j]:
            pair["preference"] = 0.5
        made.append(pair)
    return made


def prompt_digest(prompt: str | list[dict]) -> str:
    """16 hexadecimal digits that tell a prompt from others."""
    return hashlib.blake2b(json.dumps(prompt, sort_keys=True).encode(), digest_size=8).hexdigest()
