"""Helpers for hostile programs, which print the right answer, 3, only if their attack works.

The task: two integers on stdin, their sum on stdout; or a function `add(a, b)`, called with 1 and 2.
"""

#: Start of a program that calls the C library.
CALL = "import ctypes, os\nL = ctypes.CDLL(None, use_errno=True)\n"


def attack(*lines: str) -> str:
    """Return a program that prints 3 if all lines run without an error."""
    return "\n".join([*lines, "print(3)"])


def call(number: int, *arguments: object) -> str:
    """Return a program that prints 3 if a raw system call (x86_64) succeeds."""
    return CALL + f"r = L.syscall({', '.join(map(str, (number, *arguments)))})\nprint(3 if r >= 0 else 'refused')"
