"""Scripts and languages of prompts and replies, and replies in another one than their prompt.

Only training rows are looked at, and of a prompt what the user said last; where it speaks of languages, or of
translating, its replies are not accused. How a language is guessed, and how far to trust it, stands in
`scripts`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from dpo_kit.audit.faults import (
    CLEAR,
    NOTICEABLE,
    OTHER,
    PREFERRED,
    PROMPT,
    Account,
    excess,
    reply_labels,
    reply_sides,
    share_in_words,
    side_names,
)
from dpo_kit.audit.findings import Example, Finding, Result
from dpo_kit.audit.scripts import language_of, letters_by_script, script_of_text
from dpo_kit.audit.turns import last_question

UNKNOWN = "unknown"

# What speaks of languages: the reply may have been asked for in another one.
_ASKED_FOR = re.compile(
    r"translat|traduc|traduz|tradui|übersetz|vertaal|перев[её]д|перевод|翻译|翻譯|翻訳|번역|अनुवाद|ترجم|\blanguages?\b"
    r"|\b(?:english|german|french|spanish|portuguese|italian|dutch|swedish|polish|turkish|indonesian|vietnamese"
    r"|chinese|mandarin|cantonese|japanese|korean|greek|hebrew|thai|bengali|tamil|telugu|georgian|armenian"
    r"|russian|ukrainian|arabic|persian|farsi|urdu|hindi|marathi|gujarati|punjabi|kannada|malayalam|nepali"
    r"|latin|sanskrit|deutsch|français|español|italiano|inglés|anglais|englisch)\b"
    r"|中文|英文|英语|英語|日语|日文|日本語|韩语|法语|德语|俄语|西班牙语|汉语",
    re.IGNORECASE,
)


class Languages:
    """The mix of scripts and languages, and replies that answer in another."""

    name = "languages"

    def __init__(self) -> None:
        self._account = Account()
        # By side: letters by script, texts by guessed language.
        self._letters: dict[int, Counter[str]] = {side: Counter() for side in (PROMPT, PREFERRED, OTHER)}
        self._texts: dict[int, Counter[str]] = {side: Counter() for side in (PROMPT, PREFERRED, OTHER)}

    def add(self, example: Example) -> None:
        """One row; held-out ones are passed over."""
        if example.held_out:
            return
        sides = reply_sides(example)
        self._account.count(example, sides)
        asked = self._read(last_question(example), PROMPT)
        answers = [self._read(reply, side) for reply, side in zip(example.replies, sides, strict=True)]
        places = {"other_script": 0, "other_language": 0}
        for side, answer in zip(sides, answers, strict=True):
            if (other := _otherwise(asked, answer)) is not None:
                places[other] |= side
        if not any(places.values()) or _ASKED_FOR.search(example.prompt):
            return
        if places["other_script"]:
            known = letters_by_script(example.prompt)
            here = [known.get(script or "", 0) >= _QUOTED for script, _ in answers]
            places["other_script"] &= ~sum({side for side, there in zip(sides, here, strict=True) if there})
            if not any(places.values()):
                return
        named = [
            f"{label} {language or script or UNKNOWN}"
            for label, (script, language) in zip(reply_labels(example), answers, strict=True)
        ]
        what = {"what": f"prompt {asked[1] or asked[0]}, {', '.join(named)}"}
        for name, where in places.items():
            if where:
                self._account.add(name, example, where, what)

    def _read(self, text: str, side: int) -> tuple[str | None, str | None]:
        """A text's script and language; both are counted."""
        letters = letters_by_script(text)
        mine = self._letters[side]
        for name, count in letters.items():
            mine[name] += count
        script = script_of_text(letters)
        language = language_of(text, script)
        self._texts[side][language or UNKNOWN] += 1
        return script, language

    def result(self) -> Result:
        """Findings; figures give shares of letters by script, and of texts by guessed language, by side; in
        words, of the texts alone whose language can be guessed."""
        kind = self._account.kind
        if kind is None:
            return Result()
        names = dict(zip((PROMPT, PREFERRED, OTHER), ("prompt", *side_names(kind)), strict=True))
        figures = {
            "scripts": {names[side]: _shares(counts) for side, counts in self._letters.items()},
            "languages_guessed": {names[side]: _shares(counts) for side, counts in self._texts.items()},
            "languages_in_words": {names[side]: _in_words(counts) for side, counts in self._texts.items()},
            "rows": self._account.by_side(),
        }
        findings = [self._weighed(name, what) for name, what in _FAULTS.items()]
        return Result(tuple(finding for finding in findings if finding is not None), figures)

    def _weighed(self, name: str, what: str) -> Finding | None:
        """The finding: a warning where many rows have it, or one side more often than the other."""
        account = self._account
        finding = account.finding(name, what, _ADVICE, "warning")
        if finding is None or account.kind is None:
            return None
        fault = account.faults[name]
        apart = excess(fault.other, account.with_other, fault.preferred, account.with_preferred)
        if finding.severity == "note" and (apart >= CLEAR or finding.count >= NOTICEABLE * finding.of):
            finding = replace(finding, severity="warning")
        if apart >= CLEAR:
            first, second = side_names(account.kind)
            shares = (
                share_in_words(fault.other, account.with_other),
                share_in_words(fault.preferred, account.with_preferred),
            )
            more = f" {second.capitalize()} replies do so in {shares[0]}, {first} ones in {shares[1]}: the"
            finding = replace(finding, sentence=f"{finding.sentence}{more} language tells much of the label.")
        return finding


def _otherwise(asked: tuple[str | None, str | None], answer: tuple[str | None, str | None]) -> str | None:
    """The finding that an answer in this script and language is about, if any."""
    for name, wanted, given in zip(("other_script", "other_language"), asked, answer, strict=True):
        if wanted is not None and given is not None and wanted != given:
            return name
    return None


def _shares(counts: Mapping[str, int]) -> dict[str, float]:
    """Of each its share, the greatest first."""
    total = sum(counts.values())
    return {name: counts[name] / total for name in sorted(counts, key=lambda name: -counts[name])}


def _in_words(counts: Mapping[str, int]) -> str:
    """The languages of the texts that are long enough to guess by: `English 97.0%, German 2.1%`."""
    known = {name: count for name, count in counts.items() if name != UNKNOWN}
    total = sum(known.values())
    names = sorted(known, key=lambda name: -known[name])
    words = [f"{name} {share_in_words(known[name], total)}" for name in names[:_NAMED]]
    rest = sum(known[name] for name in names[_NAMED:])
    return ", ".join([*words, f"others {share_in_words(rest, total)}"] if rest else words)


_FAULTS = {
    "other_script": "have a reply in another script than the prompt",
    "other_language": "have a reply that seems to be in another language than the prompt (a guess)",
}
_ADVICE = "See whether they were asked to, and take the others out."
_NAMED = 4
# Letters of a script in a prompt, from which on a reply in that script is no wonder.
_QUOTED = 4
