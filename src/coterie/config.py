"""The settings of a run, as one tree read from TOML.

Every field is described below it, with its unit. Unknown keys are errors that name the nearest key; impossible
values and settings that do not fit each other are found here, before anything is loaded.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from coterie.errors import ConfigError, nearest
from coterie.models import PRESETS, ModelConfig
from coterie.types import TrainingMode


class Section(BaseModel):
    """A table of the config; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class BaseConfig(Section):
    """The frozen base model all policies share."""

    model: str = "smollm2-135m-instruct"
    """An embedded model's name (`coterie models list`), a local directory, or a hub id."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the base weights. auto: bfloat16 where the processor multiplies it natively, else float32."""
    device: str = "auto"
    """auto: CUDA when there is one, else CPU."""
    threads: int = Field(default=0, ge=0)
    """CPU threads; 0: what OMP_NUM_THREADS says, or else all cores this process may use."""
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the linear layers that get an adapter."""
    lora_layers: float = Field(default=1.0, gt=0, le=1)
    """Share of the layers, counted from the top, that get adapters; below 1 the backward pass is shorter."""


class ScenarioConfig(Section):
    """What is played."""

    id: str = "tasks"
    """A built-in scenario, "module:attr", or an installed entry point."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The scenario's own settings, checked by the scenario."""


class RolloutConfig(Section):
    """How episodes are played in training."""

    tasks_per_update: int = Field(default=8, ge=1)
    """Distinct tasks an update."""
    group_size: int = Field(default=16, ge=1)
    """Episodes of each task in an update; group-relative credit compares them."""
    temperature: float = Field(default=1.0, gt=0, le=10)
    """Of sampling in training; what held-out play uses is `evaluation.temperature`."""
    withhold: float = Field(default=0.2, ge=0, lt=1)
    """Share of episodes in which a speaker's advice is not delivered; measures cooperation_score."""
    rotate_seats: bool = False
    """Whether models take turns at the seats; needed where seats are not alike and roles are not fixed."""
    max_failed_share: float = Field(default=0.1, ge=0, le=1)
    """Past this share of failed episodes in an update, or in an evaluation, the run stops with a summary."""
    episode_timeout_s: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    """Seconds an episode may go on by itself without asking for a turn; past it the episode has failed. What turns
    take does not count; how many there may be says the task's max_steps."""
    language: Literal["en", "zh"] = "en"
    """Of the prompts."""


class CreditConfig(Section):
    """How rewards become advantages."""

    scheme: str = "auto"
    """group_relative, magnetic, moving_average, team_structured, "module:attr", or auto: what fits the mode."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The scheme's own settings, checked by the scheme."""


class LearnerConfig(Section):
    """How advantages become gradients."""

    loss: Literal["policy_gradient", "clipped"] = "policy_gradient"
    """policy_gradient: plain. clipped: PPO's clipped ratio, for several passes over the same episodes."""
    passes: int = Field(default=1, ge=1)
    """Passes over each update's episodes."""
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    """With loss clipped: the ratio's lower bound is 1 - clip_low."""
    clip_high: float = Field(default=0.2, gt=0)
    """With loss clipped: the ratio's upper bound is 1 + clip_high."""
    ratio_cap: float = Field(default=2.0, ge=1)
    """With loss policy_gradient: cap of the importance weight, which corrects for turns sampled by an older version or
    by a server whose probabilities differ from the learner's."""
    entropy_bonus: float = Field(default=0.0, ge=0)
    """Weight of the mean entropy of the sampling policy, in reward units per nat."""
    kl_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the divergence KL(policy || base), in reward units per nat."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Of each policy's whole gradient."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Of AdamW, decoupled; pulls the adapter towards the base."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of AdamW; shorter memory than usual, because runs are short."""
    warmup_updates: int = Field(default=0, ge=0)
    """Updates over which the learning rate rises linearly from zero."""
    final_learning_rate: float = Field(default=1.0, ge=0, le=1)
    """Share of the learning rate left at the last update; it falls linearly after the warm-up."""
    tokens_per_pass: int = Field(default=1024, ge=16)
    """Distinct tokens in one forward and backward pass; memory grows with it, the gradient does not change."""
    gradient_checkpointing: bool = False
    """Whether layers are computed again on the way back instead of kept: a third more work, far less memory."""


class EngineConfig(Section):
    """The in-process engine."""

    cache_tokens: int = Field(default=16384, ge=256)
    """Tokens of key/value cache."""
    tokens_per_pass: int = Field(default=1024, ge=16)
    """Distinct new tokens computed in one forward pass."""
    activations_mb: int | None = Field(default=None, ge=0)
    """Megabytes of what a rollout computed that may be kept until its update, which then needs no forward pass of its
    own. Nothing: a quarter of the machine's memory, or 0 on a graphics card."""
    calibration: bool = True
    """Whether a fixed bias per seat and choice set takes the base model's prior out of choices."""
    calibration_tasks: int = Field(default=40, ge=4)
    """Training tasks looked at to find that bias."""


