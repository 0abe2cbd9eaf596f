"""CLUE (https://github.com/CLUEbenchmark/CLUE): its eleven tasks from their official files; names of what is handed in as of CLUE 1.1."""

from __future__ import annotations

import json
import re
from pathlib import Path

from danlu.evaluate.suite import SuiteTask, Values, json_lines

JSON: dict[str, tuple[str, ...]] = {"train": ("train.json",), "dev": ("dev.json",), "test": ("test.json",)}
NLI = ("entailment", "neutral", "contradiction")
BLANK = re.compile(r"#idiom\d+#")


def _labelled(row: Values, number: int, **texts: str) -> Values:
    """A row with its id, and its label where it has one."""
    label = row.get("label", row.get("gold_label"))
    return {"id": row.get("id", number), **texts, **({} if label is None else {"label": str(label)})}


def pairs(path: Path) -> list[Values]:
    """AFQMC, CMNLI, OCNLI: two sentences. Rows whose annotators found no majority ("-") are left out."""
    rows = enumerate(json_lines(path))
    found = [_labelled(row, i, text=row["sentence1"], text_pair=row["sentence2"]) for i, row in rows]
    return [row for row in found if row.get("label") != "-"]


def sentences(path: Path) -> list[Values]:
    """TNEWS, IFLYTEK: one sentence."""
    return [_labelled(row, i, text=row["sentence"]) for i, row in enumerate(json_lines(path))]


def winograd(path: Path) -> list[Values]:
    """CLUEWSC2020: does the pronoun, in brackets, mean the noun between underlines?"""
    return [_labelled(row, i, text=_marked(row["text"], row["target"])) for i, row in enumerate(json_lines(path))]


def _marked(text: str, target: Values) -> str:
    spans = [
        (target["span1_index"], target["span1_text"], "_", "_"),
        (target["span2_index"], target["span2_text"], "[", "]"),
    ]
    for start, span, left, right in sorted(spans, reverse=True):
        text = text[:start] + left + text[start : start + len(span)] + right + text[start + len(span) :]
    return text


def keywords(path: Path) -> list[Values]:
    """CSL: are all of these the abstract's keywords?"""
    return [_labelled(row, i, text=" ".join(row["keyword"]), text_pair=row["abst"]) for i, row in enumerate(json_lines(path))]


def spans(path: Path) -> list[Values]:
    """CMRC2018 and DRCD, in SQuAD's form; also CMRC's first form, which has no positions."""
    rows = []
    for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
        paragraphs = article.get("paragraphs") or [article]
        for paragraph in paragraphs:
            context = paragraph["context"] if "context" in paragraph else paragraph["context_text"]
            for question in paragraph["qas"]:
                texts = [one if isinstance(one, str) else one["text"] for one in question.get("answers", [])]
                starts = [context.find(one) if isinstance(one, str) else one["answer_start"] for one in question.get("answers", [])]
                rows.append(
                    {
                        "id": question.get("id", question.get("query_id")),
                        "context": context,
                        "question": question.get("question", question.get("query_text")),
                        "answers": {"text": texts, "answer_start": starts},
                    }
                )
    return rows


def idioms(path: Path) -> list[Values]:
    """ChID: a row for each blank; the answers stand in a file beside. The other blanks of the text stay as they are named."""
    beside = path.with_name(f"{path.stem}_answer.json")
    answers = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
    rows = []
    for entry in json_lines(path):
        for text in entry["content"]:
            for blank in BLANK.findall(text):
                answer = {"answer": int(answers[blank])} if blank in answers else {}
                rows.append({"id": blank, "context": text, "question": blank, "choices": list(entry["candidates"]), **answer})
    return rows


def dialogues(path: Path) -> list[Values]:
    """C3: questions about a text or a dialogue, with two to four choices."""
    rows = []
    for passages, questions, name in json.loads(path.read_text(encoding="utf-8")):
        for number, question in enumerate(questions):
            answer = {"answer": question["choice"].index(question["answer"])} if question.get("answer") else {}
            row = {"id": question.get("id", f"{name}-{number}"), "context": "\n".join(passages), "question": question["question"]}
            rows.append({**row, "choices": list(question["choice"]), **answer})
    return rows


_ACCURACY = ("accuracy",)
_TRAIN50K: dict[str, tuple[str, ...]] = {"train": ("train.50k.json", "train.json")}
_TEST11: dict[str, tuple[str, ...]] = {"test": ("test1.1.json", "test.json")}

TASKS = (
    SuiteTask("afqmc", "classification", _ACCURACY, JSON, pairs, "afqmc_predict.json", ("0", "1")),
    SuiteTask("tnews", "classification", _ACCURACY, JSON | _TEST11, sentences, "tnews11_predict.json"),
    SuiteTask("iflytek", "classification", _ACCURACY, JSON, sentences, "iflytek_predict.json"),
    SuiteTask("cmnli", "classification", _ACCURACY, JSON, pairs, "cmnli_predict.json", NLI),
    SuiteTask("ocnli", "classification", _ACCURACY, JSON | _TRAIN50K, pairs, "ocnli_50k_predict.json", NLI),
    SuiteTask("cluewsc2020", "classification", _ACCURACY, JSON | _TEST11, winograd, "cluewsc11_predict.json", ("false", "true")),
    SuiteTask("csl", "classification", _ACCURACY, JSON, keywords, "csl_predict.json", ("0", "1")),
    SuiteTask("cmrc2018", "extractive_qa", ("exact_match", "f1"), JSON, spans, "cmrc2018_predict.json", folders=("cmrc",), style="json"),
    SuiteTask("drcd", "extractive_qa", ("exact_match", "f1"), JSON, spans, "drcd_predict.json", style="json"),
    SuiteTask("chid", "multiple_choice", _ACCURACY, JSON | _TEST11, idioms, "chid11_predict.json", style="json"),
    SuiteTask(
        "c3",
        "multiple_choice",
        _ACCURACY,
        {"train": ("d-train.json+m-train.json",), "dev": ("d-dev.json+m-dev.json",), "test": ("test1.1.json", "test1.0.json")},
        dialogues,
        "c311_predict.json",
    ),
)
