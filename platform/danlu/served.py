"""Served beside evaluated: an endpoint is asked, over HTTP, for what the bundle's evaluation answered. Part of the SDK."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from danlu.artifact.bundle import Bundle
from danlu.errors import QualityError
from danlu.spec.task import AnsweredTask, EncoderTask, is_decoders

if TYPE_CHECKING:
    import httpx

    from danlu.data.conversations import Conversation
    from danlu.tasks.agreement import Tolerance
    from danlu.tasks.judge import Completion, DecoderJudge
    from danlu.tasks.rows import Split

NUM_ROWS = 64
NUM_TEXT_ROWS = 8
TIMEOUT_S = 60.0
NEW_TOKENS = 16
"""Of a greedy answer that is compared token by token."""
SHOWN_TOKENS = 64
"""Of an answer that is shown to a person."""


@dataclass(frozen=True)
class Exchange:
    """A row's question, what the endpoint answers, and what the row itself says; of plain text its first half and the rest."""

    question: str
    answer: str
    truth: str


def check_served(url: str, bundle: Bundle, split: Split, *, num_rows: int | None = None, served_in_fp32: bool = True) -> str:
    """Ask an endpoint for rows; QualityError unless it answers what the evaluation answered. Of a language model that is what it says and
    how probable it finds the rows; `served_in_fp32` is False where its engine was told to compute in bf16."""
    if not is_decoders(bundle.meta.task):
        return _check_whole_answers(url, bundle, split, num_rows or NUM_ROWS, served_in_fp32)
    return _check_decoder(url, bundle, split, num_rows or NUM_TEXT_ROWS, served_in_fp32)


def _check_whole_answers(url: str, bundle: Bundle, split: Split, num_rows: int, served_in_fp32: bool) -> str:
    import httpx

    from danlu.compress.load import load_answerer
    from danlu.serve.wires import wire_of
    from danlu.tasks.agreement import tolerance
    from danlu.tasks.answers import Answerer, Seq2SeqJudge
    from danlu.tasks.exchange import from_fields, largest_change, shown
    from danlu.tasks.predictor import Predictor

    answerer: Answerer = load_answerer(bundle)
    task = bundle.meta.task
    assert isinstance(task, AnsweredTask)
    rows = _spread(len(split.examples or split.texts.texts), num_rows)
    asked = list(answerer.examples(split, rows))
    expected = [(found.label, found.probabilities, found.margin) for found in answerer.predict(asked)]
    # What a language model's probes say was asked when it was loaded: they are token ids.
    wire, probes = wire_of(task), bundle.meta.probes if isinstance(answerer, Predictor) else []
    asked += [from_fields(probe.input, task) for probe in probes]
    expected += [(str(probe.label), probe.probabilities, probe.margin) for probe in probes]
    within, largest = tolerance(bundle.meta, served_in_fp32=served_in_fp32), 0.0
    with httpx.Client(timeout=TIMEOUT_S) as client:
        for example, (label, numbers, margin) in zip(asked, expected, strict=True):
            response = client.post(f"{url}{wire.path}", json=wire.request(bundle.meta.name, [example]))
            response.raise_for_status()
            found_label, found_numbers = wire.read(response.json())[0]
            if isinstance(answerer, Seq2SeqJudge):
                if problem := answerer.other_than(label, found_label, shown(example), within):
                    raise QualityError(problem, where=shown(example)[:80])
                continue
            change = largest_change(found_numbers, numbers) / max(1.0, *map(abs, numbers))
            largest = max(largest, change)
            if change > 2e-3 or (found_label != label and margin > 4e-3):
                raise QualityError(
                    f"the endpoint answers {found_label!r} {found_numbers} where the evaluation answered {label!r} {numbers}",
                    where=shown(example)[:80],
                )
    if isinstance(answerer, Seq2SeqJudge):
        return f"{len(rows)} test rows over HTTP: every text is the evaluation's"
    what = f"{len(rows)} test rows and {len(probes)} probes" if probes else f"{len(rows)} test rows with a mask"
    return f"{what} over HTTP: every answer is the evaluation's, its numbers within {largest:.1e}"


