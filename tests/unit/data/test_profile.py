"""The report on rows: counts are those of pandas and of brute force, findings name their lines, and the page needs nothing else."""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from conftest import make_rows
from language import talks, write_chat_model, write_rows

from danlu import sdk
from danlu.data.formats import read_rows
from danlu.data.language import language
from danlu.data.near import bands, duplicates, normal, shingles, signature, similarity
from danlu.data.personal import is_card, is_chinese_id, masked, personal
from danlu.data.profile import profile
from danlu.data.profile_text import html, text
from danlu.data.row import Row
from danlu.data.stream import find, stream
from danlu.errors import DataError
from danlu.spec.data import Columns
from danlu.spec.train import TrainJob
from danlu.tasks.tokenizer import load_tokenizer

FRAME = pandas.DataFrame(
    {
        "text": ["wheat rose", 'a "quoted", comma', "two\nlines", "中文的新闻，涨了", "tab\tinside", "line\u2028separator", '5" pipe'],
        "label": ["grain", "ship", "ship", "trade", "grain", "trade", "ship"],
    }
)
CHINESE = "央行今天宣布下调存款准备金率零点五个百分点，以支持实体经济的发展，市场普遍认为这将释放长期流动性约一万亿元"


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json", "a.parquet", "a.tab", "a.csv.gz", "b.csv"])
def test_rows_one_by_one_are_the_rows_at_once(name: str, tmp_path: Path) -> None:
    plain = FRAME[~FRAME["text"].str.contains('\n|\t|"')].reset_index(drop=True)
    path = tmp_path / name
    match name.partition(".")[2]:
        case "csv" | "csv.gz":
            FRAME.to_csv(path, index=False, lineterminator="\r\n" if name == "b.csv" else "\n")
        case "tsv":
            plain.to_csv(path, sep="\t", index=False, quoting=3)
        case "tab":
            path.write_text("text\tlabel\nstring\td\n\tclass\n" + plain.to_csv(sep="\t", index=False, header=False, quoting=3))
        case "jsonl":
            FRAME.to_json(path, orient="records", lines=True, force_ascii=False)
        case "json":
            path.write_text(json.dumps(FRAME.to_dict("records"), indent=2))
        case "parquet":
            FRAME.to_parquet(path)
    whole = read_rows(str(path))
    (source,) = find(str(path))
    rows = [row for row in stream(source) if isinstance(row, Row)]
    assert {name: [row.values[name] for row in rows] for name in whole.columns} == {k: list(v) for k, v in whole.columns.items()}
    assert (source.format, source.label_column) == (whole.format, whole.label_column)
    raw = path.read_bytes().split(b"\n") if name in ("a.csv", "a.tsv", "a.jsonl", "a.tab") else []
    for row in rows if raw and name != "a.jsonl" else []:
        assert str(row.values["text"]).split("\n")[0].split("\u2028")[0].strip('"')[:4].encode() in raw[row.line - 1].replace(b'""', b'"')
    assert name != "a.jsonl" or [row.line for row in rows] == list(range(1, len(rows) + 1))


def test_counts_are_those_of_pandas(tiny_model: Path, tmp_path: Path) -> None:
    frame = pandas.DataFrame([*make_rows(90, 1), {"text": "Wheat  Rose!", "label": "grain"}, {"text": "wheat rose", "label": "ship"}])
    frame["number"] = range(len(frame))
    test = pandas.DataFrame([{"text": "WHEAT rose", "label": "grain"}, {"text": "quite another thing", "label": "ship"}])
    frame.to_json(tmp_path / "train.jsonl", orient="records", lines=True)
    test.to_json(tmp_path / "test.jsonl", orient="records", lines=True)
    tokenizer = load_tokenizer(tiny_model)
    sources = {"train": str(tmp_path / "train.jsonl"), "test": str(tmp_path / "test.jsonl")}
    found = profile(sources, Columns(), tokenizer=tokenizer, max_length=16)
    train = found.splits["train"]
    assert train.rows == len(frame)
    assert train.labels == frame["label"].value_counts().to_dict()
    lengths = np.array([len(ids) for ids in tokenizer(list(frame["text"]))["input_ids"]])
    assert train.tokens is not None
    assert (train.tokens.p50, train.tokens.p90, train.tokens.p99, train.tokens.max) == tuple(
        int(value) for value in [*np.percentile(lengths, [50, 90, 99]), lengths.max()]
    )
    assert train.tokens.mean == pytest.approx(lengths.mean(), abs=0.01)
    assert train.truncated == pytest.approx((lengths > 16).mean())
    characters = frame["text"].str.len()
    assert (train.characters.p50, train.characters.max) == (int(np.percentile(characters, 50)), characters.max())
    keys = frame["text"].str.lower().str.replace(r"[^a-z]+", " ", regex=True).str.strip()
    assert train.exact.rows == keys.duplicated().sum() >= 1
    assert train.exact.examples[-1] == ("92", "like 91")
    assert train.conflicting.examples[-1] == ("92", "'ship', and 'grain' in 91")
    assert train.columns["number"].types == {"integer": 92}
    assert train.columns["number"].distinct == 92
    assert found.splits["test"].in_train is not None
    assert found.splits["test"].in_train.examples == (("1", "the same text"),)
    assert train.languages["en"] > 80
    shown = text(found)
    assert "92" in shown
    assert "exact duplicates" in shown
    assert all(f"warning: {warning}" in shown for warning in found.warnings)


