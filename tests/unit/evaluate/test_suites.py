"""CLUE and GLUE: small files in the official formats become rows of ours, are scored as is usual, and handed in as asked."""

from __future__ import annotations

import difflib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_rows
from sklearn import metrics

from danlu import sdk
from danlu.errors import DataError
from danlu.evaluate.reading import binary_f1, exact_match, matthews, span_f1, span_scores, units
from danlu.evaluate.suite import suite
from danlu.spec.train import TrainJob


def lines(*rows: dict[str, Any]) -> str:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"


WSC = "裂开的伤口涂满尘土，里面有碎石子和木头刺，我小心翼翼把它们剔除出去。"
CLUE = {
    "afqmc_public/dev.json": lines({"sentence1": "双十一花呗提额在哪", "sentence2": "里可以提花呗额度", "label": "0"}),
    "tnews_public/train.json": lines({"label": "108", "label_desc": "news_edu", "sentence": "上课时学生手机响个不停", "keywords": ""}),
    "tnews_public/test1.1.json": lines({"id": 0, "sentence": "在设计史上，每当相对稳定的发展时期", "keywords": ""}),
    "iflytek_public/dev.json": lines({"label": "110", "label_des": "社区超市", "sentence": "朴朴快送超市创立于2016年"}),
    "cmnli_public/dev.json": lines({"sentence1": "新的权利已经足够好了", "sentence2": "每个人都很喜欢", "label": "neutral"}),
    "ocnli_public/train.50k.json": lines(
        {"level": "easy", "sentence1": "是,但是就全年", "sentence2": "全年都很好", "label": "-", "id": 0},
        {"level": "easy", "sentence1": "他去了", "sentence2": "他没去", "label": "contradiction", "id": 1},
    ),
    "cluewsc2020_public/dev.json": lines(
        {"target": {"span2_index": 28, "span1_index": 0, "span1_text": "伤口", "span2_text": "它们"}, "label": "false", "text": WSC}
        | {"target": {"span1_index": 3, "span1_text": "伤口", "span2_index": WSC.index("它们"), "span2_text": "它们"}}
    ),
    "csl_public/dev.json": lines({"id": 1, "abst": "为解决传统均匀FFT的问题", "keyword": ["水声学", "三维成像"], "label": "0"}),
    "cmrc2018_public/dev.json": json.dumps(
        {"data": [{"paragraphs": [{"id": "D0", "context": "《战国无双3》是由光荣开发", "qas": [
            {"question": "由谁开发？", "id": "DEV_0_QUERY_0", "answers": [
                {"text": "光荣", "answer_start": 9}, {"text": "由光荣", "answer_start": 8}]}]}],
            "id": "D0", "title": "战国无双3"}]}, ensure_ascii=False),
    "drcd/dev.json": json.dumps({"version": "1.3", "data": [{"title": "a", "id": "1", "paragraphs": [
        {"context": "聖經作為最高權威", "id": "1-1", "qas": [{"id": "1-1-1", "question": "最高權威?", "answers": [
            {"id": "1", "text": "聖經", "answer_start": 0}]}]}]}]}),
    "chid_public/dev.json": lines(
        {"content": ["今天他们希望能#idiom000378#再进一步。", "走相似的模式去#idiom000379#，#idiom000380#更辛苦"],
         "candidates": ["百尺竿头", "随波逐流", "逆水行舟"]}
    ),
    "chid_public/dev_answer.json": json.dumps({"#idiom000378#": 0, "#idiom000379#": 1, "#idiom000380#": 2}),
    "c3_public/d-dev.json": json.dumps([[["男：你好", "女：再见"],
        [{"question": "谁先说？", "choice": ["男", "女"], "answer": "男"}], "1-1"]]),
    "c3_public/m-dev.json": json.dumps([[["一段话"], [{"question": "几段？", "choice": ["一", "二", "三"], "answer": "三"}], "2-3"]]),
    "c3_public/test1.1.json": json.dumps([[["话"], [{"question": "几？", "choice": ["一", "二"], "id": 7}], "3"]]),
}  # fmt: skip
GLUE = {
    "CoLA/dev.tsv": 'gj04\t1\t\tThe "sailors rode.\ngj04\t0\t*\tSailors the rode.\n',
    "CoLA/test.tsv": "index\tsentence\n0\tBill whistled.\n",
    "SST-2/dev.tsv": "sentence\tlabel\nit 's a charming journey\t1\n",
    "MRPC/dev.tsv": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t17\t18\tHe said so .\tSo he said .\n",
    "QQP/dev.tsv": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n3\t1\t2\tWhy?\tHow?\t0\n",
    "STS-B/dev.tsv": "index\tgenre\tsentence1\tsentence2\tscore\n0\tnews\tA plane.\tAn air plane.\t5.000\n",
    "MNLI/dev_matched.tsv": "index\tsentence1\tsentence2\tlabel1\tgold_label\n0\tThe new rights\tEveryone\tneutral\tneutral\n",
    "MNLI/dev_mismatched.tsv": "index\tsentence1\tsentence2\tlabel1\tgold_label\n0\tYour gift\tA gift\tentailment\tentailment\n",
    "QNLI/dev.tsv": "index\tquestion\tsentence\tlabel\n0\tWhat?\tThat.\tentailment\n",
    "RTE/test.tsv": "index\tsentence1\tsentence2\n0\tMangla was\tMangla\n",
    "WNLI/dev.tsv": "index\tsentence1\tsentence2\tlabel\n0\tThe drain\tThe hair\t1\n",
}


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for name, content in {**{f"clue/{k}": v for k, v in CLUE.items()}, **{f"glue/{k}": v for k, v in GLUE.items()}}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return tmp_path


