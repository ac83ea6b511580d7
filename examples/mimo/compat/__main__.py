"""`python -m examples.mimo.compat`: what is replaced on this machine, and why."""

from __future__ import annotations

import textwrap

from examples.mimo.compat import Replacement, replacements

WIDTH = 100


def main() -> None:
    """Print the table, a section for each set of commands."""
    for number, (commands, entries) in enumerate(replacements().items()):
        print(f"{chr(10) * bool(number)}{commands} replaces {len(entries)} attributes:")
        for names, reason in rows(entries):
            print(textwrap.fill(names, WIDTH, initial_indent="  ", subsequent_indent="    "))
            print(textwrap.fill(reason, WIDTH, initial_indent="      ", subsequent_indent=" " * 6))


def rows(entries: list[Replacement]) -> list[tuple[str, str]]:
    """Names and the reason; attributes of one owner that share a reason share a row."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        owner = entry.name.removesuffix(f".{entry.attribute}")
        grouped.setdefault((owner, entry.needed_by), []).append(entry.attribute)
    return [
        (f"{owner}.{', '.join(attributes)}", reason)
        for (owner, reason), attributes in grouped.items()
    ]


if __name__ == "__main__":
    main()
