import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pmd.verifiers.sandbox.pool import Limits, Sandbox, SandboxUnavailable

ADD = "print(sum(map(int, input().split())))"


@pytest.fixture
def sandbox():
    made = Sandbox(workers=2)
    yield made
    made.close()


def processes() -> dict[int, bytes]:
    found = {}
    for entry in os.listdir("/proc"):
        try:
            command = Path(f"/proc/{entry}/cmdline").read_bytes()
        except OSError:
            continue
        if b"pmd.verifiers.sandbox" in command:
            found[int(entry)] = command
    return found


def own_processes() -> set[int]:
    """Return the sandbox's processes of this process; a supervisor is told its trainer's id."""
    return {pid for pid, command in processes().items() if f"\0{os.getpid()}\0".encode() in command}


def descendants_end(before: set[int], within_s: float = 10.0) -> bool:
    deadline = time.monotonic() + within_s
    while set(processes()) - before:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_runs_from_many_threads_keep_to_their_own(sandbox):
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


def test_a_run_leaves_nothing_to_the_next(sandbox):
    leave = "import os\nos.makedirs('a/b'); open('a/b/c', 'w').write('x'); os.symlink('/', 'l'); open('.h', 'w')"
    look = "import os; print(os.listdir('.'), sorted(globals().get('leak', [])))"
    for _ in range(4):
        sandbox.run(leave + "\nimport builtins; builtins.leak = [1]", b"", Limits())
    if sandbox.level == "namespaces":
        for _ in range(4):
            assert sandbox.run(look, b"", Limits()).stdout == b"[] []\n"


def test_a_function_does_not_see_the_input_of_the_run_before():
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


def test_a_program_sets_modes_of_its_own_files_alone(sandbox):
    if sandbox.run("", b"", Limits()).end == "finished" and sandbox.level == "namespaces":
        for _ in range(4):
            outcome = sandbox.run(MODES, b"1 2", Limits())
            assert (outcome.end, outcome.stdout, outcome.stderr) == ("finished", b"", b"")
            after = sandbox.run("print(open('/dev/stdin').read(), open('own', 'w').write('x'))", b"1 2", Limits())
            assert (after.stdout, after.stderr) == (b"1 2 1\n", b"")


def test_large_input_and_output(sandbox):
    text = b"7" * (8 << 20)
    outcome = sandbox.run("print(input())", text, Limits(output_bytes=16 << 20, wall_s=30))
    assert outcome.stdout == text + b"\n"
    assert sandbox.run("print(input())", text, Limits(output_bytes=1 << 20, wall_s=30)).end == "output_limit"


def test_runs_are_the_same_every_time(sandbox):
    code = "import random; print(hash('x'), random.random(), {'a', 'b', 'c'})"
    assert len({sandbox.run(code, b"", Limits()).stdout for _ in range(6)}) == 1


def test_a_killed_worker_is_replaced(sandbox):
    sandbox.run(ADD, b"1 2", Limits())
    for worker in list(sandbox._all):
        os.kill(worker.process.pid, signal.SIGKILL)
        worker.process.wait()
    time.sleep(0.1)  # the kernel takes the zygote after its supervisor
    outcome = sandbox.run(ADD, b"1 2", Limits())
    assert (outcome.end, outcome.stdout) == ("finished", b"3\n")
    assert sandbox.num_repeated >= 1


def test_a_hung_worker_is_counted_and_replaced():
    before = set(processes())
    sandbox = Sandbox(workers=1, grace_s=0.3)
    sandbox.run(ADD, b"1 2", Limits())
    for pid in set(processes()) - before:
        os.kill(pid, signal.SIGSTOP)
    outcome = sandbox.run(ADD, b"1 2", Limits(wall_s=0.3))
    assert (outcome.end, outcome.stdout) == ("finished", b"3\n")
    assert sandbox.num_hung == 1
    sandbox.close()
    assert descendants_end(before)


def test_a_closed_sandbox_refuses(sandbox):
    before = set(processes())
    sandbox.run(ADD, b"1 2", Limits())
    sandbox.close()
    assert set(processes()) - before == set()
    with pytest.raises(SandboxUnavailable, match="closed"):
        sandbox.run(ADD, b"1 2", Limits())


