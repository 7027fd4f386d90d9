"""The preferences of a prompt as a graph of its replies, better to worse: where they contradict."""

from __future__ import annotations

from collections import Counter

import numpy as np


def both_orders(better_E: np.ndarray, worse_E: np.ndarray) -> np.ndarray:
    """Whether each edge's reverse is there too [edges]. Nodes are numbered from 0."""
    size = int(max(better_E.max(initial=0), worse_E.max(initial=0))) + 1
    return np.isin(better_E * size + worse_E, worse_E * size + better_E)


def on_cycles(better_E: np.ndarray, worse_E: np.ndarray) -> np.ndarray:
    """For each edge the number of its component where that has a cycle of three replies or more, else -1.

    A component is a set of replies that are all better than each other by some way; where its edges, without
    their direction, are as many as its nodes or more, some way round is longer than two.
    """
    component = np.full(len(better_E), -1)
    left = _between_others(better_E, worse_E)
    edges = list(zip(better_E[left].tolist(), worse_E[left].tolist(), strict=True))
    number = _components(edges)
    inside = [(a, b) for a, b in edges if number[a] == number[b]]
    lines = Counter(number[a] for a, b in {(min(edge), max(edge)) for edge in inside})
    nodes = Counter(number.values())
    component[left] = [
        number[a] if number[a] == number[b] and lines[number[a]] >= nodes[number[a]] else -1 for a, b in edges
    ]
    return component


def _between_others(better_E: np.ndarray, worse_E: np.ndarray) -> np.ndarray:
    """The edges left after those from nodes that none is better than, and to nodes that none is worse than,
    are taken away again and again [left]: those of cycles, and between cycles."""
    left = np.arange(len(better_E))
    while len(left):
        keep = np.isin(better_E[left], worse_E[left]) & np.isin(worse_E[left], better_E[left])
        if keep.all():
            break
        left = left[keep]
    return left


def _components(edges: list[tuple[int, int]]) -> dict[int, int]:
    """Node -> the number of its strongly connected component (Tarjan, 1972, without recursion)."""
    worse: dict[int, list[int]] = {}
    for a, b in edges:
        worse.setdefault(a, []).append(b)
        worse.setdefault(b, [])
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    number: dict[int, int] = {}
    stack: list[int] = []
    for start in worse:
        if start in index:
            continue
        path = [(start, iter(worse[start]))]
        index[start] = low[start] = len(index)
        stack.append(start)
        while path:
            node, following = path[-1]
            for other in following:
                if other not in index:
                    index[other] = low[other] = len(index)
                    stack.append(other)
                    path.append((other, iter(worse[other])))
                    break
                if other not in number:
                    low[node] = min(low[node], index[other])
            else:
                path.pop()
                if path:
                    low[path[-1][0]] = min(low[path[-1][0]], low[node])
                if low[node] == index[node]:
                    while node not in number:
                        number[stack.pop()] = index[node]
    return number
