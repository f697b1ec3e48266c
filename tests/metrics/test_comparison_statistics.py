"""Statistics of a comparison against brute force, and that pairing is what makes the intervals narrow."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import trim_mean

from clbench.errors import DataError
from clbench.metrics.comparison import THRESHOLDS, compare_scores, complete_seeds, episode_difference, paired
from clbench.metrics.statistics import RESAMPLES
from clbench.rng import numpy_generator

AGENTS, DATASETS, SEEDS, EPISODES = ("plan", "learn", "clone"), ("small", "large"), (0, 1, 2, 3), 40


def made(seed: int = 0) -> dict:
    """Scores whose episodes are easy or hard for all agents alike."""
    rng = np.random.default_rng(seed)
    hard = {d: rng.random(EPISODES) for d in DATASETS}
    skill = {"plan": 0.8, "learn": 0.6, "clone": 0.3}
    return {
        d: {a: {s: (hard[d] < skill[a] + 0.1 * rng.standard_normal()).astype(float) for s in SEEDS} for a in AGENTS}
        for d in DATASETS
    }


def none_failed() -> dict:
    return {d: dict.fromkeys(AGENTS, 0) for d in DATASETS}


def test_means_are_those_of_the_runs() -> None:
    scores = made()
    found = compare_scores(scores, none_failed())["datasets"]
    for d, a in itertools.product(DATASETS, AGENTS):
        cell = found[d]["agents"][a]
        assert cell["value"] == pytest.approx(np.mean([scores[d][a][s].mean() for s in SEEDS]))
        assert cell["low"] <= cell["value"] <= cell["high"] and (cell["n"], cell["failures"]) == (4, 0)


def test_differences_are_those_of_equal_seeds_with_brute_force_intervals() -> None:
    scores = made()
    for d in DATASETS:
        for found, (a, b) in zip(
            compare_scores(scores, none_failed())["datasets"][d]["differences"],
            itertools.combinations(AGENTS, 2),
            strict=True,
        ):
            assert (found["first"], found["second"]) == (a, b)
            per_seed = [scores[d][a][s].mean() - scores[d][b][s].mean() for s in SEEDS]
            per_episode = [np.mean([scores[d][a][s][e] - scores[d][b][s][e] for s in SEEDS]) for e in range(EPISODES)]
            assert found["value"] == pytest.approx(np.mean(per_seed)) == pytest.approx(np.mean(per_episode))
            for kind, values, low in (("seeds", per_seed, "low"), ("episodes", per_episode, "episodes_low")):
                rng = numpy_generator(0, "compare", kind, d, a, b)
                draws = [
                    np.mean([values[i] for i in row])
                    for row in rng.integers(len(values), size=(RESAMPLES, len(values)))
                ]
                high = low.replace("low", "high")
                assert [found[low], found[high]] == pytest.approx(np.quantile(draws, [0.025, 0.975]))


def test_pairing_by_episode_is_what_makes_the_interval_narrow() -> None:
    """Negative control: with the episodes of one side shuffled the mean is the same and the interval is wider."""
    of_agent = made()["large"]
    a, b = (np.stack([of_agent[name][s] for s in SEEDS]) for name in ("plan", "learn"))
    shuffled = np.random.default_rng(1).permuted(b, axis=1)

    def interval(x: np.ndarray) -> tuple[float, float]:
        found = episode_difference(a, x, np.random.default_rng(2))
        assert found.value is not None and found.low is not None and found.high is not None
        return found.value, found.high - found.low

    value, width = interval(b)
    other_value, other_width = interval(shuffled)
    assert other_value == pytest.approx(value)
    assert other_width > 1.3 * width


def test_seeds_without_a_partner_are_left_out_and_named() -> None:
    of_agent = made()["small"]
    without = {s: of_agent["learn"][s] for s in (1, 3)}
    found = paired("small", "plan", of_agent["plan"], "learn", without)
    assert found is not None and (found["seeds"], found["left_out"]) == ([1, 3], [0, 2])
    assert found["value"] == pytest.approx(np.mean([of_agent["plan"][s].mean() - without[s].mean() for s in (1, 3)]))
    assert paired("small", "plan", {0: of_agent["plan"][0]}, "learn", without) is None


def test_one_seed_has_an_interval_over_episodes_only() -> None:
    of_agent = made()["small"]
    found = paired("small", "plan", {0: of_agent["plan"][0]}, "learn", {0: of_agent["learn"][0]})
    assert found is not None and found["low"] is None and found["episodes_low"] <= found["value"]


def test_other_episodes_are_no_pair() -> None:
    with pytest.raises(DataError, match="same runs and episodes"):
        episode_difference(np.zeros((2, 3)), np.zeros((2, 4)), np.random.default_rng(0))


def test_failures_are_counted_and_never_averaged() -> None:
    scores, failures = made(), none_failed()
    whole = compare_scores(scores, failures)
    del scores["large"]["learn"][2]
    failures["large"]["learn"] = 1
    found = compare_scores(scores, failures)
    cell = found["datasets"]["large"]["agents"]["learn"]
    assert (cell["n"], cell["failures"]) == (3, 1)
    assert cell["value"] == pytest.approx(np.mean([scores["large"]["learn"][s].mean() for s in (0, 1, 3)]))
    # over all data sets only whole seeds count, and agents that did not fail keep their numbers
    assert complete_seeds(scores, "learn") == found["overall"]["agents"]["learn"]["seeds"] == [0, 1, 3]
    assert found["overall"]["agents"]["plan"] == whole["overall"]["agents"]["plan"]
    assert found["overall"]["agents"]["learn"]["iqm"]["value"] != whole["overall"]["agents"]["learn"]["iqm"]["value"]


def test_an_agent_without_any_run_has_no_numbers() -> None:
    scores, failures = made(), none_failed()
    for d in DATASETS:
        scores[d]["clone"], failures[d]["clone"] = {}, 4
    found = compare_scores(scores, failures)
    cell = found["datasets"]["small"]["agents"]["clone"]
    assert (cell["value"], cell["n"], cell["failures"]) == (None, 0, 4)
    assert found["overall"]["agents"]["clone"] == {"seeds": []}
    assert not any("clone" in (d["first"], d["second"]) for d in found["overall"]["improvement"])
    assert len(found["datasets"]["small"]["differences"]) == 1


def test_over_all_data_sets_against_brute_force() -> None:
    scores = made()
    found = compare_scores(scores, none_failed())["overall"]
    pairs = {a: [scores[d][a][s].mean() for d in DATASETS for s in SEEDS] for a in AGENTS}
    for a in AGENTS:
        of_agent = found["agents"][a]
        assert of_agent["iqm"]["value"] == pytest.approx(trim_mean(pairs[a], 0.25))
        above = [np.mean([v > t for v in pairs[a]]) for t in THRESHOLDS]
        assert of_agent["profile"] == pytest.approx(above)
        low, high = np.array(of_agent["profile_low"]), np.array(of_agent["profile_high"])
        assert (low <= np.array(above) + 1e-12).all() and (np.array(above) <= high + 1e-12).all()
    for d in found["improvement"]:
        wins = [
            (scores[name][d["first"]][i].mean() > scores[name][d["second"]][j].mean())
            + 0.5 * (scores[name][d["first"]][i].mean() == scores[name][d["second"]][j].mean())
            for name in DATASETS for i in SEEDS for j in SEEDS
        ]  # fmt: skip
        assert d["probability"] == pytest.approx(np.mean(wins))
        assert d["low"] <= d["probability"] <= d["high"]


def test_the_same_scores_give_the_same_numbers_in_any_order() -> None:
    scores = made()
    other = {d: {a: dict(reversed(runs.items())) for a, runs in of_agent.items()} for d, of_agent in scores.items()}
    assert compare_scores(scores, none_failed()) == compare_scores(other, none_failed())
