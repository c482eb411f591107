"""Reading and checking the TOML files that declare what is searched."""

import copyreg
import dataclasses
import hashlib
import json
import math
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, TypeGuard

FOLDER = Path(__file__).parent
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
OBJECTIVES: tuple[Literal["area"], Literal["metric"]] = ("area", "metric")
STAGES = ("intermediate", "logits", "lengthdrop")
"""What a distillation does one after the other."""
CROSSOVERS = ("uniform", "blxalpha", "sbx", "vsbx", "spx", "undx")
SAMPLERS = {
    "surrogate": ("population_size", "brood"),
    "nsga2": ("population_size", "crossover", "crossover_prob", "swapping_prob", "mutation_prob"),
    "lat": ("population_size",),
    "tpe": ("population_size",),
    "random": ("population_size",),
}
"""Samplers of length configs, and the settings that each takes."""

COSTS = {"macs": ("macs",), "latency": ("latency_ms",), "both": ("macs", "latency_ms")}
"""What a config may cost, and the objectives that each stands for."""
PRECISIONS = ("fp32", "bf16")
SEVERAL_COSTS = ("surrogate", "nsga2", "tpe", "random")
"""Samplers that take more than one cost."""

Value: TypeAlias = bool | int | float | str


class StudyFileError(ValueError):
    """A study file that is absent, unreadable or declares something impossible; the message says what."""


def _read_only(values: Mapping[str, Any]) -> MappingProxyType[str, Any]:
    return MappingProxyType(dict(values))


copyreg.pickle(MappingProxyType, lambda proxy: (_read_only, (dict(proxy),)))  # definitions are sent to workers


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers from `low` to `high`, both included; whole ones where both bounds are."""

    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = None

    def __post_init__(self) -> None:
        for key in ("low", "high"):
            _check_number(key, getattr(self, key))
        _check_flag("log", self.log)
        if self.low > self.high:
            raise StudyFileError(f"low={self.low} is above high={self.high}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise StudyFileError(f"low={self.low} and step={self.step}; a log range needs low above 0 and no step")
        if self.step is not None:
            _check_number("step", self.step)
            if self.step <= 0:
                raise StudyFileError(f"step={self.step} is not above 0")
            if not _leads_to(self.low, self.high, self.step):
                raise StudyFileError(f"step={self.step} does not lead from low={self.low} to high={self.high}")

    @property
    def whole(self) -> bool:
        """Whether the range holds whole numbers only."""
        return isinstance(self.low, int) and isinstance(self.high, int) and not isinstance(self.step, float)

    def in_floats(self) -> "Range":
        """The same range with 1 written as 1.0."""
        step = None if self.step is None else float(self.step)
        return Range(low=float(self.low), high=float(self.high), log=self.log, step=step)

    def __contains__(self, value: object) -> bool:
        if not _is_number(value) or (self.whole and not isinstance(value, int)):
            return False
        return self.low <= value <= self.high and self._on_grid(value)

    def _on_grid(self, value: int | float) -> bool:
        if self.step is None:
            return True
        steps = (value - self.low) / self.step
        return math.isclose(steps, round(steps), abs_tol=1e-8)


@dataclass(frozen=True, kw_only=True)
class Choices:
    """One of a few values."""

    choices: tuple[Value, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.choices, tuple) or not self.choices or not all(map(_is_value, self.choices)):
            raise StudyFileError(f"choices={_shown(self.choices)}; write a list of numbers or words, with at least one")
        if len(set(self.choices)) < len(self.choices):
            raise StudyFileError(f"choices={_shown(self.choices)} holds a value twice")

    def __contains__(self, value: object) -> bool:
        return any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in self.choices)


Space: TypeAlias = Mapping[str, Range | Choices]


@dataclass(frozen=True, kw_only=True)
class FinetuneStudy:
    """A study over training hyperparameters.

    Attributes:
        name: The study's name in the database.
        kind: "finetune", or "distill", whose settings belong to `STAGES` and are named `stage.setting`.
        objective: "area" (mean metric over four costs) or "metric" (full length only).
        space: What is searched.
        fixed: Settings that are not.
        first: Parameter sets tried before the sampler takes over.
        multivariate: Whether TPE models parameters jointly.
        startup_trials: Random trials before TPE learns.
        pruner_startup_trials: Trials that are never stopped early.
        pruner_warmup_epochs: The first epoch after which a trial may be stopped; after its last it never is.
    """

    name: str
    kind: Literal["finetune", "distill"] = "finetune"
    objective: Literal["area", "metric"] = OBJECTIVES[0]
    space: Space
    fixed: Mapping[str, Value | tuple[int, ...]] = field(default_factory=lambda: MappingProxyType({}))
    first: tuple[Mapping[str, Value], ...] = ()
    multivariate: bool = True
    startup_trials: int = 8
    pruner_startup_trials: int = 4
    pruner_warmup_epochs: int = 2

    def __post_init__(self) -> None:
        _check_name(self.name)
        if self.objective not in OBJECTIVES:
            raise StudyFileError(f"objective={self.objective!r}; choose one of {', '.join(OBJECTIVES)}")
        if not self.space:
            raise StudyFileError("[space] declares nothing to search")
        if both := sorted(set(self.space) & set(self.fixed)):
            raise StudyFileError(f"{', '.join(both)} stands both in [space] and in [fixed]; keep one")
        for key, value in self.fixed.items():
            if not _is_value(value) and not (self.kind == "distill" and _is_layer_list(value)):
                wanted = "a number, a word or a list of layers" if self.kind == "distill" else "a number or a word"
                raise StudyFileError(f"[fixed] sets {key}={_shown(value)}; write {wanted}")
        for number, parameters in enumerate(self.first, start=1):
            for key, value in parameters.items():
                if key not in self.space:
                    raise StudyFileError(f"[[first]] number {number} sets {key}, which [space] does not search")
                if value not in self.space[key]:
                    raise StudyFileError(
                        f"[[first]] number {number} sets {key}={value!r}, outside its range in [space]"
                    )
        _check_flag("multivariate", self.multivariate)
        for key in ("startup_trials", "pruner_startup_trials", "pruner_warmup_epochs"):
            _check_count(key, getattr(self, key), least=0)

    def space_fingerprint(self) -> str:
        """Hash of what decides the values that trials are compared by: the space, the fixed settings, the objective."""
        return _fingerprint({"space": self.space, "fixed": self.fixed, "objective": self.objective})

    def settings_of(self, stage: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """What the fixed settings and a trial's parameters say of one stage, under the names that training has."""
        together = {**self.fixed, **parameters}
        return {key.partition(".")[2]: value for key, value in together.items() if key.partition(".")[0] == stage}


