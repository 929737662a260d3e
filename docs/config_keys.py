"""A hook of mkdocs: fills the page of configuration keys from the dataclasses in `pmd.config.schema`."""

import dataclasses
import re
import typing
from typing import Any

from pmd.cli import describe, shown
from pmd.config.schema import RunConfig

MARK = re.compile(r"<!-- keys.*?-->")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace the mark with one table per section."""
    return MARK.sub(lambda _: "\n".join(section_tables(RunConfig, "")), markdown)


def section_tables(section: type, prefix: str) -> list[str]:
    """Return a heading and a table of the section's keys, then the same for the sections inside it."""
    hints, defaults = typing.get_type_hints(section), section()
    title = prefix.rstrip(".") or "top level"
    lines = ["", f"## {title}", "", (section.__doc__ or "").strip(), ""]
    lines += ["| Key | Default | Values | Meaning |", "|---|---|---|---|"]
    nested: list[str] = []
    for field in dataclasses.fields(section):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            nested += section_tables(typing.cast(type, hint), f"{prefix}{field.name}.")
        else:
            default = shown(getattr(defaults, field.name))
            cells = [f"`{field.name}`", f"`{default}`", describe(hint), field.metadata["help"]]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines + nested