def test_every_clue_task_is_read_from_its_official_form(folders: Path) -> None:
    tasks, root = suite("clue"), folders / "clue"
    assert list(tasks) == ["afqmc", "tnews", "iflytek", "cmnli", "ocnli", "cluewsc2020", "csl", "cmrc2018", "drcd", "chid", "c3"]

    def rows(name: str, split: str = "dev") -> list[dict[str, Any]]:
        found = tasks[name].rows(root, split)
        assert found is not None, name
        return found

    assert rows("afqmc") == [{"id": 0, "text": "双十一花呗提额在哪", "text_pair": "里可以提花呗额度", "label": "0"}]
    assert rows("tnews", "train") == [{"id": 0, "text": "上课时学生手机响个不停", "label": "108"}]
    assert rows("tnews", "test") == [{"id": 0, "text": "在设计史上，每当相对稳定的发展时期"}]
    assert rows("iflytek")[0]["label"] == "110"
    assert rows("cmnli")[0] == {"id": 0, "text": "新的权利已经足够好了", "text_pair": "每个人都很喜欢", "label": "neutral"}
    assert rows("ocnli", "train") == [{"id": 1, "text": "他去了", "text_pair": "他没去", "label": "contradiction"}]
    assert rows("cluewsc2020")[0]["text"] == WSC.replace("伤口", "_伤口_").replace("它们", "[它们]")
    assert rows("csl")[0] == {"id": 1, "text": "水声学 三维成像", "text_pair": "为解决传统均匀FFT的问题", "label": "0"}
    for name in ("cmrc2018", "drcd"):
        (row,) = rows(name)
        for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True):
            assert row["context"][start : start + len(text)] == text
    assert [(row["id"], row["choices"][row["answer"]]) for row in rows("chid")] == [
        ("#idiom000378#", "百尺竿头"), ("#idiom000379#", "随波逐流"), ("#idiom000380#", "逆水行舟"),
    ]  # fmt: skip
    assert [row["answer"] for row in rows("c3")] == [0, 2]
    assert rows("c3")[0]["context"] == "男：你好\n女：再见"
    assert rows("c3", "test") == [{"id": 7, "context": "话", "question": "几？", "choices": ["一", "二"]}]
    assert tasks["afqmc"].rows(root, "train") is None


