"""The evaluation engine: many length configs over one split in a single walk, with no wasted arithmetic.

Rows of tokens from sequences of any length are packed together, so nothing is padded: the linear parts of a layer do
not care whose token a row is, and attention runs over groups of sequences with equally many tokens. Configs that keep
the same counts in their first layers share the computation of those layers, and sequences that share nothing still
share a batch: a chunk holds whatever (sequence, beginning) pairs come next in the depth-first walk of the tree.
Memory holds a chunk and its attended half per layer, however many configs come at once.

Shape letters: C configs, N examples, R rows of a chunk, B sequences of a group, L tokens arriving, D hidden size.
"""

import copy
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.data import EncodedSplit
from model.encoder import LengthAdaptiveModel, significance_order
from model.hardware import computes_in_bf16
from model.length_config import LengthConfig
from model.prefix_tree import Ints, PrefixTree
from model.tasks import Metric

Precision = Literal["fp32", "bf16"]

ROWS_PER_CHUNK = 2048
"""Rows that go through a layer together; larger chunks leave the processor's cache and get slower."""
ROW_STEP = 64
"""Chunks are filled up to a multiple of this many rows: oneDNN builds a kernel for each number of rows it meets."""
CACHE_BYTES = 512 * 2**20
CACHED_LEVELS = 2
"""Layers whose results are kept for the next call; deeper ones recur too seldom."""
BF16_TOLERANCE = 0.002
"""Most that bf16 may move the full model's metric: 0.2 points."""


