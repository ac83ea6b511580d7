"""Manifests: the SHA-256 of every file of a checkpoint, so that damage is noticed before use.

An iteration's folder holds `sha256.json`, which lists its files by length and by the digest of
every 16 MiB. Each rank digests the files that it wrote, in the process that wrote them, and the
manifest is complete before the tracker names the iteration. On loading every rank checks a share
of the bytes, while the model is built, and all of them fail with the same line.

A manifest, and `mimo.json` with the digests of the tokenizer, holds a digest of itself.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import os
import pickle
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST = "sha256.json"
SELF = "sha256"
# A part of a file that has a digest of its own, so that threads and ranks can share a large file.
BLOCK_BYTES = 16 * 2**20
READ_BYTES = 2**20
# Of JSON files, which are read whole: a description, and the manifest of terabytes.
MAX_JSON_BYTES = 8 * 2**20
MAX_MANIFEST_BYTES = 256 * 2**20
MAX_THREADS = 8
# A file of these that the manifest does not name might be loaded.
LOADED_SUFFIXES = (".distcp", ".metadata", ".pt", ".json")
# Megatron's function that reads all but tensors.
COMMON_STATE = "load_common_state_dict"
OF_A_RANK = re.compile(r"__(\d+)_\d+\.distcp")
COPY = "copy the checkpoint anew or load another"
REMEDY = f"{COPY}, or take it as it is with --no-verify-integrity"
CHANGED = "is not what was saved (its SHA-256 differs)"
UNSEALED = "0" * 64
# What a damaged file makes of a loader; Megatron's own errors and torch's are told elsewhere.
DAMAGE = (
    *(pickle.UnpicklingError, LookupError, TypeError, ValueError),
    *(AttributeError, EOFError, ImportError),
)
Digests = dict[str, Any]


def sealed(content: Mapping[str, Any]) -> str:
    """`content` as JSON that holds the digest of this JSON, under a key of its own."""
    text = json.dumps({SELF: UNSEALED, **content}, indent=1)
    return text.replace(UNSEALED, hashlib.sha256(text.encode()).hexdigest(), 1)


def read_json(
    file: Path, keys: Iterable[str], max_bytes: int = MAX_JSON_BYTES
) -> tuple[dict[str, Any], bool | None]:
    """A JSON object that has no other keys than these, and whether it is as it was sealed.

    None says that it was not. ValueError, which goes on behind the file's name, when it is damaged.
    """
    try:
        if (size := file.stat().st_size) > max_bytes:
            raise ValueError(f"{size:,} bytes, more than {max_bytes:,}")
        raw = file.read_bytes()
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is damaged ({first_line(error)[:200]})") from None
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
    if not isinstance(content, dict) or not set(content) <= {SELF, *keys}:
        raise ValueError(f"is damaged (not an object of {', '.join(keys)})")
    if SELF not in content:
        return content, None
    digest = str(content.pop(SELF))
    unsealed = raw.replace(digest.encode(errors="replace"), UNSEALED.encode(), 1)
    return content, hashlib.sha256(unsealed).hexdigest() == digest


def file_digests(folder: Path) -> dict[str, str]:
    """The digest of every file in a folder of small files, by its path in the folder."""
    return {name: _file_digest(folder / name) for name in sorted(_files(folder))}


def _file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_file_digests(folder: Path, expected: Mapping[str, str]) -> None:
    """ValueError, which begins with a file's name, unless these are in the folder and no others."""
    actual = file_digests(folder) if folder.is_dir() else {}
    for name in sorted(actual.keys() | expected.keys()):
        if actual.get(name) != expected.get(name):
            what = "is missing" if name not in actual else CHANGED
            what = "was not saved with the checkpoint: remove it" if name not in expected else what
            raise ValueError(f"{folder.name}/{name} {what}; {REMEDY}")


