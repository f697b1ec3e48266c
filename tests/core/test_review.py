"""Holes that a hostile review found in the core, each with what closed it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
import pytest
import torch
import toys

import clbench
from clbench import experiments, records
from clbench.cli.main import main
from clbench.contracts import VectorEnv
from clbench.errors import ConfigError, ContractError, Interrupted
from clbench.evaluate import check_actions, evaluate
from clbench.loop import Loop, segments_of
from clbench.records import RunDirectory, load_checkpoint
from clbench.streams.core import make_stream

FAST: dict[str, Any] = {"tensorboard": False, "stream_options": {"tasks": 2}, "budget": 20, "eval_every": 0}


def run(path: Path, agent: Any = toys.Linear, stream: Any = "toys:digits", **settings: Any) -> experiments.RunResult:
    return clbench.run(stream, agent, out=path, **{**FAST, **settings})


# -- an agent that looks for the task in everything it is given ----------------------------------------------------------


class DataSpy(toys.Linear):
    """Collects what it is given beside the data themselves."""

    seen: list[Any]

    def learn(self, experience, budget, *, rng):
        data = experience.dataset
        self.seen.append((budget, data.name, data.metadata))
        yield from super().learn(experience, budget, rng=rng)


class EnvSpy(toys.Walker):
    found: list[Any]

    def learn(self, experience, budget, *, rng):
        env = experience.env
        assert isinstance(env, VectorEnv)
        self.found.append((budget, hasattr(env, "envs"), hasattr(env, "name"), hasattr(env, "_obs")))
        yield from super().learn(experience, budget, rng=rng)


class TestWhatTheAgentIsGivenHidesTheTask:
    @pytest.mark.parametrize("reveals", ["nothing", "boundaries"])
    def test_data_sets_do_not_name_the_task(self, tmp_path: Path, reveals: str) -> None:
        DataSpy.seen = []
        run(tmp_path / "run", DataSpy, reveals=reveals)
        assert len({json.dumps(s) for s in DataSpy.seen}) == 1, DataSpy.seen

    def test_they_do_where_the_stream_reveals_it(self, tmp_path: Path) -> None:
        DataSpy.seen = []
        run(tmp_path / "run", DataSpy, reveals="task_id")
        assert len({name for _, name, _ in DataSpy.seen}) == 2

    @pytest.mark.parametrize(("reveals", "visible"), [("nothing", False), ("boundaries", False), ("task_id", True)])
    def test_environments_show_the_contract_only(self, tmp_path: Path, reveals: str, visible: bool) -> None:
        EnvSpy.found = []
        run(tmp_path / "run", EnvSpy, "toys:coins", reveals=reveals, stream_options={}, budget=64)
        assert {s[1:] for s in EnvSpy.found} == {(visible,) * 3}

    def test_segments_leave_room_for_a_few_steps_of_every_row(self) -> None:
        stream = make_stream("toys:digits", reveals="nothing", schedule="blurred", budget=240)
        assert min(b for _, b in segments_of(stream)) < 8 <= min(b for _, b in segments_of(stream, 8))
        assert sum(b for _, b in segments_of(stream, 8)) == 3 * 240

    def test_evaluations_within_hidden_phases_are_on_time(self, tmp_path: Path) -> None:
        run(tmp_path / "told", eval_every=5)
        run(tmp_path / "hidden", eval_every=5, reveals="nothing")
        points = [
            [row.split(",")[:5] for row in (tmp_path / name / "eval.csv").read_text().splitlines()]
            for name in ("told", "hidden")
        ]
        assert points[0] == points[1]


# -- resume ----------------------------------------------------------------------------------------------------------------


class GlobalData(toys.Linear):
    """Draws from the process-wide generator, which belongs to the agent while a run lasts."""

    def learn(self, experience, budget, *, rng):
        for metrics in super().learn(experience, budget, rng=rng):
            self.w += 0.01 * torch.randn(self.w.shape)
            yield metrics


def test_a_data_set_that_draws_from_the_process_does_not_disturb_resuming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clbench import loop

    load = loop.load_dataset

    def drawing(*arguments: Any) -> Any:
        torch.rand(3)
        return load(*arguments)

    monkeypatch.setattr(loop, "load_dataset", drawing)
    run(tmp_path / "whole", GlobalData)
    stop_once_at(tmp_path / "stopped", 25, GlobalData)
    run(tmp_path / "stopped", GlobalData)
    assert (tmp_path / "whole" / "eval.csv").read_bytes() == (tmp_path / "stopped" / "eval.csv").read_bytes()


def stop_once_at(path: Path, step: int, *arguments: Any, error: type[BaseException] = Interrupted, **settings: Any):
    make = experiments._make_loop

    def made(resolved: Any, directory: Any, should_stop: Any) -> Loop:
        def stop() -> None:
            if loop.position.step >= step:
                raise error("stop")

        loop = make(resolved, directory, stop)
        return loop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(experiments, "_make_loop", made)
        run(path, *arguments, **settings)


def test_a_hard_stop_between_logging_an_evaluation_and_noting_it(tmp_path: Path) -> None:
    """KeyboardInterrupt may come between any two statements; what is then half done must not be saved."""
    run(tmp_path / "whole", eval_every=5)
    append, calls = records.GrowingCsv.append, []

    def append_and_stop(self: Any, rows: Any) -> None:
        append(self, rows)
        calls.append(len(rows))
        if self.path.name == "eval.csv" and len(rows) > 1 and sum(n > 1 for n in calls) == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(records.GrowingCsv, "append", append_and_stop)
        run(tmp_path / "stopped", eval_every=5)
    run(tmp_path / "stopped", eval_every=5)
    for name in ("eval.csv", "results.json", "train.csv"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes(), name


def test_tensorboard_keeps_what_belongs_to_the_checkpoint_and_drops_the_rest(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stop_once_at(tmp_path / "run", 25, tensorboard=True, eval_every=5)
    run(tmp_path / "run", tensorboard=True, eval_every=5)
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    steps = [e.step for e in events.Scalars("train/loss")]
    assert steps == list(range(1, 41))
    assert [e.step for e in events.Scalars("evaluation/task-0")] == list(range(0, 41, 5))


def test_deleting_a_run_is_never_half_done_in_a_way_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "run")
    unlink, order = Path.unlink, []

    def watched(self: Path, missing_ok: bool = False) -> None:
        order.append(self.name)
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", watched)
    RunDirectory(tmp_path / "run").clear()
    assert order[0] == "checkpoint.pt" and order[-1] == "config.json"


def test_a_complete_run_keeps_its_forward_transfer_when_asked_without_references(tmp_path: Path) -> None:
    made = run(tmp_path / "runs" / "a", references=True)
    again = run(tmp_path / "runs" / "a")
    assert made.metrics["forward_transfer"] is not None
    assert again.results == made.results == json.loads((tmp_path / "runs" / "a" / "results.json").read_text())


def test_results_say_where_the_run_began_also_after_a_resume_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Someone commits while the run is stopped: the commit of the start stands, and the bytes are the same."""
    run(tmp_path / "whole")
    stop_once_at(tmp_path / "stopped", 5)
    monkeypatch.setattr(experiments, "provenance", lambda: {"git": "another commit"})
    run(tmp_path / "stopped")
    whole, stopped = ((tmp_path / d / "results.json").read_bytes() for d in ("whole", "stopped"))
    assert whole == stopped
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert json.loads(whole)["provenance"] == config["provenance"]


