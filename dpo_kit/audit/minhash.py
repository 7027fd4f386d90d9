"""Texts that are nearly the same, found by MinHash signatures: 128 bytes for each text, and no text held.

A text is the set of its runs of three words, the last ones filled up with nothing. Of 64 random orders of all
such runs the first one of the set is noted; two sets agree in a share of these that is on average their
Jaccard index, the size of the intersection over that of the union (Broder, 1997). Candidates are those that
agree in one of 16 bands of four; they count as near where the estimate is `NEAR` or more. The estimate's
standard error is 0.05 there, so that a text at the border may be missed or taken in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple
from zlib import crc32

import numpy as np

NEAR = 0.8
HASHES = 64
_BAND = 4  # hashes of 16 bits that make one key of 64
_AT_A_TIME = 16384  # words: so many, that numpy's calls cost little, and so few, that they stay in the cache

_random = np.random.default_rng(0)
_FACTORS_K = _random.integers(0, 2**32, HASHES, dtype=np.uint32) | np.uint32(1)
_PLACES = (np.uint32(0x9E3779B1), np.uint32(0x85EBCA77), np.uint32(0xC2B2AE3D))
_SALT = np.uint32(0x27D4EB2F)

# Scripts that put no space between words: each of their characters counts as one.
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")


def words_of(text: str) -> list[bytes]:
    """The words of a text whatever its case and white space, in UTF-8."""
    if text.isascii():
        return text.lower().encode().split()
    spaced = _UNSPACED.sub(r" \g<0> ", text.casefold())
    return " ".join(spaced.split()).encode("utf-8", "surrogatepass").split(b" ")


class Signatures:
    """Signatures of texts that come one after the other, and are let go."""

    def __init__(self) -> None:
        self._done = bytearray()
        self._clear()

    def _clear(self) -> None:
        self._words: list[bytes] = []
        self._lengths: list[int] = []
        self._salts: list[int] = []
        self._starts: list[int] = []
        self._waiting = 0

    def __len__(self) -> int:
        return len(self._done) // (2 * HASHES) + len(self._starts)

    def add(self, *texts: list[bytes]) -> None:
        """The words of one text, or of several that are compared in their order as if they were one."""
        self._starts.append(self._waiting)
        for salt, words in enumerate(texts or ([],)):
            self._words += words or [b""]
            self._words += (b"", b"")
            self._lengths.append(len(words) or 1)
            self._salts.append(salt)
            self._waiting += len(words) or 1
        if self._waiting >= _AT_A_TIME:
            self._finish()

    def array(self) -> np.ndarray:
        """All of them [texts, HASHES], uint16."""
        if self._starts:
            self._finish()
        return np.frombuffer(self._done, np.uint16).reshape(-1, HASHES)

    def _finish(self) -> None:
        runs, starts = self._runs(), np.array(self._starts)
        signatures_NK = np.empty((len(starts), HASHES), np.uint16)
        for k, factor in enumerate(_FACTORS_K):
            signatures_NK[:, k] = np.minimum.reduceat(runs * factor, starts)
        self._done += signatures_NK.tobytes()
        self._clear()

    def _runs(self) -> np.ndarray:
        """A hash for each run of words that begins in a text [runs], uint32."""
        hashes = np.fromiter(map(crc32, self._words), np.uint32, len(self._words))
        lengths = np.array(self._lengths)
        runs = hashes * _PLACES[0]
        runs[:-1] += hashes[1:] * _PLACES[1]
        runs[:-2] += hashes[2:] * _PLACES[2]
        in_text = np.ones(len(runs), bool)
        ends = np.cumsum(lengths + 2)
        in_text[ends - 1] = in_text[ends - 2] = False
        runs = runs[in_text] + np.repeat(np.array(self._salts, np.uint32) * _SALT, lengths)
        # Products keep low bits low: high ones are brought down to them.
        runs ^= runs >> np.uint32(15)
        runs *= np.uint32(0x2C1B3C6D)
        runs ^= runs >> np.uint32(13)
        return runs


def likeness(signatures_NK: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The estimated Jaccard index of the texts `first[i]` and `second[i]` [pairs]."""
    parts = [
        (signatures_NK[first[i : i + 65536]] == signatures_NK[second[i : i + 65536]]).mean(axis=1)
        for i in range(0, len(first), 65536)
    ]
    return np.concatenate(parts) if parts else np.empty(0)


class Compared(NamedTuple):
    """Signatures [texts, HASHES], the place of each thing's one in them [things], and what is near."""

    signatures: np.ndarray
    place: np.ndarray
    near: float = NEAR


def near_groups(*parts: Compared, proposing: int = 1) -> np.ndarray:
    """For each thing the least one that it is connected to by things near each other [things].

    Things must be near by each of the `parts`; the first ones, `proposing` of them, name the candidates
    together. Things that share a band's keys are compared with the first of them and with their neighbour
    only, and not where they are connected already: the work stays linear, and what one band leaves out
    another finds.
    """
    group = np.arange(len(parts[0].place))
    bands = [
        (np.ascontiguousarray(part.signatures).view(np.uint64), part.place) for part in parts[:proposing]
    ]
    for band in range(HASHES // _BAND):
        keys = np.zeros(len(group), np.uint64)
        for columns, place in bands:
            keys = keys * np.uint64(0x9E3779B97F4A7C15) ^ columns[place, band]
        for i, j in _neighbours(keys):
            apart = group[i] != group[j]
            i, j = i[apart], j[apart]
            for part in parts:
                near = likeness(part.signatures, part.place[i], part.place[j]) >= part.near
                i, j = i[near], j[near]
            group = _connected(group, i, j)
    return group


def _connected(group: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Groups (each thing's least member) after these things were connected."""
    while True:
        a, b = group[first], group[second]
        if (a == b).all():
            return group
        np.minimum.at(group, np.maximum(a, b), np.minimum(a, b))
        while (group != group[group]).any():
            group = group[group]


def _neighbours(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of places with equal keys: each with the one before, and with the first."""
    order = np.argsort(keys, kind="stable")
    same = np.flatnonzero(keys[order][1:] == keys[order][:-1]) + 1
    if not len(same):
        return
    yield order[same - 1], order[same]
    starts = np.ones(len(keys), bool)
    starts[same] = False
    first = np.maximum.accumulate(np.where(starts, np.arange(len(keys)), 0))
    far = same[first[same] != same - 1]
    if len(far):
        yield order[first[far]], order[far]
