"""The forms of S²-Attn that are compared compute S²-Attn."""

import argparse

import pytest
import torch

from benchmarks import attention_forms

OPTIONS = argparse.Namespace(head_dim=16, device="cpu", dtype=torch.float32)


def test_all_forms_give_what_the_definition_gives() -> None:
    attention_forms.check(OPTIONS)


def test_the_published_form_with_its_leak_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rolled into the last group, the first tokens see the last ones."""

    monkeypatch.setattr(attention_forms, "without_leak", lambda scores: None)
    with pytest.raises(AssertionError):
        attention_forms.check(OPTIONS)


@pytest.mark.parametrize(
    ("name", "slower", "share", "verdict"),
    [
        ("ours", 1.0, 1.0, ""),
        ("rolled", 1.1, 0.7, "time PASS, memory PASS"),
        ("rolled", 1.05, 0.71, "time FAIL, memory FAIL"),
        ("rolled", 1.095, 0.5, "time NOISE, memory PASS"),
        ("original", 2.0, 0.1, "time FAIL"),
        ("original", 3.0, 0.9, "time PASS"),
    ],
)
def test_verdicts(name: str, slower: float, share: float, verdict: str) -> None:
    assert attention_forms.judge(name, slower, share, spread=0.01) == verdict
