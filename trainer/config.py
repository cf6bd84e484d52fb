"""The words of the trainer's YAML sections: model, data, tuning, training, deepspeed, export.

Imported by the command line, so it loads nothing heavier than pydantic.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from trainer.data.names import is_hub_id
from trainer.errors import TrainerError


class Section(BaseModel):
    """A closed, frozen part of the configuration: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


# --- model ----------------------------------------------------------------------------------------


class FromScratch(Section):
    """A small Llama built from these sizes, with random weights and a byte-level BPE of the train split."""

    vocab_size: int = Field(512, ge=300, le=65_536, description="BPE vocabulary, special tokens included.")
    hidden_size: int = Field(192, ge=8, description="Width of the residual stream.")
    intermediate_size: int = Field(512, ge=8, description="Width of the gated MLP.")
    num_layers: int = Field(4, ge=1, description="Transformer layers.")
    num_heads: int = Field(6, ge=1, description="Query heads; divides hidden_size.")
    num_kv_heads: int = Field(6, ge=1, description="Key and value heads; divides num_heads.")
    max_position_embeddings: int = Field(1024, ge=16, description="Longest sequence, in tokens.")

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must divide hidden_size ({self.hidden_size})")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads ({self.num_kv_heads}) must divide num_heads ({self.num_heads})")
        return self


class ModelConfig(Section):
    """Which base model is tuned: one that exists, or a small one from scratch."""

    name_or_path: str | None = Field(None, min_length=1, description="Hub id, or a local Hugging Face folder.")
    revision: str | None = Field(
        None, description="Branch, tag or commit on the hub; resolved to a commit and recorded."
    )
    from_scratch: FromScratch | None = Field(None, description="Build a small random model instead of loading one.")
    adapter: str | None = Field(
        None,
        min_length=1,
        description="Local folder of a PEFT LoRA adapter that belongs to the base: lora and qlora continue it, full "
        "and freeze merge it into the weights first.",
    )
    new_tokens: tuple[Annotated[str, Field(min_length=1, max_length=256)], ...] = Field(
        (), max_length=10_000, description="Tokens added to the tokenizer, each with a trained row in the embedding."
    )
    attention: Literal["auto", "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"] = Field(
        "auto", description="Attention backend; auto takes the fastest that keeps packed sequences apart here."
    )

    @model_validator(mode="after")
    def _one_base(self) -> Self:
        if (self.name_or_path is None) == (self.from_scratch is None):
            raise ValueError("give exactly one of name_or_path and from_scratch")
        return self

    @model_validator(mode="after")
    def _tokens_and_adapter(self) -> Self:
        twice = sorted({token for token in self.new_tokens if self.new_tokens.count(token) > 1})
        if twice:
            raise ValueError(f"new_tokens names {twice[0]!r} twice: name each token once")
        if blank := [token for token in self.new_tokens if not token.strip()]:
            raise ValueError(f"new_tokens has {blank[0]!r}, which is white space alone: a token needs a character")
        if self.adapter is not None and self.from_scratch is not None:
            raise ValueError("adapter belongs to a base that exists: give name_or_path, or leave adapter out")
        if self.adapter is not None and self.new_tokens:
            raise ValueError(
                "adapter and new_tokens don't go together, as the adapter's base has no rows for the new tokens: merge "
                "the adapter into its base first (PEFT's merge_and_unload, then save_pretrained), give that folder as "
                "name_or_path, and leave adapter out"
            )
        return self


# --- data -----------------------------------------------------------------------------------------


class Shares(Section):
    """Shares of the rows, cut after one seeded shuffle; they add up to 1."""

    type: str
    train: float = Field(0.85, gt=0, lt=1, description="Share of rows trained on.")
    validation: float = Field(0.05, gt=0, lt=1, description="Share of rows whose loss is watched.")
    test: float = Field(0.10, gt=0, lt=1, description="Share of rows that the models answer and the judge scores.")
    stratify: bool = Field(False, description="Cut every category in these shares, not only the whole.")

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        total = self.train + self.validation + self.test
        if abs(total - 1) > 1e-9:
            raise ValueError(f"train + validation + test must be 1, they are {total:g}")
        return self


