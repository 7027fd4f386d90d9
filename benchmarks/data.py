"""Read, check and tokenise a file of a million generated pairs: time, memory, and a second run.

    python benchmarks/data.py [--pairs N] [--tokenizer FOLDER] [--out FOLDER]

Each figure comes from a process of its own. What a run is compared with is the tokenizer's own rate:
`encode_batch_fast` of `tokenizers` on the texts of the file, each prompt, chosen and rejected reply once, in
batches of 1000 texts, on all cores, the results thrown away. A run does more: it reads, checks, finds where
replies begin, applies the length policy, and writes rows and ids to the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from data_file import HH, ROOT, corpus, write_pairs
from machine import DISTURBED, OthersClock, machine, machine_in_words

GPT2 = HH.parents[2] / "gpt2-tokenizer"
VOCABULARY = 8192  # of the tokenizer that is learned where GPT-2's is not there
TEXTS_AT_ONCE = 1000
PAIRS = 1_000_000
MEMORY_LIMIT = 2_000_000_000
RATE_LIMIT = 0.8


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--pairs", type=int, default=PAIRS)
    made.add_argument("--tokenizer", type=Path, help="default: GPT-2's, else one learned on the corpus")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    made.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    made.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    return made.parse_args(arguments)


def own_rate(file: Path, folder: Path) -> dict[str, Any]:
    """Seconds that the tokenizer alone takes for the file's texts."""
    from dpo_kit.tokenizer import load_tokenizer

    backend = load_tokenizer(folder).backend_tokenizer
    seconds, characters = 0.0, 0
    texts = _texts(file)
    while some := list(islice(texts, TEXTS_AT_ONCE)):
        characters += sum(map(len, some))
        start = time.perf_counter()
        backend.encode_batch_fast(some, add_special_tokens=False)
        seconds += time.perf_counter() - start
    return {"seconds": seconds, "characters": characters}


def _texts(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield from (row["prompt"], row["chosen"], row["rejected"])


def run(file: Path, folder: Path) -> dict[str, Any]:
    """Load and tokenise the file, as a recipe's run does."""
    import datasets

    from dpo_kit.pairs import load_with_report
    from dpo_kit.tokenization import tokenize_pairs
    from dpo_kit.tokenizer import load_tokenizer

    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(folder)
    imported = _memory()
    start = time.perf_counter()
    rows, report = load_with_report(file)
    loaded, after_loading = time.perf_counter(), _memory()
    tokenized = tokenize_pairs(rows, tokenizer)
    end = time.perf_counter()
    return {
        "seconds": end - start,
        "loading": loaded - start,
        "tokenising": end - loaded,
        "pairs": report.made,
        "kept": tokenized.counts["kept"],
        "imports": imported,
        "after_loading": after_loading,
        **_memory(),
    }


def _memory() -> dict[str, int]:
    """Bytes that the kernel counts as this process's: the most there were, and now those of no file."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    names = {"peak": "VmHWM", "anonymous": "RssAnon", "of_files": "RssFile"}
    return {name: int(fields[field].split()[0]) * 1024 for name, field in names.items()}


STEPS = {"rate": own_rate, "first": run, "second": run}


def measured(step: str, file: Path, tokenizer: Path, cache: Path) -> dict[str, Any]:
    """A step in a process of its own."""
    command = [sys.executable, __file__, "--step", step, "--file", str(file), "--tokenizer", str(tokenizer)]
    environment = os.environ | {"DPO_KIT_CACHE": str(cache), "TOKENIZERS_PARALLELISM": "true"}
    others = OthersClock()
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return {**json.loads(done.stdout.splitlines()[-1]), "others": others.cores()}


def table(found: dict[str, dict[str, Any]], pairs: int, size: int, tokenizer: str) -> str:
    """The figures as a page of markdown."""
    rate, first, second = found["rate"], found["first"], found["second"]
    share = rate["seconds"] / first["seconds"]
    lines = [
        "# From a file of pairs to ids",
        "",
        f"{pairs:,} pairs of generated text (words of {corpus()[1]}; lengths of HH), {size / 1e6:,.0f} MB of "
        f"JSON lines, {tokenizer}. {machine_in_words(machine())}.",
        "",
        "| | seconds | pairs/s | MB/s | peak memory (VmHWM) | of it in no file at the end (RssAnon) |",
        "|---|---:|---:|---:|---:|---:|",
        f"| tokenizers alone | {rate['seconds']:.1f} | {_speed(rate['seconds'], pairs, size)} | | |",
        *(
            f"| {name} | {of['seconds']:.1f} | {_speed(of['seconds'], pairs, size)} "
            f"| {of['peak'] / 1e9:.2f} GB | {of['anonymous'] / 1e9:.2f} GB |"
            for name, of in (("first run", first), ("second run", second))
        ),
        "",
        f"The first run goes at {share:.0%} of the tokenizer's own rate (aim: {RATE_LIMIT:.0%}): "
        f"{first['loading']:.1f} s to read and check, {first['tokenising']:.1f} s to tokenise and write. "
        f"Peak memory is {'below' if first['peak'] < MEMORY_LIMIT else 'NOT below'} 2 GB; "
        f"{first['imports']['peak'] / 1e9:.2f} GB of it is there before the first row is read. It counts the "
        "pages of the mapped cache files that were read, which the kernel takes back when it needs them.",
        "",
        "Tokenizers alone: `encode_batch_fast` on each prompt, chosen and rejected reply once, in batches "
        "of 1000 texts, all cores, results thrown away. Imports and loading the tokenizer are left out.",
    ]
    disturbed = [step for step, of in found.items() if of["others"] and of["others"] > DISTURBED]
    if disturbed:
        lines += ["", f"Other processes took part of the machine meanwhile: {', '.join(disturbed)}."]
    return "\n".join(lines) + "\n"


def _speed(seconds: float, pairs: int, size: int) -> str:
    return f"{pairs / seconds:,.0f} | {size / seconds / 1e6:.1f}"


def tokenizer_folder(given: Path | None, folder: Path) -> tuple[Path, str]:
    """Where the tokenizer lies, and what it is called."""
    if given or GPT2.is_dir():
        return given or GPT2, f"tokenizer {(given or GPT2).name}"
    from dpo_kit.tokenizer import train_byte_level_bpe

    text = corpus()[0]
    train_byte_level_bpe([text], VOCABULARY).save_pretrained(folder / "tokenizer")
    return folder / "tokenizer", f"byte-level BPE of {VOCABULARY} tokens learned on the corpus"


def main(arguments: list[str] | None = None) -> None:
    """Generate, measure, write the page."""
    given = parse(arguments)
    if given.step:
        print(json.dumps(STEPS[given.step](given.file, given.tokenizer)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "pairs.jsonl"
        write_pairs(file, given.pairs, given.seed)
        tokenizer, called = tokenizer_folder(given.tokenizer, folder)
        found = {step: measured(step, file, tokenizer, folder / "cache") for step in STEPS}
        page = table(found, given.pairs, file.stat().st_size, called)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "data.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (given.out / "data.md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
