"""The benchmark of the environments: rows are complete and consistent. No speed is asserted."""

import json
import math

import pytest

from clbench.bench.envs import BYTES, bench_envs
from clbench.errors import ConfigError


def test_rows_are_complete_and_the_ratio_is_what_it_says():
    rows = bench_envs(num_envs=32, quick=True)
    json.dumps(rows)
    assert len({r["name"] for r in rows}) == len(rows) == 7
    (bandwidth,) = (r["value"] for r in rows if r["unit"] == "B/s")
    for row in rows:
        assert {"name", "device", "value", "unit", "ratio_to_limit"} <= row.keys()
        assert math.isfinite(row["value"])
        assert row["value"] > 0
        if row["unit"] != "B/s":
            observation = {"steps/s": "state", "frames/s": "pixels"}[row["unit"]]
            limit = bandwidth / BYTES[observation]
            assert row["ratio_to_limit"] == pytest.approx(limit / row["value"])
    for observation in ("state", "pixels"):
        assert sum(f"two-rooms {observation}" in r["name"] for r in rows) == 3


def test_at_least_one_environment():
    with pytest.raises(ConfigError, match="num_envs must be at least 1"):
        bench_envs(num_envs=0)
