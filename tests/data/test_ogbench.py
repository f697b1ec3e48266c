"""OGBench's files: exact round trips, what others write, and files that are damaged or mean harm."""

from __future__ import annotations

import importlib.util
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clbench.data.dataset import GoalSampling, OfflineDataset
from clbench.data.ogbench import read_ogbench, write_ogbench
from clbench.data.registry import load_dataset
from clbench.data.storage import dataset_checksum
from clbench.errors import ConfigError, DataError, UnknownNameError

LENGTHS = st.lists(st.integers(1, 4), min_size=1, max_size=5)
KINDS = st.sampled_from(["tensor", "goal", "dict", "pixels"])


def walks(lengths: list[int], kind: str = "goal", discrete: bool = False, seed: int = 0) -> OfflineDataset:
    n, rng = sum(lengths), torch.Generator().manual_seed(seed)

    def numbers(rows: int, *shape: int) -> torch.Tensor:
        return torch.rand(rows, *shape, generator=rng)

    def observe(rows: int) -> Any:
        if kind == "tensor":
            return numbers(rows, 3)
        x = (numbers(rows, 5, 5, 3) * 255).to(torch.uint8) if kind == "pixels" else numbers(rows, 3)
        if kind == "dict":
            return {"observation": x, "velocity": numbers(rows, 2)}
        goal = numbers(rows, 2) if kind == "goal" and seed % 2 else x  # a goal of its own, or the observation
        return {"observation": x, "achieved_goal": goal, "velocity": numbers(rows, 2)}

    actions = (numbers(n) * 4).to(torch.int64) if discrete else numbers(n, 2)
    return OfflineDataset(observe(n), actions, torch.tensor(lengths), observe(len(lengths)), name="walks",
                          metadata={"a": 1})  # fmt: skip


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(LENGTHS, KINDS, st.booleans(), st.integers(0, 9))
def test_round_trip(tmp_path: Path, lengths: list[int], kind: str, discrete: bool, seed: int) -> None:
    path = tmp_path / "data.npz"
    path.unlink(missing_ok=True)
    data = walks(lengths, kind, discrete, seed)
    write_ogbench(data, path)
    again = load_dataset(str(path))
    assert dataset_checksum(again) == dataset_checksum(data)
    assert again.metadata["clbench"]["metadata"] == {"a": 1}
    write_ogbench(again, tmp_path / "again.npz")
    with np.load(path) as a, np.load(tmp_path / "again.npz") as b:  # and the other way round
        assert all(np.array_equal(a[k], b[k]) for k in a.files if k != "clbench")
    (tmp_path / "again.npz").unlink()


@given(LENGTHS)
def test_the_layout_by_brute_force(tmp_path_factory: pytest.TempPathFactory, lengths: list[int]) -> None:
    """As OGBench's documentation has it: T + 1 rows per episode, the end marked, the last action a repetition."""
    path = tmp_path_factory.mktemp("layout") / "data.npz"
    data = walks(lengths, "tensor")
    write_ogbench(data, path)
    observations, actions, terminals = [], [], []
    for e, n in enumerate(lengths):
        start = sum(lengths[:e])
        observations += [*data.observations[start : start + n].tolist(), data.final_observations[e].tolist()]
        actions += [*data.actions[start : start + n].tolist(), data.actions[start + n - 1].tolist()]
        terminals += [False] * n + [True]
    with np.load(path) as file:
        assert file["observations"].tolist() == observations
        assert file["actions"].tolist() == actions
        assert file["terminals"].tolist() == terminals and file["terminals"].dtype == bool


