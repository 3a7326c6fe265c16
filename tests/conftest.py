"""Tiny real models and runs, made from configurations: no network, no downloads."""

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest
import torch
from huggingface_hub import constants

from llm_unlearn.console import exit_code_of
from llm_unlearn.exact.run import S3TRun
from tests.exact.ledgers import DATABASES, Place
from tests.postgres import Server, running_server
from tests.saying import Said, Say
from tests.tiny import make_tiny_model, make_tiny_tokenizer

# Tiny models are fastest on one thread, and forking a test process is safe only then.
torch.set_num_threads(1)
# The imported libraries hold millions of objects; collecting them over and over is half the time.
gc.freeze()
# Thousands of small files, synced and removed again, are most of the time on a disk.
IN_MEMORY = "/dev/shm"
if os.path.isdir(IN_MEMORY) and shutil.disk_usage(IN_MEMORY).free > 4 << 30:
    os.environ.setdefault("TMPDIR", IN_MEMORY)
    tempfile.tempdir = None  # pytest has asked for it already


SET_BY_LIBRARIES = ("PYTEST_", "KMP_")  # the second by scikit-learn, as it is imported


def shared_by_all() -> dict[str, Any]:
    """What the tests of a process share, and one file could change for the next."""
    return {
        **{f"${k}": v for k, v in os.environ.items() if not k.startswith(SET_BY_LIBRARIES)},
        "the current directory": os.getcwd(),
        "the Hub's client": (constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET),
        "torch's types": (torch.get_default_dtype(), torch.get_default_device()),
        "torch's ways": (torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled()),
        "torch's initializers": dict(vars(torch.nn.init)),
        "fsync": os.fsync,
    }


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """A file that changes these would decide whether another passes, by the order of the files."""
    before = shared_by_all()
    yield
    after = shared_by_all()
    changed = [what for what in before | after if before.get(what) != after.get(what)]
    assert changed == [], "is changed for others"


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a four-layer random Llama and its tokenizer, as `from_pretrained` reads it."""
    path = tmp_path_factory.mktemp("base") / "tiny-llama"
    make_tiny_model("llama").save_pretrained(path)
    make_tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Server]:
    """A PostgreSQL server; what needs it is skipped where none can be started."""
    with running_server() as server:
        yield server


@pytest.fixture(params=DATABASES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Where a ledger can be made: on either database."""
    on_server = request.param == "postgresql"
    return Place(tmp_path, request.getfixturevalue("postgresql") if on_server else None)


@pytest.fixture(scope="module")
def without_fsync() -> Iterator[None]:
    """Waiting for the disk would be most of the time, and these tests do not cut the power."""
    original, os.fsync = os.fsync, lambda _descriptor: None
    yield
    os.fsync = original


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> S3TRun:
    """A copy of the run that the fixture `trained` of a file made once, to change."""
    shutil.copytree(trained, tmp_path / "run", symlinks=True)
    return S3TRun.open(tmp_path / "run")


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Run `llm-unlearn` with arguments, as a person sees it."""
    from llm_unlearn.cli import app

    def call(*arguments: object) -> Said:
        capsys.readouterr()
        try:
            code = exit_code_of(lambda: app([str(argument) for argument in arguments]))
        except SystemExit as done:
            code = int(done.code or 0)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return Said(code, captured.out, captured.err)

    return call
