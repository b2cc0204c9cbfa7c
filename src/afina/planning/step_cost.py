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
from torch import nn

from afina.adapters.base import AdapterLayer
from afina.adapters.registry import get_method
from afina.adapters.target_module import TargetModule
from afina.adapters.target_selection import layer_index
from afina.kernels.cross_entropy import BLOCK_ROWS, CHUNK_ELEMENTS
from afina.kernels.dispatch import kernels
from afina.kernels.varlen_attention import WIDE
from afina.models.causal_lm import HEAD_CHUNK, SCORE
from afina.models.fast_llama import MLPS, NORMS
from afina.models.nf4 import quantizable_modules
from afina.planning.estimates import THIN, MachineRates, MemoryEstimate, TimeEstimate, Workload
from afina.planning.model_shape import AdapterSize, ModelShape
from afina.settings import TrainSettings
from afina.training.setup.adamw_8bit import SMALLEST

# malloc on Linux puts tensors of less than 32 MB into one heap, and gaps are not always reused;
# set by benchmarks/plan_fit.py
HEAP_SLACK, BACKWARD_FRAGMENTATION = 0.05, 3.25
PIECE = 1 << 20  # weights
STEP8, STEP8_PLAIN = 90.0, 2000.0  # 2.7 ns and 64 ns a number where a copy reads and writes 32 GB/s
SAME_INPUT = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})


@dataclass
class _Block:
    """One decoder layer; elements per token, unless stated otherwise."""

    matrices: float = 0.0  # weights in products
    largest: int = 0  # weights of the largest matrix
    norms: int = 0
    inner: int = 0  # width of the feed-forward
    inputs: int = 0  # kept for deltas
    keeps: int = 0
    thin: float = 0.0
    edges: int = 0  # inputs and outputs of adapted layers
    once: float = 0.0  # a pass
    trained: int = 0  # weights with gradients of their own
    passes: int = 0  # outputs of adapted layers
    learned: int = 0  # numbers with a gradient of the adapter, in all
    nf4: int = 0  # weights written out at each product
    works: float = 0.0  # of its deltas, while they work
    kept: float = 0.0  # for the backward pass
    flows: bool = False  # whether gradients flow through it


