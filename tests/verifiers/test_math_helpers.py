"""The helper processes of the mathematics verifier: one per question at a time, replaced when they hang, never left."""

import os
import select
import signal
import subprocess
import sys
import threading
import time

import pytest
from child_processes import all_end, start

from pmd.types import Message, Task
from pmd.verifiers.math import HELPERS, verify_math
from pmd.verifiers.math_helpers import MathHelpers, MathWorker

#: sympy computes this power in C code, where no Python signal handler runs.
HANGING = "\\boxed{\\int_0^1 9^{9^{9^{9}}} dx}"


def task(verifier: str, answer: str) -> Task:
    return Task("t", (Message("user", "Q?"),), verifier, "train", answer=answer)


def test_four_hanging_answers_do_not_hold_up_a_right_one():
    helpers, ended = MathHelpers(deadline_s=3600), []

    def hang() -> None:
        with pytest.raises(RuntimeError, match="the math helper"):
            helpers.ask({"gold": "1", "text": HANGING})
        ended.append(True)

    threads = [threading.Thread(target=hang) for _ in range(4)]
    for thread in threads:
        thread.start()
    while sum(one.process is not None for one in helpers.all) < 4 or helpers.idle:
        time.sleep(0.01)
    reply = helpers.ask({"gold": "1", "text": "\\boxed{1}"})  # would wait an hour behind any of them
    assert reply
    assert reply["correct"]
    assert ended == []
    helpers.close()
    for thread in threads:
        thread.join(60)
    assert ended == [True] * 4


def test_a_helper_is_used_again():
    helpers = MathHelpers()
    for _ in range(3):
        assert helpers.ask({"gold": "1", "text": "1"})
    assert len(helpers.all) == 1
    helpers.close()


def test_a_gold_that_hangs_is_found_among_others():
    helpers = MathHelpers(deadline_s=1.0)
    problems = helpers.describe_gold_problems(["1", HANGING, "NaN"])
    assert problems == [None, "takes longer than 1 s to compute", "is no number"]
    helpers.close()


def test_a_hanging_math_helper_is_replaced_for_the_next_answer():
    worker = MathWorker(deadline_s=1.0)
    assert worker.ask({"gold": "1", "text": HANGING}) is None
    assert worker.ask({"gold": "1", "text": "\\boxed{1}"}) == {"correct": True, "answer": "1", "gold": "1"}
    worker.close()


def test_the_math_helper_can_be_closed_in_the_middle_of_a_question():
    worker, ended = MathWorker(deadline_s=3600), []
    assert worker.ask({"gold": "1", "text": "1"})
    running = worker.process

    def ask() -> None:
        with pytest.raises(RuntimeError, match="the math helper"):
            worker.ask({"gold": "1", "text": HANGING})
        ended.append(True)

    thread = threading.Thread(target=ask)
    thread.start()
    while not worker.lock.locked():
        time.sleep(0.01)
    worker.close()
    thread.join(60)
    assert ended == [True]
    assert running
    assert running.returncode == -signal.SIGKILL


def test_math_works_in_threads():
    verdicts = []
    threads = [
        threading.Thread(target=lambda n=n: verdicts.append(verify_math(task("math", str(n)), f"\\boxed{{{n}}}")))
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [verdict.correct for verdict in verdicts] == [True] * 4


def test_closing_ends_the_math_helper():
    verify_math(task("math", "1"), "\\boxed{1}")
    processes = [helper.process for helper in HELPERS.all]
    assert processes
    HELPERS.close()
    assert all(process is None or process.returncode is not None for process in processes)


COMPUTING = f"""
import threading, time
from pmd.verifiers.math_helpers import MathWorker
worker = MathWorker(deadline_s=3600)
worker.ask({{"gold": "1", "text": "1"}})
print(worker.process.pid, flush=True)
worker.ask({{"gold": "1", "text": {HANGING!r}}})
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_math_helper_ends_while_computing_if_its_trainer_is_killed(number):
    trainer = start([sys.executable, "-c", COMPUTING], stdout=subprocess.PIPE)
    assert trainer.stdout
    helper = os.pidfd_open(int(trainer.stdout.readline()))
    assert not select.select([helper], [], [], 0.5)[0]  # in C code, where none of its own Python code can run
    trainer.send_signal(number)
    trainer.wait(20)
    assert all_end([helper])
    trainer.stdout.close()


def test_a_math_helper_whose_trainer_is_gone_does_not_start():
    reading, writing = os.pipe()
    os.close(writing)
    command = [sys.executable, "-m", "pmd.verifiers.math_worker", str(reading)]
    done = subprocess.run(
        command, pass_fds=[reading], stdin=subprocess.PIPE, capture_output=True, timeout=60, check=True
    )
    assert done.stdout == b""  # not "ready"
    os.close(reading)
