"""Which computation many length configs share: the tree of the token counts they keep, layer by layer.

What a config does to a sequence is a path: the sequence's length and, layer by layer, the count that is kept of it, or
`SKIP` where the layer is skipped. Two paths that begin alike compute the same vectors there. A node of the tree is one
such beginning; its children are the counts that the next layer may keep, and the node itself going past that layer.

Shape letters: P distinct lengths, C configs, Q paths, N layers, M = N + 1 entries of a path.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.length_config import LengthConfig

Ints = NDArray[np.int64]


SKIP = 0
"""The entry of a skipped layer in a path; a layer that is computed keeps at least one token."""


def paths_of(configs: Sequence[LengthConfig], lengths_P: Ints, reads_first: bool) -> Ints:
    """The paths of these lengths through these configs, at least one, as (P, C, M).

    Args:
        configs: Of one number of layers.
        lengths_P: Distinct lengths.
        reads_first: Whether the head reads the first token alone: the last layer that is computed then keeps that one,
            whatever its share, so that configs that differ only there have the same path.
    """
    counts_PCN = np.stack([config.count_table(lengths_P) for config in configs], axis=1)
    for number, config in enumerate(configs):
        if reads_first:
            counts_PCN[:, number, config.computed[-1]] = 1
        counts_PCN[:, number, list(config.skipped)] = SKIP
    lengths_PC1 = np.broadcast_to(lengths_P[:, None, None], (*counts_PCN.shape[:2], 1))
    paths_PCM: Ints = np.concatenate([lengths_PC1, counts_PCN], axis=2)
    return paths_PCM


@dataclass(frozen=True)
class Level:
    """The nodes after so many layers; level 0 has one node per distinct length, where nothing was computed yet.

    Attributes:
        kept: Tokens of a sequence at each node.
        entry: The entry of the path that leads to each node: the same, or `SKIP`.
        parent: Each node's parent in the level before; nodes are sorted by it, and among siblings by entry.
        first_child: Where each node's children begin in the next level, one entry more than there are nodes; no
            entries in the last level.
        most: The greatest count that the next layer keeps of each node, 0 where nobody computes it.
        drops: Whether it keeps fewer tokens for some child than arrive.
        asked: The same as `most`, but of those children only for which the layer after it is computed too.
        passes: Whether the next layer is skipped for some child, which is then the first.
    """

    kept: Ints
    entry: Ints
    parent: Ints
    first_child: Ints
    most: Ints
    drops: NDArray[np.bool_]
    asked: Ints
    passes: NDArray[np.bool_]

    @property
    def skipped(self) -> NDArray[np.bool_]:
        """Whether each node is its parent, gone past a layer."""
        skipped: NDArray[np.bool_] = self.entry == SKIP
        return skipped


@dataclass(frozen=True)
class PrefixTree:
    """Distinct beginnings of paths.

    Attributes:
        levels: One more than there are layers.
        leaf: The node of the last level that each path ends in, (Q,).
    """

    levels: tuple[Level, ...]
    leaf: Ints

    @classmethod
    def of(cls, paths_QM: Ints) -> "PrefixTree":
        """The tree of these paths, in any order and any number of times."""
        stride = int(paths_QM.max(initial=0)) + 1
        kept, node_Q = np.unique(paths_QM[:, 0], return_inverse=True)
        entries, parents, kepts = [kept], [np.arange(len(kept))], [kept]
        for layer in range(1, paths_QM.shape[1]):
            keys, node_Q = np.unique(node_Q * stride + paths_QM[:, layer], return_inverse=True)
            parent, entry = np.divmod(keys, stride)
            entries.append(entry)
            parents.append(parent)
            kepts.append(np.where(entry == SKIP, kepts[-1][parent], entry))
        levels: list[Level] = []
        for depth in reversed(range(len(kepts))):
            kept = kepts[depth]
            first_child, most, asked = np.empty(0, dtype=np.int64), np.zeros_like(kept), np.zeros_like(kept)
            drops, passes = np.zeros((2, len(kept)), dtype=np.bool_)
            if levels:
                below = levels[0]
                first_child = np.searchsorted(below.parent, np.arange(len(kept) + 1))
                most = np.maximum.reduceat(below.entry, first_child[:-1])
                asked = np.maximum.reduceat(np.where(below.most > 0, below.entry, SKIP), first_child[:-1])
                drops[below.parent[~below.skipped & (below.kept < kept[below.parent])]] = True
                passes = below.skipped[first_child[:-1]]
            levels.insert(0, Level(kept, entries[depth], parents[depth], first_child, most, drops, asked, passes))
        return cls(tuple(levels), node_Q)

    def root_of(self, depth: int) -> Ints:
        """The node of the first level that each node of a level descends from."""
        root = np.arange(len(self.levels[depth].kept))
        for level in reversed(self.levels[: depth + 1]):
            root = level.parent[root]
        return root

    def prefixes(self, depth: int) -> list[tuple[int, ...]]:
        """The entries that lead to each node of a level, which name it in any tree."""
        if depth == 0:
            return [(int(entry),) for entry in self.levels[0].entry]
        above = self.prefixes(depth - 1)
        level = self.levels[depth]
        return [(*above[parent], int(entry)) for parent, entry in zip(level.parent, level.entry, strict=True)]
