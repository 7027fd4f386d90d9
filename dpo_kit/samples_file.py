"""Replies of a model to prompts, in a file of JSON lines that a killed run goes on with (`dpo-kit sample`).

A line is {prompt, completions: [N], tokens: [N], finished: [N]}: with `scores` or `ranks` beside them it is a
ranked list that loads as such. Until all are there the lines lie in FILE.writing; FILE.meta says what they
were made by.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, BinaryIO

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo_kit.encoding import require_eos
from dpo_kit.errors import InputError
from dpo_kit.evaluation.request import DTYPES
from dpo_kit.evaluation.sampling import encode_prompts, sample_replies
from dpo_kit.fingerprint import model_key
from dpo_kit.json_lines import each_line, json_line
from dpo_kit.models import check_length, load_model
from dpo_kit.pairs.writing import require_not_source
from dpo_kit.run_folder import write_text
from dpo_kit.texts import Prompt, identity, is_text_file, read_prompts
from dpo_kit.tokenizer import load_tokenizer

Say = Callable[[str], None]
ENDINGS = (".jsonl", ".ndjson")
_SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn; the arguments of `sample_replies`. `samples` is the number to each prompt."""

    samples: int = 4
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 64
    seed: int = 0


def sample_prompts(
    model: str,
    sources: Sequence[str],
    out: Path,
    sampling: Sampling,
    *,
    tokenizer: str | None = None,
    dtype: str = "float32",
    max_prompts: int | None = None,
    say: Say = print,
) -> dict[str, Any]:
    """Sample from the model in a folder or on the hub; on the GPU where there is one.

    Args:
        model: folder or hub id of a causal LM.
        sources: of prompts, as `read_prompts` takes them; each distinct prompt counts once.
        out: the file, see `sample_to_file`.
        sampling: how.
        tokenizer: folder or hub id; default: beside the model.
        dtype: of the weights.
        max_prompts: the first so many distinct ones.
        say: gets lines of progress.

    Returns:
        The figures of `sample_to_file`.

    Raises:
        InputError: wrong prompts, model, settings or file.
    """
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype '{dtype}'", field="--dtype", mend=f"Known: {', '.join(DTYPES)}.")
    if sampling.top_p <= 0:
        raise InputError("no token is within it", field="--top-p", mend="Give more than 0; 1 is all tokens.")
    _check_out(out, sources)
    distinct: dict[str, Prompt] = {}
    read = 0
    for prompt in read_prompts(sources, field="PROMPTS"):
        read += 1
        distinct.setdefault(identity(prompt), prompt)
        if len(distinct) == max_prompts:
            break
    if not distinct:
        raise InputError("there is no prompt in the sources", file=sources[0], field="PROMPTS")
    say(f"{len(distinct):,} distinct prompts of {read:,} read")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = load_model(model, getattr(torch, dtype)).to(device)  # type: ignore[arg-type]
    own = load_tokenizer(tokenizer or model)
    return sample_to_file(policy, own, list(distinct.values()), out, sampling, say=say)


def _check_out(out: Path, sources: Sequence[str]) -> None:
    if out.is_dir() or not out.parent.is_dir():
        problem = "this is a folder" if out.is_dir() else "its folder is not there"
        raise InputError(problem, file=out, field="--out", mend="Name a file in a folder that is there.")
    if out.suffix.lower() not in ENDINGS:
        mend = f"End it in {' or '.join(ENDINGS)}; `dpo-kit data build` packs what it makes of it."
        raise InputError("what is written are plain lines of JSON", file=out, field="--out", mend=mend)
    if rows := [source for source in sources if not is_text_file(source)]:
        require_not_source(rows, out)