@dataclass(frozen=True, kw_only=True)
class LengthsStudy:
    """A study over per-layer token retention.

    Attributes:
        name: The study's name in the database.
        retention: Range of every layer's retention; with a step, so that configs share prefixes.
        skippable: Layers, from 0, that a config may skip; none leaves depth out of the search.
        cost: Which of `COSTS` is minimised.
        latency_batch_size: Sequences that run together where time is a cost.
        latency_precision: What the products are computed in there.
        sampler: Which of `SAMPLERS` chooses the configs.
        population_size: Trials of one generation, which are asked and evaluated together.
        brood: Candidates that the surrogate screens for each trial.
        crossover: How NSGA-II mixes two parents.
        crossover_prob: How often it does.
        swapping_prob: Share of parameters swapped by uniform crossover.
        mutation_prob: Per parameter; None is 1 / number of layers.
        blocks: Parts of the search split after each of which a config may be stopped; 1 never stops any.
        confidence: Standard errors by which it must trail a front point that costs no more.
    """

    name: str
    retention: Range
    skippable: tuple[int, ...] = ()
    cost: Literal["macs", "latency", "both"] = "macs"
    latency_batch_size: int = 8
    latency_precision: Literal["fp32", "bf16"] = "fp32"
    sampler: str = "surrogate"
    population_size: int = 25
    brood: int = 150
    crossover: str = "uniform"
    crossover_prob: float = 0.9
    swapping_prob: float = 0.5
    mutation_prob: float | None = None
    blocks: int = 8
    confidence: float = 2.5

    def __post_init__(self) -> None:
        _check_name(self.name)
        _check_sampler(self.sampler)
        if not 0 < self.retention.low < self.retention.high == 1:
            raise StudyFileError(
                f"[retention] runs from {self.retention.low} to {self.retention.high}; "
                "it must start above 0, below its end, and end at 1.0, so that the full length is part of the search"
            )
        if self.retention.log:
            raise StudyFileError("[retention] cannot be logarithmic")
        if not _is_layer_list(self.skippable) or min(self.skippable, default=0) < 0:
            raise StudyFileError(
                f"[depth] layers={_shown(self.skippable)}; list the layers that may be skipped, from 0"
            )
        if len(set(self.skippable)) < len(self.skippable):
            raise StudyFileError(f"[depth] layers={_shown(self.skippable)} names a layer twice")
        if not isinstance(self.cost, str) or self.cost not in COSTS:
            raise StudyFileError(f"cost={self.cost!r}; choose one of {', '.join(COSTS)}")
        if self.cost == "both" and self.sampler not in SEVERAL_COSTS:
            raise StudyFileError(
                f"[sampler] name={self.sampler!r} knows one cost, and cost='both' has two; choose "
                f"{', '.join(SEVERAL_COSTS[:-1])} or {SEVERAL_COSTS[-1]}"
            )
        _check_count("[latency] batch_size", self.latency_batch_size, least=1)
        if self.latency_precision not in PRECISIONS:
            raise StudyFileError(
                f"[latency] precision={self.latency_precision!r}; choose one of {', '.join(PRECISIONS)}"
            )
        _check_count("population_size", self.population_size, least=4)
        _check_count("brood", self.brood, least=1)
        _check_count("blocks", self.blocks, least=1)
        if not _is_number(self.confidence) or self.confidence <= 0:
            raise StudyFileError(f"confidence={self.confidence!r}; choose a number of standard errors above 0")
        if self.crossover not in CROSSOVERS:
            raise StudyFileError(f"crossover={self.crossover!r}; choose one of {', '.join(CROSSOVERS)}")
        for key in ("crossover_prob", "swapping_prob", "mutation_prob"):
            probability = getattr(self, key)
            if key == "mutation_prob" and probability is None:
                continue
            if not _is_number(probability) or not 0 <= probability <= 1:
                raise StudyFileError(f"{key}={probability!r}; choose a probability in [0, 1]")

    def space_fingerprint(self) -> str:
        """Hash of the retention range, and of the layers that may be skipped if any, which all trials must share."""
        depth = {"depth": sorted(self.skippable)} if self.skippable else {}
        return _fingerprint({"retention": self.retention, **depth})

    @property
    def costs(self) -> tuple[str, ...]:
        """The objectives beside quality, by name."""
        return COSTS[self.cost]

    def cost_identity(self) -> dict[str, str]:
        """What decides the costs that trials are compared by; nothing where they are MACs, the same anywhere."""
        if self.cost == "macs":
            return {}
        return {"cost": f"{self.cost}, {self.latency_precision}, batches of {self.latency_batch_size}"}


