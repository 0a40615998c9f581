"""
Requests to the Hub, as this package makes them. Each has a time limit and is made again where the Hub fails for a
moment, and who waits for long is told for what. Requests that others make in the same process stay as they were.
"""

import importlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from itertools import count
from typing import Any

from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import _http as client
from huggingface_hub.utils import logging as client_logging

from .errors import InputError, one_line
from .signals import tell


# The Hub client's own HTTP library has changed its name, so it is taken from where the client has it.
http = importlib.import_module(HTTPError.__module__.partition(".")[0])

# Seconds after which a wait is told; then each time it is three times as long.
TOLD_AFTER = 10.0
# Seconds without a byte: to connect, for an answer, and for that to a commit, which the Hub makes before it answers.
TO_CONNECT, TO_ANSWER, TO_COMMIT = 10.0, 30.0, 120.0
# How often a request is made where it is refused for a moment or its connection drops, and where no answer comes.
TRIES, STALLED_TRIES = 5, 2
# A Hub that asks to wait for longer, in seconds, is told of instead.
LONGEST_WAIT = 300.0
_FOR_A_MOMENT = (408, 429, 500, 502, 503, 504)


class HubFailed(InputError):
    """The Hub was asked as often as is sensible, and gave no answer that can be used. It says a clause."""


class NoConnection(OfflineModeIsEnabled):
    """The Hub is not there to be asked. The client takes it as if it had been told so, and does not try again."""


@contextmanager
def hub_requests(task: str, shows_progress: bool = False) -> Iterator[None]:
    """
    While open, requests to the Hub have time limits and are made again where that helps.

    Args:
        task (`str`): What is done, in words that follow "Still ", such as "reading 'gpt2'".
        shows_progress (`bool`, defaults to `False`): Whether it is seen to go on, so that only silence of the Hub is
            told.

    Raises:
        `HubFailed`: where the Hub fails for longer, even if whoever asked makes do with what is in the cache.
    """
    # It would tell of each try in lines of its own.
    said = client_logging.get_verbosity()
    client_logging.set_verbosity_error()
    _patience.open()
    told = _Telling(task, shows_progress)
    try:
        yield
        _patience.check(task)
    finally:
        told.end()
        _patience.close()
        client_logging.set_verbosity(said)


def ask_again() -> None:
    """Lets a Hub that has failed be asked again, where something depends on what it did before it failed."""
    _patience.forget()


def seconds_unanswered() -> float:
    """For how long the Hub has not answered what it was asked; 0 if it was asked nothing."""
    return _patience.seconds_unanswered()


class _Patience:
    """
    Sends the requests of this process's Hub client.

    A host that has failed is not asked again before the tasks that are open end: the client, and those who call it,
    would try again what was tried here.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = 0
        self._failed: dict[str, Exception] = {}
        self._asked: dict[int, float] = {}
        self._told: set[str] = set()

    def open(self) -> None:
        with self._lock:
            self._open += 1
            if client._GLOBAL_CLIENT_FACTORY is not _factory:
                _wrapped.append(client._GLOBAL_CLIENT_FACTORY)
                client.set_client_factory(_factory)

    def close(self) -> None:
        with self._lock:
            self._open -= 1
            if not self._open:
                self._failed.clear()

    def forget(self) -> None:
        self._failed.clear()

    def check(self, task: str) -> None:
        """Tells of a task that made do without the Hub; raises if the Hub was there and failed."""
        for failure in self._failed.values():
            if isinstance(failure, HubFailed):
                raise failure
            line = f"There is {failure}. What is in the cache was used for {task}."
            if line not in self._told:
                self._told.add(line)
                tell(line)

    def seconds_unanswered(self) -> float:
        with self._lock:
            return time.monotonic() - min(self._asked.values()) if self._asked else 0.0

    def send(self, send: Callable[..., Any], request: Any, **options: Any) -> Any:
        if not self._open:
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
        host, again = request.url.host, _can_be_sent_again(request)
        for tries in count(1):
            if (failure := self._failed.get(host)) is not None:
                raise failure
            try:
                response = send(request, **options)
            except (http.ConnectError, http.ConnectTimeout, http.ProxyError) as error:
                if tries >= STALLED_TRIES or isinstance(error, http.ConnectTimeout):
                    self._failed[host] = NoConnection(f"no connection to {host}: {one_line(error)}")
                    raise self._failed[host] from error
                wait = 1.0
            except http.TimeoutException as error:
                if tries >= STALLED_TRIES or not again:
                    raise self._fail(host, f"{_asked_for(request)} and got no answer") from error
                wait = 0.0
            except (http.NetworkError, http.RemoteProtocolError) as error:
                if not again:
                    # The client makes it anew.
                    raise
                if tries >= TRIES:
                    raise self._fail(host, f"{_asked_for(request)}, and each connection was dropped") from error
                wait = _growing(tries)
            else:
                if response.status_code not in _FOR_A_MOMENT or not again:
                    return response
                wait = _wait_of(response) or _growing(tries)
                response.close()
                if tries >= TRIES or wait > LONGEST_WAIT:
                    asks = f", to be asked again in {wait:.0f} s" if wait > LONGEST_WAIT else ""
                    raise self._fail(host, f"{_asked_for(request)}, and it answered {response.status_code}{asks}")
            time.sleep(wait)
        raise AssertionError("it is left by what is raised or given")

    def _fail(self, host: str, clause: str) -> HubFailed:
        failure = HubFailed(clause)
        self._failed[host] = failure
        return failure


class _Telling:
    """Tells of a wait on standard error, in a thread."""

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


# What made clients before.
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
    """Whether its body is at hand, and is not read from a file as it is sent."""
    try:
        request.content  # noqa: B018  It raises.
    except http.RequestNotRead:
        return False
    return True


def _growing(tries: int) -> float:
    return float(2 ** (tries - 1))


def _wait_of(response: Any) -> float | None:
    """Seconds that the Hub asks to wait."""
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
