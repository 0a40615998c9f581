import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from ..common.errors import InputError, NotFinite, one_line
from .agreement import gather_objects, this_process


# Seconds between two signs of life, and without one after which a process counts as dead: below a minute, but longer
# than any call that keeps other threads of its process from running.
BEAT, SILENCE = 1.0, 45.0
# In what gloo and NCCL say when the process at the other end is no more.
_LOST = ("Connection", "connection", "closed by peer", "NCCL", "Broken pipe", "timed out", "Timed out")


class Watch:
    """
    Each process gives signs of life while this is open, and the first process ends the run if one of them falls silent
    or says why it ends.

    A dead process leaves the others waiting in a collective, on GPUs for as long as its timeout.

    Args:
        last_words (`Callable[[], str]`): What else to say when the run ends so, such as which checkpoint is whole.
    """

    def __init__(self, last_words: Callable[[], str] = str):
        self.process = this_process()
        self.last_words = last_words
        self._closed = threading.Event()
        self._beats: dict[int, tuple[bytes, float]] = {}

    def __enter__(self) -> "Watch":
        if self.process.num_processes > 1:
            self._store = self._connect()
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.process.num_processes == 1:
            return
        unforeseen = None if isinstance(error, InputError | NotFinite | KeyboardInterrupt) else error
        if unforeseen is not None:
            self._explain(unforeseen)
        self._closed.set()
        try:
            self._store.set(f"closed/{self.process.process_index}", "1")
            if self.process.is_main_process and unforeseen is None:
                # To the others a store that is gone means that this process has died.
                everyone = [f"closed/{index}" for index in range(self.process.num_processes)]
                self._store.wait(everyone, timedelta(seconds=4 * BEAT))
        except RuntimeError:
            pass  # The first process, which kept the store, has gone, or one of the others.
        self._thread.join()

    def _connect(self) -> dist.TCPStore:
        first = self.process.is_main_process
        host = os.environ.get("MASTER_ADDR", "localhost")
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False) if first else None
        port = gather_objects(0 if store is None else store.port)[0]
        return store or dist.TCPStore(host, port, is_master=False)

    def _explain(self, error: BaseException) -> None:
        """Says why this process ends; if it ends because another did, that is the reason that counts."""
        if threading.current_thread() is threading.main_thread():
            # The launcher, which ends all once one has ended, must leave time to say so.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        lost = isinstance(error, RuntimeError) and any(word in str(error) for word in _LOST)
        if not self.process.is_main_process:
            if not lost:
                reason = one_line(error)[:1000]
                self._store.set(f"ended/{self.process.process_index}", f"{type(error).__name__}: {reason}")
            return
        deadline = time.monotonic() + 8 * BEAT
        while lost and time.monotonic() < deadline:
            if found := self._ended(silence=4 * BEAT):
                raise ProcessDied(f"{found} {self.last_words()}".strip()) from None
            time.sleep(BEAT / 4)

    def _run(self) -> None:
        """In a thread: gives signs of life, and on the first process looks for those of the others."""
        count = 0
        while not self._closed.wait(BEAT):
            count += 1
            try:
                self._store.set(f"alive/{self.process.process_index}", str(count))
                found = self._ended(SILENCE) if self.process.is_main_process else None
            except RuntimeError:
                if self._closed.is_set():
                    return
                # The first process has gone, and with it the run.
                os._exit(1)
            if found:
                # Leaves the main thread, which may be about to say the same, the first word.
                time.sleep(2 * BEAT)
                if not self._closed.is_set():
                    print(f"sae_accel: {found} {self.last_words()}", file=sys.stderr, flush=True)
                    os._exit(1)

    def _ended(self, silence: float) -> str | None:
        """Which process has ended, and why, in words; None if all are well."""
        now = time.monotonic()
        for index in range(1, self.process.num_processes):
            if self._store.check([f"ended/{index}"]):
                return f"Process {index} ended: {self._store.get(f'ended/{index}').decode()}."
            if self._store.check([f"closed/{index}"]):
                continue
            key = f"alive/{index}"
            beat = self._store.get(key) if self._store.check([key]) else b"0"
            if index not in self._beats or self._beats[index][0] != beat:
                self._beats[index] = (beat, now)
            elif now - self._beats[index][1] > silence:
                return f"Process {index} has died without a word: it was killed, or its machine is gone."
        return None


class ProcessDied(RuntimeError):
    """Another process of the run has ended, so that this one cannot go on."""
