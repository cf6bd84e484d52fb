"""The prompts of a judge on our own engines, without an engine."""

import pytest

from evaluation.config import VllmJudge
from evaluation.judges.forms import form_of
from evaluation.judges.vllm import VllmEngine
from tests.evaluation import tiny_models

USER = "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}<|assistant|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.build(tmp_path_factory.mktemp("judge") / "judge")


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (USER, "<|assistant|>"),
        # A verdict inside an open thought would be one of the things that the judge thinks about.
        (USER + "{{ '<think>\\n' }}", "<|assistant|><think>\n\n</think>\n\n"),
        (USER + "{% if enable_thinking is false %}<think></think>{% endif %}", "<|assistant|><think></think>"),
        (USER + "{{ '</think>' if thinking is false else '<think>' }}", "<|assistant|></think>"),
        (USER + "{# <|channel|>analysis<|message|> #}", "<|assistant|><|channel|>final<|message|>"),
    ],
)
def test_a_judge_is_asked_for_its_verdict_after_a_thought(folder, template, end):
    (folder / "chat_template.jinja").write_text(template)
    config = VllmJudge(type="vllm", model=str(folder))
    engine = VllmEngine(config, form_of(config.protocol))
    ids = engine._tokens([{"role": "user", "content": "Judge it."}])
    assert tiny_models.tokenizer().decode(ids).endswith(f"Judge it.{end}")
    # Verdicts asked for in this way are others than those of a judge that was left to think.
    assert ("thought" in engine.identity) == (template != USER)
