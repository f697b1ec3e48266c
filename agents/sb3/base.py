"""What the four Stable-Baselines3 agents share: driving ``model.learn`` in chunks, sealed randomness, exact state."""

from __future__ import annotations

import contextlib
import copy
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Dict
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.preprocessing import get_flattened_obs_dim, is_image_space
from stable_baselines3.common.save_util import recursive_getattr
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, NatureCNN
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer
from torch import nn

from clbench.agents.networks.outputs import Output
from clbench.agents.sb3.bridge import Bridge, compute_reward, to_numpy
from clbench.contracts import Agent, Experience, Spaces, TaskInfo, VectorEnv
from clbench.errors import ConfigError, ContractError
from clbench.rng import get_global_state, sealed_global_rng, seed_global, set_global_state

MIN_CNN = 36  # pixels: below, SB3's convolutions have nothing left to convolve
CHUNK = 64  # environment steps between two yields; with one update each, well under a second
NEVER = 2**62  # SB3 logs every so many episodes; we read its logger ourselves


class Steps(NamedTuple):
    """Steps that the agent took, in SB3's form, for continual methods.

    Args:
        observations: a tensor (B, ...) or a dict of such tensors, images with their channels first.
        actions: (B, A) or, discrete, (B, 1); of DQN, SAC and TD3 as the replay buffer has them (scaled to [-1, 1]).
    """

    observations: Any
    actions: torch.Tensor


