"""The pool of workers: results, isolation between runs, failures, and what happens when it or its trainer ends."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from child_processes import all_end, sandbox_processes, start, watch

from pmd.verifiers.code import close_sandbox
from pmd.verifiers.sandbox.pool import Limits, Sandbox, SandboxUnavailable

ADD = "print(sum(map(int, input().split())))"


@pytest.fixture(autouse=True)
def no_other_sandbox():
    """Close the sandbox that the `code` verifier may have started in an earlier test: processes are counted here."""
    close_sandbox()


@pytest.fixture
def sandbox():
    made = Sandbox(workers=2)
    yield made
    made.close()


def own_processes() -> set[int]:
    return sandbox_processes(os.getpid())


def wait_for(condition, within_s: float = 10.0) -> bool:
    """Wait until the condition holds; return whether it did in time."""
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_concurrent_runs_get_their_own_results(sandbox):
    results = {}

    def work(number):
        results[number] = [sandbox.run(ADD, f"{number} {n}".encode(), Limits()).stdout for n in range(5)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: [f"{number + n}\n".encode() for n in range(5)] for number in range(8)}
    assert sandbox.num_runs == 40
    assert sandbox.num_repeated == 0


def test_a_run_leaves_no_files_or_names_for_the_next_one(sandbox):
    leave = "import os\nos.makedirs('a/b'); open('a/b/c', 'w').write('x'); os.symlink('/', 'l'); open('.h', 'w')"
    look = "import os; print(os.listdir('.'), sorted(globals().get('leak', [])))"
    for _ in range(4):
        sandbox.run(leave + "\nimport builtins; builtins.leak = [1]", b"", Limits())
    if sandbox.level == "namespaces":
        for _ in range(4):
            assert sandbox.run(look, b"", Limits()).stdout == b"[] []\n"


def test_a_function_does_not_see_the_input_of_the_previous_run():
    sandbox = Sandbox(workers=1)
    sandbox.run(ADD, b"1 2", Limits())
    outcome = sandbox.run("def look(): return open('/dev/stdin').read()", b"[]", Limits(), "look")
    assert outcome.result == (b'""' if sandbox.level == "namespaces" else b"")
    sandbox.close()


MODES = """
import os
for path in ('/', '/tmp', '/box', '/dev', '/dev/stdin', '/dev/null', os.__file__, os.path.dirname(os.__file__), '.'):
    for mode in (0, 0o777):
        try: os.chmod(path, mode)
        except OSError: continue
        if not os.path.samefile(path, '.'): print(path)
for special in (0o4755, 0o2755, 0o1755, 0o6000):
    open('own', 'w')
    try: os.chmod('own', special); print(oct(special))
    except PermissionError: pass
    try: os.fchmod(0, special); print('stdin')
    except OSError: pass