Study: TypeAlias = FinetuneStudy | LengthsStudy


def load_finetune(name_or_path: str) -> FinetuneStudy:
    """Read a study file of `kind = "finetune"` or `"distill"`: one of ours by its name, or any by its path."""
    study = load(name_or_path, (FinetuneStudy,))
    if not isinstance(study, FinetuneStudy):
        raise StudyFileError(
            f"Study {name_or_path!r} searches lengths; run it with `hpo search-lengths --study {name_or_path}`."
        )
    return study


def load_lengths(name_or_path: str) -> LengthsStudy:
    """Read a study file of `kind = "lengths"`: one of ours by its name, or any by its path."""
    study = load(name_or_path, (LengthsStudy,))
    if not isinstance(study, LengthsStudy):
        raise StudyFileError(
            f"Study {name_or_path!r} searches training settings; run it with `hpo tune --study {name_or_path}`."
        )
    return study


def load(name_or_path: str, offered: tuple[type[Study], ...] = (FinetuneStudy, LengthsStudy)) -> Study:
    """Read a study file.

    Args:
        name_or_path: The name of a file in this folder (`finetune`), or a path ending in `.toml`.
        offered: What studies of ours are named to choose from where there is none of that name.
    Raises:
        StudyFileError: There is no such file, it is not TOML, or declares something impossible.
    """
    path = _find(name_or_path, offered)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise StudyFileError(f"Cannot read the study file {path}: {error}.") from error
    except ValueError as error:  # of tomllib's own, or Python's of a number of thousands of digits
        raise StudyFileError(f"The study file {path} is not valid TOML: {error}.") from error
    try:
        match document.pop("kind", None):
            case "finetune" | "distill" as kind:
                return _read_finetune(document, path.stem, kind)
            case "lengths":
                return _read_lengths(document, path.stem)
            case None:
                raise StudyFileError('it names no kind; write kind = "finetune", "distill" or "lengths"')
            case kind:
                raise StudyFileError(f'kind={kind!r}; write kind = "finetune", "distill" or "lengths"')
    except StudyFileError as error:
        raise StudyFileError(f"The study file {path} cannot be used: {error}.") from error


