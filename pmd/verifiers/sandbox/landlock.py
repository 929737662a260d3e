"""Landlock: builds the rule set with which a process restricts its own access to files."""

import os
import stat
import struct
from collections.abc import Iterable

from pmd.verifiers.sandbox import kernel

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE = 1, 2, 4, 8, 16, 32
MAKE_DIR, MAKE_REG, MAKE_SYM = 1 << 7, 1 << 8, 1 << 12
REFER, TRUNCATE = 1 << 13, 1 << 14
#: Number of access rights that each version of the interface knows.
NUM_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
NUM_RIGHTS_LATEST = 16
FILE_RIGHTS = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE
READ = READ_FILE | READ_DIR
WRITE = READ | WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | MAKE_SYM | REFER | TRUNCATE
TCP_BIND_AND_CONNECT = SCOPE_ABSTRACT_SOCKETS_AND_SIGNALS = 3


def version() -> int:
    """Return the kernel's Landlock version; 0 if it has none."""
    try:
        return kernel.syscall(kernel.SYS_LANDLOCK_CREATE_RULESET, None, 0, 1, what="landlock_create_ruleset")
    except OSError:
        return 0


def make_ruleset(readable: Iterable[str], read_write: Iterable[str], listable: Iterable[str] = ()) -> int:
    """Return the descriptor of a rule set that allows only these files and trees; missing paths are skipped."""
    abi = version()
    handled = (1 << NUM_RIGHTS.get(abi, NUM_RIGHTS_LATEST)) - 1
    fields = [handled] + ([TCP_BIND_AND_CONNECT] if abi >= 4 else [])
    fields += [SCOPE_ABSTRACT_SOCKETS_AND_SIGNALS] if abi >= 6 else []
    attributes = struct.pack(f"<{len(fields)}Q", *fields)
    ruleset = kernel.syscall(
        kernel.SYS_LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0, what="landlock_create_ruleset"
    )
    for path in readable:
        _allow(ruleset, path, READ & handled)
    for path in read_write:
        _allow(ruleset, path, WRITE & handled)
    for path in listable:
        _allow(ruleset, path, READ_DIR)
    return ruleset


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not stat.S_ISDIR(os.fstat(opened).st_mode):
            rights &= FILE_RIGHTS
        rule = struct.pack("<Qi", rights, opened)
        kernel.syscall(kernel.SYS_LANDLOCK_ADD_RULE, ruleset, 1, rule, 0, what=f"landlock_add_rule {path}")
    finally:
        os.close(opened)


def restrict(ruleset: int) -> None:
    """Restrict this process permanently; `no_new_privs` must be set."""
    kernel.syscall(kernel.SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0, what="landlock_restrict_self")