class AutoSplit(Shares):
    """The splits that a source holds, in files or folders of such names or on the hub; what it lacks is cut by shares.

    A source that holds no splits is cut by the three shares, and one without a test split has its test rows cut from
    its train rows.
    """

    type: Literal["auto"] = "auto"


class RatioSplit(Shares):
    """Shares of the rows, cut after one seeded shuffle, from sources that hold no splits of their own."""

    type: Literal["ratios"] = "ratios"


class FileSplit(Section):
    """Validation and test rows come from files of their own; all rows of the sources are trained on."""

    type: Literal["files"]
    validation: Path = Field(description="File of validation rows, in the form of the first source.")
    test: Path = Field(description="File of test rows, in the form of the first source.")


class ColumnSplit(Section):
    """A column of each row says which split it belongs to."""

    type: Literal["column"]
    column: str = Field("split", min_length=1, description="Name of the column.")
    train: str = Field("train", description="The column's value in rows trained on.")
    validation: str = Field("validation", description="The column's value in rows whose loss is watched.")
    test: str = Field("test", description="The column's value in rows that are answered and scored.")


def _split_type(value: Any) -> str:  # noqa: ANN401 - pydantic gives whatever stands in the YAML
    """The union's tag: a split without a type is given by ratios."""
    return str(value.get("type", "ratios") if isinstance(value, dict) else getattr(value, "type", "ratios"))


SplitConfig = Annotated[
    Annotated[AutoSplit, Tag("auto")]
    | Annotated[RatioSplit, Tag("ratios")]
    | Annotated[FileSplit, Tag("files")]
    | Annotated[ColumnSplit, Tag("column")],
    Discriminator(_split_type),
]

RowFormat = Literal["auto", "alpaca", "messages", "sharegpt", "prompt_completion", "columns"]


class Columns(Section):
    """Names of the columns that hold a row's parts, for files in no known form."""

    prompt: str = Field(min_length=1, description="Column of the question.")
    response: str = Field(min_length=1, description="Column of the answer that is learned.")
    input: str | None = Field(None, min_length=1, description="Column of text that goes with the question.")
    system: str | None = Field(None, min_length=1, description="Column of the system message.")
    category: str | None = Field(None, min_length=1, description="Column of the category in the report.")
    id: str | None = Field(None, min_length=1, description="Column of the row's id.")


class SourceConfig(Section):
    """One place that rows come from, and how many of them are taken."""

    path: str = Field(
        min_length=1,
        description="JSON, JSONL, Parquet, Arrow or CSV file (also .gz, .bz2, .xz, .zst, .lz4), a folder of them, a "
        "folder written by datasets' save_to_disk, or a data set's hub id.",
    )
    format: RowFormat = Field("auto", description="Form of the rows; auto decides from the first hundred.")
    columns: Columns | None = Field(None, description="Names of the columns, for format columns.")
    subset: str | None = Field(None, description="Configuration of a data set on the hub.")
    hub_split: str | None = Field(
        None,
        min_length=1,
        description="Split that is read of a folder, a saved DatasetDict or a data set on the hub; several are joined "
        "by +, all takes all. Null: all, each as the split that its name says, which data.split: {type: auto} needs.",
    )
    revision: str | None = Field(
        None, description="Branch, tag or commit on the hub; resolved to a commit and recorded."
    )
    num_rows: int | None = Field(None, ge=1, description="Rows taken, a seeded choice; null takes all.")
    weight: float = Field(
        1.0, gt=0, le=100, description="How often each train row is seen in an epoch; 0.5 takes a seeded half of them."
    )
    category: str | None = Field(None, description="Category of rows that have none of their own.")

    @model_validator(mode="after")
    def _columns_belong(self) -> Self:
        if (self.format == "columns") != (self.columns is not None):
            raise ValueError("columns and format: columns go together")
        return self


