"""Maze layouts: the generator, distances, frozen lists and trials, and the stream maze-layouts."""

import importlib.util
import json
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clbench.contracts import Stream
from clbench.data.registry import load_dataset, parse_dataset_id
from clbench.envs.point_maze import PointMazeVectorEnv
from clbench.errors import ConfigError, DataError
from clbench.streams import make_stream, maze_layouts
from clbench.streams.maze_layouts import (
    BUCKETS,
    PUBLISHED,
    acceptable,
    all_layouts,
    bucket_trials,
    distance_to_published,
    edit_distances,
    far_pairs,
    generate_layouts,
    heldout_trials,
    layout_code,
    layout_text,
    load_lists,
    named_layouts,
    path_lengths,
    training_layouts,
    training_trials,
    with_ring,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def everything():
    return all_layouts()


# -- slow versions ----------------------------------------------------------------------------------------------------


def free_cells(text):
    return {(r, c) for r, row in enumerate(text.split("/")) for c, letter in enumerate(row) if letter == "O"}


def breadth_first(text):
    """(start, goal) -> steps, cell by cell."""
    free, steps = free_cells(text), {}
    for start in free:
        queue, steps[start, start] = deque([start]), 0
        while queue:
            r, c = here = queue.popleft()
            for there in ((r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)):
                if there in free and (start, there) not in steps:
                    steps[start, there] = steps[start, here] + 1
                    queue.append(there)
    return steps


def is_layout(text):
    """The conditions of the specification, and that no open area is left to break."""
    free, steps = free_cells(text), breadth_first(text)
    around = [sum((r + i, c + j) in free for i in (-1, 0, 1) for j in (-1, 0, 1)) - 1 for r, c in free]
    return 8 <= len(free) <= 12 and len(steps) == len(free) ** 2 and max(steps.values()) < 8 and max(around) <= 6


def levenshtein(a, b):
    before = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        row = [i]
        for j, y in enumerate(b, start=1):
            row.append(min(row[-1] + 1, before[j] + 1, before[j - 1] + (x != y)))
        before = row
    return before[-1]


codes = st.integers(0, 2**16 - 1)


@settings(max_examples=60, deadline=None)
@given(codes)
def test_path_lengths_equal_breadth_first_search(code):
    text, lengths = layout_text(code), path_lengths(code)
    steps = breadth_first(text)
    for a in range(16):
        for b in range(16):
            assert lengths[a, b] == steps.get((divmod(a, 4), divmod(b, 4)), -1)


@settings(max_examples=60, deadline=None)
@given(codes, codes)
def test_edit_distance_is_levenshteins_on_the_texts_with_rings(first, second):
    a, b = layout_text(first), layout_text(second)
    assert edit_distances([a, b], b).tolist() == [levenshtein(with_ring(a), with_ring(b)), 0]


def test_edit_distance_is_not_the_number_of_different_cells(everything):
    def hamming(a, b):
        return sum(x != y for x, y in zip(a, b, strict=True))

    assert any(d < hamming(text, PUBLISHED[0]) for text, d in zip(everything, edit_distances(everything, PUBLISHED[0])))


@settings(max_examples=100, deadline=None)
@given(codes)
def test_acceptable_says_what_the_specification_says(code):
    steps = breadth_first(text := layout_text(code))
    number = len(free_cells(text))
    expected = 8 <= number <= 12 and len(steps) == number**2 and max(steps.values()) < 8
    assert bool(acceptable(np.array([code]))[0]) == expected


# -- one layout -------------------------------------------------------------------------------------------------------


def test_text_and_code():
    assert layout_code("O###/O###/####/####") == 0b1111111111101110
    for text in PUBLISHED:
        assert layout_text(layout_code(text)) == text
    assert layout_code("M0") == layout_code(PUBLISHED[0])
    assert layout_code("E7") == layout_code(load_lists()["heldout"][7])
    assert with_ring(PUBLISHED[0]) == "######/######/##OOO#/#OO#O#/##O#O#/######"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "4 rows of 4 letters"),
        ("OOOO/OOOO/OOOO", "4 rows of 4 letters"),
        ("OOOO/OOOO/OOOO/OOO", "4 rows of 4 letters"),
        ("OOOO/OOOO/OOOO/OO.O", "4 rows of 4 letters"),
        ("oooo/oooo/oooo/oooo", "4 rows of 4 letters"),
        ("X3", "4 rows of 4 letters"),
        ("M40", "Unknown layout 'M40'"),
        ("####/####/####/###O", "at least two free cells"),
        ("O###/###O/####/####", "not connected"),
    ],
)
def test_bad_layouts(text, message):
    with pytest.raises(ConfigError, match=message):
        layout_code(text)


def test_far_pairs_are_as_far_as_the_layout_allows():
    for text, least in ((PUBLISHED[0], 5), ("OOOO/####/####/####", 3), ("OO##/####/####/####", 1)):
        steps = breadth_first(text)
        expected = {pair for pair, n in steps.items() if n >= least}
        found = {(divmod(int(a), 4), divmod(int(b), 4)) for a, b in far_pairs(layout_code(text))}
        assert found == expected


