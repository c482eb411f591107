"""How many tokens each layer passes on: the `LengthConfig` and the counts it gives one sequence."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

MIN_TOKENS = 2  # the floor of Kim & Cho 2021: [CLS] and one more
ROUNDING_SLACK = 1e-9  # keeps ceil(0.55 * 0.8 * 100) at 44, not 45


@dataclass(frozen=True, kw_only=True)
class LengthConfig:
    """The tokens left after each layer, as shares of the sequence's own tokens or as absolute caps.

    Build one with `from_retention`, `from_shares`, `from_lengths` or `parse`. Exactly one of the two
    forms is set. Instances are immutable, hashable and compare by value.

    Attributes:
        shares: Cumulative share of the sequence's real tokens left after each layer, in (0, 1], never rising.
        caps: Most tokens left after each layer, whatever the sequence's length, never rising.
        max_length: Sequence length that `caps` were published for.
    Raises:
        ValueError: A share or cap is out of range or rises, or both or neither form is given.
    """

    shares: tuple[float, ...] | None = None
    caps: tuple[int, ...] | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        if (self.shares is None) == (self.caps is None):
            raise ValueError("A LengthConfig holds either shares or caps; give exactly one of them.")
        if self.shares is not None:
            _check_shares(self.shares)
            if self.max_length is not None:
                raise ValueError(f"max_length={self.max_length} goes with caps; shares fit every length.")
        else:
            _check_caps(self.caps or (), self.max_length)

    @classmethod
    def from_retention(cls, retention: Sequence[float]) -> "LengthConfig":
        """From each layer's share of the tokens *arriving* there, e.g. `(0.9, 0.9)` -> shares `(0.9, 0.81)`."""
        shares, share = [], 1.0
        for layer, kept in enumerate(retention):
            if not (_is_number(kept) and 0.0 < kept <= 1.0):
                raise ValueError(f"retention of layer {layer} is {kept!r}; choose a share in (0, 1].")
            share *= kept
            shares.append(share)
        return cls.from_shares(shares)

    @classmethod
    def from_shares(cls, shares: Sequence[float]) -> "LengthConfig":
        """From cumulative shares of the sequence's own tokens, never rising, e.g. `(0.9, 0.81)`."""
        return cls(shares=tuple(float(share) if _is_number(share) else share for share in shares))

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], max_length: int) -> "LengthConfig":
        """From published absolute lengths, e.g. `(269, 253, 252, 202, 104, 34)` at `max_length=384`."""
        return cls(caps=tuple(lengths), max_length=max_length)

    @classmethod
    def full(cls, num_layers: int) -> "LengthConfig":
        """Every token kept in each of `num_layers` layers."""
        return cls.from_shares((1.0,) * num_layers)

    @classmethod
    def parse(cls, text: str) -> "LengthConfig":
        """The inverse of `str`: `0.9,0.81,0.65` (shares) or `269,253,252,202,104,34@384` (caps).

        Raises:
            ValueError: The text is in neither form; the message shows both.
        """
        numbers, at, max_length = text.strip().strip("()").partition("@")
        try:
            if at:
                return cls.from_lengths(
                    [int(number) for number in numbers.strip().strip("()").split(",")], int(max_length)
                )
            return cls.from_shares([float(number) for number in numbers.split(",")])
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
        match fields:
            case {"shares": list(shares)} if len(fields) == 1:
                return cls.from_shares(shares)
            case {"lengths": list(lengths), "max_length": int(max_length)} if len(fields) == 2:
                return cls.from_lengths(lengths, max_length)
        raise ValueError(f'Cannot read length config {text!r}: expected {{"shares"}} or {{"lengths", "max_length"}}.')

    def to_json(self) -> str:
        """One JSON object: `{"shares": [...]}` or `{"lengths": [...], "max_length": ...}`."""
        fields: dict[str, Any] = (
            {"shares": self.shares}
            if self.shares is not None
            else {"lengths": self.caps, "max_length": self.max_length}
        )
        return json.dumps(fields)

    def __str__(self) -> str:
        if self.shares is not None:
            return ",".join(repr(share) for share in self.shares)
        return ",".join(str(cap) for cap in self.caps or ()) + f"@{self.max_length}"

    @property
    def num_layers(self) -> int:
        """Layers the config speaks of."""
        return len(self.shares if self.shares is not None else self.caps or ())

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
        caps_NL = np.broadcast_to(np.array(self.caps, dtype=np.int64), (len(num_tokens_N1), self.num_layers))
        return np.minimum(caps_NL, num_tokens_N1)


def counts_of_shares(shares: NDArray[np.floating[Any]], num_tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """Tokens left where a share of a sequence is kept: rounded up, at least 2 and at most all; arrays broadcast."""
    rounded_up = np.ceil(shares * num_tokens - ROUNDING_SLACK).astype(np.int64)
    counts: NDArray[np.int64] = np.minimum(np.maximum(rounded_up, MIN_TOKENS), num_tokens)
    return counts


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
    if not isinstance(max_length, int) or isinstance(max_length, bool):
        raise ValueError(f"max_length is {max_length!r}; choose a whole number from {MIN_TOKENS} up.")
    previous = max_length
    for layer, cap in enumerate(caps):
        if not isinstance(cap, int) or isinstance(cap, bool) or cap < MIN_TOKENS:
            raise ValueError(f"length of layer {layer} is {cap!r}; choose a whole number from {MIN_TOKENS} up.")
        if cap > previous:
            raise ValueError(f"length of layer {layer} rises from {previous} to {cap}; dropped tokens stay dropped.")
        previous = cap