LeftOut = Literal["refuse", "warn"]


class ThinkingConfig(Section):
    """What is learned of an assistant's thoughts. What the generation prompt supplies of one is never learned."""

    train: bool = Field(True, description="Whether thoughts are targets; false leaves them as context of the answer.")
    empty: Literal["keep", "drop", "fail"] = Field(
        "drop",
        description="An empty thought that the template writes, such as <think></think>: learned, or taken out of the "
        "last turn and not learned in earlier ones, or a bad row.",
    )
    earlier_turns: Literal["as_template", "mask", "refuse"] = Field(
        "as_template",
        description="A turn before the last whose thought the template drops: learned without it and reported, not "
        "learned, or a bad row.",
    )


class DataConfig(Section):
    """Which rows, how they are written as text, which tokens carry loss, how they are packed."""

    path: Path | None = Field(None, description="File, folder or hub id of instructions; short for one source.")
    sources: tuple[SourceConfig, ...] = Field((), description="Where rows come from, when it is more than one path.")
    template: Literal["alpaca", "phi3", "chatml", "chat"] = Field(
        "alpaca", description="How a conversation becomes text; chat is the tokenizer's own chat template."
    )
    template_name: str | None = Field(
        None,
        min_length=1,
        description="Which of the tokenizer's named chat templates is the default; rows with tools take tool_use.",
    )
    template_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="Arguments of the chat template, such as enable_thinking; a row's own go first. They become the "
        "defaults of the exported template.",
    )
    thinking: ThinkingConfig = Field(default_factory=ThinkingConfig, description="What is learned of thoughts.")
    left_out: LeftOut = Field(
        "refuse",
        description="What happens to a row of which the template leaves something out: a bad row, or reported.",
    )
    split: SplitConfig = Field(
        default_factory=AutoSplit,
        description="Which rows are train, validation and test: auto (as the sources hold them, else by shares), "
        "ratios, files or a column.",
    )
    max_test_rows: int | None = Field(None, ge=1, description="Most test rows, a seeded choice; null keeps all.")
    train_on: Literal["assistant", "last_assistant", "all"] = Field(
        "assistant", description="Which tokens are targets: every assistant turn, the last one, or the prompt too."
    )
    sequence_length: int = Field(1024, ge=16, description="Capacity of a pack and longest row, in tokens.")
    packing: bool = Field(True, description="Pack several rows into a sequence; false pads length-grouped batches.")
    overlong: Literal["drop", "truncate_response", "truncate_left", "fail"] = Field(
        "drop", description="What happens to a row longer than sequence_length."
    )
    on_bad_row: Literal["fail", "skip"] = Field(
        "fail", description="What happens to a row that cannot be used; skipped ones go to data/rejected.jsonl."
    )
    unknown_fields: Literal["warn", "fail", "ignore"] = Field(
        "warn",
        description="What happens where rows or messages have fields that nothing reads and that are no known "
        "metadata: each is reported once with its rows, the stage fails, or nothing.",
    )
    metadata_fields: tuple[str, ...] = Field(
        (), description="Further fields of rows and messages that describe them only: neither read nor reported."
    )
    roles: dict[str, Literal["system", "user", "assistant", "tool", "tool_call"]] = Field(
        default_factory=dict,
        description="What further role words mean, such as {customer: user}; tool_call is a call in a message of its "
        "own. Upper and lower case are the same.",
    )
    repeated_roles: Literal["refuse", "join"] = Field(
        "refuse",
        description="What happens to a row with several messages of one role in a row: it is a bad row, or they become "
        "one message, an empty line between them. Results of parallel tool calls stay apart.",
    )
    numbers: Literal["exact", "shortest"] = Field(
        "exact",
        description="What happens to a number in the place of text whose spelling the file does not keep (a fraction "
        "in a table): it makes a bad row, or its shortest spelling is written.",
    )
    special_tokens: Literal["refuse", "as_text"] = Field(
        "refuse",
        description="What happens to a row whose text spells a special token such as <|im_end|>: it is a bad row, or "
        "its letters are tokenized as ordinary text. It never becomes a control token.",
    )
    leaks: Literal["warn", "drop", "fail"] = Field(
        "warn", description="What happens to train rows that the test rows repeat: told, dropped, or the stage fails."
    )
    leak_similarity: float = Field(
        0.8, gt=0, le=1, description="Share of common five-character pieces from which rows are near duplicates."
    )
    audit: bool = Field(True, description="Check every row's ids, targets and stop token, and fail on what is wrong.")
    engine: Literal["local", "ray"] = Field(
        "local", description="Where rows are rendered and tokenized: processes of this machine, or the Ray cluster."
    )
    num_processes: int | None = Field(
        None, ge=1, description="Processes that render and tokenize; null takes one a core where the rows are many."
    )
    cache: Path | None = Field(None, description="Folder of prepared data that runs share; null keeps none.")

    @model_validator(mode="after")
    def _some_rows(self) -> Self:
        if (self.path is None) == (not self.sources):
            raise ValueError("give exactly one of path and sources")
        return self

    @model_validator(mode="after")
    def _template_has_names(self) -> Self:
        given = next((name for name in ("template_name", "template_kwargs") if getattr(self, name)), None)
        if given and self.template != "chat":
            raise ValueError(f"{given} is for the tokenizer's own templates: set template: chat, not {self.template}")
        if odd := [name for name in self.template_kwargs if not name.isidentifier()]:
            raise ValueError(f"template_kwargs: {odd[0]!r} is not the name of an argument")
        return self

    @property
    def all_sources(self) -> tuple[SourceConfig, ...]:
        """The sources, also where only a path was given."""
        return self.sources or (SourceConfig(path=str(self.path)),)

    @property
    def local_paths(self) -> tuple[Path, ...]:
        """Every file or folder that rows are read from; hub ids, and sources that are not there, are left out."""
        own: tuple[Path, ...] = tuple(p for s in self.sources if (p := Path(s.path)).exists())
        if self.path is not None and not is_hub_id(str(self.path)):
            own = (self.path,)
        return own + ((self.split.validation, self.split.test) if isinstance(self.split, FileSplit) else ())


