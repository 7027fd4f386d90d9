"""Where what can be computed again is kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(cache_dir: str | Path | None, kind: str) -> Path:
    """`<cache_dir>/<kind>`; without a folder of one's own in $DPO_KIT_CACHE, else in ~/.cache/dpo_kit."""
    root = cache_dir or os.environ.get("DPO_KIT_CACHE") or Path.home() / ".cache" / "dpo_kit"
    return Path(root).expanduser() / kind
