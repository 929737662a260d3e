"""One seed for each random draw, derived from names instead of from a shared random state.

A draw therefore depends on what it is for (run seed, purpose, epoch, task, ...) and never on what was drawn before it,
which is what makes a resumed run equal to one that never stopped.
"""

import hashlib


def derive_seed(*parts: str | int) -> int:
    """Return a 62-bit seed that is the same for the same parts on every machine."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2
