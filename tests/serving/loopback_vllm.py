"""A vLLM server without a model: its endpoints, statuses and messages, and three of its known failures.

After `vllm/entrypoints/openai/models/serving.py` and `serve/lora/api_router.py`. The text of an answer names the
content of the adapter that computed it, so a test sees who answered.
"""

import hashlib
import json
import time
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from typing import Any

from tests.serving.loopback import Question, Said

BASE = "tiny-base"


def error(status: int, kind: str, message: str) -> Said:
    told = {"message": message, "type": kind, "param": None, "code": status}
    return Said(status, {"error": told})


NO_ROUTE = Said(404, {"detail": "Not Found"})


@dataclass
class LoopbackVllm:
    """State and failures of one server.

    Attributes:
        keeps_weights: unloading forgets the name and leaves the weights (issue 54839).
        caches_by_name: a prompt is answered from what was computed under the adapter's name (42125).
        mixes: running requests are served by the adapter that was loaded last (47724).
        unload_lies: `listed`: says success and goes on; `hidden`: and does not list it either.
        fails: path -> what it answers instead.
        prefix: of paths here, for those that it is told.
    """

    max_rank: int = 64
    allows_updating: bool = True
    has_metrics: bool = True
    keeps_weights: bool = True
    caches_by_name: bool = False
    mixes: bool = False
    unload_lies: str = ""
    load_lies: bool = False
    seconds: float = 0.0
    prefix: tuple[str, str] = ("", "")
    fails: dict[str, Said] = field(default_factory=dict)
    token: str | None = None
    adapters: dict[str, str] = field(default_factory=dict)  # name -> path
    hidden: dict[str, str] = field(default_factory=dict)
    memory: dict[str, str] = field(default_factory=dict)  # name -> digest of weights
    cache: dict[tuple[str, str], str] = field(default_factory=dict)
    running: str = ""
    asked: list[Question] = field(default_factory=list)
    started: float = field(default_factory=lambda: time.time() - 5)

    def restart(self) -> None:
        """Everything in memory goes; adapters that it was not started with are not loaded."""
        for held in (self.adapters, self.hidden, self.memory, self.cache):
            held.clear()
        self.unload_lies, self.started = "", time.time() + 10

    def __call__(self, question: Question) -> Said:
        self.asked.append(question)
        time.sleep(self.seconds)
        if self.token and question.token != f"Bearer {self.token}":
            return error(401, "Unauthorized", "Unauthorized")
        if question.path in self.fails:
            return self.fails[question.path]
        known = {
            ("GET", "/v1/models"): self.models,
            ("GET", "/metrics"): self.metrics,
            ("POST", "/v1/completions"): self.completions,
        }
        if self.allows_updating:
            known |= {
                ("POST", "/v1/load_lora_adapter"): self.load,
                ("POST", "/v1/unload_lora_adapter"): self.unload,
            }
        handle = known.get((question.method, question.path))
        return NO_ROUTE if handle is None else handle(question.body or {})

    def models(self, _body: Any) -> Said:
        cards: list[dict[str, Any]] = [
            {"id": BASE, "object": "model", "root": BASE, "parent": None}
        ]
        cards += [
            {"id": name, "object": "model", "root": path, "parent": BASE}
            for name, path in self.adapters.items()
        ]
        return Said(200, {"object": "list", "data": cards})

    def metrics(self, _body: Any) -> Said:
        if not self.has_metrics:
            return NO_ROUTE
        lines = [
            "# HELP process_start_time_seconds Start time of the process since unix epoch in seconds.",
            f"process_start_time_seconds {self.started}",
            'vllm:cache_config_info{block_size="16",enable_prefix_caching="True",engine="0"} 1.0',
            'vllm:lora_requests_info{max_lora="4",running_lora_adapters="shard-9@eeeeeeeeeeee",'
            'waiting_lora_adapters=""} 1.0',
            f'vllm:lora_requests_info{{max_lora="4",running_lora_adapters="{self.running}",'
            'waiting_lora_adapters=""} 2.5e+09',
        ]
        now = max(time.time(), self.started + 1)
        return Said(200, "\n".join(lines).encode(), {"Date": formatdate(now, usegmt=True)})

    def load(self, body: dict[str, str]) -> Said:
        name, path = body.get("lora_name"), body.get("lora_path")
        if not name or not path:
            return error(
                400, "InvalidUserInput", "Both 'lora_name' and 'lora_path' must be provided."
            )
        if name in self.adapters:
            told = f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, "
            return error(400, "InvalidUserInput", f"{told}set 'load_inplace' to True.")
        here = Path(path.replace(*self.prefix, 1) if self.prefix[0] else path)
        try:
            config = json.loads((here / "adapter_config.json").read_bytes())
            weights = (here / "adapter_model.safetensors").read_bytes()
        except OSError:
            return error(
                404, "NotFoundError", f"Loading lora {name} failed: No adapter found for {path}"
            )
        if config["r"] > self.max_rank:
            told = f"LoRA rank {config['r']} is greater than max_lora_rank {self.max_rank}."
            return error(400, "BadRequestError", told)
        if not self.load_lies:
            self.adapters[name] = path
            self.memory[name] = hashlib.sha256(weights).hexdigest()
        return Said(200, f"Success: LoRA adapter '{name}' added successfully.".encode())

    def unload(self, body: dict[str, str]) -> Said:
        name = body.get("lora_name", "")
        if name not in self.adapters:
            return error(404, "NotFoundError", f"The lora adapter '{name}' cannot be found.")
        if self.unload_lies != "listed":
            path = self.adapters.pop(name)
            if self.unload_lies == "hidden":
                self.hidden[name] = path
            elif not self.keeps_weights:
                self.memory.pop(name)
        return Said(200, f"Success: LoRA adapter '{name}' removed successfully.".encode())

    def completions(self, body: dict[str, Any]) -> Said:
        name, prompt = body["model"], body["prompt"]
        if name != BASE and name not in self.adapters and name not in self.hidden:
            return error(404, "NotFoundError", f"The model `{name}` does not exist.")
        content = self.memory.get(name, "base")
        if self.mixes and self.memory:
            content = list(self.memory.values())[-1]
        text = f" {content[:12]} says {len(prompt)}"
        if self.caches_by_name:
            text = self.cache.setdefault((name, prompt), text)
        return Said(200, {"choices": [{"text": text, "index": 0}]})
