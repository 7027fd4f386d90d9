"""The shapes that preference data has on disk: one small adapter each, in a registry that users can add to.

`registry` holds them and finds the one that fits a row; the other modules hold the adapters, by family.
"""

from dpo_kit.pairs.formats import alike, arenas, comparisons, dialogues, instructions, ranked, trees
from dpo_kit.pairs.formats.registry import (
    FORMATS,
    Convert,
    Format,
    Row,
    add_formats,
    detected_format,
    is_own,
    named_format,
    register_format,
)

add_formats((*alike.FORMATS, *dialogues.FORMATS))
add_formats((*instructions.FORMATS, *comparisons.FORMATS, *arenas.FORMATS))
add_formats((*ranked.FORMATS, *trees.FORMATS))

__all__ = [
    "FORMATS",
    "Convert",
    "Format",
    "Row",
    "detected_format",
    "is_own",
    "named_format",
    "register_format",
]
