"""The training step of a run: from its settings alone, or from a run that is set up."""

from dataclasses import replace

from torch import nn

from afina.adapters.presets import get_preset
from afina.adapters.registry import get_method
from afina.errors import SettingsError
from afina.io.adapter_config import AdapterConfig
from afina.models.causal_lm import SCORE
from afina.objectives.workload import StepWorkload
from afina.planning.estimates import Workload
from afina.planning.model_shape import ModelShape, count_parameters
from afina.planning.step_cost import StepCost
from afina.settings import TrainSettings
from afina.training.setup.set_up import RunSetup, build_adapter_config


def make_step(
    shape: ModelShape, settings: TrainSettings, device: str, config: AdapterConfig | None = None
) -> StepCost:
    """Return the training step of the settings; `config` is the adapter's where it is known.

    Raises:
        SettingsError: The method trains the weights themselves, and the base is in 4 bits.
    """
    preset = get_preset(settings.method, shape.num_layers)
    quantization = "nf4" if shape.quantized else preset.quantization
    if quantization == "nf4" and get_method(preset.method).replaces_base:
        raise SettingsError(
            "4-bit codes have no gradient",
            where="method",
            why="this base is in 4 bits",
            hint="--method lora",
        )
    tokens = {name: number for number, name in enumerate(settings.new_tokens)}
    config = config or build_adapter_config(shape.model, settings, tokens=tokens)
    size = count_parameters(shape, config)
    return StepCost(shape, size, settings, quantization, device, settings.recomputed)


def run_step(
    shape: ModelShape, setup: RunSetup, workload: StepWorkload | None, device: str
) -> StepCost:
    """Return the training step of a run that is set up.

    Its `extra_bytes` are those of frozen adapters, of the objective, and of the keys and values of
    shared prefixes.
    """
    config = setup.adapter.config
    if SCORE in config.modules_to_save and not hasattr(shape.model, SCORE):
        head = nn.Linear(int(shape.config.hidden_size), 1, bias=False, device="meta")
        shape.model.add_module(SCORE, head)
    step = make_step(shape, setup.settings, device, config)
    parameters = setup.prepared.base.model.named_parameters()
    extra: float = sum(p.nbytes for n, p in parameters if ".deltas." in n and not p.requires_grad)
    if workload is not None:
        prefixes = [one.prefix_tokens for passes in workload.passes for one in passes]
        extra += workload.extra_bytes + step.kv_bytes_per_token * max(prefixes)
    return replace(step, extra_bytes=extra)


def full_load(shape: ModelShape, settings: TrainSettings) -> Workload:
    """Return passes as full as the settings allow, where there are no rows to count."""
    return Workload.full(
        settings.max_tokens_per_batch,
        settings.max_length or min(shape.max_positions, 2048),
        settings.gradient_accumulation_steps,
    )
