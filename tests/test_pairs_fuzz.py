"""Every adapter on damaged rows: each is loaded right or reported, never a crash, never a wrong pair.

The texts of a good row say what they are: `P` a prompt's, `A` the best reply's, `B` the next one's, ...
Damage takes parts out, doubles them or puts something else in their place, itself without such a letter.
Whatever is loaded, from whichever format is found or named, a reply's letter must then be before that of the
reply it is preferred to, and no prompt's text may stand in a reply. Where the damage touched what the row
says of its replies (`judges`), the order is its own business.
"""

from __future__ import annotations

import copy
import random
import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from fuzz_rows import GOOD, GoodRow

from dpo_kit.errors import InputError
from dpo_kit.pairs.choosing import made_of
from dpo_kit.pairs.formats import FORMATS, Format, detected_format, is_own
from dpo_kit.pairs.kinds import LISTS, PAIRS, UNPAIRED
from dpo_kit.pairs.options import LoadOptions
from dpo_kit.pairs.schema import KINDS, BadRow, Place, UnusablePair, plain_text

LETTER = re.compile(r"«([A-Z])»")
SCALARS = [
    None,
    True,
    False,
    0,
    1,
    2,
    -1,
    1.5,
    float("nan"),
    float("inf"),
    10**400,
    "\ud800",
    "\x00",
    "\ufffd",
]
WORDS = ["", " ", "text", "1", "tie", "user", "assistant", "gpt", "human", "model_a"]
OTHERS = [
    *SCALARS,
    *WORDS,
    *([], {}, [None], [[]], [{}], {"role": "user"}, {"content": "text"}),
    {"role": "user", "content": None},
    {"role": "assistant", "content": "text"},
    {"from": "human", "value": "text"},
    "\n\nHuman: text\n\nAssistant: text",
    [{"type": "text", "text": "text"}],
    [{"type": "image_url"}],
]
PLACE = Place("fuzz.jsonl", 1)


def spots(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of every value inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [spot for key, inner in inside for spot in ((*path, key), *spots(inner, (*path, key)))]


def damaged(good: GoodRow, rng: random.Random) -> tuple[dict[str, Any], bool, bool]:
    """A copy with up to three damages; whether one touched a judgement, and whether one moved parts."""
    row, judged, moved = copy.deepcopy(good.row), False, False
    for _ in range(rng.randint(0, 3)):
        paths = spots(row)
        if not paths:
            break
        path = rng.choice(paths)
        judged |= any(name in path for name in good.judges)
        container: Any = row
        for key in path[:-1]:
            container = container[key]
        kind = rng.choice(["out", "again", "turned", "replaced", "replaced"])
        if kind == "out":
            del container[path[-1]]
            moved |= isinstance(container, list)
        elif kind == "again" and isinstance(container, list):
            container.insert(rng.randint(0, len(container)), copy.deepcopy(container[path[-1]]))
            moved = True
        elif kind == "turned" and isinstance(container, list):
            container.reverse()
            moved = True
        else:
            container[path[-1]] = copy.deepcopy(rng.choice(OTHERS))
    return row, judged, moved


def loaded(form: Format, row: dict[str, Any], options: LoadOptions) -> list[dict[str, Any]]:
    """What is made of the row; what is reported must be so in the words of `KINDS`."""
    made: list[dict[str, Any]] = []
    for part in form.canonical(row, form.adapter(options.judgement)):
        if isinstance(part, UnusablePair):
            assert part.kind in KINDS
        else:
            rows, left_out = made_of(part, form.kind, options)
            assert all(kind in KINDS for kind in left_out)
            made += rows
    return made


def letters(part: Any) -> set[str]:
    return set(LETTER.findall(plain_text(part)))


def check(rows: list[dict[str, Any]], *, moved: bool = False, ordered: bool = True) -> None:
    """Prompts and replies are kept apart; where the judgement is whole, the better reply is chosen."""
    for row in rows:
        kind = LISTS if "completions" in row else PAIRS if "chosen" in row else UNPAIRED
        replies = [letters(reply) for reply in kind.parts(row).values()]
        assert moved or all("P" not in reply for reply in replies), "a prompt's text in a reply"
        assert all(len(reply) <= 1 for reply in replies), "two replies in one"
        # Turns that were doubled or exchanged may be what a prompt really says.
        assert moved or letters(row["prompt"]) <= {"P"}, "a reply's text in a prompt"
        if kind == PAIRS and ordered and all(replies):
            (better,), (worse,) = replies
            assert better < worse, "a wrong pair"


def fuzz(cases: int, seed: int) -> Counter[str]:
    """So many damaged rows -> how many of them gave something, were reported, or were of no format."""
    rng = random.Random(seed)
    outcomes: Counter[str] = Counter()
    for number in range(cases):
        name = rng.choice(sorted(GOOD))
        row, judged, moved = damaged(rng.choice(GOOD[name]), rng)
        options = LoadOptions(ties=rng.choice(["drop", "half"]), votes=rng.choice(["majority", "share"]))
        plain = options.ties == "drop" and options.votes == "majority"
        forms = [FORMATS[name]]
        try:
            forms.append(detected_format(row, PLACE))
        except InputError:
            outcomes["no format"] += 1
        for form in forms:
            judgement = rng.choice([None, *form.judgements])
            told = plain and judgement is None and form.name == name and not (judged or moved)
            try:
                rows = loaded(form, copy.deepcopy(row), replace(options, judgement=judgement))
                outcomes["loaded" if rows else "reported"] += 1
                check(rows, moved=moved, ordered=told)
            except BadRow:
                outcomes["reported"] += 1
            except Exception as error:
                raise AssertionError(f"case {number}: {form.name} on a row of {name}: {row!r}") from error
    return outcomes


def test_every_built_in_format_has_good_rows() -> None:
    assert set(GOOD) == {name for name, form in FORMATS.items() if not is_own(form)}


@pytest.mark.parametrize("name", sorted(GOOD))
def test_good_rows_are_found_and_loaded(name: str) -> None:
    for good in GOOD[name]:
        assert detected_format(good.row, PLACE).name == name
        rows = loaded(FORMATS[name], good.row, LoadOptions())
        assert rows
        check(rows)


def test_damaged_rows() -> None:
    outcomes = fuzz(10_000, seed=1)
    assert min(outcomes.values()) > 1000


@pytest.mark.slow
def test_a_hundred_thousand_damaged_rows() -> None:
    outcomes = fuzz(100_000, seed=2)
    print(outcomes)
    assert min(outcomes.values()) > 10_000