def test_a_job_shows_the_first_row_as_its_model_reads_it(tiny_model: Path, topic_files: dict[str, str], tmp_path: Path) -> None:
    job = TrainJob.model_validate(
        {
            "name": "a",
            "model": {"model_name_or_path": str(tiny_model), "max_length": 8},
            "data": {**topic_files, "cache_dir": str(tmp_path)},
        }
    )
    found = sdk.data_report(job=job)
    assert list(found.splits) == ["train", "test"]
    first = pandas.read_csv(topic_files["train"]).iloc[0]
    tokenizer = load_tokenizer(tiny_model)
    assert found.example is not None
    assert list(found.example.input_ids) == tokenizer(first["text"], truncation=True, max_length=8)["input_ids"]
    assert found.example.tokens[0] == "[CLS]"
    assert found.example.target == first["label"]
    page = html(found, "<b>rows</b>")
    assert "&lt;b&gt;rows&lt;/b&gt;" in page
    assert not re.search(r"https?:|<script|<link|<img", page)
    document = json.loads(json.dumps(found.to_dict()))
    assert document["splits"]["train"]["rows"] == 180


def test_rows_of_any_columns_are_reported(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"question {i} about wheat"}, {"role": "assistant", "content": f"answer {i}"}], "id": i}
        for i in range(5)
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps(row) for row in [*rows, rows[0], {"messages": [], "id": 9}]) + "\nbroken\n")
    split = profile({"train": str(tmp_path / "chat.jsonl")}, Columns()).splits["train"]
    assert (split.rows, split.roles) == (7, {})
    assert split.columns["messages"].types == {"list": 7}
    assert split.exact.examples == (("6", "like 1"),)
    assert [line for line, _ in split.empty.examples] == ["7"]
    assert split.broken.examples[0][0] == "8"


ROWS_OF_TASKS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "multiple_choice": (
        [{"question": "What rose?", "options": ["wheat", f"ship {i}"], "answer": "AB"[i % 2]} for i in range(6)],
        "wheat",
    ),
    "extractive_qa": (
        [{"question": "What rose?", "context": f"wheat {i} rose", "answers": {"text": ["wheat"], "answer_start": [0]}} for i in range(6)],
        "wheat",
    ),
    "token_classification": (
        [{"text": f"wheat rose {i}", "entities": [{"start": 0, "end": 5, "label": "GRAIN"}]} for i in range(6)],
        "B-GRAIN O O",
    ),
    "multi_label_classification": ([{"text": f"wheat {i}", "labels": ["grain", "trade"][: 1 + i % 2]} for i in range(6)], "grain"),
    "regression": ([{"sentence1": f"wheat {i}", "sentence2": "corn", "score": i / 4} for i in range(1, 7)], "0.25"),
    "embedding": ([{"query": "wheat", "pos": [f"grain {i}"]} for i in range(6)], "to be nearest to its own second text"),
}


