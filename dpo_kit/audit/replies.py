"""Replies as pieces of text: cut off, run on into the next turn, very short, alike in their opening.

And the turns before them: two of one role together, a prompt that ends with the assistant, empty turns. Only
training rows are looked at. What a tokenizer would make of markers is not looked at here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from dpo_kit.audit.faults import (
    CLEAR,
    OTHER,
    PREFERRED,
    PROMPT,
    Account,
    Fault,
    clipped,
    excess,
    reply_labels,
    reply_sides,
    share_in_words,
    side_names,
)
from dpo_kit.audit.findings import Check, Example, Finding, Result, Severity
from dpo_kit.audit.turns import last_question, turns_of

# Texts that stand at the border of turns, and what they would be the start of.
MARKERS = (
    *("\n\nHuman:", "\nHuman:", "\nUser:", "\nAssistant:", "\n### Instruction", "\n### Human", "\n### User"),
    *("\n### Assistant", "\n### Response", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>"),
    *("<|start_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]"),
    *("<|endoftext|>", "<|end_of_text|>", "</s>"),
)
_STARTS = tuple(marker.lstrip("\n") for marker in MARKERS if marker[0] == "\n")

# How replies begin that have little to do with their prompt; looked for in their first characters.
_HEAD = 160
OPENINGS = {
    "as an AI": re.compile(
        r"\b(?:as|i am|i'm|i’m) (?:just |only )?an? "
        r"(?:ai|artificial intelligence|(?:large )?language model)\b"
        r"|作为(?:一个|一种|一名)?(?:ai|人工智能|语言模型)"
    ),
    "refusal or apology": re.compile(
        r"^\W*(?:i(?:'m|’m| am) (?:very |so |really )?sorry|sorry\b|i apologi[sz]e|my apologies"
        r"|i can(?:'|’|no)t|i(?:'m|’m| am) (?:not able|unable)"
        r"|i will not\b|i won(?:'|’)t\b|unfortunately|对不起|抱歉|很抱歉)"
    ),
    "eager filler": re.compile(
        r"^\W*(?:sure\b|certainly\b|of course\b|absolutely\b|great question|good question|i'd be happy to"
        r"|i’d be happy to|当然)"
    ),
}
# An opening explains labels where its shares differ by so much, and not by chance.
OPENING_GAP = 0.05

VERY_SHORT = 10  # characters; of scripts that write a word in one or two, a third of that
REPEATED = 40  # characters of a question, from which on its repetition is no accident

_NOT_LETTERS = re.compile(r"[\W_]+")
_COMPARED = 60


class Replies:
    """Faults of the replies and turns of single rows."""

    name = "replies"

    def __init__(self) -> None:
        self._account = Account()
        self._openings = {name: Counter[int]() for name in OPENINGS}
        # By side of the reply and end of it: the rows with white space there.
        self._edges = {(side, end): Fault() for side in (PREFERRED, OTHER) for end in ("start", "end")}

    def add(self, example: Example) -> None:
        """One row; held-out ones are passed over."""
        if example.held_out:
            return
        sides = reply_sides(example)
        self._account.count(example, sides)
        bare = [reply.strip() for reply in example.replies]
        self._compare(example, bare, sides)
        self._look_at_edges(example, bare, sides)
        self._look_at_openings(bare, sides)
        self._find("role_markers", example, sides, [_marker(reply) for reply in bare])
        short = [_is_very_short(reply) for reply in bare]
        self._find("very_short_replies", example, sides, short)
        question = last_question(example)
        if len(question) >= REPEATED:
            self._find("prompt_repeated", example, sides, [question in reply for reply in bare])
        self._look_at_turns(example)

    def _find(self, name: str, example: Example, sides: Sequence[int], found: Sequence[Any]) -> None:
        """Put a fault down for the replies in which something was found; a text of it is shown."""
        if not any(found):
            return
        where, what = 0, {}
        for side, label, reply, sign in zip(
            sides, reply_labels(example), example.replies, found, strict=True
        ):
            if sign:
                where |= side
                if isinstance(sign, str):
                    what["what"] = f"{sign.strip()} in {label}"
                    what[label] = clipped(reply, reply.find(sign))
        self._account.add(name, example, where, what)

    def _compare(self, example: Example, bare: list[str], sides: Sequence[int]) -> None:
        """Whether one reply is another's start, or the same but for punctuation, case and white space."""
        starts: dict[int, int] = {}
        order = sorted(range(len(bare)), key=bare.__getitem__)
        for i, j in pairwise(order):
            if bare[i] != bare[j] and bare[j].startswith(bare[i]):
                starts[i] = j
        if starts:
            where = sum({sides[i] for i in starts})
            labels = reply_labels(example)
            words = [f"{labels[i]} is the start of {labels[j]}" for i, j in starts.items()]
            self._account.add("prefix_replies", example, where, {"what": "; ".join(words)})
        heads = [_letters(reply[:_COMPARED]) for reply in bare]
        if any(a.startswith(b) or b.startswith(a) for a, b in pairwise(sorted(heads))):
            letters = Counter(filter(None, map(_letters, bare)))
            if letters and max(letters.values()) > 1:
                self._account.add("same_letters", example, 0)

    def _look_at_edges(self, example: Example, bare: list[str], sides: Sequence[int]) -> None:
        found: dict[tuple[int, str], str] = {}
        for side, reply, text in zip(sides, example.replies, bare, strict=True):
            if len(reply) == len(text):
                continue
            if reply[0].isspace():
                found[side, "start"] = reply[:_COMPARED]
            if reply[-1].isspace():
                found[side, "end"] = reply[-_COMPARED:]
        for edge, piece in found.items():
            self._edges[edge].add(example, edge[0], {"what": repr(piece)})

    def _look_at_openings(self, bare: list[str], sides: Sequence[int]) -> None:
        heads = [reply[:_HEAD].lower() for reply in bare]
        for name, pattern in OPENINGS.items():
            for side in {side for side, head in zip(sides, heads, strict=True) if pattern.search(head)}:
                self._openings[name][side] += 1

    def _look_at_turns(self, example: Example) -> None:
        turns = turns_of(example)
        if turns is None:
            return
        for (role, _), (following, _) in pairwise(turns):
            if role == following:
                self._account.add(
                    "consecutive_turns", example, PROMPT, {"what": f"two turns of {role} together"}
                )
                break
        if turns and turns[-1][0] == "assistant":
            self._account.add("prompt_ends_with_assistant", example, PROMPT)
        empty = next((role for role, filled in turns if not filled), None)
        if empty is not None:
            self._account.add("empty_turns", example, PROMPT, {"what": f"an empty turn of {empty}"})

    def result(self) -> Result:
        """Findings, and the shares of openings by side."""
        account = self._account
        if account.kind is None:
            return Result()
        findings = [account.finding(*args) for args in _FAULTS]
        found = [finding for finding in findings if finding is not None]
        found += [*self._of_edges(), *self._of_openings()]
        return Result(tuple(found), {"faults": account.by_side(), "openings": self._opening_shares()})

    def _of_edges(self) -> list[Finding]:
        account, found = self._account, []
        assert account.kind is not None
        names = side_names(account.kind)
        for end, verb in (("start", "begin"), ("end", "end")):
            first, second = self._edges[PREFERRED, end], self._edges[OTHER, end]
            counts = len(first.places), len(second.places)
            totals = account.with_preferred, account.with_other
            # Where all replies do it, it is the space that parts them from their prompt.
            if not sum(counts) or counts == totals:
                continue
            gap = abs(excess(counts[0], totals[0], counts[1], totals[1])) >= CLEAR
            sides = " and ".join(
                f"{share_in_words(count, of)} of the {name} replies"
                for name, count, of in zip(names, counts, totals, strict=True)
                if of
            )
            tell = " It tells the two apart without reading." if gap else ""
            count = len({*first.places, *second.places})
            severity: Severity = "warning" if gap else "note"
            found.append(
                Finding(
                    f"white_space_at_{end}",
                    severity,
                    count,
                    account.rows,
                    f"{sides} {verb} with white space, the others do not.{tell}",
                    "Strip the replies alike, or keep the same white space in all",
                    tuple(dict.fromkeys([*first.places, *second.places])),
                    (*first.examples[:3], *second.examples[:2]),
                )
            )
        return found

    def _opening_shares(self) -> dict[str, dict[str, float]]:
        account = self._account
        assert account.kind is not None
        totals = {PREFERRED: account.with_preferred, OTHER: account.with_other}
        sides = dict(zip((PREFERRED, OTHER), side_names(account.kind), strict=True))
        return {
            name: {sides[side]: counts[side] / totals[side] for side in sides if totals[side]}
            for name, counts in self._openings.items()
        }

    def _of_openings(self) -> list[Finding]:
        account, found = self._account, []
        for name, shares in self._opening_shares().items():
            counts = self._openings[name]
            apart = abs(excess(counts[PREFERRED], account.with_preferred, counts[OTHER], account.with_other))
            if len(shares) < 2 or apart < CLEAR:
                continue
            (first, share), (second, other) = shares.items()
            if abs(share - other) < OPENING_GAP:
                continue
            found.append(
                Finding(
                    f"opening_{name.replace(' ', '_').lower()}",
                    "warning",
                    counts[PREFERRED] + counts[OTHER],
                    account.with_preferred + account.with_other,
                    f"{share:.1%} of the {first} replies and {other:.1%} of the {second} ones open alike "
                    f"({name}): the opening goes with the label.",
                    "See whether you want to teach that opening; else balance it, or rewrite the openings",
                )
            )
        return found


