"""How tokens are chosen, against exact distributions, a plain forward, formulas by hand; and their text, against the tokenizer's."""

from __future__ import annotations

import asyncio
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import torch
from lm import CORPUS, VOCABULARY, ask, engine, greedy, ids_of, prompts, reference, text_of, with_engine, write_byte_tokenizer, write_family
from scipy.stats import chisquare
from transformers import AutoTokenizer
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from danlu.errors import RequestError
from danlu.metrics import catalog
from danlu.serve.engines.torch.engine import TorchEngine
from danlu.serve.engines.torch.sampler import Chooser, choose
from danlu.serve.engines.torch.text import TextMaker
from danlu.serve.generation import Guide, Sampling

GREEDY = Sampling(max_tokens=24, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("qwen3"), "qwen3")


def drawn(logits: torch.Tensor, sampling: Sampling, number: int) -> torch.Tensor:
    """How often each token came, in one batch of rows with seeds of their own."""
    choosers = [Chooser(replace(sampling, seed=seed), [], []) for seed in range(number)]
    found = choose(logits.repeat(number, 1), choosers)
    return torch.bincount(torch.tensor([one.token_id for one in found]), minlength=len(logits))


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.05},
        {"temperature": 1.5, "top_k": 100, "top_p": 0.8},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.01},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [40, 1300])
def test_tokens_are_drawn_by_their_exact_probabilities(how: dict[str, float], size: int) -> None:
    """transformers' own processors say what is exact."""
    logits = torch.randn(size, generator=torch.Generator().manual_seed(0)) * 2
    sampling = Sampling(**how)  # type: ignore[arg-type]
    steps = LogitsProcessorList()
    steps.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.min_p:
        steps.append(MinPLogitsWarper(sampling.min_p))
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    exact = steps(torch.zeros(1, 1), logits[None].double())[0].softmax(-1)
    number = 4000
    counts = drawn(logits, sampling, number)
    assert counts[exact == 0].sum() == 0
    # Chi-square needs a few expected draws in each cell: the rare ones are counted together.
    often = exact * number >= 5
    observed = [*counts[often].tolist(), int(counts[~often].sum())]
    expected = [*(exact[often] * number).tolist(), float(exact[~often].sum() * number)]
    if expected[-1] < 1e-9:
        observed, expected = observed[:-1], expected[:-1]
    assert chisquare(observed, expected).pvalue > 1e-3


def test_draws_follow_the_whole_distribution_of_a_large_vocabulary() -> None:
    """Flat probabilities over many blocks: a token of the first and one of the last block are as likely."""
    counts = drawn(torch.zeros(5000), Sampling(), 3000)
    by_tenth = counts.view(10, 500).sum(1).tolist()
    assert chisquare(by_tenth).pvalue > 1e-3


def test_a_seed_gives_the_same_tokens_alone_and_in_company(folder: Path) -> None:
    how = Sampling(max_tokens=20, temperature=0.9, top_p=0.95, seed=7, ignore_eos=True)

    async def body(made: TorchEngine) -> None:
        alone = ids_of(await ask(made, (7, 8, 9), how))
        others = [ask(made, prompt, replace(how, seed=i, top_k=i)) for i, prompt in enumerate(prompts(6, 30))]
        *_, again = await asyncio.gather(*others, ask(made, (7, 8, 9), how))
        assert ids_of(again) == alone
        assert ids_of(await ask(made, (7, 8, 9), replace(how, seed=8))) != alone
        unseeded = [tuple(ids_of(await ask(made, (7, 8, 9), replace(how, seed=None)))) for _ in range(2)]
        assert unseeded[0] != unseeded[1]

    with_engine(engine(folder), body)


