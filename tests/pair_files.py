"""What several files of tests on preference data work with: rows in a file, and what loading says of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_kit.errors import InputError
from dpo_kit.pairs import load_pairs


def write(path: Path, *rows: Any) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def error_of(sources: Any, **settings: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        load_pairs(sources, **settings)
    assert caught.value.exit_status == 2
    return caught.value