@pytest.mark.skipif(
    importlib.util.find_spec("ogbench") is None, reason="needs the package ogbench (pip install 'clbench[mujoco]')"
)
def test_ogbench_loads_what_we_write(tmp_path: Path) -> None:
    from ogbench.utils import load_dataset as load  # type: ignore[import-not-found]

    data = load_dataset("two-rooms/size-1269-v0")
    loaded = load(str(write_ogbench(data, tmp_path / "data.npz")))
    following = data.next_observation(torch.arange(len(data)))["observation"]
    assert np.array_equal(loaded["observations"], data.observations["observation"].numpy())
    assert np.array_equal(loaded["next_observations"], following.numpy())
    assert np.array_equal(loaded["actions"], data.actions.numpy())
    assert np.flatnonzero(loaded["terminals"]).tolist() == (data.starts + data.lengths - 1).tolist()


# -- files of others -----------------------------------------------------------------------------------------------------


def foreign(rows: int = 7, **changes: Any) -> dict[str, np.ndarray]:
    """As OGBench writes them: two episodes of 3 and 4 rows."""
    x = np.arange(rows * 4, dtype=np.float64).reshape(rows, 4)
    arrays = {
        "observations": x, "actions": x[:, :2].astype(np.float32) / 100, "qpos": x[:, :3] + 0.5,
        "terminals": np.array([0, 0, 1, 0, 0, 0, 1][:rows], dtype=np.int32), "button_states": np.arange(rows)[:, None],
    }  # fmt: skip
    return {k: v for k, v in {**arrays, **changes}.items() if v is not None}


def save(path: Path, **changes: Any) -> str:
    np.savez_compressed(path, **foreign(**changes))  # type: ignore[arg-type]
    return str(path)


def test_an_ogbench_file(tmp_path: Path) -> None:
    data = load_dataset(save(tmp_path / "x.npz"))
    assert data.lengths.tolist() == [2, 3] and data.is_goal
    assert data.observations["observation"][:, 0].tolist() == [0, 4, 12, 16, 20]
    assert data.final_observations["observation"][:, 0].tolist() == [8, 24]
    assert data.observations["achieved_goal"] is data.observations["observation"]
    assert data.actions.shape == (5, 2) and data.actions.dtype == torch.float32
    assert data.observations["observation"].dtype == torch.float32
    data.sample(4, torch.Generator().manual_seed(0), GoalSampling())


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("achieved_goal=0,1", [[0, 1], [4, 5], [12, 13], [16, 17], [20, 21]]),
        ("achieved_goal=-1", [[3], [7], [15], [19], [23]]),
        ("achieved_goal=qpos", [[i + 0.5, i + 1.5, i + 2.5] for i in (0, 4, 12, 16, 20)]),
    ],
)  # fmt: skip
def test_goals_of_part_of_the_state(tmp_path: Path, option: str, expected: list[list[float]]) -> None:
    data = load_dataset(f"{save(tmp_path / 'x.npz')}?{option}")
    assert data.observations["achieved_goal"].tolist() == expected
    assert data.observations["observation"].shape == (5, 4)


def test_no_goals_and_further_arrays(tmp_path: Path) -> None:
    path = save(tmp_path / "x.npz")
    assert load_dataset(f"{path}?achieved_goal=none").observations.shape == (5, 4)
    data = load_dataset(f"{path}?achieved_goal=none&keys=button_states,qpos")
    assert data.observations["button_states"][:, 0].tolist() == [0, 1, 3, 4, 5]
    assert data.observations["button_states"].dtype == torch.int64 and data.observations["qpos"].shape == (5, 3)


def test_options_overrule_what_we_wrote(tmp_path: Path) -> None:
    write_ogbench(walks([2, 2], seed=1), tmp_path / "x.npz")
    assert load_dataset(str(tmp_path / "x.npz")).observations["achieved_goal"].shape == (4, 2)
    assert load_dataset(f"{tmp_path / 'x.npz'}?achieved_goal=0").observations["achieved_goal"].shape == (4, 1)
    assert set(load_dataset(f"{tmp_path / 'x.npz'}?achieved_goal=none").observations) == {"observation", "velocity"}