_FAULTS: tuple[tuple[str, str, str, Severity], ...] = (
    (
        "prefix_replies",
        "have a reply that is the start of another, which is what a cut-off reply looks like",
        "Look whether generation was stopped by a length limit, and take cut-off replies out",
        "error",
    ),
    (
        "same_letters",
        "have replies that differ in white space, case or punctuation only",
        "Take them out, unless it is that difference that is to be learned",
        "warning",
    ),
    (
        "role_markers",
        "have a turn's marker inside a reply, as of a model that ran on into the next turn",
        "Cut the replies at the marker: trained on, it teaches the model to speak for the user",
        "error",
    ),
    (
        "very_short_replies",
        f"have a reply of less than {VERY_SHORT} characters",
        "See whether they answer the prompt",
        "warning",
    ),
    (
        "prompt_repeated",
        "have a reply that repeats the question word for word",
        "Take the question out of the replies, unless the task is to copy it",
        "warning",
    ),
    (
        "consecutive_turns",
        "have two turns of one role together in their prompt",
        "Join the two, or find the turn that is lost; many chat templates refuse such a prompt",
        "warning",
    ),
    (
        "prompt_ends_with_assistant",
        "have a prompt whose last turn is the assistant's",
        "Put that turn's text into the replies, if they go on from it; else find the lost turn of the user",
        "warning",
    ),
    (
        "empty_turns",
        "have a turn without text in their prompt",
        "Take empty turns out: a template writes them all the same",
        "warning",
    ),
)


def _marker(reply: str) -> str | None:
    """The first marker of a turn that stands in the reply."""
    if reply.startswith(_STARTS):
        return next(start for start in _STARTS if reply.startswith(start))
    if "\n" not in reply and "<" not in reply and "[" not in reply:
        return None
    return next((marker for marker in MARKERS if marker in reply), None)


def _letters(text: str) -> str:
    return _NOT_LETTERS.sub("", text.casefold())


def _is_very_short(bare: str) -> bool:
    return len(bare) < VERY_SHORT and (bare.isascii() or len(bare) < VERY_SHORT // 3)


CHECKS: tuple[type[Check], ...] = (Replies,)
