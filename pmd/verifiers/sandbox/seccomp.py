"""The system call filter: a classic BPF program, into which each child patches its pid.

A call that is not listed fails with EPERM. A program can create threads but no processes, execute nothing, and open no
sockets (except a Unix pair, for event loops); it can ask about, signal, trace or adopt no other process, and create no
namespace, key, timer, shared memory, System V or io_uring object. Landlock governs files. Calls that Landlock cannot
govern (chown, xattr) are not listed; modes and times of files can be set only where everything but the program's own
files is on read-only mounts.
"""

import errno
import struct

PID = 0xFFFF_FFF1  # placeholder for the child's own pid, replaced by `with_pid`
ALLOW, KILL, DENY, ABSENT = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
PRETEND = 0x00050000  # return 0 and do nothing
LOAD, JUMP_IF_EQUAL, JUMP_IF_SET, JUMP_IF_AT_LEAST, RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CLONE_THREAD = 0x00010000

#: name: (x86_64, aarch64); None where the architecture has no such call. The most frequent calls come first.
ALLOWED: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "futex": (202, 98), "munmap": (11, 215), "brk": (12, 214), "lseek": (8, 62),
    "fstat": (5, 80), "close": (3, 57), "openat": (257, 56), "newfstatat": (262, 79), "mprotect": (10, 226),
    "mremap": (25, 216), "rt_sigprocmask": (14, 135), "rt_sigaction": (13, 134), "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132), "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153),
    "nanosleep": (35, 101), "sched_yield": (24, 124), "getrandom": (318, 278), "exit": (60, 93),
    "exit_group": (231, 94), "set_robust_list": (273, 99), "rseq": (334, 293), "restart_syscall": (219, 128),
    "membarrier": (324, 283), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67), "pwrite64": (18, 68),
    "preadv": (295, 69), "pwritev": (296, 70), "sendfile": (40, 71), "open": (2, None), "creat": (85, None),
    "stat": (4, None), "lstat": (6, None), "statx": (332, 291), "access": (21, None), "faccessat": (269, 48),
    "faccessat2": (439, 439), "readlink": (89, None), "readlinkat": (267, 78), "getcwd": (79, 17), "chdir": (80, 49),
    "fchdir": (81, 50), "getdents": (78, None), "getdents64": (217, 61), "mkdir": (83, None), "mkdirat": (258, 34),
    "rmdir": (84, None), "unlink": (87, None), "unlinkat": (263, 35), "rename": (82, None), "renameat": (264, 38),
    "renameat2": (316, 276), "symlink": (88, None), "symlinkat": (266, 36), "truncate": (76, 45), "ftruncate": (77, 46),
    "fallocate": (285, 47), "umask": (95, 166), "statfs": (137, 43), "fstatfs": (138, 44), "dup": (32, 23),
    "dup2": (33, None), "dup3": (292, 24), "close_range": (436, 436), "pipe": (22, None), "pipe2": (293, 59),
    "select": (23, None), "pselect6": (270, 72), "poll": (7, None), "ppoll": (271, 73), "epoll_create": (213, None),
    "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, None), "epoll_pwait": (281, 22),
    "eventfd2": (290, 19), "recvfrom": (45, 207), "shutdown": (48, 210), "getsockname": (51, 204),
    "getpeername": (52, 205), "getsockopt": (55, 209), "getitimer": (36, 102), "setitimer": (38, 103),
    "alarm": (37, None), "pause": (34, None), "timerfd_create": (283, 85), "timerfd_settime": (286, 86),
    "timerfd_gettime": (287, 87), "rt_sigpending": (127, 136), "rt_sigtimedwait": (128, 137),
    "rt_sigsuspend": (130, 133), "getpid": (39, 172), "gettid": (186, 178), "getppid": (110, 173), "getuid": (102, 174),
    "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "getgroups": (115, 158),
    "getresuid": (118, 148), "getresgid": (120, 150), "getpgrp": (111, None), "uname": (63, 160), "sysinfo": (99, 179),
    "getrusage": (98, 165), "getrlimit": (97, 163), "setrlimit": (160, 164), "wait4": (61, 260), "waitid": (247, 95),
    "arch_prctl": (158, None), "getcpu": (309, 168), "mincore": (27, 232), "msync": (26, 227),
    "set_tid_address": (218, 96), "get_robust_list": (274, 100),
}  # fmt: skip
#: name: (numbers, index of an argument, its allowed values)
IF_EQUAL: dict[str, tuple[tuple[int, int], int, tuple[int, ...]]] = {
    "kill": ((62, 129), 0, (PID,)),
    "tkill": ((200, 130), 0, (PID,)),
    "tgkill": ((234, 131), 0, (PID,)),
    "getpgid": ((121, 155), 0, (0, PID)),
    "getsid": ((124, 156), 0, (0, PID)),
    "getpriority": ((140, 141), 1, (0, PID)),
    "sched_getaffinity": ((204, 123), 0, (0, PID)),
    "sched_getparam": ((143, 121), 0, (0, PID)),
    "sched_getscheduler": ((145, 120), 0, (0, PID)),
    # not: to push pages into swap, to merge them with those of other processes, to report them as broken
    "madvise": ((28, 233), 2, (0, 1, 2, 3, 4, 8, 14, 15, 16, 17)),
    "prlimit64": ((302, 261), 0, (0, PID)),
    "prctl": ((157, 167), 0, (3, 15, 16, 23)),  # dumpable?, name, bounding set?
    "ioctl": ((16, 29), 1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),  # is it a terminal?, pending, blocking
    "fcntl": ((72, 25), 1, (0, 1, 2, 3, 4, 5, 1030)),  # not: owner and signal of a file, pipe size, leases
    "socketpair": ((53, 199), 0, (1,)),  # AF_UNIX
    "sendto": ((44, 206), 4, (0,)),  # no address
}
#: Calls that succeed without doing anything. A program is the only process that sees its own files, and they are in
#: memory; on files of the host, a lock would block the host and tell one program about another, and a flush would write
#: the host's files to disk. SET_LOCKS are F_SETLK and F_SETLKW of `fcntl`.
PRETENDED = {"flock": (73, 32), "fsync": (74, 82), "fdatasync": (75, 83)}
FCNTL, SET_LOCKS = (72, 25), (6, 7)
#: Anonymous shared memory is refused: its pages outlive their mapping and count towards no limit (see mappings.py).
MMAP, MMAP_FLAGS, MAP_SHARED, MAP_ANONYMOUS = (9, 222), 3, 0x01, 0x20
#: Clocks. From 16 on, a clock's number names a process or thread.
CLOCKS, FIRST_OTHER_CLOCK = ((228, 113), (229, 114), (230, 115)), 16  # clock_gettime, clock_getres, clock_nanosleep
#: name: (numbers, index of the mode argument): set-user-id, set-group-id and sticky bits are refused.
MODES: dict[str, tuple[tuple[int, int | None], int]] = {
    "chmod": ((90, None), 1),
    "fchmod": ((91, 52), 1),
    "fchmodat": ((268, 53), 2),
    "fchmodat2": ((452, 452), 2),
}
SPECIAL_MODES = 0o7000
#: File times and names of extended attributes, which `shutil.copy2` needs.
OWN_FILES: dict[str, tuple[int, int]] = {
    "utimensat": (280, 88), "listxattr": (194, 11), "llistxattr": (195, 12), "flistxattr": (196, 13),
}  # fmt: skip
CLONE, CLONE3 = (56, 220), (435, 435)


