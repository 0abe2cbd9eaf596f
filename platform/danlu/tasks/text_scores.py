"""How near written texts are to their references: BLEU and chrF by sacrebleu, ROUGE by its formula (https://aclanthology.org/W04-1013)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from danlu.errors import ModelError

CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uac00-\ud7af"
TOKEN = re.compile(rf"[{CJK}]|[^\W_{CJK}]+", re.UNICODE)


def text_scores(written: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """bleu and chrf of the corpus (0 to 100); rouge1, rouge2 and rougeL, the mean F1 of the texts (0 to 1)."""
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise ModelError("sacrebleu is not installed", where="task.kind", fix="pip install 'danlu[seq2seq]'") from error
    chinese = sum(bool(re.search(f"[{CJK}]", text)) for text in references) > len(references) / 2
    bleu = BLEU(tokenize="zh" if chinese else "13a", effective_order=False)
    pairs = [(words(one), words(other)) for one, other in zip(written, references, strict=True)]
    number = max(1, len(pairs))
    return {
        "bleu": float(bleu.corpus_score(list(written), [list(references)]).score),
        "chrf": float(CHRF().corpus_score(list(written), [list(references)]).score),
        "rouge1": sum(rouge_n(*pair, 1) for pair in pairs) / number,
        "rouge2": sum(rouge_n(*pair, 2) for pair in pairs) / number,
        "rougeL": sum(rouge_l(*pair) for pair in pairs) / number,
    }


def words(text: str) -> list[str]:
    """Lower-case words; of Chinese, Japanese and Korean each character."""
    return TOKEN.findall(text.lower())


def rouge_n(written: Sequence[str], reference: Sequence[str], n: int) -> float:
    """F1 of the n-grams that both have."""
    one, other = (Counter(zip(*(tokens[i:] for i in range(n)), strict=False)) for tokens in (written, reference))
    return _f1((one & other).total(), one.total(), other.total())


def rouge_l(written: Sequence[str], reference: Sequence[str]) -> float:
    """F1 of the longest common subsequence."""
    row = [0] * (len(reference) + 1)
    for token in written:
        diagonal = 0
        for j, other in enumerate(reference, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if token == other else max(row[j], row[j - 1])
    return _f1(row[-1], len(written), len(reference))


def _f1(common: int, written: int, reference: int) -> float:
    return 2 * common / (written + reference) if common else 0.0
