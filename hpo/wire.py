"""JSON for what functions of `hpo.transactions` take and give: plain values, trials, dataclasses of ours, times.

Only the types that are entered here are read; nothing is evaluated.
"""

import dataclasses
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TypeVar

from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from optuna.trial import FrozenTrial, TrialState

KIND = "$kind"
"""In a JSON object: which type it stands for."""

Record = TypeVar("Record")
RECORDS: dict[str, type[Any]] = {}


def record(dataclass: type[Record]) -> type[Record]:
    """Let values of this dataclass be arguments and results."""
    RECORDS[dataclass.__name__] = dataclass
    return dataclass


def encode(value: Any) -> bytes:
    """A value as JSON.

    Raises:
        TypeError: It holds something that has no JSON.
    """
    return json.dumps(_plain(value)).encode()


def decode(message: bytes) -> Any:
    """The inverse of `encode`; sets become lists.

    Raises:
        ValueError: The message is not what `encode` writes.
    """
    return json.loads(message, object_hook=_value)


def _plain(value: Any) -> Any:
    match value:
        case TrialState():
            return {KIND: "state", "name": value.name}
        case datetime():
            return {KIND: "time", "iso": value.isoformat()}
        case BaseDistribution():
            return {KIND: "distribution", "json": distribution_to_json(value)}
        case FrozenTrial():
            fields = {name.removeprefix("_"): getattr(value, name) for name in TRIAL_FIELDS}
            times = {name: _in_utc(getattr(value, name)) for name in TRIAL_TIMES}
            return {KIND: "trial", "fields": _plain(fields), **times}
        case Mapping():
            pairs = [[_plain(key), _plain(one)] for key, one in value.items()]
            return {KIND: "mapping", "pairs": pairs}  # keys need not be text, and the text may be "$kind"
        case tuple():
            return {KIND: "tuple", "items": [_plain(one) for one in value]}
        case list() | set() | frozenset():
            return [_plain(one) for one in value]
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


def _value(document: dict[str, Any]) -> Any:
    match document:
        case {"$kind": "state", "name": name}:
            return TrialState[name]
        case {"$kind": "time", "iso": iso}:
            return datetime.fromisoformat(iso)
        case {"$kind": "distribution", "json": text}:
            return json_to_distribution(text)
        case {"$kind": "tuple", "items": items}:
            return tuple(items)
        case {"$kind": "mapping", "pairs": pairs}:
            return dict(pairs)
        case {"$kind": "trial", "fields": fields, **times}:
            return FrozenTrial(value=None, **fields, **{name: _in_local_time(times[name]) for name in TRIAL_TIMES})
        case {"$kind": "record", "name": name, "fields": fields} if name in RECORDS:
            return RECORDS[name](**fields)
    raise ValueError(f"not a value of this version of hpo: {str(document)[:100]}")
