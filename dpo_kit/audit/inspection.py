"""The audit of preference data: every check over the streamed rows, which are not held."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_kit.audit.damage import Damage
from dpo_kit.audit.duplicates import Duplicates
from dpo_kit.audit.findings import Audit, Check, Example
from dpo_kit.audit.languages import Languages
from dpo_kit.audit.replies import Replies
from dpo_kit.audit.shallow import ShallowChecks
from dpo_kit.errors import InputError
from dpo_kit.pairs.kinds import Kind
from dpo_kit.pairs.loading import Sources, stream_rows
from dpo_kit.pairs.options import LoadOptions
from dpo_kit.pairs.schema import plain_text
from dpo_kit.pairs.statistics import Gatherer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    **options: Any,
) -> Audit:
    """The account of a loading that leaves unusable rows out, with all that the checks find in the rows kept.

    Parameters
    ----------
    sources, format, options: as for `load_pairs`; the rows may be of any one kind.
    held_out: sources of evaluation data, for what is in both.
    tokenizer: itself, or a folder or hub id. Without one there are no figures of `encoding`, `tokens`,
        `templates` and `cost`.
    max_length, overlong: the length policy of training; see `tokenization.LengthPolicy`.
    batch_size: rows of a training step.
    model: folder, hub id or configuration fields: what training it would take on this machine is estimated.
        Its weights are not read.
    chat_template_kwargs: for the chat template.

    Raises `InputError` for a file that cannot be read on and one of no known shape, never for rows that are
    unusable or of the wrong structure; where no row is usable, there are no statistics. And for a tokenizer
    that cannot be loaded or has no EOS, and a model without a tokenizer.
    """
    loading = LoadOptions.of(format=format, **options)
    audit, gatherer = Audit(), Gatherer()
    checks = make_checks()
    if tokenizer is not None:
        policy = {"max_length": max_length, "overlong": overlong}
        checks += make_token_checks(tokenizer, policy, batch_size, model, chat_template_kwargs)
    elif model is not None:
        raise InputError(
            "what training a model costs is counted in tokens",
            field="tokenizer",
            mend="Give the model's tokenizer too",
        )
    for example in _examples(sources, held_out, loading, audit):
        if not example.held_out:
            gatherer.add(dict(example.row), example.kind)
        for check in checks:
            check.add(example)
    audit.statistics = gatherer.statistics(audit.kind)
    if audit.statistics is not None:
        for check in checks:
            audit.take_in(check.name, check.result())
    return audit


def make_checks() -> list[Check]:
    """A fresh one of every check that needs no tokenizer."""
    return [Duplicates(), Replies(), Damage(), Languages(), ShallowChecks()]


def make_token_checks(
    tokenizer: PreTrainedTokenizerBase | str | Path,
    policy: Mapping[str, Any],
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
    from dpo_kit.length_policy import LengthPolicy
    from dpo_kit.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
    lengths = LengthPolicy(**policy)
    tokens, cost = TokenChecks(loaded, lengths), CostChecks(batch_size, model)
    encoder = Encoder(loaded, lengths, [tokens, cost], template_kwargs)
    # The encoder's result comes first: it hands on the last rows.
    return [encoder, tokens, TemplateChecks(loaded, template_kwargs), cost]


def _examples(
    sources: Sources, held_out: Sources | None, options: LoadOptions, audit: Audit
) -> Iterator[Example]:
    for row in stream_rows(sources, options, audit):
        assert audit.kind is not None
        yield _example(row, audit.kind, audit.sources[-1].file, held_out=False)
    if held_out is None:
        return
    other = Audit()
    for row in stream_rows(held_out, options, other):
        assert other.kind is not None
        yield _example(row, other.kind, other.sources[-1].file, held_out=True)


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
