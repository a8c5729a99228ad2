"""G4: what a request's parameters become."""

from __future__ import annotations

from raytier.checkpoint.manifest import GenerationDefaults
from raytier.engine.requests import specify
from raytier.engine.sampling_params import SamplingParams
from tests.engine.fakes import byte_level_tokenizer


def test_a_bad_word_behind_a_space_may_be_outside_of_the_models_vocabulary() -> None:
    """A model can be narrower than its tokenizer: it never draws such a token."""
    tokenizer = byte_level_tokenizer()
    bare, spaced = (tuple(tokenizer.encode(text, add_special_tokens=False)) for text in ("fox", " fox"))
    assert max(bare) < 270 <= max(spaced)
    params = SamplingParams(temperature=0, top_p=1, top_k=0, max_tokens=1, bad_words=("fox",))
    assert specify(params, tokenizer, GenerationDefaults(), tokenizer.vocab_size).spec.bad_words == (bare, spaced)
    assert specify(params, tokenizer, GenerationDefaults(), 270).spec.bad_words == (bare,)
