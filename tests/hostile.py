"""What somebody else's files may hold: pickles that run code, texts that are more to the careless."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest

from dpo_kit.cli import main

PICKLES = (
    *("pytorch_model.bin", "model.pt", "adapter_model.bin", "weights.pth", "training_args.bin", "vocab.pkl"),
    *("optimizer.pt", "scheduler.pt", "rng_state.pth"),
)

TEXTS = (
    "<script>alert(1)</script>",
    "</pre></textarea></title></style><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)" \'><svg/onload=alert(1)>',
    "<!-- --!> <![CDATA[ ]]> &lt;b&gt; &#60;i&#62; &amp;amp;",
    "{{ 7 * 7 }} {% for x in y %} {# gone #} ${HOME} `id` $(id)",
    "!!python/object/apply:os.system ['id']\n- &a *a",
    "[bold red]loud[/] [link=http://x]y[/link] [/]",
    "\x1b[2J\x1b]0;title\x07\x9b31m \x7f",
    "a\u202egnp.exe \u2066x",
    "../../../../tmp/x",
    "-rf --help",
    "half \ud800 pair \udfff",
    "nul \x00 and \r\n line \u2028 ends",
    "$x_{$ \\frac{1 $$ \\badcommand{ %",
    "long" * 5000,
)


class _Bomb:
    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._marker),)


def plant(path: Path, marker: Path, *, as_torch: bool = False) -> Path:
    """Write a pickle that makes the folder `marker` when it is read; `as_torch`: as torch.save has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = pickle.dumps(_Bomb(marker))
    if not as_torch:
        path.write_bytes(content)
        return path
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return path


def run(*arguments: Any) -> int:
    """Exit status of a command."""
    with pytest.raises(SystemExit) as left:
        main([str(each) for each in arguments])
    return int(left.value.code or 0)
