"""Does the server last? `python benchmarks/serve_lasting.py --minutes 30`

A server on the embedded base (float32) has more requests than it can compute, while adapters are
replaced, renamed, removed and registered again without a pause, and hostile clients send what may
end others' requests: parameters at the ends of their ranges, schemas, long and deeply nested bodies,
graders, embeddings, hang-ups, half a head. Every completion is compared with the one that the named
version gives alone; every error must be a proper 4xx or 503; memory, threads and file descriptors
are recorded every five seconds.
"""

import argparse
import asyncio
import json
import math
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

from common import publish, roofline

VERSIONS, NAMES, PROMPTS, NEW = 12, 6, 24, 6
CHAT: dict[str, Any] = {"model": "embedded", "messages": [{"role": "user", "content": "hello"}]}
GRADER = {"type": "string_check", "name": "x", "reference": "a", "operation": "eq"}
# path and body of requests that may not harm others, whatever their own answer is
ATTACKS: list[tuple[str, Any]] = [
    (
        "/v1/chat/completions",
        {**CHAT, "max_tokens": 8, "presence_penalty": 2, "repetition_penalty": 10},
    ),
    ("/v1/chat/completions", {**CHAT, "max_tokens": 8, "temperature": 2, "logit_bias": {"5": 100}}),
    ("/v1/chat/completions", {**CHAT, "max_tokens": 8, "stop": ["e", "a" * 9000]}),
    *(
        (
            "/v1/chat/completions",
            {
                **CHAT,
                "max_tokens": 8,
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "s", "schema": schema},
                },
            },
        )
        for schema in (
            {"$ref": "#"},
            {"type": "string", "pattern": "(a|a)*b"},
            {"enum": ["x" * 1000] * 500},
        )
    ),
    (
        "/v1/chat/completions",
        {**CHAT, "messages": [{"role": "user", "content": "the sea " * 400_000}]},
    ),
    ("/v1/chat/completions", "[" * 100_000),
    ("/v1/embeddings", {"model": "embedded", "input": ["the house by the road " * 20] * 50}),
    ("/v1/completions", {"model": "embedded", "prompt": ["tell a story"] * 64, "max_tokens": 100}),
    ("/v1/fine_tuning/alpha/graders/validate", {"grader": {**GRADER, "input": "{{" * 40_000}}),
    (
        "/v1/fine_tuning/alpha/graders/run",
        {
            "grader": {**GRADER, "input": "{{ item.x }}" * 1000},
            "model_sample": "a",
            "item": {"x": "y" * 9000},
        },
    ),
]


def make_material(folder: Path) -> dict[str, dict[str, str]]:
    """Adapters on disk; hash -> prompt -> the answer that this adapter gives alone; "" stands for the base."""
    import torch

    torch.set_num_threads(1)
    from afina.adapters.attach import attach, detach
    from afina.adapters.saving import save_adapter
    from afina.adapters.target_selection import resolve_target_modules
    from afina.engine.engine import generate_completions
    from afina.engine.request import SamplingParams
    from afina.io.adapter_config import AdapterConfig
    from afina.models.loading import load_base

    base = load_base("embedded", dtype="float32")
    shutil.rmtree(folder, ignore_errors=True)
    targets = resolve_target_modules(base.model, "all-linear", None, False)
    sampling = SamplingParams(max_new_tokens=NEW)

    def answers(route: Any) -> dict[str, str]:
        texts = [f"Text {n}: the house by the road number {n * 7}" for n in range(PROMPTS)]
        prompts = [base.tokenizer(text)["input_ids"] for text in texts]
        written = generate_completions(base, prompts, sampling, route)
        stop = base.tokenizer.eos_token_id
        return {
            text: base.decode([t for t in completion.token_ids if t != stop])
            for text, completion in zip(texts, written, strict=True)
        }

    known = {"": answers(None)}
    for version in range(VERSIONS):
        method, rank = (("lora", 8), ("dora", 4), ("mora", 4), ("lora", 32))[version % 4]
        adapter = attach(
            base.model,
            base.forward_context,
            "a",
            AdapterConfig(method, targets, rank=rank),
            seed=version,
        )
        generator = torch.Generator().manual_seed(version)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        digest = save_adapter(adapter, base, folder / f"v{version}")
        known[digest] = answers(adapter.active)
        detach(base.model, adapter)
    return known


