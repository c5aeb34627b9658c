"""A recycled model in lm_eval's `--model hf`: its calls load the directory, and its sums are our scores.

lm_eval itself (0.4.13) was tried by hand, and has these numbers; it is not installed for the tests. The calls are those
of `lm_eval.models.huggingface.HFLM`: `_get_config`, `_create_model`, `_create_tokenizer`, `prefix_token_id`,
`tok_encode` and `_loglikelihood_tokens`.
"""

from __future__ import annotations

import pytest
import torch
import transformers

from common.gpt2 import load_gpt2, token_table
from common.language import score
from recycle_gpt2.evaluate import with_end
from recycle_gpt2.extend import extend_tokenizer
from recycle_gpt2.lexical import initialise, replace_lexical
from recycle_gpt2.stages import save_model


class Harness:
    """What of HFLM touches a model's directory."""

    def __init__(self, pretrained: str) -> None:
        common = dict(revision="main", trust_remote_code=False)
        config = transformers.AutoConfig.from_pretrained(pretrained, **common)
        assert config.model_type in transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        self.model = transformers.AutoModelForCausalLM.from_pretrained(pretrained, dtype="float32", **common).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(pretrained, use_fast=True, **common)
        self.max_length = config.n_positions

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return bos if bos is not None else self.tokenizer.eos_token_id

    @torch.no_grad()
    def loglikelihood(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        inputs = torch.tensor([(context + continuation)[-(self.max_length + 1) :][:-1]])
        logits = torch.log_softmax(self.model(inputs).logits, -1)[0, -len(continuation) :]
        greedy = bool((logits.argmax(-1) == torch.tensor(continuation)).all())
        return float(logits.gather(1, torch.tensor(continuation)[:, None]).sum()), greedy


@pytest.fixture(scope="module", params=["replaced", "extended"])
def directory(request, tmp_path_factory, english_models, english_tokenizer, tokenizer, dutch):
    """A recycled model with each kind of vocabulary, saved as the pipeline saves it."""
    model, _ = load_gpt2(english_models[0])
    own = tokenizer if request.param == "replaced" else extend_tokenizer(english_tokenizer, dutch, 20)
    generator = torch.Generator().manual_seed(0)
    replace_lexical(model, own, initialise("copy", token_table(model), english_tokenizer, own, generator=generator))
    return save_model(model, own, tmp_path_factory.mktemp("harness") / "gpt2-nld")


def test_its_rolling_sums_are_our_scores(directory, dutch):
    harness = Harness(str(directory))
    model, tokenizer = load_gpt2(directory, frozen=True)
    for text in ("de kat en het huis", dutch[0][:60]):
        ids = harness.tokenizer.encode(text, add_special_tokens=False)
        assert [harness.prefix_token_id, *ids] == with_end(tokenizer, text)
        assert len(ids) <= harness.max_length
        total, _ = harness.loglikelihood([harness.prefix_token_id], ids)
        assert -total == pytest.approx(score(model, with_end(tokenizer, text)).nats, rel=1e-5)
        assert harness.tokenizer.decode(ids) == text


def test_a_choice_among_continuations(directory):
    """As its tasks ask: the context and each choice are tokenized apart, and the sums add up."""
    harness = Harness(str(directory))
    context, choice = (harness.tokenizer.encode(part, add_special_tokens=False) for part in ("de kat", " zijn op"))
    whole, _ = harness.loglikelihood([harness.prefix_token_id], context + choice)
    first, _ = harness.loglikelihood([harness.prefix_token_id], context)
    rest, _ = harness.loglikelihood([harness.prefix_token_id, *context], choice)
    assert whole == pytest.approx(first + rest, rel=1e-5)
