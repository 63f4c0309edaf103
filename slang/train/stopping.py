"""Ctrl-C, SIGTERM and SIGHUP during training."""

import os
import signal
import time
from contextlib import suppress
from typing import Any

import mlx.core as mx

from slang.errors import Stopped, stopped_by
from slang.files import SIGNALS


class Interrupt:
    """The first signal asks to stop where nothing is lost; a second one stops at once.

    The same again within a second is no second one: a terminal that is closed tells every process.
    """

    def __enter__(self) -> "Interrupt":
        self.received = 0
        self.at = 0.0  # when, in seconds of a clock of its own
        self.terminal = [number for number in (1, 2) if os.isatty(number)]
        self.before: dict[int, Any] = {}  # handlers, by signal
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                self.before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame) -> None:
        if number == signal.SIGHUP:  # the terminal is gone, and printing there would fail
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for number_of_file in self.terminal:
                os.dup2(nowhere, number_of_file)
        before = self.before[number]
        if callable(before):
            with suppress(KeyboardInterrupt):  # slang.errors.program's, which notes the exit code
                before(number, None)
        now = time.monotonic()
        if self.received and (number != self.received or now > self.at + 1):
            raise KeyboardInterrupt("Stopped; --resume goes on from the last save")
        if not self.received:
            self.received, self.at = number, now

    def check(self) -> None:
        """Raise Stopped when any of the machines received a signal."""
        received = self.received
        if mx.distributed.init().size() > 1:
            total = mx.distributed.all_sum(mx.array(float(received)), stream=mx.cpu)
            received = received or int(total.item() > 0)
        if received:
            raise Stopped(stopped_by(self.received or signal.SIGINT))
