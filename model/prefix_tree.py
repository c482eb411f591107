"""Which computation many length configs share: the tree of the token counts they keep, layer by layer.

What a config does to a sequence is a path: the sequence's length and the counts that its layers keep of it. Two paths
that begin alike compute the same vectors there. A node of the tree is one such beginning; its children are the counts
that the next layer may keep.

Shape letters: P distinct lengths, C configs, Q paths, N layers, M = N + 1 entries of a path.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.length_config import LengthConfig

Ints = NDArray[np.int64]


def paths_of(configs: Sequence[LengthConfig], lengths_P: Ints, num_layers: int) -> Ints:
    """The paths of these lengths through the first layers of these configs, at least one, as (P, C, M)."""
    counts_PCN = np.stack([config.count_table(lengths_P)[:, :num_layers] for config in configs], axis=1)
    lengths_PC1 = np.broadcast_to(lengths_P[:, None, None], (*counts_PCN.shape[:2], 1))
    paths_PCM: Ints = np.concatenate([lengths_PC1, counts_PCN], axis=2)
    return paths_PCM


@dataclass(frozen=True)
class Level:
    """The nodes after so many layers; level 0 has one node per distinct length, where nothing was computed yet.

    Attributes:
        kept: Tokens of a sequence at each node.
        parent: Each node's parent in the level before; nodes are sorted by it.
        first_child: Where each node's children begin in the next level, one entry more than there are nodes; no
            entries in the last level.
        most: The greatest count of each node's children.
        drops: Whether some child of a node keeps fewer tokens than arrive.
    """

    kept: Ints
    parent: Ints
    first_child: Ints
    most: Ints
    drops: NDArray[np.bool_]


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
        kept, node_Q = np.unique(paths_QM[:, 0], return_inverse=True)
        parent = np.arange(len(kept))
        stride = int(kept.max(initial=0)) + 1
        levels = []
        for layer in range(1, paths_QM.shape[1]):
            keys, next_node_Q = np.unique(node_Q * stride + paths_QM[:, layer], return_inverse=True)
            next_parent, next_kept = np.divmod(keys, stride)
            first_child = np.searchsorted(next_parent, np.arange(len(kept) + 1))
            drops = np.zeros(len(kept), dtype=np.bool_)
            drops[next_parent[next_kept < kept[next_parent]]] = True
            levels.append(Level(kept, parent, first_child, next_kept[first_child[1:] - 1], drops))
            kept, parent, node_Q = next_kept, next_parent, next_node_Q
        none = np.empty(0, dtype=np.int64)
        levels.append(Level(kept, parent, none, none, np.zeros(len(kept), dtype=np.bool_)))
        return cls(tuple(levels), node_Q)

    def root_of(self, depth: int) -> Ints:
        """The node of the first level that each node of a level descends from."""
        root = np.arange(len(self.levels[depth].kept))
        for level in reversed(self.levels[: depth + 1]):
            root = level.parent[root]
        return root

    def prefixes(self, depth: int) -> list[tuple[int, ...]]:
        """The length and the counts that lead to each node of a level, which name it in any tree."""
        if depth == 0:
            return [(int(kept),) for kept in self.levels[0].kept]
        above = self.prefixes(depth - 1)
        level = self.levels[depth]
        return [(*above[parent], int(kept)) for parent, kept in zip(level.parent, level.kept, strict=True)]
