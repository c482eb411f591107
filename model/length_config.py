"""How many tokens each layer passes on: the `LengthConfig` and the counts it gives one sequence."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

MIN_TOKENS = 2  # the floor of Kim & Cho 2021: [CLS] and one more
SKIPPED = "-"
"""What stands for a skipped layer in a config that is written out."""
ROUNDING_SLACK = 1e-9  # keeps ceil(0.55 * 0.8 * 100) at 44, not 45


@dataclass(frozen=True, kw_only=True)
class LengthConfig:
    """The tokens left after each layer, as shares of the sequence's own tokens or as absolute caps.

    Build one with `from_retention`, `from_shares`, `from_lengths` or `parse`. Exactly one of the two
    forms is set. Instances are immutable, hashable and compare by value.

    A layer may be skipped altogether, as LayerDrop does in training: its input passes on unchanged, nothing is computed
    there and nothing dropped. So the share or cap of a skipped layer is that of the layer before, or of the whole
    sequence, and configs that do the same are equal.

    Attributes:
        shares: Cumulative share of the sequence's real tokens left after each layer, in (0, 1], never rising.
        caps: Most tokens left after each layer, whatever the sequence's length, never rising.
        max_length: Sequence length that `caps` were published for.
        skipped: Layers, from 0, that are not computed, ascending; at least one layer stays.
    Raises:
        ValueError: A share or cap is out of range or rises, both or neither form is given, or the skipped layers are
            impossible.
    """

    shares: tuple[float, ...] | None = None
    caps: tuple[int, ...] | None = None
    max_length: int | None = None
    skipped: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if (self.shares is None) == (self.caps is None):
            raise ValueError("A LengthConfig holds either shares or caps; give exactly one of them.")
        if self.shares is not None:
            _check_shares(self.shares)
            if self.max_length is not None:
                raise ValueError(f"max_length={self.max_length} goes with caps; shares fit every length.")
        else:
            _check_caps(self.caps or (), self.max_length)
        _check_skipped(self.skipped, self.num_layers)
        for layer in self.skipped:
            before, there = self._left_before(layer), (self.shares or self.caps or ())[layer]
            if there != before:
                raise ValueError(f"layer {layer} is skipped and leaves {there}, but {before} arrive; give it {before}.")

    @classmethod
    def from_retention(cls, retention: Sequence[float], skipped: Iterable[int] = ()) -> "LengthConfig":
        """From each layer's share of the tokens *arriving* there, e.g. `(0.9, 0.9)` -> shares `(0.9, 0.81)`.

        The retention of a skipped layer has no effect.
        """
        shares, share, left_out = [], 1.0, _ascending(skipped)
        for layer, kept in enumerate(retention):
            if not (_is_number(kept) and 0.0 < kept <= 1.0):
                raise ValueError(f"retention of layer {layer} is {kept!r}; choose a share in (0, 1].")
            share *= 1.0 if layer in left_out else kept
            shares.append(share)
        return cls.from_shares(shares, left_out)

    @classmethod
    def from_shares(cls, shares: Sequence[float], skipped: Iterable[int] = ()) -> "LengthConfig":
        """From cumulative shares of the sequence's own tokens, never rising, e.g. `(0.9, 0.81)`."""
        numbers = tuple(float(share) if _is_number(share) else share for share in shares)
        return cls(shares=numbers, skipped=_ascending(skipped))

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], max_length: int, skipped: Iterable[int] = ()) -> "LengthConfig":
        """From published absolute lengths, e.g. `(269, 253, 252, 202, 104, 34)` at `max_length=384`."""
        return cls(caps=tuple(lengths), max_length=max_length, skipped=_ascending(skipped))

    @classmethod
    def full(cls, num_layers: int, skipped: Iterable[int] = ()) -> "LengthConfig":
        """Every token kept in each of `num_layers` layers."""
        return cls.from_shares((1.0,) * num_layers, skipped)

    @classmethod
    def parse(cls, text: str) -> "LengthConfig":
        """The inverse of `str`: `0.9,0.81,0.65` (shares) or `269,253,252,202,104,34@384` (caps).

        A skipped layer is written as a hyphen: `0.9,-,0.65`.

        Raises:
            ValueError: The text is in neither form; the message shows both.
        """
        numbers, at, max_length = text.strip().strip("()").partition("@")
        entries = [entry.strip() for entry in numbers.strip().strip("()").split(",")]
        skipped = [layer for layer, entry in enumerate(entries) if entry == SKIPPED]
        try:
            if at:
                return cls.from_lengths(_filled(entries, int, int(max_length)), int(max_length), skipped)
            return cls.from_shares(_filled(entries, float, 1.0), skipped)
        except ValueError as error:
            forms = "shares as in '0.9,0.81,0.65' or lengths as in '269,253,252@384'"
            raise ValueError(f"Cannot read length config {text!r} ({error}); write {forms}.") from error

    @classmethod
    def from_json(cls, text: str) -> "LengthConfig":
        """The inverse of `to_json`."""
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"Cannot read length config {text!r}: {error}.") from error
        if not isinstance(fields, dict):
            raise ValueError(f"Cannot read length config {text!r}: expected a JSON object.")
        skipped = fields.pop("skipped", [])
        match fields:
            case {"shares": list(shares)} if len(fields) == 1 and isinstance(skipped, list):
                return cls.from_shares(shares, skipped)
            case {"lengths": list(lengths), "max_length": int(max_length)} if len(fields) == 2 and isinstance(
                skipped, list
            ):
                return cls.from_lengths(lengths, max_length, skipped)
        raise ValueError(f'Cannot read length config {text!r}: expected {{"shares"}} or {{"lengths", "max_length"}}.')

    def to_json(self) -> str:
        """One JSON object: `{"shares": [...]}` or `{"lengths": [...], "max_length": ...}`; with `"skipped"` if any."""
        fields: dict[str, Any] = (
            {"shares": self.shares}
            if self.shares is not None
            else {"lengths": self.caps, "max_length": self.max_length}
        )
        return json.dumps({**fields, "skipped": self.skipped} if self.skipped else fields)

    def __str__(self) -> str:
        left = self.shares if self.shares is not None else self.caps or ()
        text = ",".join(SKIPPED if layer in self.skipped else repr(number) for layer, number in enumerate(left))
        return text if self.caps is None else f"{text}@{self.max_length}"

    @property
    def num_layers(self) -> int:
        """Layers the config speaks of."""
        return len(self.shares if self.shares is not None else self.caps or ())

    @property
    def computed(self) -> tuple[int, ...]:
        """Layers that are not skipped."""
        return tuple(layer for layer in range(self.num_layers) if layer not in self.skipped)

    def lengths(self, num_tokens: int) -> tuple[int, ...]:
        """Tokens left after each layer for one sequence of `num_tokens` real tokens (at least 1)."""
        if num_tokens < 1:
            raise ValueError(f"num_tokens={num_tokens}; a sequence has at least 1 token.")
        return tuple(int(count) for count in self.count_table(np.array([num_tokens]))[0])

    def count_table(self, num_tokens_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens left for many sequences at once: one row per sequence, one column per layer."""
        num_tokens_N1 = np.asarray(num_tokens_N, dtype=np.int64)[:, None]
        if self.shares is not None:
            return counts_of_shares(np.array(self.shares), num_tokens_N1)
        counts_NL = np.minimum(np.array(self.caps, dtype=np.int64), num_tokens_N1)
        for layer in self.skipped:  # of sequences longer than `max_length` too, nothing is dropped there
            counts_NL[:, layer] = counts_NL[:, layer - 1] if layer else num_tokens_N1[:, 0]
        return counts_NL

    def _left_before(self, layer: int) -> float | int | None:
        """The share or cap of what arrives at a layer."""
        if layer:
            return (self.shares or self.caps or ())[layer - 1]
        return 1.0 if self.shares is not None else self.max_length


def counts_of_shares(shares: NDArray[np.floating[Any]], num_tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """Tokens left where a share of a sequence is kept: rounded up, at least 2 and at most all; arrays broadcast."""
    rounded_up = np.ceil(shares * num_tokens - ROUNDING_SLACK).astype(np.int64)
    counts: NDArray[np.int64] = np.minimum(np.maximum(rounded_up, MIN_TOKENS), num_tokens)
    return counts


def _ascending(layers: Iterable[Any]) -> tuple[int, ...]:
    """Layers in order, as Python's numbers; what is no layer stays as it is, to be refused."""
    given = tuple(int(layer) if isinstance(layer, np.integer) else layer for layer in layers)
    return tuple(sorted(given)) if all(map(_is_whole, given)) else given


def _filled(entries: Sequence[str], number: Callable[[str], Any], whole: Any) -> list[Any]:
    """The numbers of a written config, with what arrives there for each skipped layer."""
    numbers: list[Any] = []
    for entry in entries:
        numbers.append((numbers[-1] if numbers else whole) if entry == SKIPPED else number(entry))
    return numbers


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    """Whether `value` is a real number, of Python or NumPy; a JSON document may hold anything."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_shares(shares: tuple[float, ...]) -> None:
    if not shares:
        raise ValueError("A LengthConfig needs one share per layer, got none.")
    previous = 1.0
    for layer, share in enumerate(shares):
        if not (_is_number(share) and 0.0 < share <= 1.0):
            raise ValueError(f"share of layer {layer} is {share!r}; choose a share in (0, 1].")
        if share > previous:
            raise ValueError(f"share of layer {layer} rises from {previous} to {share}; dropped tokens stay dropped.")
        previous = share


def _check_caps(caps: tuple[int, ...], max_length: int | None) -> None:
    if not caps or max_length is None:
        raise ValueError("Absolute lengths need one length per layer and the max_length they were made for.")
    if not _is_whole(max_length):
        raise ValueError(f"max_length is {max_length!r}; choose a whole number from {MIN_TOKENS} up.")
    previous = max_length
    for layer, cap in enumerate(caps):
        if not _is_whole(cap) or cap < MIN_TOKENS:
            raise ValueError(f"length of layer {layer} is {cap!r}; choose a whole number from {MIN_TOKENS} up.")
        if cap > previous:
            raise ValueError(f"length of layer {layer} rises from {previous} to {cap}; dropped tokens stay dropped.")
        previous = cap


def _check_skipped(skipped: tuple[int, ...], num_layers: int) -> None:
    for layer in skipped:
        if not _is_whole(layer) or not 0 <= layer < num_layers:
            raise ValueError(f"skipped layer {layer!r} is none of the {num_layers}; choose from 0 to {num_layers - 1}.")
    if list(skipped) != sorted(set(skipped)):
        raise ValueError(f"skipped={list(skipped)}; name each layer once, in order.")
    if len(skipped) == num_layers:
        raise ValueError(f"all {num_layers} layers are skipped; let at least one stay.")
