"""The words of the evaluation's YAML sections: generation, judge, report.

Imported by the command line, so it loads nothing heavier than pydantic.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator


class Section(BaseModel):
    """A closed, frozen part of the configuration: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Endpoint(Section):
    """An OpenAI-compatible endpoint: OpenAI, Ollama, a vLLM server; and how hard it may be asked."""

    base_url: str = Field(min_length=1, description="Base URL of the endpoint, such as http://localhost:11434/v1.")
    api_key_env: str | None = Field(
        "OPENAI_API_KEY", description="Environment variable that holds the key; null: none."
    )
    concurrency: int = Field(32, ge=1, description="Requests in flight at a time.")
    requests_per_minute: int | None = Field(None, ge=1, description="Most requests in a minute; null: no limit.")
    tokens_per_minute: int | None = Field(
        None, ge=1, description="Most tokens in a minute, prompt and reply; null: no limit."
    )
    timeout_s: float = Field(120.0, gt=0, description="Longest wait for one reply, in seconds.")
    max_retries: int = Field(5, ge=0, description="Retries of a request that the endpoint refused for the time being.")

    @field_validator("base_url")
    @classmethod
    def _address_without_secrets(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must start with http:// or https:// and name a host")
        if parts.username or parts.password or parts.query:
            raise ValueError("must not hold a user, a password or a query, as it is written into every record; give "
                             "the key by api_key_env")  # fmt: skip
        return url


class ModelSource(Section):
    """A model that answers the test set on our own engines; a bare path or hub id stands for one with defaults."""

    type: Literal["vllm"] = "vllm"
    path: str = Field(min_length=1, description="Local Hugging Face folder, or hub id.")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    adapter: str | None = Field(None, description="Local folder of a LoRA adapter, served on top without merging.")
    prompt: Literal["trained", "chat"] = Field(
        "trained", description="The prompt's tokens as trained on, or the messages in the model's own chat template."
    )
    spelled: dict[int, tuple[int, ...]] = Field(
        default_factory=dict,
        description="Ids of prompt tokens that this model does not have, each with the ids that it reads in its place.",
    )

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: object) -> object:
        return {"path": value} if isinstance(value, str) else value


class ApiModel(Endpoint):
    """A model that answers the test set at an OpenAI-compatible endpoint."""

    type: Literal["api"]
    model: str = Field(min_length=1, description="The model's name at the endpoint.")
    prompt: Literal["chat", "trained"] = Field(
        "chat",
        description="The messages to /chat/completions, or the prompt's text as trained on to /completions.",
    )
    send_sampling: bool = Field(
        True, description="False leaves temperature, top_p and seed to the endpoint, as some reasoning models want."
    )


def _kind_of_model(value: object) -> str:
    found: Any = value.get("type", "vllm") if isinstance(value, dict) else getattr(value, "type", "vllm")
    return str(found)


AnsweringModel = Annotated[
    Annotated[ModelSource, Tag("vllm")] | Annotated[ApiModel, Tag("api")],
    Discriminator(
        _kind_of_model,
        custom_error_type="kind_of_model",
        custom_error_message="a model is a path or hub id, or a mapping with path, or one with type: api",
    ),
]


class HarnessConfig(Section):
    """EleutherAI's lm-evaluation-harness after the answers; a bare list of tasks stands for one with defaults."""

    tasks: list[str] = Field(min_length=1, description="Tasks and groups, by the harness's names.")
    models: list[str] = Field(["base", "tuned"], min_length=1, description="The models that are measured.")
    include_path: str | None = Field(
        None,
        min_length=1,
        description="Folder of tasks of your own; their code is run, and their data files are looked up from there.",
    )
    num_fewshot: int | None = Field(None, ge=0, description="Examples before each question; null: the task's own.")
    limit: int | None = Field(None, ge=1, description="Documents of each task; null: all.")
    apply_chat_template: bool = Field(False, description="Put each prompt into the model's own chat template.")

    @model_validator(mode="before")
    @classmethod
    def _tasks_alone(cls, value: object) -> object:
        return {"tasks": value} if isinstance(value, list) else value


