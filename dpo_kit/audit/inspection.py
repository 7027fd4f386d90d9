"""The audit of preference data: every check over the streamed rows, which are not held."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_kit.audit.damage import Damage
from dpo_kit.audit.duplicates import Duplicates
from dpo_kit.audit.findings import Account, Audit, Check, Example
from dpo_kit.audit.languages import Languages
from dpo_kit.audit.reading import Margins, findings_of_reading
from dpo_kit.audit.replies import Replies
from dpo_kit.audit.shallow import ShallowChecks
from dpo_kit.errors import InputError
from dpo_kit.length_policy import LengthPolicy
from dpo_kit.pairs.kinds import Kind
from dpo_kit.pairs.loading import Sources, stream_rows
from dpo_kit.pairs.options import LoadOptions
from dpo_kit.pairs.schema import plain_text
from dpo_kit.pairs.statistics import Gatherer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int], None]
# Seconds between two calls of `progress`, and the rows between two looks at the clock.
_PULSE, _ROWS_BETWEEN = 2.0, 64


def inspect_pairs(
    sources: Sources,
    *,
    held_out: Sources | None = None,
    format: str = "auto",
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    max_length: int | None = 1024,
    overlong: str = "drop",
    batch_size: int = 64,
    model: str | Path | dict[str, Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Audit:
    """The account of a loading that leaves unusable rows out, with all that the checks find in the rows kept.

    Parameters
    ----------
    sources, format, options: as for `load_pairs`; the rows may be of any one kind.
    held_out: sources of evaluation data: accounted for, and looked at for what is in both.
    tokenizer: itself, or a folder or hub id. Without one there are no figures of `encoding`, `tokens`,
        `templates` and `cost`.
    max_length, overlong: the length policy of training; see `tokenization.LengthPolicy`.
    batch_size: rows of a training step.
    model: folder, hub id or configuration fields: what training it would take on this machine is estimated.
        Its weights are not read.
    chat_template_kwargs: for the chat template.
    progress: called about every two seconds with the rows read so far.

    Raises `InputError` for a file that cannot be read on and one of no known shape, never for rows that are
    unusable or of the wrong structure; where no row is usable, there are no statistics. And for a tokenizer
    that cannot be loaded or has no EOS, and a model without a tokenizer.
    """
    loading = LoadOptions.of(format=format, **options)
    policy = LengthPolicy(max_length, overlong)
    if batch_size < 1:
        raise InputError(f"expected 1 or more, got {batch_size}", field="batch_size")
    audit, gatherers = Audit(held_out=None if held_out is None else Account()), (Gatherer(), Gatherer())
    checks = make_checks()
    if tokenizer is not None:
        checks += make_token_checks(tokenizer, policy, batch_size, model, chat_template_kwargs)
    elif model is not None:
        raise InputError(
            "what training a model costs is counted in tokens",
            field="tokenizer",
            mend="Give the model's tokenizer too",
        )
    training = {**asdict(policy), "batch_size": batch_size}
    audit.settings = _settings(sources, held_out, loading, tokenizer, model, training)
    for example in _examples(sources, held_out, loading, audit, progress):
        gatherers[example.held_out].add(dict(example.row), example.kind)
        for check in checks:
            check.add(example)
    audit.statistics = gatherers[False].statistics(audit.kind)
    if audit.statistics is not None:
        for check in checks:
            audit.take_in(check.name, check.result())
    audit.add_findings(findings_of_reading(audit, held_out=False))
    if audit.held_out is not None:
        audit.held_out.statistics = gatherers[True].statistics(audit.held_out.kind)
        audit.add_findings(findings_of_reading(audit.held_out, held_out=True))
    return audit


def _settings(
    sources: Sources,
    held_out: Sources | None,
    loading: LoadOptions,
    tokenizer: Any,
    model: Any,
    training: Mapping[str, Any],
) -> dict[str, Any]:
    """What was asked for, as JSON can hold it; of the options those that are not the usual ones."""
    from dpo_kit import __version__

    usual = asdict(LoadOptions())
    given = {name: value for name, value in asdict(loading).items() if value != usual[name]}
    settings: dict[str, Any] = {
        "dpo_kit": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "sources": _names(sources),
        **({} if held_out is None else {"held_out": _names(held_out)}),
        "options": given,
    }
    if tokenizer is not None:
        name = tokenizer if isinstance(tokenizer, str | Path) else tokenizer.name_or_path
        settings |= {"tokenizer": str(name) or type(tokenizer).__name__, **training}
    if model is not None:
        settings["model"] = model if isinstance(model, dict) else str(model)
    return settings


def _names(sources: Sources) -> list[str]:
    return [os.fspath(each) for each in ([sources] if isinstance(sources, str | Path) else sources)]


def make_checks() -> list[Check]:
    """A fresh one of every check that needs no tokenizer."""
    return [Duplicates(), Replies(), Damage(), Languages(), ShallowChecks(), Margins()]


def make_token_checks(
    tokenizer: PreTrainedTokenizerBase | str | Path,
    policy: LengthPolicy,
    batch_size: int,
    model: str | Path | dict[str, Any] | None,
    template_kwargs: Mapping[str, Any] | None,
) -> list[Check]:
    """A fresh one of every check that needs a tokenizer; rows are encoded once for all of them."""
    # transformers takes seconds to import, which the other checks do without.
    from dpo_kit.audit.cost import CostChecks
    from dpo_kit.audit.encoded import Encoder
    from dpo_kit.audit.templates import TemplateChecks
    from dpo_kit.audit.tokens import TokenChecks
    from dpo_kit.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
    tokens, cost = TokenChecks(loaded, policy), CostChecks(batch_size, model)
    encoder = Encoder(loaded, policy, [tokens, cost], template_kwargs)
    # The encoder's result comes first: it hands on the last rows.
    return [encoder, tokens, TemplateChecks(loaded, template_kwargs), cost]


def _examples(
    sources: Sources, held_out: Sources | None, options: LoadOptions, audit: Audit, progress: Progress | None
) -> Iterator[Example]:
    """Rows of the training data and then of the held-out ones, each into its own account."""
    parts: list[tuple[Sources, Account]] = [(sources, audit)]
    if held_out is not None:
        assert audit.held_out is not None
        parts.append((held_out, audit.held_out))
    said, read_before = time.monotonic(), 0
    for given, account in parts:
        for number, row in enumerate(stream_rows(given, options, account)):
            assert account.kind is not None
            source = account.sources[-1].file
            yield _example(row, account.kind, source, held_out=account is not audit)
            if progress and number % _ROWS_BETWEEN == 0 and (now := time.monotonic()) - said >= _PULSE:
                progress(read_before + account.read)
                said = now
        read_before += account.read


def _example(row: dict[str, Any], kind: Kind, source: str, *, held_out: bool) -> Example:
    return Example(
        row=row,
        kind=kind,
        prompt=plain_text(row["prompt"]),
        replies=tuple(plain_text(reply) for reply in kind.parts(row).values()),
        place=row["source"],
        source=source,
        held_out=held_out,
    )
