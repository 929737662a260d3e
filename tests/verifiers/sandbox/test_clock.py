"""A program is judged by its CPU time; one that the machine was too busy to run is repeated alone, then not judged."""

import os
import threading
import time
from contextlib import contextmanager

import pytest

from pmd.types import Message, Task
from pmd.verifiers.pool import verify
from pmd.verifiers.sandbox.clock import Clock, Used, end_of, open_proc, own_pid, pause_s
from pmd.verifiers.sandbox.gate import Gate
from pmd.verifiers.sandbox.pool import Limits, Sandbox
from pmd.verifiers.sandbox.protocol import ENDED, STARVED, TIMED_OUT, Reply
from pmd.verifiers.sandbox.streams import Streams

SPIN = "while True: pass"


@pytest.mark.parametrize(
    ("cpu_s", "wall_s", "waited_s", "end"),
    [
        (0.0, 0.0, 0.0, None),
        (2.9, 3.0, 0.0, None),
        (3.0, 3.0, 0.0, TIMED_OUT),  # it computed
        (3.0, 30.0, 27.0, TIMED_OUT),
        (12.0, 1.5, 0.0, TIMED_OUT),  # on many cores
        (0.0, 5.9, 0.0, None),
        (0.0, 6.0, 0.0, TIMED_OUT),  # it slept
        (0.1, 7.0, 0.9, TIMED_OUT),
        (1.0, 30.0, 29.0, None),  # it was ready to run, but others ran
        (1.0, 40.0, 39.0, STARVED),
        (0.0, 40.0, 39.0, STARVED),
        (0.0, 40.0, 33.0, TIMED_OUT),
    ],
)
def test_how_a_program_with_three_seconds_ends(cpu_s, wall_s, waited_s, end):
    assert end_of(Used(cpu_s, wall_s, waited_s), 3.0, 40.0) == end


def test_the_clock_is_read_often_enough():
    assert pause_s(Used(0.0, 0.0, 0.0), 4.0, 50.0) == 1.0
    assert pause_s(Used(3.6, 3.6, 0.0), 4.0, 50.0) == pytest.approx(0.1)
    assert pause_s(Used(0.0, 7.6, 0.0), 4.0, 50.0) == pytest.approx(0.1)
    assert pause_s(Used(0.0, 49.6, 49.6), 4.0, 50.0) == pytest.approx(0.1)
    assert pause_s(Used(9.0, 9.0, 0.0), 4.0, 50.0) > 0


def test_the_clock_tells_computing_from_sleeping():
    proc = open_proc()
    assert own_pid(proc) == str(os.getpid())
    clock = Clock(os.getpid(), proc, own_pid(proc))
    before = clock.read()
    time.sleep(0.05)
    slept = clock.read()
    assert slept.wall_s - before.wall_s >= 0.05
    spun_until = time.process_time() + 0.05
    while time.process_time() < spun_until:
        pass
    assert clock.read().cpu_s - slept.cpu_s >= 0.05
    assert 0 <= slept.waited_s <= slept.wall_s + 0.1
    assert Clock(os.getpid(), None, "").read().waited_s == 0
    os.close(proc)


@contextmanager
def others_spinning(cpu, number):
    """Keep one CPU busy with other processes."""
    pids = []
    for _ in range(number):
        pid = os.fork()
        if pid == 0:
            os.sched_setaffinity(0, [cpu])
            while os.getppid() != 1:
                pass
            os._exit(0)
        pids.append(pid)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, 9)
            os.waitpid(pid, 0)


def test_a_program_that_shares_its_cpu_gets_its_time():
    """It needs 0.2 s of a CPU of which it gets a quarter; 0.3 s on the wall, or 0.6, would not do."""
    cpu = min(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, [cpu])  # the sandbox's processes inherit it
    sandbox = Sandbox(workers=1)
    try:
        sandbox.run("", b"", Limits())
        with others_spinning(cpu, 3):
            code = "import time\nwhile time.process_time() < 0.2: pass\nprint('done')"
            outcome = sandbox.run(code, b"", Limits(time_s=0.3, busy_s=60.0))
    finally:
        os.sched_setaffinity(0, before)
        sandbox.close()
    assert (outcome.end, outcome.stdout) == ("finished", b"done\n")
    assert outcome.cpu_s < 0.4


def test_a_program_that_gets_no_cpu_is_repeated_and_then_not_judged():
    """No machine gives a program 50 s of a CPU in 0.2 s."""
    sandbox = Sandbox(workers=1)
    outcome = sandbox.run(SPIN, b"", Limits(time_s=50.0, busy_s=0.2))
    assert (outcome.end, outcome.stderr) == ("sandbox_error", b"this machine was too busy to run it")
    assert (sandbox.num_runs, sandbox.num_repeated, sandbox.num_starved) == (2, 2, 2)
    assert sandbox.run("print(3)", b"", Limits()).stdout == b"3\n"  # the worker is still good
    sandbox.close()


def test_a_program_that_sleeps_is_stopped_though_it_uses_no_cpu():
    task = Task("t", (Message("user", "p"),), "code", "test", tests={
        "kind": "stdin", "cases": [{"input": "", "output": "3"}], "time_limit_s": 0.1,
    })  # fmt: skip
    assert verify(task, "```\nimport time; time.sleep(1000)\n```").status == "timeout"
    assert verify(task, "```\nimport time; time.sleep(0.12); print(3)\n```").status == "ok"


class ScriptedWorker:
    """Notes which programs run at the same time; the program `starved` gets no CPU the first time."""

    def __init__(self, seen, together, starved_times):
        self.seen, self.together, self.starved_times = seen, together, starved_times

    def run(self, program, limits, grace_s):
        name = program.code.decode()
        self.together.add(name)
        time.sleep(0.01)
        self.seen.append((name, frozenset(self.together)))
        self.together.discard(name)
        runs = [seen for seen, _ in self.seen].count(name)
        end = STARVED if name == "starved" and runs <= self.starved_times else ENDED
        with Streams(99) as streams:
            for writer in streams.writers:
                os.close(writer)
            return Reply(end, 0, 0.1, 0.1, 0), streams

    def close(self):
        pass


@pytest.mark.parametrize(("starved_times", "end"), [(0, "finished"), (1, "finished"), (2, "sandbox_error")])
def test_a_starved_program_is_repeated_alone(starved_times, end):
    seen, together, ended = [], set(), threading.Event()
    sandbox = Sandbox(workers=3, level="rlimits")
    sandbox._start_at = lambda level: ScriptedWorker(seen, together, starved_times)  # type: ignore[method-assign]

    def others(name):
        while not ended.is_set():
            sandbox.run(name, b"", Limits())

    threads = [threading.Thread(target=others, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    while len(seen) < 4:
        time.sleep(0.001)
    assert sandbox.run("starved", b"", Limits()).end == end
    ended.set()
    for thread in threads:
        thread.join()
    sandbox.close()
    runs = [beside for name, beside in seen if name == "starved"]
    assert len(runs) == min(starved_times, 1) + 1
    assert sandbox.num_starved == starved_times
    if starved_times:
        assert runs[1] == {"starved"}


def test_those_that_wait_to_be_alone_take_turns():
    gate, inside, most = Gate(), [], []

    def alone():
        with gate.alone():
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.005)
            inside.pop()

    with gate.together():
        threads = [threading.Thread(target=alone) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.02)
        assert most == []
    for thread in threads:
        thread.join()
    assert most == [1] * 4
    with gate.together():
        pass
