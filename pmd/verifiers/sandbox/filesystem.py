"""The files a program may see: readable and writable paths, and at level `namespaces` a root directory in memory."""

import glob
import importlib.util
import os
import sys
import sysconfig
from pathlib import Path

from pmd.verifiers.sandbox import kernel

NAMESPACES = (
    kernel.CLONE_NEWNS
    | kernel.CLONE_NEWPID
    | kernel.CLONE_NEWNET
    | kernel.CLONE_NEWIPC
    | kernel.CLONE_NEWUTS
    | kernel.CLONE_NEWCGROUP
)
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache")
#: Not /dev/zero: a shared mapping of it is anonymous memory (see seccomp.py).
DEVICES = ("/dev/null", "/dev/urandom", "/dev/random")
#: Packages that programs may import if they are installed, with the libraries they load.
PACKAGES = ("numpy", "numpy.libs", "sortedcontainers")
#: Candidate mount points for the new root; the first one with nothing readable below it is used.
ROOT_MOUNT_POINTS = ("/sys", "/mnt", "/media", "/srv", "/proc", "/tmp")
STDIN_FILE = "/dev/stdin"
#: User ids from here on are unused: a worker's programs run as this plus its process id.
FIRST_FREE_USER = 1_000_000_000
#: The root directory in memory holds no file except the input.
ROOT_BYTES = 4 << 30
TMPFS_BYTES, TMPFS_FILES, WRITABLE_MODE = 16 << 20, 512, 0o1777


def python_paths() -> list[str]:
    """Return the directories of this Python's library, in the order of its import path."""
    found = [sysconfig.get_path("stdlib"), os.path.join(sysconfig.get_path("platstdlib"), "lib-dynload")]
    return [path for path in found if os.path.isdir(path)]


def site_packages() -> str:
    """Return this Python's package directory: the one that holds the first of `PACKAGES`."""
    found = importlib.util.find_spec(PACKAGES[0])
    return str(Path(found.origin).parents[1]) if found and found.origin else sysconfig.get_path("purelib")


def package_paths(site_packages: str) -> list[str]:
    """Return the directories of the packages that programs may import."""
    found = [os.path.join(site_packages, name) for name in PACKAGES] if site_packages else []
    return [path for path in found if os.path.isdir(path)]


def readable_paths(site_packages: str) -> list[str]:
    """Return everything that a program may read."""
    found = [path for path in LIBRARIES if os.path.exists(path)]
    return [*python_paths(), *package_paths(site_packages), *found, *shared_libraries(sys.base_prefix)]


def shared_libraries(prefix: str) -> list[str]:
    """Return the shared libraries that a Python outside /usr ships itself; conda's `zlib` and `sqlite3` need them."""
    return [] if f"{prefix}/lib" in LIBRARIES else sorted(glob.glob(f"{glob.escape(prefix)}/lib/*.so*"))


def writable_place(readable: list[str]) -> str:
    """Return where a program may write in its own root: /tmp, unless something readable lies below it."""
    return "/box" if _lies_below("/tmp", [*readable, __file__]) else "/tmp"


def enter_namespaces() -> None:
    """Leave the host's namespaces; when not root, as root of a new user namespace."""
    user, group = os.getuid(), os.getgid()
    if user == 0:
        kernel.unshare(NAMESPACES)
        return
    kernel.unshare(NAMESPACES | kernel.CLONE_NEWUSER)
    for name, content in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(content)


def build_root(readable: list[str], writable: str) -> int:
    """Create a root directory in memory that contains the readable paths, and move into it.

    Everything except `writable` is on read-only mounts. Returns a descriptor for writing the input, which programs read
    at `STDIN_FILE`; it belongs to a mount beneath the read-only one.
    """
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    base = next(place for place in ROOT_MOUNT_POINTS if os.path.isdir(place) and not _lies_below(place, readable))
    kernel.mount("tmpfs", base, "tmpfs", kernel.MS_NOSUID, f"size={ROOT_BYTES},mode=755")
    for path in outermost(readable):
        _bind(path, base)
    for path in DEVICES:
        _bind(path, base, devices=True)
    os.close(os.open(base + STDIN_FILE, os.O_CREAT | os.O_WRONLY, 0o444))
    os.makedirs(base + writable, exist_ok=True)
    limits = f"size={TMPFS_BYTES},nr_inodes={TMPFS_FILES},mode={WRITABLE_MODE:o}"
    kernel.mount("tmpfs", base + writable, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC, limits)
    stdin = base + STDIN_FILE
    kernel.mount(stdin, stdin, None, kernel.MS_BIND)
    writer = os.open(stdin, os.O_WRONLY)
    kernel.mount(stdin, stdin, None, kernel.MS_BIND)
    kernel.make_read_only(stdin)
    kernel.make_read_only(base, below=False)
    kernel.change_root(base)
    return writer


def outermost(paths: list[str]) -> list[str]:
    """Drop paths that lie below another one: /usr/lib already contains /usr/lib/python3."""
    return [path for path in paths if not any(path.startswith(other + "/") for other in paths)]


def _lies_below(place: str, paths: list[str]) -> bool:
    return any(path.startswith(place + "/") for path in paths)


def _bind(path: str, base: str, *, devices: bool = False) -> None:
    target = base + path
    if os.path.lexists(target) or not os.path.exists(path):
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):  # /lib -> usr/lib
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.mkdir(target)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    kernel.mount(path, target, None, kernel.MS_BIND | kernel.MS_REC)
    kernel.make_read_only(target, devices=devices)


def clear_writable(place: str) -> None:
    """Remove what a run left in its writable directory. The run is over, so nothing else changes it.

    The contents of a directory are moved to the top before it is removed, so neither depth nor path length matters.
    """
    moved = 0
    os.chmod(place, WRITABLE_MODE)  # a program that ran as our own user may have changed it
    while names := os.listdir(place):
        for name in names:
            path = os.path.join(place, name)
            if os.path.islink(path) or not os.path.isdir(path):
                os.unlink(path)
                continue
            os.chmod(path, 0o700)
            for inner in os.listdir(path):
                moved += 1
                while os.path.lexists(target := f"{place}/moved-{moved}"):
                    moved += 1
                os.rename(os.path.join(path, inner), target)
            os.rmdir(path)
