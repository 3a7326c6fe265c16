"""A server under load: clients in another process, one and many at a time, with and without deletions arriving.

    python benchmarks/serving.py --run runs/demo [--clients 16] [--tokens 32] [--seconds 15] [--deletions 10]

The run (experts for each subject of the demonstration, `recipes/s3t.py`) is copied first. Beside the server stands
`transformers`' own `generate` of one served adapter, prompt by prompt and in one batch of as many rows as there are
clients, in the same process's environment. All answers have equally many tokens (`ignore_eos`).
"""

import argparse
import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from peft import PeftModel

from llm_unlearn.exact.base_model import load_base_of
from llm_unlearn.exact.run import S3TRun
from llm_unlearn.exact.settling import depths_served


def questions(run: S3TRun) -> dict[str, list[str]]:
    """Prompts by subject."""
    found: dict[str, list[str]] = {}
    for name in run.directory.slices.names:
        for record in run.directory.slices.read(name):
            found.setdefault(record.subject, []).append(str(record.content["prompt"]))
    return found


async def client(
    url: str, prompts: list[str], options: dict[str, Any], seen: dict[str, Any]
) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:
        number = 0
        while time.monotonic() < options["end"]:
            body = {
                "model": options["model"], "prompt": prompts[number % len(prompts)], "temperature": 0,
                "max_tokens": options["tokens"], "ignore_eos": True,
            }  # fmt: skip
            began = time.monotonic()
            answer = await http.post("/v1/completions", json=body)
            seen["statuses"][answer.status_code] += 1
            if answer.status_code == 200:
                told = answer.json()
                seen["seconds"].append(time.monotonic() - began)
                seen["tokens"] += told["usage"]["completion_tokens"]
                seen["served"][told["unlearning"]["served"]] += 1
            number += 1


async def delete(url: str, subjects: list[str], pause: float, seen: dict[str, Any]) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:
        for subject in subjects:
            await asyncio.sleep(pause)
            began = time.monotonic()
            answer = await http.post("/v1/deletions", json={"subjects": [subject]})
            seen["deletions"][answer.status_code] += 1
            seen["acknowledged"].append(time.monotonic() - began)


async def load(told: dict[str, Any]) -> dict[str, Any]:
    """Ask for some seconds; what came back."""
    seen: dict[str, Any] = {
        "statuses": Counter(), "served": Counter(), "deletions": Counter(), "seconds": [], "acknowledged": [],
        "tokens": 0,
    }  # fmt: skip
    began = time.monotonic()
    told["end"] = began + told["seconds"]
    prompts = told["prompts"]
    work = [
        client(told["url"], prompts[i:] + prompts[:i], told, seen) for i in range(told["clients"])
    ]
    if told["delete"]:
        pause = told["seconds"] / (len(told["delete"]) + 1)
        work.append(delete(told["url"], told["delete"], pause, seen))
    await asyncio.gather(*work)
    return seen | {"spent": time.monotonic() - began}


def ask(
    url: str, options: argparse.Namespace, clients: int, prompts: list[str], gone: list[str]
) -> dict:
    """Load from a process of its own."""
    told = {
        "url": url, "clients": clients, "prompts": prompts, "delete": gone, "seconds": options.seconds,
        "tokens": options.tokens, "model": "people",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, __file__, "--load"], input=json.dumps(told), capture_output=True, text=True, check=True
    )  # fmt: skip
    return json.loads(done.stdout)


def generate(run: S3TRun, prompts: list[str], tokens: int, rows: int, seconds: float) -> float:
    """Tokens a second of one served adapter by `transformers` alone."""
    model, tokenizer = load_base_of(run.directory)
    shard = next(f"shard-{s}" for s, depth in depths_served(run.directory).items() if depth)
    alone = PeftModel.from_pretrained(model, str(run.directory.served / shard)).eval()
    tokenizer.padding_side = "left"
    options = {
        "max_new_tokens": tokens,
        "min_new_tokens": tokens,
        "do_sample": False,
        "pad_token_id": 0,
    }
    made, number, began = 0, 0, 0.0
    while number == 0 or time.monotonic() - began < seconds:
        texts = [prompts[(number * rows + row) % len(prompts)] for row in range(rows)]
        encoded = tokenizer(texts, return_tensors="pt", padding=True)
        with torch.no_grad():
            alone.generate(**encoded, **options)
        if number:  # the first is for warming up
            made += rows * tokens
        else:
            began = time.monotonic()
        number += 1
    return made / (time.monotonic() - began)


def describe(what: str, seen: dict, base: float) -> float:
    rate = seen["tokens"] / seen["spent"]
    quick, slow = np.percentile(seen["seconds"], [50, 99])
    print(
        f"{what}: {rate:.0f} tokens/s ({rate / base:.2f} x one prompt at a time by transformers), "
        f"{len(seen['seconds'])} answers, p50 {1000 * quick:.0f} ms, p99 {1000 * slow:.0f} ms, "
        f"statuses {dict(seen['statuses'])}, served {dict(seen['served'])}",
        flush=True,
    )
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--deletions", type=int, default=10)
    parser.add_argument("--port", type=int, default=8642)
    parser.add_argument("--load", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print(json.dumps(asyncio.run(load(json.loads(sys.stdin.read())))))
        return
    if options.run is None:
        parser.error("--run: experts trained by recipes/s3t.py")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "people"
        shutil.copytree(options.run, path, symlinks=True)
        measure(path, options)


def measure(path: Path, options: argparse.Namespace) -> None:
    run = S3TRun.open(path)
    by_subject = questions(run)
    prompts = [prompt for held in zip(*by_subject.values(), strict=False) for prompt in held]
    one = generate(run, prompts, options.tokens, 1, options.seconds)
    print(f"transformers, one prompt at a time: {one:.0f} tokens/s", flush=True)
    several = generate(run, prompts, options.tokens, options.clients, options.seconds)
    print(
        f"transformers, batches of {options.clients}: {several:.0f} tokens/s ({several / one:.2f} x)"
    )
    url = f"http://127.0.0.1:{options.port}"
    server = subprocess.Popen(
        [
            sys.executable, "-m", "llm_unlearn", "serve", str(path), "--port", str(options.port), "--name", "people",
            "--asks-per-minute", "0", "--deletions-per-hour", "0", "--requests-per-subject", "0",
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ},
    )  # fmt: skip
    try:
        wait_for(url, server)
        alone = describe("server, one client", ask(url, options, 1, prompts, []), one)
        quiet = describe(
            f"server, {options.clients} clients",
            ask(url, options, options.clients, prompts, []),
            one,
        )
        gone = list(by_subject)[: options.deletions]
        seen = ask(url, options, options.clients, prompts, gone)
        busy = describe(f"the same with {len(gone)} deletions arriving", seen, one)
        print(
            f"batching: {quiet / alone:.2f} x one client; with deletions {busy / quiet:.2f} x without; deletions "
            f"{dict(seen['deletions'])}, acknowledged after {1000 * np.median(seen['acknowledged']):.0f} ms (median); "
            f"batched, the server makes {quiet / several:.2f} x what transformers makes in batches"
        )
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def wait_for(url: str, server: subprocess.Popen) -> None:
    while server.poll() is None:
        try:
            if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
        time.sleep(0.2)
    raise SystemExit(f"the server ended with {server.returncode}")


if __name__ == "__main__":
    main()
