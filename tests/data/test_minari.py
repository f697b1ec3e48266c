"""Minari data sets: what we write Minari reads with equal arrays, what Minari writes we read, and nothing else gets in."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, Text, Tuple

from clbench.contracts import Spaces
from clbench.data.dataset import OfflineDataset, Rendered
from clbench.data.minari import check_minari_id, find_minari, minari_id, read_minari, write_minari
from clbench.data.registry import load_dataset
from clbench.data.storage import dataset_checksum
from clbench.errors import ConfigError, DataError, UnknownNameError

pytestmark = pytest.mark.filterwarnings("ignore:.*is set to None:UserWarning", "ignore:env_spec is None:UserWarning")
needs_minari = pytest.mark.skipif(
    importlib.util.find_spec("minari") is None, reason="needs the package minari (pip install 'clbench[minari]')"
)


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Minari root of the test's own, for Minari and for us."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


def walks(kind: str = "goal", lengths: tuple[int, ...] = (3, 1, 11, 2) * 3, discrete: bool = False) -> OfflineDataset:
    """More than ten episodes, as HDF5 lists episode_10 before episode_2."""
    n, e = sum(lengths), len(lengths)
    rng = torch.Generator().manual_seed(0)

    def numbers(rows: int, *shape: int) -> torch.Tensor:
        return torch.rand(rows, *shape, generator=rng)

    def observe(rows: int) -> Any:
        if kind == "tensor":
            return numbers(rows, 3)
        if kind == "image":
            return (numbers(rows, 40, 33, 3) * 255).to(torch.uint8)
        if kind == "discrete":
            return (numbers(rows) * 5).to(torch.int64)
        x = numbers(rows, 3)
        return {"observation": x, "achieved_goal": x, "velocity": numbers(rows, 2)}

    actions = (numbers(n) * 4).to(torch.int64) if discrete else numbers(n, 2)
    return OfflineDataset(
        observe(n), actions, torch.tensor(lengths), observe(e), name="walks", metadata={"by": "test", "n": [1, 2]}
    )


def episode(data: OfflineDataset, e: int, key: str = "") -> tuple[np.ndarray, np.ndarray]:
    """(T + 1 observations, T actions), by slicing."""
    start, length = int(data.starts[e]), int(data.lengths[e])
    obs = data.observations[key] if key else data.observations
    final = data.final_observations[key] if key else data.final_observations
    rows = torch.cat([obs[start : start + length], final[e : e + 1]])
    return rows.numpy(), data.actions[start : start + length].numpy()


# -- there and back ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("kind", ["goal", "tensor", "image", "discrete"])
def test_round_trip(root: Path, kind: str, discrete: bool) -> None:
    data = walks(kind, discrete=discrete)
    path = write_minari(data, root, "test/walks-v0")
    again = read_minari("test/walks-v0")
    assert dataset_checksum(again) == dataset_checksum(data)
    assert again.metadata["clbench"]["metadata"] == data.metadata
    if kind == "goal":
        assert again.observations["observation"] is again.observations["achieved_goal"]
    for source in (path, str(path), path / "data", path / "data" / "main_data.hdf5"):
        assert dataset_checksum(read_minari(source)) == dataset_checksum(data)
    assert dataset_checksum(load_dataset(str(path / "data" / "main_data.hdf5"))) == dataset_checksum(data)


def test_the_checksum_knows_data_apart() -> None:
    """Negative control of the test above."""
    data, other = walks(), walks()
    other.actions[5, 1] += 1e-6
    assert dataset_checksum(data) != dataset_checksum(other)
    other = walks()
    other.final_observations["velocity"][0, 0] += 1e-6
    assert dataset_checksum(data) != dataset_checksum(other)


@needs_minari
@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("kind", ["goal", "tensor", "image", "discrete"])
def test_minari_loads_what_we_write(root: Path, kind: str, discrete: bool) -> None:
    import minari

    data = walks(kind, discrete=discrete)
    write_minari(data, root, "test/nested/walks-v0")
    assert "test/nested/walks-v0" in minari.list_local_datasets()
    assert {"test", "test/nested"} <= set(minari.namespace.list_local_namespaces())
    loaded = minari.load_dataset("test/nested/walks-v0")
    assert (loaded.total_episodes, loaded.total_steps) == (data.num_episodes, len(data))
    for e, found in enumerate(loaded.iterate_episodes()):
        repr(found)  # which fails in Minari where infos are missing
        assert found.id == e
        observed = found.observations if kind == "goal" else {"": found.observations}
        assert set(observed) == (set(data.observations) if kind == "goal" else {""})
        for key, value in observed.items():
            rows, actions = episode(data, e, key)
            assert value.dtype == rows.dtype and np.array_equal(value, rows)
            assert found.actions.dtype == actions.dtype and np.array_equal(found.actions, actions)
        length = int(data.lengths[e])
        assert found.truncations.tolist() == [False] * (length - 1) + [True]
        assert not found.terminations.any() and not found.rewards.any() and len(found.rewards) == length
    assert loaded.action_space.contains(found.actions[0])
    one = found.observations if kind != "goal" else {k: v[0] for k, v in found.observations.items()}
    assert loaded.observation_space.contains(one if kind == "goal" else one[0])


@needs_minari
def test_two_rooms_in_minari(root: Path) -> None:
    """The whole way, by names: dots are mapped, spaces are the environment's."""
    import minari

    from clbench.cli.main import main

    name = "two-rooms/size-1269-v0"
    with pytest.raises(SystemExit) as code:
        main(["data", "export", name, "--format", "minari", "--out", str(root)])
    assert code.value.code == 0
    loaded, data = minari.load_dataset(name), load_dataset(name)
    rows = np.concatenate([e.observations["observation"][:-1] for e in loaded.iterate_episodes()])
    assert np.array_equal(rows, data.observations["observation"].numpy())
    assert np.array_equal(np.concatenate([e.actions for e in loaded.iterate_episodes()]), data.actions.numpy())
    assert isinstance(loaded.action_space, Box) and np.isfinite(loaded.action_space.high).all()


