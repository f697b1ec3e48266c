"""All digit streams on files in MNIST's IDX format, made here: plain and packed, alone and with a continual method."""

import gzip
import struct

import numpy as np
import pytest

from clbench import load_dataset, make_stream, run
from clbench.data.labelled import IDX_FILES, load_source
from clbench.errors import DataError

SIDE, TRAIN, TEST = 7, 200, 60
STREAMS = [
    ("digits-permuted", {"tasks": 2}, {}),
    ("digits-rotated", {"angles": (0.0, 90.0)}, {}),
    ("digits-split", {"classes_per_task": 5}, {}),
    ("digits-split", {"classes_per_task": 5, "scenario": "domain"}, {}),
    ("digits-split", {"classes_per_task": 5, "scenario": "task"}, {"heads": 2}),
    ("digits-online-inputs", {"tasks": 2}, {"batch_size": 1}),
    ("digits-online-labels", {"tasks": 2}, {"batch_size": 1}),
]


def idx_bytes(array):
    """Magic number (unsigned bytes, number of dimensions), big-endian sizes, data."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write(folder, packed):
    """Ten classes, each a bright cell of its own in noise, as MNIST's four files."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", TRAIN), ("test", TEST)):
        labels = np.arange(count) % 10
        images = rng.integers(0, 60, (count, SIDE, SIDE))
        images[np.arange(count), 1 + labels // 5 * 4, labels % 5 + 1] = 255
        arrays |= {f"x_{split}": images, f"y_{split}": labels}
    folder.mkdir()
    for key, name in IDX_FILES.items():
        content = idx_bytes(arrays[key])
        (folder / (name + ".gz" if packed else name)).write_bytes(gzip.compress(content) if packed else content)
    return str(folder)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return {kind: write(tmp_path_factory.mktemp("mnist") / kind, kind == "packed") for kind in ("plain", "packed")}


@pytest.mark.parametrize(("name", "options", "agent"), STREAMS)
@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_tasks_are_made_of_the_files(sources, kind, name, options, agent):
    source = sources[kind]
    data, stream = load_source(source), make_stream(name, options={"source": source, **options})
    assert data.x.shape == (TRAIN + TEST, SIDE, SIDE) and data.num_classes == 10
    for task in stream.tasks:
        train = load_dataset(task.dataset_id)
        rows = task.evaluation.options["index"]
        assert train.observations.shape[1:] == (SIDE * SIDE,) and set(rows) <= set(range(TRAIN, TRAIN + TEST))
    sizes = sum(len(load_dataset(t.dataset_id)) for t in stream.tasks)
    assert sizes == (TRAIN if name == "digits-split" else TRAIN * len(stream.tasks))


@pytest.mark.parametrize(("name", "options", "agent"), STREAMS, ids=[f"{s[0]}-{i}" for i, s in enumerate(STREAMS)])
@pytest.mark.parametrize(("kind", "method"), [("packed", ()), ("plain", ("er",))], ids=["bc", "bc+er"])
def test_runs_end_to_end(tmp_path, sources, name, options, agent, kind, method):
    """Just after training on a task it is solved, whatever the scenario."""
    result = run(
        name, "bc", method=method, budget=300 if "online" in name else 100, eval_every=0, out=tmp_path / "run",
        stream_options={"source": sources[kind], "episodes": 30, **options}, tensorboard=False,
        agent_options={"hidden": (32,), "lr": 3e-3, "batch_size": 32, **agent},
    )  # fmt: skip
    matrix = result.results["matrix"]
    least = 0.5 if "online" in name else 0.9  # 300 single examples are few, and chance is 0.1
    assert min(matrix[i + 1][i] for i in range(2)) > least
    if options.get("scenario") == "task":
        assert matrix[2][0] > 0.8  # a head of its own: hardly anything is forgotten
    elif options == {"classes_per_task": 5} and not method:
        assert matrix[2][0] < 0.5  # the negative control: with one output layer much is


@pytest.mark.parametrize("name", [s[0] for s in STREAMS[:3]] + ["digits-online-labels"])
def test_missing_and_damaged_files_are_said_in_one_sentence(tmp_path, name):
    with pytest.raises(DataError, match="There is no labelled source"):
        make_stream(name, options={"source": str(tmp_path / "nothing")})
    folder = tmp_path / "mnist"
    write(folder, packed=True)
    images = folder / (IDX_FILES["x_train"] + ".gz")
    whole = images.read_bytes()
    images.unlink()
    with pytest.raises(DataError, match="has no file train-images-idx3-ubyte .*put the four IDX files there"):
        make_stream(name, options={"source": str(folder)})
    images.write_bytes(whole[:-20])
    with pytest.raises(DataError, match="cannot be unpacked .*copy the file again"):
        make_stream(name, options={"source": str(folder)})
    images.write_bytes(gzip.compress(gzip.decompress(whole)[:-1]))
    with pytest.raises(DataError, match="its header promises 9800; copy the file again"):
        make_stream(name, options={"source": str(folder)})