def test_every_glue_task_is_read_from_its_official_form(folders: Path) -> None:
    tasks, root = suite("glue"), folders / "glue"
    read = {name: task.rows(root, "dev") for name, task in tasks.items()}
    assert read["cola"] == [
        {"id": 0, "text": 'The "sailors rode.', "label": "1"}, {"id": 1, "text": "Sailors the rode.", "label": "0"},
    ]  # fmt: skip
    assert tasks["cola"].rows(root, "test") == [{"id": "0", "text": "Bill whistled."}]
    assert read["sst2"] == [{"id": 0, "text": "it 's a charming journey", "label": "1"}]
    assert read["mrpc"] == [{"id": 0, "text": "He said so .", "text_pair": "So he said .", "label": "1"}]
    assert read["qqp"][0]["label"] == "0"  # type: ignore[index]
    assert read["stsb"][0]["label"] == "5.000"  # type: ignore[index]
    assert tasks["mnli"].rows(root, "dev_mismatched")[0]["label"] == "entailment"  # type: ignore[index]
    assert read["qnli"][0]["text_pair"] == "That."  # type: ignore[index]
    assert tasks["rte"].rows(root, "test") == [{"id": "0", "text": "Mangla was", "text_pair": "Mangla"}]
    assert read["wnli"][0]["label"] == "1"  # type: ignore[index]


def test_a_file_of_another_form_is_refused_with_its_name(folders: Path) -> None:
    (folders / "clue" / "csl_public" / "dev.json").write_text('{"id": 1}\n')
    with pytest.raises(DataError, match=r"csl_public/dev.json is not in csl's format"):
        suite("clue")["csl"].rows(folders / "clue", "dev")


def test_spans_are_scored_by_character() -> None:
    assert units("《战国无双3》是由 KOEI 开发！") == ["战", "国", "无", "双", "3", "是", "由", "koei", "开", "发"]
    assert exact_match("光荣。", ["光 荣", "x"]) == 1
    assert exact_match("光荣社", ["光荣"]) == 0
    for answer, right in [("由光荣开发", "光荣"), ("光荣", "由光荣"), ("abc def", "def abc"), ("无", "有"), ("一二三四五", "二三四")]:
        one, other = units(answer), units(right)
        run = difflib.SequenceMatcher(None, one, other, autojunk=False).find_longest_match().size
        expected = 0.0 if not run else 2 * (run / len(one)) * (run / len(other)) / (run / len(one) + run / len(other))
        assert span_f1(answer, [right]) == pytest.approx(expected)
    rows = [{"id": "a", "answers": {"text": ["光荣", "由光荣"]}}, {"id": "b", "answers": {"text": ["二"]}}]
    assert span_scores({"a": "由光荣"}, rows) == {"exact_match": 50.0, "f1": 50.0}


def test_two_class_metrics_are_scikit_learns() -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        truth, answers = draw.integers(0, 2, 30), draw.integers(0, 2, 30)
        assert matthews(truth, answers) == pytest.approx(metrics.matthews_corrcoef(truth, answers))
        assert binary_f1(truth, answers) == pytest.approx(metrics.f1_score(truth, answers))
    assert matthews(np.ones(5), np.ones(5)) == 0


