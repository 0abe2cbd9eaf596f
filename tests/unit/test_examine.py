"""Two models beside each other: what cannot be compared is refused in words."""

from types import SimpleNamespace

import pytest

from danlu import examine
from danlu.errors import SpecError


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        (("chat", []), ("preference", []), "chat@v1 is a model for chat, other@v1 a model for preference: their answers"),
        (
            ("classification", ["bad", "good"]),
            ("classification", ["ham", "spam"]),
            "chat@v1 is a model for classification (labels bad, good), other@v1 a model for classification (labels ham, spam)",
        ),
    ],
)
def test_models_of_two_kinds_are_not_compared(one, other, said, monkeypatch):
    def bundle_of(kind, labels):
        return SimpleNamespace(meta=SimpleNamespace(task=SimpleNamespace(kind=kind), labels=labels))

    found = {"chat@v1": bundle_of(*one), "other@v1": bundle_of(*other)}
    monkeypatch.setattr(examine, "open_bundle", lambda name, storage: found[name])
    with pytest.raises(SpecError) as refused:
        examine.compare("chat@v1", "other@v1")
    assert said in str(refused.value)