@needs_minari
@pytest.mark.parametrize("jpeg", [False, True])
def test_we_load_what_minari_writes(root: Path, jpeg: bool) -> None:
    import minari
    from minari.data_collector import EpisodeBuffer

    rng = np.random.default_rng(0)
    space = Dict({
        "observation": Box(-np.inf, np.inf, (3,), np.float64), "desired_goal": Box(-1, 1, (2,)), "count": Discrete(7),
        "picture": Box(0, 255, (36, 40, 3), np.uint8),
    })  # fmt: skip
    lengths = [4, 1, 7, *[2] * 9]
    smooth = np.broadcast_to(np.arange(40, dtype=np.uint8)[None, :, None] * 5, (36, 40, 3))

    def make(t: int) -> dict[str, np.ndarray]:
        return {
            "observation": rng.normal(size=(t + 1, 3)), "desired_goal": np.zeros((t + 1, 2), np.float32),
            "count": rng.integers(0, 7, t + 1), "picture": np.stack([smooth] * (t + 1)),
        }  # fmt: skip

    observed, taken = [make(t) for t in lengths], [rng.normal(size=(t, 2)).astype(np.float32) for t in lengths]
    buffers = [
        EpisodeBuffer(
            observations=o, actions=a, rewards=np.ones(len(a)), terminations=np.arange(len(a)) == 0,
            truncations=np.zeros(len(a), bool), infos={"x": np.zeros(len(a) + 1)}, seed=i, options={"k": 1},
        )
        for i, (o, a) in enumerate(zip(observed, taken, strict=True))
    ]  # fmt: skip
    minari.create_dataset_from_buffers(
        "outside/walks-v3", buffers, observation_space=space, action_space=Box(-9, 9, (2,)), jpeg_encoding=jpeg,
        description="from outside",
    )  # fmt: skip
    data = read_minari("outside/walks-v3")
    assert data.lengths.tolist() == lengths  # terminations are no borders
    assert set(data.observations) == {"observation", "count", "picture"}  # goals are drawn, never read as states
    assert data.metadata["description"] == "from outside"
    for e, (o, a) in enumerate(zip(observed, taken, strict=True)):
        rows, actions = episode(data, e, "observation")
        assert rows.dtype == np.float32 and np.array_equal(rows, o["observation"].astype(np.float32))
        assert np.array_equal(actions, a)
        assert np.array_equal(episode(data, e, "count")[0], o["count"])
        off = np.abs(episode(data, e, "picture")[0].astype(int) - o["picture"]).max()
        assert off <= (4 if jpeg else 0)


@needs_minari
def test_minari_box_and_discrete(root: Path) -> None:
    import minari
    from minari.data_collector import EpisodeBuffer

    o, a = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32), np.array([3, 0, 1, 2])
    none = np.zeros(4, bool)
    minari.create_dataset_from_buffers(
        "box-v0", [EpisodeBuffer(None, None, None, o, a, np.ones(4), none, none, {})],
        observation_space=Box(-9, 9, (3,)), action_space=Discrete(4),
    )  # fmt: skip
    data = read_minari("box-v0")
    assert np.array_equal(data.observations.numpy(), o[:-1]) and np.array_equal(data.final_observations.numpy(), o[-1:])
    assert data.actions.tolist() == a.tolist()


