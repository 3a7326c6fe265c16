"""Making an export: registered first, written beside, made visible by one rename if nothing of it was deleted.

A crash leaves a directory that the ledger knows (`Copy.half_written`); the next export removes it.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from llm_unlearn import files
from llm_unlearn.errors import RunError, UserError
from llm_unlearn.exact.adapters import adapter_name, file_digest
from llm_unlearn.exact.copies import Copy, mark_gone, register
from llm_unlearn.exact.copy_actions import UNFINISHED, exporting, remove_unfinished
from llm_unlearn.exact.served import LINEAGE_NAME
from llm_unlearn.exact.settling import settle
from llm_unlearn.exact.store import RunDirectory
from llm_unlearn.export import readme
from llm_unlearn.export.adapters import Adapter
from llm_unlearn.export.choosing import MERGED, Part, choose

KINDS = ("merged", "gguf-ready", "vllm")
Say = Callable[[str], None]

# The ranks that vLLM makes room for (`MaxLoRARanks` in vllm/config/lora.py), less 1, which older ones refuse.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
LORA = "lora"


@dataclass(frozen=True)
class Export:
    """What was written. `adapters` are directories below `place`, none in a merged model."""

    id: str
    kind: str
    place: Path
    adapters: list[str]
    bytes: int


def export(
    run: RunDirectory,
    kind: str,
    output: str | Path,
    shard: int | None = None,
    say: Say | None = None,
    part: str | None = None,
) -> Export:
    """Write what a serving stack loads into a new directory, and register it as a copy of the run.

    Args:
        kind: `merged`, `gguf-ready` or `vllm`.
        output: a directory that is not there yet, or is empty; outside of the run.
        shard: only this one; by default all, which `merged` and `gguf-ready` can only do where the run
            has one shard or answers by `merge`.
        say: told what is being done.
        part: of what would be exported, only the adapter of this name (`Part.name`).

    Raises:
        UserError: `output` is taken or within the run, or the run does not answer as one model does.
        RunError: the run is busy, the disk is full, or something that the export is made of was deleted
            while it was written; nothing is left of it.
    """
    if kind not in KINDS:
        raise UserError(f"{kind!r} is no kind of export: expected one of {', '.join(KINDS)}")
    place, say = free_place(run, output), say or (lambda _what: None)
    with exporting(run):
        remove_unfinished(run)
        with run.changing("exporting from it"):
            settle(run)
            parts = choose(run, shard, as_one=kind != "vllm")
            if part is not None and not (parts := [held for held in parts if held.name == part]):
                raise RunError(f"{part} of {run.path} is not served any more: nothing was exported")
            nodes = [key for part in parts for key in part.nodes]
            copy = register(run, kind, str(place), nodes=nodes, is_local=True)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            adapters = _write(run, copy, parts, say)
            say("writing it to disk")
            files.fsync_tree(copy.half_written)
            _publish(run, copy)
        except BaseException as error:
            if os.path.lexists(copy.half_written):
                files.remove(copy.half_written)
            mark_gone(run, copy.id, UNFINISHED)
            if isinstance(error, OSError | SafetensorError):
                reason = getattr(error, "strerror", None) or error
                raise RunError(
                    f"{place} cannot be written ({reason}): nothing was exported"
                ) from None
            raise
        files.fsync(place.parent)
    size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    return Export(copy.id, kind, place, adapters, size)


def free_place(run: RunDirectory, output: str | Path) -> Path:
    """Where an export may go, as a path without links.

    Raises:
        UserError: it is taken, within the run, or no path at all.
    """
    name = str(output)
    if not name.strip() or not name.isprintable():
        raise UserError(f"--output {name!r} is not the name of a directory")
    try:
        place = Path(output).resolve()
        held = list(place.iterdir()) if place.is_dir() else None
        is_taken = held is None and os.path.lexists(place)
    except (OSError, RuntimeError) as error:
        raise UserError(f"--output {name} cannot be used: {error}") from None
    if place.is_relative_to(run.path.resolve()):
        raise UserError(
            f"--output {name} is within the run, which a deletion empties and `verify` checks: choose another"
        )
    if is_taken:
        raise UserError(f"--output {name} is a file: choose another")
    if held:
        raise UserError(f"--output {name} is not empty: choose a new directory")
    return place


def _publish(run: RunDirectory, copy: Copy) -> None:
    """Make the finished export visible, unless a deletion took something that is in it."""
    with run.changing("exporting from it"):
        settle(run)
        if not all(run.nodes.exists(key) for key in copy.nodes):
            raise RunError(
                f"{run.path} changed while it was exported: something that was in it is deleted. Nothing was "
                "exported; export again"
            )
        os.replace(copy.half_written, copy.place)


def _write(run: RunDirectory, copy: Copy, parts: list[Part], say: Say) -> list[str]:
    """Everything that the export holds; returns the directories of adapters in it."""
    directory = copy.half_written
    directory.mkdir()
    is_whole = len(run.shards) <= 1 or parts[0].name == MERGED
    if copy.kind == "vllm":
        adapters, text = _write_vllm(run, copy, parts, is_whole, say)
    else:
        adapters, text = _write_model(run, copy, parts[0], is_whole, say)
    (directory / "README.md").write_text(text, encoding="utf-8")
    written = sorted(path for path in directory.rglob("*") if path.is_file())
    lineage = _lineage(run, copy, parts) | {
        "files": {path.relative_to(directory).as_posix(): file_digest(path) for path in written}
    }
    _write_json(directory / LINEAGE_NAME, lineage)
    return adapters


def _write_vllm(
    run: RunDirectory, copy: Copy, parts: list[Part], is_whole: bool, say: Say
) -> tuple[list[str], str]:
    modules, highest = [], 1
    for number, part in enumerate(parts, start=1):
        say(f"adapter {number} of {len(parts)}")
        adapter = part.read()
        highest = max(highest, adapter.rank)
        name = adapter_name(part.name, adapter.digest)
        _write_adapter(adapter, part, copy.half_written / name)
        modules.append({"name": name, "path": str(Path(copy.place, name))})
    rank = next((rank for rank in RANKS if rank >= highest), None)
    if rank is None:
        raise UserError(
            f"rank {highest} is more than the {RANKS[-1]} that vLLM loads: export --merged"
        )
    _write_json(copy.half_written / "lora_modules.json", modules)
    return [module["name"] for module in modules], readme.of_vllm(
        run, copy, modules, rank, is_whole
    )


def _write_model(
    run: RunDirectory, copy: Copy, part: Part, is_whole: bool, say: Say
) -> tuple[list[str], str]:
    from llm_unlearn.export.merged import write_merged

    directory = copy.half_written
    say("merging the adapter into the base model")
    adapter, what = part.read(), f"the adapter of {part.name}"
    _write_adapter(adapter, part, directory / LORA)
    dtype = write_merged(run, directory / LORA, directory)
    if copy.kind == "gguf-ready" and not run.shape.fan_in_fan_out:
        return [LORA], readme.of_gguf(run, copy, what, dtype, is_whole, LORA)
    files.remove(directory / LORA)
    if copy.kind == "gguf-ready":
        return [], readme.of_gguf(run, copy, what, dtype, is_whole, None)
    return [], readme.of_merged(run, copy, what, dtype, is_whole)


def _write_adapter(adapter: Adapter, part: Part, directory: Path) -> None:
    adapter.write(directory)
    _write_json(directory / LINEAGE_NAME, {"digest": adapter.digest, "made_of": part.lineages})


def _lineage(run: RunDirectory, copy: Copy, parts: list[Part]) -> dict[str, Any]:
    """What an export is made of. The run is named by the id of its salt, the base model by its digest."""
    base = Path(run.shape.name_or_path)
    return {
        "version": 1,
        "copy": copy.id,
        "kind": copy.kind,
        "made_from": {"run": run.key.salt_id, "served": copy.served},
        "base_model": {
            "name": base.name if base.is_absolute() else run.shape.name_or_path,
            "revision": run.shape.revision,
            "digest": run.shape.weights,
        },
        "nodes": list(copy.nodes),
        "adapters": [{"name": part.name, "made_of": part.lineages} for part in parts],
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True), encoding="utf-8")