# --- tuning ---------------------------------------------------------------------------------------


class FullTuning(Section):
    """Every weight is trained."""

    method: Literal["full"] = "full"


class FreezeTuning(Section):
    """Only named parts are trained, the rest stays as it was."""

    method: Literal["freeze"]
    last_layers: int = Field(0, ge=0, description="Train so many of the last transformer layers.")
    head: bool = Field(True, description="Train the output layer and the norm before it.")
    names: tuple[str, ...] = Field((), description="Train weights whose name fits one of these, such as *.mlp.*.")

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not (self.last_layers or self.head or self.names):
            raise ValueError("nothing would be trained: give last_layers, head or names")
        return self


class LoraTuning(Section):
    """Low-rank adapters beside frozen weights."""

    method: Literal["lora"]
    rank: int = Field(16, ge=1, description="Rank of the adapters.")
    alpha: float = Field(
        32.0, gt=0, description="Scale: the adapter counts alpha / rank, with rslora alpha / sqrt(rank)."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of an adapter's inputs set to 0.")
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear", description="Which layers get one: all linear ones but the output layer, or ends of names."
    )
    rslora: bool = Field(False, description="Rank-stabilised scale, alpha / sqrt(rank).")
    dora: bool = Field(False, description="Train the norm of each weight beside its direction.")
    init: Literal["default", "gaussian", "orthogonal"] = Field(
        "default", description="How the adapters begin; all begin without effect on the model."
    )


class QloraTuning(LoraTuning):
    """Low-rank adapters beside weights held in 4 bits; they are computed with in training.precision."""

    method: Literal["qlora"]  # type: ignore[assignment]
    quantization: Literal["nf4", "fp4"] = Field("nf4", description="Format of the 4-bit weights.")
    double_quantization: bool = Field(True, description="Quantise the quantisation constants too, 0.4 bits a weight.")