class GenerationConfig(Section):
    """How the models answer the test set: vLLM engines and sampling."""

    models: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,60}$")], AnsweringModel] = Field(
        default_factory=dict,
        description="Further models to answer beside base and tuned, by name: a path or hub id, or an endpoint's.",
    )
    engines: int = Field(1, ge=1, description="vLLM engines that share the prompts.")
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs of one engine.")
    cpus_per_engine: int = Field(1, ge=1, description="CPUs and threads of one engine where there are no GPUs.")
    max_model_len: int | None = Field(
        None, ge=16, description="Longest prompt plus response, in tokens; null is the model's own limit."
    )
    max_tokens: int = Field(256, ge=1, description="Longest response, in tokens.")
    num_samples: int = Field(1, ge=1, description="Responses to each prompt; more than one needs a temperature.")
    temperature: float = Field(0.0, ge=0, le=2, description="0 is greedy decoding.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling.")
    seed: int = Field(0, ge=0, description="Seed of the sampling; each prompt and sample has its own from it.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Number format of the weights."
    )
    gpu_memory_share: float = Field(0.9, gt=0, lt=1, description="Share of a GPU's memory for one engine.")
    cpu_cache_gib: float = Field(1.0, gt=0, description="Key-value cache of one engine on a CPU, in GiB.")
    lm_eval: HarnessConfig | None = Field(
        None, description="Benchmarks of the lm-evaluation-harness, by vLLM; needs the extra lm-eval."
    )

    @field_validator("models")
    @classmethod
    def _names_of_their_own(cls, models: dict[str, AnsweringModel]) -> dict[str, AnsweringModel]:
        if taken := sorted(models.keys() & {"base", "tuned"}):
            raise ValueError(f"{' and '.join(taken)} is a model of the run itself; take another name")
        return models

    @model_validator(mode="after")
    def _measured_models_have_weights(self) -> Self:
        known = {"base", "tuned", *(name for name, model in self.models.items() if isinstance(model, ModelSource))}
        for name in [] if self.lm_eval is None else self.lm_eval.models:
            if name not in known:
                raise ValueError(f"lm_eval.models: {name} is not one of {', '.join(sorted(known))}")
        return self

    @model_validator(mode="after")
    def _samples_differ(self) -> Self:
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(f"num_samples ({self.num_samples}) greedy responses would be equal; give a temperature")
        return self


class JudgeSection(Section):
    """What every judge is told."""

    min_scored: float = Field(
        0.99, ge=0, le=1, description="Share of the rows asked that must end scored; below it the stage fails."
    )


class ReferenceJudge(JudgeSection):
    """Deterministic comparison with the reference answer; not a language model."""

    type: Literal["reference"] = "reference"


class LabelJudge(JudgeSection):
    """Classification: 100 where the response is the reference's label, else 0; not a language model."""

    type: Literal["label"]
    labels: list[str] | None = Field(
        None, min_length=2, description="The legal labels; null takes the different references of the test set."
    )


class ScoreProtocol(Section):
    """One score from 0 to 100 against the reference."""

    type: Literal["score"] = "score"


class RubricProtocol(Section):
    """One score from 0 to 100 for each named criterion; their mean is the row's score."""

    type: Literal["rubric"]
    criteria: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,40}$")], str] = Field(
        min_length=1, description="What is asked of a response, by name."
    )


class PairwiseProtocol(Section):
    """Each response against the baseline's, in both orders; 100 is a win, 50 a tie or a flip, 0 a loss."""

    type: Literal["pairwise"]
    baseline: str = Field("base", description="The model that the others are compared with.")


JudgeProtocol = Annotated[ScoreProtocol | RubricProtocol | PairwiseProtocol, Field(discriminator="type")]


class LanguageModelJudge(JudgeSection):
    """What every judge that is a language model is told."""

    model: str = Field(min_length=1, description="Judge model: hub id, local folder, or its name at the endpoint.")
    protocol: JudgeProtocol = Field(ScoreProtocol(), description="What the judge is asked about a response.")
    repeats: int = Field(1, ge=1, description="Verdicts asked per response; they are averaged.")
    attempts: int = Field(3, ge=1, description="Times that a verdict is asked for before it counts as failed.")
    max_answer_tokens: int = Field(
        2048, ge=16, description="Longest response, prompt or reference that is shown to the judge, in tokens."
    )
    max_calls: int | None = Field(None, ge=1, description="Most calls of one run of the stage, which then ends early.")
    self_test: bool = Field(True, description="Refuse a judge that cannot put five known responses in order.")
    canary_limit: float = Field(
        30.0,
        ge=0,
        le=100,
        description="Score above which an empty or forged response shows a judge that can be fooled.",
    )