@pytest.mark.parametrize("level", ["namespaces", "landlock"])
def test_closing_ends_what_runs(level):
    outcomes = []
    sandbox = Sandbox(workers=2, level=level)
    loop = ("while True: pass", b"", Limits(wall_s=60))
    threads = [threading.Thread(target=lambda: outcomes.append(sandbox.run(*loop).end)) for _ in range(2)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    while len(own := own_processes()) < 6 and time.monotonic() < deadline:  # supervisor, zygote and program, twice
        time.sleep(0.05)
    assert len(own) == 6
    sandbox.close()
    for thread in threads:
        thread.join(5)
    assert outcomes == ["sandbox_error"] * 2
    deadline = time.monotonic() + 2
    while own_processes() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert own_processes() == set()


def test_closing_while_a_worker_starts_leaves_none():
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


def test_the_line_at_start_says_level_and_gaps():
    for level, words in (("landlock", "level landlock"), ("rlimits", "level rlimits")):
        sandbox = Sandbox(workers=1, level=level)
        assert words in sandbox.describe()
        assert "missing: namespaces" in sandbox.describe()
        sandbox.close()


def test_the_weak_level_is_never_chosen_unasked():
    sandbox = Sandbox(workers=1)

    class Unavailable(SandboxUnavailable):
        pass

    def refuse(level):
        assert level != "rlimits"
        raise Unavailable("not here")

    sandbox._start_at = refuse  # type: ignore[method-assign]
    with pytest.raises(SandboxUnavailable, match="by asking for level rlimits by name"):
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
def test_nothing_outlives_a_scorer_that_is_ended(tmp_path, number):
    before, temporary = set(processes()), tmp_path / "temporary"
    temporary.mkdir()
    tests = {"kind": "stdin", "cases": [{"input": "", "output": "3"}], "time_limit_s": 60}
    (tmp_path / "t.jsonl").write_text(json.dumps({"id": "t", "prompt": "p", "verifier": "code", "tests": tests}))
    spin = "import threading\nfor _ in range(3): threading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()"
    line = json.dumps({"id": "t", "completion": f"```\n{spin}\n```"})
    (tmp_path / "c.jsonl").write_text("\n".join([line] * 4))
    command = [sys.executable, "-m", "pmd.cli.score", f"--tasks={tmp_path}/t.jsonl"]
    scorer = subprocess.Popen(
        [*command, f"--completions={tmp_path}/c.jsonl", f"--out={tmp_path}/v.jsonl"],
        stderr=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    assert scorer.stderr
    assert b"sandbox: level" in scorer.stderr.readline()
    time.sleep(0.5)
    assert set(processes()) - before
    scorer.send_signal(number)
    assert scorer.wait(20) == {signal.SIGTERM: 130, signal.SIGINT: 130, signal.SIGKILL: -9}[number]
    assert descendants_end(before)
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


def test_a_program_finds_nothing_of_the_runs_before_it():
    def found_after(num_runs):
        sandbox = Sandbox(workers=1)
        for n in range(num_runs):
            filler = f"x{n} = 1\n" * (10 * n)
            sandbox.run(f"{filler}print('secret-' 'handsome', input())", b"secret-handsome", Limits())
        outcome = sandbox.run(SEARCH, b"", Limits(wall_s=30, memory_mb=1024))
        sandbox.close()
        assert outcome.end == "finished"
        return int(outcome.stdout)

    assert found_after(20) == found_after(0) >= 1  # what it looks for lies in its own memory


def test_no_descriptor_is_left_open(sandbox):
    sandbox.run(ADD, b"1 2", Limits())
    sandbox.run(ADD, b"1 2", Limits())
    before = len(os.listdir("/proc/self/fd"))
    for code in (ADD, "1 / 0", "while True: print(1)", "import os; os._exit(0)"):
        sandbox.run(code, b"1 2", Limits(wall_s=0.5))
    assert len(os.listdir("/proc/self/fd")) == before