def test_defaults_in_full_or_left_out_are_the_same_run(tmp_path: Path) -> None:
    first = run(tmp_path / "run", agent_options={"lr": 0.5}, schedule_options={})
    assert run(tmp_path / "run").results == first.results
    with pytest.raises(ConfigError, match="another configuration"):
        run(tmp_path / "run", agent_options={"lr": 0.25})


# -- reference runs ------------------------------------------------------------------------------------------------------


class TestReferences:
    def test_two_processes_that_need_the_same_reference(self, tmp_path: Path) -> None:
        program = (
            "import sys, clbench\n"
            "r = clbench.run('toys:digits', 'toys:Linear', out=sys.argv[1], references=True, tensorboard=False,\n"
            "                reference_root='references', budget=20)\n"
            "print(r.metrics['forward_transfer'])\n"
        )
        environment = {**os.environ, "PYTHONPATH": str(Path(toys.__file__).parent), "OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", program, name], cwd=tmp_path, env=environment, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
            for name in ("a", "b")
        ]  # fmt: skip
        answers = [p.communicate(timeout=120) for p in processes]
        assert [p.returncode for p in processes] == [0, 0], answers
        assert answers[0][0] == answers[1][0]
        assert len(list((tmp_path / "references").glob("*/eval.csv"))) == 1

    def test_waiting_for_a_folder_that_its_owner_deletes(self, tmp_path: Path) -> None:
        """The owner leaves no run and so deletes the lock it held: the next one must not be content with that file."""
        owner, waiting, refused = (RunDirectory(tmp_path / "run") for _ in range(3))
        owner.open()
        with pytest.raises(ConfigError, match="Another process is writing"):
            refused.open()
        thread = threading.Thread(target=waiting.open, kwargs={"wait": True})
        thread.start()
        owner.close()
        thread.join(30)
        assert (tmp_path / "run" / ".lock").exists()
        with pytest.raises(ConfigError, match="Another process is writing"):
            refused.open()
        waiting.close()

    def test_a_folder_that_goes_while_mkdir_looks_is_made_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """pathlib's mkdir(exist_ok=True) raises where the folder is there at first and gone when it looks what it is."""
        mkdir, calls = Path.mkdir, []

        def once(self: Path, *arguments: Any, **options: Any) -> None:
            calls.append(self)
            if len(calls) == 1:
                raise FileExistsError(17, "File exists")
            mkdir(self, *arguments, **options)

        monkeypatch.setattr(Path, "mkdir", once)
        directory = RunDirectory(tmp_path / "run")
        directory.open(wait=True)
        assert (tmp_path / "run" / ".lock").exists() and len(calls) == 2
        directory.close()
        (tmp_path / "file").write_text("")
        calls.clear()
        with pytest.raises(ConfigError, match="File exists"):
            RunDirectory(tmp_path / "file").open(wait=True)

    def test_a_damaged_reference_is_made_again(self, tmp_path: Path) -> None:
        root = tmp_path / "references"
        first = run(tmp_path / "a", references=True, reference_root=root)
        (folder,) = root.iterdir()
        (folder / "results.json").write_text("{")
        again = run(tmp_path / "b", references=True, reference_root=root)
        assert again.metrics["forward_transfer"] == first.metrics["forward_transfer"]

    def test_an_edited_agent_has_references_of_its_own(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(str(tmp_path))
        source = "import toys\nclass Mine(toys.Linear):\n    pass\n"
        for text in (source, source + "    speed = 2\n"):
            (tmp_path / "edited_agent.py").write_text(text)
            sys.modules.pop("edited_agent", None)
            from importlib import import_module, invalidate_caches

            invalidate_caches()
            agent = import_module("edited_agent").Mine
            run(tmp_path / str(len(text)), agent, references=True, reference_root=tmp_path / "references")
        assert len(list((tmp_path / "references").iterdir())) == 2


# -- plug-ins that are wrong -----------------------------------------------------------------------------------------------


class ArrayState(toys.Linear):
    def state_dict(self):
        return {"w": np.ones(3), "told": []}


class StateRaises(toys.Linear):
    def state_dict(self):
        raise KeyError("optimizer")


class Texts(toys.Linear):
    def learn(self, experience, budget, *, rng):
        yield {"loss": "low"}  # type: ignore[dict-item]


class NanStep(toys.Linear):
    def learn(self, experience, budget, *, rng):
        yield {"step": float("nan")}


class NotADataclass(toys.Linear):
    class Config:
        pass


class TooManyActions(toys.Walker):
    def learn(self, experience, budget, *, rng):
        experience.env.step(torch.zeros(experience.env.num_envs, 1, dtype=torch.int64))
        yield {}


@pytest.mark.parametrize(
    ("agent", "stream", "message"),
    [
        (
            ArrayState,
            "toys:digits",
            r"ArrayState.state_dict\(\) holds a ndarray at '.*'; only tensors and plain Python",
        ),
        (StateRaises, "toys:digits", "StateRaises.state_dict raised KeyError"),
        (Texts, "toys:digits", "learn yielded loss='low'; metrics are single numbers"),
        (NanStep, "toys:digits", "learn yielded step=nan; it must be a whole number"),
        (TooManyActions, "toys:coins", r"learn sent actions of shape \(8, 1\), expected \(8,\)"),
    ],
)
def test_one_sentence_for_each_mistake_of_an_agent(tmp_path: Path, agent: Any, stream: str, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        run(tmp_path / "run", agent, stream, stream_options={})


def test_a_state_that_cannot_be_read_back_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ContractError):
        run(tmp_path / "run", ArrayState)
    assert not (tmp_path / "run").exists()


class Breaks(toys.SlowFailures):
    def step(self, action: Any) -> Any:
        raise OSError("the simulator is gone")


gymnasium.register("toys/Breaks-v0", entry_point=Breaks, max_episode_steps=5)


def test_an_environment_that_fails_in_evaluation_is_named(tmp_path: Path) -> None:
    task = clbench.Task("t", "toys/Breaks-v0")
    stream = clbench.Stream("breaks", (task,), (clbench.Phase("t", 8),))
    with pytest.raises(ContractError, match=r"environment toys/Breaks-v0.step raised OSError.*simulator is gone"):
        clbench.run(stream, toys.Walker, out=tmp_path / "run", tensorboard=False)


class WillNotStart(toys.SlowFailures):
    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        raise RuntimeError("no display")


gymnasium.register("toys/WillNotStart-v0", entry_point=WillNotStart, max_episode_steps=5)


@pytest.mark.parametrize("evaluates", [True, False])
def test_an_environment_that_does_not_start_is_named(tmp_path: Path, evaluates: bool) -> None:
    task = clbench.Task("t", "toys/WillNotStart-v0")
    stream = clbench.Stream("stuck", (task,), (clbench.Phase("t", 8),))
    with pytest.raises(ContractError, match="environment .*raised RuntimeError.*no display"):
        clbench.run(stream, toys.Walker, out=tmp_path / "run", tensorboard=False, evaluate=evaluates)
    assert not (tmp_path / "run").exists()


def test_a_stream_that_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    task = clbench.Task("t", "toys/SlowFailures-v0", {"name_of_success": b"is_success"})
    stream = clbench.Stream("bytes", (task,), (clbench.Phase("t", 8),))
    with pytest.raises(ConfigError, match="Cannot write .*not JSON serializable.*plain values"):
        clbench.run(stream, toys.Walker, out=tmp_path / "run", tensorboard=False)
    assert not (tmp_path / "run").exists()


# -- actions ---------------------------------------------------------------------------------------------------------------


def test_actions_reach_the_environment_in_one_type() -> None:
    discrete = gymnasium.spaces.Discrete(3)
    assert check_actions(torch.zeros(2, dtype=torch.uint8), discrete, 2, "A").dtype == torch.int64
    box = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float64)
    assert check_actions(torch.full((1, 2), 3.0, dtype=torch.float64), box, 1, "A").dtype == torch.float32


