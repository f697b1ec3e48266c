"""The command line as a user meets it: exit codes, one-paragraph errors, Ctrl-C, kill -9."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from clbench.cli.main import main
from clbench.records import load_checkpoint, state_digest
from clbench.registry import entries, resolve


def clbench(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    out = capsys.readouterr()
    return int(stop.value.code or 0), out.out, out.err


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "clbench", *arguments],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_run_prints_the_metrics_and_writes_a_report(tmp_path: Path, capsys: Any) -> None:
    code, out, err = clbench(
        capsys, "run", "toys:digits", "--agent", "toys:Linear", "--agent.lr", "0.25", "--stream.tasks", "2",
        "--budget", "20", "--eval-every", "10", "--out", str(tmp_path / "run"), "--no-tensorboard",
    )  # fmt: skip
    assert code == 0, err
    assert "average_performance" in out and "add --references" in out
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["config"]["agent_options"] == {"lr": 0.25}
    assert config["phases"] == [{"task": f"task-{i}", "budget": 20, "visit": 1} for i in range(2)]
    assert "<html" in (tmp_path / "run" / "report.html").read_text()[:500].lower()
    code, out, err = clbench(capsys, "report", str(tmp_path), "--out", str(tmp_path / "page.html"))
    assert code == 0 and (tmp_path / "page.html").exists() and "toys:Linear" in out, err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "digits-permutd", "--agent", "bc"], "Unknown stream 'digits-permutd'. Did you mean 'digits-permuted'"),
        (["run", "digits-permuted", "--agent", "bcc"], "Unknown agent 'bcc'. Did you mean 'bc'"),
        (["run", "digits-permuted"], "Say which agent to run"),
        (["run", "--agent", "bc"], "Say which stream to run"),
        (["run", "digits-permuted", "--agent", "nowhere:Agent"], "There is no module 'nowhere'"),
        (["run", "digits-permuted", "--agent", "toys:Nothing"], "Unknown attribute 'Nothing' in module toys"),
        (["run", "digits-permuted", "--agent", "bc", "--budget", "-3"], "budget must be a positive number"),
        (["run", "digits-permuted", "--agent", "bc", "--device", "cuda:99"], "device"),
        (["run", "digits-permuted", "--agent", "sb3-sac"], "requires 'continuous'"),
        (["run", "toys:digits", "--agent", "toys:NeedsTaskId"], "add --reveals task_id"),
        (["run", "toys:digits", "--agent", "toys:WrongShape"], "one row per environment"),
        (["run", "toys:digits", "--agent", "toys:Raises"], "ZeroDivisionError"),
        (["runn"], "Unknown verb 'runn'. Did you mean 'run'"),
        (["list", "agnets"], "Did you mean 'agents'"),
        (["bench", "env"], "Did you mean 'envs'"),
        (["report", "nowhere"], "nowhere"),
        (["check", "nowhere:Thing"], "There is no module 'nowhere'"),
    ],
)
def test_bad_input_is_one_paragraph_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = clbench(capsys, *arguments)
    assert code == 2
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    if "toys:Raises" not in arguments:  # (an agent that fails in the middle leaves its checkpoint)
        assert not [p for p in tmp_path.rglob("*") if p.suffix in (".csv", ".pt", ".html")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--agent.lrr", "0.1"], "--agent.lr"), (["--agent.lr", "fast"], "fast"), (["--seed", "one"], "one")],
)
def test_wrong_options_name_the_nearest(tmp_path: Path, capsys: Any, arguments: list[str], message: str) -> None:
    code, out, err = clbench(
        capsys, "run", "toys:digits", "--agent", "toys:Linear", *arguments, "--out", str(tmp_path / "r")
    )
    assert code == 2 and message in err
    assert not (tmp_path / "r").exists()


def test_traceback_on_request(tmp_path: Path) -> None:
    from clbench.errors import ConfigError

    with pytest.raises(ConfigError):
        main(["run", "nope", "--agent", "bc", "--traceback"])


def test_unwritable_output(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").write_text("in the way")
    code, _, err = clbench(
        capsys, "run", "toys:digits", "--agent", "toys:Linear", "--out", str(tmp_path / "file" / "run")
    )
    assert code == 2 and "Cannot write" in err and "--out" in err
    assert (tmp_path / "file").read_text() == "in the way"


def test_full_disk_keeps_the_last_checkpoint(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up at the second checkpoint; afterwards the same command completes the run."""
    import errno

    from clbench import records

    arguments = ["run", "toys:digits", "--agent", "toys:Linear", "--out", str(tmp_path / "run"), "--no-tensorboard"]
    writes = iter(range(1000))
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if next(writes) > 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(records.os, "fsync", full)
    code, _, err = clbench(capsys, *arguments)
    assert code == 2 and "disk is full" in " ".join(err.split())
    assert not list((tmp_path / "run").glob(".*.tmp")), "no half-written file stays"
    load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    monkeypatch.undo()
    code, _, err = clbench(capsys, *arguments)
    assert code == 0, err
    assert json.loads((tmp_path / "run" / "results.json").read_text())["status"] == "complete"


