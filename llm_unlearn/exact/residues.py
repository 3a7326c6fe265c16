"""Residues: everything in a run that a record can leave traces in, by kind, and how it is purged.

A new writer adds its kind here. Whatever lies in a run directory and is of no known kind is named
in the certificate as out of reach, so forgetting to register one shows.
"""

import os
import re
from collections.abc import Container
from pathlib import Path

from llm_unlearn import files
from llm_unlearn.exact.adapters import WEIGHTS_NAME
from llm_unlearn.exact.store import MANIFEST_NAME, OWN_ENTRIES, WORDS_NAME, RunDirectory

# Directories that are emptied by every deletion: they are made again when training needs them.
EMPTIED = {
    "hidden-state cache": "cache",
    "trainer output": "trainer",
}

# Every file that the directories of a run may hold, as patterns of the path below each.
KNOWN_FILES = {
    "records": r"(shard-\d+/slice-\d+|core)\.(jsonl|[0-9a-f]{16}\.texts)|pending/[0-9a-f]{16}\.jsonl",
    "nodes": rf"[0-9a-f]{{64}}/({'|'.join(map(re.escape, (WEIGHTS_NAME, MANIFEST_NAME, WORDS_NAME)))})",
    "generations": r"[0-9a-f]{16}/(shard-\d+|core)/"
    r"(README\.md|lineage\.json|adapter_(model\.safetensors|config\.json)|words-\d+\.safetensors)",
    "certificates": r"[0-9a-f]{16}\.json(\.tsr)?",
    "serving": r"tokens\.json(\.lock)?|audit-[A-Za-z0-9._-]+\.jsonl|replicas/[A-Za-z0-9._-]+\.json",
    "memorization": r"([0-9a-f]{64}|scores|counterfactual-\d{3,})\.parquet",
}

COPIES = "copies of the run directory or of earlier served adapters (backups, downloads, the Hub, other servers)"
ENCRYPTED_COPIES = (
    "copies of earlier served adapters, which are not encrypted, and copies of the key store made before the "
    "deletion; records, nodes and caches in copies of the run directory cannot be opened without those"
)

# What no run directory can reach; named in every certificate.
OUT_OF_REACH = (
    "the pre-training data of the base model",
    "the source of the records (the file or Hub dataset that the run was made from)",
    COPIES,
    "blocks that the file system or the disk has freed but not overwritten",
)


def purge_nodes(run: RunDirectory, wanted: Container[str]) -> list[str]:
    """Drop every node that the run does not want any more; returns their keys."""
    stale = [key for key in run.nodes.keys() if key not in wanted]
    for key in stale:
        run.nodes.remove(key)
    return stale


def purge_emptied(run: RunDirectory) -> dict[str, int]:
    """Empty the caches and training outputs; returns how many files of each kind went."""
    counts = {}
    for kind, name in EMPTIED.items():
        directory = run.path / name
        counts[kind] = (
            sum(path.is_file() for path in directory.rglob("*")) if directory.is_dir() else 0
        )
        files.remove(directory)
    return counts


def purge_temporary(run: RunDirectory) -> int:
    """Remove what crashes left half written. The caller holds the lock under which it is written."""
    stale = [
        Path(folder, name)
        for folder, directories, names in os.walk(run.path)
        for name in (*directories, *names)
        if name.startswith(files.TEMPORARY_PREFIX)
    ]
    for path in stale:
        files.remove(path)
    return len(stale)


def destroy_keys(run: RunDirectory) -> dict[str, int]:
    """Destroy the keys of what is gone; how many, empty for a run without encryption.

    The caller holds the run's lock and has removed everything else.
    """
    return run.at_rest.destroy_keys()


def out_of_reach(run: RunDirectory) -> list[str]:
    """What this run cannot reach; where it is encrypted, old copies are in reach, and their keys are not."""
    if not run.at_rest.is_encrypted:
        return list(OUT_OF_REACH)
    return [ENCRYPTED_COPIES if line == COPIES else line for line in OUT_OF_REACH]


def unrecognised(run: RunDirectory) -> list[Path]:
    """Files of the run directory that are of no known kind, and top-level entries that are not."""
    foreign = [path for path in run.path.iterdir() if path.name not in OWN_ENTRIES]
    for name, known in KNOWN_FILES.items():
        directory = str(run.path / name)
        is_known = re.compile(known).fullmatch
        # With an adapter for each subject there are many files: walking is several times faster than globbing.
        foreign += [
            Path(folder, file)
            for folder, _, held in os.walk(directory)
            for file in held
            if not is_known(os.path.join(folder, file)[len(directory) + 1 :].replace(os.sep, "/"))
        ]
    return sorted(foreign)
