"""The process between trainer and zygote, freshly exec'd: it inherits no CUDA context, threads or descriptors.

Started as `python -S -s -P -B -c ... LEVEL TRAINER_PID SITE_PACKAGES` with its socket as stdin. It sets up the level or
reports why it cannot, forks the zygote, and kills it as soon as the trainer is gone, however it ended.
"""

import contextlib
import os
import select
import signal
import socket
import sys
from collections.abc import Sequence

from pmd.verifiers.sandbox import child, clock, filesystem, kernel, landlock, seccomp
from pmd.verifiers.sandbox.child import Confinement
from pmd.verifiers.sandbox.protocol import HELLO
from pmd.verifiers.sandbox.zygote import serve

NOBODY = 65534


def main() -> None:
    """Set up the level, fork the zygote, and wait until either trainer or zygote ends."""
    level, trainer_pid, site_packages = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    with socket.socket(fileno=os.dup(0)) as peer:
        _point_at_null(0)
        # Inside bubblewrap the trainer's process is invisible; the zygote then notices the closed socket.
        trainer = os.pidfd_open(trainer_pid) if level != "bubblewrap" else None
        if trainer is not None and os.getppid() != trainer_pid:
            return
        try:
            zygote = _fork_zygote(level, site_packages, peer)
        except Exception as error:  # reported to the trainer, which then tries the next level
            _say_hello(peer, ready=False, text=f"{error}" if isinstance(error, OSError) else repr(error))
            return
    _wait(trainer, zygote)


def _wait(trainer: int | None, zygote: int) -> None:
    ended = os.pidfd_open(zygote)
    poll = select.poll()
    if trainer is not None:
        poll.register(trainer, select.POLLIN)
    poll.register(ended, select.POLLIN)
    poll.poll()
    with contextlib.suppress(ProcessLookupError):
        os.kill(zygote, signal.SIGKILL)
    os.waitpid(zygote, 0)


def _fork_zygote(level: str, site_packages: str, peer: socket.socket) -> int:
    base_bytes = child.prepare(site_packages if filesystem.package_paths(site_packages) else "")
    user = _user_for_programs()
    readable = filesystem.readable_paths(site_packages)
    writable = filesystem.writable_place(readable) if level in ("namespaces", "bubblewrap") else ""
    missing: list[str] = []
    proc = clock.open_proc()
    stdin_writer, reads_as_root = None, False
    if level == "namespaces":
        filesystem.enter_namespaces()
        stdin_writer = filesystem.build_root(readable, writable)
    elif level == "bubblewrap":
        missing.append("a limit on the number of files and threads")
    else:
        missing.append("namespaces")
        if user is None and os.getuid() == 0:
            missing.append("a separate user")
        reads_as_root = user is not None and not _reachable_by(user, readable)
    read_write = [*([writable] if writable else []), *filesystem.DEVICES]
    readable_now = [*readable, filesystem.STDIN_FILE] if level == "namespaces" else readable
    ruleset, program = _landlock_and_seccomp(level, (readable_now, read_write, [site_packages]), missing)
    pid = os.fork()
    if pid:
        return pid
    try:
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
        confinement = Confinement(
            stdin_writer=stdin_writer,
            writable=writable,
            user=user,
            reads_as_root=reads_as_root,
            ruleset=ruleset,
            filter=program,
            proc=proc,
            zygote=os.getpid(),
            base_bytes=base_bytes,
        )
        _say_hello(peer, ready=True, text=", ".join(missing))
        serve(peer, confinement)
    finally:
        os._exit(0)


def _landlock_and_seccomp(
    level: str, files: tuple[Sequence[str], Sequence[str], Sequence[str]], missing: list[str]
) -> tuple[int | None, bytes | None]:
    """Return Landlock's rule set and the seccomp filter; only level `rlimits` may run without them."""
    ruleset = program = None
    try:
        ruleset = landlock.make_ruleset(*files)
    except OSError:
        if level != "rlimits":
            raise
        missing.append("Landlock")
    try:
        program = seccomp.build_filter(kernel.MACHINE, own_root=level == "namespaces")
    except KeyError:
        if level != "rlimits":
            raise
        missing.append("seccomp")
    return ruleset, program


def _user_for_programs() -> int | None:
    """Return an unused user id; nobody's if unused ids are not mapped here; None when not root."""
    if os.getuid() != 0:
        return None
    for user in (filesystem.FIRST_FREE_USER + os.getpid(), NOBODY):
        if all(_is_mapped(user, f"/proc/self/{kind}_map") for kind in ("uid", "gid")):
            return user
    return None


def _is_mapped(number: int, path: str) -> bool:
    with open(path) as file:
        ranges = [tuple(map(int, line.split())) for line in file]
    return any(first <= number < first + count for first, _, count in ranges)


def _reachable_by(user: int, paths: list[str]) -> bool:
    """Test in a forked child whether that user can read all paths."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            os._exit(0 if all(os.access(path, os.R_OK) for path in paths) else 1)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _say_hello(peer: socket.socket, *, ready: bool, text: str) -> None:
    peer.sendall(HELLO.pack(ready, len(text.encode())) + text.encode())


def _point_at_null(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, descriptor)
    os.close(null)
