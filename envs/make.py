"""``make_env``: any environment by its id, as a batch that speaks torch tensors."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium
from gymnasium.envs.registration import EnvSpec, load_env_creator

from clbench.config import build, options_of
from clbench.contracts import VectorEnv
from clbench.envs.gymnasium_adapter import GymnasiumVectorEnv
from clbench.envs.seeding import check_batch
from clbench.errors import ConfigError, MissingExtraError, unknown_name
from clbench.registry import entries, load_object, resolve

# ids that exist once a package has been imported: prefix -> package
PROVIDERS = {"MiniGrid-": "minigrid", "BabyAI-": "minigrid"}
OGBENCH = "ogbench/"  # ids of OGBench's own environments begin so
BATCH_ARGUMENTS = ("num_envs", "device", "autoreset")


def make_env(
    env_id: str, num_envs: int = 1, device: Any = "cpu", autoreset: str = "same_step", **kwargs: Any
) -> VectorEnv:
    """``num_envs`` environments as one batch.

    Args:
        env_id: a registered environment of clbench (``clbench/...``), ``MiniGrid-...``, any other Gymnasium id
            (``module:id`` imports the module that registers it first), ``ogbench/NAME`` (OGBench's own), or
            ``module:Class`` (a batched class or a ``gymnasium.Env``).
        num_envs: number of rows.
        device: where observations, rewards and actions live.
        autoreset: ``"same_step"`` (training) or ``"disabled"`` (evaluation), see :class:`clbench.VectorEnv`.
        kwargs: of the environment. Gymnasium environments also take ``max_episode_steps``, MiniGrid ``observation``.

    Raises:
        UnknownNameError: unknown id or keyword, with the nearest known ones.
        ConfigError: a keyword of the wrong type or value, or a device that does not exist.
        ContractError: an environment whose spaces are not supported.
    """
    check_batch(num_envs, device, autoreset)
    batch = {"num_envs": num_envs, "device": device, "autoreset": autoreset}
    where = f"environment {env_id!r}"
    target = _find(env_id)
    if isinstance(env_id, str) and env_id.startswith(OGBENCH):
        kwargs = {**kwargs, "name": env_id.removeprefix(OGBENCH)}
    if isinstance(target, EnvSpec):
        return GymnasiumVectorEnv(_gymnasium_factory(target, kwargs, where), name=env_id, **batch)
    if inspect.isclass(target) and issubclass(target, gymnasium.Env):
        _check_keywords(target, kwargs, where)
        return GymnasiumVectorEnv(lambda: _call(target, kwargs, where), name=env_id, **batch)
    return _call(target, _checked(target, kwargs, where), where, batch)


def _find(env_id: str) -> Any:
    """The registered batched class, the object behind ``module:attribute``, or Gymnasium's specification."""
    if not isinstance(env_id, str) or not env_id:
        raise ConfigError(f"The environment must be an id or 'module:Class', got {env_id!r}.")
    if env_id in entries("envs"):
        return resolve("envs", env_id)
    if env_id.startswith(OGBENCH):
        return load_object("clbench.envs.ogbench:OGBenchEnv")
    module, _, name = env_id.rpartition(":")
    for prefix, package in PROVIDERS.items():
        if name.startswith(prefix):
            importlib.import_module(package)
    if module and name.replace(".", "_").isidentifier():
        return resolve("envs", env_id)
    if module:
        load_object(f"{module}:__name__")  # imports it, with the errors of every other 'module:name'
    if name in gymnasium.registry:
        return gymnasium.registry[name]
    raise unknown_name("environment", env_id, {*entries("envs"), *gymnasium.registry})


def _gymnasium_factory(spec: EnvSpec, kwargs: Mapping[str, Any], where: str) -> Callable[[], gymnasium.Env]:
    """A function that makes one environment of ``spec``; wrappers of our own are added for MiniGrid."""
    arguments = dict(kwargs)
    wrap: Callable[[gymnasium.Env], gymnasium.Env] = lambda env: env  # noqa: E731
    if spec.id.startswith(tuple(PROVIDERS)):
        from clbench.envs.minigrid import wrapper_of

        wrap = wrapper_of(arguments.pop("observation", "flat"))
    creator = spec.entry_point if callable(spec.entry_point) else load_env_creator(str(spec.entry_point))
    steps = arguments.pop("max_episode_steps", None)
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ConfigError(f"{where}: max_episode_steps must be a whole number >= 1, got {steps!r}.")
    _check_keywords(creator, arguments, where)
    # costs nothing until render() is called
    if "rgb_array" in getattr(creator, "metadata", {}).get("render_modes", ()):
        arguments.setdefault("render_mode", "rgb_array")
    return lambda: wrap(
        _call(gymnasium.make, arguments, where, {"id": spec, "max_episode_steps": steps, "disable_env_checker": True})
    )


def _check_keywords(creator: Callable[..., Any], kwargs: Mapping[str, Any], where: str) -> None:
    """Refuse keywords that neither the creator nor the classes it derives from name."""
    open_ended = not inspect.isclass(creator)
    known = {"max_episode_steps"}
    for function in [c.__init__ for c in inspect.getmro(creator)[:-1]] if inspect.isclass(creator) else [creator]:
        parameters = inspect.signature(function).parameters.values()
        known |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - {"self"}
        open_ended &= any(p.kind is p.VAR_KEYWORD for p in parameters)
    for key in kwargs:
        if key not in known and not open_ended:
            raise unknown_name("key", key, known, where=where)


def _checked(target: Any, kwargs: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Keywords of a batched class with checked names and types."""
    init = target.__init__ if inspect.isclass(target) else target
    if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(init).parameters.values()):
        return dict(kwargs)
    options = build(options_of(init, skip=("self", *BATCH_ARGUMENTS)), kwargs, where)
    return dict(vars(options))


def _call(function: Any, kwargs: Mapping[str, Any], where: str, fixed: Mapping[str, Any] | None = None) -> Any:
    try:
        return function(**(fixed or {}), **kwargs)
    except gymnasium.error.DependencyNotInstalled as error:
        raise MissingExtraError(f"{where} needs a package that is not installed: {error}") from error
    except TypeError as error:
        if "unexpected keyword argument" in str(error) or "required positional argument" in str(error):
            raise ConfigError(f"{where}: {error}.") from error
        raise
