"""``clbench data``: what data sets there are, what is in them, and their way from and to files."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from clbench.errors import ClbenchError, ConfigError, unknown_name

if TYPE_CHECKING:
    from clbench.contracts import Spaces
    from clbench.data.dataset import OfflineDataset

USAGE = """\
usage: clbench data VERB [ARGUMENTS]

  list [--json]                                      registered and imported data sets
  info ID [--json]                                   sizes, keys, statistics of the actions, checksum
  make ID [--out FILE]                               make it and keep it (in the cache, or in FILE)
  import SOURCE [--name NAME]                        a .npz of OGBench's form, Minari's folder, file or id -> imported/NAME
  export ID --format minari|ogbench --out PATH       a folder of Minari data sets, or a .npz file

An ID is a name with options, as two-rooms/size-5078-v0?observation=pixels, or the path of a file."""


def data(arguments: list[str], parse: Callable[..., Any]) -> int:
    """The verb ``data``. ``parse(kind, arguments, prog, description)`` makes a dataclass of command-line arguments."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        raise unknown_name("verb", verb, VERBS, where="clbench data")
    function, description, fields = VERBS[verb]
    function(parse(dataclasses.make_dataclass(verb, fields()), rest, f"clbench data {verb}", description))
    return 0


def _list(parsed: Any) -> None:
    from clbench.data.files import PREFIX, imported_names
    from clbench.registry import entries

    rows = [{"name": e.name, "summary": e.summary} for e in sorted(entries("datasets").values(), key=lambda e: e.name)]
    rows += [{"name": PREFIX + name, "summary": "imported"} for name in imported_names()]
    if parsed.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print(f"  {row['name']:<28} {row['summary']}")


def _info(parsed: Any) -> None:
    from clbench.data.registry import load_dataset

    found = describe(load_dataset(parsed.id))
    if parsed.json:
        print(json.dumps(found, indent=1))
        return
    print(parsed.id)
    print(f"  transitions   {found['transitions']:,}")
    lengths = found["lengths"]
    print(f"  episodes      {found['episodes']:,} of {lengths['min']} to {lengths['max']} actions")
    for key, column in found["observations"].items():
        drawn = " (drawn when a batch is drawn)" if column["rendered"] else ""
        print(f"  {key or 'observations':<13} {tuple(column['shape'])} {column['dtype']}{drawn}")
    actions = found["actions"]
    print(f"  actions       {tuple(actions['shape'])} {actions['dtype']}")
    for name in ("min", "max", "mean", "sd"):
        if name in actions:
            print(f"    {name:<11} {' '.join(f'{v: .4g}' for v in actions[name])}")
    if "counts" in actions:
        print(f"    counts      {' '.join(f'{k}: {v:,}' for k, v in actions['counts'].items())}")
    print(f"  checksum      {found['checksum']}")


def describe(dataset: OfflineDataset) -> dict[str, Any]:
    """What ``clbench data info`` prints, as plain values."""
    import torch

    from clbench.data.dataset import Rendered
    from clbench.data.storage import dataset_checksum

    obs = dataset.observations
    columns = obs if isinstance(obs, Mapping) else {"": obs}
    actions: dict[str, Any] = {
        "shape": list(dataset.actions.shape[1:]),
        "dtype": str(dataset.actions.dtype).removeprefix("torch."),
    }
    if dataset.actions.is_floating_point():
        flat = dataset.actions.flatten(1) if dataset.actions.ndim > 1 else dataset.actions[:, None]
        sd, mean = torch.std_mean(flat.double(), dim=0, correction=0)
        statistics = {"min": flat.amin(0), "max": flat.amax(0), "mean": mean, "sd": sd}
        actions |= {k: v.tolist() for k, v in statistics.items()}
    else:
        values, counts = dataset.actions.unique(return_counts=True)
        actions["counts"] = dict(zip(map(str, values.tolist()), counts.tolist(), strict=True))
    return {
        "name": dataset.name,
        "transitions": len(dataset),
        "episodes": dataset.num_episodes,
        "lengths": {"min": int(dataset.lengths.min()), "max": int(dataset.lengths.max())},
        "final_observations": dataset.final_observations is not None,
        "observations": {
            k: {
                "shape": list(c.shape[1:]),
                "dtype": str(c.dtype).removeprefix("torch."),
                "rendered": isinstance(c, Rendered),
            }
            for k, c in columns.items()
        },
        "actions": actions,
        "checksum": dataset_checksum(dataset),
        "metadata": dataset.metadata,
    }


