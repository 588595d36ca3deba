"""What a training tells while it runs, and how Ctrl-C stops it."""
import os
import signal
import time

import pytest

from timm_cotnet import progress
from timm_cotnet.progress import BusyWatch, Progress, StopRequest


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when a test says so: on the wall, and those in which the main thread works."""
    class Clock:
        wall = worked = 0.

        def spend(self, wall, worked):
            self.wall, self.worked = self.wall + wall, self.worked + worked

    clock = Clock()
    monkeypatch.setattr(progress.time, 'monotonic', lambda: clock.wall)
    monkeypatch.setattr(progress.time, 'thread_time', lambda: clock.worked)
    return clock


def test_first_interrupt_asks_and_the_second_interrupts(capsys):
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert not stop.asked
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert stop.asked
        assert 'Stopping after this step' in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before


def test_piped_output_gets_a_line_in_ten_seconds_at_most(clock, capsys):
    steps = Progress(100)
    for count in range(1, 51):
        clock.spend(1, 1)
        steps.step(count, 'loss 1.0')
    assert capsys.readouterr().out.splitlines() == [
        f'  step {count}/100, loss 1.0, about {100 - count} s left' for count in (10, 20, 30, 40, 50)]
    clock.spend(9999, 0)
    steps.step(51, 'loss 1.0')
    assert 'about 161 min left' in capsys.readouterr().out


def test_a_terminal_gets_one_line_that_changes(clock, capsys, monkeypatch):
    monkeypatch.setattr('sys.stdout.isatty', lambda: True)
    steps = Progress(10)
    for count in range(1, 5):
        clock.spend(0.15, 0)
        steps.step(count, 'loss 1.0')
    steps.clear()
    out = capsys.readouterr().out
    assert '\n' not in out
    parts = out.split('\r')
    assert [part.split(',')[0].strip() for part in parts] == ['step 2/10', 'step 4/10', '', '']
    assert len({len(part) for part in parts[:-1]}) == 1  # each covers the one before


@pytest.mark.parametrize('threads, advice', [
    (1, 'What helps: ending other programs.'), (4, 'starting again with OMP_NUM_THREADS=1')])
def test_a_busy_machine_is_noticed_once(clock, capsys, monkeypatch, threads, advice):
    monkeypatch.setattr(progress.torch, 'get_num_threads', lambda: threads)
    watch = BusyWatch(True)
    for worked in [0.1] + [1.] * 10 + [0.3] * 20:  # first what is compiled, then quiet, then busy
        with watch:
            clock.spend(1, worked)
        clock.spend(3, 0)  # between steps, images are read
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert 'a step took 1.0 s, of which the main thread worked 0.3 s (30%)' in lines[0] and advice in lines[0]


def test_quiet_machines_and_gpus_are_not_called_busy(clock, capsys):
    for watches, worked in ((True, 0.8), (False, 0.1)):
        watch = BusyWatch(watches)
        for _ in range(50):
            with watch:
                clock.spend(1, worked)
    assert capsys.readouterr().err == ''