def _check_decoder(url: str, bundle: Bundle, split: Split, num_rows: int, served_in_fp32: bool) -> str:
    import httpx

    from danlu.compress.load import load_judge
    from danlu.evaluate.endpoint import row_losses
    from danlu.tasks.agreement import change, tolerance
    from danlu.tasks.judge import DecoderJudge, LanguageJudge

    judge, task = load_judge(bundle), bundle.meta.task
    assert isinstance(judge, DecoderJudge), f"{task.kind} is not served"
    assert not isinstance(task, EncoderTask)
    within = tolerance(bundle.meta, served_in_fp32=served_in_fp32)
    with httpx.Client(base_url=url, timeout=TIMEOUT_S) as client:
        room = _room(client)
        every = (judge.asked(split, row) for row in _spread(len(split.texts.texts), num_rows))
        asked = [(one, ids) for one, ids in every if len(ids) + NEW_TOKENS <= room]
        rows = [row for row in _spread(len(split), num_rows) if split.encoded.lengths[row] <= room]
        if not asked or not rows:
            raise QualityError(
                f"no test row fits into the endpoint's {room} tokens, so nothing says that what is served is what was evaluated",
                where="serve.engine.max_model_len",
                fix="a larger one",
            )
        largest_token, num_tokens = 0.0, 0
        for one, ids in asked:
            expected = judge.continued("", ids, NEW_TOKENS)
            said, num_read = _greedy(client, bundle.meta.name, one, ids)
            where = _question(one)[:80]
            if num_read != len(ids):
                raise QualityError(f"the endpoint reads {num_read} tokens where the evaluation read {len(ids)}", where=where)
            largest_token = max(largest_token, _compared(said, expected, judge, within, where))
            num_tokens += len(expected.token_ids)
    some = replace(split, encoded=split.encoded.take(rows), conversations=(), reference=None)
    # The start model's numbers, which a preference is also made of, are not the endpoint's.
    evaluated = LanguageJudge.outputs(judge, some)
    served = row_losses(url, some, task, model=bundle.meta.name).outputs
    largest_loss = 0.0
    for row, (found, true) in enumerate(zip(served, evaluated, strict=True)):
        for total, expected_total, count in _sums(bundle, found, true):
            loss, expected_loss = total / count, expected_total / count
            largest_loss = max(largest_loss, change(loss, expected_loss))
            if not change(loss, expected_loss) <= within.loss:
                raise QualityError(
                    f"the endpoint finds {loss:.4f} nats a token in a row where the evaluation found {expected_loss:.4f}",
                    where=judge.tokenizer.decode(some.encoded.row(row))[:80],
                )
    return (
        f"{len(asked)} greedy answers over HTTP are the evaluation's, {num_tokens} tokens, their log probabilities within "
        f"{largest_token:.1e} (tolerance {within.logprob:g} nats), and the losses of {len(rows)} rows within {largest_loss:.1e} "
        f"({within.loss:g} nats a token)"
    )