def test_log_probabilities_are_those_of_a_plain_forward(folder: Path) -> None:
    """Before temperature and penalties, of prompt and answer alike, whatever else is in the batch."""
    model = reference(folder)
    asked = prompts(3, 40, seed=2)
    how = Sampling(max_tokens=10, temperature=0.8, seed=1, logprobs=3, prompt_logprobs=True, repetition_penalty=1.3, ignore_eos=True)

    async def body(made: TorchEngine) -> None:
        answers = await asyncio.gather(*(ask(made, prompt, how) for prompt in asked), ask(made, asked[0], GREEDY))
        for prompt, deltas in zip(asked, answers[:3], strict=True):
            told = [*deltas[0].prompt_logprobs, *(one for delta in deltas for one in delta.logprobs)]
            ids = [*prompt, *ids_of(deltas)]
            assert [one.token_id for one in told] == ids
            with torch.no_grad():
                exact = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            assert told[0].logprob is None
            for position, one in enumerate(told[1:]):
                assert one.logprob == pytest.approx(float(exact[position, one.token_id]), abs=2e-4)
                best = exact[position].topk(3)
                assert [token for token, _, _ in one.top] == best.indices.tolist()
                assert [value for _, _, value in one.top] == pytest.approx(best.values.tolist(), abs=2e-4)
            assert not any(delta.prompt_logprobs for delta in deltas[1:])
        (only,) = await ask(made, asked[0], replace(how, max_tokens=0))
        assert (only.token_ids, only.finish_reason) == ((), "length")
        assert [one.token_id for one in only.prompt_logprobs] == list(asked[0])

    with_engine(engine(folder, max_num_seqs=4, max_num_batched_tokens=24, prefill_chunk_tokens=6), body)


def test_penalties_bias_and_minimum_are_openais_and_vllms() -> None:
    """By hand, token for token; the formulas are those of OpenAI's reference and of the CTRL paper."""
    draw = random.Random(0)
    generator = torch.Generator().manual_seed(1)
    cases = []
    for _ in range(20):
        prompt = [draw.randrange(12) for _ in range(draw.randint(1, 80))]
        how = Sampling(
            temperature=0.0,
            presence_penalty=draw.choice([0.0, 0.7]),
            frequency_penalty=draw.choice([0.0, -0.4]),
            repetition_penalty=draw.choice([1.0, 1.4]),
            logit_bias=draw.choice([{}, {3: -100.0, 4: 2.0}]),
            min_tokens=draw.choice([0, 4]),
        )
        chooser = Chooser(how, prompt, [5])
        made: list[int] = []
        for _ in range(draw.randint(0, 6)):
            made.append(draw.randrange(12))
            chooser.add(made[-1])
        cases.append((how, chooser, prompt, made))
    logits = torch.randn(len(cases), 12, generator=generator)
    found = choose(logits.clone(), [chooser for _, chooser, _, _ in cases])
    for row, (how, _, prompt, made), one in zip(logits, cases, found, strict=True):
        values = row.tolist()
        for token in range(12):
            if token == 5 and len(made) < how.min_tokens:
                values[token] = float("-inf")
            values[token] += how.logit_bias.get(token, 0.0)
            if token in prompt or token in made:
                values[token] *= how.repetition_penalty if values[token] < 0 else 1 / how.repetition_penalty
            values[token] -= how.frequency_penalty * made.count(token) + how.presence_penalty * (token in made)
        assert one.token_id == max(range(12), key=values.__getitem__)


def test_penalties_count_more_distinct_tokens_than_there_was_room_for() -> None:
    """A long answer to a short prompt."""
    how = Sampling(temperature=0.0, frequency_penalty=0.5, presence_penalty=0.25, repetition_penalty=2.0)
    chooser = Chooser(how, [0, 1], [])
    made = [token for token in range(1, 300) for _ in range(1 + token % 3)]
    for token in made:
        chooser.add(token)
    logits = torch.linspace(-1, 1, VOCABULARY)[None]
    counts = torch.bincount(torch.tensor(made), minlength=VOCABULARY)
    seen = (torch.arange(VOCABULARY) < 300)[None]
    expected = torch.where(seen, torch.where(logits > 0, logits / 2, logits * 2), logits) - 0.5 * counts - 0.25 * (counts > 0)
    choose(logits, [chooser])  # in place
    torch.testing.assert_close(logits, expected)


def test_an_odd_penalty_harms_nobody(folder: Path) -> None:
    """Its numbers leave float32 on the way, and NaN or infinity in logits is what the engine ends for."""

    async def body(made: TorchEngine) -> None:
        prompt = tuple(range(5, 40))
        odd = [replace(GREEDY, repetition_penalty=how) for how in (0.01, 100.0)]
        odd += [replace(one, temperature=1.0, seed=1, logit_bias={7: 100.0, 8: -100.0}) for one in odd]
        guides = [None, None, Guide("regex", "[a-c]{30}"), Guide("regex", "[a-c]{30}")]
        for deltas in await asyncio.gather(*(ask(made, prompt, how, guide=guide) for how, guide in zip(odd, guides, strict=True))):
            assert ids_of(deltas)
        for wrong in (1e-308, 1e300):
            with pytest.raises(RequestError, match="repetition_penalty"):
                await ask(made, prompt, replace(GREEDY, repetition_penalty=wrong))
        made.check_health()

    with_engine(engine(folder), body)


