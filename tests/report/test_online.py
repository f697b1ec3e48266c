"""Online accuracy in the report: read from train.csv, and left out where no agent reports it."""

import re

import pytest

from clbench.report import write_report
from clbench.report.runs import Run, load_run


def online(path, accuracies, count=50):
    rows = [f"{100 * i},{i},{a},{count}" for i, a in enumerate(accuracies, start=1)]
    (path / "train.csv").write_text("step,phase,online_accuracy,online_count\n" + "\n".join(rows) + "\n")
    return path


def test_the_page_shows_online_accuracy_and_loss_of_plasticity(write_run, tmp_path):
    paths = [online(write_run(tmp_path / "runs" / f"a{s}", seed=s), [0.9, 0.6, 0.3 + 0.1 * s]) for s in (0, 1)]
    paths.append(write_run(tmp_path / "runs" / "b", agent="other"))  # does not report it
    page = write_report(paths, tmp_path / "page.html").read_text()
    table = page[
        page.index("<th>Online accuracy") if "<th>Online accuracy" in page else page.index("Online accuracy") :
    ]
    cells = re.findall(r"<t[dh][^>]*>([^<]*)", table[: table.index("</table>")])
    values = [c for c in cells if c]
    assert values[values.index("bc") + 1 :][:2] == ["0.617", "0.550"]  # means of 0.6 and 0.633, of 0.6 and 0.5
    assert values[values.index("other") + 1 :][:2] == ["\N{EN DASH}"] * 2


def test_without_it_nothing_is_shown(write_run, tmp_path):
    page = write_report([write_run(tmp_path / "runs" / "a")], tmp_path / "page.html").read_text()
    assert "Online accuracy" not in page


def test_an_interrupted_run_has_what_it_finished(write_run, tmp_path):
    path = online(write_run(tmp_path / "runs" / "a", status="interrupted", stop_after=2), [0.9, 0.6])
    run = load_run(path)
    assert isinstance(run, Run)
    assert run.online["per_phase"] == [pytest.approx(0.9), None, None]
