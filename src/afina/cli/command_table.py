"""The commands: for each its settings, the function behind it, and its help text."""

from dataclasses import dataclass

from afina import settings
from afina.cli.progress import Duration
from afina.settings import Settings


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        help: One line for `afina --help`.
        settings: Its settings class.
        function: The function behind it, "module:name"; imported when the command runs.
        positional: The setting that may be given without a flag.
        is_list: Whether that setting takes several words, each as it is.
        duration: "long" where it may run for more than a few seconds, "start" where only its start
            may: it then prints that it is running.
    """

    help: str
    settings: type[Settings]
    function: str
    positional: str | None = None
    is_list: bool = False
    duration: Duration = "short"


COMMANDS = {
    "demo": Command(
        "a two-minute demonstration: train the embedded base to correct sentences",
        settings.DemoSettings,
        "afina.demo.demo:demo",
        duration="long",
    ),
    "doctor": Command(
        "what this machine has, what is missing, and what to type",
        settings.DoctorSettings,
        "afina.cli.doctor:doctor",
    ),
    "plan": Command(
        "memory, time and trainable parameters of a training run, before it starts",
        settings.PlanSettings,
        "afina.planning.plan:plan",
        "data",
    ),
    "compare": Command(
        "measure which method suits this base and these rows",
        settings.CompareSettings,
        "afina.cli.commands:compare",
        "data",
        duration="long",
    ),
    "advise": Command(
        "recommend a method, with reasons and sources, without training",
        settings.AdviseSettings,
        "afina.cli.commands:advise",
    ),
    "train": Command(
        "train an adapter on rows of data",
        settings.TrainSettings,
        "afina.cli.commands:train",
        "data",
        duration="long",
    ),
    "eval": Command(
        "evaluate an adapter against its base, on rows it was not trained on",
        settings.EvalSettings,
        "afina.evaluation.evaluate:evaluate",
        "adapter",
        duration="long",
    ),
    "import": Command(
        "turn a configuration of Axolotl, LLaMA-Factory, mlx-lm, TRL or Unsloth into settings",
        settings.ImportSettings,
        "afina.importing.import_config:import_config",
        "file",
    ),
    "runs": Command(
        "list the runs below a folder; compare two or more of them",
        settings.RunsSettings,
        "afina.training.run_list:runs",
        "runs",
        is_list=True,
    ),
    "generate": Command(
        "generate answers to prompts",
        settings.GenerateSettings,
        "afina.evaluation.generate:generate",
        "prompts",
        is_list=True,
    ),
    "chat": Command(
        "chat with a base or an adapter", settings.ChatSettings, "afina.cli.chat:chat", "adapter"
    ),
    "serve": Command(
        "serve a base and many adapters over HTTP (OpenAI's API); run fine-tuning jobs",
        settings.ServeSettings,
        "afina.cli.serve:serve",
        duration="start",
    ),
    "bench-serve": Command(
        "measure and plot a server's latency under load",
        settings.BenchServeSettings,
        "afina.cli.serve:bench",
    ),
    "annotate": Command(
        "collect preferences: choose the better of two answers, for dpo, kto and reward",
        settings.AnnotateSettings,
        "afina.cli.annotate:annotate",
        "prompts",
    ),
    "merge": Command(
        "merge an adapter into its base: one model, checked against the adapted one",
        settings.MergeSettings,
        "afina.merging.merge_into_base:merge",
        "adapter",
        duration="long",
    ),
    "combine": Command(
        "combine several adapters into one",
        settings.CombineSettings,
        "afina.merging.combine:combine",
        "adapters",
        is_list=True,
        duration="long",
    ),
    "extract": Command(
        "extract a low-rank adapter from an adapter or a fine-tuned model",
        settings.ExtractSettings,
        "afina.merging.extract:extract",
        "adapter",
        duration="long",
    ),
    "show": Command(
        "method, rank, modules, origin and statistics of an adapter",
        settings.ShowSettings,
        "afina.merging.adapter_info:show",
        "adapter",
    ),
    "audit": Command(
        "check whether an adapter is safe to load",
        settings.AuditSettings,
        "afina.audit.audit:audit",
        "adapter",
        duration="long",
    ),
    "mitigate": Command(
        "weaken what an audit found in an adapter, and measure the cost",
        settings.MitigateSettings,
        "afina.audit.mitigation:mitigate",
        "adapter",
        duration="long",
    ),
    "sign": Command(
        "sign an adapter with a private key",
        settings.SignSettings,
        "afina.audit.provenance:sign",
        "adapter",
    ),
    "verify": Command(
        "verify the signature of an adapter",
        settings.VerifySettings,
        "afina.audit.provenance:verify",
        "adapter",
    ),
    "revoke": Command(
        "reject an adapter from now on, wherever it is loaded on this machine",
        settings.RevokeSettings,
        "afina.audit.provenance:revoke",
        "target",
    ),
    "export": Command(
        "export a model or adapter to the formats of other tools (GGUF, Ollama, MLX, ONNX, PEFT)",
        settings.ExportSettings,
        "afina.merging.export:export",
        "adapter",
        duration="long",
    ),
    "push": Command(
        "publish an adapter on the Hugging Face Hub: private, with a card, after a question",
        settings.PushSettings,
        "afina.hub.push:push",
        "adapter",
    ),
    "pull": Command(
        "download an adapter from the Hugging Face Hub, and check its files",
        settings.PullSettings,
        "afina.hub.pull:pull",
        "repo",
    ),
    "mcp": Command(
        "offer plan, runs, show and advise to agents, by the Model Context Protocol",
        settings.MCPSettings,
        "afina.cli.mcp_server:mcp",
    ),
    "completion": Command(
        "print a script that completes commands and flags in bash, zsh or fish",
        settings.CompletionSettings,
        "afina.cli.completion:completion",
        "shell",
    ),
}