# -- pictures ------------------------------------------------------------------------------------------------------------


def test_rendered_columns_are_pixels_only_when_asked(root: Path) -> None:
    data = load_dataset("two-rooms/size-634-v0?observation=pixels")
    column = data.observations["observation"]
    assert isinstance(column, Rendered)
    write_minari(data, root, "positions-v0")
    positions = read_minari("positions-v0")
    assert torch.equal(positions.observations["observation"], column.columns["position"])
    with h5py.File(root / "positions-v0" / "data" / "main_data.hdf5") as file:
        assert set(file["episode_0/infos"]) == {"wall_x", "door_y"}  # what else the pictures are drawn from
    write_minari(data, root, "pixels-v0", pixels=True)
    pixels = read_minari("pixels-v0").observations
    index = torch.arange(0, 634, 7)
    assert torch.equal(pixels["observation"][index], column[index]) and pixels["observation"].shape == (634, 2, 65, 65)


# -- names ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("two-rooms/mix-0.01-v0", "two-rooms/mix-0_01-v0"),
        ("two-rooms/good-v0", "two-rooms/good-v0"),
        ("two-rooms?door_y=30.5", "two-rooms_door_y_30_5-v0"),
        ("two-rooms/size-634-v0?observation=pixels", "two-rooms/size-634-v0_observation_pixels-v0"),
        ("/tmp/some folder/x.npz", "tmp/some_folder/x_npz-v0"),
    ],
)
def test_names_are_mapped(name: str, expected: str) -> None:
    assert minari_id(name) == expected


@needs_minari
@pytest.mark.parametrize("name", ["two-rooms/mix-0.01-v0", "two-rooms?door_y=30.5", "../x", "a b/c"])
def test_minari_agrees_that_mapped_names_are_ids(name: str) -> None:
    from minari.dataset.minari_dataset import parse_dataset_id

    assert parse_dataset_id(minari_id(name))
    with pytest.raises(ValueError):
        parse_dataset_id(name)  # negative control: these needed mapping


@pytest.mark.parametrize(
    "name", ["two-rooms", "two.rooms-v0", "a/b-v0", "../x-v0", "/abs-v0", "x//y-v0", "x-v0/../y-v0", ""]
)
def test_other_ids_are_refused(root: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="is no Minari id"):
        check_minari_id(name)
    with pytest.raises(ConfigError, match="is no Minari id"):
        write_minari(walks(), root, name)
    assert not root.exists()


def test_nothing_is_overwritten(root: Path) -> None:
    path = write_minari(walks(), root, "test/walks-v0")
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match="exists and is not overwritten; choose another --name"):
        write_minari(walks("tensor"), root, "test/walks-v0")
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before
    assert [p.name for p in root.iterdir()] == ["test"]  # nothing half-written is left


def test_a_failed_export_leaves_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clbench.data.minari.os.rename", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(Exception, match="The disk is full"):
        write_minari(walks(), root, "walks-v0")
    assert list(root.iterdir()) == []


def test_data_without_a_last_observation_are_not_exported(root: Path) -> None:
    data = OfflineDataset(torch.zeros(2, 1), torch.zeros(2, 1), torch.tensor([1, 1]), name="labels")
    with pytest.raises(DataError, match="'labels' has no observations after the last actions"):
        write_minari(data, root, "labels-v0")


def test_spaces_that_fit_are_written(root: Path) -> None:
    spaces = Spaces(Box(-5, 5, (3,)), Box(-2, 3, (2,)))
    path = write_minari(walks("tensor"), root, "walks-v0", spaces=spaces)
    header = json.loads((path / "data" / "metadata.json").read_text())
    assert json.loads(header["action_space"]) | {"low": [-2, -2], "high": [3, 3]} == json.loads(header["action_space"])
    assert json.loads(header["observation_space"])["high"] == [5, 5, 5]
    other = Spaces(Box(-5, 5, (4,)), Discrete(2))  # of another environment
    header = json.loads((write_minari(walks("tensor"), root, "b-v0", spaces=other) / "data/metadata.json").read_text())
    assert json.loads(header["observation_space"])["shape"] == [3]
    assert json.loads(header["action_space"])["high"] == [float("inf")] * 2


# -- bad input -----------------------------------------------------------------------------------------------------------