@pytest.mark.parametrize("task", ROWS_OF_TASKS)
def test_rows_of_every_task_are_reported_as_it_reads_them(task: str, tiny_model: Path, tmp_path: Path) -> None:
    rows, target = ROWS_OF_TASKS[task]
    job = TrainJob.model_validate(
        {
            "name": "a",
            "model": {"model_name_or_path": str(tiny_model), "max_length": 32},
            "data": {"train": write_rows(tmp_path / "rows.jsonl", [*rows, rows[0]]), "cache_dir": str(tmp_path)},
            "task": {"kind": task},
        }
    )
    found = sdk.data_report(job=job)
    split = found.splits["train"]
    assert (split.rows, split.empty.rows, split.unlabelled.rows) == (7, 0, 0)
    assert split.exact.examples == (("7", "like 1"),)
    assert split.labels == ({"grain": 7, "trade": 3} if task == "multi_label_classification" else {})
    assert found.example is not None
    assert found.example.target == target
    assert not [warning for warning in found.warnings if "cannot read" in warning]


def test_conversations_are_reported_as_the_chat_template_writes_them(tmp_path: Path) -> None:
    rows = [*talks(6), {"messages": [{"role": "user", "content": "Is anybody there?"}]}, talks(1)[0]]
    job = TrainJob.model_validate(
        {
            "name": "a",
            "model": {"model_name_or_path": str(write_chat_model(tmp_path / "model")), "max_length": 55},
            "data": {"train": write_rows(tmp_path / "rows.jsonl", rows), "cache_dir": str(tmp_path), "clean": [{"kind": "drop_broken"}]},
            "task": {"kind": "chat"},
        }
    )
    found = sdk.data_report(job=job)
    split = found.splits["train"]
    tokenizer = load_tokenizer(tmp_path / "model")
    lengths = [len(tokenizer.apply_chat_template(row["messages"])["input_ids"]) for row in (*rows[:6], rows[7])]
    assert split.tokens is not None
    assert (split.tokens.max, split.tokens.mean) == (max(lengths), round(float(np.mean(lengths)), 2))
    assert split.truncated == np.mean([length > 55 for length in lengths])
    assert split.broken.examples == (("7", "there is no assistant turn to learn"),)
    assert (split.empty.rows, split.exact.examples) == (0, (("8", "like 1"),))
    shown = text(found)
    assert f"⟦{rows[0]['messages'][-1]['content']}<|im_end|>⟧" in shown
    assert "learned" in html(found, "rows")


def test_a_column_that_is_named_and_not_there_is_refused(topic_files: dict[str, str]) -> None:
    with pytest.raises(DataError, match="has no column 'txet'"):
        profile({"train": topic_files["train"]}, Columns(text="txet"))


# Near duplicates, beside brute force.


def exact_jaccard(one: str, other: str) -> float:
    size = 2 if re.search("[\u4e00-\u9fff]", one) else 5
    grams = [{normal(text)[i : i + size] for i in range(max(1, len(normal(text)) - size + 1))} for text in (one, other)]
    return len(grams[0] & grams[1]) / len(grams[0] | grams[1])


def variants(seed: int, words: list[str], joined: str) -> list[str]:
    draw = random.Random(seed)
    found = []
    for _ in range(12):
        parts = words[:]
        for _ in range(draw.randint(0, len(words) // 6)):
            parts[draw.randrange(len(parts))] = draw.choice(["alpha", "beta", "gamma"]) if joined else draw.choice("甲乙丙丁戊己庚")
        found.append(joined.join(parts))
    return found


def test_near_duplicates_are_those_of_brute_force() -> None:
    english = [
        "the",
        "price",
        "of",
        "wheat",
        "rose",
        "in",
        "the",
        "market",
        "today",
        "after",
        "the",
        "harvest",
        "report",
        "said",
        "that",
        "exports",
        "fell",
        "to",
        "a",
        "new",
        "low",
        "this",
        "year",
    ]
    texts = [*variants(1, english, " "), *variants(2, list(CHINESE), ""), *(row["text"] for row in make_rows(60, 7))]
    found = dict(duplicates(texts, 0.8))
    for row, first in found.items():
        assert exact_jaccard(texts[row], texts[first]) > 0.8 - 0.13, "three standard deviations of the estimate"
    for one, other in itertools.combinations(range(len(texts)), 2):
        if exact_jaccard(texts[one], texts[other]) > 0.8 + 0.13:
            assert other in found
    assert len(found) >= 8


def test_the_estimate_is_the_jaccard_similarity() -> None:
    errors = []
    for seed in range(30):
        signs = [chr(random.Random(seed).randrange(0x4E00, 0x9000) + i) for i in range(60)]
        one, other = variants(seed, random.Random(-seed).sample(signs, 60), "")[:2]
        errors.append(similarity(signature(one), signature(other)) - exact_jaccard(one, other))
    assert abs(np.mean(errors)) < 0.02
    assert np.std(errors) < 0.06
    assert similarity(signature("a"), signature("b")) < 0.1
    assert len(shingles("")) == 1


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 0.95])
def test_the_bands_find_what_they_promise(threshold: float) -> None:
    number, rows = bands(threshold)
    assert number * rows <= 128
    assert 1 - (1 - threshold**rows) ** number >= 0.98