@dataclass(frozen=True)
class StepCost:
    """Cost of a training step on `shape` with an adapter of size `count`, by kind of device."""

    shape: ModelShape
    count: AdapterSize
    settings: TrainSettings
    quantization: str  # "none" or "nf4"
    device: str = "cpu"
    every: int = (
        0  # activations of each `every`-th block are made again in the backward pass; 0: of none
    )
    besides: float = 0.0  # bytes of what is there besides: frozen adapters, keys and values

    def with_checkpointing(self, every: int) -> "StepCost":
        """The same step with the activations of each `every`-th block made again."""
        other = replace(self, every=every)
        other.__dict__.update(
            {name: value for name, value in self.__dict__.items() if name.startswith("_")}
        )  # what is known
        return other

    # ---- the model

    @property
    def _width(self) -> int:
        return int(self.shape.config.hidden_size)

    @property
    def _heads(self) -> tuple[int, int]:
        """(heads, width of all of them)."""
        config = self.shape.config
        heads = int(config.num_attention_heads)
        return heads, heads * int(getattr(config, "head_dim", None) or config.hidden_size // heads)

    @cached_property
    def _kind(self) -> type[AdapterLayer]:
        return get_method(self.count.config.method)

    @cached_property
    def _weights(self) -> tuple[float, float]:
        """Bytes of all weights as they are held, and of the largest tensor."""
        return float(self.shape.weight_bytes(self.quantization)), float(
            self.shape.largest(self.quantization)
        )

    @cached_property
    def _codes(self) -> set[str]:
        return set(quantizable_modules(self.shape.model)) if self.quantization == "nf4" else set()

    @cached_property
    def _blocks(self) -> list[_Block]:
        """The blocks, from the modules that they hold."""
        blocks = [_Block() for _ in range(self.shape.num_layers)]
        shared: set[tuple[str, int]] = set()
        for path, module in self.shape.model.named_modules():
            if (number := layer_index(path)) is None:
                continue
            block, layer, name = blocks[number], TargetModule(path, module), type(module).__name__
            if layer.is_matrix and not isinstance(module, nn.Embedding):
                self._add_matrix(block, layer, shared)
            elif "norm" in name.lower():
                block.norms += self._norm(path, module) * (
                    1 if name in NORMS else 1 + 12 // self.shape.dtype.itemsize
                )
            elif name in MLPS or name.endswith("MLP"):
                widest = max(
                    (
                        TargetModule("", m).out_features
                        for m in module.modules()
                        if TargetModule("", m).is_matrix
                    ),
                    default=0,
                )
                block.inner += widest if name in MLPS else 3 * widest
            else:  # experts in one tensor: each token passes some of them
                config = self.shape.config
                some = getattr(config, "num_experts_per_tok", 1) / (
                    getattr(config, "num_local_experts", None) or 1
                )
                block.matrices += min(1.0, some) * sum(
                    p.numel() for p in module.parameters(recurse=False) if p.ndim == 3
                )
        embedded = any(
            layer_index(path) is None and path not in self._output for path in self.count.layers
        )
        flows = embedded or bool(self.count.config.trainable_tokens)
        for number, block in enumerate(blocks):
            flows = flows or any(layer_index(path) == number for path in self.count.layers)
            block.flows = flows
        for path, numbers in self.count.layers.items():
            if (at := layer_index(path)) is not None:
                blocks[at].learned += numbers
        return blocks

    def _add_matrix(self, block: _Block, layer: TargetModule, shared: set[tuple[str, int]]) -> None:
        weights = layer.in_features * layer.out_features
        block.matrices += weights
        block.largest = max(block.largest, weights)
        block.nf4 += weights if layer.path in self._codes else 0
        if layer.path not in self.count.layers:
            return
        kind, (parent, _, leaf) = self._kind, layer.path.rpartition(".")
        cost = kind.layer_cost(layer, self.count.config, self.device)
        group = next((n for n, leaves in enumerate(SAME_INPUT) if leaf in leaves), None)
        if cost.saves_input and (group is None or (parent, group) not in shared):
            block.inputs += layer.in_features
            if group is not None:
                shared.add((parent, group))
        block.keeps += cost.saved_numel
        block.works = max(block.works, cost.workspace_numel)
        block.thin += cost.macs_per_token
        block.edges += layer.in_features + layer.out_features
        block.once += cost.macs_per_pass
        block.trained += weights if kind.replaces_base else 0
        block.passes += 0 if kind.replaces_base else layer.out_features

    def _norm(self, path: str, module: nn.Module) -> int:
        """Numbers a token that a norm reads: those of the heads are one norm for all."""
        own = sum(p.numel() for n, p in module.named_parameters(recurse=False) if n == "weight")
        return self._heads[1] if path.endswith(("q_norm", "k_norm")) and own < self._width else own

    @cached_property
    def _output(self) -> set[str]:
        """Paths above the blocks: the last norm, the output layer, a head of rewards."""
        head = self.shape.model.get_output_embeddings()
        above = {
            p
            for p, _ in self.shape.model.named_modules()
            if p == SCORE or ("norm" in p and layer_index(p) is None)
        }
        return above | {p for p, m in self.shape.model.named_modules() if m is head}

    @property
    def _head_adapted(self) -> bool:
        head = self.shape.model.get_output_embeddings()
        return bool(self.count.config.trainable_tokens) or any(
            self.shape.model.get_submodule(p) is head for p in self._listed
        )

    @property
    def _listed(self) -> list[str]:
        return [path for path in self.count.layers if path in self._output]

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
            gaps: Fragmentation of kept activations and of temporaries within a layer, as ratios
                (set by benchmarks/plan_fit.py).
        """
        e, n, width = self.shape.dtype.itemsize, self.count.trainable, self.count.width
        cpu, masters = self.device == "cpu", self.count.width < 4
        learned = n * width + (4 * n if masters else 0) + (e * n if width > e else 0)
        slack, holes = (heap * (1.0 + share) if cpu else 1.0 for share in gaps)
        each = [load.tokens * e * slack * numbers for numbers in self._kept(load)]
        kept = sum(each)
        loss = slack * (
            e * self._width * (2 * load.labels + 3 * load.tokens) + self._chunk(load.labels)
        )
        within = (
            load.tokens * e * self._within(load) + self._packed
        ) * holes + 2 * slack * load.labels * self._width * e
        step = (
            n * max(width, 4) + self._optimizer_work
        )  # one gradient at a time goes over into float32
        moments = [
            kept + loss,
            step,
            2.0 * n * width,
            *self._backward(each, load.tokens * e * slack, within),
        ]
        weights, largest = self._weights
        end = (
            float(n * width) if cpu else 0.0
        )  # the best adapter is read when a heap is as large as it was
        made = MemoryEstimate(
            libraries,
            weights,
            learned,
            self._moments,
            kept,
            max(moments) - kept + end + self.besides,
        )
        missing = libraries + weights + largest - made.peak  # while it is loaded
        return replace(made, other=made.other + missing) if cpu and missing > 0 else made

    def _backward(self, each: list[float], unit: float, within: float) -> list[float]:
        """Return the bytes at each layer of the backward pass; `each` are those the layers keep."""
        moments, kept, gradients = [], sum(each), float(self.count.width * self.count.trainable)
        gradients -= self.count.width * sum(
            block.learned for block in self._blocks
        )  # those above the blocks
        for number, block in reversed(list(enumerate(self._blocks))):
            if block.flows:
                again = unit * (block.kept - self._width) if self._recomputes(number) else 0.0
                gradients += self.count.width * block.learned
                moments.append(kept + again + gradients + within)
                kept -= each[number]
        return moments

    def _recomputes(self, number: int) -> bool:
        return bool(self.every) and number % self.every == 0

    def _kept(self, load: Workload) -> list[float]:
        """Return the elements per token that each layer keeps for the backward pass."""
        heads, width = self._heads
        logs = heads * 4 / self.shape.dtype.itemsize
        attention = 4.0 * width + 2 * logs
        if self.device == "cpu" and kernels.isa in WIDE:
            shared = int(getattr(self.shape.config, "num_key_value_heads", None) or heads)
            attention = width * (1 + 2 * shared / heads) + logs
        for block in self._blocks:
            own = block.norms + 2 * block.inner + block.inputs + block.keeps
            block.kept = own + load.attention_ratio * attention if block.flows else 0.0
        return [
            float(self._width) if block.flows and self._recomputes(number) else block.kept
            for number, block in enumerate(self._blocks)
        ]

    def _within(self, load: Workload) -> float:
        """Numbers a token that live within a block while its backward pass runs."""
        _, width = self._heads
        inner = max((b.inner for b in self._blocks if b.flows), default=0)
        works = max((b.works for b in self._blocks), default=0.0)
        return 3 * self._width + max(4 * inner + works, load.attention_ratio * 9 * width)

    @property
    def _packed(self) -> float:
        """Bytes of a weight's copy for a product: dequantized, or packed for 16-bit CPUs."""
        largest, e = max(b.largest for b in self._blocks), self.shape.dtype.itemsize
        once = any(
            b.once for b in self._blocks
        )  # deltas that read the weight themselves, a piece of it in float32
        copies = (self.quantization == "nf4") * (1 + once) + (self.device == "cpu" and e == 2)
        return largest * e * copies + once * 8.0 * min(largest, PIECE)

    def _chunk(self, labels: int) -> float:
        """Bytes of the logits that exist at a time."""
        vocabulary, e = int(self.shape.config.vocab_size), self.shape.dtype.itemsize
        if self._head_adapted:  # logits, in float32, their log-probabilities, both gradients
            return min(labels, HEAD_CHUNK) * vocabulary * (2 * e + 12.0)
        return vocabulary * (
            min(labels, max(16, CHUNK_ELEMENTS // vocabulary)) * e + min(labels, BLOCK_ROWS) * 12.0
        )

    @property
    def _moments(self) -> float:
        """Bytes of AdamW's two moments, on the device."""
        if self.settings.optimizer == "adamw":
            return 8.0 * self.count.trainable
        small = sum(n for n in self.count.layers.values() if n < SMALLEST)
        on_device = (
            0.0 if self.settings.optimizer.endswith("offloaded") and self.device != "cpu" else 1.0
        )
        return on_device * (8.0 * small + 2.04 * (self.count.trainable - small))

    @property
    def _optimizer_work(self) -> float:
        """Bytes of one tensor's 8-bit step: float32 moments, gradient, value and temporaries."""
        plain = self.settings.optimizer == "adamw" or self._steps_in_cache
        return 0.0 if plain else 24.0 * max(self.count.layers.values(), default=0)

    @property
    def _steps_in_cache(self) -> bool:
        """Whether moments of 8 bits are stepped in C++, a block at a time."""
        return self.device == "cpu" and kernels.library is not None

    # ---- time

    def time(self, load: Workload, rates: MachineRates) -> TimeEstimate:
        """Seconds of an optimizer step."""
        dtype = "bfloat16" if self.shape.dtype == torch.bfloat16 else "float32"
        tokens, e = load.mean_tokens, self.shape.dtype.itemsize
        rate = rates.rate(dtype, tokens)
        flowing = [b for b in self._blocks if b.flows]
        below = len(self._blocks) - len(flowing)
        # blocks are alike: each counts as recomputed for the share that is
        again = sum(self._recomputes(n) and b.flows for n, b in enumerate(self._blocks)) / max(
            1, len(flowing)
        )
        weights = sum(b.matrices for b in self._blocks) + sum(
            (1 + again) * b.matrices + b.trained for b in flowing
        )
        head = (
            self._width
            * int(self.shape.config.vocab_size)
            * load.mean_labels
            * (2 + 2 * self._head_adapted)
        )
        heads = (
            4
            * load.attention_ratio
            * tokens
            * load.mean_length
            * self._heads[1]
            * (below + (3.5 + again) * len(flowing))
        )
        thin = sum(b.thin for b in flowing) * tokens * (3 + again)
        once = sum(b.once for b in flowing) * (1 + again)
        passes = sum((3 + again) * self._passes(b) for b in flowing) + sum(
            self._passes(b) for b in self._blocks if not b.flows
        )
        codes = sum((2 + again) * b.nf4 for b in flowing) + sum(
            b.nf4 for b in self._blocks if not b.flows
        )
        optimizer = self.count.trainable * (self._moved + 14 * (self.count.width < 4))
        columns = sum(b.thin for b in flowing) / max(
            1, sum(b.edges for b in flowing)
        )  # of a thin product: the rank
        thin_rate = min(rate, rates.skinny_matmul_rates[dtype] * max(1.0, columns) / THIN)
        factor, many = rates.time_factor, load.num_micro_batches
        return TimeEstimate(
            products=factor
            * many
            * 2
            * (weights * tokens / rate + head / rates.rate(dtype, load.mean_labels)),
            attention=factor * many * heads / rates.attention_rate(dtype, load.mean_length),
            adapters=factor
            * many
            * 2
            * (thin / thin_rate + once / rates.skinny_matmul_rates["float32"]),
            dequantisation=many * codes / rates.dequantise,
            activations=factor * many * tokens * e * passes / rates.copy_bandwidth,
            optimizer=optimizer / rates.copy_bandwidth,
            overhead=many * rates.seconds_per_layer * (below / 3 + (1 + again / 3) * len(flowing)),
            overlaps=rates.overlaps,
        )

    @property
    def _moved(self) -> float:
        """Bytes per parameter of an optimizer step, arithmetic counted as bytes of equal time."""
        if self.settings.optimizer == "adamw":
            return 28.0
        return STEP8 if self._steps_in_cache else STEP8_PLAIN if self.device == "cpu" else 60.0

    def forward(self, load: Workload, rates: MachineRates) -> float:
        """Return the seconds of one forward pass of the base; adapters are negligible."""
        dtype = "bfloat16" if self.shape.dtype == torch.bfloat16 else "float32"
        tokens, blocks = load.mean_tokens, self._blocks
        head = self._width * int(self.shape.config.vocab_size) * load.mean_labels
        heads = 4 * load.attention_ratio * tokens * load.mean_length * self._heads[1] * len(blocks)
        products, factor = (
            sum(b.matrices for b in blocks) * tokens / rates.rate(dtype, tokens),
            rates.time_factor,
        )
        work = (
            factor * 2 * (products + head / rates.rate(dtype, load.mean_labels))
            + factor * heads / rates.attention_rate(dtype, load.mean_length)
            + sum(b.nf4 for b in blocks) / rates.dequantise
            + factor
            * tokens
            * self.shape.dtype.itemsize
            * sum(self._passes(b) for b in blocks)
            / rates.copy_bandwidth
        )
        python = rates.seconds_per_layer / 3 * len(blocks)
        return max(work, python) if rates.overlaps else work + python

    @property
    def cached(self) -> float:
        """Bytes of a token's keys and values in all blocks."""
        heads, width = self._heads
        groups = heads / int(getattr(self.shape.config, "num_key_value_heads", None) or heads)
        return 2.0 * width / groups * self.shape.dtype.itemsize * len(self._blocks)

    def _passes(self, block: _Block) -> float:
        """Return the elements per token that a layer's other parts read and write, forward."""
        return 12 * self._width + 3 * block.inner + 6 * self._heads[1] + 2 * block.passes