class VllmJudge(LanguageModelJudge):
    """A local judge model, run in batch by vLLM with structured output."""

    type: Literal["vllm"]
    revision: str | None = Field(None, description="Branch, tag or commit of the judge model on the hub.")
    temperature: float = Field(0.0, ge=0, le=2, description="0 is greedy decoding.")
    engines: int = Field(1, ge=1, description="vLLM engines that share the verdicts.")
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs of one engine.")
    cpus_per_engine: int = Field(1, ge=1, description="CPUs and threads of one engine where there are no GPUs.")
    max_model_len: int | None = Field(
        None, ge=16, description="Longest prompt plus verdict, in tokens; null is the model's own limit."
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Number format of the weights."
    )
    gpu_memory_share: float = Field(0.9, gt=0, lt=1, description="Share of a GPU's memory for one engine.")
    cpu_cache_gib: float = Field(1.0, gt=0, description="Key-value cache of one engine on a CPU, in GiB.")

    expectation: bool = Field(
        False, description="Score by the mean of the grades 0..9 over the judge's probabilities, scaled to 0..100."
    )

    @model_validator(mode="after")
    def _expectation_is_one_greedy_score(self) -> Self:
        if self.expectation and (self.temperature > 0 or self.protocol.type != "score"):
            raise ValueError("expectation needs temperature 0 and the score protocol")
        return self

    @model_validator(mode="after")
    def _repeats_differ(self) -> Self:
        if self.repeats > 1 and self.temperature == 0:
            raise ValueError(f"repeats ({self.repeats}) greedy verdicts would be equal; give a temperature")
        return self


class ApiJudge(LanguageModelJudge, Endpoint):
    """A judge model at an OpenAI-compatible endpoint."""

    type: Literal["api"]
    temperature: float | None = Field(
        0.0, ge=0, le=2, description="0 is greedy decoding; null sends none, as some reasoning models want."
    )
    structured_output: bool = Field(
        True, description="Ask for JSON by schema; false reads the verdict at the end of free text."
    )
    max_tokens: int = Field(512, ge=8, description="Longest reply of the judge, its reasoning included, in tokens.")
    prompt_price: float | None = Field(None, ge=0, description="Price of a million prompt tokens, in your currency.")
    reply_price: float | None = Field(None, ge=0, description="Price of a million reply tokens, in your currency.")
    max_cost: float | None = Field(None, gt=0, description="Most that one run of the stage may cost, in your currency.")

    @model_validator(mode="after")
    def _cost_needs_prices(self) -> Self:
        if self.max_cost is not None and (self.prompt_price is None or self.reply_price is None):
            raise ValueError("max_cost needs prompt_price and reply_price")
        return self


class JuryJudge(JudgeSection):
    """Several judges; a response's score is the mean of theirs."""

    type: Literal["jury"]
    judges: list[Annotated[VllmJudge | ApiJudge, Field(discriminator="type")]] = Field(
        min_length=2, description="The members of the jury."
    )


JudgeConfig = Annotated[ReferenceJudge | LabelJudge | VllmJudge | ApiJudge | JuryJudge, Field(discriminator="type")]


def key_variables(generation: GenerationConfig, judge: JudgeConfig) -> Iterator[tuple[str, str]]:
    """Give each environment variable that must hold a key, with the configuration's word for it."""
    members = judge.judges if isinstance(judge, JuryJudge) else [judge]
    endpoints = [
        *((f"generation.models.{name}", model) for name, model in generation.models.items()),
        *(("judge", member) for member in members),
    ]
    for where, endpoint in endpoints:
        if isinstance(endpoint, Endpoint) and endpoint.api_key_env is not None:
            yield f"{where}.api_key_env", endpoint.api_key_env


class ReportConfig(Section):
    """The report's statistics and samples."""

    confidence: float = Field(0.95, gt=0.5, lt=1, description="Coverage of the intervals.")
    bootstrap_samples: int = Field(10_000, ge=100, description="Resamples of the bootstrap.")
    num_samples: int = Field(20, ge=1, description="Examples shown of each kind: best, worst, most changed.")
    pass_score: float = Field(50, ge=0, le=100, description="Score below which report.junit.xml calls a row failed.")