class PromptTuning(Section):
    """A few vectors in front of every row are trained, no weight of the model."""

    method: Literal["prompt"]
    num_tokens: int = Field(16, ge=1, description="Trained vectors in front of a row, in tokens.")
    init_text: str | None = Field(None, min_length=1, description="Begin as this text's embeddings; null means random.")


TuningConfig = Annotated[
    FullTuning | FreezeTuning | LoraTuning | QloraTuning | PromptTuning,
    Field(discriminator="method", description="Which weights are trained, and how."),
]


# --- training -------------------------------------------------------------------------------------


class ProfileConfig(Section):
    """A trace of a few steps by PyTorch's profiler, one file a rank in run_dir/profile."""

    start: int = Field(10, ge=1, description="First optimizer step that is traced.")
    steps: int = Field(3, ge=1, description="Number of optimizer steps that are traced.")


class EarlyStopping(Section):
    """End the training when the validation loss no longer falls."""

    patience: int = Field(3, ge=1, description="Validations in a row without a new best before the end.")
    min_delta: float = Field(
        0.0, ge=0, description="Least fall of the loss that counts as a new best, in nats a token."
    )


class TrainingConfig(Section):
    """The optimizer, the schedule, the batch, and what is written while it runs."""

    num_workers: int = Field(1, ge=1, description="Ranks, one process each; one GPU each on a GPU cluster.")
    min_workers: int | None = Field(
        None,
        ge=1,
        description="Fewest ranks that training goes on with when a node is lost; null waits for all (cluster.wait_s).",
    )
    threads_per_worker: int = Field(1, ge=1, description="CPU threads of one rank (OMP_NUM_THREADS).")
    precision: Literal["bf16", "fp16", "fp32"] = Field(
        "bf16",
        description="Number format of weights and activations; fp16 is for GPUs that have no bf16.",
    )
    loss_scale_power: int = Field(
        16, ge=0, le=32, description="With fp16 the loss is scaled by 2 to this at first; an overflow halves the scale."
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = Field(
        "adamw",
        description="AdamW; bitsandbytes' hold moments in 8 bits, or page them out of a full GPU.",
    )
    num_epochs: float = Field(1.0, gt=0, description="Passes over the train split; max_steps may end it sooner.")
    max_steps: int | None = Field(None, ge=1, description="Most optimizer steps; null means what num_epochs gives.")
    global_batch_size: int = Field(8, ge=1, description="Sequences (packs) in one optimizer step, over all ranks.")
    micro_batch_size: int = Field(1, ge=1, description="Sequences (packs) in one forward pass of one rank.")
    lr: float = Field(2e-5, gt=0, le=1, description="Peak learning rate.")
    lr_schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="Decay after the warm-up.")
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="Share of the steps over which the rate rises from 0.")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="Rate at the end, as a share of lr.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW first-moment decay.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW second-moment decay.")
    adam_eps: float = Field(1e-8, gt=0, description="AdamW epsilon.")
    max_grad_norm: float | None = Field(1.0, gt=0, description="Gradient-norm clip; null turns it off.")
    logits_bytes: int = Field(
        2**28,
        ge=2**10,
        description="Most memory of one chunk of the loss's fp32 logits, in bytes; more chunks save memory.",
    )
    liger_kernels: bool = Field(
        False, description="Norms, rotary embedding and gated MLP by Liger's kernels (extra liger); GPUs only."
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations in backward to save memory.")
    early_stopping: EarlyStopping | None = Field(
        None, description="When to end before the last step; null means never."
    )
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "swanlab"], ...] = Field(
        (), description="Who gets the metrics beside metrics.jsonl."
    )
    tracker_project: str = Field(
        "tunelift", min_length=1, description="Project or experiment that trackers file it under."
    )
    tracker_entity: str | None = Field(
        None, min_length=1, description="Team or user that owns the run (wandb), or the workspace (swanlab)."
    )
    tracker_group: str | None = Field(
        None, min_length=1, description="Group that the run is filed under (wandb, swanlab)."
    )
    tracker_tags: tuple[Annotated[str, Field(min_length=1, max_length=64)], ...] = Field(
        (), description="Tags of the run (wandb, swanlab, mlflow)."
    )
    trackers_offline: bool = Field(False, description="Trackers write into the run's folder and send nothing.")
    profile: ProfileConfig | None = Field(None, description="Which steps are traced; null means none.")
    validate_every: int = Field(100, ge=1, description="Optimizer steps between validation losses.")
    checkpoint_every: int = Field(500, ge=1, description="Optimizer steps between checkpoints.")
    keep_checkpoints: int = Field(2, ge=1, description="Newest checkpoints kept.")
    checkpoint_in_background: bool = Field(
        True,
        description="Train on while a checkpoint is written, from a copy in host memory (12 bytes a trained weight, "
        "over all ranks); false writes it while training waits.",
    )
    max_failures: int = Field(3, ge=0, description="Restarts of the worker group before the stage fails.")
    hang_timeout_s: float = Field(
        1800.0,
        gt=0,
        description="Longest time of a micro-batch or a checkpoint, in seconds; then the group is restarted. "
        "Collectives time out later, so that the ranks' stacks are written first.",
    )
    on_nonfinite: str = Field(
        "stop",
        pattern=r"^(stop|skip [1-9]\d{0,5})$",
        description="A step whose loss or gradient is not finite is not taken: stop, or skip N such steps of a run.",
    )

    @property
    def collective_timeout_s(self) -> float:
        """Longest time of a collective operation, in seconds: more than a hang takes to be noticed and written down.

        Ten minutes at least, PyTorch's own limit: before the first step ranks wait for one that hashes the base's files
        or compiles, and no watchdog runs yet.
        """
        return max(600.0, self.hang_timeout_s + max(60.0, 0.1 * self.hang_timeout_s))

    @model_validator(mode="after")
    def _trackers_take_what_is_given(self) -> Self:
        takers: dict[str, tuple[str, ...]] = {
            "tracker_entity": ("wandb", "swanlab"),
            "tracker_group": ("wandb", "swanlab"),
            "tracker_tags": ("wandb", "swanlab", "mlflow"),
        }
        for key, known in takers.items():
            if getattr(self, key) and not set(known) & set(self.trackers):
                chosen = ", ".join(self.trackers) or "none"
                raise ValueError(
                    f"{key} is for {', '.join(known)}, and trackers are {chosen}: add one of these, or take {key} out"
                )
        return self

    @model_validator(mode="after")
    def _fewer_is_not_more(self) -> Self:
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(f"min_workers ({self.min_workers}) is more than num_workers ({self.num_workers})")
        if self.optimizer != "adamw" and self.min_workers not in (None, self.num_workers):
            raise ValueError(
                f"optimizer {self.optimizer} keeps its moments in a form that fewer workers can't take over: leave "
                "min_workers out, or use adamw"
            )
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        share = self.num_workers * self.micro_batch_size
        if self.global_batch_size % share:
            raise ValueError(
                f"global_batch_size ({self.global_batch_size}) must be a multiple of "
                f"num_workers x micro_batch_size ({self.num_workers} x {self.micro_batch_size} = {share})"
            )
        return self


