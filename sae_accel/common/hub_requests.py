"""
Makes requests to the Hub patient, but not for ever.

The Hub's client waits without limit for some answers, and gives up at once for others. Inside `hub_requests` each
request has a time limit, and is repeated where the Hub is only busy or a connection drops. A line on standard error
says for what a user waits. After a final failure, the Hub is not asked again within the task, since the client and its
callers would repeat all of it. Requests of other code in the same process stay as they are.
"""

import importlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from itertools import count
from typing import Any, TypeVar

from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import _http as client
from huggingface_hub.utils import logging as client_logging

from .errors import InputError, one_line
from .signals import tell


T = TypeVar("T")
# The HTTP library of the Hub's client differs between versions, so it is taken from the client.
http = importlib.import_module(HTTPError.__module__.partition(".")[0])

# Seconds until the first line about a wait. Each further line comes after three times as long.
TOLD_AFTER = 10.0
# Longest silence in seconds: for a connection, for an answer, and for a commit, which the Hub makes before it answers.
TO_CONNECT, TO_ANSWER, TO_COMMIT = 10.0, 30.0, 120.0
# How often a request is sent in all: after a busy answer or a dropped connection, and after silence.
TRIES, STALLED_TRIES = 5, 2
# If the Hub asks for a longer wait, in seconds, the request fails and the error says so.
LONGEST_WAIT = 300.0
# Statistics of the client itself. It waits only a moment for them, so they are left alone.
_UNIMPORTANT = ("/api/agent-harnesses", "/api/telemetry")
_FOR_A_MOMENT = (408, 429, 500, 502, 503, 504)


class HubFailed(InputError):
    """The Hub was asked several times and gave no usable answer. The message is a clause, without a full stop."""


class NoConnection(OfflineModeIsEnabled):
    """The Hub cannot be reached. The client treats this as its offline mode, and does not try again."""


@contextmanager
def hub_requests(task: str, shows_progress: bool = False) -> Iterator[None]:
    """
    While open, requests to the Hub have time limits and are repeated where that helps.

    Args:
        task (`str`): The task in words that follow "Still ", such as "reading 'gpt2'".
        shows_progress (`bool`, defaults to `False`): Whether the user sees progress anyway. Then a line comes only if
            the Hub is silent.

    Raises:
        `HubFailed`: if the Hub keeps failing, even if the client has used files of the cache instead.
    """
    _patience.open()
    told = _Telling(task, shows_progress)
    try:
        yield
        _patience.check(task)
    finally:
        told.end()
        _patience.close()


def read_again(work: Callable[[], T]) -> T:
    """Calls `work`, and calls it again if a connection drops in the middle of an answer, such as a large file."""
    for tries in range(1, TRIES):
        try:
            return work()
        except http.NetworkError:
            time.sleep(_growing(tries))
    return work()


def ask_again() -> None:
    """Allows new requests to a Hub that has failed, to find out what it did before it failed."""
    _patience.forget()


def seconds_unanswered() -> float:
    """Seconds since the oldest request that the Hub has not answered; 0 if there is none."""
    return _patience.seconds_unanswered()


