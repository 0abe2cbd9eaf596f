"""The scheduler: whatever arrives, is cancelled and fails, no slot is lost, nobody starves, every token is read once."""

from __future__ import annotations

import random

import numpy as np
import pytest

from danlu.serve.engines.torch.draft import Drafter
from danlu.serve.engines.torch.scheduler import FREE_TOKENS, Plan, Scheduler
from danlu.serve.engines.torch.sequence import Sequence
from danlu.serve.engines.torch.slots import Slots
from danlu.serve.generation import Generation


def sequence(name: str, tokens: list[int], max_tokens: int) -> Sequence:
    return Sequence(Generation(name, tuple(tokens)), list(tokens), max_tokens)


def scheduler(num_slots: int, budget: int, chunk: int, *, caching: bool = True) -> Scheduler:
    return Scheduler(Slots(num_slots, enable_prefix_caching=caching), max_num_batched_tokens=budget, prefill_chunk_tokens=chunk)


class Memory:
    """What a cache would hold: the tokens of each slot, as copies and steps write them."""

    def __init__(self, num_slots: int) -> None:
        self.rows: list[dict[int, int]] = [{} for _ in range(num_slots)]

    def run(self, plan: Plan) -> None:
        for copy in plan.copies:
            for position in range(copy.length):
                self.rows[copy.target][position] = self.rows[copy.source][position]
        for piece in plan.pieces:
            one = piece.sequence
            assert one.slot is not None
            assert piece.start == one.num_computed < piece.stop <= len(one.tokens)
            for position in range(piece.start, piece.stop):
                self.rows[one.slot][position] = one.tokens[position]
            # What attention will see: all of it, right up to the token itself.
            assert [self.rows[one.slot].get(i) for i in range(piece.stop)] == one.tokens[: piece.stop]
            one.num_computed = piece.stop


@pytest.mark.parametrize("seed", range(60))
def test_random_arrivals_and_cancellations_lose_no_slot_and_starve_nobody(seed: int) -> None:
    draw = random.Random(seed)
    num_slots, chunk = draw.randint(1, 6), draw.randint(1, 9)
    budget = num_slots + draw.randint(1, 20)
    made = scheduler(num_slots, budget, chunk, caching=draw.random() < 0.8)
    memory = Memory(num_slots)
    arriving = [
        sequence(str(i), [draw.randint(0, 1) for _ in range(draw.randint(1, 50))], draw.randint(1, 12)) for i in range(draw.randint(1, 40))
    ]
    admitted: list[Sequence] = []
    added: list[Sequence] = []
    ended: list[Sequence] = []
    steps = 0
    while arriving or not made.is_idle:
        while arriving and draw.random() < 0.5:
            added.append(arriving.pop())
            made.add(added[-1])
        for one in [*made.running, *made.waiting]:
            if draw.random() < 0.02:
                made.remove(one)
                ended.append(one)
        before = set(made.running)
        plan = made.plan()
        admitted += [one for one in made.running if one not in before]
        assert plan.num_tokens <= budget
        assert not made.running or plan.pieces, "there is always progress"
        decoding = [piece for piece in plan.pieces if piece.start >= piece.sequence.prompt_length]
        assert {id(p.sequence) for p in decoding} == {id(one) for one in made.running if one.is_decoding}, "everybody makes a token"
        if decoding:
            assert plan.num_tokens - len(decoding) <= chunk
        memory.run(plan)
        for piece in plan.pieces:
            one = piece.sequence
            if piece.is_last:
                one.tokens.append(draw.randint(0, 1))
                if one.num_made >= one.max_tokens:
                    made.remove(one)
                    ended.append(one)
        held = [one.slot for one in made.running]
        assert None not in held
        assert len(set(held)) == len(held)
        assert len(held) + len(made.slots.free) == num_slots
        steps += 1
        assert steps < 20_000
    assert len(made.slots.free) == num_slots
    assert len({id(one) for one in ended}) == len(ended) == len(added), "each ended once"
    order = {id(one): i for i, one in enumerate(added)}
    assert [order[id(one)] for one in admitted] == sorted(order[id(one)] for one in admitted), "first come, first served"


def test_removing_what_is_gone_is_no_mistake() -> None:
    made, one = scheduler(1, 4, 4), sequence("a", [1, 2], 1)
    made.add(one)
    made.remove(one)
    made.remove(one)
    assert made.is_idle
    assert not made.plan().pieces


