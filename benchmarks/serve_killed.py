"""Is anything acknowledged lost? `python benchmarks/serve_killed.py --minutes 3`

A server on the embedded base is killed with SIGKILL at random moments, and started again on the same
state folder, while clients upload and delete files and create jobs and batches. What was answered
with 200 before a kill has to be there after it, byte for byte, and what was deleted must not be.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2

CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
START_SECONDS = 60.0
KINDS = ("file", "delete", "job", "batch")


class KilledServer:
    """A server that is killed and started again on one state folder."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self._folder = f"http://127.0.0.1:{self.port}", folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Start it, and return the seconds until it answered."""
        begin = time.monotonic()
        command = [sys.executable, "-m", "afina", "serve", "--insecure", "--port", str(self.port)]
        command += [
            "--state-dir",
            str(self._folder / "state"),
            "--max-training-jobs",
            "0",
            "--max-jobs-per-key",
            "100000",
        ]
        with (self._folder / "log.txt").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        while time.monotonic() - begin < START_SECONDS:
            try:
                if httpx2.get(f"{self.url}/readyz", timeout=2).status_code == 200:
                    return time.monotonic() - begin
            except httpx2.HTTPError:
                pass
            time.sleep(0.05)
        raise SystemExit(f"the server does not start: {self._folder / 'log.txt'}")

    def kill(self) -> None:
        """End it at once, as a power failure would."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Client:
    """Writes until the server is gone; remembers what was acknowledged."""

    def __init__(self, url: str, seed: int) -> None:
        self.url, self._random = url, random.Random(seed)
        self.files: dict[str, bytes] = {}
        self.deleted: set[str] = set()
        self.unknown: set[str] = set()  # deletions that were not answered
        self.jobs: set[str] = set()
        self.used: set[str] = set()  # files of jobs
        self.batches: set[str] = set()
        self.counts: Counter[str] = Counter()

    def work(self, stop: threading.Event) -> None:
        """Send requests until `stop`, or until the server is gone."""
        with httpx2.Client(base_url=self.url, timeout=10) as http:
            while not stop.is_set():
                try:
                    self._write(http)
                except httpx2.HTTPError:
                    return

    def _write(self, http: httpx2.Client) -> None:
        kind = self._random.choice(["file", "file", "delete", "job", "batch"])
        if kind == "file" or not self.files:
            size = self._random.choice([1, 30, 3000])
            content = (json.dumps(CHAT) + "\n").encode() * size
            sent = {"file": ("rows.jsonl", content)}
            found = http.post("/v1/files", files=sent, data={"purpose": "fine-tune"})
            self.files[self._id(found)] = content
        elif kind == "delete":
            file = self._random.choice(list(self.files))
            if file in self.used:  # a job may need it
                return
            del self.files[file]
            self.unknown.add(file)
            self._id(http.delete(f"/v1/files/{file}"))
            self.unknown.discard(file)
            self.deleted.add(file)
        elif kind == "job":
            file = self._random.choice(list(self.files))
            self.used.add(file)
            body = {"model": "embedded", "training_file": file}
            self.jobs.add(self._id(http.post("/v1/fine_tuning/jobs", json=body)))
        else:
            line = {"custom_id": "1", "method": "POST", "url": "/v1/completions"}
            line["body"] = {"model": "embedded", "prompt": "a", "max_tokens": 1}  # type: ignore[assignment]
            sent = {"file": ("batch.jsonl", json.dumps(line).encode())}
            file = self._id(http.post("/v1/files", files=sent, data={"purpose": "batch"}))
            body = {"input_file_id": file, "endpoint": "/v1/completions"}
            found = http.post("/v1/batches", json=body | {"completion_window": "24h"})
            self.batches.add(self._id(found))
        self.counts[kind] += 1

    @staticmethod
    def _id(found: Any) -> str:
        if found.status_code != 200:
            raise SystemExit(f"{found.status_code}: {found.text}")
        return str(found.json()["id"])

    def lost(self) -> list[str]:
        """Return what was acknowledged and is not as it was."""
        missing = []
        with httpx2.Client(base_url=self.url, timeout=30) as http:
            for file, content in self.files.items():
                found = http.get(f"/v1/files/{file}/content")
                if found.status_code != 200 or found.content != content:
                    missing.append(file)
            missing += [f for f in self.deleted if http.get(f"/v1/files/{f}").status_code != 404]
            jobs = [f"fine_tuning/jobs/{job}" for job in self.jobs]
            for path in [*jobs, *(f"batches/{batch}" for batch in self.batches)]:
                if http.get(f"/v1/{path}").status_code != 200:
                    missing.append(path)
        return missing


def main() -> None:
    """Kill the server until the time is over, and publish the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, until = random.Random(options.seed), time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as folder:
        server = KilledServer(Path(folder))
        starts = [server.start()]
        clients = [Client(server.url, seed) for seed in range(3)]
        kills, lost = 0, []
        while time.monotonic() < until:
            stop = threading.Event()
            threads = [threading.Thread(target=c.work, args=(stop,), daemon=True) for c in clients]
            for thread in threads:
                thread.start()
            time.sleep(rng.uniform(0.05, 3.0))
            server.kill()
            kills += 1
            stop.set()
            for thread in threads:
                thread.join()
            starts.append(server.start())
            lost += [one for client in clients for one in client.lost()]
            if lost:
                break
        server.kill()
    result = {
        "kills": kills,
        "acknowledged": {kind: sum(c.counts[kind] for c in clients) for kind in KINDS},
        "lost": lost,
        "start_seconds": {"median": sorted(starts)[len(starts) // 2], "max": max(starts)},
    }
    print(json.dumps(result, indent=2))
    raise SystemExit(bool(lost))


if __name__ == "__main__":
    main()
