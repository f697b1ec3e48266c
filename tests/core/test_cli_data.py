"""``clbench data``: what the verbs print, write and refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clbench.cli.main import main
from clbench.data.ogbench import write_ogbench
from clbench.data.registry import load_dataset
from clbench.data.storage import dataset_checksum, save_dataset
from clbench.errors import ConfigError, DataError, UnknownNameError

NAME = "two-rooms/size-634-v0"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLBENCH_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def clbench(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["data", *arguments])
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, " ".join(err.split())


def test_list(capsys: Any) -> None:
    clbench(capsys, "make", NAME, "--out", "mine.npz")
    clbench(capsys, "import", "mine.npz")
    code, out, _ = clbench(capsys, "list", "--json")
    rows = {r["name"]: r["summary"] for r in json.loads(out)}
    assert code == 0 and {"two-rooms", "two-rooms/good-v0", "point-maze/5-layouts-v0", "imported/mine"} <= set(rows)
    code, out, _ = clbench(capsys, "list")
    assert code == 0 and "two-rooms/mix-0.01-v0" in out and "imported/mine" in out


@pytest.mark.parametrize("observation", ["state", "pixels"])
def test_info(capsys: Any, observation: str) -> None:
    data = load_dataset(NAME)
    identifier = f"{NAME}?observation={observation}"
    code, out, _ = clbench(capsys, "info", identifier, "--json")
    found = json.loads(out)
    assert code == 0 and (found["transitions"], found["episodes"]) == (634, 8)
    assert found["lengths"] == {"min": 4, "max": 90}
    assert found["actions"]["mean"] == pytest.approx(data.actions.double().mean(0).tolist())
    assert found["actions"]["sd"] == pytest.approx(data.actions.double().std(0, correction=0).tolist())
    assert found["actions"]["min"] == data.actions.amin(0).tolist()
    shape = [2] if observation == "state" else [2, 65, 65]
    assert found["observations"]["achieved_goal"]["shape"] == shape
    assert found["observations"]["observation"]["rendered"] == (observation == "pixels")
    assert found["checksum"] == dataset_checksum(load_dataset(identifier))
    code, out, _ = clbench(capsys, "info", identifier)
    assert (
        code == 0 and "634" in out and found["checksum"] in out and ("(drawn when" in out) == (observation == "pixels")
    )


def test_info_of_discrete_actions_without_keys(capsys: Any) -> None:
    code, out, _ = clbench(capsys, "info", "classify")
    assert code == 0 and "counts      0: " in out and "observations" in out
    found = json.loads(clbench(capsys, "info", "classify", "--json")[1])
    assert sum(found["actions"]["counts"].values()) == found["transitions"]


def test_make(capsys: Any, folder: Path) -> None:
    code, out, _ = clbench(capsys, "make", NAME)
    assert code == 0 and "634 transitions" in out and "Not kept" in out and not (folder / "data").exists()
    code, out, _ = clbench(capsys, "make", NAME, "--out", "x.npz")
    assert code == 0 and "Written: x.npz" in out
    assert dataset_checksum(load_dataset("x.npz")) == dataset_checksum(load_dataset(NAME))
    code, out, err = clbench(capsys, "make", NAME, "--out", "x.npz")
    assert code == 2 and "x.npz exists and is not overwritten" in err
    assert clbench(capsys, "make", NAME, "--out", "x.h5")[0] == 2


def test_make_says_whether_it_was_kept(capsys: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clbench.data.cache.WORTH_IT", 100)
    code, out, _ = clbench(capsys, "make", f"{NAME}?seed=1")
    (file,) = (folder / "data" / "generated").iterdir()
    assert code == 0 and f"Kept: {file}" in out
    code, out, _ = clbench(capsys, "make", "two-rooms?transitions=180")
    assert code == 0 and "Not kept: only published data sets" in out
    monkeypatch.setenv("CLBENCH_DATA", str(file))  # below which there can be no folder
    code, out, _ = clbench(capsys, "make", NAME)
    assert code == 0 and "Not kept: " in out and "could not be written" in out


@pytest.mark.parametrize("kind", ["minari", "ogbench"])
def test_export_says_when_positions_replace_pictures(capsys: Any, folder: Path, kind: str) -> None:
    for i, (name, pixels, said) in enumerate([(NAME, (), 0), (f"{NAME}?observation=pixels", (), 1),
                                              (f"{NAME}?observation=pixels", ("--pixels",), 0)]):  # fmt: skip
        where = f"{i}.npz" if kind == "ogbench" else str(i)
        code, out, _ = clbench(capsys, "export", name, "--format", kind, "--out", where, *pixels)
        assert code == 0 and out.count("instead of the pictures") == said


def test_import_gives_a_name(capsys: Any, folder: Path) -> None:
    write_ogbench(load_dataset(NAME), folder / "walks.npz")
    code, out, _ = clbench(capsys, "import", "walks.npz")
    assert code == 0 and "imported/walks: 634 transitions in 8 episodes" in out
    code, out, _ = clbench(capsys, "import", "walks.npz?achieved_goal=0", "--name", "first-coordinate")
    assert code == 0
    (folder / "walks.npz").unlink()
    data = load_dataset("imported/walks")
    assert dataset_checksum(data) == dataset_checksum(load_dataset(NAME)) and data.name == "imported/walks"
    assert load_dataset("imported/first-coordinate").observations["achieved_goal"].shape == (634, 1)


def test_import_does_not_overwrite(capsys: Any, folder: Path) -> None:
    write_ogbench(load_dataset(NAME), folder / "walks.npz")
    clbench(capsys, "import", "walks.npz")
    code, _, err = clbench(capsys, "import", "walks.npz")
    assert code == 2 and "There is already a data set imported/walks" in err and "choose another --name" in err


def test_minari_by_folder_file_and_id(capsys: Any, folder: Path) -> None:
    code, out, _ = clbench(capsys, "export", NAME, "--format", "minari", "--out", "minari")
    assert code == 0 and f"Written: minari/{NAME}" in out
    path = folder / "minari" / NAME
    sources = [NAME, str(path), str(path / "data" / "main_data.hdf5")]
    for i, source in enumerate(sources):
        code, out, err = clbench(capsys, "import", source, "--name", f"m{i}")
        assert code == 0, err
        assert dataset_checksum(load_dataset(f"imported/m{i}")) == dataset_checksum(load_dataset(NAME))
    assert clbench(capsys, "import", NAME)[1].startswith("imported/two-rooms_size-634-v0: ")
    assert clbench(capsys, "import", str(path))[1].startswith("imported/size-634-v0: ")


@pytest.mark.parametrize("kind", ["minari", "ogbench"])
def test_export_does_not_overwrite(capsys: Any, folder: Path, kind: str) -> None:
    arguments = ["export", NAME, "--format", kind, "--out", "out.npz" if kind == "ogbench" else "out"]
    assert clbench(capsys, *arguments)[0] == 0
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    code, _, err = clbench(capsys, *arguments)
    assert code == 2 and "is not overwritten" in err
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_export_under_another_name_and_with_pixels(capsys: Any, folder: Path) -> None:
    arguments = ("export", f"{NAME}?observation=pixels", "--format", "minari", "--out", "m", "--name", "me/mine-v3")
    assert clbench(capsys, *arguments, "--pixels")[0] == 0
    assert load_dataset("m/me/mine-v3/data/main_data.hdf5").observations["observation"].shape == (634, 2, 65, 65)
    assert clbench(capsys, *arguments[:-1], "me/positions-v0")[0] == 0
    assert load_dataset("m/me/positions-v0/data/main_data.hdf5").observations["observation"].shape == (634, 2)
    spaces = json.loads((folder / "m/me/mine-v3/data/metadata.json").read_text())["action_space"]
    assert np.isfinite(json.loads(spaces)["high"]).all()  # the environment's


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["infoo", NAME], "Unknown verb 'infoo' in clbench data. Did you mean 'info'"),
        (["info", "two-rooms/size-643-v0"], "Did you mean 'two-rooms/size-634-v0'"),
        (["info", "imported/nothing"], "Unknown imported data set 'imported/nothing'. Known: none"),
        (["info", "imported/../x"], "cannot be the name of imported data"),
        (["info", "nothing.npz"], "There is no data set at nothing.npz"),
        (["import", "nothing.hdf5"], "There is no data set at nothing.hdf5"),
        (["import", "nothing-v0"], "There is no Minari data set 'nothing-v0'"),
        (["import", "nothing-v0?kyes=a"], "Did you mean 'keys'"),
        (["export", NAME, "--format", "minari", "--out", "m", "--name", "no.dots-v0"], "'no.dots-v0' is no Minari id"),
        (["export", NAME, "--format", "ogbench", "--out", "m"], "OGBench files end in .npz"),
        (["export", NAME, "--format", "ogbench", "--out", "m.npz", "--name", "x"], "--name is for --format minari"),
    ],
)
def test_bad_input_is_one_paragraph(capsys: Any, folder: Path, arguments: list[str], message: str) -> None:
    code, _, err = clbench(capsys, *arguments)
    assert code == 2 and message in err and "Traceback" not in err
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "x y"])
def test_names_of_imported_data_stay_in_their_folder(folder: Path, capsys: Any, name: str) -> None:
    write_ogbench(load_dataset(NAME), folder / "walks.npz")
    if name:
        assert "cannot be the name of imported data" in clbench(capsys, "import", "walks.npz", "--name", name)[2]
    with pytest.raises(ConfigError, match="cannot be the name of imported data"):
        load_dataset(f"imported/{name}")


def test_help(capsys: Any) -> None:
    assert clbench(capsys)[0] == 2 and clbench(capsys, "--help")[0] == 0
    for verb in ("list", "info", "make", "import", "export"):
        code, out, _ = clbench(capsys, verb, "--help")
        assert code == 0 and f"clbench data {verb}" in out


# -- files by their path -------------------------------------------------------------------------------------------------


def test_our_own_files_and_ogbench_files_are_told_apart(folder: Path) -> None:
    data = load_dataset(f"{NAME}?observation=pixels")
    save_dataset(data, folder / "ours.npz")
    write_ogbench(data, folder / "theirs.npz")
    assert dataset_checksum(load_dataset("ours.npz")) == dataset_checksum(data)
    assert load_dataset("theirs.npz").observations["observation"].shape == (634, 2)
    with pytest.raises(UnknownNameError, match="Unknown key 'split' in data set 'ours.npz'"):
        load_dataset("ours.npz?split=val")
    (folder / "ours.npz").write_bytes((folder / "ours.npz").read_bytes()[:300])
    with pytest.raises(DataError, match="is corrupt or truncated"):
        load_dataset("ours.npz")


def test_a_run_on_a_file(folder: Path) -> None:
    """A data set in a file trains an agent; one with other actions is refused at the start."""
    import clbench as package
    from clbench.data.dataset import OfflineDataset

    data = load_dataset(NAME)
    write_ogbench(data, folder / "walks.npz")
    wide = OfflineDataset(
        data.observations, torch.cat([data.actions] * 2, 1), data.lengths, data.final_observations, name="wide"
    )
    write_ogbench(wide, folder / "wide.npz")

    def stream(file: str) -> package.Stream:
        task = package.Task("only", "clbench/TwoRooms-v0", {}, file, package.TaskList.from_seeds(2))
        return package.Stream("file", (task,), (package.Phase("only", 2),))

    assert package.run(stream("walks.npz"), "bc", out=folder / "run").results["status"] == "complete"
    with pytest.raises(DataError, match=r"'wide.npz' of task 'only': the data have actions of shape \(4,\)"):
        package.run(stream("wide.npz"), "bc", out=folder / "wide")
