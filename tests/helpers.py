"""Small makers that the tests share."""

import io
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import chdir, redirect_stderr, redirect_stdout
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from afina.adapters.active import BASE_ONLY, ActiveAdapters
from afina.adapters.attach import Adapter, attach
from afina.adapters.segments import NO_ADAPTERS, Segments
from afina.adapters.target_selection import resolve_target_modules
from afina.cli.main import run as run_command
from afina.comparison.cost_probe import measure
from afina.engine.engine import generate_completions
from afina.engine.request import SamplingParams
from afina.io.adapter_config import AdapterConfig
from afina.models.causal_lm import CausalLM
from afina.planning.estimates import MachineRates

SHARED = Path(__file__).parents[2] / "shared"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CORPUS = (
    "<|system|> <|user|> <|assistant|> say the sol and the luna, the mar and the pan; the casa by the road went at night.",
    "A bird sat on a stone under a tree. La luna salió sobre el mar, y la casa dormía: ¿quién es el niño del café?",
)
# a machine that is nobody's: plans in tests are the same everywhere, and measure nothing
CURVE = {"bfloat16": [[16, 1e11], [1024, 4e11]], "float32": [[16, 5e10], [1024, 1e11]]}
RATES = MachineRates(
    CURVE, CURVE, {"bfloat16": 5e10, "float32": 3e10}, 2e10, 1e10, 1.0, 1e-3, 4.5e8
)
Run = tuple[Tensor, Tensor, tuple[int, ...]]


def tiny_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 320 tokens with a chat template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = template
    return made


def random_model(
    config: PretrainedConfig, attention: str = "eager", seed: int = 0
) -> PreTrainedModel:
    """A model whose weights are large enough for every part of it to show in the logits."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
            elif "norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval().requires_grad_(False)


def save_model(
    folder: Path, config: PretrainedConfig, tokenizer: Any = None, seed: int = 0
) -> Path:
    """A random model as a Hugging Face folder."""
    random_model(config, seed=seed).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def flat_run(
    lengths: Sequence[int] = (9, 1, 14, 6), seed: int = 0, low: int = 5, high: int = 300
) -> Run:
    """Random tokens, their positions and the bounds of sequences of these lengths."""
    tokens = torch.randint(
        low, high, (sum(lengths),), generator=torch.Generator().manual_seed(seed)
    )
    return (
        tokens,
        torch.cat([torch.arange(n) for n in lengths]),
        tuple(accumulate(lengths, initial=0)),
    )


def one_by_one(run: Run) -> list[Run]:
    """Each sequence of a flat run as a run of its own."""
    tokens, positions, bounds = run
    return [(tokens[a:b], positions[a:b], (0, b - a)) for a, b in pairwise(bounds)]


def logits(base: CausalLM, run: Run, segments: Segments = NO_ADAPTERS) -> Tensor:
    """Logits (T, V) of a flat run, routed by `segments`."""
    with torch.no_grad(), base.forward_context.use(segments):
        return base.all_logits(*run)


def put(
    base: CausalLM,
    name: str = "a",
    target_modules: Any = "all-linear",
    seed: int = 1,
    method: str = "lora",
    **spec: Any,
) -> Adapter:
    """Attach an adapter whose parameters are random and large enough to show."""
    layers = spec.pop("layers", None)
    paths = resolve_target_modules(
        base.model, target_modules, layers, method == "full", experts=method == "lora"
    )
    adapter = attach(
        base.model, base.forward_context, name, AdapterConfig(method, paths, **spec), seed
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=generator)
                * (0.02 if method == "full" else 0.1)
            )
    adapter.train(False)
    return adapter


def state(model: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of a model's state dict."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two state dicts are equal bit for bit, names and order included."""
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def metrics(run: Path) -> list[dict[str, Any]]:
    """A run's metrics without the figures that depend on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def write_rows(path: Path, *rows: object) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def afina(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """`afina ...` as a process of its own."""
    command = [sys.executable, "-m", "afina", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=250, env=ENVIRONMENT, **options
    )


def until(wanted: Callable[[], Any], seconds: float = 250.0) -> Any:
    """What `wanted` gives, once it gives something: on a busy machine that takes minutes."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := wanted():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {wanted}")


def type_line(line: str, folder: Path) -> None:
    """Run one line of a page as its reader types it, in `folder`, without input.

    In this process, and with the retention loss measured on few tokens: to load torch anew for each
    of sixty lines, and to read 8,192 tokens before and after each training, takes longer than what
    they do. An audit that nothing has accepted ends with 3, for review; everything else with 0.
    """
    program, *words = shlex.split(line, comments=True)
    assert program == "afina", line
    output = io.StringIO()
    with (
        chdir(folder),
        redirect_stdout(output),
        redirect_stderr(output),
        patch("sys.stdin", io.StringIO()),
        patch("afina.evaluation.retention.NUM_RETENTION_TOKENS", 512),
        patch("afina.planning.machine.measured_rates", lambda device, anew=False: RATES),
        patch("afina.comparison.compare.measure_in_subprocess", lambda run, seconds: measure(run)),
    ):
        status = run_command(words)
    is_review = words[0] == "audit" and "--accept" not in words
    assert status == (3 if is_review else 0), f"{line}\n{output.getvalue()}"


ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def generate_tokens(
    base: CausalLM,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    active: ActiveAdapters = BASE_ONLY,
    stop_token_ids: Collection[int] = (),
) -> list[list[int]]:
    """New tokens of each prompt, by an engine."""
    completions = generate_completions(base, prompts, sampling, active, stop_token_ids)
    return [completion.token_ids for completion in completions]