def test_a_stop_text_ends_the_answer_before_it_however_the_tokens_cut_it(folder: Path) -> None:
    async def body(made: TorchEngine) -> None:
        whole = text_of(await ask(made, (7, 8, 9), GREEDY))
        for begin in range(0, len(whole) - 6, 3):
            stop = whole[begin : begin + 6]
            deltas = await ask(made, (7, 8, 9), replace(GREEDY, stop=("nosuchtext", stop)))
            assert text_of(deltas) == whole[: whole.index(stop)]
            assert deltas[-1].finish_reason == "stop"
        nearly = whole[-3:] + "nosuchtext"  # held back to the end, then given
        assert text_of(await ask(made, (7, 8, 9), replace(GREEDY, stop=(nearly,)))) == whole
        late = await ask(made, (7, 8, 9), replace(GREEDY, stop=(whole[0],), min_tokens=24))
        assert text_of(late) in (whole, whole[: whole.rindex(whole[0])])

    with_engine(engine(folder), body)


def test_a_stop_token_ends_the_answer(folder: Path) -> None:
    async def body(made: TorchEngine) -> None:
        ids = greedy(reference(folder), (7, 8, 9), 24)
        deltas = await ask(made, (7, 8, 9), replace(GREEDY, stop_token_ids=(ids[10],)))
        assert ids_of(deltas) == ids[: ids.index(ids[10]) + 1]
        assert deltas[-1].finish_reason == "stop"
        assert text_of(deltas) == made.detokenize([7, 8, 9, *ids[: ids.index(ids[10])]])[len(made.detokenize([7, 8, 9])) :]

    with_engine(engine(folder), body)


def test_text_comes_in_whole_characters(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*CORPUS, "混合 text 和 emoji 👩‍👩‍👧‍👦🏽 é\u0301 \U0001f1e8\U0001f1f3 ok", "𠮷野家 ﷽ ‮x‬"]:
        ids = tokenizer(text)["input_ids"]
        for cut in (0, 3):
            maker = TextMaker(tokenizer, ids[:cut], ())
            pieces = [maker.add(token) for token in ids[cut:]] + [maker.finish()]
            assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces[:-1]) or cut
            if not cut:
                assert "".join(pieces) == text
    broken = [token for token in range(5, 261) if "\N{REPLACEMENT CHARACTER}" in tokenizer.decode([token])][:40]
    maker = TextMaker(tokenizer, [], ())
    pieces = [maker.add(token) for token in broken]
    assert any(pieces), "bytes that never become a character are not held for ever"
    assert len("".join(pieces) + maker.finish()) >= len(broken) // 4


SCHEMA = {
    "type": "object",
    "properties": {"g": {"enum": ["a", "b"]}, "n": {"type": "integer", "maximum": 99, "minimum": 0}},
    "required": ["g", "n"],
    "additionalProperties": False,
}
GUIDES = [Guide("choice", '["wheat", "小麦 \\"🌾\\""]'), Guide("regex", "[a-c]{3}-(ja|nein)"), Guide("json_schema", json.dumps(SCHEMA))]


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.kind)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_matches_its_guide_beside_others_that_have_none(folder: Path, guide: Guide, temperature: float) -> None:
    async def body(made: TorchEngine) -> None:
        how = Sampling(max_tokens=60, temperature=temperature, seed=1)
        guided, free = await asyncio.gather(ask(made, (7, 8, 9), how, guide=guide), ask(made, (7, 8, 9), GREEDY))
        text = text_of(guided)
        match guide.kind:
            case "choice":
                assert text in json.loads(guide.pattern)
            case "regex":
                assert re.fullmatch(guide.pattern, text)
            case _:
                jsonschema.validate(json.loads(text), json.loads(guide.pattern))
        assert guided[-1].finish_reason == "stop"
        assert ids_of(free) == greedy(reference(folder), (7, 8, 9), 24)

    with_engine(engine(folder), body)


def test_json_objects_of_every_shape_are_json_objects(folder: Path) -> None:
    """A random model seldom closes what it has opened: biased towards the marks of JSON it does, in many ways."""
    marks = AutoTokenizer.from_pretrained(folder)('"}]:,[{')["input_ids"]

    async def body(made: TorchEngine) -> None:
        how = [Sampling(max_tokens=100, logit_bias=dict.fromkeys(marks, 5.0), seed=seed) for seed in range(24)]
        answers = await asyncio.gather(*(ask(made, (7, 8, 9), one, guide=Guide("json_object")) for one in how))
        found = [json.loads(text_of(deltas)) for deltas in answers if deltas[-1].finish_reason == "stop"]
        assert all(isinstance(one, dict) for one in found)
        assert len({json.dumps(one) for one in found}) > 5
        assert any(isinstance(value, dict | list) and value for one in found for value in one.values()), "nested ones too"
        assert all(text_of(deltas).startswith("{") for deltas in answers)

    with_engine(engine(folder), body)


