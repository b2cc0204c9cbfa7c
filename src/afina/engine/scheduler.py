"""Selection of the tokens of the next forward pass.

    running   decoding: one token each, always
    prompts   then, up to the token budget of a step, chunks of running and waiting prompts, always
              of the client with the least service      (virtual token counter, arXiv 2401.00588)

Decoding never waits for a long prompt, and a client that fills the queue does not delay others: a
client with less than its share of sequences and blocks is admitted instead of the youngest
sequence of the client with the most. A preempted sequence keeps its tokens; its keys and values are
computed again where the prefix cache does not have them any more.
"""

import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from itertools import takewhile

from afina.engine.kv_cache import KVCache
from afina.engine.memory import MemoryManager
from afina.engine.sequence import AdapterSpan, ScheduledChunk, SequenceState, SequenceStatus

DECODE_TOKEN_WEIGHT = 2.0  # service that a generated token counts, in prompt tokens
MAX_DEFER_SECONDS = 5.0  # longest that a request waits for steps on merged weights
MAX_SKIPPED_STEPS = 50  # failed admissions of a client before no other client is admitted


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
        self.load_failures: list[tuple[SequenceState, Exception]] = []
        self.preemptions = 0
        self.should_defer: Callable[[Sequence[AdapterSpan]], bool] = lambda spans: False
        self._deferred_since: dict[int, float] = {}  # seconds of the monotonic clock, by seq_id
        self._skipped_steps: dict[str, int] = {}  # steps in which it did not fit, by client
        self._preempted: set[int] = set()  # in the present step, by seq_id
        self._pool_is_full = False  # why the last admission failed
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
        self._preempted.clear()
        decoding = [s for s in self.running if self._is_decoding(s)]
        for sequence in decoding:
            if sequence.is_running and self._allocate_up_to(
                sequence, sequence.num_computed_tokens + 1
            ):
                chunks.append((sequence, 1))
        # without decoding sequences no one waits for this step: long chunks have more throughput
        budget = self.max_num_batched_tokens * (1 if chunks else 4) - len(chunks)
        self._add_prompts(budget if self.cache.keeps_tokens else sys.maxsize, chunks)
        return [chunk for chunk in chunks if chunk[0].is_running]  # some may have been preempted

    def _add_prompts(self, budget: int, chunks: list[ScheduledChunk]) -> None:
        """Add chunks of up to `budget` prompt tokens, the client with the least service first."""
        prompts: dict[str, deque[SequenceState]] = {}
        for sequence in self.running:
            if not self._is_decoding(sequence):
                prompts.setdefault(sequence.client_id, deque()).append(sequence)
        spent: Counter[str] = Counter()  # in this step
        closed: set[str] = set()  # clients of which no further request can be admitted now
        while budget > 0:
            waiting = [c for c, queue in self.waiting.items() if queue and c not in closed]
            clients = [*(c for c, own in prompts.items() if own), *waiting]
            if not clients:
                return
            client = min(clients, key=lambda c: self.virtual_tokens.get(c, 0.0) + spent[c])
            if prompts.get(client):
                admitted: SequenceState | None = prompts[client].popleft()
            else:
                admitted = self._admit_next(client)
            if admitted is None:
                closed.add(client)
                if self._skipped_steps.get(client, 0) > MAX_SKIPPED_STEPS and self.running:
                    closed |= self.waiting.keys()
                continue
            count = self._add_chunk(admitted, budget, chunks)
            budget -= count
            spent[client] += count

    def _is_decoding(self, sequence: SequenceState) -> bool:
        return self.cache.keeps_tokens and sequence.num_uncomputed_tokens == 1

    def _add_chunk(self, sequence: SequenceState, budget: int, chunks: list[ScheduledChunk]) -> int:
        """Add as many of a sequence's tokens as budget and blocks allow; return how many."""
        count = min(sequence.num_uncomputed_tokens, budget)
        blocks = len(sequence.block_table) + self.memory.num_available_blocks
        space = blocks * self.cache.block_size - sequence.num_computed_tokens
        if space < count:
            count = max(min(space, count), 1 if not chunks else 0)
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
            blocks = self._blocks_by_client()
            youngest = max(self.running, key=lambda s: (blocks[s.client_id], s.seq_id))
            self.preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def preempt(self, sequence: SequenceState) -> None:
        """Free the blocks of a running sequence and return it to the front of its queue."""
        self.free_blocks(sequence)
        self.preemptions += 1
        self._preempted.add(sequence.seq_id)
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

    def _admit_next(self, client: str) -> SequenceState | None:
        """Admit the next request of a client; None where it has none or it does not fit."""
        queue = self.waiting[client]
        while queue:
            sequence = queue[0]
            if sequence.seq_id in self._preempted or self._is_deferred(sequence):
                return None
            if len(self.running) >= self.max_num_seqs and not self._make_way(client):
                return None
            is_admitted = self._admit(sequence)
            while not is_admitted and self._pool_is_full and self._make_way(client, sequence):
                is_admitted = self._admit(sequence)
            if is_admitted:
                queue.popleft()
                self._skipped_steps.pop(client, None)
                self._deferred_since.pop(sequence.seq_id, None)
                return sequence
            if all(sequence is not failed for failed, _ in self.load_failures):
                self._skipped_steps[client] = self._skipped_steps.get(client, 0) + 1
                return None
            queue.popleft()
        return None

    def _make_way(self, client: str, sequence: SequenceState | None = None) -> bool:
        """Preempt a sequence of the client with the most, for a client that has less than a share.

        A share is an equal part for each client that waits or runs: of the running sequences, or
        of the pool's blocks where `sequence` lacks them. The youngest sequence is preempted.
        """
        if sequence is None:
            used, needed, total = Counter(s.client_id for s in self.running), 1, self.max_num_seqs
        else:
            used, total = self._blocks_by_client(), self.memory.pool.count
            needed = self._blocks_for(sequence)
        clients = used.keys() | {c for c, queue in self.waiting.items() if queue}
        share = max(1.0, total / len(clients))
        most = max(used, key=lambda c: used[c], default=client)
        if most == client or used[client] + needed > share or used[most] <= share:
            return False
        self.preempt(max((s for s in self.running if s.client_id == most), key=lambda s: s.seq_id))
        return True

    def _blocks_by_client(self) -> Counter[str]:
        blocks: Counter[str] = Counter()
        for sequence in self.running:
            blocks[sequence.client_id] += len(sequence.block_table)
        return blocks

    def _blocks_for(self, sequence: SequenceState) -> int:
        """Return the blocks of a sequence's present tokens."""
        return -(-len(sequence.token_ids) // self.cache.block_size)

    def _is_deferred(self, sequence: SequenceState) -> bool:
        """Return whether merged steps continue without it; with one admitted, others may follow."""
        if not self.running or not self.should_defer(sequence.adapter_spans):
            return False
        if any(self.should_defer(s.adapter_spans) for s in self.running):
            return False
        since = self._deferred_since.setdefault(sequence.seq_id, time.monotonic())
        return time.monotonic() - since < MAX_DEFER_SECONDS

    def _admit(self, sequence: SequenceState) -> bool:
        """Load its adapters and match its prefix; return False where it does not fit now."""
        self._pool_is_full = False
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
        except Exception as error:  # of any kind: it ends the requests of this adapter only
            self.load_failures.append((sequence, error))
        fits = self.memory.num_available_blocks >= self._blocks_for(sequence) or not self.running
        if len(loaded) < len(required) or not fits:
            self._pool_is_full = all(sequence is not failed for failed, _ in self.load_failures)
            for digest in loaded:
                self.memory.release(digest)
            return False
        self._match_prefix(sequence)
        sequence.status = SequenceStatus.RUNNING
        self.running.append(sequence)
        return True

    def _match_prefix(self, sequence: SequenceState) -> None:
        """Take over blocks of the prefix cache, but for the last token: its logits are needed.

        An embedding needs the hidden states of all tokens, which are not cached; log-probabilities
        of the prompt need its logits.
        """
        client = sequence.request.client
        full_blocks = (len(sequence.token_ids) - 1) // self.cache.block_size
        needs_all = sequence.request.is_embedding or sequence.is_scored
        end = 0 if needs_all else full_blocks
        nodes = self.memory.tree.match(sequence.block_keys(end))
        if not sequence.is_counted:  # what other clients have computed is not reported
            own = sum(1 for _ in takewhile(lambda node: client in node.clients, nodes))
            sequence.num_cached_tokens = own * self.cache.block_size
        for node in nodes:
            node.clients.add(client)
        sequence.prefix_nodes = nodes
        sequence.block_table = [node.page for node in nodes]
        sequence.num_computed_tokens = len(nodes) * self.cache.block_size

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
            node.clients.add(sequence.request.client)
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
