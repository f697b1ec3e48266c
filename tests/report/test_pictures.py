"""The rollout picture: one row per task, drawn from the environment's own pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import toys
from matplotlib.image import imread

import clbench
from clbench.report import write_report
from clbench.report.pictures import save_rollout
from clbench.rng import get_global_state


def test_a_picture_of_one_step_and_of_long_episodes(tmp_path: Path) -> None:
    digits = clbench.run("toys:digits", toys.Linear, out=tmp_path / "digits", tensorboard=False, budget=20)
    rooms = clbench.run(
        "two-rooms-doors", "random", out=tmp_path / "rooms", tensorboard=False, budget=2, eval_every=0,
        stream_options={"transitions": 900, "episodes": 2},
    )  # fmt: skip
    heights = []
    for result in (digits, rooms):
        state = get_global_state()["torch"].clone()
        path = save_rollout(result)
        assert (get_global_state()["torch"] == state).all(), "drawing must not disturb the process-wide generators"
        assert path == result.path / "rollout.png"
        picture = imread(path)
        heights.append(picture.shape[0])
        assert np.ptp(picture[..., :3]) > 0.5
    assert heights[1] > heights[0], "five tasks need more rows than three"
    page = write_report([digits.path, rooms.path], tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2


def test_an_environment_without_pictures_is_no_error(tmp_path: Path) -> None:
    result = clbench.run("toys:coins", "random", out=tmp_path / "run", tensorboard=False, budget=8)
    assert save_rollout(result) is None
    assert not (tmp_path / "run" / "rollout.png").exists()