class DeepSpeedConfig(Section):
    """How DeepSpeed shards the optimizer, the gradients and the weights."""

    stage: Literal[0, 1, 2, 3] = Field(
        2, description="ZeRO stage: 1 cuts optimizer states over ranks, 2 gradients too, 3 weights too."
    )
    offload_optimizer: Literal["none", "cpu", "nvme"] = Field(
        "none",
        description="Where optimizer states and master weights lie when a GPU can't hold them: cpu needs stage 1 or "
        "more, nvme stage 3.",
    )
    offload_parameters: Literal["none", "cpu", "nvme"] = Field(
        "none", description="Where the weights lie until a layer needs them; stage 3."
    )
    nvme_path: Path | None = Field(None, description="Folder on a local NVMe disk, for what is offloaded to nvme.")
    bucket_elements: int = Field(
        200_000_000,
        ge=1000,
        description="Most gradient elements that are reduced in one go; two such buffers are held.",
    )
    grad_accum_dtype: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32",
        description="Number format in which gradients are summed over micro-batches and ranks: fp32, or "
        "training.precision, which takes fewer bytes and rounds every sum.",
    )
    raw: dict[str, Any] = Field(default_factory=dict, description="Merged last into DeepSpeed's JSON, for experts.")

    @model_validator(mode="after")
    def _offload_fits_the_stage(self) -> Self:
        if self.offload_optimizer != "none" and self.stage == 0:
            raise ValueError("offload_optimizer needs stage 1 or more: stage 0 leaves the optimizer to PyTorch")
        if self.offload_parameters != "none" and self.stage != 3:
            raise ValueError(f"offload_parameters needs stage 3, which cuts the weights; stage is {self.stage}")
        if self.offload_parameters != "none" and self.offload_optimizer == "none":
            raise ValueError(
                "offload_parameters needs offload_optimizer: cpu or nvme, which holds the weights' fp32 masters"
            )
        if self.offload_optimizer == "nvme" and self.stage != 3:
            raise ValueError(f"offload_optimizer: nvme needs stage 3; stage is {self.stage}: use it, or cpu")
        if ("nvme" in (self.offload_optimizer, self.offload_parameters)) != (self.nvme_path is not None):
            raise ValueError("nvme_path and offloading to nvme go together")
        return self