# -- the generator ----------------------------------------------------------------------------------------------------


def check_generated(texts):
    assert len(set(texts)) == len(texts)
    assert all(is_layout(text) for text in texts)


def test_generated_layouts_keep_the_conditions_and_avoid_what_is_excluded(everything):
    texts = generate_layouts(200, np.random.default_rng(0), exclude=PUBLISHED)
    check_generated(texts)
    assert not set(texts) & set(PUBLISHED)
    assert set(texts) <= set(everything)
    assert texts == generate_layouts(200, np.random.default_rng(0), exclude=PUBLISHED)
    assert texts != generate_layouts(200, np.random.default_rng(1), exclude=PUBLISHED)
    sizes = [len(free_cells(t)) for t in texts]
    assert min(sizes) == 8 and max(sizes) >= 11


@pytest.mark.parametrize("broken", ["_break_open", "acceptable"])
def test_the_conditions_catch_a_generator_without_one_of_its_steps(broken, monkeypatch):
    skip = {"_break_open": lambda c: c, "acceptable": lambda c: np.ones(len(c), bool)}[broken]
    monkeypatch.setattr(maze_layouts, broken, skip)
    with pytest.raises(AssertionError):
        check_generated(generate_layouts(400, np.random.default_rng(0)))


def test_all_layouts_are_those_that_keep_the_conditions(everything):
    check_generated(everything[::50])
    assert set(PUBLISHED) <= set(everything)
    assert all(is_layout(text) for text in PUBLISHED)


# -- frozen lists -----------------------------------------------------------------------------------------------------


