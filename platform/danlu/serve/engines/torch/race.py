"""How fast two bundles' models make tokens in this engine, in turns: what a smaller version is for."""

from __future__ import annotations

import time

import torch

from danlu.artifact.bundle import Bundle
from danlu.evaluate.score import Race
from danlu.serve.engines.torch.attention import make_batch
from danlu.serve.engines.torch.runner import Runner, make_runner
from danlu.serve.engines.torch.scheduler import Piece
from danlu.serve.engines.torch.sequence import Sequence
from danlu.serve.generation import Generation
from danlu.spec.serve import Torch

NUM_TOKENS = 24


def decode_race(original: Bundle, compressed: Bundle, *, runs: int = 5) -> Race:
    """One answer's tokens, each of which reads all weights, by the engine as it serves by default; on this thread's threads."""
    spec = Torch(num_threads=torch.get_num_threads(), max_num_seqs=1)
    runners = [make_runner(spec, bundle) for bundle in (original, compressed)]
    for runner in runners:
        _decode(runner)
    seconds = [tuple(_decode(runner) for runner in runners) for _ in range(runs)]
    return Race("tokens a second", NUM_TOKENS, [(one, other) for one, other in seconds])


@torch.inference_mode()
def _decode(runner: Runner) -> float:
    ids = [0]
    sequence = Sequence(Generation("race", (0,)), ids, NUM_TOKENS)
    sequence.slot = 0
    room = min(NUM_TOKENS, runner.cache.max_model_len - 1)
    began = time.perf_counter()
    for i in range(NUM_TOKENS):
        at = i % room  # a model of few positions begins again
        logits = runner.forward(make_batch([Piece(sequence, at, at + 1)], device=runner.device), runner.cache)
        ids[at + 1 :] = [int(logits[-1].argmax())]
    return time.perf_counter() - began
