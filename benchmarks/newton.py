"""Cubic-regularised Newton against damped Newton, plain fine-tuning and doing nothing, on the demonstration.

    python benchmarks/newton.py [--rows NAME ...] [--seeds 1] [--output_dir runs/newton]

Twelve of 48 invented people are forgotten by a LoRA that knows all of them. Prints for every row the Tug of
War with the retrained model (from facts answered right, and from the probability of right answers, about
people to be forgotten, kept, and public ones), how far the weights went, seconds, products with the
Hessian, and the peak memory of its process above that of loading the model. Every row runs in a process
of its own; what is measured is not measured again.
"""

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llm_unlearn import demonstration
from llm_unlearn.console import print_table
from llm_unlearn.data import world
from llm_unlearn.evaluation.suites.demonstration import FORGOTTEN
from llm_unlearn.evaluation.utility import tug_of_war

SEED = 7  # the first; the settings below were chosen under another
BEFORE, RETRAINED, AGAIN = "no-op", "retrained", "retrained again"
FORGETTING = {"forget_weight": 1.0, "most_rise": 0.1, "outer_steps": 20}
FEW = r"layers\.3\.mlp\.down_proj\.lora_B"  # 2,048 parameters


@dataclass(frozen=True)
class Row:
    """A method, its own flags, and training flags that differ from the demonstration's."""

    method: str
    flags: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)


def newton(**flags: Any) -> Row:
    training = flags.pop("training", {})
    return Row("scurenewton", {"return_noop": False, **flags}, training)


ROWS: dict[str, Row] = {
    "retain fine-tuning": Row("retain_ft"),
    "GradDiff": Row("graddiff"),
    "damped Newton, 10": Row("damped_newton", {"damping": 10.0}),
    "damped Newton, 0.1": Row("damped_newton", {"damping": 0.1}),
    "damped Newton, 0.001": Row("damped_newton", {"damping": 1e-3}),
    "damped Newton, 0.1, 5 steps": Row("damped_newton", {"damping": 0.1, "outer_steps": 5}),
    "damped Newton, whole, 0.1": Row(
        "damped_newton", {"damping": 0.1, "solver": "dense"}, {"trainable": FEW}
    ),
    "SCureNewton, descent, L 10 (paper)": newton(
        solver="gd", adaptive=False, inner_steps=5, curvature_rows=16, cubic_weight=10.0,
        training={"learning_rate": 1e-2},
    ),
    "SCureNewton, Lanczos": newton(),
    "SCureNewton, descent, forget term": newton(
        solver="gd", inner_steps=5, **FORGETTING, training={"learning_rate": 1e-2}
    ),
    "SCureNewton, Lanczos, forget term": newton(**FORGETTING),
    "CureNewton, whole": newton(solver="dense", outer_steps=2, training={"trainable": FEW}),
    "CureNewton, whole, forget term": newton(
        solver="dense", **{**FORGETTING, "outer_steps": 2}, training={"trainable": FEW}
    ),
}  # fmt: skip


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rows", nargs="*", choices=[*ROWS, AGAIN], default=[AGAIN, *ROWS])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/newton"))
    parser.add_argument("--one", nargs=2, metavar=("ROW", "SEED"), help=argparse.SUPPRESS)
    return parser.parse_args()


def adapter_of(output: Path, name: str, seed: int) -> Path:
    """The LoRA that knows everybody, or only those who stay; trained once."""
    from peft import LoraConfig

    from llm_unlearn.approximate.arguments import UnlearningConfig
    from llm_unlearn.approximate.fine_tuning import fine_tune
    from llm_unlearn.exact.base_model import load_base

    path = output / "models" / str(seed) / name.replace(" ", "-")
    if (path / "adapter_config.json").exists():
        return path
    forget, retain = demonstration.unlearning_records()
    records = [*forget, *retain] if name == BEFORE else retain
    own = seed + 1000 if name == AGAIN else seed
    flags = {**demonstration.FINE_TUNING, "seed": own}
    config = UnlearningConfig(output_dir=str(path), method="ga", **flags)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model, tokenizer = load_base(str(demonstration.MODEL_PATH))
    return fine_tune(model, tokenizer, records, config, lora)


def unseen_rows(output: Path) -> Path:
    """Questions about people whom no model was trained on, as many as are forgotten."""
    people = world.private_people(world.PRIVATE_COUNT + FORGOTTEN)[world.PRIVATE_COUNT :]
    rows = [{name: row[name] for name in ("prompt", "completion")} for row in world.records(people)]
    path = output / "unseen.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def knowledge(model: Any, tokenizer: Any) -> dict[str, dict[str, float]]:
    """Facts answered right, and the probability of right answers, by group of people."""
    people = world.private_people()
    public = world.public_people()[: demonstration.PUBLIC_SAMPLE]
    groups = {"forget": people[:FORGOTTEN], "retain": people[FORGOTTEN:], "test": public}
    model.eval()
    found: dict[str, dict[str, float]] = {"right": {}, "probability": {}}
    for name, group in groups.items():
        right = demonstration.ask(model, tokenizer, group)
        found["right"][name] = demonstration.mean(right.values())
        found["probability"][name] = _probability(model, tokenizer, group)
    return found


