"""One training sequence: token ids, which of them are learnt, and from what labels. No torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Sample:
    """A sequence under construction; `encode` turns text into ids."""

    encode: Callable[[str], list[int]]
    ids: list[int] = field(default_factory=list)
    weights: dict[int, float] = field(default_factory=dict)  # position of each learnt token -> its weight
    #: Position -> the ids that share the label equally: the exact distribution where chance or ignorance decides.
    uniform_over: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def show(self, text: str) -> "Sample":
        """Append text that is only read."""
        self.ids += self.encode(text)
        return self

    def learn(self, text: str, weight: float = 1.0) -> "Sample":
        """Append text that is to be written."""
        for token in self.encode(text):
            self.weights[len(self.ids)] = weight
            self.ids.append(token)
        return self

    def learn_choice(self, chosen: str, among: Sequence[str], weight: float) -> "Sample":
        """Append one token whose label is uniform over `among`, of which `chosen` is the one that was drawn."""
        self.uniform_over[len(self.ids)] = tuple(token for word in among for token in self.encode(word))
        return self.learn(chosen, weight)

    def slip(self, position: int, token: int) -> None:
        """Put a wrong token where a right one was to be written: not learnt itself, but what follows it is."""
        self.ids[position] = token
        del self.weights[position]