def build_filter(machine: str, *, own_root: bool = False) -> bytes:
    """Return the filter with `PID` as a placeholder; with `own_root`, it may also set modes and times of files.

    Raises:
        KeyError: if the architecture is unknown.
    """
    architecture, column = ARCHITECTURE[machine], list(ARCHITECTURE).index(machine)
    code = [(LOAD, 0, 0, 4), (JUMP_IF_EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    if machine == "x86_64":  # the x32 calls share the architecture and have this bit set
        code += [(JUMP_IF_AT_LEAST, 0, 1, 0x40000000), (RETURN, 0, 0, DENY)]
    code += [
        (JUMP_IF_EQUAL, 0, 5, MMAP[column]),
        (LOAD, 0, 0, 16 + 8 * MMAP_FLAGS),
        (JUMP_IF_SET, 0, 2, MAP_ANONYMOUS),
        (JUMP_IF_SET, 0, 1, MAP_SHARED),
        (RETURN, 0, 0, DENY),
        (RETURN, 0, 0, ALLOW),
    ]
    for numbers in CLOCKS:
        code += [(JUMP_IF_EQUAL, 0, 4, numbers[column]), (LOAD, 0, 0, 16)]
        code += [(JUMP_IF_AT_LEAST, 0, 1, FIRST_OTHER_CLOCK), (RETURN, 0, 0, DENY), (RETURN, 0, 0, ALLOW)]
    for numbers in (*ALLOWED.values(), *(OWN_FILES.values() if own_root else ())):
        number = numbers[column]
        if number is not None:
            code += [(JUMP_IF_EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    for numbers in PRETENDED.values():
        code += [(JUMP_IF_EQUAL, 0, 1, numbers[column]), (RETURN, 0, 0, PRETEND)]
    pretended = [step for value in SET_LOCKS for step in ((JUMP_IF_EQUAL, 0, 1, value), (RETURN, 0, 0, PRETEND))]
    for numbers, argument, values in IF_EQUAL.values():
        tests = [step for value in values for step in ((JUMP_IF_EQUAL, 0, 1, value), (RETURN, 0, 0, ALLOW))]
        tests += pretended if numbers == FCNTL else []
        code += [(JUMP_IF_EQUAL, 0, len(tests) + 2, numbers[column]), (LOAD, 0, 0, 16 + 8 * argument), *tests]
        code += [(RETURN, 0, 0, DENY)]
    for numbers, argument in MODES.values() if own_root else ():
        if (number := numbers[column]) is not None:
            code += [(JUMP_IF_EQUAL, 0, 4, number), (LOAD, 0, 0, 16 + 8 * argument)]
            code += [(JUMP_IF_SET, 0, 1, SPECIAL_MODES), (RETURN, 0, 0, DENY), (RETURN, 0, 0, ALLOW)]
    code += [
        (JUMP_IF_EQUAL, 0, 1, CLONE3[column]),
        (RETURN, 0, 0, ABSENT),  # a filter cannot read its flags; the C library falls back to clone
        (JUMP_IF_EQUAL, 0, 3, CLONE[column]),
        (LOAD, 0, 0, 16),
        (JUMP_IF_SET, 0, 1, CLONE_THREAD),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, DENY),
    ]
    return b"".join(struct.pack("<HBBI", *step) for step in code)


def pid_offsets(program: bytes) -> tuple[int, ...]:
    """Return the byte offsets of the pid placeholders in the filter."""
    return tuple(at + 4 for at in range(0, len(program), 8) if struct.unpack_from("<I", program, at + 4)[0] == PID)


def with_pid(program: bytes, offsets: tuple[int, ...], pid: int) -> bytes:
    """Return the filter for the process `pid`."""
    patched = bytearray(program)
    for offset in offsets:
        struct.pack_into("<I", patched, offset, pid)
    return bytes(patched)
