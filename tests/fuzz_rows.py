"""Good rows of every built-in format; marks in texts: «P» a prompt's, «A» the best reply's, «B» the next"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GoodRow:
    """A row as it lies on disk, and the keys of what it says of its replies (and whose place matters)."""

    row: dict[str, Any]
    judges: tuple[str, ...] = ()


ASK = [{"role": "user", "content": "Name «P» it."}]
BEST, NEXT = [[{"role": "assistant", "content": f"It is «{letter}»."}] for letter in "AB"]
HH = "\n\nHuman: Name «P» it.\n\nAssistant: It is «{}»."
TURNS = [{"from": "human", "value": "Name «P» it."}]

GOOD: dict[str, list[GoodRow]] = {
    "explicit_prompt": [
        GoodRow({"prompt": "Name «P» it.", "chosen": " «A».", "rejected": " «B»."}),
        GoodRow({"prompt": ASK, "chosen": BEST, "rejected": NEXT, "tools": [{}], "prompt_id": 1}),
        GoodRow({"prompt": "Name «P» it.", "chosen": ASK + BEST, "rejected": ASK + NEXT, "score_chosen": 2}),
    ],
    "implicit_prompt": [GoodRow({"chosen": ASK + BEST, "rejected": ASK + NEXT})],
    "hh": [GoodRow({"chosen": HH.format("A"), "rejected": HH.format("B")})],
    "sharegpt": [
        GoodRow({"conversations": TURNS, "chosen": {"from": "gpt", "value": "«A»"}, "rejected": "«B»"}),
        GoodRow({"conversations": TURNS, "chosen": "«A»", "rejected": "«B»", "system": "«P» Be brief."}),
    ],
    "unpaired": [
        GoodRow({"prompt": "Name «P» it.", "completion": " «A»", "label": True}, ("label",)),
        GoodRow({"prompt": ASK, "completion": ASK + BEST, "label": 0}, ("label",)),
    ],
    "unpaired_messages": [GoodRow({"messages": ASK + BEST, "label": False}, ("label",))],
    "ranked": [
        GoodRow({"prompt": "«P»", "completions": ["«B»", "«A»", "«C»"], "scores": [1, 2, 0.5]}, ("scores",)),
        GoodRow({"prompt": ASK, "completions": [NEXT, BEST], "ranks": [2, 1]}, ("ranks",)),
    ],
}