def test_list_json(capsys: Any) -> None:
    code, out, _ = clbench(capsys, "list", "--json")
    listing = json.loads(out)
    assert code == 0
    assert {"random", "bc", "sb3-ppo", "sb3-dqn", "sb3-sac", "sb3-td3"} <= {e["name"] for e in listing["agents"]}
    assert {"two-rooms-doors", "digits-permuted", "digits-split", "digits-rotated", "minigrid-5"} <= {
        e["name"] for e in listing["streams"]
    }
    assert all(e["summary"] for found in listing.values() for e in found if not e["name"].startswith("test-"))
    code, out, _ = clbench(capsys, "list", "agents", "--json")
    assert code == 0 and list(json.loads(out)) == ["agents"]


def test_importing_and_listing_need_no_torch() -> None:
    program = (
        "import sys, clbench\n"
        "assert 'torch' not in sys.modules, 'import clbench'\n"
        "from clbench.cli.main import main\n"
        "try:\n    main(['list', '--json'])\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'stable_baselines3', 'minigrid', 'matplotlib', 'sklearn', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "clbench.Agent\n"
        "assert 'torch' not in sys.modules, 'the contracts'\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


RUN = ["run", "toys:digits", "--agent", "toys:Slow", "--budget", "120", "--eval-every", "30", "--no-tensorboard",
       "--no-report", "--checkpoint-seconds", "0"]  # fmt: skip


def same_run(first: Path, second: Path) -> None:
    for name in ("eval.csv", "train.csv"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    # the runs began at different times: somebody may have committed in between, and provenance would say so
    results = [json.loads((p / "results.json").read_text()) | {"provenance": None} for p in (first, second)]
    assert json.dumps(results[0]) == json.dumps(results[1])
    states = [state_digest(load_checkpoint(p / "checkpoint.pt")["agent"]) for p in (first, second)]
    assert states[0] == states[1]


@pytest.mark.usefixtures("toys_on_path")
def test_ctrl_c_saves_exits_130_and_resumes(tmp_path: Path, capsys: Any) -> None:
    assert clbench(capsys, *RUN, "--out", str(tmp_path / "whole"))[0] == 0
    process = start(tmp_path, *RUN, "--out", "stopped")
    wait_for(tmp_path / "stopped" / "train.csv", process, rows=20)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "give the same command again" in err
    results = json.loads((tmp_path / "stopped" / "results.json").read_text())
    assert results["status"] == "interrupted"
    assert clbench(capsys, *RUN, "--out", str(tmp_path / "stopped"))[0] == 0
    same_run(tmp_path / "whole", tmp_path / "stopped")


def wait_for(file: Path, process: subprocess.Popen[str], rows: int) -> None:
    """Until the growing file has that many lines (the process is at work)."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if file.exists() and len(file.read_text().splitlines()) > rows:
            return
        time.sleep(0.01)
    raise AssertionError(process.communicate()[1] if process.poll() is not None else "nothing was written")


@pytest.mark.usefixtures("toys_on_path")
def test_kill_at_random_moments_and_resume(tmp_path: Path, capsys: Any) -> None:
    """SIGKILL, the signal that no program can catch, at random moments until the run is complete."""
    kill_and_resume(tmp_path, capsys, RUN, kills=4, seed=0)


@pytest.mark.slow
@pytest.mark.usefixtures("toys_on_path")
@pytest.mark.parametrize("agent", sorted(entries("agents")))
def test_twenty_kills_for_every_registered_agent(tmp_path: Path, capsys: Any, agent: str) -> None:
    doors = ["two-rooms-doors", "--budget", "400"]
    small = ["--stream.episodes", "4", "--agent.planner-options", "samples", "64", "horizon", "8"]
    planned = ["two-rooms/size-634-v0", "--budget", "400", *small]
    special = {"sb3-sac": doors, "sb3-td3": doors, "pldm": planned, "eidetic-pldm": planned}
    goals = ["two-rooms/size-634-v0", "--budget", "400", "--stream.episodes", "4", "--agent.batch-size", "16"]
    usual = goals if "goal" in resolve("agents", agent).requires else ["digits-split", "--budget", "600"]
    arguments = ["run", *special.get(agent, usual), "--agent", agent, "--no-tensorboard",
                 "--no-report", "--checkpoint-seconds", "0"]  # fmt: skip
    kill_and_resume(tmp_path, capsys, arguments, kills=20, seed=1)


def kill_and_resume(tmp_path: Path, capsys: Any, arguments: list[str], kills: int, seed: int) -> None:
    """Kill the run ``kills`` times at random moments after its start-up, let it finish, compare with one left alone."""
    began = time.monotonic()
    process = start(tmp_path, *arguments, "--out", "whole")
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    whole = json.loads((tmp_path / "whole" / "timing.json").read_text())["wall_time_s"]["total"]
    start_up = max(time.monotonic() - began - whole, 0.5)
    moments = random.Random(seed)
    killed, pace = 0, 1.0
    while killed < kills:
        process = start(tmp_path, *arguments, "--out", "killed")
        try:
            process.wait(timeout=pace * (start_up + moments.uniform(0, 2.5 * whole / kills + 0.3)))
        except subprocess.TimeoutExpired:
            process.kill()
            killed += 1
        _, err = process.communicate()
        if process.returncode == 0:  # it got to the end before all kills: begin a new one and go on killing
            same_run(tmp_path / "whole", tmp_path / "killed")
            pace *= 0.8  # else a machine that has become faster since it was timed would never be caught at work
            for file in (tmp_path / "killed").iterdir():
                file.unlink()
        elif process.returncode != -signal.SIGKILL:
            raise AssertionError(err)
    process = start(tmp_path, *arguments, "--out", "killed")
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    same_run(tmp_path / "whole", tmp_path / "killed")