def sample_to_file(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    out: Path,
    sampling: Sampling,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    say: Say = print,
) -> dict[str, Any]:
    """Write `samples` replies to each prompt, in the order of the prompts, batch by batch.

    Each batch is drawn from a seed of its own, made of the seed and the number of its first prompt: a run
    that was stopped anywhere and is called again ends with the same file as one that was not.

    Args:
        model: a causal LM, on its device.
        tokenizer: its tokenizer, with an EOS token.
        prompts: at least one.
        out: the file. One that is whole and of the same model, prompts and settings is left as it is.
        sampling: how replies are drawn.
        chat_template_kwargs: for prompts that are messages.
        say: gets lines of progress.

    Returns:
        prompts, replies, tokens_sampled, tokens (prompts and replies put through the model, padding left
        out), unfinished (replies cut at max_new_tokens), seconds (of sampling, all calls together).

    Raises:
        InputError: there is a file of another model, other prompts or settings, or another process writes
            it; the model has not so many positions; several greedy samples of a prompt.
    """
    require_eos(tokenizer)
    if sampling.temperature == 0 and sampling.samples > 1:
        raise InputError("greedy replies to one prompt are all the same", field="--n", mend="Set it to 1.")
    lengths, digest = _lengths(prompts, tokenizer, chat_template_kwargs)
    longest = max(lengths) + sampling.max_new_tokens
    check_length(model, sampling.max_new_tokens, longest, field="max_new_tokens")
    made_by = {"model": model_key(model), "prompts": digest, "device": model.device.type, **asdict(sampling)}
    writing = out.with_name(f"{out.name}.writing")
    with _alone(out, writing) as file:
        meta = _open(out, writing, made_by)
        if file is not None:
            batch = partial(_batch, model, tokenizer, sampling, chat_template_kwargs)
            _write_rest(out, file, prompts, sampling.batch_size, batch, meta, say)
            _require_whole(writing, prompts)
            os.replace(writing, out)
    return _figures(out, lengths, sampling.samples, meta["seconds"])


@contextlib.contextmanager
def _alone(out: Path, writing: Path) -> Iterator[BinaryIO | None]:
    """FILE.writing, to be added to by this process alone; None where the file is whole already."""
    if out.exists():
        yield None
        return
    with open(writing, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                "another process is sampling into this file", file=out, mend="Wait for it, or name another."
            ) from None
        except OSError:  # a file system without locks: what was written is looked at before it is renamed
            pass
        if out.exists():  # whole in the meantime
            writing.unlink(missing_ok=True)
            yield None
        else:
            yield file


def _require_whole(writing: Path, prompts: Sequence[Prompt]) -> None:
    rows = each_line(writing)
    if not all(row is not None and row["prompt"] == prompt for row, prompt in zip_longest(rows, prompts)):
        raise InputError(
            "the lines are not those of the prompts: something else has written here",
            file=writing,
            mend="Remove it to begin anew.",
        )


def _write_rest(
    out: Path,
    file: BinaryIO,
    prompts: Sequence[Prompt],
    batch_size: int,
    batch: Callable[[Sequence[Prompt], int], bytes],
    meta: dict[str, Any],
    say: Say,
) -> None:
    """Add the batches that the file lacks, and to the account the seconds that each takes."""
    done = _keep_whole_batches(file, len(prompts), batch_size)
    if done:
        say(f"going on after {done:,} of {len(prompts):,} prompts")
    said = time.monotonic()
    for first in range(done, len(prompts), batch_size):
        begun = time.monotonic()
        part = prompts[first : first + batch_size]
        file.write(batch(part, first))
        file.flush()
        now = time.monotonic()
        meta["seconds"] += now - begun
        write_text(_meta_of(out), json.dumps(meta))
        if now - said > _SECONDS_BETWEEN_LINES:
            said = now
            say(f"sampled replies to {first + len(part):,} of {len(prompts):,} prompts")
    os.fsync(file.fileno())


