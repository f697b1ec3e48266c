"""``clbench verify`` and what it stands on: loading the agent of a run directory. Every kind of failure has its control."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clbench.agents.networks import eidetic
from clbench.cli.main import main
from clbench.errors import ConfigError, ContractError, Interrupted
from clbench.experiments import RunConfig, _config_record, load_agent, read_run, resolve_run, run
from clbench.records import load_checkpoint, provenance, save_checkpoint, state_digest, write_json
from clbench.verification import verify_object, verify_run

LEVELS = ["L0", "L1", "L2", "L3", "L4"]
TINY = {"budget": 6, "eval_every": 0, "evaluate": False, "tensorboard": False}


def clbench_(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    out = capsys.readouterr()
    return int(stop.value.code or 0), out.out, " ".join(out.err.split())


def content(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file with its hash and the time at which it was last changed."""
    return {
        str(p.relative_to(folder)): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns)
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    run("digits-split", "eidetic_toys:Keeper", out=folder, **TINY)
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A run directory that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def change(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    saved = load_checkpoint(folder / "checkpoint.pt")
    edit(saved)
    save_checkpoint(folder / "checkpoint.pt", saved)


def change_config(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    record = json.loads((folder / "config.json").read_text())
    edit(record)
    write_json(folder / "config.json", record)


def made(folder: Path, agent: str, **options: Any) -> Path:
    return run("digits-split", f"eidetic_toys:{agent}", out=folder / agent, agent_options=options, **TINY).path


# -- loading the agent of a run ------------------------------------------------------------------------------------------


def test_load_agent_gives_the_agent_of_the_checkpoint(tmp_path: Path) -> None:
    result = run("digits-split", "bc", out=tmp_path / "run", **TINY)
    assert result.agent is not None
    torch.manual_seed(7)
    before = torch.get_rng_state()
    agent = load_agent(result.path)
    assert state_digest(agent.state_dict()) == state_digest(result.agent.state_dict())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("stream", "agent"),
    [
        ("digits-permuted", "bc"), ("two-rooms/size-634-v0", "pldm"), ("two-rooms/size-634-v0", "hiql"),
        ("two-rooms-doors", "sb3-sac"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("protocol", ["sequential", "independent", "joint"])
def test_a_run_read_back_is_the_run_that_was_made(tmp_path: Path, stream: str, agent: str, protocol: Any) -> None:
    """The fingerprint changes with everything that changes results, so equal ones say that nothing was lost."""
    resolved = resolve_run(RunConfig(stream, agent, seed=3, protocol=protocol))
    write_json(tmp_path / "config.json", _config_record(resolved))
    write_json(tmp_path / "stream.json", resolved.stream.to_dict())
    again = read_run(tmp_path).resolved
    assert again.fingerprint == resolved.fingerprint
    assert (again.stream, again.unit) == (resolved.stream, resolved.unit)


def test_negative_control_another_seed_is_another_run(copied: Path) -> None:
    assert read_run(copied).resolved.fingerprint == read_run(copied).record["fingerprint"]
    change_config(copied, lambda record: record["config"].update(seed=1))
    assert read_run(copied).resolved.fingerprint != read_run(copied).record["fingerprint"]


def test_a_class_can_be_given_in_place_of_a_name_that_cannot_be_imported(copied: Path) -> None:
    from eidetic_toys import Keeper  # type: ignore[import-not-found]

    change_config(copied, lambda record: record["config"].update(agent="nowhere:Keeper"))
    with pytest.raises(ConfigError, match="cannot be put together again.*no module 'nowhere'"):
        load_agent(copied)
    assert load_agent(copied, agent_class=Keeper).eidetic["policy"].committed == 5  # type: ignore[attr-defined]


# -- runs ----------------------------------------------------------------------------------------------------------------


def test_a_finished_run_passes_all_levels(finished: Path, capsys: Any) -> None:
    code, out, err = clbench_(capsys, "verify", str(finished))
    assert code == 0, err
    rows = [line.split() for line in out.splitlines() if line.startswith("  L")]
    assert [row[0] for row in rows] == LEVELS and all("pass" in row for row in rows)
    assert "policy: 5 finished tasks, largest change of an output 0" in out
    assert out.splitlines()[-1] == "Finished tasks have not changed."


def test_json_is_one_object_with_the_documented_keys(finished: Path, capsys: Any) -> None:
    code, out, _ = clbench_(capsys, "verify", str(finished), "--json")
    found = json.loads(out)
    assert code == 0 and found["ok"] is True
    assert found["levels"] == dict.fromkeys(LEVELS, "pass")
    assert found["max_abs_change"] == 0.0 and found["tasks"] == 5 and found["notes"] == []
    assert set(found["details"]) == set(LEVELS) and all(found["details"].values())
    assert found["networks"]["policy"]["levels"] == found["levels"]
    assert {"levels", "max_abs_change", "tasks", "details"} <= set(found["networks"]["policy"])
    assert found["provenance"]["torch"] == torch.__version__
    assert found["run"]["agent"] == "eidetic_toys:Keeper" and found["run"]["status"] == "complete"
    page = (Path(__file__).parents[2] / "docs" / "verify.md").read_text()
    named = {*found, *found["networks"]["policy"], *found["run"]}
    assert {k for k in named if f"`{k}`" not in page} == set()


def test_nothing_in_the_run_directory_changes(finished: Path, capsys: Any) -> None:
    before = content(finished)
    (finished / ".left.tmp").write_text("of a process that was killed")
    assert clbench_(capsys, "verify", str(finished), "--json")[0] == 0
    (finished / ".left.tmp").unlink()
    assert content(finished) == before


def test_negative_control_a_changed_directory_is_noticed(copied: Path) -> None:
    before = content(copied)
    change(copied, lambda saved: None)  # the same content, written again
    assert content(copied) != before


def test_a_run_that_another_process_works_on_can_be_verified(copied: Path, capsys: Any) -> None:
    from clbench.records import RunDirectory

    directory = RunDirectory(copied)
    directory.open()
    try:
        assert clbench_(capsys, "verify", str(copied))[0] == 0
    finally:
        directory.close()


def stopped_at(folder: Path, step: int) -> Path:
    """A run that was interrupted after so many updates, in the middle of a task."""

    class Bar:
        def __enter__(self) -> Any:
            def show(position: Any, *_: Any) -> None:
                if position.step >= step:
                    raise Interrupted("enough")

            return show

        def __exit__(self, *_: Any) -> None: ...

    with pytest.raises(Interrupted):
        run("digits-split", "eidetic_toys:Keeper", out=folder, progress=lambda _: Bar(), checkpoint_seconds=0, **TINY)
    return folder


def test_an_interrupted_run_is_verified_as_far_as_it_got(tmp_path: Path, capsys: Any) -> None:
    code, out, err = clbench_(capsys, "verify", str(stopped_at(tmp_path / "run", 15)), "--json")
    found = json.loads(out)
    assert code == 0, err
    assert found["tasks"] == 2 and found["run"]["status"] == "interrupted" and found["notes"] == []


def flip_a_bit(owner: int) -> Callable[[dict[str, Any]], None]:
    """One bit of one weight, the lowest, in a row that belongs to ``owner``."""

    def edit(saved: dict[str, Any]) -> None:
        state = saved["agent"]["net"]
        row = int((state["spaces.h.owner"] == owner).nonzero()[0, 0])
        state["first.weight.store"].view(torch.int32)[row, 3] ^= 1

    return edit


@pytest.mark.parametrize("owner", [0, 2])
def test_negative_control_one_bit_of_an_owned_weight_fails_l0(copied: Path, capsys: Any, owner: int) -> None:
    change(copied, flip_a_bit(owner))
    code, out, _ = clbench_(capsys, "verify", str(copied), "--json")
    found = json.loads(out)
    assert code == 1 and found["ok"] is False
    assert found["levels"]["L0"] == "fail" and f"task {owner}" in found["details"]["L0"]
    code, out, _ = clbench_(capsys, "verify", str(copied))
    assert code == 1 and out.splitlines()[-1].startswith("FAILED: L0")


def test_a_free_weight_may_change(copied: Path, capsys: Any) -> None:
    def edit(saved: dict[str, Any]) -> None:
        state = saved["agent"]["net"]
        free = state["spaces.h.owner"] == torch.iinfo(torch.int16).max
        assert bool(free.any())
        state["first.weight.value"][free] += 1.0

    change(copied, edit)
    assert clbench_(capsys, "verify", str(copied))[0] == 0


def test_negative_control_a_coupling_between_units_fails_l2_and_l3(tmp_path: Path, capsys: Any) -> None:
    code, out, _ = clbench_(capsys, "verify", str(made(tmp_path, "Broken")), "--json")
    found = json.loads(out)
    assert code == 1
    assert (found["levels"]["L0"], found["levels"]["L2"], found["levels"]["L3"]) == ("pass", "fail", "fail")
    assert found["max_abs_change"] is None or found["max_abs_change"] > 0


def test_one_network_of_two_that_fails_is_a_failure(tmp_path: Path, capsys: Any) -> None:
    code, out, _ = clbench_(capsys, "verify", str(made(tmp_path, "Two")), "--json")
    found = json.loads(out)
    assert code == 1 and found["levels"]["L0"] == "fail"
    assert found["networks"]["policy"]["levels"]["L0"] == "pass"
    assert found["networks"]["critic"]["levels"]["L0"] == "fail"
    assert "policy: " in found["details"]["L0"] and "critic: " in found["details"]["L0"]


def test_without_probes_the_needed_levels_cannot_be_judged(tmp_path: Path, capsys: Any) -> None:
    path = made(tmp_path, "Keeper", probes=False)
    code, out, _ = clbench_(capsys, "verify", str(path), "--json")
    found = json.loads(out)
    assert code == 1 and found["levels"] == {"L0": "pass", **dict.fromkeys(LEVELS[1:], "skip")}
    assert "give probes" in found["details"]["L2"]
    code, out, _ = clbench_(capsys, "verify", str(path))
    assert code == 1 and out.splitlines()[-1].startswith("NOT PROVEN")


def test_the_agent_can_give_probes(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made(tmp_path, "Giver", probes=False)
    code, out, _ = clbench_(capsys, "verify", str(path), "--json")
    found = json.loads(out)
    assert code == 0 and found["levels"] == {**dict.fromkeys(LEVELS, "pass"), "L1": "skip"}
    rows: list[int] = []

    def counting(network: Any, probes: Any) -> Any:
        rows.extend(len(inputs[0]) for inputs in probes.values())
        return eidetic.verify(network, probes)

    monkeypatch.setattr("clbench.verification.verify", counting)
    assert clbench_(capsys, "verify", str(path), "--probes", "3")[0] == 0
    assert rows == [3] * 5


def test_other_code_and_other_versions_are_said(copied: Path, capsys: Any) -> None:
    def edit(record: dict[str, Any]) -> None:
        record["agent_code"], record["fingerprint"] = "of another day", "another"
        record["provenance"] = {**provenance(), "torch": "2.0.0"}

    change_config(copied, edit)
    change(copied, lambda saved: saved.update(fingerprint="another"))
    code, out, _ = clbench_(capsys, "verify", str(copied), "--json")
    found = json.loads(out)
    assert code == 0 and found["run"]["agent_code_changed"] is True
    assert "not that of the run any more" in found["notes"][0] and "torch 2.0.0" in found["notes"][1]
    assert "Note: the code of agent" in clbench_(capsys, "verify", str(copied))[1]


def test_references_of_another_version_are_not_compared(copied: Path, capsys: Any) -> None:
    def edit(saved: dict[str, Any]) -> None:
        for record in saved["agent"]["net"]["_extra_state"]["references"]:
            record["seen"] = {k.replace("torch", "another torch"): v for k, v in record["seen"].items()}

    change(copied, edit)
    code, out, _ = clbench_(capsys, "verify", str(copied), "--json")
    found = json.loads(out)
    assert code == 0 and found["levels"] == {**dict.fromkeys(LEVELS, "pass"), "L1": "skip"}
    assert "not judged here: L1" in clbench_(capsys, "verify", str(copied))[1]


def test_tasks_that_were_trained_but_not_committed_are_said(copied: Path) -> None:
    def edit(saved: dict[str, Any]) -> None:
        extra = saved["agent"]["net"]["_extra_state"]
        extra["committed"] = 4
        extra["digests"], extra["references"] = extra["digests"][:4], extra["references"][:4]
        for key, value in saved["agent"]["net"].items():
            if key.endswith("owner"):
                value[value == 4] = torch.iinfo(torch.int16).max

    change(copied, edit)
    found = verify_run(copied)
    assert found.networks["policy"].tasks == 4
    assert [n for n in found.notes if "5 tasks of the stream have been trained, 'policy' has committed 4" in n]


# -- bad input -----------------------------------------------------------------------------------------------------------


def truncated(folder: Path) -> None:
    data = (folder / "checkpoint.pt").read_bytes()
    (folder / "checkpoint.pt").write_bytes(data[: len(data) // 2])


def damaged(folder: Path) -> None:
    """One bit of a weight, changed in the file."""
    weights = load_checkpoint(folder / "checkpoint.pt")["agent"]["net"]["first.weight.store"].numpy().tobytes()
    data = bytearray((folder / "checkpoint.pt").read_bytes())
    data[data.index(weights) + 5] ^= 1
    (folder / "checkpoint.pt").write_bytes(bytes(data))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (truncated, "corrupt or truncated"),
    "damaged": (damaged, "corrupt"),
    "no checkpoint": (lambda p: (p / "checkpoint.pt").unlink(), "has no checkpoint.pt"),
    "no configuration": (lambda p: (p / "config.json").unlink(), "it has no config.json"),
    "no stream": (lambda p: (p / "stream.json").unlink(), "stream.json"),
    "no JSON": (lambda p: (p / "config.json").write_text("{"), "Cannot read"),
    "other JSON": (lambda p: (p / "config.json").write_text("[1]"), "does not hold what a run writes there"),
    "other stream": (lambda p: (p / "stream.json").write_text('{"name": 1}'), "does not hold what a run writes there"),
    "no agent": (lambda p: change(p, lambda s: s.pop("agent")), "holds no agent"),
    "other state": (
        lambda p: change(p, lambda s: s["agent"]["net"].pop("_extra_state")),
        "not the state of an eidetic",
    ),
    "other format": (lambda p: change(p, lambda s: s.update(format=99)), "has format 99"),
    "agent gone": (lambda p: change_config(p, lambda r: r["config"].update(agent="gone:Agent")), "no module 'gone'"),
    "other option": (lambda p: change_config(p, lambda r: r["config"]["agent_options"].update(z=1)), "Unknown key 'z'"),
    "no GPU": (lambda p: change_config(p, lambda r: r["config"].update(device="cuda:77")), "device"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_runs_are_one_paragraph_and_exit_code_2(copied: Path, capsys: Any, damage: str) -> None:
    if damage == "no GPU" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    edit, message = DAMAGES[damage]
    edit(copied)
    before = content(copied)
    for arguments in ([], ["--json"]):
        code, out, err = clbench_(capsys, "verify", str(copied), *arguments)
        assert code == 2 and out == "" and "Traceback" not in err
        assert message in err
    assert content(copied) == before


def test_a_run_of_a_gpu_is_verified_elsewhere_on_request(copied: Path, capsys: Any) -> None:
    change_config(copied, lambda record: record["config"].update(device="cuda:0"))
    assert clbench_(capsys, "verify", str(copied), "--device", "cpu")[0] == 0


def test_a_state_that_does_not_fit_the_code_of_today_is_said(copied: Path) -> None:
    change(copied, lambda saved: saved["agent"].pop("last"))
    with pytest.raises(ContractError, match=r"load_state_dict raised KeyError[^.]*\.py:\d+: 'last'$"):
        load_agent(copied)
    change_config(copied, lambda record: record.update(agent_code="of another day"))
    with pytest.raises(ContractError, match="code is not that of the run any more"):
        load_agent(copied)


@pytest.mark.parametrize(
    ("agent", "options", "message"),
    [
        ("bc", {}, "Agent 'bc' has no eidetic networks"),
        ("eidetic_toys:NoNetworks", {}, "must map names to EideticNetworks, got dict ('policy': Linear)"),
        ("eidetic_toys:Misnamed", {}, "with names of policy"),
        ("eidetic_toys:Keeper", {"commit": False}, "has not finished a task yet"),
    ],
)
def test_agents_without_evidence(tmp_path: Path, capsys: Any, agent: str, options: Any, message: str) -> None:
    tasks = {"stream_options": {"tasks": 1}} if options else {}
    stream = "toys:digits" if options else "digits-split"
    path = run(stream, agent, out=tmp_path / "run", agent_options=options, reveals="boundaries", **tasks, **TINY).path
    code, out, err = clbench_(capsys, "verify", str(path))
    assert code == 2 and out == "" and message in err and "Traceback" not in err


def test_a_run_within_its_first_task_has_nothing_to_verify(tmp_path: Path, capsys: Any) -> None:
    code, _, err = clbench_(capsys, "verify", str(stopped_at(tmp_path / "run", 3)))
    assert code == 2 and "has not finished a task yet" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Say what to verify"),
        (["--json"], "Say what to verify"),
        (["nowhere"], "nowhere is no run directory: there is no such folder"),
        (["nowhere:net"], "There is no module 'nowhere'"),
        (["eidetic_toys:mak"], "Unknown attribute 'mak' in module eidetic_toys. Did you mean 'make'"),
        (["eidetic_toys:make_wrong"], "'eidetic_toys:make_wrong' gives Linear"),
        (["eidetic_toys:make_of_size"], "cannot be called without arguments"),
        (["eidetic_toys:make_failing"], "ZeroDivisionError"),
        (["eidetic_toys:make_bare_tensor"], "whole numbers to lists of tensors, got dict (0: Tensor)"),
        (["eidetic_toys:Net"], "has not finished a task yet"),
        (["eidetic_toys:make", "--probes", "0"], "probes must be a positive number"),
        (["eidetic_toys:make", "--device", "cpu"], "--device is for run directories"),
    ],
)
def test_bad_input_is_one_paragraph_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = clbench_(capsys, "verify", *arguments)
    assert code == 2 and "Traceback" not in err and message in err
    assert not list(tmp_path.iterdir())


# -- networks of one's own -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["MADE", "make", "make_pair"])
def test_a_network_of_ones_own(capsys: Any, name: str) -> None:
    code, out, err = clbench_(capsys, "verify", f"eidetic_toys:{name}", "--json")
    found = json.loads(out)  # a plug-in that prints is not in the way
    assert code == 0, err
    assert found["tasks"] == 2 and found["run"] is None
    assert found["levels"] == {**dict.fromkeys(LEVELS, "pass"), "L1": "skip" if name == "make_pair" else "pass"}


def test_negative_control_networks_of_ones_own_that_fail(capsys: Any) -> None:
    assert clbench_(capsys, "verify", "eidetic_toys:make_coupled")[0] == 1
    assert clbench_(capsys, "verify", "eidetic_toys:make_without_probes")[0] == 1
    found = verify_object("eidetic_toys:make_coupled")
    assert not found.ok and found.levels["L2"] == found.levels["L3"] == "fail" and found.max_abs_change > 0


def test_an_infinite_change_is_null_in_json() -> None:
    found = verify_object("eidetic_toys:make_coupled")
    found.networks["network"].max_abs_change = float("inf")
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert json.loads(text)["max_abs_change"] is None


def test_the_verb_is_in_the_usage(capsys: Any) -> None:
    code, out, _ = clbench_(capsys, "--help")
    assert code == 0 and "  verify RUN_DIR" in out
    code, out, _ = clbench_(capsys, "verify", "--help")
    assert code == 0 and "--probes" in out and "--json" in out
