"""What every rank says of a prompt that the first stage cannot embed, and of the same prompt again.

`failing_stage.py CHECKPOINT PP`; a line of JSON a rank.
"""

import json
import os
import sys

from examples.mimo import Mimo

stdout = sys.stdout
model = Mimo.load(sys.argv[1], pp=int(sys.argv[2]))
embed = model.model.embed
said = []
for error in (ValueError("3 placeholders, 2 embeddings"), RuntimeError("out of memory"), None):

    def fails(*inputs, error=error):
        if error is not None:
            raise error
        return embed(*inputs)

    model.model.embed = fails
    try:
        said.append(model.generate("Which digit is this?", max_new_tokens=8))
    except (ValueError, RuntimeError) as raised:
        said.append(f"{type(raised).__name__}: {raised}")
stdout.write(json.dumps([os.environ["RANK"], said]) + "\n")
