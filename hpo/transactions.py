"""Functions that read and write a database in one transaction, wherever it is reached from.

`in_one_transaction` turns a function of a session into one of a storage. The storage decides how it is run: in a
session of its own, repeated while the database is away, or by a server of `hpo storage serve`, in one message.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from sqlalchemy.orm import Session

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

FUNCTIONS: dict[str, Callable[..., Any]] = {}
"""Functions of a session by their names; a server runs these and no others."""
READERS: set[str] = set()
"""Names of those that write nothing."""


class RunsTransactions(Protocol):
    """A storage that can run such a function."""

    def run_transaction(self, name: str, arguments: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """Run `FUNCTIONS[name]` in one transaction: all of what it writes is there afterwards, or none."""


def in_one_transaction(
    function: Callable[Concatenate[Session, Arguments], Result],
) -> Callable[Concatenate[RunsTransactions, Arguments], Result]:
    """Have the function's first argument be a storage.

    The function may be run again after its transaction was made, where the connection was lost in between: what it
    does twice must be the same as once. Arguments and result are of the types that `hpo.wire` can write.
    """
    FUNCTIONS[function.__name__] = function

    def run(storage: RunsTransactions, /, *arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        result: Result = storage.run_transaction(function.__name__, arguments, named)
        return result

    return functools.update_wrapper(run, function)


def reading(
    function: Callable[Concatenate[Session, Arguments], Result],
) -> Callable[Concatenate[RunsTransactions, Arguments], Result]:
    """`in_one_transaction` for a function that writes nothing, and so need not wait for those that write."""
    READERS.add(function.__name__)
    return in_one_transaction(function)