class ExportConfig(Section):
    """The Hugging Face folder that comes out, and what it must show before it does."""

    merge: bool = Field(False, description="Write LoRA's and QLoRA's whole weights instead of an adapter.")
    vllm_prompts: int = Field(
        16, ge=0, le=1024, description="Test prompts on which vLLM must agree with transformers; 0 does not ask vLLM."
    )
    on_disagreement: Literal["fail", "warn"] = Field(
        "fail", description="Where vLLM computes another model than transformers: refuse the export, or report it."
    )
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs on which the exported model is checked.")
    gpu_memory_share: float = Field(
        0.9, gt=0, lt=1, description="Share of each of these GPUs' memory that vLLM takes for the check."
    )


class TrainerConfig(Section):
    """All that training needs to know; the launcher's RunConfig holds the same sections beside its own."""

    seed: int = Field(0, ge=0, description="Seed of the split, the shuffles, the initial weights and dropout.")
    model: ModelConfig
    data: DataConfig
    tuning: TuningConfig = FullTuning()
    training: TrainingConfig = TrainingConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    export: ExportConfig = ExportConfig()

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        refuse_misfits(self)
        return self


class Parts(Protocol):
    """The sections that must fit together."""

    @property
    def model(self) -> ModelConfig: ...
    @property
    def export(self) -> ExportConfig: ...
    @property
    def tuning(self) -> TuningConfig: ...
    @property
    def data(self) -> DataConfig: ...
    @property
    def training(self) -> TrainingConfig: ...
    @property
    def deepspeed(self) -> DeepSpeedConfig: ...


