"""The loop: purity of evaluation, knowledge levels, protocols, resume, and what it says when a plug-in is wrong."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import toys

import clbench
from clbench import experiments
from clbench.errors import ConfigError, ContractError, DataError, Interrupted
from clbench.loop import Loop, Position, segments_of
from clbench.records import load_checkpoint, state_digest
from clbench.streams.core import make_stream

FAST: dict[str, Any] = {"tensorboard": False}


def run(path: Path, agent: Any = toys.Linear, stream: Any = "toys:digits", **settings: Any) -> experiments.RunResult:
    return clbench.run(stream, agent, out=path, **{**FAST, **settings})


@contextlib.contextmanager
def stopping_at(condition: Callable[[Position], bool]) -> Iterator[None]:
    """Ask the loop to stop, as Ctrl-C does, once ``condition`` holds."""
    make, stopped = experiments._make_loop, pytest.MonkeyPatch()

    def made(resolved: Any, directory: Any, should_stop: Any) -> Loop:
        def stop() -> None:
            if condition(loop.position):
                raise Interrupted("stop")

        loop = make(resolved, directory, stop)
        return loop

    stopped.setattr(experiments, "_make_loop", made)
    try:
        yield
    finally:
        stopped.undo()


def weights(result: experiments.RunResult) -> dict[str, str]:
    assert result.agent is not None
    return state_digest(result.agent.state_dict())


def test_a_run_writes_what_the_contract_names(tmp_path: Path) -> None:
    result = run(tmp_path / "run", tensorboard=True)
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"config.json", "eval.csv", "train.csv", "results.json", "checkpoint.pt"} <= names
    assert any(n.startswith("events.out.tfevents.") for n in names)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["schema"] == 1 and results["status"] == "complete"
    assert results["tasks"] == ["task-0", "task-1", "task-2"]
    assert len(results["matrix"]) == 4 and all(len(row) == 3 for row in results["matrix"])
    assert results["metrics"]["learning_accuracy"] > 0.5 > results["matrix"][0][0]
    assert results["cost"]["updates"] == 120
    header, *rows = (tmp_path / "run" / "eval.csv").read_text().splitlines()
    assert header == "phase,visit,step,task,episode,score,return,length"
    # row 0, then ten evaluations in each of three phases, of three tasks with thirty episodes each
    assert len(rows) == (1 + 3 * 10) * 3 * 30
    assert result.metrics["forward_transfer"] is None


class TestEvaluationIsPure:
    """Training with evaluation at every step, rarely, and never gives the same weights, bit for bit."""

    def final(self, path: Path, agent: Any, **settings: Any) -> dict[str, str]:
        return weights(run(path, agent, **settings))

    @pytest.mark.parametrize("agent", [toys.Linear, "bc", "sb3-ppo", "random"])
    def test_evaluation_never_changes_training(self, tmp_path: Path, agent: Any) -> None:
        settings = {"budget": 40, "num_envs": 4}
        if agent == "bc":
            settings["agent_options"] = {"hidden": (8,)}
        always = self.final(tmp_path / "always", agent, eval_every=1, **settings)
        rarely = self.final(tmp_path / "rarely", agent, eval_every=0, **settings)
        never = self.final(tmp_path / "never", agent, evaluate=False, **settings)
        assert always == rarely == never

    def test_negative_control_an_agent_that_learns_in_act(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(ContractError, match="Evaluation changed the agent .* 'w'.*explore=False"):
            run(tmp_path / "caught", toys.ActLearns)
        monkeypatch.setattr(Loop, "_check_purity", lambda *_: None)  # without the check the damage would be real
        always = self.final(tmp_path / "always", toys.ActLearns, eval_every=1)
        never = self.final(tmp_path / "never", toys.ActLearns, evaluate=False)
        assert always != never

    def test_negative_control_evaluation_that_draws_from_the_learning_generator(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def leaky(self: Loop, phase: int) -> bool:
            torch.rand(1)  # the process-wide generator, without the seal
            return False

        class GlobalDraws(toys.Linear):
            def learn(self, experience, budget, *, rng):
                for metrics in super().learn(experience, budget, rng=rng):
                    self.w += 0.01 * torch.randn(self.w.shape)
                    yield metrics

        sealed = [self.final(tmp_path / f"sealed{n}", GlobalDraws, eval_every=n) for n in (1, 0)]
        assert sealed[0] == sealed[1]
        monkeypatch.setattr(Loop, "_evaluate_now", leaky)
        leaking = [self.final(tmp_path / f"leaking{n}", GlobalDraws, eval_every=n) for n in (1, 0)]
        assert leaking[0] != leaking[1]

    def test_draws_from_the_process_wide_generator_in_act_do_not_reach_training(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class DrawsEverywhere(toys.Linear):
            def act(self, obs, memory, first, *, rng, task=None, explore=False):
                torch.rand(1)
                return super().act(obs, memory, first, rng=rng)

            def learn(self, experience, budget, *, rng):
                for metrics in super().learn(experience, budget, rng=rng):
                    self.w += 0.01 * torch.randn(self.w.shape)
                    yield metrics

        sealed = [self.final(tmp_path / f"sealed{n}", DrawsEverywhere, eval_every=n) for n in (1, 0)]
        assert sealed[0] == sealed[1]
        monkeypatch.setattr("clbench.loop.sealed_global_rng", contextlib.nullcontext)  # negative control: no seal
        leaking = [self.final(tmp_path / f"leaking{n}", DrawsEverywhere, eval_every=n) for n in (1, 0)]
        assert leaking[0] != leaking[1]

    def test_a_run_leaves_the_process_wide_generators_alone(self, tmp_path: Path) -> None:
        torch.manual_seed(7)
        expected = torch.rand(3)
        torch.manual_seed(7)
        run(tmp_path / "run")
        assert torch.equal(torch.rand(3), expected)


class TestStreamsAreTheSameForEveryAgent:
    def test_tasks_and_data(self, tmp_path: Path) -> None:
        streams, data = [], []
        for agent in ("bc", "random", toys.Linear):
            result = run(tmp_path / str(agent), agent, seed=3)
            streams.append(result.stream)
            identifier = result.stream.tasks[1].dataset_id
            assert identifier is not None
            data.append(clbench.load_dataset(identifier))
        assert streams[0] == streams[1] == streams[2]
        assert torch.equal(data[0].observations, data[1].observations)
        assert torch.equal(data[0].observations, data[2].observations)

    def test_negative_control_a_stream_that_draws_from_the_process(self) -> None:
        def shared(*, rng: Any) -> Any:
            return toys.Suite("shared", toys.digit_tasks(2, torch.randint(2**31, (2,)).tolist()), 1, 1)

        clbench.register_stream("test-shared-generator")(shared)
        torch.manual_seed(0)
        first = make_stream("test-shared-generator")
        torch.rand(5)  # what another agent might have drawn
        assert make_stream("test-shared-generator") != first
        assert (
            make_stream("toys:digits", seed=1)
            == make_stream("toys:digits", seed=1)
            != make_stream("toys:digits", seed=2)
        )

    def test_training_episodes_are_the_same_for_every_agent(self, tmp_path: Path) -> None:
        firsts = []

        class Peek(toys.Walker):
            noise = 0

            def learn(self, experience, budget, *, rng):
                torch.rand(self.noise + 1, generator=rng)
                obs, *_ = experience.env.step(torch.zeros(experience.env.num_envs, dtype=torch.int64))
                firsts.append(obs.clone())
                yield {"step": float(budget)}

        class Noisier(Peek):
            noise = 5

        for agent in (Peek, Noisier):
            run(tmp_path / agent.__name__, agent, "toys:coins")
        assert torch.equal(firsts[0], firsts[2]) and torch.equal(firsts[1], firsts[3])

    def test_every_phase_has_learning_draws_of_its_own(self, tmp_path: Path) -> None:
        draws = []

        class Draws(toys.Linear):
            def learn(self, experience, budget, *, rng):
                draws.append(float(torch.rand(1, generator=rng)))
                yield {"step": budget}

        for seed in (0, 0, 1):
            run(tmp_path / str(len(draws)), Draws, seed=seed, evaluate=False)
        assert draws[:3] == draws[3:6]
        assert len(set(draws)) == 6, "three phases, two seeds"

    def test_training_episodes_depend_on_the_seed_of_the_run_and_on_the_phase(self, tmp_path: Path) -> None:
        first = []

        class Peek(toys.Walker):
            def learn(self, experience, budget, *, rng):
                lucky = []
                for _ in range(30):
                    obs, *_ = experience.env.step(torch.zeros(experience.env.num_envs, dtype=torch.int64))
                    lucky.append(obs.clone())
                first.append(torch.stack(lucky))
                yield {"step": float(budget)}

        for seed in (0, 1, 0):
            run(tmp_path / str(len(first)), Peek, "toys:coins", seed=seed, num_envs=16)
        phases = dict(zip(("0a", "0b", "1a", "1b", "again a", "again b"), first, strict=True))
        assert torch.equal(phases["0a"], phases["again a"]) and torch.equal(phases["0b"], phases["again b"])
        assert not torch.equal(phases["0a"], phases["1a"]), "another seed has other training episodes"
        assert not torch.equal(phases["0a"], phases["0b"]), "another phase has other training episodes"


@pytest.mark.parametrize(
    "settings", [{}, {"schedule": "cyclic"}, {"schedule": "power-law", "seed": 1}, {"protocol": "joint"}]
)
def test_the_log_counts_the_visits_of_the_evaluated_task(tmp_path: Path, settings: Any) -> None:
    result = run(tmp_path / "run", eval_every=0, **settings)
    phases = result.stream.phases
    header, *rows = (line.split(",") for line in (tmp_path / "run" / "eval.csv").read_text().splitlines())
    assert {r[header.index("phase")] for r in rows} == {str(i) for i in range(len(phases) + 1)}
    for row in rows:
        phase, visit, task = (row[header.index(k)] for k in ("phase", "visit", "task"))
        assert int(visit) == [name for p in phases[: int(phase)] for name in p.tasks].count(task)


class TestKnowledgeLevels:
    @pytest.mark.parametrize(
        ("reveals", "expected"),
        [
            ("task_id", ["start 0 task-0", "finish", "start 1 task-1", "finish"]),
            ("boundaries", ["start None None", "finish"] * 2),
            ("nothing", []),
        ],
    )
    def test_the_agent_is_told_what_the_stream_reveals(self, tmp_path: Path, reveals: Any, expected: list[str]) -> None:
        seen: list[Any] = []

        class Listens(toys.Linear):
            def act(self, obs, memory, first, *, rng, task=None, explore=False):
                seen.append(None if task is None else set(task.tolist()))
                return super().act(obs, memory, first, rng=rng)

            def learn(self, experience, budget, *, rng):
                seen.append(("data", experience.dataset.task is not None))
                yield from super().learn(experience, budget, rng=rng)

        result = run(tmp_path / "run", Listens, reveals=reveals, stream_options={"tasks": 2}, eval_every=0)
        assert result.agent.told == expected  # type: ignore[union-attr]
        tasks = [s for s in seen if not isinstance(s, tuple)]
        assert tasks == ([{0}, {1}] * 3 if reveals == "task_id" else [None] * 6)
        assert all(s == ("data", reveals == "task_id") for s in seen if isinstance(s, tuple))

    def test_nothing_is_revealed_by_the_calls_of_learn(self) -> None:
        stream = make_stream("toys:digits", reveals="nothing", budget=40)
        budgets = [b for _, b in segments_of(stream)]
        assert len(set(budgets)) == 1 and len(budgets) == 30, "every call looks the same, and there are many per phase"
        assert [b for _, b in segments_of(make_stream("toys:digits", budget=40))] == [40] * 3
        for budget in (1, 7, 97, 450):
            segments = segments_of(make_stream("toys:digits", reveals="nothing", budget=budget))
            assert sum(b for _, b in segments) == 3 * budget and min(b for _, b in segments) >= 1

    def test_an_unmet_requirement_is_one_sentence_before_anything_is_written(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="requires 'task_id'.*reveals 'boundaries'; add --reveals task_id"):
            run(tmp_path / "run", toys.NeedsTaskId)
        assert not (tmp_path / "run" / "config.json").exists()
        assert run(tmp_path / "run", toys.NeedsTaskId, reveals="task_id").results["status"] == "complete"
        with pytest.raises(ConfigError, match=r"requires 'dataset'.*\['coin-0', 'coin-1'\] have no data set"):
            run(tmp_path / "other" / "deep", "bc", "toys:coins")
        assert not (tmp_path / "other").exists(), "the folders that a refused run has made are taken away"
        with pytest.raises(ConfigError, match="requires 'continuous'.*Discrete"):
            run(tmp_path / "third", "sb3-sac", "toys:coins")


class TestProtocols:
    def test_independent_trains_a_fresh_agent_per_task(self, tmp_path: Path) -> None:
        result = run(tmp_path / "run", protocol="independent")
        matrix = result.results["matrix"]
        assert [[v is not None for v in row] for row in matrix[1:]] == [[i == j for j in range(3)] for i in range(3)]
        alone = run(tmp_path / "one", stream_options={"tasks": 3}, stream=clbench.Stream(
            "one", result.stream.tasks, (clbench.Phase("task-0", 40),)))  # fmt: skip
        assert matrix[1][0] == alone.results["matrix"][1][0]
        assert result.agent.told == ["start None None", "finish"]  # type: ignore[union-attr]

    def test_costs_of_all_fresh_agents_are_added_up(self, tmp_path: Path) -> None:
        settings = {"agent_options": {"hidden": (4,), "batch_size": 8}, "protocol": "independent", "budget": 5}
        cost = run(tmp_path / "run", "bc", **settings).results["cost"]
        assert (cost["updates"], cost["samples"]) == (3 * 5, 3 * 5 * 8)

    def test_joint_trains_on_all_tasks_at_once(self, tmp_path: Path) -> None:
        lengths = []

        class Looks(toys.Linear):
            def learn(self, experience, budget, *, rng):
                lengths.append((len(experience.dataset), budget, experience.dataset.task.unique().tolist()))
                yield from super().learn(experience, budget, rng=rng)

        result = run(tmp_path / "run", Looks, protocol="joint", reveals="task_id")
        assert lengths == [(3 * 1437, 120, [0, 1, 2])]
        assert len(result.results["matrix"]) == 2
        coins = run(tmp_path / "coins", toys.Walker, "toys:coins", protocol="joint", num_envs=5)
        assert coins.results["cost"]["env_steps"] == 125
        with pytest.raises(ConfigError, match="raise --num-envs"):
            run(tmp_path / "few", toys.Walker, "toys:coins", protocol="joint", num_envs=1)

    def test_forward_transfer_needs_reference_runs_which_are_made_once(self, tmp_path: Path) -> None:
        without = run(tmp_path / "runs" / "a")
        assert without.metrics["forward_transfer"] is None
        root = tmp_path / "references"
        given = run(tmp_path / "runs" / "b", references=True, reference_root=root)
        assert isinstance(given.metrics["forward_transfer"], float)
        assert (root / given.results["reference"] / "eval.csv").exists() and without.results["reference"] is None
        cached = {p: p.stat().st_mtime_ns for p in root.glob("*/eval.csv")}
        assert len(cached) == 1
        run(tmp_path / "runs" / "c", references=True, reference_root=root, schedule="cyclic")
        run(tmp_path / "runs" / "d", references=True, reference_root=root, seed=1)
        again = {p: p.stat().st_mtime_ns for p in root.glob("*/eval.csv")}
        assert len(again) == 3, "another budget per visit and another seed have references of their own"
        assert all(again[p] == t for p, t in cached.items())
        run(tmp_path / "runs" / "e", references=True, reference_root=root, schedule="shuffled")
        assert len(list(root.glob("*/eval.csv"))) == 3, "the order of tasks does not matter to single-task runs"


class TestResume:
    """Stopped at any yield and taken up again, a run gives the same files and weights as one that was not stopped."""

    AGENTS = [
        (toys.Linear, "toys:digits", {}),
        (toys.Walker, "toys:coins", {"num_envs": 4}),
        (toys.Linear, "toys:digits", {"reveals": "nothing", "schedule": "blurred"}),
        (toys.Linear, "toys:digits", {"protocol": "independent"}),
        ("bc", "toys:digits", {"agent_options": {"hidden": (8,)}}),
        ("sb3-ppo", "toys:coins", {"num_envs": 4, "budget": 256, "agent_options": {"rollout_steps": 8}}),
        (
            "sb3-dqn",
            "toys:coins",
            {"num_envs": 4, "budget": 512, "agent_options": {"learning_starts": 8, "buffer_size": 96}},
        ),
    ]

    @pytest.mark.parametrize(("agent", "stream", "settings"), AGENTS)
    def test_stop_and_resume_is_bit_identical(self, tmp_path: Path, agent: Any, stream: str, settings: Any) -> None:
        whole = run(tmp_path / "whole", agent, stream, **settings)
        stops = self.stopped_run(tmp_path / "stopped", agent, stream, settings)
        assert stops >= 3
        stopped = run(tmp_path / "stopped", agent, stream, **settings)
        self.same(tmp_path)
        if stopped.agent is not None:
            assert weights(stopped) == weights(whole)

    def stopped_run(self, path: Path, agent: Any, stream: str, settings: Any) -> int:
        """Start and stop until the run is complete; a third of the way further each time."""
        stops, budget = 0, 2 * settings.get("budget", 64 if stream == "toys:coins" else 60)

        class Stop:
            first: int | None = None

            def __call__(self, position: Position) -> bool:
                self.first = position.step if self.first is None else self.first
                return position.step - self.first >= budget // 5

        while stops < 40:
            try:
                with stopping_at(Stop()):
                    run(path, agent, stream, **settings)
                return stops
            except Interrupted:
                stops += 1
                if (path / "results.json").exists():
                    assert json.loads((path / "results.json").read_text())["status"] == "interrupted"
        raise AssertionError("the run did not get further")

    def same(self, tmp_path: Path) -> None:
        for name in ("eval.csv", "results.json", "train.csv"):
            assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes(), name
        first, second = (load_checkpoint(tmp_path / d / "checkpoint.pt") for d in ("whole", "stopped"))
        assert state_digest(first["agent"]) == state_digest(second["agent"])

    def test_negative_control_an_agent_that_does_not_save_its_weights(self, tmp_path: Path) -> None:
        run(tmp_path / "whole", toys.Forgetful)
        self.stopped_run(tmp_path / "stopped", toys.Forgetful, "toys:digits", {})
        whole, stopped = ((tmp_path / d / "eval.csv").read_text() for d in ("whole", "stopped"))
        assert whole != stopped

    def test_negative_control_the_environment_is_not_restored(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from clbench.envs.gymnasium_adapter import GymnasiumVectorEnv

        settings = {"num_envs": 4}
        run(tmp_path / "whole", toys.Walker, "toys:coins", **settings)

        def starts_again(self: Any, state: Any) -> None:
            self.reset(seed=0)

        monkeypatch.setattr(GymnasiumVectorEnv, "load_state_dict", starts_again)
        self.stopped_run(tmp_path / "stopped", toys.Walker, "toys:coins", settings)
        run(tmp_path / "stopped", toys.Walker, "toys:coins", **settings)
        with pytest.raises(AssertionError):
            self.same(tmp_path)

    def test_a_complete_run_is_returned_not_repeated(self, tmp_path: Path) -> None:
        first = run(tmp_path / "run")
        stamp = (tmp_path / "run" / "checkpoint.pt").stat().st_mtime_ns
        assert run(tmp_path / "run").results == first.results
        assert (tmp_path / "run" / "checkpoint.pt").stat().st_mtime_ns == stamp
        run(tmp_path / "run", overwrite=True)
        assert (tmp_path / "run" / "checkpoint.pt").stat().st_mtime_ns != stamp

    def test_another_configuration_is_refused_and_named(self, tmp_path: Path) -> None:
        run(tmp_path / "run")
        with pytest.raises(ConfigError, match="seed: 0 there, 1 now.*--overwrite"):
            run(tmp_path / "run", seed=1)
        with pytest.raises(ConfigError, match="agent: 'toys:Linear' there, 'toys:NeedsTaskId' now"):
            run(tmp_path / "run", toys.NeedsTaskId, reveals="task_id")

    def test_an_edited_agent_is_another_configuration(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        code = "import toys\n\n\nclass Edited(toys.Linear):\n    gain = {}\n"
        monkeypatch.syspath_prepend(tmp_path)
        for gain in (1, 2):
            (tmp_path / "edited_agent.py").write_text(code.format(gain))
            if gain == 1:
                run(tmp_path / "run", "edited_agent:Edited")
                assert run(tmp_path / "run", "edited_agent:Edited").results["status"] == "complete"
        with pytest.raises(ConfigError, match="agent code: .* there, .* now.*--overwrite"):
            run(tmp_path / "run", "edited_agent:Edited")

    @pytest.mark.parametrize("damage", ["cut", "flip", "pickle", "format", "agent"])
    def test_a_bad_checkpoint_is_refused(self, tmp_path: Path, damage: str) -> None:
        path = tmp_path / "run"
        self.stopped_run_once(path)
        checkpoint = path / "checkpoint.pt"
        data = bytearray(checkpoint.read_bytes())
        if damage == "cut":
            checkpoint.write_bytes(data[: len(data) // 2])
        elif damage == "flip":
            at = data.index(b"PK", 0) + len(data) // 3
            data[at] ^= 0xFF
            checkpoint.write_bytes(data)
        elif damage == "pickle":
            torch.save({"format": 1, "evil": Position()}, checkpoint)
        else:
            content = load_checkpoint(checkpoint)
            content |= {"format": 99} if damage == "format" else {"agent_name": "other"}
            torch.save(content, checkpoint)
        expected = {
            "cut": "corrupt or truncated",
            "flip": "corrupt",
            "pickle": "not plain data",
            "format": "format 99, this version reads 1",
            "agent": "belongs to another run",
        }[damage]
        with pytest.raises(DataError, match=expected + ".*--overwrite"):
            run(path)

    def stopped_run_once(self, path: Path) -> None:
        with pytest.raises(Interrupted), stopping_at(lambda position: position.step > 50):
            run(path)


class TestWrongPlugins:
    def test_wrong_action_shape(self, tmp_path: Path) -> None:
        with pytest.raises(
            ContractError, match=r"WrongShape.act returned actions of shape \(30, 1\), expected \(30,\)"
        ):
            run(tmp_path / "run", toys.WrongShape)

    def test_an_exception_inside_learn_names_file_and_line(self, tmp_path: Path) -> None:
        with pytest.raises(
            ContractError, match=r"Raises.learn raised ZeroDivisionError at .*toys.py:\d+: the learning rate"
        ):
            run(tmp_path / "run", toys.Raises)

    def test_spaces_that_change_within_a_stream(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="spaces change within stream 'changing': task 'size-2'"):
            run(tmp_path / "run", toys.Walker, "toys:changing_spaces")

    def test_a_state_that_a_new_agent_cannot_load_is_refused_before_training(self, tmp_path: Path) -> None:
        class MissingKey(toys.Linear):
            def state_dict(self):
                return {"told": list(self.told)}

        with pytest.raises(ContractError, match=r"MissingKey.load_state_dict raised KeyError at .*toys.py:\d+: 'w'"):
            run(tmp_path / "missing", MissingKey)

        class NotRestored(toys.Linear):
            seen = 0

            def start_task(self, task):
                self.seen += 1

            def state_dict(self):
                return {**super().state_dict(), "seen": self.seen}

        with pytest.raises(ContractError, match="NotRestored.load_state_dict does not restore the entry 'seen'"):
            run(tmp_path / "lost", NotRestored, evaluate=False)
        assert not (tmp_path / "missing").exists() and not (tmp_path / "lost").exists()

    def test_a_step_beyond_the_budget(self, tmp_path: Path) -> None:
        class TooFar(toys.Linear):
            def learn(self, experience, budget, *, rng):
                yield {"step": budget + 1}

        with pytest.raises(ContractError, match="yielded step=41.*budget of 40"):
            run(tmp_path / "run", TooFar)

    def test_a_loss_that_is_not_a_number_is_said_once(self, tmp_path: Path) -> None:
        class Diverges(toys.Linear):
            def learn(self, experience, budget, *, rng):
                for i in range(budget):
                    yield {"loss": torch.tensor(float("nan") if i > 4 else 1.0, requires_grad=True)}

        with pytest.warns(UserWarning, match="Diverges.learn reports loss=nan at step 6") as said:
            run(tmp_path / "run", Diverges)
        assert len([w for w in said if "reports" in str(w.message)]) == 1

    def test_an_agent_that_never_stops(self, tmp_path: Path) -> None:
        class Endless(toys.Linear):
            def learn(self, experience, budget, *, rng):
                while True:
                    yield {"loss": 0.0}

        with pytest.raises(ContractError, match="Endless.learn goes on after its budget of 40"):
            run(tmp_path / "run", Endless)

        class Chatty(toys.Linear):
            def learn(self, experience, budget, *, rng):
                for i in range(3 * budget):
                    yield {"step": i // 3 + 1}

        assert run(tmp_path / "chatty", Chatty).results["status"] == "complete"

    def test_not_an_agent(self, tmp_path: Path) -> None:
        with pytest.raises(ContractError, match="must be a subclass of clbench.Agent"):
            run(tmp_path / "run", "toys:SlowFailures")

        class Unfinished(clbench.Agent):
            def act(self, obs, memory, first, *, rng, task=None, explore=False):
                return first, memory

        with pytest.raises(ContractError, match="does not define learn, load_state_dict, state_dict"):
            run(tmp_path / "run", Unfinished)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": -5}, "budget must be a positive number"),
        ({"budget": 2.5}, "run.budget must be of type int"),
        ({"budgets": 5}, "Unknown key 'budgets' in run. Did you mean 'budget'"),
        ({"agent_options": {"lrr": 1}}, "Unknown key 'lrr' in agent 'toys:Linear'. Did you mean 'lr'"),
        ({"agent_options": {"lr": "fast"}}, "agent 'toys:Linear'.lr must be of type float, got 'fast'"),
        ({"agent_options": {"lr": float("nan")}}, "lr is NaN"),
        ({"stream_options": {"task": 2}}, "Unknown key 'task' in stream 'toys:digits'. Did you mean 'tasks'"),
        ({"schedule": "powerlaw"}, "Unknown schedule 'powerlaw'. Did you mean 'power-law'"),
        ({"schedule": "blurred", "schedule_options": {"overlap": 3}}, r"overlap must be in \[0, 1\]"),
        ({"device": "cuda"}, "No GPU is available.*--device cpu"),
        ({"device": "gpu"}, "Unknown device 'gpu'"),
        ({"reveals": "everything"}, "Unknown value of run.reveals 'everything'"),
        ({"protocol": "jiont"}, "Did you mean 'joint'"),
    ],
)
def test_bad_settings_are_named_and_nothing_is_written(tmp_path: Path, settings: Any, message: str) -> None:
    if settings.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_an_agent_that_returns_its_metrics_is_told_to_yield_them(tmp_path: Path) -> None:
    class Returns(toys.Linear):
        def learn(self, experience, budget, *, rng):
            return {"loss": 0.0}

    with pytest.raises(ContractError, match=r"Returns.learn must yield mappings .* got str; write `yield .*not return"):
        run(tmp_path / "run", Returns)


@pytest.mark.parametrize("settings", [{}, {"eval_every": 7}, {"reveals": "nothing"}, {"protocol": "joint"}])
def test_without_the_evaluation_before_training_all_else_is_the_same(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings = {"budget": 20, "eval_every": 0, **settings}
    whole, without = run(tmp_path / "a", **settings), run(tmp_path / "b", eval_start=False, **settings)
    assert without.results["matrix"][0] == [None] * 3 and None not in whole.results["matrix"][0]
    assert without.results["matrix"][1:] == whole.results["matrix"][1:]
    assert without.metrics["zero_shot_transfer"] is None
    assert without.metrics["average_performance"] == whole.metrics["average_performance"]
    assert weights(without) == weights(whole)
