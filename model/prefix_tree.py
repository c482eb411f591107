"""Which computation many length configs share: the tree of the token counts they keep, layer by layer.

Two configs that keep the same counts in a sequence's first layers compute the same vectors there. A node of the tree is
one such beginning for sequences of one length; its children are the counts that the next layer may keep.

Shape letters: P distinct lengths, C configs, N layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.length_config import LengthConfig

Ints = NDArray[np.int64]


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
    """Distinct beginnings of token counts.

    Attributes:
        levels: One more than there are layers.
        leaf: For each length and config, the node of the last level that it ends in; (P, C).
    """

    levels: tuple[Level, ...]
    leaf: Ints

    @classmethod
    def of(cls, configs: Sequence[LengthConfig], lengths_P: Ints, num_layers: int) -> "PrefixTree":
        """The tree of the first layers of these configs, at least one, over sequences of these distinct lengths."""
        counts_PCN = np.stack([config.count_table(lengths_P)[:, :num_layers] for config in configs], axis=1)
        node_PC = np.repeat(np.arange(len(lengths_P))[:, None], len(configs), axis=1)
        kept, parent = lengths_P, np.arange(len(lengths_P))
        stride = int(lengths_P.max(initial=0)) + 1
        levels = []
        for layer in range(counts_PCN.shape[2]):
            keys, inverse = np.unique(node_PC * stride + counts_PCN[:, :, layer], return_inverse=True)
            next_parent, next_kept = np.divmod(keys, stride)
            first_child = np.searchsorted(next_parent, np.arange(len(kept) + 1))
            drops = np.zeros(len(kept), dtype=np.bool_)
            drops[next_parent[next_kept < kept[next_parent]]] = True
            levels.append(Level(kept, parent, first_child, next_kept[first_child[1:] - 1], drops))
            kept, parent, node_PC = next_kept, next_parent, inverse.reshape(node_PC.shape)
        none = np.empty(0, dtype=np.int64)
        levels.append(Level(kept, parent, none, none, np.zeros(len(kept), dtype=np.bool_)))
        return cls(tuple(levels), node_PC)

    def root_of(self, depth: int) -> Ints:
        """The length, by its number, that each node of a level belongs to."""
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