def _files(folder: Path) -> dict[str, int]:
    """The length of every file in a folder and below, by its path in it; no manifest."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith((MANIFEST, f".{MANIFEST}"))
    }


def _block_digest(file: Path, number: int) -> str:
    """The digest of a block of a file; other threads go on meanwhile."""
    digest, left, buffer = hashlib.sha256(), BLOCK_BYTES, memoryview(bytearray(READ_BYTES))
    with file.open("rb", buffering=0) as stream:
        stream.seek(number * BLOCK_BYTES)
        while left and (count := stream.readinto(buffer[: min(left, READ_BYTES)])):
            digest.update(buffer[:count])
            left -= count
    return digest.hexdigest()


def _num_blocks(size: int) -> int:
    return max(1, -(-size // BLOCK_BYTES))


def _pool() -> ThreadPoolExecutor:
    """Threads for this rank's share of the cores, of which the main thread keeps one."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return ThreadPoolExecutor(min(MAX_THREADS, max(1, cores - 1)))


def _entries(folder: Path, sizes: Mapping[str, int]) -> Digests:
    """What a manifest says of these files."""
    with _pool() as pool:
        blocks = {
            name: [
                pool.submit(_block_digest, folder / name, number)
                for number in range(_num_blocks(size))
            ]
            for name, size in sizes.items()
        }
        return {
            name: {"bytes": size, "sha256": [block.result() for block in blocks[name]]}
            for name, size in sizes.items()
        }


def _entry(folder: Path, name: str, size: int) -> Any:
    blocks = [_block_digest(folder / name, number) for number in range(_num_blocks(size))]
    return {"bytes": size, "sha256": blocks}


# Saving.


def write_manifest(folder: Path) -> None:
    """Write the manifest of an iteration's folder; every rank must call this, when all is written.

    A rank digests the weights that it wrote, unless its writer did so already; what bears no
    rank's name is digested by the first that sees it.
    """
    rank, own = _rank(), _files(folder)
    views = _gather(own)
    mine = {name: size for name, size in own.items() if _owner(name, views) == rank}
    part = _part_file(folder, rank)
    ready = json.loads(part.read_text(encoding="utf-8")) if part.is_file() else {}
    entries = {name: entry for name, entry in ready.items() if name in mine}
    entries |= _entries(folder, {name: mine[name] for name in mine.keys() - entries.keys()})
    of_ranks = _gather(entries)
    if rank == 0:
        files = {name: entry for of_rank in of_ranks for name, entry in of_rank.items()}
        content = {"block_bytes": BLOCK_BYTES, "files": dict(sorted(files.items()))}
        draft = folder / f".{MANIFEST}.draft"
        draft.write_text(sealed(content), encoding="utf-8")
        draft.replace(folder / MANIFEST)
    part.unlink(missing_ok=True)
    _gather(None)  # no rank goes on before the manifest is there


def _owner(name: str, views: Sequence[Mapping[str, int]]) -> int:
    """The rank that digests a file, of those that see it."""
    sees = [number for number, view in enumerate(views) if name in view]
    of_rank = OF_A_RANK.fullmatch(name)
    return int(of_rank[1]) if of_rank and int(of_rank[1]) in sees else sees[0]


def _part_file(folder: Path, rank: int) -> Path:
    return folder / f".{MANIFEST}.{rank}"


def write_and_digest(
    write: Callable[..., Any], folder: Path, rank: int, *args: Any, **kwargs: Any
) -> None:
    """Write this rank's weights as `write` does, then their digests for `write_manifest`.

    With --async-save this runs in the writer's process, while training goes on.
    """
    write(*args, **kwargs)
    # What fails here `write_manifest` meets again, where a run's errors are told.
    with contextlib.suppress(OSError):
        sizes = {path.name: path.stat().st_size for path in folder.glob(f"__{rank}_*.distcp")}
        draft = folder / f".{MANIFEST}.{rank}.draft"
        draft.write_text(json.dumps(_entries(folder, sizes)), encoding="utf-8")
        draft.replace(_part_file(folder, rank))


