"""Makes text of unknown origin safe to print: terminals obey control characters, and half a character is an error."""

import re

#: Control characters other than tab and line feed (ESC and the one-character CSI among them), those that change the
#: direction of writing or break lines, and halves of surrogate pairs.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Return the text with unsafe characters as escapes, such as \\x1b."""
    return _UNSAFE.sub(lambda found: _escape(ord(found[0])), text)


def printable_json(text: str) -> str:
    """Return JSON text with unsafe characters as JSON escapes; they can only occur in its strings."""
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
