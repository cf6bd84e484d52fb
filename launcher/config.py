"""The whole configuration of a run, and its loading: every mistake at once, each with file, line, key and way out."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from evaluation.config import GenerationConfig, JudgeConfig, ReferenceJudge, ReportConfig
from launcher.errors import ConfigError
from launcher.submit.config import SlurmConfig, StagesConfig
from trainer.config import (
    DataConfig,
    DeepSpeedConfig,
    ExportConfig,
    FullTuning,
    ModelConfig,
    Section,
    TrainerConfig,
    TrainingConfig,
    TuningConfig,
    refuse_misfits,
)

Location = tuple[str | int, ...]

# A run's name becomes a folder's name and, in Ray, a path: no separator, no leading dot.
RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


Address = Annotated[str, Field(pattern=r"^(local|auto|[A-Za-z0-9._-]+:\d{1,5}|\[[0-9A-Fa-f:]+\]:\d{1,5})$")]


# What fsspec opens. Keys of a store come from its own environment variables or files, never from here.
StorageUrl = Annotated[str, Field(pattern=r"^[a-z][a-z0-9+.-]*://[^\s@?#]+$")]


class RunSection(Section):
    """The run's name, and where it is kept."""

    name: RunName = Field(description="Name of the run: letters, digits, '.', '_' and '-', at most 100.")
    storage: StorageUrl | Path = Field(
        Path("runs"),
        description="Folder that holds the run's own folder, storage/name; or a URL (s3://, gs://, file://, ...) where "
        "a copy of the run is kept that another machine can go on from.",
    )
    work: Path = Field(
        Path("runs"), description="Where storage is a URL: folder that holds the run's own folder while it works."
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of the split, shuffles, initial weights and dropout.")

    @field_validator("storage", mode="before")
    @classmethod
    def _url_without_secrets(cls, value: object) -> object:
        if isinstance(value, str) and "://" in value and any(mark in value for mark in "@?#"):
            raise ValueError(
                "a URL of storage may hold no '@', '?' or '#': keys belong into the store's own environment variables "
                "or files"
            )
        return value

    @property
    def url(self) -> str | None:
        """Where the copy of the run is kept; None where storage is a folder."""
        return f"{self.storage.rstrip('/')}/{self.name}" if isinstance(self.storage, str) else None

    @property
    def directory(self) -> Path:
        """The run's own folder."""
        return (self.work if isinstance(self.storage, str) else self.storage) / self.name

    def inside(self, folder: Path, name: str) -> RunSection:
        """The same for a member of a sweep whose folder this names."""
        kept = {"work": folder, "storage": self.url} if self.url else {"storage": folder}
        return self.model_copy(update=kept | {"name": name})


class ClusterConfig(Section):
    """Where the workers and engines run."""

    address: Address = Field(
        "local",
        description="local starts Ray here and stops it at the end; host:port joins a cluster that exists; auto joins "
        "the one that RAY_ADDRESS or this machine names.",
    )

    @field_validator("address", mode="before")
    @classmethod
    def _not_from_afar(cls, value: object) -> object:
        if isinstance(value, str) and value.startswith("ray://"):
            raise ValueError(
                "ray:// would leave the launcher on a machine that the workers' files and signals do not reach: use "
                "launcher submit ray --address http://HEAD:8265, or host:port on a node of the cluster"
            )
        return value

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes GPUs where this machine has them.")
    wait_s: float = Field(
        600, ge=0, description="Longest wait for the nodes and resources of a cluster that was joined, in seconds."
    )
    num_nodes: int | None = Field(
        None, ge=1, description="Nodes that must have joined before anything starts; null: as the resources need."
    )
    gpu_memory_gib: float | None = Field(
        None,
        gt=0,
        description="Memory of one GPU, in GiB, so that what cannot fit is refused; null asks the driver here.",
    )
    slurm: SlurmConfig | None = Field(None, description="What launcher submit slurm asks for.")
    stages: StagesConfig = Field(StagesConfig(), description="What single stages ask for, under --split-stages.")


class RunConfig(Section):
    """Everything that one run is asked to do. Frozen: what is found while running never comes back here."""

    run: RunSection
    model: ModelConfig
    data: DataConfig
    tuning: TuningConfig = FullTuning()
    training: TrainingConfig = TrainingConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    export: ExportConfig = ExportConfig()
    generation: GenerationConfig = GenerationConfig()
    judge: JudgeConfig = ReferenceJudge()
    report: ReportConfig = ReportConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        refuse_misfits(self)
        return self

    @property
    def trainer(self) -> TrainerConfig:
        """The sections that the trainer understands."""
        return TrainerConfig(
            seed=self.run.seed,
            model=self.model,
            data=self.data,
            tuning=self.tuning,
            training=self.training,
            deepspeed=self.deepspeed,
            export=self.export,
        )


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, lay `key.sub=value` overrides over it, and check all of it.

    Args:
        path: the YAML file.
        overrides: texts such as `training.lr=1e-4`; the value is read as YAML.

    Returns:
        The checked configuration.

    Raises:
        ConfigError: with one line for every mistake found.
    """
    tree, lines = read_yaml(path)
    overridden = set[Location]()
    for text in overrides:
        location, value = _parse_override(text)
        _put(tree, location, value, text)
        overridden.add(location)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        problems = [_explain(detail, path, lines, overridden) for detail in error.errors()]
        count = f"{len(problems)} mistake{'s' if len(problems) > 1 else ''}"
        raise ConfigError(f"{path}: {count}, nothing was started\n" + "\n".join(f"  {p}" for p in problems)) from None


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[Location, int]]:
    """Read a YAML mapping safely, with the line of every key.

    Args:
        path: the YAML file.

    Returns:
        The mapping, and for each key's location its line, counted from 1.

    Raises:
        ConfigError: if the file is missing, is not YAML, is not a mapping, or holds a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file{_nearest_file(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a mapping of sections (run, model, data, ...), it is {_kind(tree)}")
    lines = dict[Location, int]()
    repeated = list[str]()
    for location, line in _walk_keys(node, ()):
        if location in lines:
            repeated.append(f"  line {line}: {_dotted(location)} stands twice (first in line {lines[location]})")
        lines[location] = line
    if repeated:
        raise ConfigError(f"{path}: a key may stand once\n" + "\n".join(repeated))
    return tree, lines


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML, every default written out; it loads back to an equal RunConfig."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _walk_keys(node: yaml.Node | None, location: Location) -> Iterator[tuple[Location, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*location, key.value)
            yield here, key.start_mark.line + 1
            yield from _walk_keys(value, here)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            here = (*location, number)
            yield here, value.start_mark.line + 1
            yield from _walk_keys(value, here)


def _parse_override(text: str) -> tuple[Location, Any]:
    key, separator, value = text.partition("=")
    if not separator or not all(part.strip() for part in key.split(".")):
        raise ConfigError(f"--set {text}: must look like section.key=value, for example --set training.lr=1e-4")
    try:
        return tuple(part.strip() for part in key.split(".")), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text}: the value is not valid YAML: {error}") from None


def _put(tree: dict[str, Any], location: Location, value: object, text: str) -> None:
    inner: Any = tree
    for number, part in enumerate(location[:-1]):
        if inner.get(part) is None:
            inner[part] = {}
        inner = inner[part]
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {text}: {_dotted(location[: number + 1])} is {_kind(inner)}, not a section")
    inner[location[-1]] = value


def _explain(detail: ErrorDetails, path: Path, lines: dict[Location, int], overridden: set[Location]) -> str:
    written = {key[:end] for key in (*lines, *overridden) for end in range(1, len(key) + 1)}
    location = _without_tags(detail["loc"], written, last_is_key=detail["type"] == "extra_forbidden")
    where = _where(location, path, lines, overridden)
    if detail["type"] == "extra_forbidden":
        return f"{where}: unknown key {_dotted(location)}{_nearest_key(location)}"
    if detail["type"] == "missing":
        return f"{where}: {_dotted(location)} is missing{_meaning(location)}"
    message = detail["msg"].removeprefix("Value error, ")
    if not location:  # sections that do not fit together; the message begins with one's key
        return f"{_where(tuple(message.split()[0].split('.')), path, lines, overridden)}: {message}"
    if detail["type"] in ("union_tag_not_found", "union_tag_invalid"):
        key = detail["ctx"]["discriminator"]  # a quoted key, or a function that looks at `type`
        kind = (*location, key.strip("'") if key.startswith("'") else "type")
        where = where if detail["type"] == "union_tag_not_found" else _where(kind, path, lines, overridden)
        return f"{where}: {_unknown_kind(kind, detail)}"
    if detail["type"] == "value_error":
        return f"{where}: {_dotted(location)}: {message}"
    message = message[:1].lower() + message[1:]
    given = repr(detail["input"])
    given = given if len(given) <= 60 else given[:57] + "..."
    if detail["type"] in ("tuple_type", "list_type"):
        message = "must be a list, such as [a, b]"
    return f"{where}: {_dotted(location)} = {given}: {message}{_meaning(location)}"


def _unknown_kind(location: Location, detail: ErrorDetails) -> str:
    """Which kinds of a section there are (full, lora, ...), where another or none was asked for."""
    if detail["type"] == "union_tag_not_found":
        return f"{_dotted(location)} is missing: it says what the other keys of {_dotted(location[:-1])} are for"
    asked, known = str(detail["ctx"]["tag"]), detail["ctx"]["expected_tags"].replace("'", "")
    nearest = difflib.get_close_matches(asked.lower(), known.split(", "), 1)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    return f"{_dotted(location)} = {asked!r}: is none of {known}{hint}"


def _where(location: Location, path: Path, lines: dict[Location, int], overridden: set[Location]) -> str:
    for end in range(len(location), 0, -1):
        if location[:end] in overridden:
            return "--set"
        if location[:end] in lines:
            return f"{path}:{lines[location[:end]]}"
    return "--set" if any(key[: len(location)] == location for key in overridden) else str(path)


def _without_tags(location: Location, written: Collection[Location], *, last_is_key: bool) -> Location:
    """Keep only what stands in the YAML: pydantic puts a union's tag in the location (judge, vllm, model)."""
    kept: list[str | int] = []
    models: list[type[BaseModel]] = [RunConfig]
    for number, part in enumerate(location):
        is_field = any(part in model.model_fields for model in models)
        is_written = (*kept, part) in written
        if isinstance(part, int) or is_field or is_written or (last_is_key and number == len(location) - 1):
            kept.append(part)
            models = _models_at((*kept,))
    return tuple(kept)


def _models_at(location: Location) -> list[type[BaseModel]]:
    """The models that may stand at a location of the configuration (several, for a union)."""
    models: list[type[BaseModel]] = [RunConfig]
    for part in location:
        # What is no field is a name of the user's own, such as a further model's: the models stand behind it.
        if any(part in model.model_fields for model in models):
            models = [m for model in models if part in model.model_fields for m in _models_in(model, str(part))]
    return models


def _models_in(model: type[BaseModel], key: str) -> list[type[BaseModel]]:
    found: list[type[BaseModel]] = []
    waiting: list[Any] = [model.model_fields[key].annotation]
    while waiting:
        annotation = waiting.pop()
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found.append(annotation)
        waiting.extend(getattr(annotation, "__args__", ()))
    return found


def _nearest_key(location: Location) -> str:
    models = _models_at(location[:-1])
    if elsewhere := [tag for model in models if location[-1] in model.model_fields for tag in _tags(model)]:
        return f" here: it goes with {_dotted(location[:-1])} of {', '.join(elsewhere)}"
    legal = sorted({name for model in models for name in model.model_fields})
    near = difflib.get_close_matches(str(location[-1]), legal, n=1, cutoff=0.6)
    words = str(location[-1]).replace("_", " ").lower()
    near += [
        name
        for model in models
        for name, field in model.model_fields.items()
        if words in (field.description or "").lower()
    ]
    if near:
        return f"; did you mean {_dotted((*location[:-1], near[0]))}?"
    return f"; legal here: {', '.join(legal)}" if legal else ""


def _tags(model: type[BaseModel]) -> list[str]:
    """How the YAML chooses this member of a union, for example `type: api`."""
    fields = [(name, model.model_fields[name]) for name in ("type", "method") if name in model.model_fields]
    return [f"{name}: {value}" for name, field in fields for value in getattr(field.annotation, "__args__", ())]


def _meaning(location: Location) -> str:
    for model in _models_at(location[:-1]):
        field = model.model_fields.get(str(location[-1]))
        if field is not None and field.description:
            return f" ({field.description})"
    return ""


def _nearest_file(path: Path) -> str:
    beside = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.5)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _dotted(location: Location) -> str:
    return ".".join(str(part) for part in location)


def _kind(value: object) -> str:
    return "empty" if value is None else f"a {type(value).__name__}"