def built_in() -> tuple[str, ...]:
    """Names of the study files in this folder."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


def _find(name_or_path: str, offered: tuple[type[Study], ...]) -> Path:
    if name_or_path.endswith(".toml"):
        path = Path(name_or_path)
        try:
            found = path.is_file()
        except OSError as error:  # too long, or in a folder that may not be entered
            raise StudyFileError(f"{name_or_path!r} is no path of a study file ({error}); name another.") from error
        if not found:
            raise StudyFileError(f"There is no study file {name_or_path}; copy one from {FOLDER} and edit it.")
        return path
    if name_or_path not in built_in():
        ours = (study.name for study in map(load, built_in()) if isinstance(study, offered))
        names = dict.fromkeys(ours)  # the demo's is called finetune as well
        raise StudyFileError(
            f"There is no study {name_or_path!r}; choose {' or '.join(names)}, or give the path of a .toml file."
        )
    return FOLDER / f"{name_or_path}.toml"


def _read_finetune(document: dict[str, Any], default_name: str, kind: Literal["finetune", "distill"]) -> FinetuneStudy:
    _check_keys(
        "the file",
        document,
        ("name", "objective", "sampler", "pruner", "space", "fixed", "first"),
    )
    sampler = _table(document, "sampler", ("multivariate", "startup_trials"))
    pruner = _table(document, "pruner", ("startup_trials", "warmup_epochs"))
    first = document.get("first", [])
    if not isinstance(first, list) or not all(isinstance(parameters, dict) for parameters in first):
        raise StudyFileError(f"first={_shown(first)}; write one [[first]] table per parameter set")
    space, fixed = _table(document, "space"), _table(document, "fixed")
    if kind == "distill":
        space, fixed = _by_stage("space", space), _by_stage("fixed", fixed)
        first = [_by_stage("first", parameters) for parameters in first]
    return FinetuneStudy(
        name=document.get("name", default_name),
        kind=kind,
        objective=document.get("objective", OBJECTIVES[0]),
        space=MappingProxyType({key: _read_parameter(key, value) for key, value in space.items()}),
        fixed=MappingProxyType({key: _without_lists(value, kind) for key, value in fixed.items()}),
        first=tuple(MappingProxyType(parameters) for parameters in first),
        **sampler,
        **{f"pruner_{key}": value for key, value in pruner.items()},
    )


def _by_stage(where: str, table: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of tables such as [space.intermediate], named `stage.setting`."""
    _check_keys(f"[{where}]", table, STAGES)
    for stage, settings in table.items():
        if not isinstance(settings, dict):
            raise StudyFileError(f"{stage}={_shown(settings)}; write it as a table, [{where}.{stage}]")
    return {f"{stage}.{key}": value for stage, settings in table.items() for key, value in settings.items()}


