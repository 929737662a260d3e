import socket
from pathlib import Path

import pytest

from pmd.sandbox import landlock, protocol, seccomp
from pmd.sandbox.protocol import Reply


@pytest.mark.parametrize("own_root", [False, True])
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_is_a_valid_program(machine, own_root):
    program = seccomp.build_filter(machine, own_root=own_root)
    assert len(program) % 8 == 0
    assert len(program) // 8 < 4096  # the kernel's limit
    offsets = seccomp.pid_offsets(program)
    assert len(offsets) == 4
    assert seccomp.pid_offsets(seccomp.with_pid(program, offsets, 7)) == ()


def test_landlock_is_found_where_the_kernel_has_it():
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
