"""`python -m examples.mimo.compat`: what is replaced on this machine, and why."""

from examples.mimo.compat import install

rows = [(stand_in.name, stand_in.needed_by) for stand_in in install()]
width = max(len(name) for name, _ in rows)
for name, needed_by in rows:
    print(f"{name:{width}}  {needed_by}")
