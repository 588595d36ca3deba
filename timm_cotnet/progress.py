"""What a training tells while it runs, and how it is stopped: used by the demonstration."""
import os
import signal
import sys
import threading
import time
from typing import Optional

import torch

__all__ = ['BusyWatch', 'Progress', 'StopRequest']

SECONDS = 10.  # between lines of progress, where they are not written over each other


class StopRequest:
    """While it lasts, Ctrl-C asks to stop at the next good moment; a second one interrupts at once.

    Attributes:
        asked: Whether somebody has asked.
    """

    def __init__(self):
        self.asked = False
        self.process = os.getpid()

    def __enter__(self) -> 'StopRequest':
        self.before = None
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no signals
            self.before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)

    def _ask(self, *_) -> None:
        if os.getpid() != self.process:  # one that loads images ends with this one
            return
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print('\nStopping after this step, then saving. Ctrl-C again stops at once.', file=sys.stderr, flush=True)


class Progress:
    """Prints steps: over each other on a terminal, elsewhere in at most one line in ten seconds.

    Args:
        steps: Number of all steps.
    """

    def __init__(self, steps: int):
        self.steps = steps
        self.start = self.last = time.monotonic()
        self.on_terminal = sys.stdout.isatty()

    def step(self, count: int, text: str) -> None:
        """Tells that so many steps are done, if it is time to."""
        now = time.monotonic()
        if now - self.last < (0.2 if self.on_terminal else SECONDS):
            return
        self.last = now
        left = (now - self.start) / count * (self.steps - count)
        line = f'  step {count}/{self.steps}, {text}, about {_duration(left)} left'
        print(f'{line:78}' if self.on_terminal else line, end='\r' if self.on_terminal else '\n', flush=True)

    def clear(self) -> None:
        """Makes room for another line on a terminal."""
        if self.on_terminal:
            print(f'{"":78}', end='\r')


def _duration(seconds: float) -> str:
    return f'{seconds:.0f} s' if seconds < 120 else f'{seconds / 60:.0f} min'


class BusyWatch:
    """Notices that steps on a CPU take much longer than the main thread works in them, tells so once, and what helps.

    On a quiet machine the main thread works all the time: its part of a step, or waiting actively for other threads. It
    falls behind where other programs take the processors, and then all threads wait for the one that has none.

    Args:
        watches: Whether steps run on the CPU.
    """
    SECONDS = 5.  # of steps, after which their times are compared
    LEAST = 0.6  # part of a step in which the main thread works on a quiet machine, with some room

    def __init__(self, watches: bool):
        self.watches = watches
        self.steps, self.wall, self.worked = -1, 0., 0.  # kernels may be compiled in the first step: it does not count

    def __enter__(self) -> None:
        self.start = time.monotonic(), time.thread_time()

    def __exit__(self, error: Optional[type], *_) -> None:
        if not self.watches or error:
            return
        self.steps += 1
        if self.steps > 0:
            self.wall += time.monotonic() - self.start[0]
            self.worked += time.thread_time() - self.start[1]
        if self.wall >= self.SECONDS:
            if self.worked < self.LEAST * self.wall:
                print(f'  {self.message()}', file=sys.stderr, flush=True)
                self.watches = False
            self.steps, self.wall, self.worked = 0, 0., 0.

    def message(self) -> str:
        """What was noticed, and what helps."""
        what = (
            f'This machine is busy: a step took {self.wall / self.steps:.1f} s, of which the main thread worked '
            f'{self.worked / self.steps:.1f} s ({self.worked / self.wall:.0%}) and waited for a processor the rest.')
        if torch.get_num_threads() == 1:
            return f'{what} What helps: ending other programs.'
        return (
            f'{what} What helps: ending other programs, or starting again with OMP_NUM_THREADS=1, so that no thread '
            f'waits for others (now there are {torch.get_num_threads()}).')
