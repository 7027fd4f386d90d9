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
from dpo_kit.audit.findings import Example, Finding, Result, Severity
from dpo_kit.audit.markers import markers_of
from dpo_kit.audit.openings import OPENINGS, openings_of
from dpo_kit.audit.turns import last_question, turns_of

# What stands at the end of a whole sentence, and may follow its last mark.
_SENTENCE_END = tuple(".!?。！？…")
_AFTER_SENTENCE = "\"'”’»)]}*_`"

# An opening explains labels where its shares differ by so much, and not by chance.
OPENING_GAP = 0.05

# Of the rows; where more have a very short reply, answers are short by nature.
FEW = 0.25

VERY_SHORT = 10  # characters; of scripts that write a word in one or two, a third of that
REPEATED = 40  # characters of a question, from which on its repetition is no accident

_NOT_LETTERS = re.compile(r"[\W_]+")
_COMPARED = 60


class Replies:
    """Faults of the replies and turns of single rows."""

    name = "replies"

    def __init__(self) -> None:
        self._account = Account()
        self._openings = {name: Fault() for name in OPENINGS}
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
        self._look_at_openings(example, bare, sides)
        self._look_at_markers(example, bare, sides)
        short = [
            _is_very_short(reply) and not _calls_tools(part)
            for reply, part in zip(bare, example.kind.parts(example.row).values(), strict=True)
        ]
        self._find("very_short_replies", example, sides, short)
        question = last_question(example)
        if len(question) >= REPEATED:
            self._find("prompt_repeated", example, sides, [question in reply for reply in bare])
        self._look_at_turns(example)

    def _find(self, name: str, example: Example, sides: Sequence[int], found: Sequence[Any]) -> None:
        """Put a fault down for the replies in which something was found; a text of it is shown."""
        if not any(found):
            return
        where, what, shows = 0, [], {}
        labels = reply_labels(example)
        for side, label, reply, sign in zip(sides, labels, example.replies, found, strict=True):
            if sign:
                where |= side
                if isinstance(sign, str):
                    what.append(f"{sign.strip()} in {label}")
                    shows[label] = clipped(reply, reply.find(sign))
        if what:
            shows["what"] = "; ".join(what)
        self._account.add(name, example, where, shows)

    def _look_at_markers(self, example: Example, bare: list[str], sides: Sequence[int]) -> None:
        signs = [markers_of(reply) for reply in bare]
        self._find("speaker_names", example, sides, [name for name, _ in signs])
        if not any(inside for _, inside in signs):
            return
        where, what, shows = 0, [], {}
        labels = reply_labels(example)
        for side, label, reply, (_, inside) in zip(sides, labels, bare, signs, strict=True):
            if inside is not None:
                where |= side
                what.append(f"{inside[0]} in {label}")
                shows[label] = clipped(reply, inside[1])
        self._account.add("role_markers", example, where, {"what": "; ".join(what)} | shows)

    def _compare(self, example: Example, bare: list[str], sides: Sequence[int]) -> None:
        """Whether one reply is another's start, or the same but for punctuation, case and white space."""
        starts: dict[str, dict[int, int]] = {"cut_off_replies": {}, "prefix_replies": {}}
        order = sorted(range(len(bare)), key=bare.__getitem__)
        for i, j in pairwise(order):
            if bare[i] and bare[i] != bare[j] and bare[j].startswith(bare[i]):
                name = "cut_off_replies" if _is_cut_off(bare[i], bare[j]) else "prefix_replies"
                starts[name][i] = j
        for name, found in starts.items():
            if found:
                labels = reply_labels(example)
                words = [f"{labels[i]} is the start of {labels[j]}" for i, j in found.items()]
                where = sum({sides[i] for i in found})
                self._account.add(name, example, where, {"what": "; ".join(words)})
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
            self._account.add_to(self._edges[edge], str(edge), example, edge[0], {"what": repr(piece)})

    def _look_at_openings(self, example: Example, bare: list[str], sides: Sequence[int]) -> None:
        found: dict[str, int] = {}
        for side, reply in zip(sides, bare, strict=True):
            for name in openings_of(reply):
                found[name] = found.get(name, 0) | side
        for name, where in found.items():
            self._account.add_to(self._openings[name], name, example, where)

    def _look_at_turns(self, example: Example) -> None:
        turns = turns_of(example)
        if turns is None:
            return
        for (role, _), (following, _) in pairwise(turns):
            if role == following != "tool":  # results of several calls come one after the other
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
        found = [finding for finding in findings if finding is not None and not self._is_nature(finding)]
        found += [*self._of_edges(), *self._of_openings()]
        return Result(tuple(found), {"faults": account.by_side(), "openings": self._opening_shares()})

    def _is_nature(self, finding: Finding) -> bool:
        """Whether very short replies are too many, and too much alike on both sides, to be faulty."""
        if finding.name != "very_short_replies" or finding.count <= FEW * finding.of:
            return False
        account, fault = self._account, self._account.faults[finding.name]
        if not account.with_preferred or not account.with_other:
            return True
        apart = excess(fault.preferred, account.with_preferred, fault.other, account.with_other)
        return abs(apart) < CLEAR

    def _of_edges(self) -> list[Finding]:
        account, found = self._account, []
        assert account.kind is not None
        names = side_names(account.kind)
        for end, verb in (("start", "begin"), ("end", "end")):
            first, second = self._edges[PREFERRED, end], self._edges[OTHER, end]
            counts = first.preferred, second.other
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
            places = tuple(dict.fromkeys([*first.places, *second.places]))
            found.append(
                Finding(
                    f"white_space_at_{end}",
                    "warning" if gap else "note",
                    len(places),
                    account.rows,
                    f"{sides} {verb} with white space, the others do not.{tell}",
                    "Strip the replies alike, or keep the same white space in all.",
                    places,
                    (*first.examples[:3], *second.examples[:2]),
                )
            )
        return found

    def _opening_shares(self) -> dict[str, dict[str, float]]:
        account = self._account
        assert account.kind is not None
        names = side_names(account.kind)
        totals = (account.with_preferred, account.with_other)
        return {
            name: {
                side: count / of
                for side, count, of in zip(names, (fault.preferred, fault.other), totals, strict=True)
                if of
            }
            for name, fault in self._openings.items()
        }

    def _of_openings(self) -> list[Finding]:
        account, found = self._account, []
        for name, shares in self._opening_shares().items():
            fault = self._openings[name]
            apart = abs(excess(fault.preferred, account.with_preferred, fault.other, account.with_other))
            if len(shares) < 2 or apart < CLEAR:
                continue
            (first, share), (second, other) = shares.items()
            if abs(share - other) < OPENING_GAP:
                continue
            found.append(
                fault.finding(
                    f"opening_{name.replace(' ', '_').lower()}",
                    "warning",
                    account.rows,
                    f"{share:.1%} of the {first} replies and {other:.1%} of the {second} ones open alike "
                    f"({name}): the opening goes with the label.",
                    "See whether you want to teach that opening; else balance it, or rewrite the openings.",
                )
            )
        return found