def _read_lengths(document: dict[str, Any], default_name: str) -> LengthsStudy:
    known = ("name", "cost", "latency", "retention", "depth", "sampler", "early_stopping")
    _check_keys("the file", document, known, needed=("retention",))
    retention = _read_parameter("retention", _table(document, "retention"))
    if not isinstance(retention, Range):
        raise StudyFileError("[retention] lists choices; write low, high and step")
    layers = _table(document, "depth", ("layers",)).get("layers", [])
    sampler = _table(document, "sampler")
    name = sampler.pop("name", LengthsStudy.sampler)
    _check_sampler(name)
    _check_keys(f"[sampler] {name}", sampler, SAMPLERS[name])
    return LengthsStudy(
        name=document.get("name", default_name),
        retention=retention.in_floats(),
        skippable=tuple(layers) if isinstance(layers, list) else layers,
        cost=document.get("cost", "macs"),
        **{f"latency_{key}": value for key, value in _table(document, "latency", ("batch_size", "precision")).items()},
        sampler=name,
        **sampler,
        **_table(document, "early_stopping", ("blocks", "confidence")),
    )


def _read_parameter(name: str, value: Any) -> Range | Choices:
    if not isinstance(value, dict):
        raise StudyFileError(
            f"{name}={_shown(value)} needs low and high, or choices; a single value belongs in [fixed]"
        )
    try:
        if "choices" in value:
            _check_keys("a parameter with choices", value, ("choices",))
            choices = value["choices"]
            return Choices(choices=tuple(choices) if isinstance(choices, list) else choices)
        _check_keys("a range", value, ("low", "high", "log", "step"), needed=("low", "high"))
        return Range(**value)
    except StudyFileError as error:
        raise StudyFileError(f"{name}: {error}") from error


def _table(document: Mapping[str, Any], key: str, known: Sequence[str] | None = None) -> dict[str, Any]:
    table = document.get(key, {})
    if not isinstance(table, dict):
        raise StudyFileError(f"{key}={_shown(table)}; write it as a table, [{key}]")
    if known is not None:
        _check_keys(f"[{key}]", table, known)
    return table


def _check_keys(where: str, table: Mapping[str, Any], known: Sequence[str], needed: Sequence[str] = ()) -> None:
    if unknown := sorted(table.keys() - set(known)):
        raise StudyFileError(f"{where} has no setting {', '.join(unknown)}; it takes {', '.join(known)}")
    if missing := [key for key in needed if key not in table]:
        raise StudyFileError(f"{where} lacks {' and '.join(missing)}")


def _is_number(value: object) -> TypeGuard[int | float]:
    """Whether a float may hold it."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _leads_to(low: float, high: float, step: float) -> bool:
    """Whether whole steps lead from one number to the other, in decimals: Optuna, which counts so, moves other ends."""
    try:
        return not (Decimal(str(high)) - Decimal(str(low))) % Decimal(str(step))
    except InvalidOperation:  # more steps than it can count
        return False


def _is_value(value: object) -> TypeGuard[Value]:
    return isinstance(value, str | bool) or _is_number(value)


def _without_lists(value: Any, kind: str) -> Any:
    return tuple(value) if kind == "distill" and isinstance(value, list) else value


def _is_layer_list(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(item, int) and not isinstance(item, bool) for item in value)


def _check_number(name: str, value: object) -> None:
    if not _is_number(value):
        raise StudyFileError(f"{name}={value!r} is not a finite number")


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise StudyFileError(f"{name}={value!r}; write true or false")


def _shown(value: object) -> str:
    return repr(list(value) if isinstance(value, tuple) else value)


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not NAME_PATTERN.fullmatch(name):
        raise StudyFileError(
            f"name={name!r}; use letters, digits, '.', '_' and '-', at most 64, starting with a letter or digit"
        )


def _check_sampler(name: object) -> None:
    if not isinstance(name, str) or name not in SAMPLERS:
        raise StudyFileError(f"[sampler] name={name!r}; choose one of {', '.join(SAMPLERS)}")


def _check_count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise StudyFileError(f"{name}={value!r}; choose a whole number from {least} up")


def _fingerprint(parts: Mapping[str, object]) -> str:
    def plain(part: object) -> object:
        if isinstance(part, Mapping):
            return {key: plain(value) for key, value in part.items()}
        return dataclasses.asdict(part) if isinstance(part, Range | Choices) else part

    return hashlib.sha256(json.dumps(plain(parts), sort_keys=True).encode()).hexdigest()
