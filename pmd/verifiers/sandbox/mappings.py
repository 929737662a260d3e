"""Anonymous memory maps that are private to the process.

`mmap.mmap(-1, n)` asks for shared memory by default, whose pages stay when they are unmapped and then count towards no
limit, so the system call filter refuses it. There is no process to share with: private memory behaves the same.
"""

import mmap
from typing import Any

SHARED_MAP = mmap.mmap


class PrivateMap(SHARED_MAP):
    """`mmap.mmap`, except that memory without a file is private."""

    def __new__(cls, fileno: int, length: int, *arguments: Any, **options: Any) -> "PrivateMap":
        """Make a map; the arguments are those of `mmap.mmap`."""
        if fileno == -1:
            given = dict(zip(("flags", "prot", "access", "offset"), arguments, strict=False)) | options
            if given.get("access") == mmap.ACCESS_WRITE:
                given["access"] = mmap.ACCESS_COPY
            elif given.get("access") == mmap.ACCESS_READ:
                given["prot"] = mmap.PROT_READ
                del given["access"]
            if not given.get("access"):
                given["flags"] = given.get("flags", 0) & ~mmap.MAP_SHARED | mmap.MAP_PRIVATE
            arguments, options = (), given
        return super().__new__(cls, fileno, length, *arguments, **options)