class Load:
    """Clients and an administrator, and what they saw."""

    def __init__(
        self, url: str, known: dict[str, dict[str, str]], hashes: list[str], seconds: float
    ) -> None:
        import httpx2 as httpx

        self.http = httpx.AsyncClient(
            base_url=url, timeout=120, limits=httpx.Limits(max_connections=400)
        )
        self.known, self.hashes, self.until = known, hashes, time.monotonic() + seconds
        # which hash a name got, asked for at the first time and done at the second at the latest
        self.valid: dict[str, list[tuple[float, float, str | None]]] = {
            f"n{n}": [] for n in range(NAMES)
        }
        self.statuses: Counter[int] = Counter()
        self.wrong: list[str] = []
        self.improper: list[str] = []
        self.lost = 0
        self.memory: list[tuple[float, float]] = []
        self.threads: list[int] = []
        self.files: list[int] = []
        self.attacked: Counter[int] = Counter()
        self.hung_up = 0
        self.silent: list[asyncio.StreamWriter] = []

    async def client(self, seed: int) -> None:
        rng = random.Random(seed)
        while time.monotonic() < self.until:
            name = rng.choice(["embedded", *self.valid])
            text = rng.choice(sorted(self.known[""]))
            begin = time.monotonic()
            body = {"model": name, "prompt": text, "max_tokens": NEW, "temperature": 0}
            try:
                answer = await self.http.post("/v1/completions", json=body)
            except Exception as error:
                self.lost += 1
                self.improper.append(repr(error))
                continue
            self.statuses[answer.status_code] += 1
            if answer.status_code == 200:
                self.check(name, text, answer.json(), begin)
            elif answer.status_code not in (404, 429, 503) or "error" not in answer.json():
                self.improper.append(f"{answer.status_code} {answer.text[:200]}")
            elif answer.status_code in (429, 503):
                await asyncio.sleep(min(1.0, float(answer.headers.get("retry-after", "1"))))

    def check(self, name: str, text: str, body: dict[str, Any], begin: float) -> None:
        """The answer is that of a version which the name pointed at while the request was under way."""
        got = body["choices"][0]["text"]
        if name == "embedded":
            versions = {""}
        else:
            history = [*self.valid[name], (math.inf, math.inf, None)]
            versions = {
                digest
                for (_, _, digest), (_, ended, _) in pairwise(history)
                if digest is not None and ended >= begin
            }
        if got not in {self.known[version][text] for version in versions}:
            owner = next((v for v in self.known if self.known[v].get(text) == got), "nobody")
            self.wrong.append(
                f"{name} {text!r}: {got!r}, as {owner[:8]} answers, not {[v[:8] for v in versions]}"
            )

    async def admin(self) -> None:
        rng = random.Random(99)
        while time.monotonic() < self.until:
            name, version = rng.choice(sorted(self.valid)), rng.randrange(VERSIONS)
            there = bool(self.valid[name]) and self.valid[name][-1][2] is not None
            digest = None if there and rng.random() < 0.2 else self.hashes[version]
            asked = time.monotonic()
            self.valid[name].append(
                (asked, math.inf, digest)
            )  # its effect may come before its answer
            body = {"folder": f"v{version}"}
            if digest is None:
                done = await self.http.delete(f"/v1/adapters/{name}")
            elif there:
                done = await self.http.put(f"/v1/adapters/{name}", json=body)
            else:
                done = await self.http.post("/v1/adapters", json=body | {"name": name})
            self.valid[name][-1] = (asked, time.monotonic(), digest)
            if done.status_code >= 400:
                self.improper.append(f"admin {done.status_code} {done.text[:200]}")
            await asyncio.sleep(rng.random() * 0.3)

    async def attacker(self, seed: int) -> None:
        """Send hostile requests, and hang up during a third of them."""
        rng = random.Random(seed)
        while time.monotonic() < self.until:
            path, body = rng.choice(ATTACKS)
            text = body if isinstance(body, str) else json.dumps(body)
            head = {"content-type": "application/json"}
            work = asyncio.ensure_future(self.http.post(path, content=text, headers=head))
            try:
                patience = rng.random() * 0.5 if rng.random() < 0.33 else 100.0
                got = await asyncio.wait_for(work, patience)
            except TimeoutError:
                self.hung_up += 1
                continue
            except Exception as error:
                self.improper.append(f"attack {path}: {error!r}")
                continue
            self.attacked[got.status_code] += 1
            if got.status_code >= 500 and got.status_code != 503:
                self.improper.append(f"attack {path}: {got.status_code} {got.text[:200]}")
            await asyncio.sleep(rng.random())

    async def half_head(self, port: int) -> None:
        """Open connections that never send a complete head."""
        while time.monotonic() < self.until:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\n")
            self.silent.append(writer)
            await asyncio.sleep(0.5)
            if len(self.silent) > 200:
                self.silent.pop(0).close()

    async def watch(self, process: int) -> None:
        begin, place = time.monotonic(), Path(f"/proc/{process}")
        while time.monotonic() < self.until:
            pages = int((place / "statm").read_text().split()[1])
            self.memory.append((time.monotonic() - begin, pages * os.sysconf("SC_PAGE_SIZE") / 1e6))
            self.threads.append(len(list((place / "task").iterdir())))
            self.files.append(len(list((place / "fd").iterdir())))
            await asyncio.sleep(5)

    async def run(self, clients: int, attackers: int, process: int, port: int) -> None:
        await asyncio.gather(
            self.admin(),
            self.watch(process),
            self.half_head(port),
            *(self.client(n) for n in range(clients)),
            *(self.attacker(n) for n in range(attackers)),
        )
        for writer in self.silent:
            writer.close()
        await self.http.aclose()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=48)
    parser.add_argument("--attackers", type=int, default=4)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="afina-lasting-"))
    known = make_material(folder / "adapters")
    hashes = [
        json.loads((folder / "adapters" / f"v{n}" / "afina.json").read_text())["hash"]
        for n in range(VERSIONS)
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "empty").mkdir()
    command = [
        sys.executable,
        "-m",
        "afina",
        "serve",
        "--port",
        str(port),
        "--insecure",
        "--dtype",
        "float32",
        "--state-dir",
        str(folder / "state"),
        "--max-training-jobs",
        "0",
        "--adapters",
        str(folder / "adapters"),
    ]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_for(port)
        load = Load(f"http://127.0.0.1:{port}", known, hashes, 60 * options.minutes)
        asyncio.run(load.run(options.clients, options.attackers, server.pid, port))
        server.terminate()
        ended = server.wait(60)
    finally:
        server.kill()
    third = len(load.memory) // 3
    early, late = (
        statistics.median(mb for _, mb in part)
        for part in (load.memory[third : 2 * third], load.memory[2 * third :])
    )
    requests = sum(load.statuses.values())
    figures = {
        "requests": float(requests),
        "answered": float(load.statuses[200]),
        "wrong_answers": float(len(load.wrong)),
        "lost": float(load.lost),
        "improper_refusals": float(len(load.improper)),
        "memory_growth": late / early,
        "thread_growth": max(load.threads[third:]) / max(load.threads[: 2 * third]),
        "attacks": float(sum(load.attacked.values()) + load.hung_up),
        "open_files": float(max(load.files)),
        "memory_mb": late,
        "requests_per_second": requests / (60 * options.minutes),
        "exit_status": float(ended),
    }
    targets = {
        "answered": (">=", 10000),
        "wrong_answers": ("<=", 0),
        "lost": ("<=", 0),
        "improper_refusals": ("<=", 0),
        "memory_growth": ("<=", 1.02),
    }
    print(dict(load.statuses), load.wrong[:3], load.improper[:3])
    for key, value in figures.items():
        print(f"{key:24} {value:12.3f}")
    repeats = {
        "memory": load.memory,
        "attacks": dict(load.attacked),
        "statuses": dict(load.statuses),
        "wrong": load.wrong[:20],
        "improper": load.improper[:20],
    }
    publish("serve_lasting", figures, targets, repeats, roofline())
    shutil.rmtree(folder, ignore_errors=True)


def wait_for(port: int) -> None:
    """Until the server answers; at most a minute."""
    import httpx2 as httpx

    for _ in range(120):
        try:
            if httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    sys.exit("the server did not come up")


if __name__ == "__main__":
    main()
