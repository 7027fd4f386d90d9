"""Replies to prompts + a reward or a judge -> pairs, or ranked lists with scores (`dpo-kit data build`).

Which pairs a list gives is `pairs.choosing`'s, as for lists that are loaded. Pairs of equal scores are left
out and counted, however labels are given.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from dpo_kit.errors import InputError
from dpo_kit.evaluation.ranking import Compare, judged_scores
from dpo_kit.evaluation.rewards import Reward
from dpo_kit.pairs import LoadOptions
from dpo_kit.pairs.canonical import canonical_row
from dpo_kit.pairs.choosing import made_of, prompt_digest, require_effect, turned
from dpo_kit.pairs.kinds import LISTS
from dpo_kit.pairs.messages import text_or_messages
from dpo_kit.pairs.schema import KINDS, BadRow, Place, UnusablePair
from dpo_kit.pairs.sources import find_sources
from dpo_kit.pairs.writing import RowWriter, require_not_source
from dpo_kit.texts import Prompt

_LISTS_AT_ONCE = 256


@dataclass(frozen=True)
class Candidates:
    """A prompt, the replies to it, and where both stand."""

    prompt: Prompt
    replies: list[str]
    place: Place


def by_reward(reward: Reward) -> Score:
    """Scores are rewards."""

    def score(lists: Sequence[Candidates], account: Account) -> list[list[float]]:
        flat = [(each.prompt, reply) for each in lists for reply in each.replies]
        values = iter(reward([prompt for prompt, _ in flat], [reply for _, reply in flat]))
        return [list(islice(values, len(each.replies))) for each in lists]

    return score


def by_judge(compare: Compare) -> Score:
    """Scores are the Bradley-Terry strengths that all comparisons of a prompt's replies come to."""

    def score(lists: Sequence[Candidates], account: Account) -> list[list[float]]:
        def counted(*asked: Sequence[Any]) -> Sequence[float | None]:
            preferences = compare(*asked)
            account.no_verdict += sum(preference is None for preference in preferences)
            return preferences

        return judged_scores([each.prompt for each in lists], [each.replies for each in lists], counted)

    return score


@dataclass(frozen=True)
class Labelling:
    """What is made of scored replies.

    Attributes:
        shape: pairs, or ranked lists.
        labels: of pairs: the better reply is chosen; or, by Bradley-Terry, either, the better one with
            probability sigmoid(difference of scores). Either way a tie gives no pair.
        pairs: all, best_worst, adjacent or random:k, as `LoadOptions.pairs`.
        min_margin: pairs whose scores lie closer are left out, counted.
        seed: of labels and of random:k, each together with the prompt.

    Raises `InputError` for values that are not known or do not go together.
    """

    shape: Literal["pairs", "lists"] = "pairs"
    labels: Literal["best", "bradley_terry"] = "best"
    pairs: str = "all"
    min_margin: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("shape", ("pairs", "lists")), ("labels", ("best", "bradley_terry"))):
            if getattr(self, name) not in known:
                raise InputError(
                    f"unknown {name} '{getattr(self, name)}'", field=name, mend=f"Known: {', '.join(known)}"
                )
        require_effect(LISTS, self.options, "--out")
        for name, default in (("labels", "best"), ("pairs", "all")):
            if self.shape == "lists" and getattr(self, name) != default:
                raise InputError("it is for pairs", field=name, mend="Leave it out, or set shape to pairs.")

    @property
    def options(self) -> LoadOptions:
        """What `choosing` goes by."""
        return LoadOptions(shape=self.shape, pairs=self.pairs, min_margin=self.min_margin, seed=self.seed)


@dataclass
class Account:
    """What became of the replies.

    Attributes:
        prompts: lists of replies that were read.
        replies: in them.
        empty: replies that say nothing; the list is made of the others.
        equal: replies that are the same as an earlier one to their prompt.
        rows: that were made.
        left_out: by kind (`schema.KINDS`): pairs that tie, pairs of two equal replies, lists of fewer than
            two different replies, ...
        no_verdict: comparisons that a judge came to nothing about; they do not count.
        total: of the scores.
    """

    prompts: int = 0
    replies: int = 0
    empty: int = 0
    equal: int = 0
    rows: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    no_verdict: int = 0
    total: float = 0.0

    @property
    def mean(self) -> float | None:
        """Mean score of the replies that are not empty; None where there is none."""
        scored = self.replies - self.empty
        return self.total / scored if scored else None

    def summary(self, rows: str) -> str:
        """One line for a person."""
        parts = [f"{self.rows:,} {rows} of {self.replies:,} replies to {self.prompts:,} prompts"]
        parts += [f"{self.empty:,} empty replies"] if self.empty else []
        parts += [f"{self.equal:,} replies the same as another to their prompt"] if self.equal else []
        parts += [f"left out {count:,}: {KINDS[kind].message}" for kind, count in self.left_out.items()]
        parts += [f"{self.no_verdict:,} comparisons without a verdict"] if self.no_verdict else []
        parts += [] if self.mean is None else [f"mean score {self.mean:.4g}"]
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        names = ("prompts", "replies", "empty", "equal", "rows", "no_verdict")
        found: dict[str, Any] = {name: getattr(self, name) for name in names}
        return found | {"left_out": dict(self.left_out), "mean_score": self.mean}


