"""Peak memory and step time of NPO with a LoRA: reference kept aside, against a copied model.

    python benchmarks/reference_memory.py [--layers 12] [--width 1024] [--steps 6]

A random Llama (no download) unlearns a few rows twice, each in a process of its own: once as this
library does (the reference's log-probabilities are computed once, with the adapter as it was), once
with a second copy of the model that is asked in every step. Losses must agree.
"""

import argparse
import copy
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

VARIANTS = ("kept aside", "copied")
VOCABULARY = 8000


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Unlearn in this process; peak memory is that of the whole process."""
    import torch
    from accelerate import PartialState
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

    from llm_unlearn import demonstration
    from llm_unlearn.approximate import unlearn as unlearning
    from llm_unlearn.approximate.arguments import UnlearningConfig

    device = PartialState(cpu=not torch.accelerator.is_available()).device
    set_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, num_hidden_layers=arguments.layers, hidden_size=arguments.width,
        intermediate_size=4 * arguments.width, num_attention_heads=8,
    )  # fmt: skip
    model = LlamaForCausalLM(config).requires_grad_(False).to(device)
    tokenizer = AutoTokenizer.from_pretrained(demonstration.MODEL_PATH)
    forget, retain = demonstration.unlearning_records()
    if arguments.variant == "copied":
        unlearning.Reference = make_copied(unlearning.Reference)
    times: list[float] = []
    with tempfile.TemporaryDirectory() as directory:
        settings = UnlearningConfig(
            output_dir=directory, method="npo", max_steps=arguments.steps, max_length=64,
            per_device_train_batch_size=4, gradient_accumulation_steps=1, save_strategy="no", bf16=False,
        )  # fmt: skip
        report = unlearning.unlearn(
            model, tokenizer, forget[:16], retain, settings,
            on_step=lambda *_: times.append(time.monotonic()),
        )  # fmt: skip
    cuda = torch.cuda.is_available()
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    steps = [later - earlier for earlier, later in itertools.pairwise(times)]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else process,
        "step_seconds": sorted(steps)[len(steps) // 2],
        "losses": [round(step["forget"], 3) for step in report.history],
    }


def make_copied(reference: type) -> type:
    """A reference that is a second model, as other code has it."""
    import torch

    from llm_unlearn.approximate.losses import label_log_probabilities
    from llm_unlearn.approximate.step import forward

    class Copied(reference):
        def prepare(self, needs: Any, sides: Any) -> None:
            self.copied = copy.deepcopy(self.tuned.model).eval()

        def log_probabilities(self, side: Any) -> Any:
            with torch.no_grad():
                logits = forward(self.copied, side.batch, hidden=False).logits[:, :-1].float()
            return label_log_probabilities(logits, side.labels_BT)

    return Copied


def main() -> None:
    arguments = read_arguments()
    if arguments.variant:
        print(json.dumps(measure(arguments)))
        return
    found = {}
    for variant in VARIANTS:
        command = [sys.executable, str(Path(__file__)), "--variant", variant]
        for name in ("layers", "width", "steps"):
            command += [f"--{name}", str(getattr(arguments, name))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[variant] = json.loads(done.stdout.splitlines()[-1])
    aside, copied = (found[variant] for variant in VARIANTS)
    print(f"{aside['parameters'] / 1e6:.0f} M parameters, float32, {aside['device']}")
    for variant, one in found.items():
        print(
            f"{variant:>10}: peak {one['peak_bytes'] / 1e9:.2f} GB, step {one['step_seconds']:.2f} s, "
            f"losses {one['losses']}"
        )
    print(
        f"     ratio: memory {aside['peak_bytes'] / copied['peak_bytes']:.2f}, "
        f"step time {aside['step_seconds'] / copied['step_seconds']:.2f}"
    )


if __name__ == "__main__":
    main()
