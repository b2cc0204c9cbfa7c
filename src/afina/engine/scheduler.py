"""Selection of the tokens of the next forward pass.

    running   decoding: one token each, always          then, up to the token budget of a step,
              the next chunk of a long prompt
    waiting   from the client with the least service    (virtual token counter, arXiv 2401.00588)

Decoding never waits for a long prompt, and a client that fills the queue does not delay others.
When blocks run out, the youngest sequence is preempted: its tokens stay, its keys and values are
computed again.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Sequence

from afina.engine.kv_cache import KVCache
from afina.engine.memory import MemoryManager
from afina.engine.sequence import AdapterSpan, ScheduledChunk, SequenceState, SequenceStatus
from afina.errors import AdapterError

DECODE_TOKEN_WEIGHT = 2.0  # service that a generated token counts, in prompt tokens
MAX_DEFER_SECONDS = 5.0  # longest that a request waits for steps on merged weights
MAX_SKIPPED_STEPS = 50  # steps without room for a client before no other client is admitted


class Scheduler:
    """Queues by client, and the running sequences. Only the engine's thread calls.

    Attributes:
        virtual_tokens: service that each waiting or running client has had, in prompt tokens.
        load_failures: sequences whose adapter could not be loaded, for the engine to end.
        should_defer: whether a request with these adapters should wait for merged steps.
    """

    def __init__(
        self, memory: MemoryManager, cache: KVCache, max_num_batched_tokens: int, max_num_seqs: int
    ) -> None:
        self.memory, self.cache = memory, cache
        self.max_num_batched_tokens, self.max_num_seqs = max_num_batched_tokens, max_num_seqs
        self.waiting: dict[str, deque[SequenceState]] = {}
        self.running: list[SequenceState] = []
        self.virtual_tokens: dict[str, float] = {}
        self.load_failures: list[tuple[SequenceState, AdapterError]] = []
        self.preemptions = 0
        self.should_defer: Callable[[Sequence[AdapterSpan]], bool] = lambda spans: False
        self._deferred_since: dict[int, float] = {}  # seconds of the monotonic clock, by seq_id
        self._skipped_steps: dict[str, int] = {}  # steps without room, by client
        memory.pool.on_block_moved = self._on_block_moved

    @property
    def num_waiting(self) -> int:
        """Requests in the queues."""
        return sum(map(len, self.waiting.values()))

    def add(self, sequence: SequenceState, at_front: bool = False) -> None:
        """Queue a sequence; a preempted one goes to the front of its client's queue."""
        client = sequence.client_id
        if client not in self.virtual_tokens:  # an absent client gains no credit
            self.virtual_tokens[client] = min(self.virtual_tokens.values(), default=0.0)
        queue = self.waiting.setdefault(client, deque())
        queue.appendleft(sequence) if at_front else queue.append(sequence)
        for content in sequence.required_adapters:
            self.memory.prefetch(content)

    # ---- the step

    def schedule(self) -> list[ScheduledChunk]:
        """Return the chunks of the next forward pass, with blocks allocated; empty if none fits."""
        chunks: list[ScheduledChunk] = []
        decoding = [s for s in self.running if self._is_decoding(s)]
        for sequence in decoding:
            if sequence.is_running and self._allocate_up_to(
                sequence, sequence.num_computed_tokens + 1
            ):
                chunks.append((sequence, 1))
        # without decoding sequences no one waits for this step: long chunks have more throughput
        budget = self.max_num_batched_tokens * (1 if chunks else 4) - len(chunks)
        if not self.cache.keeps_tokens:
            budget = sys.maxsize
        for sequence in [s for s in self.running if not self._is_decoding(s)]:
            budget -= self._add_chunk(sequence, budget, chunks)
        while budget > 0 and len(self.running) < self.max_num_seqs:
            admitted = self._admit_next()
            if admitted is None:
                break
            budget -= self._add_chunk(admitted, budget, chunks)
        return [chunk for chunk in chunks if chunk[0].is_running]  # some may have been preempted

    def _is_decoding(self, sequence: SequenceState) -> bool:
        return self.cache.keeps_tokens and sequence.num_uncomputed_tokens == 1

    def _add_chunk(self, sequence: SequenceState, budget: int, chunks: list[ScheduledChunk]) -> int:
        """Add as many of a sequence's tokens as budget and blocks allow; return how many."""
        count = min(sequence.num_uncomputed_tokens, budget)
        blocks = len(sequence.block_table) + self.memory.num_available_blocks
        room = blocks * self.cache.block_size - sequence.num_computed_tokens
        if room < count:
            count = max(min(room, count), 1 if not chunks else 0)
        if count <= 0 or not sequence.is_running:
            return 0
        if not self._allocate_up_to(sequence, sequence.num_computed_tokens + count):
            return 0
        chunks.append((sequence, count))
        return count

    def _allocate_up_to(self, sequence: SequenceState, num_tokens: int) -> bool:
        """Allocate blocks for the first `num_tokens`; return False if it was preempted."""
        while len(sequence.block_table) * self.cache.block_size < num_tokens:
            block = self.memory.allocate_block()
            if block is not None:
                sequence.block_table.append(block)
                continue
            youngest = max(self.running, key=lambda s: s.seq_id)
            self.preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def preempt(self, sequence: SequenceState) -> None:
        """Free the blocks of a running sequence and return it to the front of its queue."""
        self.free_blocks(sequence)
        self.preemptions += 1
        self.add(sequence, at_front=True)

    def free_blocks(self, sequence: SequenceState) -> None:
        """Remove a running sequence; its shared blocks stay in the prefix cache."""
        self.running.remove(sequence)
        sequence.status = SequenceStatus.WAITING
        self.memory.tree.release(sequence.prefix_nodes)
        for block in sequence.block_table[len(sequence.prefix_nodes) :]:
            self.memory.pool.free(block)
        for content in sequence.required_adapters:
            self.memory.release(content.hash)
        sequence.block_table, sequence.prefix_nodes, sequence.num_computed_tokens = [], [], 0

    # ---- admission

    def _admit_next(self) -> SequenceState | None:
        """Admit the next request of the client with the least service for which there is room."""
        clients = [client for client, queue in self.waiting.items() if queue]
        for client in sorted(clients, key=lambda client: self.virtual_tokens[client]):
            sequence = self.waiting[client][0]
            if self._is_deferred(sequence):
                continue
            if self._admit(sequence):
                self.waiting[client].popleft()
                self._skipped_steps.pop(client, None)
                self._deferred_since.pop(sequence.seq_id, None)
                return sequence
            if any(sequence is failed for failed, _ in self.load_failures):
                self.waiting[client].popleft()
                return self._admit_next()
            self._skipped_steps[client] = self._skipped_steps.get(client, 0) + 1
            if self._skipped_steps[client] > MAX_SKIPPED_STEPS and self.running:
                return None
        return None

    def _is_deferred(self, sequence: SequenceState) -> bool:
        """Return whether merged steps continue without it; with one admitted, others may follow."""
        if not self.running or not self.should_defer(sequence.adapter_spans):
            return False
        if any(self.should_defer(s.adapter_spans) for s in self.running):
            return False
        since = self._deferred_since.setdefault(sequence.seq_id, time.monotonic())
        return time.monotonic() - since < MAX_DEFER_SECONDS

    def _admit(self, sequence: SequenceState) -> bool:
        """Load its adapters and match its prefix; return False where there is no room now."""
        if self.running and not sequence.can_share_step(self.running[0]):
            return False
        required = sequence.required_adapters
        unread = [content for content in required if not self.memory.is_ready(content)]
        if unread and self.running:  # other sequences run while the file is read
            for content in unread:
                self.memory.prefetch(content)
            return False
        loaded: list[str] = []
        try:
            for content in required:
                if not self.memory.load(content):
                    break
                loaded.append(content.hash)
        except AdapterError as error:
            self.load_failures.append((sequence, error))
        blocks = -(-len(sequence.token_ids) // self.cache.block_size)
        fits = self.memory.num_available_blocks >= blocks or not self.running
        if len(loaded) < len(required) or not fits:
            for digest in loaded:
                self.memory.release(digest)
            return False
        self._match_prefix(sequence)
        sequence.status = SequenceStatus.RUNNING
        self.running.append(sequence)
        return True

    def _match_prefix(self, sequence: SequenceState) -> None:
        """Take over blocks of the prefix cache, but for the last token: its logits are needed."""
        full_blocks = (len(sequence.token_ids) - 1) // self.cache.block_size
        sequence.prefix_nodes = self.memory.tree.match(sequence.block_keys(full_blocks))
        sequence.block_table = [node.page for node in sequence.prefix_nodes]
        sequence.num_computed_tokens = len(sequence.prefix_nodes) * self.cache.block_size
        if not sequence.num_completion_tokens:
            sequence.num_cached_tokens = max(
                sequence.num_cached_tokens, sequence.num_computed_tokens
            )

    # ---- after the forward pass

    def update_after_step(self, chunks: Sequence[ScheduledChunk]) -> None:
        """Count the computed tokens, and share the blocks that are full now."""
        for sequence, count in chunks:
            is_decode = sequence.num_completion_tokens > 0 and count == 1
            client = sequence.client_id
            cost = DECODE_TOKEN_WEIGHT if is_decode else count
            self.virtual_tokens[client] = self.virtual_tokens.get(client, 0.0) + cost
            if self.cache.keeps_tokens:
                sequence.num_computed_tokens += count
                self._share_full_blocks(sequence)

    def _share_full_blocks(self, sequence: SequenceState) -> None:
        """Insert full blocks into the prefix cache; an equal cached block replaces one."""
        tree = self.memory.tree
        for key in sequence.block_keys(sequence.num_computed_tokens // self.cache.block_size):
            at = len(sequence.prefix_nodes)
            parent = sequence.prefix_nodes[-1] if sequence.prefix_nodes else tree.root
            node = tree.insert(parent, key, sequence.block_table[at])
            if node.page != sequence.block_table[at]:
                self.memory.pool.free(sequence.block_table[at])
                sequence.block_table[at] = node.page
            sequence.prefix_nodes.append(node)

    def forget_idle_clients(self) -> None:
        """Delete the counters of clients that neither wait nor run."""
        present = {sequence.client_id for sequence in self.running}
        present |= {client for client, queue in self.waiting.items() if queue}
        for client in [client for client in self.virtual_tokens if client not in present]:
            del self.virtual_tokens[client]
            self.waiting.pop(client, None)
            self._skipped_steps.pop(client, None)

    def abort(self, sequence: SequenceState) -> None:
        """Remove a sequence, running or waiting."""
        self._deferred_since.pop(sequence.seq_id, None)
        queue = self.waiting.get(sequence.client_id, ())
        if sequence.is_running:
            self.free_blocks(sequence)
        elif sequence in queue:  # one whose adapter failed to load has left it
            self.waiting[sequence.client_id].remove(sequence)
        sequence.status = SequenceStatus.FINISHED

    def _on_block_moved(self, old: int, new: int) -> None:
        self.memory.tree.moved(old, new)
        for sequence in self.running:
            if old in sequence.block_table:
                sequence.block_table[sequence.block_table.index(old)] = new