os.chmod('own', 0); os.mkdir('closed', 0)
"""


def test_a_program_can_set_modes_only_of_its_own_files(sandbox):
    if sandbox.run("", b"", Limits()).end == "finished" and sandbox.level == "namespaces":
        for _ in range(4):
            outcome = sandbox.run(MODES, b"1 2", Limits())
            assert (outcome.end, outcome.stdout, outcome.stderr) == ("finished", b"", b"")
            after = sandbox.run("print(open('/dev/stdin').read(), open('own', 'w').write('x'))", b"1 2", Limits())
            assert (after.stdout, after.stderr) == (b"1 2 1\n", b"")


def test_large_input_and_output(sandbox):
    text = b"7" * (8 << 20)
    outcome = sandbox.run("print(input())", text, Limits(output_bytes=16 << 20, time_s=30))
    assert outcome.stdout == text + b"\n"
    assert sandbox.run("print(input())", text, Limits(output_bytes=1 << 20, time_s=30)).end == "output_limit"


def test_runs_are_deterministic(sandbox):
    code = "import random; print(hash('x'), random.random(), {'a', 'b', 'c'})"
    assert len({sandbox.run(code, b"", Limits()).stdout for _ in range(6)}) == 1


def test_a_killed_worker_is_replaced(sandbox):
    sandbox.run(ADD, b"1 2", Limits())
    for worker in list(sandbox._all):
        os.kill(worker.process.pid, signal.SIGKILL)
        worker.process.wait()
    assert wait_for(lambda: not own_processes())  # the kernel kills the zygotes after their supervisors
    outcome = sandbox.run(ADD, b"1 2", Limits())
    assert (outcome.end, outcome.stdout) == ("finished", b"3\n")
    assert sandbox.num_repeated >= 1


def test_a_hung_worker_is_counted_and_replaced():
    before = own_processes()
    sandbox = Sandbox(workers=1, grace_s=0.3)
    sandbox.run(ADD, b"1 2", Limits())
    for pid in own_processes() - before:
        os.kill(pid, signal.SIGSTOP)
    outcome = sandbox.run(ADD, b"1 2", Limits(time_s=0.3, busy_s=0.3))
    assert (outcome.end, outcome.stdout) == ("finished", b"3\n")
    assert sandbox.num_hung == 1
    sandbox.close()
    assert wait_for(lambda: own_processes() == before)


def test_a_closed_sandbox_refuses(sandbox):
    before = own_processes()
    sandbox.run(ADD, b"1 2", Limits())
    sandbox.close()
    assert own_processes() == before
    with pytest.raises(SandboxUnavailable, match="closed"):
        sandbox.run(ADD, b"1 2", Limits())


@pytest.mark.parametrize("level", ["namespaces", "landlock"])
def test_closing_ends_running_programs(level):
    outcomes = []
    sandbox = Sandbox(workers=2, level=level)
    loop = ("while True: pass", b"", Limits(time_s=60))
    threads = [threading.Thread(target=lambda: outcomes.append(sandbox.run(*loop).end)) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert wait_for(lambda: len(own_processes()) == 6, within_s=60)  # supervisor, zygote and program, twice
    sandbox.close()
    for thread in threads:
        thread.join(5)
    assert outcomes == ["sandbox_error"] * 2
    assert wait_for(lambda: not own_processes(), within_s=2)


def test_closing_while_a_worker_starts_leaves_no_process():
    for pause_s in (0.0, 0.02, 0.1, 0.2, 0.3):
        sandbox = Sandbox(workers=1)
        ended = []

        def use(sandbox=sandbox, ended=ended) -> None:
            try:
                ended.append(sandbox.run(ADD, b"1 2", Limits()).end)
            except SandboxUnavailable:
                ended.append("closed")

        thread = threading.Thread(target=use)
        thread.start()
        time.sleep(pause_s)
        sandbox.close()
        thread.join(60)
        assert ended[0] in ("closed", "sandbox_error", "finished")
        assert own_processes() == set()


def test_the_description_names_the_level_and_what_it_lacks():
    for level, words in (("landlock", "level landlock"), ("rlimits", "level rlimits")):
        sandbox = Sandbox(workers=1, level=level)
        assert words in sandbox.describe()
        assert "missing: namespaces" in sandbox.describe()
        sandbox.close()


def test_the_weak_level_is_used_only_on_request():
    sandbox = Sandbox(workers=1)

    class Unavailable(SandboxUnavailable):
        pass

    def refuse(level):
        assert level != "rlimits"
        raise Unavailable("not here")

    sandbox._start_at = refuse  # type: ignore[method-assign]
    with pytest.raises(SandboxUnavailable, match="by requesting level rlimits by name"):
        sandbox.describe()
    sandbox.close()


def test_a_sandbox_is_not_shared_across_a_fork(sandbox):
    sandbox.run(ADD, b"1 2", Limits())
    pid = os.fork()
    if pid == 0:
        try:
            sandbox.run(ADD, b"1 2", Limits())
        except RuntimeError:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert sandbox.run(ADD, b"1 2", Limits()).stdout == b"3\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_a_scorer_that_is_killed(tmp_path, number):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    tests = {"kind": "stdin", "cases": [{"input": "", "output": "3"}], "time_limit_s": 60}
    (tmp_path / "t.jsonl").write_text(json.dumps({"id": "t", "prompt": "p", "verifier": "code", "tests": tests}))
    spin = "import threading\nfor _ in range(3): threading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()"
    line = json.dumps({"id": "t", "completion": f"```\n{spin}\n```"})
    (tmp_path / "c.jsonl").write_text("\n".join([line] * 4))
    command = [sys.executable, "-m", "pmd", "score", f"--tasks={tmp_path}/t.jsonl", "--workers=2"]
    scorer = start(
        [*command, f"--completions={tmp_path}/c.jsonl", f"--out={tmp_path}/v.jsonl"],
        {"TMPDIR": str(temporary)},
        stderr=subprocess.PIPE,
    )
    assert scorer.stderr
    assert b"sandbox: level" in scorer.stderr.readline()
    assert wait_for(lambda: len(sandbox_processes(scorer.pid)) >= 5, within_s=30)  # two workers, at least one program
    watched = watch(sandbox_processes(scorer.pid))
    scorer.send_signal(number)
    assert scorer.wait(60) == {signal.SIGTERM: 130, signal.SIGINT: 130, signal.SIGKILL: -9}[number]
    assert all_end(watched)
    assert sandbox_processes(scorer.pid) == set()
    scorer.stderr.close()
    assert list(temporary.iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"t.jsonl", "c.jsonl", "v.jsonl", "temporary"}


SEARCH = """
import ctypes, os, sys
needle = bytes(reversed(b'emosdnah-terces'))
class Range(ctypes.Structure): _fields_ = [('base', ctypes.c_void_p), ('length', ctypes.c_size_t)]
L = ctypes.CDLL(None)
def readable(page):  # write() reports unreadable memory as EFAULT
    return L.write(w, ctypes.c_void_p(page), ctypes.c_size_t(1)) == 1 and os.read(r, 1) is not None
r, w = os.pipe()
found = 0
seen = {id(o) & ~0xfffff for o in __import__('gc').get_objects()}
for start in sorted(seen):
    for page in range(start, start + 0x100000, 4096):
        if readable(page) and needle in ctypes.string_at(page, 4096): found += 1
print(found)
"""


def test_a_program_finds_nothing_of_earlier_runs_in_its_memory():
    def found_after(num_runs):
        sandbox = Sandbox(workers=1)
        for n in range(num_runs):
            filler = f"x{n} = 1\n" * (10 * n)
            sandbox.run(f"{filler}print('secret-' 'handsome', input())", b"secret-handsome", Limits())
        outcome = sandbox.run(SEARCH, b"", Limits(time_s=30, memory_mb=1024))
        sandbox.close()
        assert outcome.end == "finished"
        return int(outcome.stdout)

    assert found_after(20) == found_after(0) >= 1  # the needle itself is in its own memory


def test_no_descriptor_is_left_open(sandbox):
    sandbox.run(ADD, b"1 2", Limits())
    sandbox.run(ADD, b"1 2", Limits())
    before = len(os.listdir("/proc/self/fd"))
    for code in (ADD, "1 / 0", "while True: print(1)", "import os; os._exit(0)"):
        sandbox.run(code, b"1 2", Limits(time_s=0.5))
    assert len(os.listdir("/proc/self/fd")) == before