def test_training_clips_actions_as_evaluation_does(tmp_path: Path) -> None:
    """Else an agent would learn in a world where it can run, and be tested in one where it can only walk."""
    moved = []

    class Runs(clbench.Agent):
        requires = frozenset({"env"})

        def act(self, obs, memory, first, *, rng, task=None, explore=False):
            return torch.zeros(len(first), 2), memory

        def learn(self, experience, budget, *, rng):
            env = experience.env
            options = {"start": torch.tensor([[10.0, 30.0]] * env.num_envs)}
            before, _ = env.reset(seed=0, options=options)
            after, *_ = env.step(torch.full((env.num_envs, 2), 8.0))
            moved.append(float((after["observation"] - before["observation"]).abs().max()))
            yield {"step": budget}

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    clbench.run("two-rooms-doors", Runs, out=tmp_path / "run", tensorboard=False, evaluate=False, budget=8)
    assert moved and max(moved) <= 1.8 + 1e-5


# -- command line ----------------------------------------------------------------------------------------------------------


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return int(stop.value.code or 0)


def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    """``clbench list | head -0``: no message, whatever was still in the buffer."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "clbench", "list"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 0 and done.stderr == ""


def test_without_stdin_and_stderr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    options = ["--budget", "20", "--eval-every", "0", "--no-report", "--no-tensorboard"]
    assert command("run", "toys:digits", "--agent", "toys:Linear", "--out", str(tmp_path / "r"), *options) == 0
    assert command("run", "toys:nothing", "--agent", "toys:Linear") == 2


def test_a_config_that_is_no_dataclass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(toys, "NotADataclass", NotADataclass, raising=False)
    assert command("run", "toys:digits", "--agent", "toys:NotADataclass", "--out", str(tmp_path / "r")) == 2
    assert "decorate it with @dataclass" in " ".join(capsys.readouterr().err.split())


def test_a_report_that_cannot_be_written(tmp_path: Path, capsys: Any) -> None:
    run(tmp_path / "run")
    (tmp_path / "file").write_text("in the way")
    assert command("report", str(tmp_path / "run"), "--out", str(tmp_path / "file" / "page.html")) == 2
    assert "Traceback" not in capsys.readouterr().err


@dataclasses.dataclass
class Net:
    hidden: tuple[int, ...] = (8, 8)
    activation: Literal["relu", "tanh"] = "relu"


class Optioned(toys.Linear):
    @dataclasses.dataclass
    class Config:
        net: Net = dataclasses.field(default_factory=Net)
        lr: float | None = None
        pair: tuple[int, float] = (1, 2.0)
        mode: Literal["a", "b"] | None = None

    def learn(self, experience, budget, *, rng):
        yield {"step": budget}


def test_options_of_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toys, "Optioned", Optioned, raising=False)
    options = ["--agent.net.hidden", "4", "5", "--agent.net.activation", "tanh", "--agent.lr", "0.3", "--agent.pair", "3",
               "4.5", "--agent.mode", "b"]  # fmt: skip
    arguments = ["run", "toys:digits", "--agent", "toys:Optioned", "--out", str(tmp_path / "ünï cødé"), "--budget", "9"]
    for _ in range(2):  # the second time it is complete
        assert command(*arguments, *options, "--no-report", "--no-tensorboard") == 0
    saved = json.loads((tmp_path / "ünï cødé" / "config.json").read_text())["config"]["agent_options"]
    assert saved == {"net": {"hidden": [4, 5], "activation": "tanh"}, "lr": 0.3, "pair": [3, 4.5], "mode": "b"}


def test_the_evaluation_of_an_unlimited_environment_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    from clbench import evaluate as module

    class Endless(toys.SlowFailures):
        def step(self, action: Any) -> Any:
            return self._obs(), 0.0, False, False, {"is_success": False}

    gymnasium.register("toys/Unlimited-v0", entry_point=Endless)
    monkeypatch.setattr(module, "MAX_EPISODE_STEPS", 30)
    env = clbench.make_env("toys/Unlimited-v0", 2, autoreset="disabled")
    assert env.max_episode_steps is None
    agent = toys.Walker(None, None, device=torch.device("cpu"), rng=torch.Generator())  # type: ignore[arg-type]
    with pytest.raises(ContractError, match="did not end within 30 steps.*max_episode_steps"):
        evaluate(agent, clbench.Task("t", "toys/Unlimited-v0"), env, rng=torch.Generator())


def test_checkpoints_hold_plain_data_only(tmp_path: Path) -> None:
    run(tmp_path / "run")
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["agent_name"] == "toys:Linear"