def test_powderworld_has_discrete_actions_and_pixels(tmp_path: Path) -> None:
    path = save(
        tmp_path / "x.npz", actions=np.array([1, 0, 0, 3, 2, 1, 1], np.int32),
        observations=np.zeros((7, 32, 32, 6), np.uint8),
    )  # fmt: skip
    data = load_dataset(path)
    assert data.actions.tolist() == [1, 0, 3, 2, 1] and data.actions.dtype == torch.int64
    assert data.observations["observation"].dtype == torch.uint8


def test_the_validation_file_beside_it(tmp_path: Path) -> None:
    path = save(tmp_path / "maze.npz")
    with pytest.raises(DataError, match="There is no data set at .*maze-val.npz"):
        load_dataset(f"{path}?split=val")
    save(tmp_path / "maze-val.npz", observations=np.zeros((7, 4)))
    assert not load_dataset(f"{path}?split=val").observations["observation"].any()
    assert load_dataset(path).observations["observation"].any()


# -- bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"terminals": None}, "has no array 'terminals'; OGBench files have observations, actions, terminals"),
        ({"actions": np.zeros((6, 2))}, r"actions has shape \(6, 2\), but there are 7 observations"),
        ({"terminals": np.zeros(7)}, "the last row is not the end of an episode"),
        ({"terminals": np.array([0, 0, 1, 0, 0, 1, 0])}, "the file seems to be cut"),
        ({"terminals": np.array([0, 0, 2, 0, 0, 0, 1])}, "terminals must be 0 or 1"),
        ({"terminals": np.zeros((7, 1))}, "terminals must be 0 or 1"),
        ({"terminals": np.array([1, 0, 1, 0, 0, 0, 1])}, "episode 0 has no transition"),
        ({"actions": np.array(["a"] * 7)}, "actions is of type <U1"),
        ({"observations": np.full((7, 2), np.nan)}, "observation holds NaN or infinite values in 5 rows"),
        ({"actions": np.full((7, 2), np.inf)}, "actions holds NaN or infinite values"),
        ({"observations": np.array(1.0)}, "observations is a single number"),
        ({"achieved_goal": np.zeros((6, 2))}, r"achieved_goal has shape \(6, 2\), but there are 7 observations"),
        ({"achieved_goal": np.array(1.0)}, r"achieved_goal has shape \(\), but there are 7 observations"),
        (
            {"clbench": np.frombuffer(b'{"observations": ["observation", "x"]}', np.uint8), "x": np.zeros(8)},
            r"x has shape \(8,\), but there are 7 observations",
        ),
        ({"clbench": np.zeros(3, np.uint8)}, "is no header of ours"),
        (
            {"clbench": np.frombuffer(b'{"observations": ["observation", "x"]}', np.uint8)},
            "has no array 'x', which its",
        ),
    ],
)
def test_bad_arrays(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_dataset(save(tmp_path / "x.npz", **changes))


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        ("achieved_goal=short", DataError, r"short has shape \(6, 2\), but there are 7 observations"),
        ("keys=qpso", UnknownNameError, "Unknown array 'qpso' in .*Did you mean 'qpos'"),
        ("achieved_goal=position", ConfigError, "achieved_goal must be 'observation', 'none', .* got 'position'"),
        ("achieved_goal=0,9", ConfigError, "got '0,9'"),
        ("achieved_goal=,", ConfigError, "got ','"),
        ("split=test", UnknownNameError, "Unknown value of split 'test'"),
        ("splt=val", UnknownNameError, "Did you mean 'split'"),
    ],
)
def test_bad_options(tmp_path: Path, option: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_dataset(f"{save(tmp_path / 'x.npz', short=np.zeros((6, 2)))}?{option}")


@pytest.mark.parametrize("name", ["../evil.npy", "/abs/evil.npy", "a/../../evil.npy", "..\\evil.npy", "C:\\evil.npy"])
def test_names_that_leave_the_folder(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.npz"
    save(path)
    load_dataset(str(path))  # sound before
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"")
    with pytest.raises(DataError, match="that leaves its folder"):
        load_dataset(str(path))


class Bomb:
    """Runs code when it is unpickled: it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.folder),))


def test_pickles_are_not_read(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    path = save(tmp_path / "x.npz", extra=np.array([Bomb(trace)], dtype=object))
    with pytest.raises(DataError, match="holds pickled objects, which could run code"):
        load_dataset(path)
    assert not trace.exists()
    with np.load(path, allow_pickle=True) as file:
        _ = file["extra"]
    assert trace.exists()  # negative control: the pickle would have run


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.95])
def test_a_cut_file(tmp_path: Path, share: float) -> None:
    path = Path(save(tmp_path / "x.npz"))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DataError, match="is corrupt or truncated"):
        load_dataset(str(path))


def test_files_that_are_not_there_or_not_archives(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no data set at .*nothing.npz"):
        load_dataset(str(tmp_path / "nothing.npz"))
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    with pytest.raises(DataError, match="is corrupt or truncated"):
        load_dataset(str(tmp_path / "array.npz"))


# -- writing -------------------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = write_ogbench(walks([2]), tmp_path / "new" / "x.npz")
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="exists and is not overwritten; choose another --out"):
        write_ogbench(walks([3]), path)
    assert path.read_bytes() == before
    with pytest.raises(ConfigError, match="OGBench files end in .npz"):
        write_ogbench(walks([2]), tmp_path / "x.hdf5")


def test_keys_that_would_be_something_else(tmp_path: Path) -> None:
    x, last = torch.zeros(2, 1), torch.zeros(1, 1)
    clash = OfflineDataset({"observation": x, "terminals": x.clone()}, torch.zeros(2, 1), torch.tensor([2]),
                           {"observation": last, "terminals": last.clone()})  # fmt: skip
    with pytest.raises(DataError, match="has the key 'terminals', which OGBench files use for something else"):
        write_ogbench(clash, tmp_path / "x.npz")
    without = OfflineDataset({"position": x}, torch.zeros(2, 1), torch.tensor([2]), {"position": last})
    with pytest.raises(DataError, match=r"has no key 'observation', only \['position'\]"):
        write_ogbench(without, tmp_path / "x.npz")
    with pytest.raises(DataError, match="has no observations after the last actions"):
        write_ogbench(OfflineDataset(x, x, torch.tensor([2])), tmp_path / "x.npz")


@pytest.mark.parametrize(
    "name", ["two-rooms/size-634-v0?observation=pixels", "point-maze?transitions=300&observation=pixels"]
)
def test_rendered_columns_are_pixels_only_when_asked(tmp_path: Path, name: str) -> None:
    data = load_dataset(name)
    column = data.observations["observation"]
    positions = read_ogbench(write_ogbench(data, tmp_path / "positions.npz"))
    assert torch.equal(positions.observations["observation"], column.columns["position"])
    assert set(positions.observations) == set(data.observations)
    with np.load(tmp_path / "positions.npz") as file:  # what else the pictures are drawn from is there
        assert set(column.columns) - {"position"} <= set(file.files)
    pixels = read_ogbench(write_ogbench(data, tmp_path / "pixels.npz", pixels=True))
    index = torch.arange(0, len(data), 7)
    assert torch.equal(pixels.observations["observation"][index], column[index])
    assert torch.equal(pixels.next_observation(index)["observation"], data.next_observation(index)["observation"])


def test_pictures_that_do_not_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_dataset("two-rooms/size-634-v0?observation=pixels")
    monkeypatch.setattr("clbench.data.ogbench._available", lambda: 10**6)
    with pytest.raises(DataError, match=r"need .* GB, and .* GB are free; export positions"):
        write_ogbench(data, tmp_path / "x.npz", pixels=True)
    write_ogbench(data, tmp_path / "x.npz")


def test_memory_is_asked_for_pictures_only_and_may_be_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("clbench.data.ogbench._available", lambda: asked.append(1))
    data = load_dataset("two-rooms/size-634-v0?observation=pixels")
    write_ogbench(data, tmp_path / "positions.npz")
    assert asked == []
    write_ogbench(data, tmp_path / "pixels.npz", pixels=True)
    assert asked == [1]
