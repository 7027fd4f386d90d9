"""What an example is: the word that data, packing and losses have for it."""

from __future__ import annotations

from typing import Literal

# A prompt with two replies, with one that has a label, or with several that are ranked.
Shape = Literal["pairs", "unpaired", "lists"]
