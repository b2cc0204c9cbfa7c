"""Files and fine-tuning jobs, by the stock client, up to answers of the tuned model; what was acknowledged is not lost."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from afina.server.routes import graders as grading
from helpers import ENVIRONMENT, until, write_rows
from live import KEYS, Live, live

ENDED = ("succeeded", "failed", "cancelled", "paused")
SHORT = {"max_steps": 6, "eval_steps": 2, "learning_rate": 3e-3, "max_length": 64}


def ended(client: openai.OpenAI, job: str) -> Any:
    def look() -> Any:
        found = client.fine_tuning.jobs.retrieve(job)
        return found if found.status in ENDED else None

    return until(look)


def start(client: openai.OpenAI, rows: Path, model: str, **more: Any) -> Any:
    with rows.open("rb") as stream:
        file = client.files.create(file=stream, purpose="fine-tune")
    own = {**SHORT, **more.pop("afina", {})}
    return client.fine_tuning.jobs.create(
        model=model, training_file=file.id, seed=1, extra_body={"afina": own}, **more
    )


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("state")
    (folder / "keys.yaml").write_text(KEYS)
    with live(
        base=str(tiny),
        state_dir=folder / "state",
        api_key_file=folder / "keys.yaml",
        job_num_threads=1,
        job_nice=0,
    ) as running:
        yield running


@pytest.fixture(scope="module")
def alice(server: Live) -> openai.OpenAI:
    return server.client("key-of-alice")


@pytest.fixture(scope="module")
def bob(server: Live) -> openai.OpenAI:
    return server.client("key-of-bob")


@pytest.mark.slow
def test_a_file_is_kept_and_given_back(
    alice: openai.OpenAI, bob: openai.OpenAI, chats: Path
) -> None:
    with chats.open("rb") as stream:
        file = alice.files.create(file=stream, purpose="fine-tune")
    assert (
        file.bytes == chats.stat().st_size
        and file.filename == "chats.jsonl"
        and file.status == "processed"
    )
    assert alice.files.content(file.id).read() == chats.read_bytes()
    assert file.id in [found.id for found in alice.files.list()]
    assert file.id not in [found.id for found in bob.files.list()]
    for forbidden in (bob.files.retrieve, bob.files.content, bob.files.delete):
        with pytest.raises(openai.NotFoundError):
            forbidden(file.id)
    assert alice.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        alice.files.retrieve(file.id)
    with pytest.raises(openai.BadRequestError, match="fine-tune"):
        alice.files.create(file=b"{}", purpose="vision")


@pytest.mark.slow
def test_lists_come_in_pages(alice: openai.OpenAI) -> None:
    made = [
        alice.files.create(file=(f"{n}.jsonl", b"{}"), purpose="fine-tune").id for n in range(5)
    ]
    pages = [found.id for found in alice.files.list(limit=2)]  # the client asks for page after page
    assert set(made) <= set(pages) and len(pages) == len(set(pages))
    first = alice.files.list(limit=2)
    assert len(first.data) == 2 and first.has_more
    for file in made:
        alice.files.delete(file)


@pytest.mark.slow
def test_from_rows_to_answers_of_the_tuned_model(
    server: Live, alice: openai.OpenAI, bob: openai.OpenAI, chats: Path
) -> None:
    base = server.state.base_name
    hyper: Any = {
        "type": "supervised",
        "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 8}},
    }
    job = start(
        alice,
        chats,
        base,
        suffix="echo",
        method=hyper,
        metadata={"who": "test"},
        afina={"max_steps": 8},
    )
    assert job.status == "queued" and job.fine_tuned_model is None
    with pytest.raises(openai.ConflictError, match=job.id):
        alice.files.delete(job.training_file)
    names: set[str] = set()

    def look() -> Any:
        names.update(model.id for model in alice.models.list())
        found = alice.fine_tuning.jobs.retrieve(job.id)
        return found if found.status in ENDED else None

    done = until(look)
    at = time.monotonic()
    assert done.status == "succeeded", done.error
    assert (
        done.fine_tuned_model.startswith(f"ft:{base}:afina:echo:")
        and done.trained_tokens > 0
        and done.finished_at
    )
    ask: Any = [{"role": "user", "content": "say sol luna"}]
    tuned = alice.chat.completions.create(
        model=done.fine_tuned_model, messages=ask, temperature=0, max_tokens=8
    )
    assert time.monotonic() - at < 1.0  # no restart, no waiting
    plain = alice.chat.completions.create(model=base, messages=ask, temperature=0, max_tokens=8)
    assert tuned.choices[0].message.content != plain.choices[0].message.content
    assert done.fine_tuned_model in [model.id for model in alice.models.list()]

    events = list(alice.fine_tuning.jobs.list_events(job.id, limit=3))  # in pages
    messages = [event.message for event in events]
    assert messages[0] == "The job has successfully completed" and messages[-1].startswith(
        "Created fine-tuning job"
    )
    steps = [event.data["step"] for event in events if event.type == "metrics"]  # type: ignore[index]
    assert steps == sorted(steps, reverse=True) and steps[0] == 8 and len(steps) == len(set(steps))
    checkpoints = alice.fine_tuning.jobs.checkpoints.list(job.id).data
    assert checkpoints and checkpoints[0].metrics.valid_loss is not None
    last = checkpoints[0]
    assert (
        last.fine_tuned_model_checkpoint == f"{done.fine_tuned_model}:ckpt-step-{last.step_number}"
    )
    again = alice.chat.completions.create(
        model=last.fine_tuned_model_checkpoint, messages=ask, temperature=0, max_tokens=8
    )
    assert (
        again.choices[0].message.content == tuned.choices[0].message.content
    )  # the best is the last that was kept
    assert {
        c.fine_tuned_model_checkpoint for c in checkpoints
    } & names  # seen while it was still learning

    with pytest.raises(openai.NotFoundError):  # to others it is not there
        bob.chat.completions.create(model=done.fine_tuned_model, messages=ask)
    with pytest.raises(openai.NotFoundError):
        bob.fine_tuning.jobs.retrieve(job.id)
    assert done.fine_tuned_model not in [model.id for model in bob.models.list()]
    assert alice.models.delete(done.fine_tuned_model).deleted
    with pytest.raises(openai.NotFoundError):
        alice.chat.completions.create(model=done.fine_tuned_model, messages=ask)


@pytest.mark.slow
def test_a_job_that_learns_from_pairs(server: Live, alice: openai.OpenAI, tmp_path: Path) -> None:
    def said(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    pairs = [
        {
            "input": {"messages": [{"role": "user", "content": f"say {word}"}]},
            "preferred_output": said(word),
            "non_preferred_output": said("night"),
        }
        for word in ("sol", "luna", "mar", "pan", "casa", "tree", "bird", "road", "stone")
    ]
    rows = write_rows(tmp_path / "pairs.jsonl", *pairs)
    method: Any = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": 1}}}
    done = ended(
        alice, start(alice, rows, server.state.base_name, method=method, afina={"max_steps": 2}).id
    )
    assert done.status == "succeeded", done.error
    assert done.method.type == "dpo" and done.method.dpo.hyperparameters.beta == 0.2
    settings = (
        server.state.settings.state_dir / "jobs" / done.id / "run" / "settings.yaml"
    ).read_text()
    assert "objective: dpo" in settings and "beta: 0.2" in settings
    assert alice.chat.completions.create(
        model=done.fine_tuned_model, messages=[{"role": "user", "content": "say sol"}], max_tokens=2
    )


SAME = {
    "type": "string_check",
    "name": "same",
    "input": "{{ sample.output_text }}",
    "reference": "{{ item.word }}",
    "operation": "ilike",
}
CLOSE = {
    "type": "text_similarity",
    "name": "close",
    "input": "{{ sample.output_text }}",
    "reference": "{{ item.word }}",
    "evaluation_metric": "fuzzy_match",
}
BOTH: Any = {
    "type": "multi",
    "name": "both",
    "graders": {"same": SAME, "close": CLOSE},
    "calculate_output": "same + 0.5 * close",
}
CODE: Any = {
    "type": "python",
    "name": "code",
    "source": "def grade(sample, item): return len(sample['output_text'])",
}


def reinforcement(grader: Any, **hyperparameters: Any) -> Any:
    return {
        "type": "reinforcement",
        "reinforcement": {"grader": grader, "hyperparameters": hyperparameters},
    }


@pytest.mark.slow
def test_a_job_that_learns_from_graders(server: Live, alice: openai.OpenAI, tmp_path: Path) -> None:
    words = ("sol", "luna", "mar", "pan", "casa", "tree", "bird", "road", "stone", "night")
    rows = write_rows(
        tmp_path / "rows.jsonl",
        *(
            {"messages": [{"role": "user", "content": f"say {word}"}], "word": word}
            for word in words
        ),
    )
    method = reinforcement(
        BOTH,
        n_epochs=1,
        batch_size=3,
        compute_multiplier=0.5,
        eval_interval=1,
        learning_rate_multiplier=2.0,
    )
    own = {"max_steps": 2, "eval_steps": 1, "grpo": {"max_new_tokens": 6}}
    job = alice.fine_tuning.jobs.retrieve(
        start(alice, rows, server.state.base_name, method=method, afina=own).id
    )
    assert job.method.type == "reinforcement" and job.method.reinforcement.grader.name == "both"
    assert job.method.reinforcement.hyperparameters.batch_size == 3
    done = ended(alice, job.id)
    assert done.status == "succeeded", done.error
    folder = server.state.settings.state_dir / "jobs" / done.id
    told = yaml.safe_load((folder / "run" / "settings.yaml").read_text())
    assert told["objective"] == "grpo" and json.loads((folder / "grader.json").read_text()) == BOTH
    assert (
        told["grpo"]["num_generations"] == 4
        and told["grpo"]["prompts_per_step"] == 3
        and told["grpo"]["allow_python_graders"] is False
    )
    line = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[0])
    parts = [line[f"reward_grader.json:{name}"] for name in ("same", "close")]
    assert line["reward"] == pytest.approx(parts[0] + 0.5 * parts[1]) and parts[1] > 0
    told = [
        event.data
        for event in alice.fine_tuning.jobs.list_events(job.id)
        if event.type == "metrics"
    ]
    assert (
        told[-1]["train_mean_reward"] == line["reward"]
        and told[-1]["valid_mean_reward"] == line["eval_reward"]
    )
    ask: Any = [{"role": "user", "content": "say sol"}]
    assert alice.chat.completions.create(
        model=done.fine_tuned_model, messages=ask, max_tokens=2
    ).choices


def test_graders_are_checked_and_asked(server: Live, alice: openai.OpenAI) -> None:
    graders = alice.fine_tuning.alpha.graders
    assert graders.validate(grader=BOTH).grader.name == "both"  # type: ignore[union-attr]
    said = graders.run(grader=BOTH, model_sample="el Sol", item={"word": "sol"})
    close = 2 * 2 / 9  # "ol" is alike, of nine letters
    assert said.sub_rewards == {
        "same": 1.0,
        "close": pytest.approx(close),
    } and said.reward == pytest.approx(1 + 0.5 * close)
    assert said.metadata.type == "multi" and not said.metadata.errors.other_error
    missing = graders.run(grader=SAME, model_sample="x", item={"other": 1})  # type: ignore[arg-type]
    assert missing.reward == 0.0 and missing.metadata.errors.other_error
    for wrong, word in (
        (BOTH | {"calculate_output": "same.x"}, "formula"),
        (CLOSE | {"evaluation_metric": "cosine"}, "embeddings"),
        ({"type": "score_model", "name": "x"}, "score_model"),
    ):
        for ask in (
            lambda wrong=wrong: graders.validate(grader=wrong),
            lambda wrong=wrong: graders.run(grader=wrong, model_sample="x"),
        ):
            with pytest.raises(openai.BadRequestError, match=word):
                ask()
    with pytest.raises(openai.AuthenticationError):
        server.client("nobody").fine_tuning.alpha.graders.validate(grader=BOTH)


@pytest.mark.slow
def test_code_in_graders_is_for_the_operator_to_allow(
    server: Live, alice: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    graders = alice.fine_tuning.alpha.graders
    file = alice.files.create(file=("rows.jsonl", b"{}"), purpose="fine-tune").id
    job = {"model": server.state.base_name, "training_file": file}
    for asked in (
        lambda: graders.validate(grader=CODE),
        lambda: graders.run(grader=CODE, model_sample="four"),
        lambda: alice.fine_tuning.jobs.create(**job, method=reinforcement(CODE)),
    ):
        with pytest.raises(openai.PermissionDeniedError, match="--allow-python-graders"):
            asked()
    monkeypatch.setattr(
        server.state,
        "settings",
        server.state.settings.model_copy(update={"allow_python_graders": True}),
    )
    assert graders.validate(grader=CODE).grader.name == "code"  # type: ignore[union-attr]
    assert graders.run(grader=CODE, model_sample="four").reward == 4.0
    broken = graders.run(
        grader=CODE | {"source": "def grade(sample, item): return item['x']"}, model_sample="four"
    )
    assert broken.metadata.errors.python_grader_runtime_error and "KeyError" in (
        broken.metadata.errors.python_grader_runtime_error_details or ""
    )
    monkeypatch.setattr(grading, "GRADER_SECONDS", 0.5)
    slow = graders.run(
        grader=CODE | {"source": "def grade(sample, item):\n    while True: pass"},
        model_sample="four",
    )
    assert "too long" in (slow.metadata.errors.python_grader_runtime_error_details or "")


@pytest.mark.slow
def test_pause_goes_on_where_it_was_and_cancel_ends(
    server: Live, alice: openai.OpenAI, chats: Path
) -> None:
    base = server.state.base_name
    job = start(alice, chats, base, afina={"max_steps": 400, "eval_steps": 5})
    until(lambda: alice.fine_tuning.jobs.checkpoints.list(job.id).data)
    assert alice.fine_tuning.jobs.pause(job.id).status == "paused"
    until(lambda: not server.state.worker._running)
    step = max(
        event.data.get("step", 0) for event in alice.fine_tuning.jobs.list_events(job.id, limit=50)
    )  # type: ignore[union-attr]
    assert alice.fine_tuning.jobs.resume(job.id).status in ("queued", "running")
    with pytest.raises(openai.ConflictError):
        alice.fine_tuning.jobs.resume(job.id)

    def further() -> bool:
        told = [
            event.data.get("step", 0)
            for event in alice.fine_tuning.jobs.list_events(job.id, limit=50)
        ]  # type: ignore[union-attr]
        assert len([n for n in told if n]) == len({n for n in told if n})  # no step is told twice
        return max(told) > step

    until(further)
    assert alice.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    until(lambda: not server.state.worker._running)
    assert alice.fine_tuning.jobs.retrieve(job.id).status == "cancelled"
    with pytest.raises(openai.ConflictError):
        alice.fine_tuning.jobs.resume(job.id)


@pytest.mark.slow
def test_rows_that_cannot_be_used_fail_the_job_with_their_line(
    server: Live, alice: openai.OpenAI, tmp_path: Path
) -> None:
    row = {
        "messages": [
            {"role": "user", "content": "say sol"},
            {"role": "assistant", "content": "sol"},
        ]
    }
    rows = write_rows(
        tmp_path / "rows.jsonl", row, {"messages": [{"role": "nobody", "content": "x"}]}
    )
    done = ended(alice, start(alice, rows, server.state.base_name).id)
    assert (
        done.status == "failed" and ":2:" in done.error.message and "nobody" in done.error.message
    )
    assert (
        str(server.state.settings.state_dir) not in done.error.message
    )  # where it lies is nobody's business


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"batch_size": 4}}}}, "batch_size"),
        ({"method": {"type": "dpo", "supervised": {}}}, "method.supervised"),
        ({"extra_body": {"afina": {"init_adapter": "/etc"}}}, "init_adapter"),
        ({"method": {"type": "reinforcement"}}, "reinforcement"),
        ({"method": {"type": "telepathy"}}, "telepathy"),
        ({"method": reinforcement({"type": "string_check"})}, "name"),
        ({"method": reinforcement(SAME, eval_samples=4)}, "eval_samples"),
        ({"method": reinforcement(SAME, reasoning_effort="high")}, "reasoning_effort"),
        (
            {
                "method": {
                    "type": "reinforcement",
                    "reinforcement": {"grader": SAME, "response_format": {"type": "json_object"}},
                }
            },
            "free text",
        ),
        (
            {
                "method": reinforcement(SAME),
                "extra_body": {"afina": {"grpo": {"reward_funcs": "/etc"}}},
            },
            "reward",
        ),
        (
            {"method": reinforcement(SAME), "extra_body": {"afina": {"dpo": {"loss_type": "ipo"}}}},
            "dpo.loss_type has no effect",
        ),
        (
            {
                "method": reinforcement(SAME),
                "extra_body": {"afina": {"grpo": {"allow_python_graders": True}}},
            },
            "allow_python_graders",
        ),
        ({"extra_body": {"afina": {"data": "/etc/passwd"}}}, "data"),
        ({"extra_body": {"afina": {"rank": 0}}}, "rank"),
        ({"extra_body": {"afina": {"method": "full"}}}, "full"),
        ({"extra_body": {"learning": 1}}, "learning"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations"),
        ({"suffix": "u" * 1001}, "suffix"),
        ({"model": "another"}, "jobs train adapters of the base"),
        ({"hyperparameters": {"n_epochs": 0}}, "n_epochs"),
    ],
)
def test_jobs_that_make_no_sense_are_refused(
    server: Live, alice: openai.OpenAI, values: dict[str, Any], word: str
) -> None:
    file = alice.files.create(file=("rows.jsonl", b"{}"), purpose="fine-tune")
    with pytest.raises(openai.BadRequestError) as caught:
        alice.fine_tuning.jobs.create(
            **{"model": server.state.base_name, "training_file": file.id, **values}
        )
    assert word in str(caught.value.body["message"])  # type: ignore[index]
    with pytest.raises(openai.NotFoundError):
        alice.fine_tuning.jobs.create(model=server.state.base_name, training_file="file-none")


# ---- kill -9


@contextmanager
def process(
    tiny: Path, state: Path, *flags: str
) -> Iterator[tuple[openai.OpenAI, "subprocess.Popen[bytes]"]]:
    """`afina serve` as a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "afina",
        "serve",
        "--base",
        str(tiny),
        "--dtype",
        "float32",
        "--port",
        str(port),
        "--state-dir",
        str(state),
        "--job-num-threads",
        "1",
        "--job-nice",
        "0",
        *flags,
    ]
    with (state.parent / "log.txt").open("ab") as log:
        running = subprocess.Popen(
            command, env={**ENVIRONMENT, "PYTHONFAULTHANDLER": "1"}, stdout=log, stderr=log
        )
    try:

        def key() -> str | None:
            assert running.poll() is None, (state.parent / "log.txt").read_text()
            file = state / "admin.key"
            return file.read_text().strip() or None if file.is_file() else None

        client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key=until(key), max_retries=0, timeout=30
        )

        def lives() -> bool:
            assert running.poll() is None, (state.parent / "log.txt").read_text()
            try:
                return bool(client.models.list().data)
            except openai.APIConnectionError:
                return False

        until(lives)
        yield client, running
    except AssertionError:
        running.send_signal(
            signal.SIGABRT
        )  # with PYTHONFAULTHANDLER, its threads' stacks are in the log
        running.wait()
        print((state.parent / "log.txt").read_text()[-6000:])
        raise
    finally:
        if running.poll() is None:
            running.terminate()
        running.wait(30)


