"""Where what can be computed again is kept."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path

# What to do where that is full.
ELSEWHERE = "Make room, or set DPO_KIT_CACHE to another folder."


def cache_folder(cache_dir: str | Path | None, kind: str) -> Path:
    """`<cache_dir>/<kind>`; without a folder of one's own in $DPO_KIT_CACHE, else in ~/.cache/dpo_kit."""
    root = cache_dir or os.environ.get("DPO_KIT_CACHE") or Path.home() / ".cache" / "dpo_kit"
    return Path(root).expanduser() / kind


def sweep(folder: Path, pattern: str) -> None:
    """Remove what processes that died have left half made: it has the pattern and is a day old."""
    yesterday = time.time() - 86400
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime > yesterday:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
