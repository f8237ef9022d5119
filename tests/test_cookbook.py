"""The cookbook is true: every use runs as it stands, on a machine without a card."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "cookbook.md"
USES = re.findall(r"^## (.*?)$(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
SAID = {"Which": "take the ", "May": "height: 504 or 512", "How": "the largest: 1024 x 1024"}


def test_there_are_five() -> None:
    assert len(USES) == 5


@pytest.mark.parametrize(("title", "text"), USES, ids=[title.partition("?")[0] for title, _ in USES])
def test_a_use_runs_as_it_stands(
    title: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, title, "exec"), {"__name__": "__main__"})
    assert SAID.get(title.split()[0], "") in capsys.readouterr().out
