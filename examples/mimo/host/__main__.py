"""`python -m examples.mimo.host`: the stand-ins in place on this machine."""

from __future__ import annotations

from examples.mimo.host import install


def main() -> None:
    """Print one row a stand-in: what it replaces, and which Megatron call needs it."""
    rows = [(stand_in.name, stand_in.needed_by) for stand_in in install()]
    if not rows:
        print("nothing is replaced on this machine")
        return
    width = max(len(name) for name, _ in rows)
    for name, needed_by in rows:
        print(f"{name:{width}}  {needed_by}")


if __name__ == "__main__":
    main()