def test_a_guide_that_does_not_compile_is_refused(folder: Path) -> None:
    async def body(made: TorchEngine) -> None:
        for guide in (Guide("json_schema", '{"type": "nosuch"}'), Guide("json_schema", "{"), Guide("regex", "("), Guide("choice", "[]")):
            with pytest.raises(RequestError, match=guide.kind):
                await ask(made, (7, 8), GREEDY, guide=guide)
        with pytest.raises(RequestError, match="min_tokens"):
            await ask(made, (7, 8), replace(GREEDY, min_tokens=3), guide=Guide("regex", "a"))
        assert ids_of(await ask(made, (7, 8), GREEDY))

    with_engine(engine(folder), body)


UNCLEAR = {
    "look-ahead": (Guide("regex", "(?=a)b"), "look-around, .* is not supported"),
    "of a schema": (Guide("json_schema", '{"type": "string", "pattern": "("}'), "unclosed group"),
    "nothing": (Guide("regex", r"[^\s\S]"), "no text that matches"),
    "oneOf": (Guide("json_schema", '{"oneOf": [{"type": "integer"}, {"type": "number"}]}'), "anyOf allows it"),
}
"""Guides of which the library's first line does not say what is wrong."""


def test_a_refusal_says_what_is_wrong_with_a_guide(folder: Path) -> None:
    async def body(made: TorchEngine) -> None:
        for guide, why in UNCLEAR.values():
            with pytest.raises(RequestError, match=why):
                await ask(made, (7, 8), GREEDY, guide=guide)

    with_engine(engine(folder), body)


def test_thousands_of_choices_are_no_more_than_a_few(folder: Path) -> None:
    choices = ["w", "wh", *(f"wh{i}" for i in range(5000))]

    async def body(made: TorchEngine) -> None:
        guide = Guide("choice", json.dumps(choices))
        asked = (ask(made, (7, 8), Sampling(max_tokens=24, temperature=2.0, seed=seed), guide=guide) for seed in range(16))
        answers = {text_of(deltas) for deltas in await asyncio.gather(*asked)}
        assert answers <= set(choices)
        assert len(answers) > 2
        assert answers & {"w", "wh"}, "that others begin with"

    with_engine(engine(folder), body)


TOO_MUCH = {
    "regex": Guide("regex", "(a?){500}a{500}", "guided_regex"),
    "json_schema": Guide("json_schema", json.dumps({"type": "object", "properties": {f"k{i}": {"type": "integer"} for i in range(2000)}})),
}
"""They compile, and the parser gives up at their first token."""


@pytest.mark.parametrize("kind", TOO_MUCH)
def test_a_guide_that_is_too_much_for_the_parser_fails_its_own_request_and_no_other(kind: str, folder: Path) -> None:
    async def body(made: TorchEngine) -> None:
        guided, free = await asyncio.gather(
            ask(made, (7, 8, 9), GREEDY, guide=TOO_MUCH[kind]), ask(made, (7, 8, 9), GREEDY), return_exceptions=True
        )
        assert isinstance(guided, RequestError)
        assert f"the {kind} cannot be followed" in str(guided)
        assert guided.param == TOO_MUCH[kind].param
        assert not isinstance(free, BaseException)
        assert ids_of(free) == greedy(reference(folder), (7, 8, 9), 24)
        made.check_health()
        assert made.stats()[catalog.SERVE_RUNNING] == made.stats()[catalog.SERVE_WAITING] == 0

    with_engine(engine(folder), body)


def test_every_token_has_the_text_it_has_within_a_text(folder: Path) -> None:
    async def body(made: TorchEngine) -> None:
        ids = made.tokenize("the market price rose 上涨")
        assert "".join(made.reader.token_text(token) for token in ids if "\N{REPLACEMENT CHARACTER}" not in made.reader.token_text(token))
        assert made.reader.token_text(made.tokenize("<eos>")[0]) == "<eos>"
        assert len({made.reader.token_text(token) for token in range(5, VOCABULARY - 1)}) > 100

    with_engine(engine(folder), body)