class ServerConfig(Section):
    """One vLLM-compatible server."""

    url: str
    """http://host:port, with or without /v1."""
    api_key_env: str | None = None
    """Environment variable that holds the server's API key; the key itself never stands in a config."""
    paths: dict[str, str] = Field(default_factory=dict)
    """Our directory = the same directory as this server sees it; for adapters on a shared file system."""


class InferenceConfig(Section):
    """Where turns come from."""

    tiers: tuple[Literal["camel", "http", "local", "simulated"], ...] = ("camel", "http", "local", "simulated")
    """In order of preference. camel and http need servers; camel needs the extra of that name; simulated turns never
    train."""
    servers: tuple[ServerConfig, ...] = ()
    """vLLM-compatible servers; none: the engine inside the process generates."""
    policy: Literal["power_of_two", "least_loaded", "round_robin", "random", "prefix"] = "power_of_two"
    """How a server is picked among the healthy ones that hold the adapter version."""
    max_in_flight: int = Field(default=64, ge=1)
    """Calls a server is given at once; more wait here."""
    timeout_s: float = Field(default=120.0, gt=0)
    """Seconds for one call, waiting for the server included."""
    poll_every_s: float = Field(default=5.0, gt=0)
    """Seconds between looks at every server's health and load."""
    staleness: int = Field(default=0, ge=0)
    """Updates by which an episode's adapter versions may lag behind the learner; 0: rollout and learning alternate,
    more: the next episodes are played while the learner works."""
    quorum: float = Field(default=0.5, gt=0, le=1)
    """Share of the healthy servers that must hold a new version before it is used; the others leave the pool until
    they do."""
    canary_tolerance: float = Field(default=0.1, gt=0)
    """Largest mean absolute difference, in nats a token, between a server's log-probabilities and the learner's at
    which a new version counts as served right."""
    metrics_port: int | None = Field(default=None, ge=0, lt=65536)
    """Port on this machine of a Prometheus endpoint with the figures of calls; 0: a free one; none: no endpoint."""

    @model_validator(mode="after")
    def _serves(self) -> InferenceConfig:
        if not self.tiers or len(set(self.tiers)) < len(self.tiers):
            raise ValueError("tiers must name at least one tier, each once")
        if self.staleness and not self.servers:
            raise ValueError("staleness needs servers: the engine inside the process cannot play while it learns")
        return self


class EvaluationConfig(Section):
    """Measuring on held-out tasks."""

    tasks: int = Field(default=100, ge=0)
    """Held-out tasks at the end of training; 0: none."""
    temperature: float = Field(default=0.0, ge=0, le=10, allow_inf_nan=False)
    """Of held-out play; 0: greedy. Above 0 where a policy has to mix moves, so that its likeliest is not its play."""
    every: int = Field(default=0, ge=0)
    """Updates between measurements of a scenario's exact metrics while training; 0: only at the end."""
    until: dict[str, float] = Field(default_factory=dict)
    """Training ends early once each of these exact metrics has reached its value, for example success = 0.99."""

    @model_validator(mode="after")
    def _measured(self) -> EvaluationConfig:
        if self.until and not self.every:
            raise ValueError("until needs exact metrics while training; set every to 1 or more")
        return self


class RunFolderConfig(Section):
    """Where the run is kept."""

    folder: Path | None = None
    """None: runs/<name>-<time>."""
    checkpoint_every: int = Field(default=10, ge=1)
    """Updates between checkpoints; one is always written at the end, on Ctrl-C, and when the terminal is closed."""
    episodes_kept: int = Field(default=64, ge=0)
    """Episodes of each update written to the database, at most; 0: none. Metrics always cover all."""


class RunConfig(Section):
    """A whole run."""

    name: str = "run"
    """Names the run folder when none is given."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Of everything random: adapters, tasks, sampling."""
    mode: TrainingMode = TrainingMode.COOPERATIVE
    custom_mode: str | None = None
    """A mode of your own that divides rewards in its place: "module:attr" or an installed entry point; `mode` is then
    the one whose prompts and credit it has."""
    updates: int = Field(default=50, ge=0)
    """Optimizer updates of every policy."""
    max_models: int = Field(default=10, ge=1)
    """Most models a run may have; a guard against training more than was meant."""
    preset: str | None = None
    """A named group of models instead of [[models]]."""
    models: tuple[ModelConfig, ...] = ()
    base: BaseConfig = BaseConfig()
    scenario: ScenarioConfig = ScenarioConfig()
    rollout: RolloutConfig = RolloutConfig()
    credit: CreditConfig = CreditConfig()
    learner: LearnerConfig = LearnerConfig()
    engine: EngineConfig = EngineConfig()
    inference: InferenceConfig = InferenceConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    run: RunFolderConfig = RunFolderConfig()

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not data.get("preset"):
            return data
        if data.get("models"):
            raise ValueError("give either preset or models, not both")
        preset = data["preset"]
        if preset not in PRESETS:
            raise ValueError(f"unknown preset {preset!r}{nearest(str(preset), PRESETS)}")
        return {**data, "preset": None, "models": PRESETS[preset]()}

    @model_validator(mode="after")
    def _fits(self) -> RunConfig:
        check_models(self.models, self.max_models, self.mode)
        return self


