"""The routes of each task whose requests are answered as a whole, and how each reads its bodies. Pure."""

from __future__ import annotations

from danlu.serve.embedding_wire import EmbeddingsWire, RerankWire
from danlu.serve.encoder_wire import TEXT, Wire, array_of, object_of
from danlu.serve.language_wire import CompletionsWire, FillMaskWire
from danlu.spec.task import (
    AnsweredTask,
    Classification,
    Embed,
    ExtractiveQA,
    MultiLabelClassification,
    MultipleChoice,
    Pretrain,
    Regression,
    Seq2Seq,
    TokenClassification,
)


def wire_of(task: AnsweredTask) -> Wire:
    """The route that answers a task."""
    pair = {"anyOf": [TEXT, object_of({"text": TEXT}, text_pair=TEXT)]}
    match task:
        case Classification() | MultiLabelClassification() | Regression():
            told = {"classification": "Label texts", "regression": "A number for each text"}.get(task.kind, "Any number of labels a text")
            return Wire(task, "/v1/classify", told, pair, "wheat exports rose")
        case ExtractiveQA():
            item = object_of({"question": TEXT, "context": TEXT})
            sample: object = {"question": "What rose?", "context": "Wheat exports rose."}
            return Wire(task, "/v1/answer", "Answer questions out of their contexts", item, sample)
        case MultipleChoice():
            item = object_of({"question": TEXT, "options": array_of(TEXT, minItems=2)}, context={"type": "string"})
            sample = {"question": "What rose?", "options": ["wheat", "corn"], "context": "Wheat exports rose."}
            return Wire(task, "/v1/choose", "Choose one of a question's options", item, sample)
        case TokenClassification():
            item = {"anyOf": [TEXT, object_of({"tokens": array_of(TEXT, minItems=1)})]}
            return Wire(task, "/v1/tag", "Find the entities of texts", item, "Wheat from Ohio")
        case Embed():
            return EmbeddingsWire(task, "/v1/embeddings", "A vector for each text", TEXT, "wheat exports rose")
        case Pretrain():
            return FillMaskWire(task, "/v1/fill_mask", "Say what may stand at each mask of texts", TEXT, "wheat [MASK] rose")
        case Seq2Seq():
            return CompletionsWire(task, "/v1/completions", "Write a text for each text", TEXT, "Wheat exports rose.")


def routes_of(task: AnsweredTask) -> dict[str, Wire]:
    """Every route of a task, by path."""
    wires = [wire_of(task)]
    if isinstance(task, Embed):
        sample = {"model": "NAME", "query": "wheat", "documents": ["corn exports fell", "wheat exports rose"], "top_n": 1}
        wires.append(RerankWire(task, "/v1/rerank", "Order documents by a query", TEXT, sample))
    return {wire.path: wire for wire in wires}