def test_the_script_still_gives_the_shipped_list():
    spec = importlib.util.spec_from_file_location("make_maze_lists", ROOT / "scripts" / "make_maze_lists.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.content() == load_lists()


def test_training_layouts_are_nested_and_held_out_layouts_are_new():
    forty, heldout = training_layouts(40), load_lists()["heldout"]
    check_generated([*forty, *heldout])  # 80 different layouts
    assert forty[:5] == PUBLISHED
    for n in (5, 10, 20):
        assert training_layouts(n) == forty[:n]
    assert len(heldout) == 40
    assert len(named_layouts()) == 80
    for bad in (0, 41):
        with pytest.raises(ConfigError, match="from 1 to 40"):
            training_layouts(bad)


def check_trials(trials, least=3):
    """Starts are centres, goals in the middle half of a cell that is far away on the trial's layout."""
    columns = trials.options
    assert sorted(columns) == ["goal", "layout", "start"]
    for text, start, goal in zip(columns["layout"], columns["start"], columns["goal"], strict=True):
        assert all(v % 1 == 0.5 for v in start)
        assert all(0.25 <= v % 1 <= 0.75 for v in goal)
        steps = breadth_first(text)
        here, there = ((int(y), int(x)) for x, y in (start, goal))
        longest = max(steps.values())
        assert steps[here, there] >= (5 if longest >= 5 else least)


def test_trials():
    heldout = heldout_trials()
    assert len(heldout) == 80
    assert [heldout.options["layout"].count(t) for t in load_lists()["heldout"]] == [2] * 40
    check_trials(heldout)
    names, seeds = {heldout.name}, [*heldout.seeds]
    for number, text in enumerate(training_layouts(40)):
        trials = training_trials(number)
        assert set(trials.options["layout"]) == {text}
        assert len(trials) == 50
        check_trials(trials)
        names.add(trials.name)
        seeds += trials.seeds
    for distance in BUCKETS:
        trials = bucket_trials(distance)
        names.add(trials.name)
        seeds += trials.seeds
        layouts = list(dict.fromkeys(trials.options["layout"]))
        assert len(trials) == 20
        assert [trials.options["layout"].count(t) for t in layouts] == [4] * 5
        assert {min(levenshtein(with_ring(t), with_ring(p)) for p in PUBLISHED) for t in layouts} == {distance}
        check_trials(trials)
    assert len(names) == 1 + 40 + 9
    assert len(set(seeds)) == len(seeds)
    assert set(bucket_trials(0).options["layout"]) == set(PUBLISHED)


def test_the_check_of_trials_catches_near_goals():
    trials = heldout_trials()
    near = type(trials)("near", trials.seeds, {**trials.options, "goal": trials.options["start"]})
    with pytest.raises(AssertionError):
        check_trials(near)


@pytest.mark.parametrize("distance", [-1, 9])
def test_no_such_bucket(distance):
    with pytest.raises(ConfigError, match="edit distances 0 to 8"):
        bucket_trials(distance)


def test_buckets_use_the_nearest_published_layout(everything):
    some = everything[::300]
    expected = [min(levenshtein(with_ring(t), with_ring(p)) for p in PUBLISHED) for t in some]
    assert distance_to_published(some).tolist() == expected


def test_trials_start_an_environment_on_their_layouts():
    trials = heldout_trials()
    env = PointMazeVectorEnv(len(trials), autoreset="disabled")
    obs, info = env.reset(seed=trials.seeds, options=trials.options)
    torch.testing.assert_close(obs["achieved_goal"], torch.tensor(trials.options["start"]))
    torch.testing.assert_close(obs["desired_goal"], torch.tensor(trials.options["goal"]))
    assert env.state_dict()["layout"].tolist() == [layout_code(t) for t in trials.options["layout"]]
    assert not info["is_success"].any()


def next_cells(code):
    """(16, 16): the next cell from one cell to another on a shortest path."""
    steps = path_lengths(code)
    table = np.tile(np.arange(16)[:, None], (1, 16))
    for here, there in np.argwhere(steps > 0):
        table[here, there] = next(c for c in np.flatnonzero(steps[here] == 1) if steps[c, there] < steps[here, there])
    return table


def solved(lists, follow_corridors):
    """Steer to the next cell on a shortest path, or straight to the goal -> which trials are solved in 120 steps."""
    columns = {key: sum((t.options[key] for t in lists), ()) for key in ("start", "goal", "layout")}
    env = PointMazeVectorEnv(len(columns["goal"]), autoreset="disabled", terminate_on_success=False)
    obs, _ = env.reset(seed=0, options=columns)
    tables = np.stack([next_cells(layout_code(t)) for t in columns["layout"]])
    goal, rows = np.array(columns["goal"]), np.arange(len(tables))
    ever = torch.zeros(len(tables), dtype=torch.bool)
    for _ in range(120):
        state = obs["observation"].numpy()
        here, there = (4 * p[:, 1].astype(int) + p[:, 0].astype(int) for p in (state, goal))
        following = tables[rows, here, there]
        corridor = np.stack([following % 4, following // 4], 1) + 0.5
        target = np.where((here != there)[:, None] & follow_corridors, corridor, goal)
        obs, *_, info = env.step(np.clip(4 * (target - state[:, :2]) - 2 * state[:, 2:], -1, 1).astype(np.float32))
        ever |= info["is_success"]
    return ever


def test_every_trial_can_be_solved_but_not_by_pushing_towards_the_goal():
    lists = [heldout_trials(), *(bucket_trials(d) for d in BUCKETS)]
    assert solved(lists, follow_corridors=True).all()
    assert solved(lists, follow_corridors=False).float().mean() < 0.75


# -- the stream -------------------------------------------------------------------------------------------------------


def test_tasks_are_plain_values_and_run():
    stream = make_stream("maze-layouts", seed=3, options={"episodes": 3, "observation": "pixels", "layouts": 6})
    assert Stream.from_dict(json.loads(json.dumps(stream.to_dict()))) == stream
    assert [t.name for t in stream.tasks] == ["M0", "M1", "M2", "M3", "M4", "M5"]
    for task, text in zip(stream.tasks, training_layouts(6), strict=True):
        assert len(task.evaluation) == 3
        assert task.metric.kind == "success"
        assert task.env_kwargs == {"layout": text, "observation": "pixels"}
        env = PointMazeVectorEnv(3, autoreset="disabled", **task.env_kwargs)
        obs, _ = env.reset(seed=task.evaluation.seeds, options=task.evaluation.options)
        assert obs["observation"].shape == (3, 3, 64, 64)
        name, options = parse_dataset_id(task.dataset_id)
        assert name == "point-maze"
        assert options["layouts"] == text
        assert options["observation"] == "pixels"


def test_data_set_seeds_come_from_the_stream_and_the_episodes_do_not():
    first, again, other = (make_stream("maze-layouts", seed=s) for s in (0, 0, 1))
    assert first == again
    ids = [t.dataset_id for t in first.tasks]
    assert len(set(ids)) == 5
    assert set(ids).isdisjoint(t.dataset_id for t in other.tasks)
    assert [t.evaluation for t in first.tasks] == [t.evaluation for t in other.tasks]


def test_the_data_set_of_a_task_is_of_its_layout():
    task = make_stream("maze-layouts", options={"transitions": 900}).tasks[1]
    data = load_dataset(task.dataset_id)
    assert len(data) == 900
    assert data.metadata["layouts"] == [task.env_kwargs["layout"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"episodes": 51}, "from 1 to 50"),
        ({"episodes": 0}, "from 1 to 50"),
        ({"layouts": 0}, "from 1 to 40"),
        ({"observation": "pixel"}, "Did you mean 'pixels'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        make_stream("maze-layouts", options=options)


def test_a_broken_installation_is_named(monkeypatch):
    load_lists.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(maze_layouts, "LIST", "point_maze_v9.json")
        with pytest.raises(DataError, match=r"Cannot read the evaluation lists point_maze_v9\.json"):
            load_lists()
    assert load_lists()["version"] == 1
