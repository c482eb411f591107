"""The tree of kept counts against the sets of prefixes that a plain loop finds."""

import numpy as np
import pytest

from model.length_config import LengthConfig
from model.prefix_tree import PrefixTree, paths_of

LENGTHS = np.array([1, 2, 7, 19, 30])


def make_configs(count=15, layers=4):
    generator = np.random.default_rng(count)
    return [LengthConfig.from_retention(row) for row in generator.choice([0.5, 0.8, 1.0], (count, layers))]


def make_tree(configs, layers):
    """The tree, and its leaf for each length and config."""
    paths = paths_of(configs, LENGTHS, layers)
    tree = PrefixTree.of(paths.reshape(-1, layers + 1))
    return tree, tree.leaf.reshape(paths.shape[:2])


@pytest.mark.parametrize("layers", [0, 1, 3, 4])
def test_nodes_are_the_distinct_beginnings(layers):
    configs = make_configs()
    tree, _ = make_tree(configs, layers)
    assert len(tree.levels) == layers + 1
    for depth in range(layers + 1):
        expected = {(n, *config.lengths(n)[:depth]) for n in LENGTHS.tolist() for config in configs}
        found = tree.prefixes(depth)
        assert sorted(found) == sorted(expected)
        assert tree.levels[depth].kept.tolist() == [prefix[-1] for prefix in found]
        assert [LENGTHS[root] for root in tree.root_of(depth)] == [prefix[0] for prefix in found]


def test_every_config_ends_in_the_leaf_of_its_counts():
    configs = make_configs()
    tree, leaf = make_tree(configs, 4)
    leaves = tree.prefixes(4)
    for place, num_tokens in enumerate(LENGTHS.tolist()):
        for number, config in enumerate(configs):
            assert leaves[leaf[place, number]] == (num_tokens, *config.lengths(num_tokens))


def test_a_node_knows_its_children_their_greatest_count_and_whether_one_drops():
    tree, _ = make_tree(make_configs(), 3)
    for depth in range(3):
        level, below = tree.levels[depth], tree.levels[depth + 1]
        for node in range(len(level.kept)):
            children = np.flatnonzero(below.parent == node)
            assert children.tolist() == list(range(level.first_child[node], level.first_child[node + 1]))
            assert level.most[node] == below.kept[children].max()
            assert level.drops[node] == (below.kept[children] < level.kept[node]).any()