def change(root: Path, edit: Callable[[h5py.File], Any]) -> Path:
    path = write_minari(walks("goal"), root, "test/walks-v0")
    with h5py.File(path / "data" / "main_data.hdf5", "a") as file:
        edit(file)
    return path


def replace(file: h5py.File, name: str, value: Any) -> None:
    del file[name]
    file[name] = value


OTHER = "other.bin"
EDITS: dict[str, tuple[Callable[[h5py.File], Any], str]] = {
    "external link": (
        lambda f: replace(f, "episode_2/actions", h5py.ExternalLink("other.hdf5", "/x")), "is a link to elsewhere"),
    "external link to an absolute path": (
        lambda f: replace(f, "episode_2/observations", h5py.ExternalLink("/tmp/x.hdf5", "/")), "'observations' is a link"),
    "soft link": (lambda f: replace(f, "episode_2/actions", h5py.SoftLink("/episode_0/actions")), "is a link to elsewhere"),
    "linked episode": (lambda f: replace(f, "episode_2", h5py.SoftLink("/episode_0")), "'episode_2' is a link"),
    "external storage": (
        lambda f: (f.__delitem__("episode_2/actions"),
                   f.create_dataset("episode_2/actions", (11, 2), "f4", external=[(OTHER, 0, 88)])),
        "keeps its numbers in another file"),
    "virtual": (
        lambda f: (f.__delitem__("episode_2/actions"), f.create_virtual_dataset("episode_2/actions", virtual())),
        "keeps its numbers in another file"),
    "missing": (lambda f: f.__delitem__("episode_2/actions"), "episode_2 has no 'actions'"),
    "too short": (lambda f: replace(f, "episode_2/observations/velocity", np.zeros((11, 2), "f4")),
                  "episode_2 has 11 observations 'velocity' for 11 actions, expected 12"),
    "other shape": (lambda f: replace(f, "episode_2/actions", np.zeros((11, 3), "f4")), "actions are not of one kind"),
    "missing key": (lambda f: f.__delitem__("episode_2/observations/velocity"), "'velocity' are not of one kind in all"),
    "text": (lambda f: replace(f, "episode_0/actions", np.array([b"abc"] * 3)), "of one kind|of type"),
    "group": (
        lambda f: (f.__delitem__("episode_0/actions"), f.create_group("episode_0/actions")), "'actions' is no array"),
    "episode is no group": (lambda f: replace(f, "episode_0", np.zeros(3)), "episode_0 is no group"),
    "nan": (lambda f: replace(f, "episode_1/actions", np.full((1, 2), np.nan, "f4")), "NaN or infinite .*first is row 3"),
    "nothing stored": (
        lambda f: (f.__delitem__("episode_2/actions"), f.create_dataset("episode_2/actions", (11, 2), "f4", chunks=True)),
        "promises .* but holds none"),
    "empty": (lambda f: [f.__delitem__(k) for k in list(f)], "has no episode with an action"),
}  # fmt: skip


def virtual() -> h5py.VirtualLayout:
    layout = h5py.VirtualLayout((11, 2), "f4")
    layout[:] = h5py.VirtualSource("other.hdf5", "x", (11, 2))
    return layout


@pytest.mark.parametrize("edit", EDITS)
def test_bad_files(root: Path, edit: str) -> None:
    function, message = EDITS[edit]
    path = change(root, function)
    with pytest.raises(DataError, match=message):
        read_minari(path)


def test_links_would_have_been_followed(root: Path, tmp_path: Path) -> None:
    """Negative control: h5py alone reads the other file through the link that is refused above."""
    with h5py.File(tmp_path / "secret.hdf5", "w") as file:
        file["x"] = np.arange(22, dtype="f4").reshape(11, 2)
    path = change(
        root, lambda f: replace(f, "episode_2/actions", h5py.ExternalLink(str(tmp_path / "secret.hdf5"), "/x"))
    )
    with h5py.File(path / "data" / "main_data.hdf5") as file:
        assert file["episode_2/actions"][5, 0] == 10
    with pytest.raises(DataError, match="is a link to elsewhere"):
        read_minari(path)


