"""What the demo keeps beside its outputs."""

from __future__ import annotations

from pathlib import Path

import pytest

from sae_harvest.common.errors import RunError
from sae_harvest.pipelines.demo import Figures


def test_figures_are_kept_with_what_they_were_measured_on(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    Figures(path).set("harvest", "a", rate=1.5)
    Figures(path).set("downstream", "b", delta_ce=0.1)
    assert Figures(path).get("harvest", "a") == {"of": "a", "rate": 1.5}
    assert Figures(path).get("harvest", "b") is None
    assert [p.name for p in tmp_path.iterdir()] == ["figures.json"]


def test_figures_that_cannot_be_written_leave_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "figures.json"
    Figures(path).set("harvest", "a", rate=1.5)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match=r"figures\.json.*No space left"):
        Figures(path).set("harvest", "a", rate=2.5)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["figures.json"]


@pytest.mark.parametrize(
    "text", ["{", "[]", "[" * 100_000, '{"harvest": 3}', '{"harvest": {"of": []}}', "\xff"]
)
def test_damaged_figures_are_one_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "figures.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(RunError, match=r"figures\.json is damaged .*; remove it and run again\."):
        Figures(path)
