"""Integrals, sums, products, limits and derivatives, which our own parser does not read: sympy computes them.

The result is LaTeX that our own parser reads, so the comparison is the same as for any other answer. Computing may take
forever; the helper process that does it has a deadline.
"""

import re
from typing import Any

MAX_CHARACTERS = 1000
CALCULUS = re.compile(r"\\(?:int|iint|sum|prod|lim)(?![A-Za-z])|\\frac\s*\{\s*d\s*\}\s*\{\s*d")
#: latex2sympy reads R and r as one variable, and text as a product of letters.
UNSAFE = re.compile(r"(?<![\\A-Za-z])[A-Z]|\\text")


def compute(text: str) -> str:
    """Return a normalized text, or what sympy computes for it, in LaTeX."""
    if len(text) > MAX_CHARACTERS or not CALCULUS.search(text) or UNSAFE.search(text):
        return text
    from latex2sympy2_extended import latex2sympy
    from sympy import Expr, Float, Integral, Limit, Product, Sum, latex

    try:
        parsed: Any = latex2sympy(text)
        found = parsed.doit()
        if not isinstance(found, Expr) or found.has(Float, Integral, Limit, Product, Sum):
            return text
        return latex(found)
    except Exception:  # sympy may raise anything
        return text
