"""What the model learns to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from danlu.spec.base import PositiveFloat, PositiveInt, Spec

Labels = Annotated[list[str], Field(min_length=2, json_schema_extra={"uniqueItems": True})]


def _distinct(labels: list[str] | None) -> None:
    if labels is not None and len(set(labels)) != len(labels):
        twice = sorted({name for name in labels if labels.count(name) > 1})
        raise ValueError(f"labels names {twice} twice; each label stands once")


class TemperatureScaling(Spec):
    """Logits are divided by one number, which makes probabilities as likely as they say and leaves the likeliest label what it is
    (https://arxiv.org/abs/1706.04599)."""

    kind: Literal["temperature"] = "temperature"

    temperature: PositiveFloat | None = None
    """Unset: the one with the smallest loss on the dev rows. A bundle says which that was."""


class Decision(Spec):
    """Answer what costs least instead of what is likeliest. The probabilities stay."""

    costs: Annotated[dict[str, dict[str, Annotated[float, Field(ge=0)]]], Field(min_length=1)]
    """Truth -> answer -> what that costs, such as {bad: {good: 20}, good: {bad: 1}}; what is not named costs nothing."""

    threshold: Annotated[float, Field(gt=0, lt=1)] | None = None
    """With two labels, the second (in the order of the model's outputs) is answered from this probability on. Unset: from the one on
    that cost least on the dev rows; a bundle says which that was. With more labels there is none: the answer is the label with the least
    expected cost."""

    def problem(self, labels: Sequence[str]) -> str | None:
        """What is wrong with it for these labels, and what would work."""
        named = [*self.costs, *(answer for answers in self.costs.values() for answer in answers)]
        if unknown := sorted(set(named) - set(labels)):
            return f"decision.costs names {unknown[0]!r}, which is no label; there are: {', '.join(labels)}"
        if self.threshold is not None and len(labels) != 2:
            return f"decision.threshold stands between two labels, and there are {len(labels)}; leave it out"
        for answer in labels:
            if all(self.costs.get(truth, {}).get(answer, 0.0) <= min(self._costs_of(truth, labels)) for truth in labels):
                return f"decision.costs makes {answer!r} the cheapest answer to every row, which takes no model; give it a cost, too"
        return None

    def _costs_of(self, truth: str, labels: Sequence[str]) -> list[float]:
        return [self.costs.get(truth, {}).get(answer, 0.0) for answer in labels]


class Classification(Spec):
    """One label per text or pair of texts, out of two or more."""

    kind: Literal["classification"] = "classification"

    labels: Labels | None = None
    """Label names in the order of the model's outputs. Unset: the sorted distinct labels of the training rows."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0

    calibration: TemperatureScaling | None = None
    """What is done to the trained model's logits before they become probabilities, wherever it answers. Unset: nothing."""

    decision: Decision | None = None
    """Unset: the likeliest label is the answer."""

    @model_validator(mode="after")
    def _labels_are_distinct(self) -> Self:
        _distinct(self.labels)
        if self.labels is not None and self.decision is not None and (problem := self.decision.problem(self.labels)):
            raise ValueError(problem)
        return self


class MultiLabelClassification(Spec):
    """Any number of labels per text or pair of texts, none included: each label is a yes or a no of its own."""

    kind: Literal["multi_label_classification"] = "multi_label_classification"

    labels: Labels | None = None
    """Label names in the order of the model's outputs. Unset: the sorted distinct labels of the training rows."""

    separator: Annotated[str, Field(min_length=1)] = ","
    """What stands between the labels of a row that holds them as one text; rows that hold lists need none."""

    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """A label is given from this probability on."""

    @model_validator(mode="after")
    def _labels_are_distinct(self) -> Self:
        _distinct(self.labels)
        return self


class Regression(Spec):
    """A number per text or pair of texts, as in STS-B."""

    kind: Literal["regression"] = "regression"


class ExtractiveQA(Spec):
    """A question's answer as a piece of its context, as in SQuAD. A context longer than `model.max_length` is read in windows."""

    kind: Literal["extractive_qa"] = "extractive_qa"

    doc_stride: PositiveInt | None = None
    """Tokens that neighbouring windows share. Unset: a third of model.max_length."""

    max_answer_length: PositiveInt = 30
    """Tokens of an answer at most."""

    n_best_size: PositiveInt = 5
    """How many candidates an answer comes with."""

    version_2_with_negative: bool = False
    """Learn and give "no answer" too, as in SQuAD v2. Otherwise rows without an answer are dropped."""

    null_score_diff_threshold: float = 0.0
    """There is no answer where that scores higher than the best answer by more than this."""

    @model_validator(mode="after")
    def _threshold_has_an_effect(self) -> Self:
        if self.null_score_diff_threshold and not self.version_2_with_negative:
            raise ValueError("null_score_diff_threshold has no effect without version_2_with_negative=true")
        return self


class MultipleChoice(Spec):
    """One of a question's options, any number of them per row: a score for each, and their softmax."""

    kind: Literal["multiple_choice"] = "multiple_choice"


class TokenClassification(Spec):
    """A tag for each word, such as named entities in BIO tags: the word's first token is what is labelled."""

    kind: Literal["token_classification"] = "token_classification"

    labels: Labels | None = None
    """Tags in the order of the model's outputs, such as [O, B-PER, I-PER]; needed where rows hold numbers. Unset: O, then those of the
    training rows."""


class Embed(Spec):
    """A vector per text, near those of texts that belong together: learned from pairs or triplets of texts, each against all other texts
    of its micro-batch (InfoNCE, https://arxiv.org/abs/1807.03748)."""

    kind: Literal["embedding"] = "embedding"

    pooling: Literal["mean", "cls"] = "mean"
    """The vector of a text: the mean of its tokens', or its first token's. It is scaled to length 1."""

    temperature: PositiveFloat = 0.05
    """Cosines are divided by it before the softmax."""


class CausalLm(Spec):
    """Every next token, by a decoder."""

    kind: Literal["causal"] = "causal"


class MaskedLm(Spec):
    """What was masked, by an encoder (https://arxiv.org/abs/1810.04805). Training rows are masked anew each time they are read."""

    kind: Literal["masked"] = "masked"
    mlm_probability: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the tokens that are chosen: of these 80 % become the mask, 10 % any token, 10 % stay."""
    whole_word_mask: bool = False
    """Choose whole words, so that no piece of one gives away another. A Chinese character is a word of its own: texts are not segmented."""


class FromScratch(Spec):
    """A model with random weights and a tokenizer of the corpus: only the config.json of `model.model_name_or_path` is read."""

    vocab_size: Annotated[int, Field(ge=300)] = 8000
    """Entries of the tokenizer that is trained on `data.train`, byte-level BPE; fewer if the corpus has not as many."""
    config_overrides: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Fields of the config.json that are to be other ones, such as num_hidden_layers."""


class Pretrain(Spec):
    """Language modelling on plain text, by a pretrained model that goes on learning or by one from scratch.

    Texts longer than `model.max_length` are cut into pieces of that length, none of which is lost.
    """

    kind: Literal["pretrain"] = "pretrain"
    objective: Annotated[CausalLm | MaskedLm, Field(discriminator="kind")] = CausalLm()
    from_scratch: FromScratch | None = None
    """Unset: the weights and the tokenizer of `model.model_name_or_path`."""


class Chat(Spec):
    """Supervised fine-tuning on conversations: a decoder learns what the assistant says, as the tokenizer's own chat template writes it.

    A row longer than `model.max_length` tokens is cut at its end; one in which nothing of the assistant is left is dropped.
    """

    kind: Literal["chat"] = "chat"

    row_format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"] = "auto"
    """How a row holds a conversation. `auto` goes by the columns and the first rows, and says what it found. `messages`: OpenAI's, with
    tools and tool calls; `prompt_completion`: texts (a user's and the assistant's turn) or lists of messages; `text`: no template is
    applied, and all is learned."""

    assistant_turns: Literal["all", "last", "each"] = "all"
    """Which turns of the assistant are learned. `each` makes every turn a row that ends with it, for templates that render a turn otherwise
    when more follows (those that forget earlier reasoning do)."""


class Dpo(Spec):
    """Direct preference optimisation (https://arxiv.org/abs/2305.18290): how much likelier than to the start model the chosen answer has
    become, beyond the rejected one."""

    kind: Literal["dpo"] = "dpo"
    beta: PositiveFloat = 0.1
    """How strongly the model is held to its start; higher holds more."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of the pairs that may be the wrong way round (conservative DPO)."""


class Ipo(Spec):
    """Identity preference optimisation (https://arxiv.org/abs/2310.12036): the margin is drawn to 1 / (2 beta) instead of without end. Log
    probabilities are means over an answer's tokens, as in TRL."""

    kind: Literal["ipo"] = "ipo"
    beta: PositiveFloat = 0.1
    """The paper's tau."""


class Orpo(Spec):
    """Odds-ratio preference optimisation (https://arxiv.org/abs/2403.07691): the chosen answer is learned, and its odds against the
    rejected one. There is no start model to be held to, so it starts from one that is not tuned yet."""

    kind: Literal["orpo"] = "orpo"
    beta: PositiveFloat = 0.1
    """Weight of the odds ratio; the paper's lambda."""


class Kto(Spec):
    """Kahneman-Tversky optimisation (https://arxiv.org/abs/2402.01306): answers that are desirable or not, each by itself. How far the
    model has moved at all is estimated on every micro-batch, from its rows' prompts with other rows' answers."""

    kind: Literal["kto"] = "kto"
    beta: PositiveFloat = 0.1
    """How strongly the model is held to its start; higher holds more."""
    desirable_weight: PositiveFloat = 1.0
    undesirable_weight: PositiveFloat = 1.0
    """Of the losses of such rows; where one kind is rarer, a higher weight makes up for it."""


class Preference(Spec):
    """A decoder learns which answers are preferred, written by the tokenizer's own chat template.

    Rows are pairs: prompt, chosen, rejected (texts or messages; the prompt may stand in both); LLaMA-Factory's and OpenAI's forms. Of KTO
    they are prompt, completion and label (true: desirable), or conversations with a label or kto_tag; a pair counts as two. DPO, IPO and
    KTO compare with the start model, whose log probabilities are computed once before the first step.
    """

    kind: Literal["preference"] = "preference"
    loss: Annotated[Dpo | Ipo | Orpo | Kto, Field(discriminator="kind")] = Dpo()

    @property
    def has_reference(self) -> bool:
        """True if the loss is relative to the start model."""
        return not isinstance(self.loss, Orpo)


class Seq2Seq(Spec):
    """An encoder-decoder reads a text and writes another: summarization, translation.

    Rows: {document, summary}, {source, target}, or {translation: {zh, en}} with both languages named here. Sources longer than
    `model.max_length` tokens and targets longer than `max_target_length` are cut at their end.
    """

    kind: Literal["seq2seq"] = "seq2seq"
    source_lang: str | None = None
    target_lang: str | None = None
    """Keys of a row's `translation`. Unset: the row's first and second."""
    source_prefix: str = ""
    """Put before every source, as T5 wants it: "summarize: "."""
    max_target_length: Annotated[int, Field(ge=2)] = 128
    num_beams: PositiveInt = 1
    """Of generation, when dev and test are scored at the end and in prediction; 1 is greedy."""


EncoderTask = Classification | MultiLabelClassification | Regression | ExtractiveQA | MultipleChoice | TokenClassification | Embed
"""Tasks of encoders: those that are served by the encoder engine and can be compressed."""

LanguageTask = Pretrain | Chat | Preference | Seq2Seq
"""Tasks of language models: what they answer is text."""

AnsweredTask = EncoderTask | Pretrain | Seq2Seq
"""Tasks whose requests are answered as a whole, by a route of their own; of `pretrain` only the masked objective is."""

Task = Annotated[EncoderTask | LanguageTask, Field(discriminator="kind")]


def named(task: Task) -> str:
    """What it is, in the words of a spec."""
    if isinstance(task, Pretrain):
        return f"task.kind={task.kind} with task.objective.kind={task.objective.kind}"
    return f"task.kind={task.kind}"


def rows_are_texts(task: Task) -> bool:
    """True if a row is one text, or two, and its label; other rows are made of messages, questions and contexts, options, answers."""
    return isinstance(task, Classification | MultiLabelClassification | Regression | Pretrain)


def is_decoders(task: Task) -> bool:
    """True if a causal language model is what learns it: tokens that predict the next one, each of which sees those before it."""
    match task:
        case Pretrain():
            return isinstance(task.objective, CausalLm)
        case _:
            return isinstance(task, Chat | Preference)


def engine_kind(task: Task) -> Literal["encoder", "encoder_decoder", "torch"]:
    """The kind of engine that serves its bundles; where that is torch, vllm does too."""
    if isinstance(task, Seq2Seq):
        return "encoder_decoder"
    return "torch" if is_decoders(task) else "encoder"


METRICS: dict[str, tuple[str, ...]] = {
    "classification": ("accuracy", "macro_f1", "loss"),
    "multi_label_classification": ("micro_f1", "macro_f1", "subset_accuracy", "loss"),
    "regression": ("pearson", "spearman", "mae", "mse"),
    "extractive_qa": ("f1", "exact_match"),
    "multiple_choice": ("accuracy", "loss"),
    "token_classification": ("f1", "precision", "recall", "accuracy"),
    "embedding": ("ndcg_at_10", "mrr", "recall_at_1", "recall_at_10"),
    "pretrain": ("loss",),
    "chat": ("loss", "token_accuracy"),
    "preference": ("reward_accuracy", "loss", "reward_margin"),
    "seq2seq": ("loss", "token_accuracy"),
}
"""What a task's dev split is scored by; the first is what chooses the best weights unless the job says otherwise."""

LOWER_IS_BETTER = frozenset({"loss", "mae", "mse"})

COLUMNS: dict[str, tuple[str, ...]] = {
    "classification": ("text", "text_pair", "label"),
    "multi_label_classification": ("text", "text_pair", "label"),
    "regression": ("text", "text_pair", "label"),
    "extractive_qa": ("question", "context", "answers"),
    "multiple_choice": ("question", "context", "options", "label"),
    "token_classification": ("tokens", "text", "label"),
    "embedding": ("text", "positive", "negative"),
    "pretrain": ("text", "text_pair", "label"),
    "chat": (),
    "preference": (),
    "seq2seq": (),
}
"""The columns that a task reads, of those `data.columns` can name; one that has none knows its rows by their own names."""
