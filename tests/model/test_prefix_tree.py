"""The tree of kept counts against the sets of prefixes that a plain loop finds."""

import numpy as np
import pytest

from model.length_config import LengthConfig
from model.prefix_tree import PrefixTree, paths_of

LENGTHS = np.array([1, 2, 7, 19, 30])


def make_configs(count=15, layers=4):
    """Random configs, every other of which skips layers."""
    generator = np.random.default_rng(count)
    retentions = generator.choice([0.5, 0.8, 1.0], (count, layers))
    skips = generator.random((count, layers)) < 0.4
    skips[::2] = skips[:, 2] = False
    return [LengthConfig.from_retention(row, np.flatnonzero(skip)) for row, skip in zip(retentions, skips, strict=True)]


def path_of(config, num_tokens, reads_first=False):
    """The length, then what each layer keeps; 0 where it is skipped."""
    counts = [0 if layer in config.skipped else kept for layer, kept in enumerate(config.lengths(num_tokens))]
    if reads_first:
        counts[max(config.computed)] = 1
    return (num_tokens, *counts)


def make_tree(configs, reads_first=False):
    """The tree, and its leaf for each length and config."""
    paths = paths_of(configs, LENGTHS, reads_first)
    tree = PrefixTree.of(paths.reshape(-1, paths.shape[2]))
    return tree, tree.leaf.reshape(paths.shape[:2])


@pytest.mark.parametrize("reads_first", [False, True])
@pytest.mark.parametrize("layers", [3, 4])
def test_nodes_are_the_distinct_beginnings(layers, reads_first):
    configs = make_configs(layers=layers)
    tree, _ = make_tree(configs, reads_first)
    assert len(tree.levels) == layers + 1
    for depth in range(layers + 1):
        paths = {path_of(config, n, reads_first)[: depth + 1] for n in LENGTHS.tolist() for config in configs}
        found = tree.prefixes(depth)
        assert sorted(found) == sorted(paths)
        assert tree.levels[depth].kept.tolist() == [[count for count in path if count][-1] for path in found]
        assert [LENGTHS[root] for root in tree.root_of(depth)] == [path[0] for path in found]


def test_every_config_ends_in_the_leaf_of_its_counts():
    configs = make_configs()
    tree, leaf = make_tree(configs)
    leaves = tree.prefixes(4)
    for place, num_tokens in enumerate(LENGTHS.tolist()):
        for number, config in enumerate(configs):
            assert leaves[leaf[place, number]] == path_of(config, num_tokens)


def test_configs_that_differ_only_in_what_the_head_does_not_read_have_one_path():
    configs = [LengthConfig.from_retention((0.8, 0.5, kept, 0.9), skipped=(0, 3)) for kept in (0.2, 0.7)]
    first, second = paths_of(configs, LENGTHS, True).transpose(1, 0, 2)
    assert first.tolist() == second.tolist()
    first, second = paths_of(configs, LENGTHS, False).transpose(1, 0, 2)
    assert first.tolist() != second.tolist()


def test_a_node_knows_its_children():
    tree, _ = make_tree(make_configs())
    passing = 0
    for depth in range(4):
        level, below = tree.levels[depth], tree.levels[depth + 1]
        for node, kept in enumerate(level.kept):
            children = np.flatnonzero(below.parent == node)
            assert children.tolist() == list(range(level.first_child[node], level.first_child[node + 1]))
            computed = [child for child in children if not below.skipped[child]]
            assert level.most[node] == max((below.kept[child] for child in computed), default=0)
            going_on = [below.kept[child] for child in computed if below.most[child]]
            assert level.asked[node] == max(going_on, default=0)
            assert level.drops[node] == any(below.kept[child] < kept for child in computed)
            past = [child for child in children if below.skipped[child]]
            assert level.passes[node] == bool(past)
            assert past in ([], [level.first_child[node]])
            assert [below.kept[child] for child in past] == [kept] * len(past)
            passing += len(past)
    assert passing > 5, "some configs skip"
