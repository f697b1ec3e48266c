"""The cache saves time and nothing else: whatever happens to it, the data are those that would be made."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clbench.data import cache, published
from clbench.data.cache import cache_path, cached, data_folder, safe_name
from clbench.data.dataset import OfflineDataset
from clbench.data.recipes import RECIPES
from clbench.data.registry import load_dataset
from clbench.data.storage import dataset_checksum, load_stored_dataset

NAME = "two-rooms/size-1269-v0"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache in which small sets are worth keeping."""
    monkeypatch.setenv("CLBENCH_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(cache, "WORTH_IT", 1000)
    return tmp_path / "data"


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> OfflineDataset:
    """Made without any cache."""
    with monkeypatch.context() as patch:
        patch.setattr(cache, "WORTH_IT", 10**9)
        return load_dataset(NAME)


def files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def same(a: OfflineDataset, b: OfflineDataset) -> bool:
    return dataset_checksum(a) == dataset_checksum(b) and (a.name, a.metadata) == (b.name, b.metadata)


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often data were made."""
    made: list[int] = []
    original = published._make_two_rooms

    def counting(*arguments: Any) -> OfflineDataset:
        made.append(1)
        return original(*arguments)

    monkeypatch.setattr(published, "_make_two_rooms", counting)
    return made


def test_cached_data_are_the_generated_bit_for_bit(folder: Path, generated: OfflineDataset, count: list[int]) -> None:
    first, second = load_dataset(NAME), load_dataset(NAME)
    assert len(count) == 1 and len(files(folder)) == 1
    assert same(first, generated) and same(second, generated)
    keys = second.observations
    assert keys["observation"] is keys["achieved_goal"]
    pixels = load_dataset(f"{NAME}?observation=pixels")  # drawn from the same file
    assert len(count) == 1 and len(files(folder)) == 1
    assert torch.equal(pixels.observations["observation"].columns["position"], keys["observation"])


def test_the_stored_file_is_what_is_read(folder: Path, generated: OfflineDataset) -> None:
    """Negative control: the second load does come from the file."""
    load_dataset(NAME)
    (file,) = files(folder)
    from clbench.data.storage import save_dataset

    other = load_stored_dataset(file)
    other.actions += 1
    save_dataset(other, file)
    assert not same(load_dataset(NAME), generated)


def test_changing_a_batch_does_not_change_the_cache(folder: Path, generated: OfflineDataset) -> None:
    load_dataset(NAME).actions.zero_()
    load_dataset(NAME).actions.zero_()
    assert same(load_dataset(NAME), generated)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other", "folder"])
def test_a_damaged_file_is_made_again(folder: Path, generated: OfflineDataset, count: list[int], damage: str) -> None:
    load_dataset(NAME)
    (file,) = files(folder)
    content = file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        at = content.index(generated.actions.numpy().tobytes()[:64]) + 3
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "other":
        np.savez(file, x=np.zeros(3))
    else:
        file.unlink()
        file.mkdir()
    with pytest.warns(UserWarning, match="cached data set 'two-rooms/size-1269-v0' is made again"):
        again = load_dataset(NAME)
    assert same(again, generated) and len(count) == 2
    if damage != "folder":  # the file was repaired
        assert same(load_dataset(NAME), generated) and len(count) == 2


def test_a_folder_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generated: OfflineDataset
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CLBENCH_DATA", str(tmp_path / "file" / "data"))
    assert same(load_dataset(NAME), generated)


@pytest.mark.skipif(os.geteuid() == 0, reason="everything can be written by root")
def test_a_read_only_folder(folder: Path, generated: OfflineDataset) -> None:
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert same(load_dataset(NAME), generated)


def test_a_folder_that_cannot_be_searched(
    folder: Path, monkeypatch: pytest.MonkeyPatch, generated: OfflineDataset
) -> None:
    real = Path.exists

    def exists(path: Path, **options: Any) -> bool:
        if folder in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, **options)

    monkeypatch.setattr(Path, "exists", exists)
    with pytest.raises(PermissionError):
        (folder / "generated" / "x.npz").exists()
    assert same(load_dataset(NAME), generated)


def test_a_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch, generated: OfflineDataset) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert same(load_dataset(NAME), generated)
    assert files(folder) == []


def test_options_and_seeds_have_files_of_their_own(folder: Path) -> None:
    names = [NAME, f"{NAME}?seed=1", f"{NAME}?collision=cancel", "two-rooms/size-5078-v0"]
    found = [dataset_checksum(load_dataset(name)) for name in names]
    assert len(set(found)) == len(files(folder)) == 4
    assert [dataset_checksum(load_dataset(name)) for name in reversed(names)] == found[::-1]


def test_a_file_of_other_code_or_libraries_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    code = ("clbench.rng", "clbench.envs.two_rooms_data", "clbench.streams.lists/two_rooms_v1.json")
    path = cache_path("x", {}, code)
    assert path == cache_path("x", {}, code)
    assert (
        len({path, cache_path("y", {}, code), cache_path("x", {"seed": 1}, code), cache_path("x", {}, code[:1])}) == 4
    )
    with monkeypatch.context() as patch:
        patch.setattr(cache.metadata, "version", lambda _: "0")
        assert cache_path("x", {}, code) != path
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda _: b"edited")
        assert cache_path("x", {}, code) != path


@pytest.mark.parametrize(
    ("name", "setting", "value"), [(NAME, "transitions", 1270), ("point-maze/5-layouts-v0", "layouts", 6)]
)
def test_changed_settings_have_another_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, setting: str, value: int
) -> None:
    recipe, seen = RECIPES[name], []

    def record(name: str, options: Any, transitions: int, make: Any, code: Any) -> OfflineDataset:
        seen.append(cache_path(name, options, code))
        return OfflineDataset({"observation": torch.zeros(1, 2)}, torch.zeros(1, 1), torch.tensor([1]))

    monkeypatch.setattr(published, "cached", record)
    load_dataset(name)
    load_dataset(name)
    assert seen[0] == seen[1] == published.kept_at(name) and seen[0] != published.kept_at(f"{name}?seed=1")
    monkeypatch.setitem(RECIPES, name, replace(recipe, settings={**recipe.settings, setting: value}))
    load_dataset(name)
    assert seen[2] == published.kept_at(name) != seen[0]


def test_where_data_are_kept(folder: Path) -> None:
    load_dataset(f"{NAME}?observation=pixels&seed=3")
    assert files(folder) == [published.kept_at(f"{NAME}?seed=3")]
    assert published.kept_at("two-rooms?transitions=2000") is None


def test_the_code_of_both_families_is_found() -> None:
    from clbench.data.published import CODE

    for code in CODE.values():
        assert cache_path("x", {}, code)


def test_metadata_are_the_same_with_and_without_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> OfflineDataset:
        return OfflineDataset(torch.zeros(1, 1), torch.zeros(1, 1), torch.tensor([1]), metadata={"layouts": ("a", "b")})

    found = [cached("x", {}, size, make, ()).metadata for size in (999, 1000, 1000)]  # never stored, stored, read
    assert found == [{"layouts": ["a", "b"]}] * 3 and make().metadata != found[0]


def test_small_sets_are_not_stored(folder: Path) -> None:
    load_dataset("two-rooms/size-634-v0")
    assert files(folder) == []
    data = OfflineDataset(torch.zeros(1, 1), torch.zeros(1, 1), torch.tensor([1]))
    assert cached("x", {}, 999, lambda: data, ()) is data
    cached("x", {}, 1000, lambda: data, ())
    assert len(files(folder)) == 1  # negative control


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"CLBENCH_DATA": "/a/b"}, "/a/b"),
        ({"CLBENCH_DATA": "~/b", "HOME": "/h"}, "/h/b"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/clbench/data"),
        ({"CLBENCH_DATA": "", "XDG_CACHE_HOME": "/x"}, "/x/clbench/data"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/h"}, "/h/.cache/clbench/data"),  # which the standard says to ignore
        ({"HOME": "/h"}, "/h/.cache/clbench/data"),
    ],
)
def test_where_it_is(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str) -> None:
    for name in ("CLBENCH_DATA", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert data_folder() == Path(expected)


@pytest.mark.parametrize("name", ["two-rooms/good-v0", "../x", "a b?c=d", "...", "/"])
def test_safe_names_are_one_part_of_a_path(name: str) -> None:
    safe = safe_name(name)
    assert Path("/folder", safe).resolve().parent == Path("/folder") and safe not in ("", ".", "..")
