"""
Notices that a process of the run has died, and ends the others with one clear line.

Without this watch, a dead process leaves the others waiting in a collective, on GPUs until its timeout. A thread of
each process therefore writes a counter into a small shared store each second. The first process looks at all counters,
and at the ids of the processes on its machine. A process that ends with an error writes the reason into the store.
"""

import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta

import psutil
import torch.distributed as dist

from ..common.errors import InputError, NotFinite, NotSaved, RunEnded
from ..common.reports import reports
from ..common.signals import signals
from .agreement import gather_objects, this_process


# Seconds between two signs of life, and seconds of silence after which a process of another machine counts as dead:
# less than a minute, but longer than any call that blocks the other threads of its process.
BEAT, SILENCE = 1.0, 45.0
# Words in the errors of gloo and NCCL when the process at the other end has ended.
_LOST = ("Connection", "connection", "closed by peer", "NCCL", "Broken pipe", "timed out", "Timed out")
_DIED = "Process {} has died without an error message: something killed it, or its machine is gone."


class Watch:
    """
    Watches the processes of a run, and ends all of them if one ends.

    While this is open, each process gives signs of life. If one falls silent, or says why it ends, the first process
    prints the reason and ends the run. If the first process dies, one other process of each machine says so. A signal
    that ends one process at once ends all.
    """

    def __init__(self) -> None:
        self.process = this_process()
        self._closed = threading.Event()
        self._beats: dict[int, tuple[bytes, float]] = {}
        # The thread that says why the process ends takes this lock and keeps it, so that only one speaks.
        self._last_words = threading.Lock()

    def __enter__(self) -> "Watch":
        if self.process.num_processes > 1:
            self._store = self._connect()
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
            signals.leave = self._leave
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.process.num_processes == 1:
            return
        unforeseen = None if isinstance(error, InputError | NotFinite | NotSaved | KeyboardInterrupt) else error
        try:
            if unforeseen is not None:
                self._explain(unforeseen)
        finally:
            self._close(waits=unforeseen is None)

    def _close(self, waits: bool) -> None:
        signals.leave = signals.end
        self._closed.set()
        try:
            self._store.set(f"closed/{self.process.process_index}", "1")
            if self.process.is_main_process and waits:
                # The store must outlive the others' use of it: a vanished store means to them that this process died.
                everyone = [f"closed/{index}" for index in range(self.process.num_processes)]
                self._store.wait(everyone, timedelta(seconds=4 * BEAT))
        except RuntimeError:
            pass  # The first process, which holds the store, has ended, or another process has.
        self._thread.join()

    def _connect(self) -> dist.TCPStore:
        first = self.process.is_main_process
        host = os.environ.get("MASTER_ADDR", "localhost")
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False) if first else None
        everyone = gather_objects((0 if store is None else store.port, _machine(), os.getpid()))
        # On this machine a process's id shows at once whether it still lives.
        self._pids = {i: pid for i, (_, machine, pid) in enumerate(everyone) if machine == _machine()}
        return store or dist.TCPStore(host, everyone[0][0], is_master=False)

    def _explain(self, error: BaseException) -> None:
        """Says why this process ends. If it ends because another did, the other's reason counts."""
        # The launcher sends signals to all processes once one has ended; ignore them until the reason is printed.
        signals.leave = _stay
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        lost = isinstance(error, RuntimeError) and any(word in str(error) for word in _LOST)
        deadline = time.monotonic() + 8 * BEAT
        if self.process.is_main_process:
            while lost and time.monotonic() < deadline:
                if found := self._ended(silence=4 * BEAT):
                    self._tell_of_the_end()
                    raise ProcessDied(f"{found} {signals.words()}") from None
                time.sleep(BEAT / 4)
            self._tell_of_the_end()
        elif not lost:
            reports.is_left_to_first = True
            self._store.set(f"ended/{self.process.process_index}", reports.line(error))
        else:
            # Meanwhile the watching thread ends this process, as soon as it knows the reason.
            time.sleep(8 * BEAT)

    def _tell_of_the_end(self) -> None:
        """Marks the run as over, so that the others end silently when they find this process gone."""
        self._store.set("over", "1")
        time.sleep(2 * BEAT)

    def _run(self) -> None:
        """Runs in a thread: gives signs of life, and looks for the others' signs."""
        count = 0
        while not self._closed.wait(BEAT):
            count += 1
            try:
                self._store.set(f"alive/{self.process.process_index}", str(count))
                self._look()
            except RuntimeError:
                if self._closed.is_set():
                    return
                self._say_that_the_first_has_died()

    def _look(self) -> None:
        if self._store.check(["leaving"]):
            self._leave(int(self._store.get("leaving")))
        if not self.process.is_main_process:
            if self._store.check(["over"]):
                os._exit(1)
            if 0 in self._pids and not _is_alive(self._pids[0]):
                self._say_that_the_first_has_died()
            return
        # After a signal a launcher kills its processes in less than a minute, so be quicker then.
        found = self._ended(SILENCE if signals.number is None else 10 * BEAT)
        if found:
            # The main thread may be about to report the same; it goes first.
            time.sleep(2 * BEAT)
            if not self._closed.is_set():
                self._end(found)

    def _end(self, found: str) -> None:
        """Ends this process, the first, because another has ended."""
        self._last_words.acquire()
        _say(f"{found} {signals.words()}")
        self._tell_of_the_end()
        os._exit(1)

    def _say_that_the_first_has_died(self) -> None:
        """Ends this process; one process of each machine prints why."""
        self._last_words.acquire()
        if self.process.local_process_index == (1 if 0 in self._pids else 0):
            _say(f"{_DIED.format(0)} {signals.words()}")
        os._exit(1)

    def _leave(self, number: int) -> None:
        """Ends all processes at once, each with the exit status of the signal; the first prints one line."""
        try:
            if self.process.is_main_process and (found := self._ended(SILENCE)):
                # The launcher's signal only follows from the end of another process: report that end.
                self._end(found)
            self._store.set("leaving", str(number))
        except RuntimeError:
            self._say_that_the_first_has_died()
        self._last_words.acquire()
        with suppress(RuntimeError):
            self._wait_for_others()
        signals.end(number, speaks=self.process.is_main_process)

    def _wait_for_others(self) -> None:
        """Waits until all processes know that they leave. The first, which holds the store, stays a moment longer."""
        self._store.set(f"gone/{self.process.process_index}", "1")
        everyone = [f"gone/{index}" for index in range(self.process.num_processes)]
        deadline = time.monotonic() + 4 * BEAT
        while not self._store.check(everyone) and time.monotonic() < deadline:
            time.sleep(BEAT / 10)
        if self.process.is_main_process:
            time.sleep(BEAT / 2)

    def _ended(self, silence: float) -> str | None:
        """A sentence that says which process has ended and why; None if none has."""
        now = time.monotonic()
        if self._store.check(["leaving"]):
            return None
        for index in range(1, self.process.num_processes):
            if self._store.check([f"ended/{index}"]):
                return f"Process {index} ended: {self._store.get(f'ended/{index}').decode()}"
            if self._store.check([f"closed/{index}"]):
                continue
            if index in self._pids and not _is_alive(self._pids[index]):
                return _DIED.format(index)
            key = f"alive/{index}"
            beat = self._store.get(key) if self._store.check([key]) else b"0"
            if index not in self._beats or self._beats[index][0] != beat:
                self._beats[index] = (beat, now)
            elif now - self._beats[index][1] > silence:
                return _DIED.format(index)
        return None


class ProcessDied(RunEnded):
    """Raised when another process of the run has ended, so that this one cannot go on."""


def _stay(number: int) -> None:
    """Ignores a signal, because this process ends already."""


def _machine() -> str:
    """A name for this machine, or this container: processes with the same name can look up each other's ids."""
    space = os.stat("/proc/self/ns/pid").st_ino if os.path.exists("/proc/self/ns/pid") else ""
    return f"{socket.gethostname()} {space}"


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        # The process exists, but this user may not look at it.
        return True


def _say(line: str) -> None:
    print(f"sae_accel: {line}", file=sys.stderr, flush=True)