class _Patience:
    """
    Sends the requests of this process's Hub client, with limits and repetitions while a task is open.

    A host that has failed gets no further request until the open tasks end, since the client and its callers would
    repeat each try of this class.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = 0
        self._said = client_logging.get_verbosity()
        self._failed: dict[str, Exception] = {}
        self._asked: dict[int, float] = {}
        self._told: set[str] = set()

    def open(self) -> None:
        with self._lock:
            self._open += 1
            if self._open == 1:
                # The client would print lines of its own for each try.
                self._said = client_logging.get_verbosity()
                client_logging.set_verbosity_error()
            # A private name of the client: the tests of this module fail if it changes.
            if client._GLOBAL_CLIENT_FACTORY is not _factory:
                _wrapped.append(client._GLOBAL_CLIENT_FACTORY)
                client.set_client_factory(_factory)

    def close(self) -> None:
        with self._lock:
            self._open -= 1
            if not self._open:
                self._failed.clear()
                client_logging.set_verbosity(self._said)

    def forget(self) -> None:
        self._failed.clear()

    def check(self, task: str) -> None:
        """Raises if the Hub failed during a task. Prints a line if the cache was used, since no Hub was reached."""
        for failure in list(self._failed.values()):
            if isinstance(failure, HubFailed):
                raise failure
            line = f"There is {failure}. Files of the cache were used for {task}."
            if line not in self._told:
                self._told.add(line)
                tell(line)

    def seconds_unanswered(self) -> float:
        with self._lock:
            return time.monotonic() - min(self._asked.values()) if self._asked else 0.0

    def send(self, send: Callable[..., Any], request: Any, **options: Any) -> Any:
        if not self._open or request.url.path.startswith(_UNIMPORTANT):
            return send(request, **options)
        _set_limits(request)
        with self._lock:
            self._asked[id(request)] = time.monotonic()
        try:
            return self._tried(send, request, options)
        finally:
            with self._lock:
                del self._asked[id(request)]

    def _tried(self, send: Callable[..., Any], request: Any, options: dict[str, Any]) -> Any:
        for tries in count(1):
            if (failure := self._failed.get(request.url.host)) is not None:
                raise failure
            try:
                response = send(request, **options)
            except http.TransportError as error:
                wait = self._wait_after_error(request, error, tries)
            else:
                if response.status_code not in _FOR_A_MOMENT or not _can_be_sent_again(request):
                    return response
                response.close()
                wait = self._wait_after_answer(request, response, tries)
            time.sleep(wait)
        raise AssertionError("the loop ends with a return or an error")

    def _wait_after_error(self, request: Any, error: Exception, tries: int) -> float:
        """Seconds to wait before a request is repeated; raises if it is not repeated."""
        if isinstance(error, (http.ConnectError, http.ConnectTimeout, http.ProxyError)):
            if tries < STALLED_TRIES and not isinstance(error, http.ConnectTimeout):
                return 1.0
            no_connection = NoConnection(f"no connection to {request.url.host}: {one_line(error)}")
            raise self._remembered(request, no_connection) from error
        if isinstance(error, http.TimeoutException):
            if tries < STALLED_TRIES and _can_be_sent_again(request):
                return 0.0
            raise self._remembered(request, HubFailed(f"{_asked_for(request)} and gave no answer")) from error
        if not isinstance(error, (http.NetworkError, http.RemoteProtocolError)) or not _can_be_sent_again(request):
            # The client itself repeats a request whose body it reads from a file.
            raise error
        if tries < TRIES:
            return _growing(tries)
        dropped = HubFailed(f"{_asked_for(request)}, and each connection was dropped")
        raise self._remembered(request, dropped) from error

    def _wait_after_answer(self, request: Any, response: Any, tries: int) -> float:
        """Seconds to wait before a request is repeated after a busy answer; raises if it is not repeated."""
        asked = _wait_of(response)
        wait = _growing(tries) if asked is None else asked
        if tries < TRIES and wait <= LONGEST_WAIT:
            return wait
        later = f" and asked to wait {wait:.0f} s" if wait > LONGEST_WAIT else ""
        refused = HubFailed(f"{_asked_for(request)}, and it answered {response.status_code}{later}")
        raise self._remembered(request, refused)

    def _remembered(self, request: Any, failure: Exception) -> Exception:
        self._failed[request.url.host] = failure
        return failure


class _Telling:
    """Prints lines about a wait on standard error, from a thread."""

    def __init__(self, task: str, shows_progress: bool):
        self._task, self._shows_progress, self._ended = task, shows_progress, threading.Event()
        threading.Thread(target=self._tell, daemon=True).start()

    def end(self) -> None:
        self._ended.set()

    def _tell(self) -> None:
        waited, until = 0.0, TOLD_AFTER
        while not self._ended.wait(until - waited):
            waited, until = until, 3 * until
            silent = seconds_unanswered()
            is_silent = silent > TOLD_AFTER / 2
            asked = f"; the Hub has not answered for {silent:.0f} s" if is_silent else ""
            if is_silent or not self._shows_progress:
                tell(f"Still {self._task} ({waited:.0f} s so far{asked}).")


# The functions that made clients before `_factory` replaced them.
_wrapped: list[Callable[[], Any]] = []
_patience = _Patience()


def _factory() -> Any:
    made = _wrapped[-1]()
    send = made.send
    made.send = lambda request, **options: _patience.send(send, request, **options)
    return made


def _set_limits(request: Any) -> None:
    answer = TO_COMMIT if "/commit/" in request.url.path else TO_ANSWER
    limits = {"connect": TO_CONNECT, "read": answer, "write": TO_ANSWER, "pool": TO_ANSWER}
    given = {name: limit for name, limit in request.extensions.get("timeout", {}).items() if limit is not None}
    request.extensions["timeout"] = limits | given


def _can_be_sent_again(request: Any) -> bool:
    """Whether a request's body is in memory. A body that is read from a file can be sent only once."""
    try:
        request.content  # noqa: B018  It raises.
    except http.RequestNotRead:
        return False
    return True


def _growing(tries: int) -> float:
    return float(2 ** (tries - 1))


def _wait_of(response: Any) -> float | None:
    """The seconds that the Hub asks to wait; None if it does not ask."""
    limit = client.parse_ratelimit_headers(response.headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    asked = response.headers.get("retry-after", "").strip()
    if asked.isdigit():
        return float(asked)
    try:
        return max(0.0, parsedate_to_datetime(asked).timestamp() - time.time())
    except ValueError:
        return None


def _asked_for(request: Any) -> str:
    return f"the Hub was asked for {request.method} {request.url.path}"
