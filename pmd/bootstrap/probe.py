"""One measured ability of a bootstrapped model, and the bound it must meet. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Probe:
    """A measurement and its bound; exactly one of the bounds is set."""

    name: str
    value: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the value meets its bound; NaN does not."""
        above = self.at_least is None or self.value >= self.at_least
        below = self.at_most is None or self.value <= self.at_most
        return above and below and self.value == self.value

    @property
    def rule(self) -> str:
        """The bound in words."""
        return f"at least {self.at_least:g}" if self.at_least is not None else f"at most {self.at_most:g}"
