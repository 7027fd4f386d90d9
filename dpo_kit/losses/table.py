"""The registered losses as a table: name, paper, what they learn from, where the incumbents have them."""

from __future__ import annotations

from dpo_kit.losses.registry import LossSpec, get_loss, loss_names

_LEARNS_FROM = {"pairs": "pairs", "unpaired": "labelled replies, pairs", "lists": "ranked lists, pairs"}
_COLUMNS = ("loss", "called", "learns from", "reference", "source", "elsewhere")
# A reference that moves is a mode of the reference, for any loss.
_MOVING = {
    "loss": "any, with `reference: {mode: moving}`",
    "called": "TR-DPO",
    "learns from": "as the loss",
    "reference": "moving",
    "source": "Gorbatovski et al. 2024, arXiv 2404.09656",
    "elsewhere": "TRL sync_ref_model",
}


def objectives() -> list[dict[str, str]]:
    """A row for each registered loss, by family, with the columns of `markdown`."""
    specs = sorted(map(get_loss, loss_names()), key=lambda spec: (spec.family, spec.name))
    return [*map(_row, specs), _MOVING]


def markdown() -> str:
    """The table as README.md has it."""
    rows = [_COLUMNS, ("---",) * len(_COLUMNS)]
    rows += [tuple(row[column] for column in _COLUMNS) for row in objectives()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(spec: LossSpec) -> dict[str, str]:
    if spec.rewards:
        reference = "none (value head)"
    elif "reference_kl" in spec.extras:
        reference = "whole distributions"
    elif spec.reference_tokens:
        reference = "token log-probs"
    else:
        reference = "log-probs" if spec.reference else "none"
    return {
        "loss": f"`{spec.name}`",
        "called": spec.title,
        "learns from": "chosen replies" if not spec.rejected else _LEARNS_FROM[spec.shape],
        "reference": reference,
        "source": spec.paper,
        "elsewhere": ", ".join(spec.incumbents) or "-",
    }