def test_a_suite_is_trained_scored_and_handed_in(tiny_model: Path, tmp_path: Path) -> None:
    topics = {"grain": "100", "ship": "101", "trade": "102"}
    folder = tmp_path / "data" / "tnews_public"
    folder.mkdir(parents=True)
    for name, number, seed in (("train", 90, 1), ("dev", 30, 2), ("test", 12, 3)):
        rows = [{"label": topics[row["label"]], "sentence": row["text"], "keywords": ""} for row in make_rows(number, seed)]
        if name == "test":
            rows = [{"id": i, "sentence": row["sentence"]} for i, row in enumerate(rows)]  # type: ignore[misc]
        (folder / f"{name}.json").write_text(lines(*rows))
    (tmp_path / "data" / "c3_public").mkdir()
    for name in ("d-dev.json", "m-dev.json"):
        (tmp_path / "data" / "c3_public" / name).write_text(CLUE[f"c3_public/{name}"])
    job = TrainJob.model_validate(
        {
            "name": "tiny",
            "model": {"model_name_or_path": str(tiny_model), "max_length": 32},
            "data": {"train": "unused.csv", "cache_dir": str(tmp_path / "cache")},
            "optim": {"learning_rate": 5e-3},
            "precision": "fp32",
            "max_steps": 12,
            "storage": str(tmp_path / "runs"),
        }
    )
    found = sdk.run_suite("clue", job, tmp_path / "data", tmp_path / "out", train=sdk.train)
    assert [(one.task, one.rows) for one in found] == [("tnews", 30), ("c3", 2)]
    texts = [row["text"] for row in make_rows(30, 2)]
    answers = [one.label for one in sdk.predict("tiny-tnews@latest", texts, storage=job.storage)]
    truth = [topics[row["label"]] for row in make_rows(30, 2)]
    assert found[0].scores == {"accuracy": metrics.accuracy_score(truth, answers)}
    assert "tnews" in sdk.suite_text(found)
    handed = [json.loads(line) for line in (tmp_path / "out" / "tnews11_predict.json").read_text().splitlines()]
    asked = [one.label for one in sdk.predict("tiny-tnews@latest", [row["text"] for row in make_rows(12, 3)], storage=job.storage)]
    assert handed == [{"id": i, "label": label} for i, label in enumerate(asked)]
    with zipfile.ZipFile(tmp_path / "out" / "submit_clue.zip") as file:
        assert file.namelist() == ["tnews11_predict.json"]
    assert len((tmp_path / "out" / "rows" / "c3" / "dev.jsonl").read_text().splitlines()) == 2

    def again(_: TrainJob) -> None:
        raise AssertionError("what is trained is not trained again")

    assert sdk.run_suite("clue", job, tmp_path / "data", tmp_path / "out", train=again)[0].scores == found[0].scores


def questions(number: int, seed: int, *, answered: bool = True) -> dict[str, str]:
    """Files of CMRC 2018, ChID and C3 with so many questions, by their official names without the split."""
    rows = make_rows(number, seed)
    articles, choices, blanks, gaps = [], [], [], {}
    for i, row in enumerate(rows):
        word = row["text"].split()[i % len(row["text"].split())]
        answer = [{"text": word, "answer_start": row["text"].index(word)}] if answered else []
        qas = [{"question": f"which word {row['label']}", "id": f"Q{i}", "answers": answer}]
        articles.append({"title": "t", "id": f"A{i}", "paragraphs": [{"id": f"P{i}", "context": row["text"], "qas": qas}]})
        question = {"question": "what is it about", "choice": ["ship", "grain", "trade"][: 2 + i % 2]}
        right = question["choice"][i % len(question["choice"])]
        choices.append([[row["text"]], [question | ({"answer": right} if answered else {"id": i})], f"{i}"])
        blank = f"#idiom{i:06d}#"
        blanks.append({"content": [f"{row['text']} {blank}"], "candidates": ["wheat", "port", "tariff", "corn"]})
        gaps[blank] = i % 4
    return {
        "cmrc": json.dumps({"version": "v1.0", "data": articles}),
        "d": json.dumps(choices[::2]),
        "m": json.dumps(choices[1::2]),
        "both": json.dumps(choices),
        "chid": lines(*blanks),
        "chid_answer": json.dumps(gaps),
    }