def _batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    chat_template_kwargs: Mapping[str, Any] | None,
    prompts: Sequence[Prompt],
    first: int,
) -> bytes:
    """The lines of one batch."""
    settings = asdict(sampling) | {"seed": batch_seed(sampling.seed, first)}
    drawn = sample_replies(model, tokenizer, prompts, chat_template_kwargs=chat_template_kwargs, **settings)
    lines = []
    for i, prompt in enumerate(prompts):
        own = drawn[i * sampling.samples : (i + 1) * sampling.samples]
        line: dict[str, Any] = {"prompt": prompt, "completions": [sample.reply for sample in own]}
        line["tokens"] = [len(sample.reply_ids) for sample in own]
        line["finished"] = [sample.finished for sample in own]
        lines.append(json_line(line))
    return "".join(lines).encode(errors="backslashreplace")


def batch_seed(seed: int, first: int) -> int:
    """The seed of the batch that begins with prompt number `first`, from 0."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {first}".encode(), digest_size=8).digest()) >> 1


def _lengths(
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: Mapping[str, Any] | None,
) -> tuple[list[int], str]:
    """Tokens of each prompt; and a digest of their ids and of what ids mean to the tokenizer."""
    digest = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    lengths: list[int] = []
    waiting = iter(prompts)
    while part := list(islice(waiting, 1000)):
        encoded, ends = encode_prompts(part, tokenizer, chat_template_kwargs)
        digest.update(json.dumps([part, encoded, ends]).encode())
        lengths += map(len, encoded)
    return lengths, digest.hexdigest()[:32]


def _meta_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.meta")


def _open(out: Path, writing: Path, made_by: dict[str, Any]) -> dict[str, Any]:
    """What is known of the file that is there, if it is made by the same; else a new account."""
    found = out if out.exists() else writing
    meta = _known(out)
    other = [name for name in made_by if meta and meta["made_by"].get(name) != made_by[name]]
    if not found.stat().st_size and (meta is None or other):
        meta = {"made_by": made_by, "seconds": 0.0}
        write_text(_meta_of(out), json.dumps(meta))
        return meta
    if meta is None:
        raise InputError(
            "there is a file already, and nothing says what it was made by",
            file=found,
            mend="Remove it, or name another file.",
        )
    if other:
        said = {"model": "another model", "prompts": "other prompts (or another tokenizer)"}
        differences = ", ".join(
            said.get(name, f"{name} {meta['made_by'].get(name)} and not {made_by[name]}") for name in other
        )
        raise InputError(
            f"there is a file already, made by {differences}",
            file=found,
            mend=_mend_of(other),
        )
    return meta


def _known(out: Path) -> dict[str, Any] | None:
    """The account beside a file; None where there is none that is whole."""
    try:
        meta = json.loads(_meta_of(out).read_text(encoding="utf-8"))
        return {"made_by": dict(meta["made_by"]), "seconds": float(meta["seconds"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _mend_of(other: Sequence[str]) -> str:
    mend = "Remove it to begin anew, or name another file."
    if "prompts" in other:
        mend += " More prompts are sampled to another file, with sources that have these alone: data build "
        mend += "takes several."
    return mend


def _keep_whole_batches(file: BinaryIO, prompts: int, batch_size: int) -> int:
    """Cut the file after its last whole batch; how many prompts are done."""
    ends = [0]
    with open(file.name, "rb") as written:
        ends += (written.tell() for line in iter(written.readline, b"") if line.endswith(b"\n"))
    lines = len(ends) - 1
    done = prompts if lines == prompts else lines // batch_size * batch_size
    file.truncate(ends[done])
    return done


def _figures(out: Path, lengths: Sequence[int], samples: int, seconds: float) -> dict[str, Any]:
    sampled = unfinished = 0
    for row in each_line(out):
        sampled += sum(row["tokens"])
        unfinished += row["finished"].count(False)
    return {
        "prompts": len(lengths),
        "replies": len(lengths) * samples,
        "tokens_sampled": sampled,
        "tokens": sum(lengths) * samples + sampled,
        "unfinished": unfinished,
        "seconds": seconds,
    }