Score = Callable[[Sequence[Candidates], Account], list[list[float]]]
"""Prompts with their replies, many at once -> of each the score of each reply; higher is better. The account
is told of what a judge came to nothing about."""


def labelled(
    lists: Iterable[Candidates], score: Score, labelling: Labelling, account: Account
) -> Iterator[dict[str, Any]]:
    """Canonical pairs or ranked lists, in the order of the candidates, each with its `source`.

    Args:
        lists: the candidates.
        score: asked for some hundred lists at once.
        labelling: what is made of them.
        account: is filled.
    """
    waiting = iter(lists)
    while batch := list(islice(waiting, _LISTS_AT_ONCE)):
        filled = [_filled(each, account) for each in batch]
        for each, scores in zip(filled, score(filled, account), strict=True):
            account.total += sum(scores)
            yield from _rows(each, scores, labelling, account)


def _filled(each: Candidates, account: Account) -> Candidates:
    """Without the replies that say nothing, which would make the whole list unusable."""
    replies = [reply for reply in each.replies if reply.strip()]
    account.prompts += 1
    account.replies += len(each.replies)
    account.empty += len(each.replies) - len(replies)
    account.equal += len(replies) - len(set(replies))
    return Candidates(each.prompt, replies, each.place)


def _rows(
    each: Candidates, scores: list[float], labelling: Labelling, account: Account
) -> Iterator[dict[str, Any]]:
    row: dict[str, Any] = {"prompt": each.prompt, "completions": each.replies, "scores": scores}
    if labelling.shape == "lists":
        once = dict(zip(each.replies, scores, strict=True))
        row |= {"completions": list(once), "scores": list(once.values())}
    if len(set(each.replies)) < 2:
        account.left_out["nothing_to_compare"] += 1
        return
    try:
        made, left_out = made_of(canonical_row(row, LISTS), LISTS, labelling.options)
    except UnusablePair as unusable:
        account.left_out[unusable.kind] += 1
        return
    except BadRow as bad:
        raise each.place.error(bad.message, field=bad.field, mend=bad.mend) from None
    account.left_out.update(left_out)
    account.rows += len(made)
    rng = random.Random(f"label {labelling.seed} {prompt_digest(each.prompt)}")
    for found in made:
        if labelling.labels == "bradley_terry" and rng.random() < _chance_of_worse(found["margin"]):
            found = turned(found)
        yield found | {"source": str(each.place)}


def _chance_of_worse(margin: float) -> float:
    """sigmoid(-margin), of a margin from 0."""
    return math.exp(-margin) / (1 + math.exp(-margin))


def read_candidates(sources: Sequence[str]) -> Iterator[Candidates]:
    """Rows with `prompt` and `completions`, a list of texts, as `dpo-kit sample` writes them.

    Raises:
        InputError: while reading; a source that is not there or damaged, a row of another shape.
    """
    for source in find_sources(sources)[0]:
        for row, place in source.rows():
            if isinstance(row, InputError):
                raise row
            replies = row.get("completions")
            if not isinstance(replies, list) or not all(isinstance(reply, str) for reply in replies):
                raise place.error(
                    "expected a list of texts",
                    field="completions",
                    mend="Give what dpo-kit sample writes: prompt and completions.",
                )
            try:
                prompt = text_or_messages(row.get("prompt"), "prompt")
            except BadRow as bad:
                raise place.error(bad.message, field=bad.field, mend=bad.mend) from None
            yield Candidates(prompt, replies, place)


def build_file(sources: Sequence[str], out: Path, score: Score, labelling: Labelling) -> Account:
    """Write what `labelled` makes of candidates to a file (see `RowWriter`), whole or not at all.

    Raises:
        InputError: as `read_candidates`; an `out` that cannot be written; or nothing came out.
    """
    require_not_source(sources, out)
    account = Account()
    with RowWriter(out) as writer:
        for row in labelled(read_candidates(sources), score, labelling, account):
            writer.write(row)
        if not account.rows:
            raise InputError(
                f"nothing can be learned from the candidates: {account.summary(labelling.shape)}",
                file=sources[0],
                mend="Sample more replies to a prompt, or at a higher temperature.",
            )
    return account
