"""The client of `hpo storage serve`: a study's database reached through a server, as grpc://host:port.

Optuna's own calls go through its gRPC proxy. What `hpo.transactions` runs goes as one message through a second service
of the same server, so that entering a generation takes one round trip.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, TypeVar
from warnings import catch_warnings, simplefilter

import optuna
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import BaseStorage, GrpcStorageProxy
from optuna.trial import FrozenTrial, TrialState

from hpo import once
from hpo.errors import StorageError
from hpo.interrupts import uninterrupted
from hpo.outage import Patience, database_reason, patiently
from hpo.wire import decode, encode

Result = TypeVar("Result")

GRPC_SCHEME = "grpc://"
DEFAULT_PORT = 13000
SERVICE = "hpo.Storage"
PROTOCOL = 3
"""Raised when messages between client and server change."""
MOST_BYTES = 256 * 2**20
"""Of one message; a generation of trials has some kilobytes each."""
ADDRESS = re.compile(r"grpc://(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:(?P<port>[0-9]{1,5}))?/?")
FRESH_S = 0.05
"""How old a server's memory of a study may be, at least, that answers what others did; whatever hangs on it is checked
again in the transaction that enters trials."""
ANSWER_TIMEOUT_S = 120.0
"""How long a server may take to answer; then it counts as away. Less where it is waited for less long."""
CONNECT_TIMEOUT_S = 10.0
GIVEN_UP_TIMEOUT_S = 5.0
"""The same for one that was waited for in vain already."""


class ServedError(StorageError):
    """The database behind a server failed in a way that no waiting mends."""


class RemoteStorage(GrpcStorageProxy):
    """Optuna's gRPC proxy, each of whose calls a Ctrl-C waits for, and which repeats them while its server is away.

    Attributes:
        url: The server's URL.
        patience: How long calls are repeated.
        joins_calls: Whether a call waits for those of other workers, so that two are better made as one.
        fresh_s: How old what was read may be that needs not be read anew, in seconds.
    """

    joins_calls = True
    fresh_s = FRESH_S

    def __init__(self, url: str, host: str, port: int, patience: Patience) -> None:
        self.url = url
        self.patience = patience
        with catch_warnings():
            simplefilter("ignore", ExperimentalWarning)
            super().__init__(host=host, port=port)

    def _setup(self) -> None:
        """Optuna's own, with a limit to how long a message may be and an answer may take."""
        import grpc
        from optuna.storages._grpc import client
        from optuna.storages._grpc.auto_generated import api_pb2_grpc

        options = [("grpc.max_receive_message_length", MOST_BYTES), ("grpc.max_send_message_length", MOST_BYTES)]
        options += [("grpc.max_reconnect_backoff_ms", 2000), ("grpc.enable_http_proxy", 0)]
        channel = grpc.insecure_channel(f"{self._host}:{self._port}", options=options)
        self._channel = grpc.intercept_channel(channel, _deadline(self._answer_timeout_s))
        self._stub = api_pb2_grpc.StorageServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._cache = client.GrpcClientCache(self._stub)
        self._run = self._channel.unary_unary(f"/{SERVICE}/Run")

    def _answer_timeout_s(self) -> float:
        if self.patience.has_given_up:
            return GIVEN_UP_TIMEOUT_S
        waits_s = self.patience.timeout_s
        return min(ANSWER_TIMEOUT_S, max(CONNECT_TIMEOUT_S, waits_s)) if waits_s else ANSWER_TIMEOUT_S

    def through(self, call: Callable[[], Result]) -> Result:
        """Run what may be repeated: again while the server is away, and to its end where Ctrl-C is pressed."""
        with uninterrupted():
            return self.patience.through(lambda: _raising(call))

    def run_transaction(self, name: str, arguments: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """Have the server run a function of `hpo.transactions` in a transaction."""
        request = encode([name, list(arguments), named])

        def call() -> Any:
            result, error = decode(self._run(request))
            if error is not None:
                kind, words = error
                raise {"KeyError": KeyError, "UpdateFinishedTrialError": UpdateFinishedTrialError}[kind](words)
            return result

        return self.through(call)

    def greet(self) -> dict[str, Any]:
        """What the server says of itself."""
        answer: dict[str, Any] = decode(
            self._channel.unary_unary(f"/{SERVICE}/Greet")(encode(None), timeout=CONNECT_TIMEOUT_S)
        )
        return answer

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Enter a trial; entering it again, where the connection was lost, gives the same one."""
        marked = once.with_token(template_trial)
        return self.through(lambda: GrpcStorageProxy.create_new_trial(self, study_id, marked))

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """Start a waiting trial or finish a running one; again, where the connection was lost, with the same answer."""
        if state == TrialState.RUNNING:
            return once.claim_trial(self, trial_id, once.new_token())
        return once.finish_once(self, trial_id, state, values, GrpcStorageProxy.set_trial_state_values)


for _name in BaseStorage.__abstractmethods__:
    if _name not in vars(RemoteStorage):
        setattr(RemoteStorage, _name, patiently(getattr(GrpcStorageProxy, _name)))


def connect(url: str, timeout_s: float = 0.0, on_state: Callable[[str], None] | None = None) -> RemoteStorage:
    """Reach a database through `hpo storage serve`.

    Args:
        url: grpc://host:port; the port is 13000 unless given.
        timeout_s: How long calls are repeated if the server goes away later.
        on_state: Told in words that the server is away, and "" when it is back.
    Raises:
        StorageError: The URL is malformed, no server answers, or one of another version.
    """
    host, port = parse_address(url)
    try:
        import grpc
    except ImportError as error:
        raise StorageError(
            f"{url} needs grpcio and protobuf ({error}); install them with `pip install grpcio protobuf`."
        ) from error
    storage = RemoteStorage(url, host, port, Patience(url, timeout_s, on_state))
    try:
        there = _raising(storage.greet)
        _check_versions(url, there)
    except (grpc.RpcError, ValueError, ServedError) as error:
        storage.close()
        reason = str(error) if isinstance(error, ServedError) else database_reason(error)
        raise StorageError(
            f"Cannot use the storage {url}: {reason}; check that `hpo storage serve` runs there."
        ) from error
    except StorageError:
        storage.close()
        raise
    return storage


def parse_address(url: str) -> tuple[str, int]:
    """Host and port of a grpc:// URL.

    Raises:
        StorageError: It is malformed; what it holds is not repeated, since it may be a password.
    """
    match = ADDRESS.fullmatch(url)
    port = int(match["port"] or DEFAULT_PORT) if match else 0
    if match is None or not 1 <= port <= 65_535:
        raise StorageError(
            "A --storage that begins with grpc:// is written grpc://host:port, without user, password or database; "
            f"for example grpc://127.0.0.1:{DEFAULT_PORT}."
        )
    return match["host"], port


def address(host: str, port: int) -> str:
    """A host, or an IPv6 address with or without brackets, and a port, as URLs have them."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def description() -> dict[str, Any]:
    """What a server says of itself, and a client compares with its own."""
    return {"protocol": PROTOCOL, "hpo": version("hpo"), "optuna": optuna.__version__}


def _check_versions(url: str, there: dict[str, Any]) -> None:
    here = description()
    for name, what in (("protocol", "hpo"), ("optuna", "optuna")):
        if there.get(name) != here[name]:
            raise StorageError(
                f"The server at {url} runs {what} {there.get(what, 'unknown')}, this is {what} {here[what]}"
                + (f", of protocols {there.get(name)} and {here[name]}" if name == "protocol" else "")
                + "; install the same on both sides."
            )


def _raising(call: Callable[[], Result]) -> Result:
    """Turn what gRPC says of a failed call into errors of ours, unless waiting may mend it."""
    import grpc

    try:
        return call()
    except grpc.RpcError as error:
        code = error.code()
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            raise
        if code is grpc.StatusCode.UNIMPLEMENTED:
            raise ServedError("what answers there is no server of `hpo storage serve`, or an older one") from error
        raise ServedError(f"its server says: {database_reason(error)}") from error


def _deadline(answer_timeout_s: Callable[[], float]) -> Any:
    """An interceptor that lets no call wait for ever: a machine that vanished never says so."""
    import grpc

    class Deadline(grpc.UnaryUnaryClientInterceptor):  # type: ignore[misc]
        def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
            if details.timeout is None:
                details = details._replace(timeout=answer_timeout_s())
            return continuation(details, request)

    return Deadline()
