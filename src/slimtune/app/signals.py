"""SIGINT and SIGTERM as a request to stop at the next safe place."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType


class StopRequest:
    """While `deferred` is true the first signal only sets `signal`; any other one raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self.deferred = False
        self._before: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self.deferred or self.signal:
            raise KeyboardInterrupt(name)
        self.signal = name
        print(
            f"{name}: finishing this step, then saving; once more to stop at once",
            file=sys.stderr,
            flush=True,
        )
