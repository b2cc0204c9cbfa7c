"""Settings of `afina serve`."""

from pathlib import Path
from typing import Any, Literal

from afina.settings.common import (
    ModelSettings,
    allow_control_tokens_setting,
    setting,
    template_kwargs_setting,
)


class ServeSettings(ModelSettings):
    """Settings of `afina serve`."""

    host: str = setting(
        "address to listen on; 0.0.0.0 for all addresses of the machine", "127.0.0.1"
    )
    port: int = setting("port to listen on; 0 selects a free one", 8000, ge=0, le=65535)
    adapters: list[Path] = setting(
        "folders of runs or adapters: each is served under its name, more may be loaded later", []
    )
    watch: bool = setting("serve new and changed folders of --adapters without a restart", False)
    require_audit: bool = setting("accept only adapters that `afina audit` has approved", False)
    quantization: Literal["none", "nf4"] = setting(
        "none: the base in 16 or 32 bits per weight; nf4: in 4 bits", "none"
    )
    memory_gb: float = setting(
        "memory for the KV cache and adapters, in GB, besides the base", 1.0, gt=0.0
    )
    merge_hot_adapter: bool = setting(
        "merge an adapter that has nearly all requests into a second copy of the weights", False
    )
    chat_template: str | None = setting(
        "chat template for all adapters: by default the one that each was trained with, and the "
        "tokenizer's own for the base; 'plain', 'chatml' or a file"
    )
    template_kwargs: dict[str, Any] = template_kwargs_setting(
        "those that each adapter was trained with"
    )
    allow_control_tokens: bool = allow_control_tokens_setting()
    state_dir: Path = setting(
        "folder of uploaded files, jobs and their adapters", Path("runs/serve")
    )
    database_url: str | None = setting(
        "URL of the tables; by default SQLite in the state folder, or postgresql://..."
    )
    # keys and limits
    api_key_file: Path | None = setting(
        "YAML of keys, NAME: KEY or NAME: {key: KEY, admin: true}; without it requests need no key"
    )
    insecure: bool = setting(
        "no admin key: every client that reaches the port may change everything", False
    )
    max_body_bytes: int = setting("largest request body, in bytes", 8_000_000, ge=1024)
    max_file_bytes: int = setting("largest uploaded file, in bytes", 512_000_000, ge=1024)
    max_requests_per_key: int | None = setting(
        "largest number of concurrent sequences per key: each prompt and choice counts", ge=1
    )
    share_prefix_cache: bool = setting(
        "share cached blocks of prompts between keys; times then reveal what others have sent",
        False,
    )
    max_tokens_per_minute: int | None = setting(
        "largest number of prompt and completion tokens per key and minute", ge=1
    )
    request_timeout: float = setting("seconds after which a request is ended", 600.0, gt=0.0)
    shutdown_timeout: float = setting(
        "seconds that running requests have to finish when the server is stopped", 30.0, ge=0.0
    )
    strict_requests: bool = setting(
        "reject parameters without effect, instead of ignoring them by name", False
    )
    keep_alive: float = setting(
        "seconds that an idle connection stays open; longer than a proxy's own", 75.0, gt=0.0
    )
    cors_origins: list[str] = setting(
        "web pages that may send requests from a browser (https://chat.example); '*' for all", []
    )
    supervise: bool = setting(
        "run the server in a process of its own, and start it again when it ends by itself", False
    )
    # fine-tuning jobs while serving
    max_training_jobs: int = setting(
        "largest number of jobs that train at once; 0: none, jobs wait in the queue", 1, ge=0
    )
    job_num_threads: int | None = setting(
        "CPU threads of a job; by default half of the cores", ge=1
    )
    job_nice: int = setting(
        "nice level of jobs, 0 to 19: with a higher one serving has more of the CPU",
        10,
        ge=0,
        le=19,
    )
    job_max_hours: float = setting("longest time of one attempt of a job, in hours", 24.0, gt=0.0)
    job_memory_gb: float | None = setting(
        "largest memory of a job's process, in GB; by default the machine's", gt=0.0
    )
    max_jobs_per_key: int = setting("largest number of jobs per key that have not ended", 100, ge=1)
    max_stored_gb_per_key: float = setting(
        "largest size of a key's files and adapters in the state folder, in GB", 20.0, gt=0.0
    )
    allow_python_graders: bool = setting(
        "jobs may run Python code of the client, with this server's rights", False
    )
