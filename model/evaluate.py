"""The evaluation engine: many length configs over one split in a single walk, with no wasted arithmetic.

Rows of tokens from sequences of any length are packed together, so nothing is padded: the row-wise parts of a layer do
not care whose token a row is, and attention runs over groups of sequences with equally many tokens. Three things are
shared or left out, none of which changes a result:

- Configs that keep the same counts in their first layers share the computation of those layers, and sequences that
  share nothing still share a batch: a chunk holds whatever (sequence, beginning) pairs come next in the depth-first
  walk of the tree of counts.
- What a token's feed-forward half and its next query, key and value are does not depend on which others are kept, so
  they are computed once for the most tokens that some config keeps there, and each config takes its rows.
- Where the head reads the first token, the last layer is computed for that one alone, and its count decides nothing.
- Where a config skips a layer, nothing is computed: its tokens go past it as they are.

A head that reads every token looks at each by itself. What it says of a token that a layer drops is therefore known
there already, from the vector that the token entered the layer with, and travels on with the sequence.

Memory holds a chunk and what became of it per layer, however many configs come at once.

Shape letters: C configs, N examples, R rows of a chunk, B sequences of a group, L tokens arriving, D hidden size, P
what a family's `project` makes of a token, T tokens of a chunk's sequences before any was dropped, V what the head says
of a token, X numbers of all answers.
"""

import itertools
import logging
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.encoded import Answers, EncodedSplit
from model.encoder import LengthAdaptiveModel, significance_order
from model.hardware import SurplusMemory, gains_from_bf16, is_out_of_memory, keep_freed_memory
from model.length_config import LengthConfig
from model.precision import Precision, snapshot
from model.prefix_tree import Ints, PrefixTree, paths_of
from model.prepacked import arrange
from model.tasks import Metric

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

ROWS_PER_CHUNK = 2048
"""Rows that go through a layer together; larger chunks leave the processor's cache and get slower."""
WORTH_A_CHUNK = 0.75
"""Fewer rows than this share of a chunk wait for more, as those of a single config do once it has dropped tokens."""
ROW_STEP = 64
"""Chunks are filled up to a multiple of this many rows: oneDNN builds a kernel for each number of rows it meets."""
CACHE_BYTES = 512 * 2**20
CACHED_LEVELS = 2
"""First layers whose results are kept for the next call; deeper ones recur too seldom."""
ANSWERS_PART = 8
"""One part in so many of the memory is for answers; an answer takes little, and saves a whole walk."""
ENTRY_BYTES = 256
"""About what it takes to keep anything, whatever its size."""
QUICKEST_FIRST: tuple[Precision, ...] = ("bf16", "mixed")
BF16_TOLERANCE = 0.002
"""Most that rounding to bf16 may move the full model's metric: 0.2 points."""


