"""How a config field is declared. `config_load.py` reads the bounds, `pmd fit --help` prints the sentence."""

from dataclasses import field
from typing import Any


def option(
    default: Any, help: str, *, least: float | None = None, above: float | None = None, most: float | None = None
) -> Any:
    """Declare a config field: its default, one sentence of help, and its bounds (`above` is exclusive)."""
    bounds = {"least": least, "above": above, "most": most}
    metadata = {"help": help, **{k: v for k, v in bounds.items() if v is not None}}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)