@pytest.mark.slow
@pytest.mark.timeout(900)  # six processes, each of which loads torch
def test_kill_dash_nine_loses_nothing_that_was_acknowledged(
    tiny: Path, chats: Path, tmp_path: Path
) -> None:
    """A job's process ends with its server; the next server continues the job.

    The next one is told to stop (SIGTERM), and ends the answer that it has begun.
    """
    state = tmp_path / "state"
    ask: Any = [{"role": "user", "content": "say sol luna"}]
    with process(tiny, state) as (client, running):
        first = ended(client, start(client, chats, tiny.name).id)
        job = start(client, chats, tiny.name, afina={"max_steps": 40, "eval_steps": 5})
        other = start(client, chats, tiny.name)  # waits behind it
        until(lambda: client.fine_tuning.jobs.checkpoints.list(job.id).data)
        before = {event.id for event in client.fine_tuning.jobs.list_events(job.id, limit=100)}
        lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
        child = [line["trainer"] for line in lines if line["event"] == "job started"][-1]
        running.send_signal(signal.SIGKILL)
        running.wait()
        until(lambda: not alive(child), 10.0)
    with process(tiny, state) as (client, running):
        jobs = {found.id for found in client.fine_tuning.jobs.list()}
        assert jobs == {first.id, job.id, other.id}
        assert len(client.files.list().data) == 3
        answer = client.chat.completions.create(
            model=first.fine_tuned_model, messages=ask, max_tokens=2
        )
        assert answer.choices
        assert ended(client, job.id).status == "succeeded"
        assert ended(client, other.id).status == "succeeded"
        events = list(client.fine_tuning.jobs.list_events(job.id, limit=100))
        assert before <= {event.id for event in events}
        assert any("resumes from its last checkpoint" in event.message for event in events)
        log = (state / "jobs" / job.id / "run" / "metrics.jsonl").read_text()
        assert [json.loads(line)["step"] for line in log.splitlines()] == list(range(1, 41))
        stream = client.chat.completions.create(
            model=tiny.name,
            messages=ask,
            max_tokens=150,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        chunks = [next(iter(stream))]
        running.send_signal(signal.SIGTERM)
        chunks += list(stream)
        assert chunks[-1].choices[0].finish_reason == "length"
        assert running.wait(30) == 0


@pytest.mark.slow
def test_sigterm_ends_the_process_whatever_is_connected(tiny: Path, tmp_path: Path) -> None:
    """Streams with and without a reader, half a head, half a body, and an idle connection."""
    body = {"model": tiny.name, "prompt": ["tell"] * 16, "n": 16, "max_tokens": 150}
    sent = json.dumps(body | {"ignore_eos": True, "stream": True}).encode()
    with process(tiny, tmp_path / "state", "--shutdown-timeout", "2") as (client, running):
        host = (client.base_url.host, client.base_url.port)
        head = f"POST /v1/completions HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {client.api_key}\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(sent)}\r\n\r\n"
        request = head.encode() + sent
        idle = b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n"
        with ExitStack() as stack:
            for data in (request, request, request[:40], request[:-5], idle):
                one = stack.enter_context(socket.create_connection(host))
                one.sendall(data)
                if data in (request, idle):
                    assert one.recv(12) == b"HTTP/1.1 200"
            began = time.monotonic()
            running.send_signal(signal.SIGTERM)
            assert running.wait(30) == 0
            assert time.monotonic() - began < 20  # a busy machine; 4 s on a quiet one
    log = (tmp_path / "log.txt").read_text()
    assert "Traceback" not in log and '"status": 503' in log  # half a body


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked about does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        try:
            os.kill(process, 0)
        except OSError:
            return False
        return not Path("/proc").is_dir()