def _spread(rows: int, number: int) -> list[int]:
    """`number` of the rows, from the first to the last."""
    number = min(number, rows)
    return [i * (rows - 1) // max(1, number - 1) for i in range(number)]


def _room(client: httpx.Client) -> int:
    """The endpoint's context in tokens."""
    response = client.get("/v1/models")
    response.raise_for_status()
    return int(response.json()["data"][0]["max_model_len"])


def _sums(bundle: Bundle, found: Any, true: Any) -> list[tuple[float, float, float]]:
    """What the endpoint and the evaluation sum up over a row's learned tokens, and how many those are."""
    if bundle.meta.task.kind == "preference":
        return [(float(found[i]), float(true[i]), float(true[i + 2])) for i in range(2)]
    return [(float(found[0]), float(true[0]), float(true[-1]))]


def _greedy(client: httpx.Client, model: str, asked: Conversation, ids: Sequence[int]) -> tuple[list[tuple[str, float]], int]:
    """The tokens of the endpoint's greedy answer with their log probabilities, and how many it has read."""
    how: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": NEW_TOKENS}
    if asked.messages:
        answer = _posted(client, "/v1/chat/completions", how | _chat(asked) | {"logprobs": True})
        content = answer["choices"][0]["logprobs"]["content"]
        said = [(token["token"], float(token["logprob"])) for token in content]
    else:
        answer = _posted(client, "/v1/completions", how | {"prompt": list(ids), "logprobs": 0})
        found = answer["choices"][0]["logprobs"]
        said = list(zip(found["tokens"], found["token_logprobs"], strict=True))
    return said, int(answer["usage"]["prompt_tokens"])


def _compared(said: Sequence[tuple[str, float]], expected: Completion, judge: DecoderJudge, within: Tolerance, where: str) -> float:
    """The largest change of a log probability; QualityError for more than the tolerance, or for another token where none is near."""
    from danlu.serve.engines.torch.requests import Reader
    from danlu.tasks.agreement import change

    reader = Reader(judge.tokenizer, len(judge.tokenizer), 1, [])  # how the endpoint writes a token
    largest = 0.0
    for at, (token, logprob, margin) in enumerate(zip(expected.token_ids, expected.logprobs, expected.margins, strict=True)):
        text = reader.token_text(token)
        found = said[at] if at < len(said) else ("the end", 0.0)
        if found[0] != text:
            if margin > 2 * within.logprob * max(1.0, abs(logprob)):
                raise QualityError(
                    f"the endpoint says {found[0]!r} as token {at + 1} of its answer, where the evaluation says {text!r}", where=where
                )
            return largest  # as good as a tie; what follows follows from it
        moved = change(found[1], logprob)
        largest = max(largest, moved)
        if not moved <= within.logprob:
            raise QualityError(
                f"the endpoint gives {text!r} a log probability of {found[1]:.4f}, where the evaluation gives it {logprob:.4f}", where=where
            )
    if len(said) > len(expected.token_ids):
        raise QualityError(
            f"the endpoint goes on with {said[len(expected.token_ids)][0]!r} where the evaluation's answer has ended", where=where
        )
    return largest


def exchanges(url: str, bundle: Bundle, split: Split, number: int = 3) -> list[Exchange]:
    """A few rows' questions with the endpoint's answers."""
    import httpx

    if isinstance(bundle.meta.task, AnsweredTask) and not is_decoders(bundle.meta.task):
        return _whole_exchanges(url, bundle, bundle.meta.task, split, number)
    found = []
    with httpx.Client(base_url=url, timeout=TIMEOUT_S) as client:
        for row in _spread(len(split.texts.texts), number):
            how: dict[str, Any] = {"model": bundle.meta.name, "temperature": 0, "max_tokens": SHOWN_TOKENS}
            whole = split.conversations[row] if split.conversations else None
            if whole is not None and whole.text is None:
                message = _posted(client, "/v1/chat/completions", how | _chat(_without_answer(whole)))["choices"][0]["message"]
                answer = message["content"] or json.dumps(message.get("tool_calls"), ensure_ascii=False)
                found.append(Exchange(_question(_without_answer(whole)), answer, str(whole.messages[-1].get("content") or "")))
                continue
            text = split.texts.texts[row]
            half = text[: len(text) // 2].rstrip() or text
            answer = _posted(client, "/v1/completions", how | {"prompt": half})["choices"][0]["text"]
            found.append(Exchange(half, answer, text[len(half) :]))
    return found


def _whole_exchanges(url: str, bundle: Bundle, task: AnsweredTask, split: Split, number: int) -> list[Exchange]:
    """Sources with what is written for them, or texts with a mask and what is put there."""
    import httpx

    from danlu.serve.wires import wire_of
    from danlu.tasks.exchange import Example, MaskedText, SourceText
    from danlu.tasks.masked import with_a_mask
    from danlu.tasks.tokenizer import load_tokenizer

    wire, found = wire_of(task), []
    tokenizer = load_tokenizer(bundle.path / "model")
    with httpx.Client(base_url=url, timeout=TIMEOUT_S) as client:
        for row in _spread(len(split.texts.texts), number):
            text = split.texts.texts[row]
            if split.texts.pairs is None:
                text, truth = with_a_mask(text, tokenizer, bundle.meta.max_length)
                asked: Example = MaskedText(text)
            else:
                asked, truth = SourceText(text), split.texts.pairs[row]
            ((answer, _),) = wire.read(_posted(client, wire.path, wire.request(bundle.meta.name, [asked])))
            found.append(Exchange(text, answer, truth))
    return found


def _without_answer(whole: Conversation) -> Conversation:
    return replace(whole, messages=whole.messages[:-1])


def _chat(asked: Conversation) -> dict[str, Any]:
    """A conversation as OpenAI's API takes it: a call's arguments as a text, and an id where the rows have none."""
    messages = []
    for at, message in enumerate(asked.messages):
        one = dict(message)
        if one["role"] == "tool":
            one.setdefault("tool_call_id", f"call_{at - 1}")
        if calls := one.get("tool_calls"):
            one["tool_calls"] = [_call(call, f"call_{at}") for call in calls]
        messages.append(one)
    return {"messages": messages} | ({"tools": [dict(tool) for tool in asked.tools]} if asked.tools else {})


def _call(call: Mapping[str, Any], name: str) -> dict[str, Any]:
    function = dict(call["function"])
    if not isinstance(function.get("arguments"), str):
        function["arguments"] = json.dumps(function.get("arguments") or {}, ensure_ascii=False)
    return {"id": call.get("id") or name, "type": "function", "function": function}


def _question(asked: Conversation) -> str:
    return str(asked.messages[-1].get("content") or "") if asked.messages else str(asked.text)


def _posted(client: httpx.Client, path: str, body: Mapping[str, Any]) -> Any:
    response = client.post(path, json=dict(body))
    if response.status_code != 200:
        raise QualityError(f"the endpoint answers {response.status_code} to a row: {response.text[:300]}", where=path)
    return response.json()
