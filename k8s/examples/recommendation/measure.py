"""How well articles are found for headlines: by TF-IDF, by BM25, by a service's vectors, and by BM25 with a service's rerank.

danlu serve k8s/examples/recommendation.yaml --set serve.http.port=8000
python k8s/examples/recommendation/measure.py http://127.0.0.1:8000 .cache/recommendation/test.csv
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence

import httpx
import numpy as np
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer

AT_ONCE = 32
CANDIDATES = 20


def bm25(queries: Sequence[str], documents: Sequence[str], *, k1: float = 1.2, b: float = 0.75) -> np.ndarray:
    """Robertson and Zaragoza 2009, with Lucene's idf: scores float [queries, documents]."""
    counter = CountVectorizer(token_pattern=r"\w+")
    counts = counter.fit_transform(documents).tocsc().astype(float)
    lengths = np.asarray(counts.sum(axis=1)).ravel()
    there = np.diff(counts.indptr)
    idf = np.log(1 + (len(documents) - there + 0.5) / (there + 0.5))
    rows = counts.indices
    norm = k1 * (1 - b + b * lengths / lengths.mean())
    counts.data = np.repeat(idf, there) * counts.data * (k1 + 1) / (counts.data + norm[rows])
    return np.asarray((counter.transform(queries) @ counts.T).todense())


def tfidf(queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
    """Cosines of TF-IDF vectors."""
    vectorizer = TfidfVectorizer(token_pattern=r"\w+", sublinear_tf=True)
    found = vectorizer.fit_transform(documents)
    return np.asarray((vectorizer.transform(queries) @ found.T).todense())


def embedded(client: httpx.Client, texts: Sequence[str]) -> np.ndarray:
    """The service's vectors."""
    vectors = []
    for start in range(0, len(texts), AT_ONCE):
        response = client.post("/v1/embeddings", json={"input": list(texts[start : start + AT_ONCE])})
        vectors += [one["embedding"] for one in response.raise_for_status().json()["data"]]
    return np.array(vectors)


def reranked(client: httpx.Client, queries: Sequence[str], documents: Sequence[str], scores: np.ndarray, number: int) -> np.ndarray:
    """Scores with the best `number` documents of each query in the order of the service; the others stay behind them."""
    made = np.full_like(scores, -2.0)
    for row, query in enumerate(queries):
        best = np.argsort(-scores[row], kind="stable")[:number]
        for start in range(0, len(best), AT_ONCE - 1):
            some = best[start : start + AT_ONCE - 1]
            response = client.post("/v1/rerank", json={"query": query, "documents": [documents[i] for i in some]})
            for found in response.raise_for_status().json()["results"]:
                made[row, some[found["index"]]] = found["relevance_score"]
    return made


def metrics(scores: np.ndarray, wanted: Sequence[int]) -> dict[str, float]:
    """Of one wanted document a query: recall@1, @10, MRR, nDCG@10. Ties count against."""
    right = scores[np.arange(len(wanted)), wanted]
    rank = (scores >= right[:, None]).sum(axis=1)
    return {
        "recall_at_1": float((rank <= 1).mean()),
        "recall_at_10": float((rank <= 10).mean()),
        "mrr": float((1 / rank).mean()),
        "ndcg_at_10": float(np.where(rank <= 10, 1 / np.log2(rank + 1), 0).mean()),
    }


def measure(
    client: httpx.Client, queries: Sequence[str], documents: Sequence[str], *, candidates: int = CANDIDATES
) -> dict[str, dict[str, float]]:
    """Each way's metrics; the i-th document is the i-th query's."""
    wanted = range(len(queries))
    lexical = bm25(queries, documents)
    vectors = embedded(client, queries) @ embedded(client, documents).T
    return {
        "TF-IDF": metrics(tfidf(queries, documents), wanted),
        "BM25": metrics(lexical, wanted),
        "embeddings": metrics(vectors, wanted),
        f"BM25's first {candidates}, reranked": metrics(reranked(client, queries, documents, lexical, candidates), wanted),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("file")
    arguments = parser.parse_args()
    with open(arguments.file, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    with httpx.Client(base_url=arguments.url, timeout=120) as client:
        for way, found in measure(client, [row["anchor"] for row in rows], [row["positive"] for row in rows]).items():
            print(f"{way:<30}" + "".join(f"  {name} {value:.4f}" for name, value in found.items()))