def test_questions_choices_and_numbers_are_trained_scored_and_handed_in_too(tiny_model: Path, tmp_path: Path) -> None:
    for split, number in (("train", 24), ("dev", 9), ("test", 5)):
        made = questions(number, len(split), answered=split != "test")
        files = {f"cmrc2018_public/{split}.json": made["cmrc"], f"chid_public/{split}.json": made["chid"]}
        if split == "test":
            files |= {"c3_public/test1.1.json": made["both"]}
        else:
            files |= {f"chid_public/{split}_answer.json": made["chid_answer"]}
            files |= {f"c3_public/{side}-{split}.json": made[side] for side in "dm"}
        pairs = [f"{i}\tnews\t{row['text']}\twheat rose\t{i % 6}.0" for i, row in enumerate(make_rows(number, 3))]
        header = "index\tgenre\tsentence1\tsentence2\tscore"
        if split == "test":
            header, pairs = header.removesuffix("\tscore"), [line.rpartition("\t")[0] for line in pairs]
        files[f"STS-B/{split}.tsv"] = "\n".join([header, *pairs]) + "\n"
        for name, content in files.items():
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
    job = TrainJob.model_validate(
        {
            "name": "tiny",
            "model": {"model_name_or_path": str(tiny_model), "max_length": 32},
            "data": {"train": "unused.csv", "cache_dir": str(tmp_path / "cache")},
            "evaluation": {"metric_for_best_model": "accuracy"},
            "precision": "fp32",
            "max_steps": 3,
            "storage": str(tmp_path / "runs"),
        }
    )
    found = {one.task: one for one in sdk.run_suite("clue", job, tmp_path / "data", tmp_path / "out", train=sdk.train)}
    found |= {one.task: one for one in sdk.run_suite("glue", job, tmp_path / "data", tmp_path / "out", train=sdk.train)}
    assert {name: (one.shape, one.rows) for name, one in found.items()} == {
        "cmrc2018": ("extractive_qa", 9), "chid": ("multiple_choice", 9), "c3": ("multiple_choice", 9), "stsb": ("regression", 9),
    }  # fmt: skip
    tasks = suite("clue") | suite("glue")
    rows = {name: {split: tasks[name].rows(tmp_path / "data", split) for split in ("dev", "test")} for name in found}

    def predicted(name: str, split: str) -> list[Any]:
        asked = [
            {"question": row["question"], "context": row["context"]} | ({"options": row["choices"]} if "choices" in row else {})
            if "question" in row
            else {"text": row["text"], "text_pair": row["text_pair"]}
            for row in rows[name][split] or ()
        ]
        return list(sdk.predict(f"tiny-{name}@latest", asked, storage=job.storage))

    for name in ("chid", "c3"):
        truth = [row["choices"][row["answer"]] for row in rows[name]["dev"] or ()]
        assert found[name].scores == {
            "accuracy": pytest.approx(metrics.accuracy_score(truth, [one.label for one in predicted(name, "dev")]))
        }
    right = rows["cmrc2018"]["dev"] or []
    spans = span_scores({row["id"]: one.label for row, one in zip(right, predicted("cmrc2018", "dev"), strict=True)}, right)
    assert found["cmrc2018"].scores == pytest.approx({name: value / 100 for name, value in spans.items()})
    numbers = [one.probabilities[0] for one in predicted("stsb", "dev")]
    truth = [float(row["label"]) for row in rows["stsb"]["dev"] or ()]
    assert found["stsb"].scores["pearson"] == pytest.approx(np.corrcoef(truth, numbers)[0, 1], abs=1e-4)
    out = tmp_path / "out"
    assert json.loads((out / "cmrc2018_predict.json").read_text()) == {
        f"Q{i}": one.label for i, one in enumerate(predicted("cmrc2018", "test"))
    }
    assert json.loads((out / "chid11_predict.json").read_text()) == {
        f"#idiom{i:06d}#": int(np.argmax(one.probabilities)) for i, one in enumerate(predicted("chid", "test"))
    }
    handed = [json.loads(line) for line in (out / "c311_predict.json").read_text().splitlines()]
    assert handed == [{"id": i, "label": int(np.argmax(one.probabilities))} for i, one in enumerate(predicted("c3", "test"))]
    lines_ = (out / "STS-B.tsv").read_text().splitlines()
    assert lines_[0] == "index\tprediction"
    assert [float(line.split("\t")[1]) for line in lines_[1:]] == pytest.approx([one.probabilities[0] for one in predicted("stsb", "test")])
