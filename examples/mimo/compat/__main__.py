"""`python -m examples.mimo.compat`: what is replaced on this machine, and why."""

from __future__ import annotations

import textwrap

from examples.mimo.cli import command
from examples.mimo.compat import Replacement, replacements

# Attributes of one owner with one reason: more than these are counted, not listed.
LISTED = 20


def main() -> None:
    """Print the table: a section for each set of commands, a heading for each owner."""
    command.prepare_environment()
    for commands, entries in replacements().items():
        print(f"{commands}: {len(entries)} attributes\n")
        rows = grouped(entries)
        width = max(len(name) for _, name, _ in rows)
        heading = ""
        for owner, name, reason in rows:
            if owner != heading:
                heading = owner
                print(f"  {owner}")
            indent = " " * (width + 6)
            text = textwrap.fill(reason, 100, initial_indent=indent, subsequent_indent=indent)
            print(f"    {name:{width}}  {text.strip()}")
        print()


def grouped(entries: list[Replacement]) -> list[tuple[str, str, str]]:
    """Owner, attribute and reason of each row; many of one owner and reason share a row."""
    by_reason: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        owner = entry.name.removesuffix(f".{entry.attribute}")
        by_reason.setdefault((owner, entry.needed_by), []).append(entry.attribute)
    rows = []
    for (owner, reason), attributes in by_reason.items():
        if len(attributes) > LISTED:
            attributes = [f"{attributes[0]} and {len(attributes) - 1} more"]
        rows += [(owner, attribute, reason) for attribute in attributes]
    owners = list(dict.fromkeys(owner for owner, _, _ in rows))
    return sorted(rows, key=lambda row: owners.index(row[0]))


if __name__ == "__main__":
    main()