class SB3Agent(Agent):
    """A Stable-Baselines3 algorithm as an agent.

    SB3 collects and trains inside ``learn``, a chunk at a time. It knows only process-wide generators, so the agent owns a
    state of those, installs it around every call that may draw, and puts the process's own back.

    A phase's budget is used in whole *collections* (one rollout of PPO, ``train_freq`` steps of the others). If the budget
    is smaller than one, the collection shrinks to fit; what is left at the end of the phase and does not fill a collection
    stays unused and is reported as ``unused_steps``. A chunk cannot be interrupted; PPO's (a whole rollout and its epochs)
    takes about a second on vectors but many on images, where ``rollout_steps`` should be smaller.

    Continual methods compose with it as far as they do without the loss of a batch, which SB3 computes inside its own
    ``train``. What a method adds to the loss is differentiated apart, and its gradient joins SB3's when the optimiser is
    about to step: *after* SB3 has clipped its own (PPO and DQN), so the method's part is never clipped, and its strength
    means the same whatever the size of the agent's gradient.
    """

    requires = frozenset({"env"})
    hides_loss: ClassVar[str] = "Stable-Baselines3 computes it inside its own training"
    name: ClassVar[str]
    algorithm: ClassVar[type[BaseAlgorithm]]

    def __init__(self, spaces: Spaces, config: Any, *, device: torch.device, rng: torch.Generator):
        super().__init__(spaces, config, device=device, rng=rng)
        if device.type == "cuda":
            torch.cuda.init()  # so that its generator belongs to the sealed state from the start
        seed = int(torch.randint(2**62, (), generator=rng, device=rng.device))
        with sealed_global_rng():
            seed_global(seed)
            self._generators = get_global_state()
        self._rebuilt: Callable[[], None] | None = None  # to be called after that, where methods are attached
        self.model = self._build(num_envs=1)  # enough to act; rebuilt when the first environment has more rows
        self.model.action_space.seed(seed % 2**32)
        self._collection = 0  # vector steps per collection in this phase
        self._left = 0  # what remains of the budget of this phase; 0 between phases
        self.updates = 0
        self.samples = 0

    # -- the model ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def _arguments(self) -> dict[str, Any]:
        """Keyword arguments of the SB3 algorithm."""

    @abstractmethod
    def _full_collection(self, num_envs: int) -> int:
        """Vector steps of one collection as configured."""

    @abstractmethod
    def _set_collection(self, steps: int) -> None:
        """Make SB3 collect ``steps`` vector steps at a time."""

    def _build(self, num_envs: int) -> Any:
        self.bridge = Bridge(self.spaces, num_envs, self.name)
        policy, options = self._policy()
        try:
            with self._own_generators(), warnings.catch_warnings():
                # PPO's last minibatch may be short
                warnings.filterwarnings("ignore", message="You have specified a mini-batch size")
                model = self.algorithm(  # type: ignore[call-arg]
                    policy, self.bridge, policy_kwargs=options, device=self.device, verbose=0, **self._arguments()
                )
        except (AssertionError, ValueError, TypeError, NotImplementedError) as error:
            reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(f"Agent {self.name!r} cannot be made for {self.spaces}: {reason}") from error
        model.set_logger(Logger(None, []))
        return model

    def _policy(self) -> tuple[Any, dict[str, Any]]:
        """SB3's name or the class of the policy, and keyword arguments for it."""
        policy, options = policy_for(self.spaces.observation)
        if self.config.hidden is not None:
            options["net_arch"] = list(self.config.hidden)
        return policy, options

    def _resize(self, num_envs: int) -> None:
        """The same model for another number of parallel environments (its replay buffer is empty)."""
        old = self.model
        self._rebuild(num_envs)
        self.model.set_parameters(copy.deepcopy(old.get_parameters()))
        self.model.action_space.np_random.bit_generator.state = old.action_space.np_random.bit_generator.state

    def _rebuild(self, num_envs: int) -> None:
        """A new model, with new parameters and optimisers."""
        old, self.model = self.model, self._build(num_envs)
        if self._rebuilt is not None:
            self.model.policy.load_state_dict(old.policy.state_dict())  # the weights that methods find are the agent's
            self._rebuilt()

    @contextlib.contextmanager
    def _own_generators(self) -> Iterator[None]:
        """The process-wide generators in the agent's state; afterwards that state is kept and the process's restored."""
        with sealed_global_rng():
            set_global_state(self._generators)
            try:
                yield
            finally:
                self._generators = get_global_state()

    # -- learning -----------------------------------------------------------------------------------------------------

    def start_task(self, task: TaskInfo) -> None:
        self._left = 0

    def learn(self, experience: Experience, budget: int, *, rng: torch.Generator) -> Iterator[Mapping[str, float]]:
        """``budget`` environment steps, counted over all parallel environments; ``rng`` is not needed."""
        if experience.env is None:
            raise ContractError(f"Agent {self.name!r} learns by acting, but the experience of this phase has no env.")
        if budget == self._left:
            self._continue_phase(experience.env)
        else:
            self._begin_phase(experience.env, budget)
        collection = self._collection * self.bridge.num_envs
        chunk = collection * max(1, CHUNK // collection)
        done, last = 0, budget // collection * collection
        while done < last:
            steps = min(chunk, last - done)
            metrics = self._learn_chunk(steps)
            done += steps
            self._left = budget - done
            unused = {"unused_steps": float(budget - last)} if done == last < budget else {}
            yield {"step": done, **metrics, **unused}
        self._left = 0

    def _begin_phase(self, env: VectorEnv, budget: int) -> None:
        """A new environment: its episodes begin anew, whatever was under way is over."""
        if budget < env.num_envs:
            raise ConfigError(
                f"Agent {self.name!r}: a phase of {budget} environment steps is too short for {env.num_envs} parallel "
                "environments; raise the budget or lower num_envs."
            )
        if env.num_envs != self.bridge.num_envs and self.model.num_timesteps == 0:
            self._resize(env.num_envs)
        self.bridge.connect(env)
        self.model.set_env(self._vec_env, force_reset=True)
        self._collection = min(self._full_collection(env.num_envs), budget // env.num_envs)
        self._set_collection(self._collection)

    def _continue_phase(self, env: VectorEnv) -> None:
        """After a stop: the environment stands where the last observation was taken."""
        self.bridge.connect(env)
        self.model.set_env(self._vec_env, force_reset=False)

    def _learn_chunk(self, steps: int) -> dict[str, float]:
        with self._own_generators():
            self.model.learn(steps, log_interval=NEVER, reset_num_timesteps=False)
        self._count(steps)
        if self._rebuilt is not None:
            self._remember()
        logged = {k.rpartition("/")[2]: v for k, v in self.model.logger.name_to_value.items()}
        self.model.logger.dump()  # to nowhere: forgets the values
        return {k: float(v) for k, v in logged.items() if k != "n_updates"} | self.bridge.pop_metrics()

    @abstractmethod
    def _count(self, steps: int) -> None:
        """Add to ``updates`` and ``samples`` what ``steps`` environment steps have cost."""

    @property
    def _vec_env(self) -> Any:
        """The bridge, in the wrapper that SB3 may have put around it to move image channels."""
        return self.model.get_env()

    # -- acting -------------------------------------------------------------------------------------------------------

    def act(self, obs: Any, memory: Any, first: torch.Tensor, *, rng: torch.Generator, task: torch.Tensor | None = None,
            explore: bool = False) -> tuple[torch.Tensor, Any]:  # fmt: skip
        """The deterministic action, or with ``explore`` one drawn from the policy with ``rng``."""
        arrays = to_numpy(obs)
        actions = self._explore(arrays, rng) if explore else self._greedy(arrays)
        return self.bridge.to_tensor(actions, self.device), memory

    def _greedy(self, obs: Any) -> np.ndarray:
        return self.model.predict(obs, deterministic=True)[0]

    def _explore(self, obs: Any, rng: torch.Generator) -> np.ndarray:
        with sealed_global_rng():
            seed_global(int(torch.randint(2**62, (), generator=rng, device=rng.device)))
            return self.model.predict(obs, deterministic=False)[0]

    # -- state --------------------------------------------------------------------------------------------------------

    _counters: ClassVar[tuple[str, ...]] = ("num_timesteps", "_n_updates", "_episode_num")

    def state_dict(self) -> dict[str, Any]:
        model, bridge = self.model, self.bridge
        variables = {name: recursive_getattr(model, name) for name in model._get_torch_save_params()[1]}
        return {
            "num_envs": bridge.num_envs,
            "parameters": {k: _plain(v) for k, v in model.get_parameters().items()},
            "variables": {k: v.detach().clone() for k, v in variables.items() if v is not None},
            "counters": {name: _number(getattr(model, name)) for name in self._counters},
            "last_obs": _to_torch(model._last_obs),
            "last_episode_starts": _to_torch(model._last_episode_starts),
            "episodes": {"returns": _to_torch(bridge.returns), "lengths": _to_torch(bridge.lengths)},
            "action_space": copy.deepcopy(model.action_space.np_random.bit_generator.state),
            "generators": copy.deepcopy(self._generators),
            "phase": {"collection": self._collection, "left": self._left},
            "costs": self.costs(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["num_envs"] != self.bridge.num_envs:
            self._rebuild(state["num_envs"])
        model, bridge = self.model, self.bridge
        model.set_parameters(copy.deepcopy(state["parameters"]))
        with torch.no_grad():
            for name, value in state["variables"].items():
                recursive_getattr(model, name).copy_(value)
        for name in self._counters:
            setattr(model, name, state["counters"][name])
        model._last_obs = _to_arrays(state["last_obs"])
        model._last_episode_starts = _to_arrays(state["last_episode_starts"])
        bridge.returns = _to_arrays(state["episodes"]["returns"])
        bridge.lengths = _to_arrays(state["episodes"]["lengths"])
        bridge.finished.clear()
        model.action_space.np_random.bit_generator.state = copy.deepcopy(state["action_space"])
        self._generators = copy.deepcopy(state["generators"])
        self._collection, self._left = int(state["phase"]["collection"]), int(state["phase"]["left"])
        if self._collection:
            self._set_collection(self._collection)
        self.updates, self.samples = int(state["costs"]["updates"]), int(state["costs"]["samples"])

    def costs(self) -> dict[str, int]:
        """Gradient updates and training samples processed so far."""
        return {"updates": self.updates, "samples": self.samples}

    # -- for continual methods ------------------------------------------------------------------------------------------

    def attach(self, rebuilt: Callable[[], None]) -> None:
        """Methods are attached: call ``rebuilt`` whenever parameters and optimisers are new objects."""
        self._rebuilt = rebuilt

    @property
    @abstractmethod
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Those of the networks (SAC's entropy coefficient has one of its own, which methods leave alone)."""

    @property
    def trainables(self) -> list[nn.Parameter]:
        """What the optimisers change, without target networks, which are copies."""
        return [p for o in self.optimizers for group in o.param_groups for p in group["params"]]

    @abstractmethod
    def outputs(self, batch: Steps) -> tuple[Output, ...]:
        """What the networks compute for observations (and actions)."""

    @abstractmethod
    def sample(self, data: None, rng: torch.Generator) -> Steps:
        """``batch_size`` random steps of the present phase; ``data`` is None, as there is no data set."""

    def _remember(self) -> None:
        """Keep what :meth:`sample` needs, where SB3 does not."""

    @property
    def num_parameters(self) -> int:
        """Numbers that an optimiser changes (target networks are copies and do not count)."""
        found = (recursive_getattr(self.model, name) for name in self.model._get_torch_save_params()[0])
        optimizers = [o for o in found if isinstance(o, torch.optim.Optimizer)]
        return sum(p.numel() for o in optimizers for group in o.param_groups for p in group["params"])


class OneOptimizer(SB3Agent):
    """PPO and DQN: all networks are trained by one optimiser, which a continual method may replace."""

    model: Any

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.optimizer]

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.model.policy.optimizer

    @optimizer.setter
    def optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        rate = float(optimizer.param_groups[0]["lr"])
        self.model.policy.optimizer = optimizer
        self.model.lr_schedule = lambda _progress: rate  # SB3 writes it into the optimiser before it trains

    def new_optimizer(self) -> torch.optim.Optimizer:
        """Like the one that SB3 makes."""
        policy = self.model.policy
        return policy.optimizer_class(self.trainables, lr=self.config.lr, **policy.optimizer_kwargs)


class ActorCritic(SB3Agent):
    """SAC and TD3: an optimiser of the actor and one of the critics."""

    model: Any

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.model.actor.optimizer, self.model.critic.optimizer]

    def outputs(self, batch: Steps) -> tuple[Output, ...]:
        """The deterministic action (B, A), in [-1, 1], and the critics' values (B, 1) each at the actions of the batch.

        What is squashed is what acts. The spread of SAC's actor is no part of it, so that no method holds it.
        """
        action = self._action(batch.observations)
        values = self.model.critic(batch.observations, batch.actions)
        return (Output("gaussian", action), *(Output("gaussian", q) for q in values))

    def _action(self, observations: Any) -> torch.Tensor:
        return self.model.actor(observations)


class WaitForEpisode(OffPolicyAlgorithm):
    """Hindsight relabelling draws from finished episodes only: until there is one, there is nothing to train on."""

    def train(self, gradient_steps: int, batch_size: int) -> None:
        if isinstance(self.replay_buffer, HerReplayBuffer) and not self.replay_buffer.ep_length.any():
            return
        super().train(gradient_steps, batch_size)


class OffPolicyAgent(SB3Agent):
    """DQN, SAC and TD3: a replay buffer, relabelled in hindsight (HER) where observations carry a goal.

    The buffer is kept across tasks (``buffer="keep"``) or emptied at every boundary the stream reveals (``"clear"``), which
    is followed by ``learning_starts`` steps of random actions again. With HER, kept transitions of an earlier task get the
    reward function of the present one.
    """

    hides_loss = (
        "Stable-Baselines3 computes it inside its own training; the agent has a replay buffer of its own, which keeps the "
        "steps of earlier tasks (--agent.buffer keep)"
    )
    model: Any

    def __init__(self, spaces: Spaces, config: Any, *, device: torch.device, rng: torch.Generator):
        super().__init__(spaces, config, device=device, rng=rng)
        self._begun = 0  # environment steps before the present phase

    def _arguments(self) -> dict[str, Any]:
        c = self.config
        arguments: dict[str, Any] = {
            "learning_rate": c.lr, "buffer_size": c.buffer_size, "learning_starts": c.learning_starts,
            "batch_size": c.batch_size, "tau": c.tau, "gamma": c.gamma, "train_freq": c.train_freq,
            "gradient_steps": c.gradient_steps,
        }  # fmt: skip
        if self._her:
            arguments |= {
                "replay_buffer_class": HerReplayBuffer,
                "replay_buffer_kwargs": {"n_sampled_goal": c.n_sampled_goal, "goal_selection_strategy": "future"},
            }
        return arguments

    @property
    def _her(self) -> bool:
        space = self.spaces.observation
        return self.config.her and isinstance(space, Dict) and "desired_goal" in space.spaces

    def _full_collection(self, num_envs: int) -> int:
        return self.config.train_freq

    def _set_collection(self, steps: int) -> None:
        self.model.train_freq = TrainFreq(steps, TrainFrequencyUnit.STEP)

    def _count(self, steps: int) -> None:
        self.updates = self.model._n_updates
        self.samples = self.updates * self.config.batch_size

    def start_task(self, task: TaskInfo) -> None:
        super().start_task(task)
        if self.config.buffer == "clear":
            self._empty_buffer()
            self.model.learning_starts = self.model.num_timesteps + self.config.learning_starts

    def _empty_buffer(self) -> None:
        buffer = self.model.replay_buffer
        buffer.reset()
        if isinstance(buffer, HerReplayBuffer):
            for array in (buffer.ep_start, buffer.ep_length, buffer._current_ep_start):
                array.fill(0)

    def _begin_phase(self, env: VectorEnv, budget: int) -> None:
        if self._her:
            compute_reward(env, self.name)  # says so now if it is missing
        super()._begin_phase(env, budget)
        if self._her:
            with warnings.catch_warnings():  # SB3 warns that it ends the unfinished episodes, which is what we want
                warnings.simplefilter("ignore", UserWarning)
                self.model.replay_buffer.truncate_last_trajectory()
        self._begun = self.model.num_timesteps

    def sample(self, data: None, rng: torch.Generator) -> Steps:
        """``batch_size`` random steps of the present phase that are still in the replay buffer, not relabelled."""
        buffer = self.model.replay_buffer
        count = min((self.model.num_timesteps - self._begun) // buffer.n_envs, buffer.size())
        if count == 0:
            raise ContractError(f"Agent {self.name!r} has taken no step in this phase, so there is nothing to sample.")

        def draw(high: int) -> np.ndarray:
            return torch.randint(high, (self.config.batch_size,), generator=rng, device=rng.device).cpu().numpy()

        row, env = (buffer.pos - 1 - draw(count)) % buffer.buffer_size, draw(buffer.n_envs)
        seen = buffer.observations
        picked = {k: v[row, env] for k, v in seen.items()} if isinstance(seen, dict) else seen[row, env]
        return Steps(_to_torch(picked, self.device), _to_torch(buffer.actions[row, env], self.device))

    # -- state --------------------------------------------------------------------------------------------------------

    _counters = (*SB3Agent._counters, "learning_starts")

    def state_dict(self) -> dict[str, Any]:
        buffer = self.model.replay_buffer
        arrays = {name: _to_torch(array[: buffer.size()]) for name, array in _columns(buffer).items()}
        state = {"pos": int(buffer.pos), "full": bool(buffer.full), "columns": arrays, "begun": self._begun}
        if isinstance(buffer, HerReplayBuffer):
            state["current_ep_start"] = _to_torch(buffer._current_ep_start)
        return {**super().state_dict(), "replay": state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._empty_buffer()
        buffer, saved = self.model.replay_buffer, state["replay"]
        for name, array in _columns(buffer).items():
            column = saved["columns"][name].numpy()
            array[: len(column)] = column
        buffer.pos, buffer.full = int(saved["pos"]), bool(saved["full"])
        self._begun = int(saved.get("begun", 0))  # older states do not have it
        if isinstance(buffer, HerReplayBuffer):
            buffer._current_ep_start[:] = saved["current_ep_start"].numpy()


def _columns(buffer: Any) -> dict[str, np.ndarray]:
    """All arrays of a replay buffer that have one row per stored step."""
    columns = {name: getattr(buffer, name) for name in ("actions", "rewards", "dones", "timeouts")}
    for name in ("observations", "next_observations"):
        value = getattr(buffer, name)
        columns |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    if isinstance(buffer, HerReplayBuffer):
        columns |= {"ep_start": buffer.ep_start, "ep_length": buffer.ep_length}
    return columns


def _to_torch(value: Any, device: torch.device | str = "cpu") -> Any:
    """Arrays (or a dict of them, or None) as tensors with memory of their own."""
    if isinstance(value, dict):
        return {k: _to_torch(v, device) for k, v in value.items()}
    return None if value is None else torch.from_numpy(np.array(value)).to(device)


def _to_arrays(value: Any) -> Any:
    return None if value is None else to_numpy(value)


def _plain(state: Any) -> Any:
    """A ``state_dict`` with tensors of its own and plain containers."""
    if isinstance(state, torch.Tensor):
        return state.detach().clone()
    if isinstance(state, Mapping):
        return {k: _plain(v) for k, v in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_plain(v) for v in state)
    return _number(state)


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


# -- networks -------------------------------------------------------------------------------------------------------------


def policy_for(space: gymnasium.Space) -> tuple[str, dict[str, Any]]:
    """SB3's name of the policy for an observation space, and keyword arguments for it.

    Images of at least 36x36 pixels go through the convolutions of Mnih et al. (2015), everything else is flattened.
    """
    if isinstance(space, Dict):
        return "MultiInputPolicy", {"features_extractor_class": DictFeatures}
    return ("CnnPolicy" if _is_large_image(space) else "MlpPolicy"), {}


def _is_large_image(space: gymnasium.Space) -> bool:
    return isinstance(space, Box) and is_image_space(space) and sorted(space.shape)[1] >= MIN_CNN


class DictFeatures(BaseFeaturesExtractor):
    """Each entry of a dict through convolutions (images) or flattened (all else), concatenated.

    SB3's own ``CombinedExtractor`` does the same but fails on images that are too small for its convolutions.
    """

    def __init__(self, space: Dict, image_features: int = 256):
        sizes = {
            key: image_features if _is_large_image(entry) else get_flattened_obs_dim(entry)
            for key, entry in space.items()
        }
        super().__init__(space, features_dim=sum(sizes.values()))
        self.extractors = nn.ModuleDict(
            {
                key: NatureCNN(entry, image_features) if _is_large_image(entry) else nn.Flatten()
                for key, entry in space.items()
            }  # type: ignore[arg-type]
        )

    def forward(self, observations: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([extract(observations[key]) for key, extract in self.extractors.items()], dim=1)
