"""The progress bar on standard error."""

from __future__ import annotations

import pytest

from kif.progress import Progress

RECORD = {"steps": 12, "step": 4, "round": 1, "rounds": 3, "loss": 0.5, "memory_loss": 0.25, "skipped": 2}


def test_the_bar_shows_round_and_losses(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(True) as progress:
        progress.start("mood")
        progress.update(RECORD)
    shown = capsys.readouterr().err
    for part in ("mood", "4/12", "round=2/3", "loss=0.500", "memory=0.250", "skipped=2"):
        assert part in shown, part


def test_nothing_is_shown_where_it_is_not_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(False) as progress:
        progress.start("mood")
        progress.update(RECORD)
    assert capsys.readouterr().err == ""


def test_what_goes_on_is_said_and_bars_end(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(True) as progress:
        progress.say("nothing yet")
        progress.start("mood")
        progress.say("scoring sizes")
        assert "scoring sizes" in capsys.readouterr().err
        progress.start("moods")
        assert capsys.readouterr().err.count("\n") == 1
    # each bar ends with its line
    assert capsys.readouterr().err.endswith("\n")