def test_episodes_without_a_step_are_left_out(root: Path) -> None:
    def empty(file: h5py.File) -> None:
        replace(file, "episode_1/actions", np.zeros((0, 2), "f4"))

    assert read_minari(change(root, empty)).num_episodes == walks().num_episodes - 1


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_cut_file(root: Path, share: float) -> None:
    path = write_minari(walks(), root, "walks-v0") / "data" / "main_data.hdf5"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DataError, match="is corrupt or truncated"):
        read_minari(path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"observation_space": "{"}, "observation_space is no description of a space"),
        ({"observation_space": '{"type": "Tuple", "subspaces": []}'}, "the observation_space Tuple; only Box"),
        ({"action_space": '{"type": "Text"}'}, "the action_space Text; only Box"),
        ({"action_space": '{"type": "Dict", "subspaces": {}}'}, "has Dict actions"),
        (
            {"observation_space": '{"type":"Dict","subspaces":{"a":{"type":"Dict","subspaces":{}}}}'},
            "Dict at the key 'a' of its observation_space",
        ),
        ({"data_format": "arrow"}, "stored as 'arrow'; only"),
    ],
)
def test_bad_metadata(root: Path, entries: dict[str, Any], message: str) -> None:
    path = write_minari(walks(), root, "walks-v0") / "data" / "metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    with pytest.raises(DataError, match=message):
        read_minari("walks-v0")


def test_metadata_that_is_no_json(root: Path) -> None:
    path = write_minari(walks(), root, "walks-v0") / "data" / "metadata.json"
    path.write_text("{")
    with pytest.raises(DataError, match="cannot be read as JSON"):
        read_minari("walks-v0")
    path.write_text("[]")
    with pytest.raises(DataError, match="is no JSON object"):
        read_minari("walks-v0")


@pytest.mark.parametrize("source", ["nothing-v0", "../nothing-v0", "nowhere", "a/../../b-v0"])
def test_missing_data(root: Path, source: str) -> None:
    root.mkdir()
    with pytest.raises(DataError, match=f"no Minari data set {re.escape(repr(source))}.*{re.escape(str(root))}"):
        find_minari(source)


def test_the_default_root(monkeypatch: pytest.MonkeyPatch) -> None:
    from clbench.data.minari import minari_root

    monkeypatch.delenv("MINARI_DATASETS_PATH")
    monkeypatch.setenv("HOME", "/nowhere")
    assert minari_root() == Path("/nowhere/.minari/datasets")


@needs_minari
def test_spaces_we_do_not_know_are_named(root: Path) -> None:
    import minari
    from minari.data_collector import EpisodeBuffer

    one = EpisodeBuffer(
        None, None, None, (np.zeros(3), np.zeros(3)), np.zeros((2, 1), np.float32), np.zeros(2), np.zeros(2, bool),
        np.ones(2, bool), {},
    )  # fmt: skip
    space = Tuple((Box(0, 1, ()), Box(0, 1, ())))
    minari.create_dataset_from_buffers("t-v0", [one], observation_space=space, action_space=Box(-1, 1, (1,)))
    with pytest.raises(DataError, match="the observation_space Tuple"):
        read_minari("t-v0")


@needs_minari
def test_keys_are_chosen(root: Path) -> None:
    """MiniGrid's data in Minari hold text, which is no tensor: the other keys can be read."""
    import minari
    from minari.data_collector import EpisodeBuffer

    observed = {"mission": ["go", "go", "go"], "direction": np.array([0, 1, 2]), "place": np.zeros((3, 2), np.float32)}
    none = np.zeros(2, bool)
    space = Dict({"mission": Text(9), "direction": Discrete(4), "place": Box(0, 1, (2,))})
    minari.create_dataset_from_buffers(
        "grid-v0", [EpisodeBuffer(None, None, None, observed, np.array([1, 0]), np.ones(2), none, none, {})],
        observation_space=space, action_space=Discrete(3),
    )  # fmt: skip
    with pytest.raises(DataError, match="has Text at the key 'mission' of its observation_space; .*choose keys"):
        read_minari("grid-v0")
    assert set(read_minari("grid-v0", keys=("direction", "place")).observations) == {"direction", "place"}
    path = root / "grid-v0" / "data" / "main_data.hdf5"
    assert load_dataset(f"{path}?keys=direction").observations["direction"].tolist() == [0, 1]
    with pytest.raises(UnknownNameError, match="Unknown observation key 'directoin' in .*Did you mean 'direction'"):
        load_dataset(f"{path}?keys=directoin")


def test_keys_of_plain_observations(root: Path) -> None:
    write_minari(walks("tensor"), root, "walks-v0")
    with pytest.raises(UnknownNameError, match="Unknown observation key 'x'"):
        read_minari("walks-v0", keys=("x",))


def test_reading_does_not_import_minari() -> None:
    import subprocess
    import sys

    code = "import sys, clbench.data.minari, clbench.data.files; assert 'minari' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ})