# Languages and personal data.


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("中国人民银行今天宣布下调利率", "zh"), ("iPhone 15 的价格下降了", "zh"),
        ("東京は今日とても暑いです", "ja"), ("오늘 서울의 날씨", "ko"),
        ("The price of wheat rose in the market", "en"), ("Der Preis ist nicht mit den Kosten gestiegen", "de"),
        ("Le prix du blé est en hausse dans les marchés", "fr"), ("El precio de los cereales no está en la lista", "es"),
        ("Цена на пшеницу выросла", "ru"), ("ราคาข้าวสาลี", "th"), ("سعر القمح", "ar"), ("12345 !!", "und"),
    ],
)  # fmt: skip
def test_the_language_is_told(sentence: str, expected: str) -> None:
    assert language(sentence) == expected


def check_sign(seventeen: str) -> str:
    """GB 11643 once more, from its definition: the weighted sum with the check value is 1 modulo 11."""
    total = sum(pow(2, 17 - i, 11) * int(digit) for i, digit in enumerate(seventeen))
    return next(sign for value, sign in enumerate("0123456789X") if (total + value) % 11 == 1)


def test_chinese_identity_numbers_have_their_check_sign_and_a_date() -> None:
    for seventeen in ("11010519491231002", "44030819900101001", "31011519851130123"):
        assert is_chinese_id(seventeen + check_sign(seventeen))
        wrong = "0" if check_sign(seventeen) != "0" else "1"
        assert not is_chinese_id(seventeen + wrong)
    assert not is_chinese_id("11010519491331002" + check_sign("11010519491331002")), "there is no thirteenth month"


def test_cards_pass_luhn() -> None:
    for number in ("4111 1111 1111 1111", "5500-0000-0000-0004", "340000000000009", "6222021234567894"):
        digits = [int(sign) for sign in number if sign.isdigit()]
        total = sum(digits[-1::-2]) + sum(sum(divmod(2 * digit, 10)) for digit in digits[-2::-2])
        assert is_card(number) == (total % 10 == 0)
    assert not is_card("4111 1111 1111 1112")
    assert not is_card("0000 0000 0000 0000")


@pytest.mark.parametrize(
    ("sentence", "kinds"),
    [
        ("write to wang.wei@example.com.cn today", ["mail"]), ("电话：13812345678。", ["phone"]), ("+86 138 1234 5678", ["phone"]),
        ("call +1 415-555-2671", ["phone"]), ("身份证11010519491231002X", ["chinese id"]), ("卡号 4111 1111 1111 1111", ["bank card"]),
        ("from 192.168.3.17", ["ip address"]), ("at 2001:db8::8a2e:370:7334 now", ["ip address"]), ("version 1.2.3.4 of 2024", []),
        ("order 23812345678901", []), ("at 12:30:45 and a::b", []), ("a price of 13,812,345,678", []), ("user@host", []),
        ("127.0.0.1", []), ("300.1.1.1", []), ("id 110105194912310021", []),
    ],
)  # fmt: skip
def test_personal_data_is_suspected_where_it_is(sentence: str, kinds: list[str]) -> None:
    assert [kind for kind, _ in personal(sentence)] == kinds


def test_a_report_does_not_pass_personal_data_on(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "call 13812345678 or mail zhang.san@example.com", "label": "a"}) + "\n")
    found = profile({"train": str(tmp_path / "a.jsonl")}, Columns())
    assert set(found.splits["train"].personal) == {"mail", "phone"}
    for shown in (text(found), html(found, "a"), json.dumps(found.to_dict())):
        assert "13812345678" not in shown
        assert "zhang.san@example.com" not in shown
    assert masked("13812345678") == "13*******78"