_FAULTS: tuple[tuple[str, str, str, Severity], ...] = (
    (
        "cut_off_replies",
        "have a reply that breaks off inside of a sentence where another one goes on",
        "Look whether generation was stopped by a length limit, and take cut-off replies out.",
        "error",
    ),
    (
        "prefix_replies",
        "have a reply that another one begins with",
        "See whether the rest is what makes it better or worse, since nothing else can be learned from it.",
        "warning",
    ),
    (
        "same_letters",
        "have replies that differ in white space, case or punctuation only",
        "Take them out, unless it is that difference that is to be learned.",
        "warning",
    ),
    (
        "speaker_names",
        "have a reply that begins with a speaker's name, as `Human:`",
        "Take the name off: the prompt ends with the assistant's turn already, which a reply must not open.",
        "error",
    ),
    (
        "role_markers",
        "have a reply that runs on into another turn",
        "Cut the replies where the other turn begins: they teach the model to speak for the user.",
        "error",
    ),
    (
        "very_short_replies",
        f"have a reply of fewer than {VERY_SHORT} characters",
        "See whether they answer the prompt.",
        "warning",
    ),
    (
        "prompt_repeated",
        "have a reply that repeats the question word for word",
        "Take the question out of the replies, unless the task is to copy it.",
        "warning",
    ),
    (
        "consecutive_turns",
        "have two turns of one role together in the prompt",
        "Join the two, or find the turn that is lost; many chat templates refuse such a prompt.",
        "warning",
    ),
    (
        "prompt_ends_with_assistant",
        "have a prompt whose last turn is the assistant's",
        "Put that turn's text into the replies, if they go on from it; else find the lost turn of the user.",
        "warning",
    ),
    (
        "empty_turns",
        "have a turn without text in the prompt",
        "Take empty turns out: a template writes them all the same.",
        "warning",
    ),
)


def _is_cut_off(reply: str, whole: str) -> bool:
    """Whether a reply that another one begins with breaks off inside of a sentence."""
    if _is_very_short(reply) or reply.rstrip(_AFTER_SENTENCE).endswith(_SENTENCE_END):
        return False
    return whole[len(reply) :].lstrip(" ")[:1].isalnum()


def _calls_tools(reply: str | list[dict[str, Any]]) -> bool:
    return not isinstance(reply, str) and any(message.get("tool_calls") for message in reply)


def _letters(text: str) -> str:
    return _NOT_LETTERS.sub("", text.casefold())


def _is_very_short(bare: str) -> bool:
    return len(bare) < VERY_SHORT and (bare.isascii() or len(bare) < VERY_SHORT // 3)
