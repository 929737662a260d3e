"""The parts of the confinement: system call filter, Landlock, protocol, visible files, environment."""

import os
import socket
from pathlib import Path

import pytest

from pmd.verifiers.sandbox import filesystem, landlock, protocol, seccomp
from pmd.verifiers.sandbox.pool import Limits, Sandbox
from pmd.verifiers.sandbox.protocol import Reply


@pytest.mark.parametrize("own_root", [False, True])
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_is_a_valid_program(machine, own_root):
    program = seccomp.build_filter(machine, own_root=own_root)
    assert len(program) % 8 == 0
    assert len(program) // 8 < 4096  # the kernel's limit
    offsets = seccomp.pid_offsets(program)
    assert len(offsets) == 10
    assert seccomp.pid_offsets(seccomp.with_pid(program, offsets, 7)) == ()


def test_landlock_is_detected_if_the_kernel_has_it():
    assert (
        (landlock.version() > 0) == ("landlock" in Path("/sys/kernel/security/lsm").read_text().split(","))
        if Path("/sys/kernel/security/lsm").exists()
        else landlock.version() >= 0
    )


def test_replies_survive_the_socket():
    ours, theirs = socket.socketpair()
    reply = Reply(0, 256, 0.5, 0.25, 1000)
    protocol.send_reply(theirs, reply)
    assert protocol.receive_reply(ours) == reply
    theirs.close()
    with pytest.raises(EOFError):
        protocol.receive_reply(ours)
    ours.close()


def test_only_the_outermost_of_nested_paths_are_kept():
    paths = ["/usr/lib/python3.11", "/usr/lib/python3.11/lib-dynload", "/lib64", "/usr/lib", "/usr/lib64", "/etc/x"]
    assert filesystem.outermost(paths) == ["/lib64", "/usr/lib", "/usr/lib64", "/etc/x"]


def test_only_the_shared_libraries_of_a_separate_python_are_visible(tmp_path):
    (tmp_path / "lib" / "python3.11").mkdir(parents=True)
    for name in ("libz.so.1", "libz.so", "libz.a", "notes"):
        (tmp_path / "lib" / name).touch()
    assert filesystem.shared_libraries(str(tmp_path)) == [f"{tmp_path}/lib/libz.so", f"{tmp_path}/lib/libz.so.1"]
    assert filesystem.shared_libraries("/usr") == []


def test_the_environment_is_empty_except_for_numpys_threads():
    look = "import ctypes, os; g = ctypes.CDLL(None).getenv; g.restype = ctypes.c_char_p\n"
    sandbox = Sandbox(workers=1)
    names = "b'OPENBLAS_NUM_THREADS', b'PATH', b'HOME'"
    outcome = sandbox.run(f"{look}print(len(os.environ), [g(n) for n in ({names})])", b"", Limits())
    sandbox.close()
    assert outcome.stdout == b"0 [b'1', None, None]\n"


@pytest.mark.skipif(os.getuid() != 0, reason="needs root")
@pytest.mark.parametrize("level", ["namespaces", "landlock"])
def test_roots_programs_run_as_another_user_that_can_import_what_root_installed(level):
    sandbox = Sandbox(workers=1, level=level)
    look = "import colorsys, os; print(0 in (*os.getresuid(), *os.getresgid()), os.getgroups())"
    outcome = sandbox.run(look, b"", Limits())
    sandbox.close()
    assert (outcome.stdout, outcome.stderr) == (b"False []\n", b"")


def test_packages_are_found_where_python_finds_them():
    numpy = pytest.importorskip("numpy")
    assert filesystem.package_paths(filesystem.site_packages())[0] == str(Path(numpy.__file__).parent)
