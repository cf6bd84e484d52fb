from __future__ import annotations

from pathlib import Path

import pytest

from launcher.config import RunConfig, dump_config, load_config
from launcher.errors import ConfigError

MINIMAL = """\
run: {name: small}
model:
  from_scratch: {}
data:
  path: rows.json
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def problems(folder: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder, text), overrides)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_every_shipped_configuration_loads(repository: Path) -> None:
    shipped = sorted((repository / "configs").glob("*.yaml"))
    assert {path.name for path in shipped} >= {"quickstart.yaml", "instruction-data.yaml", "8b.yaml", "8b-qlora.yaml"}
    for path in shipped:
        assert isinstance(load_config(path), RunConfig)


def test_what_is_dumped_loads_back_equal(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL))
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_set_is_typed_and_makes_sections(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    config = load_config(path, ["training.lr=1e-4", "run.seed=7", "judge={type: reference}", "data.packing=false"])
    assert config.training.lr == 1e-4
    assert config.run.seed == 7
    assert config.data.packing is False


def test_a_mistake_in_a_further_model_names_the_model(tmp_path: Path) -> None:
    text = MINIMAL + (
        "generation:\n  models:\n    rival: owner/name\n    other:\n      type: api\n      model: m\n"
        "      base_url: http://127.0.0.1:1/v1\n      concurency: 3\n    third: {path: x, adaptr: y}\n"
    )
    assert problems(tmp_path, text) == [
        f"{tmp_path}/run.yaml:13: unknown key generation.models.other.concurency; "
        "did you mean generation.models.other.concurrency?",
        f"{tmp_path}/run.yaml:14: unknown key generation.models.third.adaptr; "
        "did you mean generation.models.third.adapter?",
    ]
    (wrong,) = problems(tmp_path, MINIMAL, "generation.models.rival={type: apo}")
    assert wrong.startswith("--set: generation.models.rival = {'type': 'apo'}: a model is a path or hub id")


def test_a_key_of_another_type_says_which(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, MINIMAL, "judge.type=reference", "judge.canary_limit=5")
    assert problem == "--set: unknown key judge.canary_limit here: it goes with judge of type: api, type: vllm"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["tuning.method=qlora", "deepspeed.stage=3"], "tuning.method qlora does not work with deepspeed.stage 3"),
        (["tuning={method: lora, dora: true}", "deepspeed.stage=3"], "tuning.dora does not work with deepspeed.stage"),
        (["tuning.method=prompt"], "set data.packing to false"),
        (["training.precision=fp16", "deepspeed.stage=0"], "use stage 1"),
        (["training.optimizer=adamw_8bit", "deepspeed.offload_optimizer=cpu"], "use adamw"),
    ],
)
def test_sections_that_do_not_fit_together_are_told_when_the_file_is_read(
    tmp_path: Path, settings: list[str], words: str
) -> None:
    (problem,) = problems(tmp_path, MINIMAL, *settings)
    assert problem.startswith("--set: ")
    assert words in problem
    (problem,) = problems(tmp_path, MINIMAL + "tuning:\n  method: qlora\ndeepspeed: {stage: 3}\n")
    assert problem.startswith(f"{tmp_path}/run.yaml:7: tuning.method qlora")


def test_a_kind_that_is_missing_or_unknown_is_told_by_its_key(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, MINIMAL, "tuning.rank=8")
    assert problem == "--set: tuning.method is missing: it says what the other keys of tuning are for"
    (problem,) = problems(tmp_path, MINIMAL + "tuning:\n  method: LoRA\n")
    assert problem == (
        f"{tmp_path}/run.yaml:7: tuning.method = 'LoRA': "
        "is none of full, freeze, lora, qlora, prompt; did you mean lora?"
    )
    (problem,) = problems(tmp_path, MINIMAL, "data.split={type: file}")
    assert problem == "--set: data.split.type = 'file': is none of auto, ratios, files, column; did you mean files?"
    (problem,) = problems(tmp_path, MINIMAL, "training.trackers=wandb")
    assert problem.startswith("--set: training.trackers = 'wandb': must be a list, such as [a, b]")


def test_all_mistakes_at_once_each_with_its_line(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        "run: {name: '../escaped'}\n"
        "model: {from_scratch: {hidden_size: 10, num_heads: 3}}\n"
        "data:\n"
        "  pth: rows.json\n"
        "training:\n"
        "  lr: fast\n"
        "trainin: {}\n",
    )
    path = tmp_path / "run.yaml"
    assert len(found) == 5
    assert found[0].startswith(f"{path}:1: run.name = '../escaped'")
    assert found[1] == f"{path}:2: model.from_scratch: num_heads (3) must divide hidden_size (10)"
    assert found[2] == f"{path}:4: unknown key data.pth; did you mean data.path?"
    assert found[3].startswith(f"{path}:6: training.lr = 'fast': input should be a valid number")
    assert found[4] == f"{path}:7: unknown key trainin; did you mean training?"


def test_what_is_missing_is_named_where_it_should_stand(tmp_path: Path) -> None:
    assert problems(tmp_path, "run: {}\nmodel: {from_scratch: {}}\ndata: {}\n") == [
        f"{tmp_path}/run.yaml:1: run.name is missing "
        "(Name of the run: letters, digits, '.', '_' and '-', at most 100.)",
        f"{tmp_path}/run.yaml:3: data: give exactly one of path and sources",
    ]


def test_a_key_inside_a_union_is_named_as_it_is_written(tmp_path: Path) -> None:
    judge = "judge: {type: api, model: m, base_url: http://localhost:1/v1, concurency: 4}\n"
    assert problems(tmp_path, MINIMAL + judge) == [
        f"{tmp_path}/run.yaml:6: unknown key judge.concurency; did you mean judge.concurrency?"
    ]


def test_an_override_is_blamed_on_the_command_line(tmp_path: Path) -> None:
    assert problems(tmp_path, MINIMAL, "training.lrr=1") == [
        "--set: unknown key training.lrr; did you mean training.lr?"
    ]


def test_an_unknown_section_on_the_command_line_is_blamed_on_it_too(tmp_path: Path) -> None:
    assert problems(tmp_path, MINIMAL, "trainng.lr=1") == ["--set: unknown key trainng; did you mean training?"]


def test_a_key_that_other_tools_name_otherwise_is_found_by_its_meaning(tmp_path: Path) -> None:
    assert problems(tmp_path, MINIMAL, "training.learning_rate=1") == [
        "--set: unknown key training.learning_rate; did you mean training.lr?"
    ]


@pytest.mark.parametrize("text", ["training.lr", "=1", "training..lr=1", "training.lr=[1"])
def test_an_override_must_be_key_and_value(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        load_config(write(tmp_path, MINIMAL), [text])


def test_a_key_may_stand_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"line 6: run stands twice \(first in line 1\)"):
        load_config(write(tmp_path, MINIMAL + "run: {name: other}\n"))


def test_a_batch_that_the_workers_cannot_share_is_refused(tmp_path: Path) -> None:
    text = MINIMAL + "training: {num_workers: 3, global_batch_size: 8}\n"
    assert (
        "global_batch_size (8) must be a multiple of num_workers x micro_batch_size (3 x 1 = 3)"
        in problems(tmp_path, text)[0]
    )


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL)
    with pytest.raises(ConfigError, match=r"rum\.yaml: no such file; did you mean .*run\.yaml\?"):
        load_config(tmp_path / "rum.yaml")


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "a: [\n", "!!python/object/apply:os.system [ls]\n"])
def test_what_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        load_config(write(tmp_path, text))