class Evaluator:
    """Scores length configs of one model over one split.

    It works on a snapshot of the weights, without dropout, and remembers hidden states of the first layers from call to
    call, within a limit of memory. The split is cut into blocks, random samples of near equal size and the same mix of
    lengths, so that a config can be given up before it has seen the whole split.

    Attributes:
        model: The encoder; left as it was.
        split: Tokenised examples.
        precision: What the products are computed in.
        blocks: The example numbers of each block.
        rows_computed: Rows that went through a layer's feed-forward half so far, fillers included.
    """

    def __init__(
        self,
        model: LengthAdaptiveModel,
        split: EncodedSplit,
        *,
        precision: Precision = "fp32",
        num_blocks: int = 1,
        seed: int = 0,
        rows_per_chunk: int = ROWS_PER_CHUNK,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """Take the snapshot.

        Args:
            model: The encoder.
            split: Tokenised examples.
            precision: "bf16" halves memory and, on processors that have it, multiplies speed.
            num_blocks: Blocks to cut the split into; fewer where there are fewer examples.
            seed: Of the blocks.
            rows_per_chunk: Most rows of one chunk; a single longer sequence is a chunk of its own.
            cache_bytes: Memory for hidden states that later calls may need; 0 for none.
        """
        self.model = model
        self.split = split
        self.precision: Precision = precision
        self.rows_computed = 0
        self._rows_per_chunk = rows_per_chunk
        self._cache = _StateCache(cache_bytes)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self._network = copy.deepcopy(model.network).requires_grad_(False)
        torch.nn.Module.to(self._network, dtype=dtype)
        self._network.train(False)
        self.blocks = stratified_blocks(split.num_tokens, num_blocks, seed)
        self._bundles = [_Bundles.of(split.num_tokens, block, rows_per_chunk) for block in self.blocks]

    def predict(
        self, configs: Sequence[LengthConfig], *, on_progress: Callable[[float], None] | None = None
    ) -> NDArray[np.int64]:
        """The class that each config predicts for each example, as int64 (C, N).

        Args:
            configs: Length configs of the model's number of layers; none give an array of no rows.
            on_progress: Called after each chunk that enters the first layer, with the share of the work done.
        Raises:
            ValueError: A config has another number of layers.
        """
        predictions_CN = np.empty((len(configs), len(self.split.labels)), dtype=np.int64)
        for number, block in enumerate(self.blocks):

            def report(share: float, number: int = number) -> None:
                if on_progress is not None:
                    on_progress((number + share) / len(self.blocks))

            predictions_CN[:, block] = self.predict_block(number, configs, on_progress=report)
        return predictions_CN

    def predict_block(
        self, number: int, configs: Sequence[LengthConfig], *, on_progress: Callable[[float], None] | None = None
    ) -> NDArray[np.int64]:
        """`predict` for the examples of `blocks[number]`, in the block's order."""
        for config in configs:
            if config.num_layers != self.model.num_layers:
                raise ValueError(f"A length config has {config.num_layers} layers, the model {self.model.num_layers}.")
        bundles = self._bundles[number]
        if not configs or not len(bundles.size):
            return np.empty((len(configs), len(self.blocks[number])), dtype=np.int64)
        tree = PrefixTree.of(configs, bundles.lengths)
        with torch.inference_mode():
            walk = _Walk(self, number, bundles, tree)
            walk.run(on_progress)
        return walk.predictions()


def predict(
    model: LengthAdaptiveModel,
    split: EncodedSplit,
    configs: Sequence[LengthConfig],
    *,
    precision: Precision = "fp32",
    on_progress: Callable[[float], None] | None = None,
) -> NDArray[np.int64]:
    """The class that each config predicts for each example, as int64 (C, N); see `Evaluator.predict`."""
    return Evaluator(model, split, precision=precision, cache_bytes=0).predict(configs, on_progress=on_progress)


def score(
    model: LengthAdaptiveModel,
    split: EncodedSplit,
    configs: Sequence[LengthConfig],
    metric: Metric,
    *,
    precision: Precision = "fp32",
    on_progress: Callable[[float], None] | None = None,
) -> list[float]:
    """The metric of each config over the split."""
    predictions_CN = predict(model, split, configs, precision=precision, on_progress=on_progress)
    return [metric.compute(predictions_N, split.labels) for predictions_N in predictions_CN]


def choose_precision(model: LengthAdaptiveModel, split: EncodedSplit, metric: Metric) -> Precision:
    """bf16 where this machine computes in it and the full model's metric moves by at most 0.2 points, else fp32."""
    if not computes_in_bf16():
        return "fp32"
    full = [LengthConfig.full(model.num_layers)]
    exact, rounded = (score(model, split, full, metric, precision=precision)[0] for precision in ("fp32", "bf16"))
    return "bf16" if abs(exact - rounded) <= BF16_TOLERANCE else "fp32"


def stratified_blocks(num_tokens_N: Ints, num_blocks: int, seed: int) -> list[Ints]:
    """Cut a split into random samples of near equal size, each with short and long examples alike.

    Args:
        num_tokens_N: Length of each example.
        num_blocks: Samples; no more than there are examples.
        seed: Equal seeds give equal blocks.
    Returns:
        The example numbers of each block, ascending by length.
    """
    generator = np.random.default_rng(seed)
    by_length = np.lexsort((generator.random(len(num_tokens_N)), num_tokens_N))
    num_blocks = max(1, min(num_blocks, len(by_length)))
    strata = [by_length[start : start + num_blocks] for start in range(0, len(by_length), num_blocks)]
    block_of = np.concatenate([generator.permutation(num_blocks)[: len(stratum)] for stratum in strata] or [by_length])
    return [by_length[block_of == block] for block in range(num_blocks)]


@dataclass(frozen=True)
class _Bundles:
    """A block's examples, in bundles of one exact length that fit into a chunk.

    Attributes:
        examples: Example numbers, ascending by length.
        lengths: Distinct lengths.
        size: Examples of each bundle.
        start: Where each bundle begins in `examples`.
        of_length: The number of each bundle's length in `lengths`.
    """

    examples: Ints
    lengths: Ints
    size: Ints
    start: Ints
    of_length: Ints

    @classmethod
    def of(cls, num_tokens_N: Ints, examples: Ints, rows_per_chunk: int) -> "_Bundles":
        lengths, counts = np.unique(num_tokens_N[examples], return_counts=True)
        sizes, of_length = [], []
        for number, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            most = max(1, rows_per_chunk // int(length))
            pieces = [most] * (int(count) // most) + [int(count) % most] * (int(count) % most > 0)
            sizes += pieces
            of_length += [number] * len(pieces)
        size = np.array(sizes, dtype=np.int64)
        return cls(examples, lengths, size, np.cumsum(size) - size, np.array(of_length, dtype=np.int64))


@dataclass(frozen=True)
class _Chunk:
    """Cells packed row after row; a cell is a bundle's sequences at one node of the tree.

    Attributes:
        node: The node of each cell.
        bundle: The bundle of each cell.
        size: Sequences of each cell.
        kept: Tokens of each of its sequences; ascending, so that cells of equal counts stand together.
        hidden_RD: Token vectors; rows beyond the cells' own are fillers.
    """

    node: Ints
    bundle: Ints
    size: Ints
    kept: Ints
    hidden_RD: Tensor

    def starts(self) -> Ints:
        """The first row of each cell, and the end of the last."""
        return _starts(self.size * self.kept)


class _Walk:
    """One depth-first walk of a block through a tree of counts."""

    def __init__(self, evaluator: Evaluator, block: int, bundles: _Bundles, tree: PrefixTree) -> None:
        self.evaluator = evaluator
        self.block = block
        self.bundles = bundles
        self.tree = tree
        self.model = evaluator.model
        self.family = evaluator.model.family
        self.network = evaluator._network
        self.cache = evaluator._cache
        leaves = tree.levels[-1]
        length_of_leaf = np.arange(len(leaves.kept))
        for level in reversed(tree.levels):
            length_of_leaf = level.parent[length_of_leaf]
        examples_of_length = np.bincount(bundles.of_length, weights=bundles.size).astype(np.int64)
        self.place_of_leaf = _starts(examples_of_length[length_of_leaf])
        self.class_of_place = np.empty(self.place_of_leaf[-1], dtype=np.int64)
        self.first_of_length = _starts(examples_of_length)
        depth = CACHED_LEVELS if self.cache.limit else 0
        self.prefixes = [tree.prefixes(level) for level in range(min(depth, self.model.num_layers - 1) + 1)]

    def run(self, on_progress: Callable[[float], None] | None) -> None:
        """Fill `class_of_place`."""
        entries = self._entries()
        total = sum(int((size * kept).sum()) for _, _, _, size, kept, _ in entries)
        done = 0
        for depth, node, bundle, size, kept, states in entries:
            for part in _cut(size * kept, self.evaluator._rows_per_chunk):
                hidden = (
                    self._embed(bundle[part])
                    if states is None
                    else _fill(torch.cat([states[cell] for cell in range(part.start, part.stop)]))
                )
                self._descend(depth, _Chunk(node[part], bundle[part], size[part], kept[part], hidden))
                done += int((size[part] * kept[part]).sum())
                if on_progress is not None:
                    on_progress(done / total)

    def predictions(self) -> NDArray[np.int64]:
        """The classes by config and example, (C, N) in the block's order."""
        columns = [
            self.class_of_place[self.place_of_leaf[leaf_C][:, None] + np.arange(last - first)]
            for leaf_C, first, last in zip(
                self.tree.leaf, self.first_of_length[:-1], self.first_of_length[1:], strict=True
            )
        ]
        return np.concatenate(columns, axis=1)

    def _entries(self) -> "list[tuple[int, Ints, Ints, Ints, Ints, list[Tensor] | None]]":
        """Where the walk begins: cells at level 0, and those of later levels whose vectors are remembered.

        Sets `missing`: per level, which (node, bundle) the walk has to compute.
        """
        levels = len(self.prefixes)
        cells = [self._cells(depth) for depth in range(levels)]
        known = [
            np.array([self._key(depth, n, b) in self.cache for n, b in zip(*cells[depth], strict=True)], dtype=np.bool_)
            if depth
            else np.zeros(len(cells[0][0]), dtype=np.bool_)
            for depth in range(levels)
        ]
        self.missing: list[NDArray[np.bool_]] = []
        needed = np.ones(len(cells[-1][0]), dtype=np.bool_)
        entries = []
        for depth in reversed(range(levels)):
            node, bundle = cells[depth]
            lookup = np.zeros((len(self.tree.levels[depth].kept), len(self.bundles.size)), dtype=np.bool_)
            lookup[node, bundle] = needed & ~known[depth]
            self.missing.insert(0, lookup)
            here = needed if not depth else needed & known[depth]
            if here.any():
                entries.append((depth, node[here], bundle[here]))
            if depth:
                above_node, above_bundle = cells[depth - 1]
                wanted = np.zeros((len(self.tree.levels[depth - 1].kept), len(self.bundles.size)), dtype=np.bool_)
                lost_node, lost_bundle = np.nonzero(lookup)
                wanted[self.tree.levels[depth].parent[lost_node], lost_bundle] = True
                needed = wanted[above_node, above_bundle]
        ready = []
        for depth, node, bundle in entries:
            order = self._order(depth, node)
            node, bundle = node[order], bundle[order]
            states = [self.cache[self._key(depth, n, b)] for n, b in zip(node, bundle, strict=True)] if depth else None
            ready.append((depth, node, bundle, self.bundles.size[bundle], self.tree.levels[depth].kept[node], states))
        return ready

    def _cells(self, depth: int) -> tuple[Ints, Ints]:
        """Every (node, bundle) of a level."""
        length = np.arange(len(self.tree.levels[depth].kept))
        for level in reversed(self.tree.levels[: depth + 1]):
            length = level.parent[length]
        by_length = [np.flatnonzero(self.bundles.of_length == number) for number in range(len(self.bundles.lengths))]
        bundle = [by_length[number] for number in length]
        return np.repeat(np.arange(len(length)), [len(part) for part in bundle]), np.concatenate(bundle)

    def _key(self, depth: int, node: int, bundle: int) -> tuple[int, ...]:
        return (self.block, int(bundle), *self.prefixes[depth][node])

    def _order(self, depth: int, node: Ints) -> Ints:
        """Cells of equal counts together, and among them those that will drop tokens."""
        level = self.tree.levels[depth]
        return np.lexsort((level.drops[node], level.kept[node]))

    def _descend(self, depth: int, chunk: _Chunk) -> None:
        if depth == self.model.num_layers:
            self._classify(chunk)
            return
        attended_RD, rank_R = self._attend(depth, chunk)
        for child in self._children(depth, chunk, attended_RD, rank_R):
            self._descend(depth + 1, child)

    def _embed(self, bundle: Ints) -> Tensor:
        split, device = self.evaluator.split, self.model.device
        rows = [
            example
            for number in bundle
            for example in self.bundles.examples[self.bundles.start[number] :][: self.bundles.size[number]]
        ]
        ids = np.concatenate([split.input_ids[example] for example in rows])
        types = np.concatenate([split.token_type_ids[example] for example in rows])
        positions = np.concatenate([np.arange(len(split.input_ids[example])) for example in rows])
        ids_1R, types_1R, positions_1R = (
            torch.from_numpy(part.astype(np.int64))[None].to(device) for part in (ids, types, positions)
        )
        return _fill(self.family.embed(self.network, ids_1R, types_1R, positions_1R)[0])

    def _attend(self, depth: int, chunk: _Chunk) -> tuple[Tensor, Ints]:
        """The attended rows, and each row's rank in its sequence by attention received; 0 where none is dropped."""
        projected_RP = self.family.project(self.network, depth, chunk.hidden_RD)
        context_RD = torch.empty_like(chunk.hidden_RD)
        starts = chunk.starts()
        context_RD[starts[-1] :] = 0
        rank_R = np.zeros(starts[-1], dtype=np.int64)
        drops = self.tree.levels[depth].drops[chunk.node]
        edges = np.flatnonzero(np.diff(chunk.kept * 2 + drops, prepend=-1, append=-1))
        for first, last in itertools.pairwise(edges):
            rows, length = slice(int(starts[first]), int(starts[last])), int(chunk.kept[first])
            projected_BLP = projected_RP[rows].view(-1, length, projected_RP.size(1))
            context_BLD, score_BL = self.family.mix(self.network, depth, projected_BLP, None, bool(drops[first]))
            context_RD[rows] = context_BLD.flatten(0, 1)
            if score_BL is not None:
                order_BL = significance_order(score_BL).cpu().numpy()
                rank_BL = np.empty_like(order_BL)
                np.put_along_axis(rank_BL, order_BL, np.arange(length)[None], axis=1)
                rank_R[rows] = rank_BL.reshape(-1)
        return self.family.merge(self.network, depth, context_RD, chunk.hidden_RD), rank_R

    def _children(self, depth: int, chunk: _Chunk, attended_RD: Tensor, rank_R: Ints) -> Iterator[_Chunk]:
        """What the feed-forward half passes on of a chunk, once for each count that some config keeps."""
        first_child = self.tree.levels[depth].first_child
        parent, node = _ranges(first_child[chunk.node], first_child[chunk.node + 1])
        if depth + 1 < len(self.missing):
            wanted = self.missing[depth + 1][node, chunk.bundle[parent]]
            parent, node = parent[wanted], node[wanted]
        order = self._order(depth + 1, node)
        parent, node = parent[order], node[order]
        bundle, size, kept = chunk.bundle[parent], chunk.size[parent], self.tree.levels[depth + 1].kept[node]
        starts = chunk.starts()
        for part in _cut(size * kept, self.evaluator._rows_per_chunk):
            cell, rows = _ranges(starts[parent[part]], starts[parent[part] + 1])
            rows = rows[rank_R[rows] < kept[part][cell]]
            padded = np.zeros(_round_up(len(rows)), dtype=np.int64)
            padded[: len(rows)] = rows
            index_R = torch.from_numpy(padded).to(attended_RD.device)
            hidden_RD = self.family.feed_forward(self.network, depth, attended_RD.index_select(0, index_R))
            self.evaluator.rows_computed += len(padded)
            child = _Chunk(node[part], bundle[part], size[part], kept[part], hidden_RD)
            if depth + 1 < len(self.prefixes):
                self._remember(depth + 1, child)
            yield child

    def _remember(self, depth: int, chunk: _Chunk) -> None:
        starts = chunk.starts()
        for cell, (node, bundle) in enumerate(zip(chunk.node, chunk.bundle, strict=True)):
            self.cache[self._key(depth, node, bundle)] = chunk.hidden_RD[starts[cell] : starts[cell + 1]]

    def _classify(self, chunk: _Chunk) -> None:
        cell, sequence = _ranges(np.zeros_like(chunk.size), chunk.size)
        first_rows = chunk.starts()[cell] + sequence * chunk.kept[cell]
        index_B = torch.from_numpy(first_rows).to(chunk.hidden_RD.device)
        logits_BC = self.family.classify(self.network, chunk.hidden_RD.index_select(0, index_B)[:, None])
        of_length = self.bundles.of_length[chunk.bundle]
        before = self.bundles.start[chunk.bundle] - self.first_of_length[of_length]
        places = (self.place_of_leaf[chunk.node] + before)[cell] + sequence
        self.class_of_place[places] = logits_BC.argmax(dim=1).cpu().numpy()


class _StateCache:
    """Hidden states of cells, the least recently used forgotten first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self._states: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()

    def __contains__(self, key: tuple[int, ...]) -> bool:
        return key in self._states

    def __getitem__(self, key: tuple[int, ...]) -> Tensor:
        self._states.move_to_end(key)
        return self._states[key]

    def __setitem__(self, key: tuple[int, ...], state: Tensor) -> None:
        if state.nbytes > self.limit or key in self._states:
            return
        self._states[key] = state.clone()  # a view would keep its whole chunk alive
        self.held += state.nbytes
        while self.held > self.limit:
            self.held -= self._states.popitem(last=False)[1].nbytes


def _starts(sizes: Ints) -> Ints:
    """Where consecutive parts of these sizes begin, and the end of the last."""
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def _ranges(first: Ints, last: Ints) -> tuple[Ints, Ints]:
    """All numbers of each range `first .. last - 1`, one range after the other, and the range that each is from."""
    sizes = last - first
    of_range = np.repeat(np.arange(len(sizes)), sizes)
    return of_range, np.arange(len(of_range)) - (_starts(sizes)[:-1] - first)[of_range]


def _cut(rows: Ints, most: int) -> Iterator[slice]:
    """Consecutive cells in parts of about equally many rows, about `most` at the most."""
    ends = np.cumsum(rows)
    if not len(ends):
        return
    parts = -(-int(ends[-1]) // most)
    edges = np.searchsorted(ends - rows / 2, ends[-1] * np.arange(1, parts) / parts)
    edges = np.unique(np.concatenate([[0], edges, [len(rows)]]))
    for first, last in itertools.pairwise(edges):
        yield slice(int(first), int(last))


def _round_up(rows: int) -> int:
    return -(-rows // ROW_STEP) * ROW_STEP


def _fill(hidden_RD: Tensor) -> Tensor:
    """The rows with fillers up to a multiple of `ROW_STEP`."""
    return torch.nn.functional.pad(hidden_RD, (0, 0, 0, _round_up(len(hidden_RD)) - len(hidden_RD)))
