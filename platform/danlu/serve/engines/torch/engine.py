"""The engine: a thread that runs step after step, and the coroutines that ask it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from collections.abc import Sequence as Several

import torch

from danlu.artifact.bundle import Bundle
from danlu.errors import ModelError, RequestError, ResourceError
from danlu.metrics import catalog
from danlu.metrics.catalog import Metric
from danlu.serve.engines.torch.attention import make_batch, num_wanted
from danlu.serve.engines.torch.command import Command
from danlu.serve.engines.torch.draft import look_up
from danlu.serve.engines.torch.lora import Adapter, read_adapter
from danlu.serve.engines.torch.requests import Reader
from danlu.serve.engines.torch.runner import Runner, make_runner
from danlu.serve.engines.torch.sampler import Chooser, Chosen, choose
from danlu.serve.engines.torch.scheduler import Piece, Scheduler
from danlu.serve.engines.torch.sequence import Key, Sequence, Stream, deliver, joined
from danlu.serve.engines.torch.slots import Slots
from danlu.serve.engines.torch.told import prompt_logprobs, told
from danlu.serve.engines.watchdog import Watchdog
from danlu.serve.generation import Delta, FinishReason, Generation, Prompt, Usage
from danlu.spec.serve import Torch

log = logging.getLogger(__name__)

Outbox = list[tuple[Stream | None, Delta | Exception]]


class TorchEngine:
    """A TextEngine. `scheduler`, `runner` and arrived sequences are its thread's; what both sides touch is his who holds `wake`."""

    def __init__(self, spec: Torch, bundle: Bundle | None = None, *, storage: str = "runs") -> None:
        self.spec, self.bundle, self.storage = spec, bundle, storage
        self.max_model_len = 0
        self.arrivals: deque[Sequence] = deque()
        self.wake = threading.Condition()
        self.stopping, self.ended = False, False
        self.failure: BaseException | None = None
        self.thread: threading.Thread | None = None
        self.watchdog = Watchdog(spec.step_timeout_s)
        self.watching: asyncio.Task[None] | None = None
        self.commands: list[Command] = []
        self.keys: dict[str, Key] = {}
        """Name of an adapter -> what its keys and values go by. Written on the engine's thread, but for a name that is to go."""
        self.num_loaded = 0
        self.guessed, self.guessed_right = 0, 0

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        started: asyncio.Future[None] = loop.create_future()
        self.thread = threading.Thread(target=self._run, args=(loop, started), name="danlu-engine", daemon=True)
        self.thread.start()
        await started
        self.watching = loop.create_task(self.watchdog.watch(self._end))

    async def generate(self, generation: Generation) -> AsyncGenerator[Delta]:
        self.check_health()
        if generation.guide is not None:
            # A grammar takes milliseconds, sometimes a second: the event loop has others to serve.
            sequence = await asyncio.to_thread(self._sequence, generation)
        else:
            sequence = self._sequence(generation)
        sequence.stream = Stream(asyncio.get_running_loop())
        with self.wake:
            self.check_health()
            self._not_stopping()
            self.arrivals.append(sequence)
            self.wake.notify()
        finished = False
        try:
            while not finished:
                delta = await sequence.stream.next()
                finished = delta.finish_reason is not None
                yield delta
        finally:
            if not finished:
                with self.wake:
                    sequence.cancelled = True
                    self.wake.notify()

    def tokenize(self, prompt: Prompt) -> list[int]:
        return self._reader().tokenize(prompt)

    def detokenize(self, token_ids: Several[int]) -> str:
        return self._reader().detokenize(token_ids)

    async def load_adapter(self, name: str, source: str, *, in_place: bool = False) -> None:
        self.check_health()
        adapter = await asyncio.to_thread(self._read_adapter, name, source)
        old = self.keys.get(name) if in_place else None
        await self._on_engine(lambda: self._install(name, adapter, instead_of=old))
        if old is not None:
            await self._on_engine(lambda: self._remove(old))

    async def unload_adapter(self, name: str) -> None:
        self.check_health()
        key = self.keys.pop(name, None)  # from now on nobody is answered by it who has not begun
        if key is None:
            raise ModelError(f"there is no adapter {name!r}", where=name, fix=f"one of {self.adapters()}")
        await self._on_engine(lambda: self._remove(key))

    def adapters(self) -> list[str]:
        return list(self.keys)

    def stats(self) -> Mapping[Metric, float]:
        if not hasattr(self, "scheduler"):
            return {}
        slots = self.scheduler.slots
        return {
            catalog.SERVE_RUNNING: len(self.scheduler.running),
            catalog.SERVE_WAITING: len(self.scheduler.waiting) + len(self.arrivals),
            catalog.SERVE_CACHE_USE: slots.usage,
            catalog.SERVE_PREFIX_QUERIED: slots.queried,
            catalog.SERVE_PREFIX_HIT: slots.hit,
            catalog.SERVE_DRAFTED: self.guessed,
            catalog.SERVE_DRAFTED_RIGHT: self.guessed_right,
            catalog.SERVE_KERNELS: self.runner.tier == "compiled kernels",
        }

    def check_health(self) -> None:
        if self.failure is not None:
            raise ResourceError(f"the engine has failed: {self.failure!r}")
        if self.thread is None or self.ended or not self.thread.is_alive():
            raise ResourceError("the engine is not running")
        self.watchdog.check()

    async def stop(self) -> None:
        with self.wake:
            self.stopping = True
            self.wake.notify()
        if self.thread is not None and not self.watchdog.is_stuck:
            await asyncio.to_thread(self.thread.join)
        if self.watching is not None:
            self.watching.cancel()

    # On the event loop:

    def _reader(self) -> Reader:
        self.check_health()
        return self.reader

    def _sequence(self, generation: Generation) -> Sequence:
        key: Key = None
        if generation.adapter is not None:
            key = self.keys.get(generation.adapter)
            if key is None:
                raise _unknown(generation.adapter)
        return self.reader.sequence(generation, key)

    def _read_adapter(self, name: str, source: str) -> Adapter:
        """Files, which take longer than a step: not between two of them."""
        own = self.runner.adapters
        return read_adapter(source, name, self.storage, self.bundle, dtype=own.dtype, device=own.device)

    async def _on_engine(self, run: Callable[[], bool]) -> None:
        """Run between two steps, again and again until it returns True."""
        loop = asyncio.get_running_loop()
        command = Command(run, loop, loop.create_future())
        with self.wake:
            self.check_health()
            self.commands.append(command)
            self.wake.notify()
        await command.done

    def _not_stopping(self) -> None:
        if self.stopping:
            raise ResourceError("the engine is stopping")

    # On the engine's thread:

    def _run(self, loop: asyncio.AbstractEventLoop, started: asyncio.Future[None]) -> None:
        try:
            torch.set_num_threads(self.spec.num_threads)
            with torch.inference_mode():
                self._start()
        except BaseException as error:  # noqa: BLE001  # whatever it is belongs to whoever waits for the start
            self._end(error)
            loop.call_soon_threadsafe(started.set_exception, error)
            return
        loop.call_soon_threadsafe(started.set_result, None)
        try:
            with torch.inference_mode():
                self._serve()
        except BaseException as error:  # whatever it is, everybody has to hear of it
            log.exception("the engine has failed")
            self._end(error)
        self._end(None)

    def _start(self) -> None:
        runner: Runner = make_runner(self.spec, self.bundle)
        self.runner, self.reader, self.cache = runner, runner.reader, runner.cache
        self.max_model_len = runner.cache.max_model_len
        slots = Slots(runner.cache.num_slots, enable_prefix_caching=self.spec.enable_prefix_caching)
        self.scheduler = Scheduler(
            slots,
            max_num_batched_tokens=self.spec.max_num_batched_tokens,
            prefill_chunk_tokens=self.spec.prefill_chunk_tokens,
            num_speculative_tokens=self.spec.num_speculative_tokens,
            guess=look_up if runner.draft is None else runner.draft.guess,
        )
        for name, source in self.spec.adapters.items():
            self._install(name, self._read_adapter(name, source))

    def _serve(self) -> None:
        while self._wait_for_work():
            self._step()

    def _wait_for_work(self) -> bool:
        """Take what has arrived, let go what nobody waits for, run commands; False when it is time to end."""
        while not self.ended:
            with self.wake:
                self._take_arrivals()
                commands, self.commands = self.commands, []
                if not commands:
                    if not self.scheduler.is_idle:
                        return True
                    if self.stopping:
                        return False
                    self.wake.wait()
                    continue
            waiting = [command for command in commands if not command.has_run()]
            with self.wake:
                self.commands = waiting + self.commands
            if not self.scheduler.is_idle:
                return True
        return False

    def _take_arrivals(self) -> None:
        while self.arrivals:
            sequence = self.arrivals.popleft()
            if sequence.key is not None and sequence.key not in self.runner.adapters.loaded:
                deliver([(sequence.stream, _unknown(sequence.key[0]))])  # it went while the request was read
            elif not sequence.cancelled:
                self.scheduler.add(sequence)
        for sequence in [one for one in (*self.scheduler.running, *self.scheduler.waiting) if one.cancelled]:
            self.scheduler.remove(sequence)

    def _install(self, name: str, adapter: Adapter, instead_of: Key = None) -> bool:
        if self.keys.get(name) != instead_of:
            raise ModelError(f"the adapter {name!r} is loaded already", where=name, fix="unload it first, or another name")
        self.runner.adapters.check(adapter, name)
        if instead_of is not None:
            self._remove(instead_of)  # its room is the new one's, unless sequences still use it
        self.num_loaded += 1
        key = (name, self.num_loaded)
        for gone in self.runner.adapters.add(key, adapter, self._keys_in_use()):
            self.scheduler.slots.forget(gone)
            if gone is not None and self.keys.get(gone[0]) == gone:
                del self.keys[gone[0]]
        self.keys[name] = key
        return True

    def _remove(self, key: Key) -> bool:
        if key in self._keys_in_use():
            return False
        if key in self.runner.adapters.loaded:
            self.runner.adapters.remove(key)
            self.scheduler.slots.forget(key)
        return True

    def _keys_in_use(self) -> set[Key]:
        return {one.key for one in (*self.scheduler.running, *self.scheduler.waiting)}

    def _step(self) -> None:
        """One forward over the plan's tokens, a token for each sequence that was read to its end, and one wake-up of the event loop."""
        self.watchdog.begin()
        plan = self.scheduler.plan()
        self.cache.copy(plan.copies)
        if self.runner.draft is not None:
            self.runner.draft.copy(plan.copies)
        self.runner.adapters.begin([(piece.sequence.key, piece.num_tokens) for piece in plan.pieces])
        logits = self.runner.forward(make_batch(plan.pieces, device=self.runner.device), self.cache)
        outbox = self._after(plan.pieces, logits)
        self.watchdog.end()
        if not self.ended:  # else the watchdog has told everybody already
            deliver(outbox)

    def _after(self, pieces: list[Piece], logits: torch.Tensor) -> Outbox:
        last: list[tuple[Piece, int]] = []
        only_read: Outbox = []
        row = 0
        for piece in pieces:
            sequence, rows = piece.sequence, num_wanted(piece)
            sequence.num_computed = piece.stop
            if rows and piece.start < sequence.prompt_length and sequence.generation.sampling.prompt_logprobs:
                sequence.prompt_logprobs += prompt_logprobs(self.reader, piece, logits[row : row + rows])
            row += rows
            if piece.is_last and sequence.max_tokens == 0:
                self.scheduler.remove(sequence)
                usage = Usage(sequence.prompt_length, sequence.num_cached, 0)
                only_read.append((sequence.stream, Delta("", (), (), tuple(sequence.prompt_logprobs), "length", usage, sequence.begun)))
            elif piece.is_last:
                last.append((piece, row - 1 - len(piece.draft)))
        return only_read + self._made(last, logits)

    def _made(self, pieces: list[tuple[Piece, int]], logits: torch.Tensor) -> Outbox:
        """Of each piece, whose logits begin at a row: a token more, and another one for each token that was guessed right; or an error,
        where a guide goes no further."""
        made: list[list[Delta]] = [[] for _ in pieces]
        failed: Outbox = []
        going = list(range(len(pieces)))
        turn = 0
        while going:
            rows = [pieces[i][1] + turn for i in going]
            every = logits if len(rows) == len(logits) else logits[rows]
            following = []
            chosen = choose(every, [_chooser(pieces[i][0].sequence) for i in going])
            for i, one in zip(going, chosen, strict=True):
                sequence, draft = pieces[i][0].sequence, pieces[i][0].draft
                is_right = turn < len(draft) and one.token_id == draft[turn]
                sequence.num_computed += is_right  # before the sequence may end and leave its slot to the prefix cache
                try:
                    made[i].append(self._add(sequence, one))
                except RequestError as error:
                    self.scheduler.remove(sequence)
                    failed.append((sequence.stream, error))
                    continue
                if is_right and made[i][-1].finish_reason is None:
                    following.append(i)
                elif draft:
                    self._judge(sequence, len(draft), turn + is_right)
            going, turn = following, turn + 1
        return [(piece.sequence.stream, joined(deltas)) for (piece, _), deltas in zip(pieces, made, strict=True) if deltas] + failed

    def _judge(self, sequence: Sequence, guessed: int, right: int) -> None:
        sequence.drafter.judge(sequence.tokens, right)
        self.guessed += guessed
        self.guessed_right += right

    def _add(self, sequence: Sequence, chosen: Chosen) -> Delta:
        """A token more: its text, and the end if it is one."""
        sampling, text, chooser = sequence.generation.sampling, sequence.text, _chooser(sequence)
        assert text is not None
        sequence.tokens.append(chosen.token_id)
        chooser.add(chosen.token_id)
        is_first = sequence.num_made == 1
        finish: FinishReason | None = None
        piece = ""
        ends = chosen.token_id in sampling.stop_token_ids or (chosen.token_id in self.reader.end_ids and not sampling.ignore_eos)
        if ends:
            finish = "stop"
        else:
            piece = text.add(chosen.token_id, watch=sequence.num_made >= sampling.min_tokens)
            if text.stopped or (chooser.matcher is not None and chooser.matcher.is_complete):
                finish = "stop"
            elif sequence.num_made >= sequence.max_tokens:
                finish = "length"
        usage = None
        if finish is not None:
            piece += text.finish()
            usage = Usage(sequence.prompt_length, sequence.num_cached, sequence.num_made)
            self.scheduler.remove(sequence)
        probable = (told(self.reader, chosen),) if chosen.logprob is not None else ()
        read, begun = (tuple(sequence.prompt_logprobs), sequence.begun) if is_first else ((), None)
        return Delta(piece, (chosen.token_id,), probable, read, finish, usage, begun)

    def _end(self, failure: BaseException | None) -> None:
        """Take no more; whoever still waits gets an error."""
        with self.wake:
            if self.ended:
                return
            self.ended, self.failure = True, failure
            left = list(self.arrivals)
            if hasattr(self, "scheduler"):
                left += [*self.scheduler.running, *self.scheduler.waiting]
            commands, self.commands = self.commands, []
            self.arrivals.clear()
        why = "the engine is not running" if failure is None else f"the engine has failed: {failure!r}"
        deliver([(sequence.stream, ResourceError(why)) for sequence in left])
        for command in commands:
            command.fail(ResourceError(why))


def _unknown(adapter: str) -> RequestError:
    return RequestError(f"there is no adapter {adapter!r}", status=404, kind="not_found_error", param="model")


def _chooser(sequence: Sequence) -> Chooser:
    assert sequence.chooser is not None
    return sequence.chooser
