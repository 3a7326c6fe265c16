"""Two processes give what one gives. Started by `torchrun -m`, this file is the two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from safetensors.torch import load_file

from llm_unlearn.approximate.unlearn import Watching, unlearn
from llm_unlearn.approximate.watch import Standing
from tests.approximate.known import LORA, arguments, forget_and_retain, knowing_model
from tests.tiny import make_tiny_tokenizer

ROOT = Path(__file__).parents[2]
ROWS = 4  # of a batch of all processes together
# SGD: Adam divides by the gradient's size, which makes rounding visible where a gradient vanishes.
STEADY: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1, "num_train_epochs": 2}
# Seven rows: the second of two processes fills up its last batch with rows that do not count.
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "even": ("npo", 8, STEADY),
    "odd": ("npo", 7, STEADY),
    "stopped rows": ("ga", 7, {**STEADY, "learning_rate": 0.2, "stop_samples": "icu", "num_train_epochs": 6}),
    "best state": ("npo", 7, {**STEADY, "num_train_epochs": 6, "keep": "best", "stop_when": "utility_floor"}),
    "full": ("kl", 7, {**STEADY, "full": True}),
}  # fmt: skip


class Looks:
    """An evaluation that finds something else in each process, as rounding may."""

    def __init__(self) -> None:
        self.epoch = 0

    def __call__(self, model: Any, tokenizer: Any) -> Standing:
        self.epoch += 1
        if PartialState().is_main_process:
            return Standing(forget=0.0, utility=(0.6, 0.9, 0.7, 0.2)[self.epoch - 1])
        return Standing(forget=0.0, utility=(0.9, 0.1, 0.1, 0.9)[self.epoch - 1])


def run(output: Path, processes: int, **options: Any) -> None:
    """Every case, into a directory of its own."""
    for name, (method, count, given) in CASES.items():
        forget, retain = forget_and_retain()
        training = {**given, "per_device_train_batch_size": ROWS // processes, **options}
        config = arguments(output / name, method, **training)
        watching = Watching(Looks(), Standing(0.0, 0.5)) if "keep" in given else None
        unlearn(
            knowing_model(), make_tiny_tokenizer(), forget[:count], retain, config, lora=LORA,
            watching=watching,
        )  # fmt: skip


def furthest(one: dict[str, Any], other: dict[str, Any]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", "29523", "-m", "tests.approximate.test_processes"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = subprocess.Popen(
        [*command, str(tmp_path / "two")],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _, told = launcher.communicate(timeout=200)
    finally:
        launcher.terminate()  # where the two wait for each other: it ends them too
    assert launcher.returncode == 0, told[-4000:]
    run(tmp_path / "one", 1)
    run(tmp_path / "none", 1, learning_rate=1e-12)
    for name in CASES:
        one, two, none = (
            load_file(next((tmp_path / which / name).glob("*model.safetensors")))
            for which in ("one", "two", "none")
        )
        moved = furthest(one, none)
        assert moved > 1e-4, name
        assert furthest(one, two) < 1e-4 * moved, name
        reports = [
            json.loads((tmp_path / which / name / "unlearning.json").read_bytes())
            for which in ("one", "two")
        ]
        for key in ("steps", "standings", "kept_epoch", "stopped_rows"):
            assert reports[0][key] == reports[1][key], f"{name}: {key}"
        if name == "stopped rows":
            assert 0 < reports[0]["stopped_rows"] < 7, "some rows, or nothing is told"
        if name == "best state":
            assert reports[0]["kept_epoch"] == 2 and list(reports[0]["standings"]) == list("1234")


if __name__ == "__main__":
    run(Path(sys.argv[1]), 2)
