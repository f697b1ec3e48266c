"""The published data sets: their sizes, what sets each apart, and that they are functions of their names."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch

from clbench.data import TABLE, published
from clbench.data.dataset import OfflineDataset, Rendered
from clbench.data.recipes import RECIPES
from clbench.data.registry import load_dataset
from clbench.errors import ConfigError, UnknownNameError

TWO_ROOMS = [name for name, recipe in RECIPES.items() if recipe.family == "two-rooms"]


def states(data: OfflineDataset) -> torch.Tensor:
    """(E, T + 1, 2) of the trajectories of full length."""
    steps = int(data.lengths[0])
    full = int((data.lengths == steps).sum())
    rows = data.observations["observation"][: full * steps].reshape(full, steps, 2)
    return torch.cat([rows, data.final_observations["observation"][:full, None]], 1)


def turning(data: OfflineDataset) -> torch.Tensor:
    """Mean cosine between consecutive actions of each trajectory: 0.89 for good data, 0 for the random policy."""
    actions = data.actions[: len(states(data)) * int(data.lengths[0])].reshape(len(states(data)), -1, 2)
    unit = actions / actions.norm(dim=-1, keepdim=True)
    return (unit[:, 1:] * unit[:, :-1]).sum(-1).mean(1)


def test_there_are_23_of_pldm_and_8_of_ogbench() -> None:
    families = [recipe.family for recipe in RECIPES.values()]
    assert {f: families.count(f) for f in families} == {"two-rooms": 19, "point-maze": 4, "ogbench-maze": 8}
    assert len(TWO_ROOMS) == 19
    assert {"two-rooms/good-v0", "two-rooms/length-17-v0", "two-rooms/size-5078-v0", "two-rooms/mix-0.01-v0",
            "two-rooms/no-door-v0", "point-maze/5-layouts-v0"} <= set(RECIPES) <= set(TABLE)  # fmt: skip


@pytest.mark.parametrize("name", [n for n in TWO_ROOMS if RECIPES[n].settings["transitions"] < 1_000_000])
def test_small_sets_are_the_beginning_of_larger_ones(name: str) -> None:
    small = load_dataset(name)
    larger = load_dataset("two-rooms/size-325000-v0")
    assert len(small) == RECIPES[name].settings["transitions"]
    assert torch.equal(small.actions, larger.actions[: len(small)])
    index = torch.arange(len(small))
    assert torch.equal(
        small.next_observation(index)["observation"], larger.next_observation(index)["observation"]
    )  # the cut trajectory too
    assert (small.lengths[:-1] == 90).all() and 0 < small.lengths[-1] <= 90


def test_a_small_set_draws_only_its_own_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    batches = published._batches

    def counted(*arguments: Any) -> Any:
        for i, batch in enumerate(batches(*arguments)):
            drawn.append(i)
            yield batch

    monkeypatch.setattr(published, "_batches", counted)
    load_dataset("two-rooms/size-81250-v0")
    assert drawn == [0]


def test_an_id_is_all_that_the_data_depend_on() -> None:
    name = "two-rooms/size-1269-v0"
    first = load_dataset(name)
    torch.rand(3)
    load_dataset(f"{name}?seed=1")
    again = load_dataset(name)
    assert torch.equal(first.actions, again.actions) and first.metadata == again.metadata
    assert not torch.equal(first.actions, load_dataset(f"{name}?seed=1").actions)  # negative control
    assert not torch.equal(
        first.observations["observation"], load_dataset(f"{name}?collision=cancel").observations["observation"]
    )


def test_pixels_are_of_the_same_walks() -> None:
    state, pixels = load_dataset("two-rooms/size-634-v0"), load_dataset("two-rooms/size-634-v0?observation=pixels")
    column = pixels.observations["observation"]
    assert isinstance(column, Rendered) and column is pixels.observations["achieved_goal"]
    assert column.shape == (634, 2, 65, 65) and column.dtype == torch.uint8
    assert torch.equal(column.columns["position"], state.observations["observation"])
    assert torch.equal(pixels.actions, state.actions)
    assert pixels.metadata == {**state.metadata, "observation": "pixels"}


@pytest.mark.parametrize("share", [0, 0.01, 0.16])
def test_mixtures_have_their_share_of_good_trajectories(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    recipe = RECIPES[f"two-rooms/mix-{share}-v0"]
    small = type(recipe)(recipe.name, "", recipe.family, {**recipe.settings, "transitions": 900 * 90})
    data = published._make_two_rooms(small, "stop", 0)
    good = turning(data) > 0.45
    assert int(good.sum()) == int(900 * share)
    assert share == 0 or not good[: int(900 * share)].all()  # in random order
    reference = states(load_dataset("two-rooms/size-20312-v0"))
    known = {t.tobytes() for t in reference[: int(900 * share)].numpy()}
    assert {t.tobytes() for t in states(data)[good].numpy()} == known  # the first ones of the good data
    assert (turning(load_dataset("two-rooms/size-20312-v0")) > 0.45).all()  # negative control of the threshold


def test_no_trajectory_of_no_door_passes() -> None:
    recipe = RECIPES["two-rooms/no-door-v0"]
    small = type(recipe)(recipe.name, "", recipe.family, {**recipe.settings, "transitions": 500 * 90})
    data = published._make_two_rooms(small, "stop", 0)

    def passing(x: torch.Tensor) -> int:
        return sum(bool((t < 31).any() and (t > 33).any()) for t in x[..., 0])

    assert len(data) == 500 * 90 and passing(states(data)) == 0
    assert passing(states(load_dataset("two-rooms/size-81250-v0"))) > 200  # negative control


@pytest.mark.parametrize("length", [17, 33, 65])
def test_lengths(length: int) -> None:
    recipe = RECIPES[f"two-rooms/length-{length}-v0"]
    small = type(recipe)(recipe.name, "", recipe.family, {**recipe.settings, "transitions": 10 * (length - 1)})
    data = published._make_two_rooms(small, "stop", 0)
    assert states(data).shape == (10, length, 2)
    assert int(recipe.settings["transitions"]) % (length - 1) == 0  # no trajectory is cut


@pytest.mark.slow
@pytest.mark.parametrize("name", TWO_ROOMS)
def test_every_set_has_its_size(name: str) -> None:
    assert len(load_dataset(name)) == RECIPES[name].settings["transitions"]


def test_different_sets_have_different_walks() -> None:
    """Lengths and no-door do not share seeds with the reference data."""
    firsts = [
        next(published._batches(source, 16, 5.0, "stop", 0))[1]
        for source in ("good", "random", "no-door", "length-17", "length-33")
    ]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(firsts, 2))


def test_names_are_listed_without_torch() -> None:
    code = (
        "import sys; from clbench.registry import entries; names = entries('datasets'); "
        "assert 'two-rooms/good-v0' in names; assert 'torch' not in sys.modules, 'torch'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("identifier", "error", "message"),
    [
        ("two-rooms/size-5079-v0", UnknownNameError, "Unknown dataset .* Did you mean .*'two-rooms/size-5078-v0'"),
        ("two-rooms/size-634-v0?observation=video", UnknownNameError, "Unknown value of observation 'video'"),
        ("two-rooms/size-634-v0?collision=bounce", UnknownNameError, "Unknown value of collision 'bounce'"),
        ("two-rooms/size-634-v0?colision=stop", UnknownNameError, "Did you mean 'collision'"),
        ("two-rooms/size-634-v0?seed=x", ConfigError, "seed must be of type int"),
    ],
)
def test_wrong_ids(identifier: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_dataset(identifier)


# -- OGBench's point mazes ------------------------------------------------------------------------------------------------


def test_walks_of_ogbench_by_name() -> None:
    name = "ogbench-maze/medium-navigate-v0"
    data = load_dataset(f"{name}?trajectories=5&step_size=0.5")
    assert len(data) == 5000 and (data.lengths == 1000).all()
    assert data.metadata["step_size"] == 0.5 and data.metadata["kind"] == "navigate"
    more = load_dataset(f"{name}?trajectories=8&step_size=0.5")
    assert torch.equal(data.actions, more.actions[:5000])  # a small set is the beginning of a large one
    assert not torch.equal(data.actions, load_dataset(f"{name}?trajectories=5").actions)  # negative controls
    assert not torch.equal(data.actions, load_dataset(f"{name}?trajectories=5&step_size=0.5&seed=1").actions)


@pytest.mark.parametrize(
    ("name", "lengths"),
    [("giant-navigate", 2000), ("giant-stitch", 200), ("teleport-stitch", 200), ("large-navigate", 1000)],
)
def test_lengths_of_ogbench(name: str, lengths: int) -> None:
    recipe = RECIPES[f"ogbench-maze/{name}-v0"]
    assert recipe.settings["transitions"] == 1_000_000
    assert load_dataset(f"{recipe.name}?trajectories=3").lengths.tolist() == [lengths] * 3


def test_wrong_options_of_ogbench() -> None:
    with pytest.raises(ConfigError, match=r"step_size must be in \(0, 0.5\]"):
        load_dataset("ogbench-maze/medium-stitch-v0?step_size=2&trajectories=2")
    with pytest.raises(UnknownNameError, match="Did you mean 'trajectories'"):
        load_dataset("ogbench-maze/medium-stitch-v0?trajectory=2")


# -- layouts as observations ---------------------------------------------------------------------------------------------


def test_layouts_are_added_to_the_cached_states(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "point-maze/5-layouts-v0"
    recipe = RECIPES[name]
    small = type(recipe)(name, "", recipe.family, {**recipe.settings, "transitions": 1050})
    monkeypatch.setitem(RECIPES, name, small)
    state, layout = load_dataset(name), load_dataset(f"{name}?observation=layout")
    assert torch.equal(state.observations["observation"], layout.observations["observation"])
    assert torch.equal(state.actions, layout.actions)
    bits = layout.observations["layout"]
    assert bits.shape == (1050, 16) and bits.dtype == torch.float32
    texts = [recipe_text.replace("/", "") for recipe_text in layout.metadata["layouts"]]
    expected = torch.tensor([[float(letter == "#") for letter in text] for text in texts])
    assert torch.equal(bits, expected[layout.episode % 5])
    assert torch.equal(layout.final_observations["layout"], expected[torch.arange(11) % 5])
    assert layout.metadata == {**state.metadata, "observation": "layout"}
    assert published.kept_at(name) == published.kept_at(f"{name}?observation=layout")
    assert published.kept_at(name) != published.kept_at(f"{name}?observation=pixels")  # negative control