def test_a_prompt_that_asks_for_its_probabilities_is_read_in_bites_and_never_from_the_cache() -> None:
    from danlu.serve.generation import Sampling

    made = scheduler(2, 100, 8)
    for name in "ab":
        made.add(Sequence(Generation(name, (1,) * 40, Sampling(prompt_logprobs=True)), [1] * 40, 1))
        seen = []
        while (plan := made.plan()).pieces:
            seen += [(piece.start, piece.stop) for piece in plan.pieces]
            for piece in plan.pieces:
                piece.sequence.num_computed = piece.stop
            if seen[-1][1] == 40:
                made.remove(plan.pieces[0].sequence)
        assert seen == [(i, i + 8) for i in range(0, 40, 8)]


def test_the_longest_unused_slot_goes_first_and_the_longest_prefix_wins() -> None:
    slots = Slots(3, enable_prefix_caching=True)
    first, second, third = (sequence(str(i), [i] * 20 + list(range(40)), 1) for i in range(3))
    for one in (first, second, third):
        slots.take(one)
        one.num_computed = 60
    for one in (second, first, third):
        slots.give_back(one)
    kept = sequence("kept", [0] * 20 + list(range(30)), 1)
    assert slots.take(kept) is None, "most of what lay there goes on: taken as it is"
    assert (kept.slot, kept.num_cached) == (0, 49), "the last token is always read"
    other = sequence("other", [2] * 18 + [7], 1)
    copy = slots.take(other)
    assert copy is not None
    assert (copy.source, copy.target, copy.length) == (2, 1, 18), "a small part is copied, into the slot that nobody used for longest"


def test_another_adapters_prefix_is_another_prefix() -> None:
    slots = Slots(2, enable_prefix_caching=True)
    base, tuned = sequence("base", [1] * 40, 1), sequence("tuned", [1] * 40, 1)
    tuned.key = ("lora", 1)
    slots.take(base)
    base.num_computed = 40
    slots.give_back(base)
    slots.take(tuned)
    assert tuned.num_cached == 0
    tuned.num_computed = 40
    slots.give_back(tuned)
    again = sequence("again", [1] * 40, 1)
    again.key = ("lora", 1)
    slots.take(again)
    assert again.num_cached == 39
    slots.give_back(again)
    slots.forget(("lora", 1))
    assert all(key != ("lora", 1) for key, _ in slots.left.values())
    assert np.array_equal(again.prompt, np.ones(40))


def test_a_guess_is_what_followed_the_same_tokens_the_last_time() -> None:
    drafter, tokens = Drafter(), [1, 2, 3, 9, 5, 2, 3, 7, 8, 1, 2, 3]
    assert list(drafter.guess(tokens, 4)) == [9, 5, 2, 3], "after 1 2 3, and not after 2 3, which came later"
    assert list(drafter.guess([*tokens, 7], 4)) == [8, 1, 2, 3]
    assert list(drafter.guess([*tokens, 7, 30], 4)) == []
    assert list(drafter.guess([*tokens, 7, 30, 2, 3], 9)) == [7, 30, 2, 3], "no more than there is"
    for length in range(3):
        assert list(Drafter().guess(tokens[:length], 4)) == []


def test_wrong_guesses_make_a_drafter_quiet_and_a_right_one_makes_it_talk() -> None:
    drafter, tokens, guessed = Drafter(), [1, 2] * 4, []
    for _ in range(20):
        if drafter.guess(tokens, 2):
            drafter.judge(tokens, 0)
            guessed.append(len(tokens))
        tokens += [1, 2]
    assert guessed == [8, 10, 12, 16, 24, 40], "it waits for 1, 2, 4, 8, 16 tokens"
    tokens += [1, 2] * 16
    assert list(drafter.guess(tokens, 2)) == [1, 2]
    drafter.judge(tokens, 1)
    assert list(drafter.guess(tokens, 2)) == [1, 2]


def test_guesses_fill_a_small_step_only_and_no_slot_beyond_its_answer() -> None:
    for number in range(1, 16):
        made = Scheduler(
            Slots(16, enable_prefix_caching=False), max_num_batched_tokens=512, prefill_chunk_tokens=64, num_speculative_tokens=4
        )
        for i in range(number):
            made.add(sequence(str(i), list(range(1, 7)) * 3, 3 if i == 0 else 50))
        for piece in made.plan().pieces:
            piece.sequence.num_computed = piece.stop
            piece.sequence.tokens.append(1)
        plan = made.plan()
        most = min(4, FREE_TOKENS // number - 1)
        drafts = {piece.sequence.generation.request_id: piece.draft for piece in plan.pieces}
        assert {one: len(draft) for one, draft in drafts.items()} == {
            str(i): max(0, min(most, 1) if i == 0 else most) for i in range(number)
        }
        assert plan.num_tokens <= max(FREE_TOKENS, number)