def check_models(models: Sequence[ModelConfig], max_models: int, mode: TrainingMode, *, complete: bool = True) -> None:
    """Refuse a group of models that cannot be trained together.

    Args:
        complete: whether no more models will join; until then a team battle may have one team.

    Raises:
        ValueError: duplicate ids, more than `max_models`, different bases, or too few teams for a team battle.
    """
    ids = [m.model_id for m in models]
    doubled = sorted({i for i in ids if ids.count(i) > 1})
    if doubled:
        raise ValueError(f"model_id {doubled[0]!r} is used {ids.count(doubled[0])} times; ids must be unique")
    if len(models) > max_models:
        raise ValueError(f"{len(models)} models, but max_models is {max_models}; remove some or raise max_models")
    names = sorted({m.model_name for m in models if m.model_name})
    if len(names) > 1:
        raise ValueError(f"models name different bases ({', '.join(names)}); all policies of a run share one base")
    if mode is TrainingMode.TEAM_BATTLE and models:
        alone = [m.model_id for m in models if m.team_id is None]
        if alone:
            raise ValueError(f"mode team_battle needs a team_id for every model; {alone[0]!r} has none")
        if complete and len({m.team_id for m in models}) < 2:
            raise ValueError("mode team_battle needs at least two different team_id values")


def load_config(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a TOML config and apply ``a.b=c`` overrides (values are TOML; bare words are strings).

    Raises:
        ConfigError: unreadable file, unknown key, impossible value; all problems are listed at once.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read config {path}: {error.strerror}; give the path of a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path} is not valid TOML: {error}") from error
    for override in overrides:
        _apply_override(data, override)
    return parse_config(data, source=str(path))


def parse_config(data: Mapping[str, Any], source: str = "config") -> RunConfig:
    """Turn a mapping into a `RunConfig`. Raises `ConfigError` listing every problem with its key path."""
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{source}: " + explain(error, RunConfig)) from error


def with_server(config: RunConfig, url: str) -> RunConfig:
    """The same run with turns from this server. Raises `ConfigError` when it names servers of its own."""
    if config.inference.servers:
        raise ConfigError("servers are named in both vllm_url and config.inference.servers; use one of them")
    inference = config.inference.model_copy(update={"servers": (ServerConfig(url=url),)})
    return config.model_copy(update={"inference": inference})


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """Say each problem of a pydantic error in one line: key path, what is wrong, nearest valid key."""
    lines = []
    for problem in error.errors():
        location = [str(part) for part in problem["loc"]]
        where = ".".join(location) or "(top level)"
        if problem["type"] == "extra_forbidden":
            parent = _model_at(root, location[:-1])
            hint = nearest(location[-1], parent.model_fields) if parent else ""
            lines.append(f"unknown key {where!r}{hint}")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            given = "" if location == [] or isinstance(problem["input"], dict) else f", got {problem['input']!r}"
            lines.append(f"{where}: {message}{given}")
    return "; ".join(lines)


def _model_at(root: type[BaseModel], path: Sequence[str]) -> type[BaseModel] | None:
    model: type[BaseModel] | None = root
    for part in path:
        if part.isdigit() or model is None:
            continue
        field = model.model_fields.get(part)
        model = _model_in(field.annotation) if field else None
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in get_args(annotation):
        found = _model_in(inner)
        if found is not None:
            return found
    return None


def parse_override(override: str, option: str) -> tuple[str, Any]:
    """Key and value of ``key=value``; the value is TOML, or else text. Raises `ConfigError` naming the option."""
    key, separator, raw = override.partition("=")
    if not separator or not key.strip():
        example = "rollout.group_size=8" if option == "--set" else "rounds=3"
        raise ConfigError(f"{option} {override!r}: write it as key=value, for example {option} {example}")
    try:
        return key.strip(), tomllib.loads(f"v = {raw}")["v"]
    except tomllib.TOMLDecodeError:
        return key.strip(), raw


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, value = parse_override(override, "--set")
    target: Any = data
    *parents, last = key.split(".")
    for part in parents:
        target = target[int(part)] if isinstance(target, list) and part.isdigit() else target.setdefault(part, {})
        if not isinstance(target, dict | list):
            raise ConfigError(f"--set {override!r}: {part!r} is a value, not a table")
    if isinstance(target, list):
        if not last.isdigit() or int(last) >= len(target):
            raise ConfigError(f"--set {override!r}: {last!r} is not an index of that list")
        target[int(last)] = value
    else:
        target[last] = value
