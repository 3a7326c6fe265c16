"""Two processes see together what one sees. Started by `torchrun -m`, this file is the two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import PartialState

from llm_unlearn.approximate.unlearn import unlearn
from llm_unlearn.memorization.observations import Observations
from tests.approximate.known import LORA, arguments, forget_and_retain, knowing_model
from tests.tiny import make_tiny_tokenizer

ROOT = Path(__file__).parents[2]


def track(output: Path, processes: int) -> None:
    """Seven forget rows: the second of two processes fills up its last batch."""
    forget, retain = forget_and_retain()
    config = arguments(
        output, "graddiff", optim="sgd", learning_rate=0.01, num_train_epochs=2,
        per_device_train_batch_size=4 // processes,
    )  # fmt: skip
    observer = Observations()
    unlearn(
        knowing_model(), make_tiny_tokenizer(), forget[:7], retain, config, lora=LORA,
        observer=observer,
    )  # fmt: skip
    seen = observer.collect()
    if PartialState().is_main_process:
        told = {name: values.tolist() for name, values in seen.items()}
        (output / "seen.json").write_text(json.dumps(told))


@pytest.mark.slow
def test_two_processes_see_what_one_sees(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", "29537", "-m", "tests.memorization.test_tracking_processes"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(tmp_path / "two")], cwd=ROOT, env=environment, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    track(tmp_path / "one", 1)
    one, two = (json.loads((tmp_path / name / "seen.json").read_bytes()) for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert one["index"] == two["index"] and one["epoch"] == two["epoch"]
    assert set(one["index"]) >= set(range(7)) and set(one["epoch"]) == {0, 1}
    for name, values in one.items():
        assert two[name] == pytest.approx(values, rel=1e-3, abs=1e-4), name


if __name__ == "__main__":
    track(Path(sys.argv[1]), 2)
