"""System calls that the sandbox needs and Python does not provide. All raise `OSError` on failure."""

import ctypes
import os
import platform
import struct

LIBC = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS = 0x00020000, 0x02000000, 0x04000000
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x08000000, 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 8, 22, 38
SECCOMP_MODE_FILTER = 2
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
AT_RECURSIVE, AT_FDCWD = 0x8000, -100
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
SYS_MOUNT_SETATTR = 442
SYS_LANDLOCK_CREATE_RULESET, SYS_LANDLOCK_ADD_RULE, SYS_LANDLOCK_RESTRICT_SELF = 444, 445, 446
CAPABILITY_VERSION_3, CAP_DAC_READ_SEARCH = 0x20080522, 1 << 2
MACHINE = platform.machine()


def checked(result: int, what: str) -> int:
    """Return the result of a call, or raise its errno as `OSError`."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def syscall(number: int, *arguments: int | bytes | None, what: str) -> int:
    """Call the kernel directly."""
    passed = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return checked(LIBC.syscall(ctypes.c_long(number), *passed), what)


def unshare(flags: int) -> None:
    """Move this process (for the pid namespace: its future children) into new namespaces."""
    checked(LIBC.unshare(ctypes.c_int(flags)), "unshare")


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    """Mount a file system."""
    encoded = [None if text is None else text.encode() for text in (source, target, kind, options)]
    checked(LIBC.mount(*encoded[:3], ctypes.c_ulong(flags), encoded[3]), f"mount {target}")


def make_read_only(path: str, *, devices: bool = False, below: bool = True) -> None:
    """Make a mount (and all below it) read-only, without set-user-id and, unless asked for, without devices."""
    flags = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | (0 if devices else MOUNT_ATTR_NODEV)
    attributes = struct.pack("<QQQQ", flags, 0, 0, 0)
    reach = AT_RECURSIVE if below else 0
    syscall(SYS_MOUNT_SETATTR, AT_FDCWD, path.encode(), reach, attributes, len(attributes), what="mount_setattr")


def change_root(path: str) -> None:
    """Make `path`, a mount point, the root directory, and detach the old one."""
    os.chdir(path)
    syscall(SYS_PIVOT_ROOT[MACHINE], b".", b".", what="pivot_root")
    checked(LIBC.umount2(b".", MNT_DETACH), "umount of the old root")
    os.chdir("/")


def prctl(option: int, value: int, pointer: object = None) -> None:
    """Set a property of this process."""
    checked(LIBC.prctl(ctypes.c_int(option), ctypes.c_ulong(value), pointer, None, None), f"prctl {option}")


def set_capabilities(kept: int) -> None:
    """Give up every capability except those of the mask `kept`, permanently."""
    header = struct.pack("<Ii", CAPABILITY_VERSION_3, 0)
    checked(LIBC.capset(header, struct.pack("<6I", kept, kept, 0, 0, 0, 0)), "capset")


class FilterProgram(ctypes.Structure):
    """`struct sock_fprog`: a classic BPF program."""

    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


def install_filter(program: bytes) -> None:
    """Install a seccomp filter; `no_new_privs` must be set."""
    buffer = ctypes.create_string_buffer(program, len(program))
    prctl(
        PR_SET_SECCOMP,
        SECCOMP_MODE_FILTER,
        ctypes.byref(FilterProgram(len(program) // 8, ctypes.addressof(buffer))),
    )