def with_manifest(save: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's `dist_checkpointing.save`, which writes this manifest where it would its own."""

    @functools.wraps(save)
    def save_with_manifest(
        state: Any, checkpoint_dir: str, *args: Any, verify_integrity: bool = False, **kwargs: Any
    ) -> Any:
        folder, rank = Path(checkpoint_dir), _rank()
        _checks.pop(folder, None)
        # Of a save that was killed. An old manifest stays, as what is half written does not fit it.
        _part_file(folder, rank).unlink(missing_ok=True)
        request = save(state, checkpoint_dir, *args, **kwargs)
        if not verify_integrity:
            (folder / MANIFEST).unlink(missing_ok=True)
        elif request is None:
            write_manifest(folder)
        else:
            if request.async_fn is not None:
                write = functools.partial(write_and_digest, request.async_fn, folder, rank)
                request = request._replace(async_fn=write)
            # What moves the tracker is added behind it.
            request.finalize_fns.append(functools.partial(write_manifest, folder))
        return request

    return save_with_manifest


# Loading.


class WeightsCheck:
    """Checks this rank's share of an iteration's files in threads that start at once.

    `where` is the flag and the folder, for messages. ValueError where the files or their lengths
    are not those of the manifest; `finish` says whether the bytes are.
    """

    def __init__(self, weights: Path, where: str) -> None:
        self.weights, self.where = weights, where
        entries = read_manifest(weights, where)
        blocks = [
            (name, number, digest)
            for name, entry in entries.items()
            for number, digest in enumerate(entry["sha256"])
        ]
        # Neighbours, so that a disk is read forward; blocks are of one size but for the last.
        rank, size = _rank(), _world_size()
        first, end = len(blocks) * rank // size, len(blocks) * (rank + 1) // size
        self.pool = _pool()
        self.expected: list[tuple[str, int, str, Future[str]]] = [
            (*block, self.pool.submit(_block_digest, weights / block[0], block[1]))
            for block in blocks[first:end]
        ]

    def finish(self) -> None:
        """Wait for the shares of all ranks; ValueError, the same line on all, if one differs."""
        problems: dict[str, str] = {}
        for name, number, digest, future in self.expected:
            try:
                if future.result() != digest:
                    at = f" behind byte {number * BLOCK_BYTES:,}" if number else ""
                    problems.setdefault(name, CHANGED.replace(" differs", f"{at} differs"))
            except OSError as error:
                problems.setdefault(name, f"cannot be read ({error.strerror})")
        self.pool.shutdown()
        for of_rank in _gather(problems):
            problems = {**of_rank, **problems}
        _refuse(problems, self.weights, self.where)


_checks: dict[Path, WeightsCheck | None] = {}


def begin_check(weights: Path, where: str) -> None:
    """Start to check an iteration's files; `finish_check` must follow.

    A line on stderr says so when they have no manifest, as those of older versions.
    """
    if (weights / MANIFEST).exists():
        _checks[weights] = WeightsCheck(weights, where)
        return
    _checks[weights] = None
    if _rank() == 0:
        print(
            f"  {where}: {weights.name} has no {MANIFEST}, so damage to its files is not noticed; "
            "a checkpoint that is saved again has one",
            file=sys.stderr,
            flush=True,
        )


def finish_check(weights: Path) -> None:
    """Wait for what `begin_check` started, if anything; ValueError for damage, on every rank."""
    check = _checks.get(weights)
    if check is not None:
        _checks[weights] = None
        check.finish()


def check_small_files(weights: Path, where: str) -> None:
    """ValueError for files that are missing, too many or of another length, and for small ones.

    Small are those that say what the weights are, which are read before the weights.
    """
    if not (weights / MANIFEST).exists():
        return
    problems = {}
    for name, entry in read_manifest(weights, where).items():
        is_small = "/" not in name and not name.endswith(".distcp")
        if is_small and _entry(weights, name, entry["bytes"]) != entry:
            problems[name] = CHANGED
    _refuse(problems, weights, where)


def read_manifest(weights: Path, where: str) -> Digests:
    """What the manifest says of each file; ValueError unless the files have these lengths."""
    try:
        keys = ("block_bytes", "files")
        content, is_as_sealed = read_json(weights / MANIFEST, keys, MAX_MANIFEST_BYTES)
        if not is_as_sealed:
            raise ValueError(CHANGED)
        entries: Digests = content.get("files") or {}
        is_known = isinstance(entries, dict) and content.get("block_bytes") == BLOCK_BYTES
        if not is_known or not all(map(_is_entry, entries, entries.values())):
            raise ValueError("is of another version of this package")
    except ValueError as error:
        raise ValueError(f"{where}: {weights.name}/{MANIFEST} {error}; {REMEDY}") from None
    actual = _files(weights)
    problems = {}
    for name, entry in entries.items():
        if name not in actual:
            problems[name] = f"is missing ({entry['bytes']:,} bytes were saved)"
        elif actual[name] != entry["bytes"]:
            problems[name] = f"has {actual[name]:,} bytes, but {entry['bytes']:,} were saved"
    for name, size in actual.items():
        if name not in entries and name.endswith(LOADED_SUFFIXES):
            problems[name] = f"was not saved with the checkpoint ({size:,} bytes): remove it"
    _refuse(problems, weights, where)
    return entries


def _is_entry(name: str, entry: Any) -> bool:
    """Whether a manifest may say this of a file: one inside the folder, with all its blocks."""
    if not isinstance(entry, dict) or set(entry) != {"bytes", "sha256"}:
        return False
    size, digests = entry["bytes"], entry["sha256"]
    inside = not Path(name).is_absolute() and ".." not in Path(name).parts
    whole = isinstance(digests, list) and all(isinstance(digest, str) for digest in digests)
    return inside and whole and type(size) is int and len(digests) == _num_blocks(size)


def _refuse(problems: Mapping[str, str], weights: Path, where: str) -> None:
    """ValueError that names the first file and how many more there are."""
    if problems:
        name = min(problems)
        others = f", and {len(problems) - 1} more files are damaged" if len(problems) > 1 else ""
        raise ValueError(f"{where}: {weights.name}/{name} {problems[name]}{others}; {REMEDY}")


def checked_first(load: Callable[..., Any]) -> Callable[..., Any]:
    """A function of `dist_checkpointing` that loads a folder, behind the check of the folder."""
    signature, is_common = inspect.signature(load), load.__name__ == COMMON_STATE
    # The common state is read by every rank for itself: no error there tells of another rank.
    damage = (*DAMAGE, RuntimeError) if is_common else DAMAGE

    @functools.wraps(load)
    def load_checked(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        weights = Path(call.arguments["checkpoint_dir"])
        where = str(weights.parent)
        if call.arguments.pop("verify_integrity", False) and weights not in _checks:
            begin_check(weights, where)
        finish_check(weights)
        try:
            state = load(*call.args, **call.kwargs)
            # Megatron ends with status 0 where it does not know how far the training was.
            if is_common and not {"iteration", "total_iters"} & set(state):
                raise ValueError("its common state names no iteration")
            return state
        except damage as error:
            raise ValueError(
                f"{where}: {weights.name} does not load ({first_line(error)})"
            ) from None

    return load_checked


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type."""
    return next(iter(str(error).splitlines()), type(error).__name__)


# Ranks.


def _group() -> Any:
    """torch.distributed, or None where this process belongs to no group."""
    import torch.distributed as dist  # not above: a --help that comes by here is to be quick

    return dist if dist.is_initialized() else None


def _rank() -> int:
    group = _group()
    return group.get_rank() if group else int(os.environ.get("RANK", "0"))


def _world_size() -> int:
    group = _group()
    return group.get_world_size() if group else int(os.environ.get("WORLD_SIZE", "1"))


def _gather(value: Any) -> list[Any]:
    """What every rank passes, in their order; a process without a group is alone."""
    group = _group()
    if not group:
        return [value]
    values = [None] * group.get_world_size()
    group.all_gather_object(values, value)
    return values