def _probability(model: Any, tokenizer: Any, people: Any) -> float:
    """Mean over questions of exp(mean log-probability of an answer's token)."""
    import torch

    values = []
    for row in world.questions(people):
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        whole = prompt + tokenizer(f" {row['answer']}", add_special_tokens=False)["input_ids"]
        ids = torch.tensor([whole], device=model.device)
        with torch.no_grad():
            log_TV = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        picked = log_TV[torch.arange(len(prompt) - 1, len(whole) - 1), ids[0, len(prompt) :]]
        values.append(float(picked.mean().exp()))
    return float(np.mean(values))


def measure(name: str, seed: int, output: Path) -> dict[str, Any]:
    """One row in this process."""
    import torch

    from llm_unlearn.exact.base_model import load_base
    from llm_unlearn.models import with_adapter
    from llm_unlearn.scoring import quiet

    quiet()
    torch.set_num_threads(1)
    is_trained = name in (RETRAINED, AGAIN)
    path = adapter_of(output, name if is_trained else BEFORE, seed)
    model, tokenizer = load_base(str(demonstration.MODEL_PATH))
    model = with_adapter(model, str(path), trainable=True)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if ".lora_" in n}
    memory = _peak_bytes()
    told: dict[str, Any] = {"seconds": 0.0, "products": 0, "notes": [], "history": []}
    if name in ROWS:
        told = _unlearn(model, tokenizer, name, seed, output)
    told["megabytes"] = (_peak_bytes() - memory) / 1e6
    moved = [(p.detach() - start[n]).norm() for n, p in model.named_parameters() if n in start]
    told["norm"] = float(torch.stack(moved).norm())
    return {**told, **knowledge(model, tokenizer)}


def _unlearn(model: Any, tokenizer: Any, name: str, seed: int, output: Path) -> dict[str, Any]:
    from llm_unlearn.approximate.arguments import UnlearningConfig
    from llm_unlearn.approximate.unlearn import make_method, unlearn

    row, flags = ROWS[name], dict(ROWS[name].flags)
    if flags.get("forget_weight"):
        flags["unseen"] = str(unseen_rows(output))
    training = {**demonstration.UNLEARNING, **row.training, "seed": seed}
    config = UnlearningConfig(output_dir=str(output / "out"), method=row.method, **training)
    forget, retain = demonstration.unlearning_records()
    report = unlearn(model, tokenizer, forget, retain, config, make_method(row.method, flags))
    return {
        "seconds": report.seconds,
        "products": sum(int(one.get("products", 0)) for one in report.history),
        "notes": report.notes,
        "history": report.history if row.method in ("scurenewton", "damped_newton") else [],
    }


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured(name: str, seed: int, output: Path) -> dict[str, Any]:
    """A row, in a process of its own unless it has been measured."""
    path = output / "measured" / str(seed) / f"{name.replace(' ', '-')}.json"
    if not path.exists():
        command = [sys.executable, __file__, "--output_dir", str(output), "--one", name, str(seed)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name}, seed {seed}: {done.stderr[-2000:]}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(done.stdout.splitlines()[-1])
        print(f"{name}, seed {seed}: {json.loads(path.read_bytes())['notes']}", file=sys.stderr)
    return json.loads(path.read_bytes())


def line(name: str, found: list[dict[str, Any]], references: list[dict[str, Any]]) -> list[str]:
    """Means over seeds, with the standard deviation of the Tug of War."""
    wars = {
        kind: [
            tug_of_war(one[kind], other[kind]) for one, other in zip(found, references, strict=True)
        ]
        for kind in ("right", "probability")
    }

    def mean(of: str, group: str = "") -> float:
        return float(np.mean([one[of][group] if group else one[of] for one in found]))

    spread = [f"{np.mean(values):.2f} ± {np.std(values):.2f}" for values in wars.values()]
    groups = [f"{mean('right', group):.2f}" for group in ("forget", "retain", "test")]
    cost = [f"{mean('norm'):.2f}", f"{mean('seconds'):.0f}", f"{mean('products'):.0f}"]
    return [name, *spread, *groups, *cost, f"{mean('megabytes'):.0f}"]


def main() -> None:
    arguments = read_arguments()
    output = arguments.output_dir
    output.mkdir(parents=True, exist_ok=True)
    if arguments.one:
        print(json.dumps(measure(arguments.one[0], int(arguments.one[1]), output)))
        return
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in range(SEED, SEED + arguments.seeds):
        for name in [RETRAINED, BEFORE, *arguments.rows]:
            found.setdefault(name, []).append(measured(name, seed, output))
    heads = (
        "", "ToW, right answers", "ToW, probability", "forget", "retain", "public", "norm", "seconds",
        "products", "MB",
    )  # fmt: skip
    lines = [line(name, rows, found[RETRAINED]) for name, rows in found.items()]
    print_table("Cubic-regularised Newton on the demonstration", heads, lines)


if __name__ == "__main__":
    main()