def _make(parsed: Any) -> None:
    from clbench.data.cache import WORTH_IT, is_kept
    from clbench.data.published import kept_at
    from clbench.data.registry import load_dataset
    from clbench.data.storage import dataset_checksum, save_dataset

    start = time.perf_counter()
    made = load_dataset(parsed.id)
    print(f"{parsed.id}: {len(made):,} transitions in {time.perf_counter() - start:.1f} s, {dataset_checksum(made)}")
    if parsed.out is not None:
        if parsed.out.exists():
            raise ConfigError(f"{parsed.out} exists and is not overwritten; choose another --out.")
        if parsed.out.suffix != ".npz":
            raise ConfigError(f"Files of data sets end in .npz; got {parsed.out}.")
        save_dataset(made, parsed.out)
        print(f"Written: {parsed.out}")
        return
    kept = kept_at(parsed.id)
    if kept is not None and is_kept(kept):
        print(f"Kept: {kept}")
    elif len(made) < WORTH_IT:
        print("Not kept: it is made in no time whenever it is named (--out FILE writes it).")
    elif kept is not None:
        print(f"Not kept: {kept} could not be written (--out FILE writes it elsewhere).")
    else:
        print("Not kept: only published data sets are (--out FILE writes it).")


def _import(parsed: Any) -> None:
    from clbench.config import call_with_options
    from clbench.data.cache import safe_name
    from clbench.data.files import PREFIX, is_file, minari_reader, store_imported
    from clbench.data.registry import load_dataset, parse_dataset_id

    source, options = parse_dataset_id(parsed.source)
    if is_file(source):
        found = load_dataset(parsed.source)
        default = Path(source).stem if Path(source).stem != "main_data" else Path(source).absolute().parts[-3]
    else:
        found = call_with_options(minari_reader(source), options, where=f"Minari data set {source!r}")
        default = Path(source).absolute().name if Path(source).is_dir() else source
    name = parsed.name or safe_name(default)
    path = store_imported(found, name)
    print(f"{PREFIX}{name}: {len(found):,} transitions in {found.num_episodes:,} episodes ({path})")


def _export(parsed: Any) -> None:
    from clbench.data.registry import load_dataset

    found = load_dataset(parsed.id)
    if parsed.format == "ogbench":
        if parsed.name is not None:
            raise ConfigError("--name is for --format minari; an OGBench file is named by --out.")
        from clbench.data.ogbench import write_ogbench

        print(f"Written: {write_ogbench(found, parsed.out, pixels=parsed.pixels)}")
        _say_positions(found, parsed.pixels)
        return
    from clbench.data.minari import minari_id, write_minari

    name = parsed.name or minari_id(parsed.id)
    path = write_minari(found, parsed.out, name, pixels=parsed.pixels, spaces=_spaces_of(parsed.id))
    print(f"Written: {path}")
    _say_positions(found, parsed.pixels)
    print(f"MINARI_DATASETS_PATH={parsed.out} python -c \"import minari; minari.load_dataset('{name}')\"")


def _say_positions(dataset: OfflineDataset, pixels: bool) -> None:
    from clbench.data.dataset import Rendered

    columns = dataset.observations.values() if isinstance(dataset.observations, Mapping) else [dataset.observations]
    if not pixels and any(isinstance(c, Rendered) for c in columns):
        print(
            "The positions that the pictures are drawn from were written instead of the pictures (--pixels draws them)."
        )


def _spaces_of(identifier: str) -> Spaces | None:
    """Those of the environment of a published data set; others do not say what theirs is."""
    from clbench.contracts import Spaces
    from clbench.envs.make import make_env
    from clbench.streams.core import make_stream

    try:
        (task,) = make_stream(identifier).tasks
        env = make_env(task.env_id, 1, **task.env_kwargs)
    except ClbenchError:
        return None
    try:
        return Spaces(env.single_observation_space, env.single_action_space)
    finally:
        env.close()


def _field(name: str, kind: Any, help: str, *default: Any, positional: bool = False) -> tuple[Any, ...]:
    import tyro

    notes = (tyro.conf.Positional,) if positional else ()
    return (name, Annotated[(kind, *notes, tyro.conf.arg(help=help))], *default)


def _json() -> tuple[Any, ...]:
    return _field("json", bool, "print JSON", False)


def _identifier() -> tuple[Any, ...]:
    return _field("id", str, "name, name?key=value, or file", positional=True)


VERBS: dict[str, tuple[Callable[[Any], None], str, Callable[[], list[Any]]]] = {
    "list": (_list, "Registered and imported data sets.", lambda: [_json()]),
    "info": (_info, "What is in a data set.", lambda: [_identifier(), _json()]),
    "make": (
        _make,
        "Make a data set and keep it, in the cache or in a file.",
        lambda: [_identifier(), _field("out", Path | None, "a file (.npz)", None)],
    ),
    "import": (
        _import,
        "Copy a data set of another format into the data folder; its name is then imported/NAME.",
        lambda: [
            _field("source", str, "a .npz file, Minari's folder, file or id; options after '?'", positional=True),
            _field("name", str | None, "the name (default: that of the file)", None),
        ],
    ),
    "export": (
        _export,
        "Write a data set in another format. Nothing is overwritten.",
        lambda: [
            _identifier(),
            _field("format", Literal["minari", "ogbench"], "the format"),
            _field("out", Path, "a folder of Minari data sets, or a .npz file"),
            _field("name", str | None, "the Minari id (default: from ID, with what Minari forbids as '_')", None),
            _field("pixels", bool, "draw the pictures (default: what they are drawn from)", False),
        ],
    ),
}