def refuse_misfits(config: Parts) -> None:
    """Refuse sections that are each right and do not work together.

    Args:
        config: Of the trainer, or of a whole run.

    Raises:
        ValueError: Two of them do not fit, with what to use instead.
    """
    if config.tuning.method == "prompt" and config.data.packing:
        raise ValueError(
            "tuning.method prompt puts its vectors in front of a sequence, so a sequence must hold one row: "
            "set data.packing to false"
        )
    if config.training.precision == "fp16" and config.deepspeed.stage == 0:
        raise ValueError(
            "training.precision fp16 does not work with deepspeed.stage 0, where DeepSpeed divides gradients by a "
            "scale that the loss was not multiplied by: use stage 1"
        )
    refuse_gradient_format(config.training.precision, config.deepspeed)
    if config.training.optimizer != "adamw" and config.deepspeed.offload_optimizer != "none":
        raise ValueError(
            f"training.optimizer {config.training.optimizer} does not work with deepspeed.offload_optimizer, which "
            "runs DeepSpeed's own AdamW beside the states: use adamw"
        )
    if isinstance(config.tuning, QloraTuning) and config.deepspeed.stage == 3:
        raise ValueError(
            "tuning.method qlora does not work with deepspeed.stage 3, which can't cut 4-bit weights over ranks: "
            "use stage 2 (only the adapters have gradients and optimizer states there)"
        )
    if isinstance(config.tuning, LoraTuning) and config.tuning.dora and config.deepspeed.stage == 3:
        raise ValueError(
            "tuning.dora does not work with deepspeed.stage 3, where PEFT finds no whole adapter to take norms of: "
            "use stage 2, or rslora in place of dora"
        )
    refuse_base_misfits(config)


def refuse_base_misfits(config: Parts) -> None:
    """Refuse model.new_tokens and model.adapter beside a tuning or an export that can't take them.

    Args:
        config: Of the trainer, or of a whole run.

    Raises:
        ValueError: They do not fit, with what to use instead.
    """
    tuning, model = config.tuning, config.model
    if isinstance(tuning, PromptTuning) and (model.new_tokens or model.adapter):
        named = "new_tokens" if model.new_tokens else "adapter"
        raise ValueError(f"model.{named} does not work with tuning.method prompt: use lora or full")
    if isinstance(tuning, LoraTuning) and tuning.dora and model.adapter:
        raise ValueError(
            "tuning.dora does not work with model.adapter, because vLLM could not serve it as the base: use "
            "tuning.dora: false"
        )
    if not model.new_tokens:
        return
    if isinstance(tuning, LoraTuning) and not config.export.merge:
        raise ValueError(
            f"model.new_tokens with tuning.method {tuning.method} trains rows of the embedding, which vLLM serves in "
            "no adapter: set export.merge: true, which writes whole weights"
        )
    if isinstance(tuning, FreezeTuning) and not tuning.names:
        raise ValueError(
            "model.new_tokens needs a trained embedding, and tuning.method freeze leaves it as it is: name it in "
            "tuning.names (such as *.embed_tokens.*), or use full or lora"
        )


def refuse_gradient_format(precision: str, deepspeed: DeepSpeedConfig) -> None:
    """Refuse a number format of summed gradients that DeepSpeed cannot keep.

    Args:
        precision: training.precision.
        deepspeed: Stage and grad_accum_dtype.

    Raises:
        ValueError: It is neither fp32 nor the precision, or stage 0 cannot accumulate in it.
    """
    requested = deepspeed.grad_accum_dtype
    if requested not in ("fp32", precision):
        raise ValueError(
            f"deepspeed.grad_accum_dtype is {requested}, training.precision is {precision}: use fp32, or {precision}"
        )
    if deepspeed.stage == 0 and precision != requested:
        raise ValueError(
            f"deepspeed.stage 0 sums {precision} gradients in {precision} only: use stage 1, which sums them in fp32, "
            f"or deepspeed.grad_accum_dtype: {precision}"
        )


def load_trainer_config(path: Path) -> TrainerConfig:
    """Read the trainer's sections of a run's YAML, and run.seed; the other sections are left to their owners.

    Args:
        path: YAML file.

    Returns:
        The checked configuration.

    Raises:
        TrainerError: The file can't be read, or some values are wrong: all of them are named.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TrainerError(f"{path} can't be read as YAML: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("run", {}), dict):
        raise TrainerError(f"{path} must hold sections such as run, model, data and training")
    sections = {key: content[key] for key in TrainerConfig.model_fields if key in content}
    if "seed" in content.get("run", {}):
        sections["seed"] = content["run"]["seed"]
    try:
        return TrainerConfig.model_validate(sections)
    except ValidationError as error:
        lines = [f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors()]
        raise TrainerError("\n".join([f"{path}:", *lines])) from error
