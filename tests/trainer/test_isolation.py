import pytest
import torch
from transformers import AttentionInterface, GPT2Config, LlamaConfig

from tests.trainer.families import FAMILIES, build
from trainer.attention import PACKED_SDPA, packed_sdpa
from trainer.config import FromScratch, ModelConfig
from trainer.errors import TrainerError
from trainer.isolation import logits, prove_forward, prove_isolation
from trainer.model import attention_backend, load_base

SIZES = FromScratch(vocab_size=300)
CPU = torch.device("cpu")


def base(tiny_base, attention):
    model = load_base(ModelConfig(from_scratch=SIZES), tiny_base.parent, torch.float32, CPU, 96)
    if attention != "auto":
        model.set_attn_implementation(attention)
    return model


@pytest.fixture
def leaking_backend():
    """sdpa as transformers has it, under a name for which no mask is made: it sees the whole pack."""

    def leaks(module, query, key, value, attention_mask, **kwargs):
        whole = [query.shape[2]] * query.shape[0]
        return AttentionInterface()[PACKED_SDPA](module, query, key, value, None, document_lengths=whole)

    AttentionInterface.register("leaks", leaks)
    yield "leaks"
    AttentionInterface._global_mapping.pop("leaks")


@pytest.mark.parametrize("attention", ["auto", "sdpa", "eager", pytest.param("flex_attention", marks=pytest.mark.slow)])
def test_packed_documents_answer_as_alone(tiny_base, attention):
    model = base(tiny_base, attention).eval()
    seeded = torch.Generator().manual_seed(0)
    documents = [torch.randint(0, 258, (1, length), generator=seeded) for length in (7, 30, 1, 12)]
    positions = torch.cat([torch.arange(document.shape[1]) for document in documents])[None]
    with torch.no_grad():
        together = logits(model, torch.cat(documents, 1), positions)
        alone = [logits(model, document, torch.arange(document.shape[1])[None]) for document in documents]
    torch.testing.assert_close(together, torch.cat(alone, 1), atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("attention", ["auto", "sdpa", "eager"])
def test_backends_that_isolate_pass_the_proof(tiny_base, attention):
    model = base(tiny_base, attention)
    prove_isolation(model)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_backend_that_leaks_is_refused(tiny_base, leaking_backend):
    model = base(tiny_base, "auto")
    model.set_attn_implementation(leaking_backend)
    with pytest.raises(TrainerError, match=r"backend leaks lets packed documents see each other.*Set model\.attention"):
        prove_isolation(model)


def test_a_forward_pass_of_another_kind_is_refused(tiny_base, monkeypatch):
    model = base(tiny_base, "auto")
    prove_forward(model)
    own = type(model).forward

    def scaled(self, *arguments, **options):
        output = own(self, *arguments, **options)
        output.logits = output.logits / 8
        return output

    monkeypatch.setattr(type(model), "forward", scaled)
    with pytest.raises(TrainerError, match="LlamaForCausalLM scores tokens otherwise"):
        prove_forward(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_both_proofs_in_packs(tmp_path, tiny_tokenizer, family):
    folder = build(family, tiny_tokenizer, tmp_path / "base")
    model = load_base(ModelConfig(name_or_path=str(folder)), tmp_path, torch.float32, CPU, 96)
    prove_forward(model)
    prove_isolation(model)


def backend(attention="auto", device=CPU, dtype=torch.bfloat16, **text):
    return attention_backend(
        ModelConfig(from_scratch=SIZES, attention=attention), LlamaConfig(**text), device, dtype, 96
    )


def test_attention_that_drops_out_weights_is_not_given_to_flash_attention():
    gpt2 = GPT2Config()  # attn_pdrop is 0.1
    config = ModelConfig(from_scratch=SIZES)
    assert attention_backend(config, gpt2, torch.device("cuda"), torch.bfloat16, 96) == "packed_sdpa"
    assert backend(device=torch.device("cuda"), attention_dropout=0.1) == "packed_sdpa"


def test_auto_takes_what_fits_model_and_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    gpu = torch.device("cuda")
    assert backend() == "packed_sdpa"
    assert backend(device=gpu) == "packed_varlen"
    assert backend(device=gpu, dtype=torch.float32) == "packed_sdpa"
    assert backend(sliding_window=64) == "sdpa"
    assert backend(sliding_window=96) == "packed_sdpa"
    assert backend(attn_logit_softcapping=50.0) == "eager"
    assert backend("eager", gpu) == "eager"


@pytest.mark.parametrize("attention", ["flex_attention", "flash_attention_2"])
def test_backends_that_cannot_train_on_a_cpu_are_refused(attention):
    with pytest.raises(TrainerError, match=f"{attention}.*take auto, sdpa or eager"):
        backend(attention)


def test_a_window_that_would_cut_a_document_is_refused():
    query = torch.randn(1, 2, 8, 4)
    with pytest.raises(ValueError, match="knows no sliding window"):
        packed_sdpa(torch.nn.Identity(), query, query, query, None, document_lengths=[5, 3], sliding_window=4)
