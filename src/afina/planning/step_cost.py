"""Peak memory and time of a training step, counted from a model's shape and the code that runs it.

With T tokens in a pass, L target tokens, d the hidden size, f the feed-forward size, h the width of
all heads, e bytes per element:

    kept per token, fast layer       2 d      inputs of the two norms
                                     2 f      gate and up (swiglu recomputes their product)
                                     h + 2 g  queries; keys and values, g the width of their heads
                                     1        log-sum-exp of attention, per head
                                     2 (h - g) + h + 1   more with PyTorch's attention: repeated
                                              heads, its output
                                     inputs   of adapted modules, once for those with the same
                                              input (q, k, v; gate, up)
                                     D        what each adapter layer keeps
    kept, recomputed layer           d, and all the above while it is recomputed

Layers below the first adapted one keep nothing. The peak of a step is, besides libraries, weights
and trained values (parameters, their copies in e bytes, float32 masters of 16-bit ones, moments),
the maximum of:

    loss        kept + hidden states of target tokens and their gradients, 2 L d e + a logits chunk
    backward    at each layer: kept by it and those below it, gradients of those above it,
                temporaries within it
    optimizer   gradients, those of masters in float32
    the end     the best adapter, loaded and attached next to the last one; on a CPU on top of the
                heap's size

or what loading needs. A CPU's allocator fragments: HEAP_SLACK is the ratio added to activations,
BACKWARD_FRAGMENTATION to temporaries within a layer, `MachineRates.allocator_overhead` the measured
overhead of both.

Time is operations over the rates of this machine (`MachineRates`): products with the base forward
and, above the first adapted layer, backward (again for the gradients of trained weights, again
forward with checkpointing); attention; low-rank products; NF4 dequantized at each product; passes
over activations; the optimizer; and the overhead of Python and PyTorch per layer.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from afina.adapters.target_selection import layer_index
from afina.kernels.cross_entropy import BLOCK_ROWS, CHUNK_ELEMENTS
from afina.kernels.dispatch import kernels
from afina.kernels.varlen_attention import FAST_ISAS
from afina.models.causal_lm import HEAD_CHUNK, SCORE
from afina.planning.estimates import (
    SKINNY_COLUMNS,
    MachineRates,
    MemoryEstimate,
    TimeEstimate,
    Workload,
)
from afina.planning.layer_sizes import LayerSizes, layer_sizes
from afina.planning.model_shape import AdapterSize, ModelShape
from afina.settings import TrainSettings
from afina.training.setup.adamw_8bit import SMALLEST

# malloc on Linux puts tensors of less than 32 MB into one heap, and gaps are not always reused;
# set by benchmarks/plan_fit.py
HEAP_SLACK, BACKWARD_FRAGMENTATION = 0.05, 3.25
FLOAT32_PIECE = 1 << 20  # weights that a method converts to float32 at a time
# Bytes per parameter of an optimizer step, arithmetic counted as bytes that take as long to copy:
# 8-bit moments take 2.7 ns in C++ and 64 ns in PyTorch where a copy moves 32 GB/s.
ADAMW_BYTES, ADAMW8_CPP_BYTES, ADAMW8_CPU_BYTES, ADAMW8_CUDA_BYTES = 28.0, 90.0, 2000.0, 60.0


@dataclass(frozen=True)
class StepCost:
    """Cost of a training step on `shape` with an adapter of size `count`, by kind of device.

    Attributes:
        quantization: "none" or "nf4".
        every: Activations of each `every`-th layer are recomputed; 0: of none.
        extra_bytes: Bytes of frozen adapters, keys and values, and what an objective allocates.
    """

    shape: ModelShape
    count: AdapterSize
    settings: TrainSettings
    quantization: str
    device: str = "cpu"
    every: int = 0
    extra_bytes: float = 0.0

    def with_checkpointing(self, every: int) -> "StepCost":
        """Return the same step with the activations of each `every`-th layer recomputed."""
        other = replace(self, every=every)
        other.__dict__.update({n: v for n, v in self.__dict__.items() if n.startswith("_")})
        return other  # with what was counted already

    @cached_property
    def _layers(self) -> list[LayerSizes]:
        quantized = {one.path for one in self.shape.quantized_weights(self.quantization)}
        return layer_sizes(self.shape, self.count, quantized, self._output, self.device)

    @cached_property
    def _weights(self) -> tuple[float, float]:
        """Bytes of all weights, and of the largest tensor."""
        return (
            float(self.shape.weight_bytes(self.quantization)),
            float(self.shape.largest_bytes(self.quantization)),
        )

    @cached_property
    def _output(self) -> set[str]:
        """Paths above the layers: the final norm, the output layer, a scalar head."""
        head = self.shape.model.get_output_embeddings()
        return {
            path
            for path, module in self.shape.model.named_modules()
            if path == SCORE or module is head or ("norm" in path and layer_index(path) is None)
        }

    @property
    def _head_adapted(self) -> bool:
        head = self.shape.model.get_output_embeddings()
        listed = [path for path in self.count.layers if path in self._output]
        adapted = any(self.shape.model.get_submodule(path) is head for path in listed)
        return adapted or bool(self.count.config.trainable_tokens)

    # ---- memory

    def memory(
        self,
        load: Workload,
        libraries: float,
        heap: float = 1.0,
        gaps: tuple[float, float] = (HEAP_SLACK, BACKWARD_FRAGMENTATION),
    ) -> MemoryEstimate:
        """Return the peak bytes of a process, as an upper bound.

        Args:
            load: Sizes of the passes.
            libraries: Bytes of the loaded libraries.
            heap: Measured overhead of this machine's allocator over the bytes counted here.
            gaps: Fragmentation of saved activations and of temporaries within a layer, as ratios
                (set by benchmarks/plan_fit.py).
        """
        e, n, width = self.shape.dtype.itemsize, self.count.trainable, self.count.width
        hidden = self.shape.hidden_size
        is_cpu, has_masters = self.device == "cpu", self.count.width < 4
        learned = n * width + (4 * n if has_masters else 0) + (e * n if width > e else 0)
        slack, fragmentation = (heap * (1.0 + ratio) if is_cpu else 1.0 for ratio in gaps)
        unit = load.tokens * e * slack
        each = [unit * numel for numel in self._kept(load)]
        kept = sum(each)
        states = e * hidden * (2 * load.labels + 3 * load.tokens)
        temporaries = load.tokens * e * self._within_layer(load) + self._weight_copies
        within = temporaries * fragmentation + 2 * slack * load.labels * hidden * e
        moments = [
            kept + slack * (states + self._logits_chunk(load.labels)),
            n * max(width, 4) + self._optimizer_workspace,  # one gradient at a time in float32
            2.0 * n * width,
            *self._backward(load, each, unit, within),
        ]
        weights, largest = self._weights
        best = float(n * width) if is_cpu else 0.0  # is loaded when the heap has its largest size
        other = max(moments) - kept + best + self.extra_bytes
        state = self._optimizer_state
        estimate = MemoryEstimate(libraries, weights, learned, state, kept, other)
        missing = libraries + weights + largest - estimate.peak  # while the weights are loaded
        is_short = is_cpu and missing > 0
        return replace(estimate, other=estimate.other + missing) if is_short else estimate

    def _backward(
        self, load: Workload, each: list[float], unit: float, within: float
    ) -> list[float]:
        """Return the bytes at each layer of the backward pass; `each` are those the layers keep."""
        saved = self._saved(load)
        moments, kept, width = [], sum(each), self.count.width
        above = self.count.trainable - sum(layer.num_trainable for layer in self._layers)
        gradients = float(width * above)
        for number, layer in reversed(list(enumerate(self._layers))):
            if layer.has_gradient:
                recomputed = saved[number] - self.shape.hidden_size
                again = unit * recomputed if self._recomputes(number) else 0.0
                gradients += width * layer.num_trainable
                moments.append(kept + again + gradients + within)
                kept -= each[number]
        return moments

    def _recomputes(self, number: int) -> bool:
        return bool(self.every) and number % self.every == 0

    def _saved(self, load: Workload) -> list[float]:
        """Return the elements per token that each layer saves without checkpointing."""
        heads, width = self.shape.heads
        log_sums = heads * 4 / self.shape.dtype.itemsize
        attention = 4.0 * width + 2 * log_sums
        if self.device == "cpu" and kernels.isa in FAST_ISAS:
            attention = width * (1 + 2 * self.shape.num_kv_heads / heads) + log_sums
        return [
            layer.norms
            + 2 * layer.mlp_width
            + layer.adapter_inputs
            + layer.adapter_saved
            + load.attention_ratio * attention
            if layer.has_gradient
            else 0.0
            for layer in self._layers
        ]

    def _kept(self, load: Workload) -> list[float]:
        """Return the elements per token that each layer keeps for the backward pass."""
        return [
            float(self.shape.hidden_size) if saved and self._recomputes(number) else saved
            for number, saved in enumerate(self._saved(load))
        ]

    def _within_layer(self, load: Workload) -> float:
        """Return the elements per token that are allocated during a layer's backward pass."""
        mlp = max((layer.mlp_width for layer in self._layers if layer.has_gradient), default=0)
        workspace = max((layer.adapter_workspace for layer in self._layers), default=0.0)
        attention = load.attention_ratio * 9 * self.shape.heads[1]
        return 3 * self.shape.hidden_size + max(4 * mlp + workspace, attention)

    @property
    def _weight_copies(self) -> float:
        """Bytes of a weight's copy for a product: dequantized, or packed for 16-bit CPUs."""
        largest = max(layer.largest_matrix for layer in self._layers)
        e = self.shape.dtype.itemsize
        reads_weight = any(layer.adapter_macs_per_pass for layer in self._layers)
        is_packed = self.device == "cpu" and e == 2
        copies = (self.quantization == "nf4") * (1 + reads_weight) + is_packed
        return largest * e * copies + reads_weight * 8.0 * min(largest, FLOAT32_PIECE)

    def _logits_chunk(self, num_targets: int) -> float:
        """Return the bytes of the logits that exist at a time."""
        vocab_size, e = self.shape.vocab_size, self.shape.dtype.itemsize
        if self._head_adapted:  # logits, in float32, their log-probabilities, both gradients
            return min(num_targets, HEAD_CHUNK) * vocab_size * (2 * e + 12.0)
        rows = min(num_targets, max(16, CHUNK_ELEMENTS // vocab_size))
        return vocab_size * (rows * e + min(num_targets, BLOCK_ROWS) * 12.0)

    @property
    def _optimizer_state(self) -> float:
        """Bytes of AdamW's two moments, on the device."""
        if self.settings.optimizer == "adamw":
            return 8.0 * self.count.trainable
        if self.settings.optimizer.endswith("_offload") and self.device != "cpu":
            return 0.0
        small = sum(n for n in self.count.layers.values() if n < SMALLEST)
        return 8.0 * small + 2.04 * (self.count.trainable - small)

    @property
    def _optimizer_workspace(self) -> float:
        """Bytes of one tensor's 8-bit step: float32 moments, gradient, value and temporaries."""
        if self.settings.optimizer == "adamw" or self._has_cpp_adamw8:
            return 0.0
        return 24.0 * max(self.count.layers.values(), default=0)

    @property
    def _has_cpp_adamw8(self) -> bool:
        """Whether 8-bit moments are updated in C++, block by block."""
        return self.device == "cpu" and kernels.library is not None

    @property
    def kv_bytes_per_token(self) -> float:
        """Bytes of a token's keys and values in all layers."""
        heads, width = self.shape.heads
        e = self.shape.dtype.itemsize
        return 2.0 * width * self.shape.num_kv_heads / heads * e * len(self._layers)

    # ---- time

    def time(self, load: Workload, rates: MachineRates) -> TimeEstimate:
        """Return the seconds of an optimizer step."""
        dtype, tokens = self._rate_dtype, load.mean_tokens
        rate, e = rates.rate(dtype, tokens), self.shape.dtype.itemsize
        trained = [layer for layer in self._layers if layer.has_gradient]
        frozen = [layer for layer in self._layers if not layer.has_gradient]
        recomputed = sum(bool(k) and self._recomputes(n) for n, k in enumerate(self._saved(load)))
        again = recomputed / max(1, len(trained))  # layers are alike: each counts for this ratio
        weights = sum(layer.weights for layer in self._layers)
        weights += sum((1 + again) * layer.weights + layer.trained_weights for layer in trained)
        head = self._head_macs(load) * (2 + 2 * self._head_adapted)
        attention = self._attention_macs(load) * (len(frozen) + (3.5 + again) * len(trained))
        macs = sum(layer.adapter_macs for layer in trained)
        per_pass = sum(layer.adapter_macs_per_pass for layer in trained) * (1 + again)
        columns = macs / max(1, sum(layer.adapted_width for layer in trained))  # the rank
        skinny = rates.skinny_matmul_rates[dtype] * max(1.0, columns) / SKINNY_COLUMNS
        adapters = macs * tokens * (3 + again) / min(rate, skinny)
        adapters += per_pass / rates.skinny_matmul_rates["float32"]
        moved = (3 + again) * sum(map(self._moved_numel, trained))
        moved += sum(map(self._moved_numel, frozen))
        codes = (2 + again) * sum(layer.nf4_weights for layer in trained)
        codes += sum(layer.nf4_weights for layer in frozen)
        optimizer = self.count.trainable * (self._optimizer_bytes + 14 * (self.count.width < 4))
        factor, passes = rates.time_factor, load.num_micro_batches
        products = weights * tokens / rate + head / rates.rate(dtype, load.mean_labels)
        layers = len(frozen) / 3 + (1 + again / 3) * len(trained)
        return TimeEstimate(
            products=factor * passes * 2 * products,
            attention=factor * passes * attention / rates.attention_rate(dtype, load.mean_length),
            adapters=factor * passes * 2 * adapters,
            dequantisation=passes * codes / rates.dequantize,
            activations=factor * passes * tokens * e * moved / rates.copy_bandwidth,
            optimizer=optimizer / rates.copy_bandwidth,
            overhead=passes * rates.seconds_per_layer * layers,
            overlaps=rates.overlaps,
        )

    def forward(self, load: Workload, rates: MachineRates) -> float:
        """Return the seconds of one forward pass of the base; adapters are negligible."""
        dtype, tokens, layers = self._rate_dtype, load.mean_tokens, self._layers
        weights = sum(layer.weights for layer in layers)
        products = weights * tokens / rates.rate(dtype, tokens)
        products += self._head_macs(load) / rates.rate(dtype, load.mean_labels)
        attention = self._attention_macs(load) * len(layers)
        moved = tokens * self.shape.dtype.itemsize * sum(map(self._moved_numel, layers))
        work = 2 * products + attention / rates.attention_rate(dtype, load.mean_length)
        work = rates.time_factor * (work + moved / rates.copy_bandwidth)
        work += sum(layer.nf4_weights for layer in layers) / rates.dequantize
        python = rates.seconds_per_layer / 3 * len(layers)
        return max(work, python) if rates.overlaps else work + python

    @property
    def _rate_dtype(self) -> str:
        return "bfloat16" if self.shape.dtype == torch.bfloat16 else "float32"

    def _head_macs(self, load: Workload) -> float:
        return self.shape.hidden_size * self.shape.vocab_size * load.mean_labels

    def _attention_macs(self, load: Workload) -> float:
        """Return the operations of one layer's attention, forward."""
        width = self.shape.heads[1]
        return 4 * load.attention_ratio * load.mean_tokens * load.mean_length * width

    @property
    def _optimizer_bytes(self) -> float:
        """Bytes per parameter of an optimizer step."""
        if self.settings.optimizer == "adamw":
            return ADAMW_BYTES
        if self.device != "cpu":
            return ADAMW8_CUDA_BYTES
        return ADAMW8_CPP_BYTES if self._has_cpp_adamw8 else ADAMW8_CPU_BYTES

    def _moved_numel(self, layer: LayerSizes) -> float:
        """Return the elements per token that a layer's other operations read and write, forward."""
        own = 12 * self.shape.hidden_size + 3 * layer.mlp_width + 6 * self.shape.heads[1]
        return own + 2 * layer.adapter_outputs