class Evaluator:
    """Scores length configs of one model over one split.

    It works on a snapshot of the weights, without dropout, and remembers from call to call, within a limit of memory,
    what became of sequences at the counts they were cut to, and hidden states of the first layers. The split is cut
    into blocks, random samples of near equal size and the same mix of lengths, so that a config can be given up before
    it has seen the whole split.

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
            precision: "bf16" and "mixed" are faster on processors that have bf16 products, see `model.precision`.
            num_blocks: Blocks to cut the split into; fewer where there are fewer examples.
            seed: Of the blocks.
            rows_per_chunk: Most rows of one chunk; a single longer sequence is a chunk of its own.
            cache_bytes: Memory for answers and hidden states that later calls may need; 0 for none. Hidden states are
                remembered where there is room for those of all examples after one layer: of fewer, each call would
                have to forget those that the next one begins with.
        """
        keep_freed_memory()
        self._surplus = SurplusMemory()
        self.model = model
        self.split = split
        self.precision: Precision = precision
        self.rows_computed = 0
        self._rows_per_chunk = rows_per_chunk
        self._answers = _Memory[Answers](cache_bytes // ANSWERS_PART, lambda answer: answer.nbytes + ENTRY_BYTES)
        states_bytes = cache_bytes - self._answers.limit
        has_room = int(split.num_tokens.sum()) * _row_bytes(model, precision) <= states_bytes
        self._states = _Memory[_Rows](states_bytes if has_room else 0, lambda made: made.nbytes)
        self._network = snapshot(model.network, precision)
        arrange(model.family, self._network, model.num_layers)
        self.blocks = stratified_blocks(split.num_tokens, num_blocks, seed)
        self._bundles = _cut_blocks(split, self.blocks, rows_per_chunk)

    def predict(
        self, configs: Sequence[LengthConfig], *, on_progress: Callable[[float], None] | None = None
    ) -> Answers:
        """What each config answers to each example, (C, X), in the split's order; see `EncodedSplit.answer`.

        Args:
            configs: Length configs of the model's number of layers; none give an array of no rows.
            on_progress: Called after each chunk that enters the first layer, with the share of the work done.
        Raises:
            ValueError: A config has another number of layers.
        """
        answers_CX = np.empty((len(configs), self.split.answer_starts[-1]), dtype=self.split.answer_type)
        for number, block in enumerate(self.blocks):

            def report(share: float, number: int = number) -> None:
                if on_progress is not None:
                    on_progress((number + share) / len(self.blocks))

            answers_CX[:, self.places_of(block)] = self.predict_block(number, configs, on_progress=report)
        return answers_CX

    def places_of(self, examples: Ints) -> Ints:
        """Where the answers to these examples stand among those to the whole split."""
        starts = self.split.answer_starts
        return _ranges(starts[examples], starts[examples + 1])[1]

    def predict_block(
        self, number: int, configs: Sequence[LengthConfig], *, on_progress: Callable[[float], None] | None = None
    ) -> Answers:
        """`predict` for the examples of `blocks[number]`, in the block's order."""
        for config in configs:
            if config.num_layers != self.model.num_layers:
                raise ValueError(f"A length config has {config.num_layers} layers, the model {self.model.num_layers}.")
        bundles = self._bundles[number]
        if not configs or not len(bundles.size):
            return np.empty((len(configs), len(self.places_of(self.blocks[number]))), dtype=self.split.answer_type)
        paths_PCM = paths_of(configs, bundles.lengths, self.model.reads_first)
        paths_QM, path_PC = np.unique(paths_PCM.reshape(-1, paths_PCM.shape[2]), axis=0, return_inverse=True)
        keys = [(number, path.tobytes()) for path in paths_QM]
        answers = {key: self._answers[key] for key in keys if key in self._answers}
        new = np.array([place for place, key in enumerate(keys) if key not in answers], dtype=np.int64)
        if len(new):
            walk = self._walk(number, PrefixTree.of(paths_QM[new]), on_progress)
            for place, answer in zip(new, walk.answers(), strict=True):
                answers[keys[place]] = answer
                self._answers.add(keys[place], answer)
        elif on_progress is not None:
            on_progress(1.0)
        columns = [
            np.stack([answers[keys[path]] for path in path_C]) for path_C in path_PC.reshape(paths_PCM.shape[:2])
        ]
        return np.concatenate(columns, axis=1)

    def _walk(self, number: int, tree: PrefixTree, on_progress: Callable[[float], None] | None) -> "_Walk":
        """Walk a block; where memory runs out, forget what is remembered and begin again with half the rows."""
        while True:
            try:
                with torch.inference_mode():
                    walk = _Walk(self, number, self._bundles[number], tree)
                    walk.run(on_progress)
                return walk
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or self._rows_per_chunk <= ROW_STEP:
                    raise
            self._rows_per_chunk //= 2
            self._states.clear()  # its keys tell bundles of another size
            self._bundles = _cut_blocks(self.split, self.blocks, self._rows_per_chunk)
            torch.cuda.empty_cache()
            logger.warning("Memory ran out: configs are scored %d rows at a time.", self._rows_per_chunk)


def _row_bytes(model: LengthAdaptiveModel, precision: Precision) -> int:
    """Memory of what one layer makes of a token for the next: its vector, query, key and value."""
    return model.shape.hidden_size * (4 + 3 * (2 if precision == "bf16" else 4))  # "mixed" begins in float32


def _cut_blocks(split: EncodedSplit, blocks: Sequence[Ints], rows_per_chunk: int) -> list["_Bundles"]:
    return [_Bundles.of(split.num_tokens, block, rows_per_chunk) for block in blocks]


def predict(
    model: LengthAdaptiveModel,
    split: EncodedSplit,
    configs: Sequence[LengthConfig],
    *,
    precision: Precision = "fp32",
    on_progress: Callable[[float], None] | None = None,
) -> Answers:
    """What each config answers to each example, (C, X); see `Evaluator.predict`."""
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
    answers_CX = predict(model, split, configs, precision=precision, on_progress=on_progress)
    return [split.quality(metric, answers_X) for answers_X in answers_CX]


def choose_precision(model: LengthAdaptiveModel, split: EncodedSplit, metric: Metric) -> Precision:
    """The quickest precision of this machine's that moves the full model's metric by 0.2 points at most.

    What rounding moves most is which tokens are kept where two received nearly the same attention, so that strongly
    shortened configs over few examples may move further.
    """
    if not gains_from_bf16():
        return "fp32"
    full = [LengthConfig.full(model.num_layers)]
    (exact,) = score(model, split, full, metric)
    for precision in QUICKEST_FIRST:
        if abs(exact - score(model, split, full, metric, precision=precision)[0]) <= BF16_TOLERANCE:
            return precision
    return "fp32"


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
class _Cells:
    """A bundle's sequences at one node of the tree make a cell; cells are packed row after row.

    Attributes:
        node: The node of each cell.
        bundle: The bundle of each cell.
        size: Sequences of each cell.
        rows: Rows of each of its sequences; ascending where they attend, so that equal ones stand together.
    """

    node: Ints
    bundle: Ints
    size: Ints
    rows: Ints

    def __getitem__(self, part: slice | NDArray[np.bool_] | Ints) -> "_Cells":
        return _Cells(self.node[part], self.bundle[part], self.size[part], self.rows[part])

    def starts(self) -> Ints:
        """The first row of each cell, and the end of the last."""
        return _starts(self.size * self.rows)


@dataclass(frozen=True)
class _Rows:
    """What the first layers made of the tokens of some cells; rows beyond the cells' own are fillers.

    Attributes:
        hidden_RD: Token vectors.
        projected_RP: Their query, key and value in the next layer, where it is computed; None where it is for none.
        position_R: Where each stood in its sequence.
        rank_R: Each row's place in its sequence by the attention it received in the last layer computed.
        said_TV: What the head says of the sequences' tokens that arrived at that layer or were dropped before, one
            cell's sequences after another's; None where it reads the first token alone.
    """

    hidden_RD: Tensor
    projected_RP: Tensor | None
    position_R: Ints
    rank_R: Ints
    said_TV: Tensor | None

    @property
    def nbytes(self) -> int:
        """Memory of all of it."""
        parts = (self.hidden_RD, self.projected_RP, self.position_R, self.rank_R, self.said_TV)
        return sum(part.nbytes for part in parts if part is not None)

    def take(self, rows: Ints, first_token: Ints, last_token: Ints) -> "_Rows":
        """Some rows, with fillers, and a copy of what is said of the tokens from each first to before each last."""
        said_TV = self.said_TV
        if said_TV is not None:
            tokens = _ranges(first_token, last_token)[1]
            said_TV = said_TV[torch.from_numpy(tokens).to(said_TV.device)]
        if len(self.hidden_RD) == _round_up(len(rows)) and np.array_equal(rows, np.arange(len(self.position_R))):
            return replace(self, said_TV=said_TV)
        return _Rows(
            _take(self.hidden_RD, rows),
            None if self.projected_RP is None else _take(self.projected_RP, rows),
            self.position_R[rows],
            self.rank_R[rows],
            said_TV,
        )

    def part(self, rows: slice, tokens: slice) -> "_Rows":
        """A copy of some rows, and of what is said of some tokens; a view would keep all the memory alive."""
        return _Rows(
            self.hidden_RD[rows].clone(),
            None if self.projected_RP is None else self.projected_RP[rows].clone(),
            self.position_R[rows].copy(),
            self.rank_R[rows].copy(),
            None if self.said_TV is None else self.said_TV[tokens].clone(),
        )


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
        self.cache = evaluator._states
        self.depth = len(tree.levels) - 1
        self.reads_first = evaluator.model.reads_first
        examples_of_length = np.bincount(bundles.of_length, weights=bundles.size).astype(np.int64)
        split = evaluator.split
        self.size_of_length = np.array([split.answer_size(length) for length in bundles.lengths.tolist()])
        self.length_of_root = np.searchsorted(bundles.lengths, tree.levels[0].kept)
        answer_sizes = (examples_of_length * self.size_of_length)[self.length_of_root[tree.root_of(self.depth)]]
        self.answer_of_leaf = _starts(answer_sizes)
        self.answer_X = np.empty(self.answer_of_leaf[-1], dtype=split.answer_type)
        self.first_of_length = _starts(examples_of_length)
        self.cached_levels = min(CACHED_LEVELS, self.depth - self.reads_first) if self.cache.limit else 0
        self.prefixes = [tree.prefixes(level) for level in range(self.cached_levels)]
        self.waiting: defaultdict[tuple[int, bool], list[tuple[_Cells, _Rows]]] = defaultdict(list)

    def run(self, on_progress: Callable[[float], None] | None) -> None:
        """Fill `answer_X`."""
        entries = self._entries()
        total = sum(len(cells.node) for _, cells, _ in entries)
        done = 0
        for depth, cells, made in entries:
            for part in _cut(cells.size * cells.rows, self.evaluator._rows_per_chunk):
                if made:
                    self._pass_on(depth, cells[part], _joined(made[part]), skipping=False)
                else:
                    self._expand(depth, cells[part], self._embed(cells[part]))
                done += part.stop - part.start
                self.evaluator._surplus.give_back()
                if on_progress is not None:
                    on_progress(done / total)
        for depth in range(self.depth + 1):  # those of a level may send some on to wait at the next
            for projected in (False, True):
                self._let_go(depth, projected)

    def answers(self) -> list[Answers]:
        """For each path of the tree, the answers to the block's examples of its length, in the block's order."""
        starts = self.answer_of_leaf
        return [self.answer_X[starts[leaf] : starts[leaf + 1]].copy() for leaf in self.tree.leaf]

    def _entries(self) -> list[tuple[int, _Cells, list[_Rows]]]:
        """Where the walk begins: at which level, in which cells, and with what is remembered of each, if anything.

        Sets, per cached level, for which (node, bundle) the walk computes the layer (`computed`), which it takes
        past it (`passed`), and either of both (`reached`).
        """
        self.computed: list[NDArray[np.bool_]] = []
        self.passed: list[NDArray[np.bool_]] = []
        self.reached: list[NDArray[np.bool_]] = []
        entries = []
        bundles = len(self.bundles.size)
        reached = np.ones((len(self.tree.levels[self.cached_levels].kept), bundles), dtype=np.bool_)
        for depth in reversed(range(self.cached_levels)):
            below = self.tree.levels[depth + 1]
            wanted, passed = np.zeros((2, len(self.tree.levels[depth].kept), bundles), dtype=np.bool_)
            np.logical_or.at(wanted, below.parent[~below.skipped], reached[~below.skipped])
            passed[below.parent[below.skipped]] = reached[below.skipped]
            cells = self._all_cells(depth)
            cells = cells[wanted[cells.node, cells.bundle]]
            keys = (self._key(depth, *cell) for cell in zip(cells.node, cells.bundle, strict=True))
            known = np.fromiter((key in self.cache for key in keys), dtype=np.bool_, count=len(cells.node))
            if known.any():
                found = cells[known]
                made = [self.cache[self._key(depth, *cell)] for cell in zip(found.node, found.bundle, strict=True)]
                entries.append((depth, found, made))
            lost = cells[~known]
            computed = np.zeros_like(wanted)
            computed[lost.node, lost.bundle] = True
            self.computed.insert(0, computed)
            self.passed.insert(0, passed)
            reached = computed | passed
            self.reached.insert(0, reached)
        cells = self._all_cells(0)
        cells = cells[reached[cells.node, cells.bundle]]
        if len(cells.node):
            entries.append((0, cells, []))
        return entries

    def _ways(self, depth: int, cells: _Cells) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """For which cells of a level the walk computes the next layer, and which it takes past it."""
        if depth < self.cached_levels:
            return self.computed[depth][cells.node, cells.bundle], self.passed[depth][cells.node, cells.bundle]
        level = self.tree.levels[depth]
        return level.most[cells.node] > 0, level.passes[cells.node]

    def _all_cells(self, depth: int) -> _Cells:
        """Every cell of a level, in an order in which they may attend."""
        by_length = [np.flatnonzero(self.bundles.of_length == number) for number in range(len(self.bundles.lengths))]
        bundles = [by_length[number] for number in self.length_of_root[self.tree.root_of(depth)]]
        node = np.repeat(np.arange(len(bundles)), [len(part) for part in bundles])
        return self._sorted(depth, node, np.concatenate(bundles))[0]

    def _sorted(self, depth: int, node: Ints, bundle: Ints) -> tuple[_Cells, Ints]:
        """Cells with those of equal counts together, and among them those that will drop tokens; and their order."""
        level = self.tree.levels[depth]
        order = np.lexsort((level.drops[node], level.kept[node]))
        node, bundle = node[order], bundle[order]
        return _Cells(node, bundle, self.bundles.size[bundle], level.kept[node]), order

    def _key(self, depth: int, node: int, bundle: int) -> tuple[int, ...]:
        return (self.block, int(bundle), *self.prefixes[depth][node])

    def _embed(self, cells: _Cells) -> _Rows:
        split, device = self.evaluator.split, self.model.device
        rows = [
            example
            for number in cells.bundle
            for example in self.bundles.examples[self.bundles.start[number] :][: self.bundles.size[number]]
        ]
        ids = np.concatenate([split.input_ids[example] for example in rows])
        types = np.concatenate([split.token_type_ids[example] for example in rows])
        positions = np.concatenate([np.arange(len(split.input_ids[example])) for example in rows])
        ids_1R, types_1R, positions_1R = (
            torch.from_numpy(part.astype(np.int64))[None].to(device) for part in (ids, types, positions)
        )
        hidden_RD = _fill(self.family.embed(self.network, ids_1R, types_1R, positions_1R)[0])
        said_TV = None if self.reads_first else self._read(hidden_RD)[: len(positions)]
        projected_RP = self._project(0, hidden_RD, self._rows_computed(0, cells))
        return _Rows(hidden_RD, projected_RP, positions, np.zeros_like(positions), said_TV)

    def _project(self, depth: int, hidden_RD: Tensor, asked_R: NDArray[np.bool_]) -> Tensor | None:
        """What a layer's attention needs of the rows that are asked for, among fillers; None where no row is."""
        if not asked_R.any():
            return None
        project = self.family.project_for_first if self._for_first_alone(depth) else self.family.project
        if asked_R.all():
            return project(self.network, depth, hidden_RD)
        rows = np.flatnonzero(asked_R)
        projected_RP = project(self.network, depth, _take(hidden_RD, rows))[: len(rows)]
        filled_RP = projected_RP.new_zeros(len(hidden_RD), projected_RP.size(1))
        filled_RP[torch.from_numpy(rows).to(filled_RP.device)] = projected_RP
        return filled_RP

    def _rows_computed(self, depth: int, cells: _Cells) -> NDArray[np.bool_]:
        """Which of the cells' rows go through a layer."""
        return np.repeat(self._ways(depth, cells)[0], cells.size * cells.rows)

    def _for_first_alone(self, depth: int) -> bool:
        """Whether a layer is computed for each sequence's first token alone."""
        return self.reads_first and depth == self.depth - 1

    def _read(self, hidden_RD: Tensor) -> Tensor:
        """What the head says of each token, float32 (R, V)."""
        return self.family.read_tokens(self.network, hidden_RD[None])[0].float()

    def _expand(self, depth: int, cells: _Cells, arriving: _Rows) -> None:
        """Go on from a level, for cells whose arriving tokens' vectors and projections are given."""
        if depth == self.depth:
            (self._answer_from_first if self.reads_first else self._answer_from_all)(cells, arriving)
            return
        computed, passed = self._ways(depth, cells)
        if passed.any():
            self._go_past(depth, cells[passed], self._only(cells, replace(arriving, projected_RP=None), passed))
        if computed.any():
            compute = self._compute_for_first if self._for_first_alone(depth) else self._compute
            compute(depth, cells[computed], self._only(cells, arriving, computed))

    def _go_past(self, depth: int, cells: _Cells, arriving: _Rows) -> None:
        """Skip a layer."""
        child = self.tree.levels[depth].first_child[cells.node]
        asked_R = self._rows_computed(depth + 1, _Cells(child, cells.bundle, cells.size, cells.rows))
        projected_RP = self._project(depth + 1, arriving.hidden_RD, asked_R)
        self._pass_on(depth, cells, replace(arriving, projected_RP=projected_RP), skipping=True)

    def _compute(self, depth: int, cells: _Cells, arriving: _Rows) -> None:
        """Compute a layer, and go on after it."""
        hidden_RD, position_R, said_TV = arriving.hidden_RD, arriving.position_R, arriving.said_TV
        assert arriving.projected_RP is not None
        context_RD, rank_R = self._mix(depth, cells, arriving.projected_RP, position_R)
        level, remembered = self.tree.levels[depth], depth < self.cached_levels
        most, asked = (cells.rows, cells.rows) if remembered else (level.most[cells.node], level.asked[cells.node])
        if said_TV is not None and depth and (remembered or level.drops[cells.node].any()):
            self._update(said_TV, cells, hidden_RD, position_R)
        cell, rows = _ranges(*_bounds(cells.starts()))
        kept = rank_R[rows] < most[cell]
        if not kept.all():
            cell = cell[kept]
            context_RD, hidden_RD = _take(context_RD, rows[kept]), _take(hidden_RD, rows[kept])
            rank_R, position_R = rank_R[rows[kept]], position_R[rows[kept]]
        attended_RD = self.family.merge(self.network, depth, context_RD, hidden_RD)
        passed_on_RD = self.family.feed_forward(self.network, depth, attended_RD)
        self.evaluator.rows_computed += len(passed_on_RD)
        asked_R = (rank_R < asked[cell]) & (depth + 1 < self.depth)
        projected_RP = self._project(depth + 1, passed_on_RD, asked_R)
        passed_on = _Rows(passed_on_RD, projected_RP, position_R, rank_R, said_TV)
        cells = _Cells(cells.node, cells.bundle, cells.size, most)
        if remembered:
            self._remember(depth, cells, passed_on)
        self._pass_on(depth, cells, passed_on, skipping=False)

    def _compute_for_first(self, depth: int, cells: _Cells, arriving: _Rows) -> None:
        """Compute the last layer for the first token of each sequence, and go on after it."""
        starts = cells.starts()
        cell, sequence = _ranges(np.zeros_like(cells.size), cells.size)
        hidden_BD = _take(arriving.hidden_RD, starts[cell] + sequence * cells.rows[cell])
        edges = np.flatnonzero(np.diff(cells.rows, prepend=-1, append=-1))
        contexts, done = [], 0
        assert arriving.projected_RP is not None
        for first, last in itertools.pairwise(edges):
            rows, length = slice(int(starts[first]), int(starts[last])), int(cells.rows[first])
            projected_BLP = _attending(arriving.projected_RP[rows], length)
            first_BD = hidden_BD[done : done + len(projected_BLP)]
            positions_BL = self._positions(arriving.position_R[rows], length)
            contexts.append(self.family.mix_first(self.network, depth, first_BD, projected_BLP, positions_BL))
            done += len(projected_BLP)
        context_BD = _fill(torch.cat(contexts))
        attended_BD = self.family.merge(self.network, depth, context_BD, hidden_BD)
        passed_on_BD = self.family.feed_forward(self.network, depth, attended_BD)
        self.evaluator.rows_computed += len(passed_on_BD)
        cells = _Cells(cells.node, cells.bundle, cells.size, np.ones_like(cells.rows))
        nothing = np.zeros_like(cell)
        self._pass_on(depth, cells, _Rows(passed_on_BD, None, nothing, nothing, None), skipping=False)

    def _only(self, cells: _Cells, rows: _Rows, chosen: NDArray[np.bool_]) -> _Rows:
        """The rows of some cells."""
        if chosen.all():
            return rows
        first, last = (bound[chosen] for bound in _bounds(cells.starts()))
        first_token, last_token = (bound[chosen] for bound in _bounds(self._origins(cells)))
        return rows.take(_ranges(first, last)[1], first_token, last_token)

    def _update(self, said_TV: Tensor, cells: _Cells, hidden_RD: Tensor, position_R: Ints) -> None:
        """Let the head read anew the tokens that are left, whose vectors are given."""
        starts = cells.starts()
        cell, rows = _ranges(*_bounds(starts))
        sequence = (rows - starts[cell]) // cells.rows[cell]
        origin_R = self._origins(cells)[cell] + sequence * self._lengths(cells)[cell] + position_R
        said_TV[torch.from_numpy(origin_R).to(said_TV.device)] = self._read(hidden_RD)[: len(origin_R)]

    def _lengths(self, cells: _Cells) -> Ints:
        """Tokens of each cell's sequences before any was dropped."""
        return self.bundles.lengths[self.bundles.of_length[cells.bundle]]

    def _origins(self, cells: _Cells) -> Ints:
        """Where each cell's sequences begin among the tokens before any was dropped, and the end of the last."""
        return _starts(cells.size * self._lengths(cells))

    def _mix(self, depth: int, cells: _Cells, projected_RP: Tensor, position_R: Ints) -> tuple[Tensor, Ints]:
        """Each row's context, and its rank in its sequence by attention received; 0 where none is dropped."""
        starts = cells.starts()
        context_RD = projected_RP.new_empty(len(projected_RP), self.model.shape.hidden_size)
        context_RD[starts[-1] :] = 0
        rank_R = np.zeros(starts[-1], dtype=np.int64)
        drops = self.tree.levels[depth].drops[cells.node] | (depth < self.cached_levels)
        edges = np.flatnonzero(np.diff(cells.rows * 2 + drops, prepend=-1, append=-1))
        for first, last in itertools.pairwise(edges):
            rows, length = slice(int(starts[first]), int(starts[last])), int(cells.rows[first])
            projected_BLP = _attending(projected_RP[rows], length)
            positions_BL = self._positions(position_R[rows], length)
            context_BLD, score_BL = self.family.mix(
                self.network, depth, projected_BLP, positions_BL, None, bool(drops[first])
            )
            context_RD[rows] = context_BLD.flatten(0, 1)
            if score_BL is not None:
                order_BL = significance_order(score_BL).cpu().numpy()
                rank_BL = np.empty_like(order_BL)
                np.put_along_axis(rank_BL, order_BL, np.arange(length)[None], axis=1)
                rank_R[rows] = rank_BL.reshape(-1)
        return context_RD, rank_R

    def _positions(self, position_R: Ints, length: int) -> Tensor:
        """Where the tokens of sequences of equal length stood, (B, L)."""
        return torch.from_numpy(position_R.reshape(-1, length)).to(self.model.device)

    def _pass_on(self, depth: int, cells: _Cells, passed_on: _Rows, skipping: bool) -> None:
        """Give each child its rows, and go on there.

        Args:
            depth: The level of the cells.
            cells: With as many rows as there are of each sequence.
            passed_on: What the layer made of them; as they arrived, where it is skipped.
            skipping: Whether the children are those for which the layer is skipped.
        """
        first_child = self.tree.levels[depth].first_child
        parent, node = _ranges(first_child[cells.node], first_child[cells.node + 1])
        wanted = self.tree.levels[depth + 1].skipped[node] == skipping
        if depth + 1 < self.cached_levels:
            wanted &= self.reached[depth + 1][node, cells.bundle[parent]]
        parent, node = parent[wanted], node[wanted]
        children, order = self._sorted(depth + 1, node, cells.bundle[parent])
        parent = parent[order]
        first, last = (bound[parent] for bound in _bounds(cells.starts()))
        first_token, last_token = (bound[parent] for bound in _bounds(self._origins(cells)))
        for part in _cut(children.size * children.rows, self.evaluator._rows_per_chunk):
            cell, rows = _ranges(first[part], last[part])
            rows = rows[passed_on.rank_R[rows] < children.rows[part][cell]]
            self._arrive(depth + 1, children[part], passed_on.take(rows, first_token[part], last_token[part]))

    def _arrive(self, depth: int, cells: _Cells, arriving: _Rows) -> None:
        """Go on from a level at once, or with what arrives there later where the rows are far from filling a chunk."""
        rows, most = len(arriving.position_R), self.evaluator._rows_per_chunk
        if rows >= WORTH_A_CHUNK * most:
            self._expand(depth, cells, arriving)
            return
        projected = arriving.projected_RP is not None
        waiting = self.waiting[depth, projected]
        rows += sum(len(others.position_R) for _, others in waiting)
        if rows > most:
            self._let_go(depth, projected)
        waiting.append((cells, arriving))
        if WORTH_A_CHUNK * most <= rows <= most:
            self._let_go(depth, projected)

    def _let_go(self, depth: int, projected: bool) -> None:
        """Go on from a level with the rows that wait there, all of them with projections or all without."""
        waiting = self.waiting[depth, projected]
        if not waiting:
            return
        cells, arriving = waiting[0]
        if len(waiting) > 1:
            node, bundle = (np.concatenate([getattr(part, name) for part, _ in waiting]) for name in ("node", "bundle"))
            cells, order = self._sorted(depth, node, bundle)
            in_turn = cells[np.argsort(order)]
            first, last = (bound[order] for bound in _bounds(in_turn.starts()))
            first_token, last_token = (bound[order] for bound in _bounds(self._origins(in_turn)))
            joined = _joined([rows for _, rows in waiting])
            arriving = joined.take(_ranges(first, last)[1], first_token, last_token)
        waiting.clear()
        self._expand(depth, cells, arriving)

    def _remember(self, depth: int, cells: _Cells, made: _Rows) -> None:
        origins = self._origins(cells)
        for cell, (first, last) in enumerate(itertools.pairwise(cells.starts())):
            copies = made.part(slice(int(first), int(last)), slice(int(origins[cell]), int(origins[cell + 1])))
            self.cache.add(self._key(depth, cells.node[cell], cells.bundle[cell]), copies)

    def _answer_from_first(self, cells: _Cells, last: _Rows) -> None:
        """What the head says of the first token of each sequence, which alone is left."""
        self._answer(cells, self.family.classify(self.network, last.hidden_RD[: cells.size.sum(), None]))

    def _answer_from_all(self, cells: _Cells, last: _Rows) -> None:
        """What the head says of every token, each after the last layer that it entered."""
        said_TV, origins, lengths = last.said_TV, self._origins(cells), self._lengths(cells)
        assert said_TV is not None
        self._update(said_TV, cells, last.hidden_RD, last.position_R)
        for length in np.unique(lengths):
            alike = np.flatnonzero(lengths == length)
            tokens = _ranges(origins[alike], origins[alike + 1])[1]
            logits_BLV = said_TV[torch.from_numpy(tokens).to(said_TV.device)].view(-1, int(length), said_TV.size(1))
            self._answer(cells[alike], logits_BLV)

    def _answer(self, cells: _Cells, logits: Tensor) -> None:
        """Note what the logits say of each sequence of the cells, whose answers are of one size."""
        cell, sequence = _ranges(np.zeros_like(cells.size), cells.size)
        examples = self.bundles.examples[self.bundles.start[cells.bundle][cell] + sequence]
        answers_BW = self.evaluator.split.answer(logits, examples)
        of_length = self.bundles.of_length[cells.bundle]
        before = self.bundles.start[cells.bundle] - self.first_of_length[of_length]
        size = answers_BW.shape[1]
        first_B = self.answer_of_leaf[cells.node][cell] + (before[cell] + sequence) * size
        self.answer_X[first_B[:, None] + np.arange(size)] = answers_BW


class _Memory(Generic[Value]):
    """What may be needed again, within a limit of bytes; the least recently used is forgotten first."""

    def __init__(self, limit: int, nbytes: Callable[[Value], int]) -> None:
        self.limit = limit
        self.held = 0
        self._nbytes = nbytes
        self._values: OrderedDict[Hashable, Value] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def __getitem__(self, key: Hashable) -> Value:
        self._values.move_to_end(key)
        return self._values[key]

    def add(self, key: Hashable, value: Value) -> None:
        """Keep a value, unless it is larger than all the memory."""
        if self._nbytes(value) > self.limit or key in self._values:
            return
        self._values[key] = value
        self.held += self._nbytes(value)
        while self.held > self.limit:
            self.held -= self._nbytes(self._values.popitem(last=False)[1])

    def clear(self) -> None:
        """Forget everything."""
        self._values.clear()
        self.held = 0


def _joined(parts: Sequence[_Rows]) -> _Rows:
    """The rows of all parts, without their fillers."""

    def joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(present) if present else None

    return _Rows(
        torch.cat([part.hidden_RD[: len(part.position_R)] for part in parts]),
        joined([None if part.projected_RP is None else part.projected_RP[: len(part.position_R)] for part in parts]),
        np.concatenate([part.position_R for part in parts]),
        np.concatenate([part.rank_R for part in parts]),
        joined([part.said_TV for part in parts]),
    )


def _attending(projected_RP: Tensor, length: int) -> Tensor:
    """The rows by sequences, (B, L, P); in float32 on a GPU, where attention computes in the type that it is given."""
    projected_RP = projected_RP if projected_RP.device.type == "cpu" else projected_RP.float()
    return projected_RP.view(-1, length, projected_RP.size(1))


def _starts(sizes: Ints) -> Ints:
    """Where consecutive parts of these sizes begin, and the end of the last."""
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def _bounds(starts: Ints) -> tuple[Ints, Ints]:
    return starts[:-1], starts[1:]


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


def _take(rows_RX: Tensor, numbers: Ints) -> Tensor:
    """The rows of these numbers, with fillers."""
    padded = np.zeros(_round_up(len(numbers)), dtype=np.int64)
    padded[: len(numbers)] = numbers
    return rows_RX.index_select(0, torch.from_numpy(padded).to(rows_RX.device))


def _fill(hidden_RD: Tensor) -> Tensor:
    """The rows with fillers up to a multiple of `ROW_STEP`."""
    return torch.nn.functional.pad(hidden_RD, (0, 0, 0, _round_up(len(hidden_RD)) - len(hidden_RD)))
