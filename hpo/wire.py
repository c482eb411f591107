"""JSON for what functions of `hpo.transactions` take and give: plain values, trials, dataclasses of ours, times.

Only the types that are entered here are read; nothing is evaluated.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TypeVar

from optuna.distributions import (
    BaseDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
    json_to_distribution,
)
from optuna.trial import FrozenTrial, TrialState

KIND = "$kind"
"""In a JSON object: which type it stands for."""

Record = TypeVar("Record")
RECORDS: dict[str, type[Any]] = {}
PLAIN = frozenset({str, float, int, bool, type(None)})
"""Types that JSON has itself."""


def record(dataclass: type[Record]) -> type[Record]:
    """Let values of this dataclass be arguments and results."""
    RECORDS[dataclass.__name__] = dataclass
    return dataclass


def encode(value: Any) -> bytes:
    """A value as JSON.

    Raises:
        TypeError: It holds something that has no JSON.
    """
    return _json(value).encode()


def decode(message: bytes) -> Any:
    """The inverse of `encode`; sets become lists.

    Raises:
        ValueError: The message is not what `encode` writes.
    """
    return json.loads(message, object_hook=_value)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A value that was encoded once, to be an item of lists and tuples that are encoded later."""

    json: str

    @classmethod
    def of(cls, value: Any) -> "Encoded":
        """As `encode`."""
        return cls(_json(value))


def _json(value: Any) -> str:
    if isinstance(value, Encoded):
        return value.json
    if isinstance(value, tuple):
        return f'{{"{KIND}": "tuple", "items": {_json(list(value))}}}'
    if isinstance(value, list) and any(isinstance(one, Encoded | tuple) for one in value):
        return f"[{', '.join(map(_json, value))}]"
    return json.dumps(_plain(value))


def _plain(value: Any) -> Any:
    match value:
        case TrialState():
            return {KIND: "state", "name": value.name}
        case datetime():
            return {KIND: "time", "iso": value.isoformat()}
        case BaseDistribution():
            cached = isinstance(value, FloatDistribution | IntDistribution)  # equal choices may differ in type
            return {KIND: "distribution", "json": _text(value) if cached else distribution_to_json(value)}
        case FrozenTrial():
            fields = {name.removeprefix("_"): getattr(value, name) for name in TRIAL_FIELDS}
            times = {name: _in_utc(getattr(value, name)) for name in TRIAL_TIMES}
            return {KIND: "trial", "fields": _plain(fields), **times}
        case Mapping():
            if KIND not in value and all(type(key) is str for key in value):
                return {key: one if type(one) in PLAIN else _plain(one) for key, one in value.items()}
            pairs = [[_plain(key), _plain(one)] for key, one in value.items()]
            return {KIND: "mapping", "pairs": pairs}
        case tuple():
            return {KIND: "tuple", "items": [_plain(one) for one in value]}
        case list() | set() | frozenset():
            return [one if type(one) in PLAIN else _plain(one) for one in value]
    if dataclasses.is_dataclass(value) and type(value).__name__ in RECORDS:
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {KIND: "record", "name": type(value).__name__, "fields": _plain(fields)}
    return value


TRIAL_FIELDS = (
    "number",
    "_trial_id",
    "state",
    "values",
    "params",
    "distributions",
    "user_attrs",
    "system_attrs",
    "intermediate_values",
)
TRIAL_TIMES = ("datetime_start", "datetime_complete")
"""Local times without a zone; the other side may be in another one."""


def _in_utc(local: datetime | None) -> str | None:
    return None if local is None else local.astimezone(UTC).isoformat()


def _in_local_time(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text).astimezone().replace(tzinfo=None)


@functools.lru_cache(maxsize=1000)
def distribution_of(text: str) -> BaseDistribution:
    """The distribution of Optuna's JSON; many parameters share a few."""
    return json_to_distribution(text)


@functools.lru_cache(maxsize=1000)
def _text(distribution: BaseDistribution) -> str:
    return distribution_to_json(distribution)


def _value(document: dict[str, Any]) -> Any:
    if KIND not in document:
        return document
    match document:
        case {"$kind": "state", "name": name}:
            return TrialState[name]
        case {"$kind": "time", "iso": iso}:
            return datetime.fromisoformat(iso)
        case {"$kind": "distribution", "json": text}:
            return distribution_of(text)
        case {"$kind": "tuple", "items": items}:
            return tuple(items)
        case {"$kind": "mapping", "pairs": pairs}:
            return dict(pairs)
        case {"$kind": "trial", "fields": fields, **times}:
            fields |= {name: _in_local_time(times[name]) for name in TRIAL_TIMES}
            return FrozenTrial(value=None, **fields)
        case {"$kind": "record", "name": name, "fields": fields} if name in RECORDS:
            return RECORDS[name](**fields)
    raise ValueError(f"not a value of this version of hpo: {str(document)[:100]}")
