"""What a person sees: names with brackets come through, the bar moves, values are written as people read them."""

from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console

from gankit.data import Summary
from gankit.run import Result
from gankit.rundir import RunDir
from gankit.terminal import Terminal, metrics_table, show_result, shown
from gankit.testing import tiny_gan
from gankit.training import Stats


def printed(width: int = 100, terminal: bool = False) -> tuple[Console, StringIO]:
    buffer = StringIO()
    return Console(file=buffer, width=width, force_terminal=terminal, color_system=None), buffer


def test_texts_of_the_user_are_never_taken_for_markup(tmp_path: Path) -> None:
    console, buffer = printed()
    summary = Summary(
        name="[bold]x", count=3, held_out=1, shape=(2,), value_range=(0.0, 1.0), channels=None,
        class_histogram={"[red]": 3}, warnings=["columns [a, b] are constant"], examined=3,
    )  # fmt: skip
    Terminal(console).data(summary)
    for text in ("[bold]x", "[red] 3", "columns [a, b] are constant"):
        assert text in buffer.getvalue()


def test_the_end_names_what_is_there_and_how_to_go_on(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "[a]", "x")
    (run.samples / "fakes-000001.png").touch()
    (run.samples / "fakes-000002.png").touch()
    result = Result(run, "interrupted", 2, 5, {"modes": 7.0}, {"modes": 8.0}, {}, 1.0, [])
    console, buffer = printed(300)
    show_result(console, result)
    assert "[a]/samples/fakes-000002.png" in buffer.getvalue()
    assert "gankit[plot]" in buffer.getvalue()
    assert f"gankit resume {run.path}" in buffer.getvalue()


def half_way(folder: Path, *where: Any) -> str:
    """What is shown of a run of ten steps that was evaluated after four and is at its fifth."""
    console, buffer = printed(*where)
    terminal = Terminal(console)
    stats = Stats(1, lambda row: None)
    gan = tiny_gan(core={"stats": stats})
    terminal.start(gan, RunDir.create(folder, None, "x"), 10)
    stats.last = {"d_loss": 1.25, "g_loss": 0.75}
    terminal.metrics(4, {"modes": 8.0, "high_quality": 0.931})
    terminal.drawn = 0.0
    terminal.post_step(gan, "g", 5)
    terminal.stop()
    return buffer.getvalue()


def test_the_bar_shows_losses_metrics_and_time_left(tmp_path: Path) -> None:
    seen = half_way(tmp_path, 100, True)
    for text in ("5/10", "D 1.250  G 0.750", "modes captured 8", "high quality 93.1%", "left"):
        assert text in seen


def test_a_log_has_one_line_for_an_event_however_narrow(tmp_path: Path) -> None:
    evaluated, trained = half_way(tmp_path, 40).splitlines()[-2:]
    assert evaluated == "step 4/10  D 1.250  G 0.750  modes captured 8  high quality 93.1%"
    assert trained.startswith(evaluated.replace("step 4", "step 5")) and trained.endswith(" s left")


def test_a_total_that_is_not_known_is_not_shown_and_its_line_is_ended() -> None:
    console, buffer = printed(100, True)
    terminal = Terminal(console)
    for done in range(1, 1000):
        terminal.loading(done, 0)
    assert buffer.getvalue().count("reading") < 100
    terminal.drawn = 0.0
    terminal.loading(1000, 0)
    terminal.loading(1000, 1000)
    assert buffer.getvalue().endswith("reading 1000\rreading 1000/1000\n")


def test_values() -> None:
    assert shown("high_quality", 0.98765) == "98.8%"
    assert shown("anything", None) == "-"
    console, buffer = printed()
    console.print(metrics_table({"modes": 7.0, "brightness": 0.5}, {"modes": 8.0}))
    lines = [line.split() for line in buffer.getvalue().splitlines()]
    assert ["modes", "captured", "7", "8"] in lines
    assert ["brightness", "0.5", "-"] in lines
