"""What README.md says is so: its Python runs, and the tables of objectives and shapes are today's."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from families import make_model

from dpo_kit import PreferenceConfig, PreferenceTrainer
from dpo_kit.losses import loss_names, registry
from dpo_kit.pairs import load_pairs
from dpo_kit.tokenizer import load_tokenizer, train_byte_level_bpe

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the examples take for granted: a model, pairs, and the name `tokenizer`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_LOSSES", dict(registry._LOSSES))
    made = train_byte_level_bpe(["A good film. A bad film."] * 20, 262)
    made.save_pretrained("my-model")
    make_model("llama", vocab_size=len(made)).save_pretrained("my-model")
    rows = [{"prompt": f"Film {i}:", "chosen": f" good {i}.", "rejected": " bad."} for i in range(64)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # As a module of its own has it; a loss is known by the place that it is defined in.
    return {"__name__": "readme", "tokenizer": load_tokenizer("my-model")}


def test_every_python_block_runs(names: dict[str, Any]) -> None:
    known = set(loss_names())
    blocks = list(BLOCK.finditer(TEXT))
    assert len(blocks) == TEXT.count("```python")
    assert blocks
    for block in blocks:
        # A traceback then names the line of README.md.
        padding = "\n" * TEXT.count("\n", 0, block.start(1))
        exec(compile(padding + block[1], str(README), "exec"), names)
    for loss in set(loss_names()) - known:
        args = PreferenceConfig("run", batch_size=64, max_steps=1, loss=loss, disable_tqdm=True)
        pairs = load_pairs("pairs.jsonl")
        trainer = PreferenceTrainer(
            "my-model", args=args, train_dataset=pairs, processing_class=names["tokenizer"]
        )
        trainer.train()
        assert trainer.state.global_step == 1


def writer() -> ModuleType:
    """docs/write_tables.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("write_tables", ROOT / "docs" / "write_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["objectives", "formats", "matrix"])
def test_the_tables_of_registries_are_todays(name: str) -> None:
    docs = writer()
    page, markdown = docs.TABLES[name]
    text = page.read_text(encoding="utf-8")
    assert docs.with_table(text, name, markdown) == text, "run `make docs`"
    with pytest.raises(ValueError, match="no lines"):
        docs.with_table("a page without marks", name, markdown)
