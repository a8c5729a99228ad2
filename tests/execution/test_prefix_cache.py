"""F2, F3, G2: what is found, forked, copied or given up never changes a token: transformers is the judge."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from raytier.engine.sampling_params import SamplingParams
from tests.checkpoint.families import VOCAB
from tests.local_engine import LocalEngine, local_engine
from tests.models import MakeModel, random_prompts, save_model, transformers_greedy

COUNT = 12
GREEDY = SamplingParams(temperature=0, top_p=1, top_k=0, max_tokens=COUNT, ignore_eos=True)
#: Full attention, windows alone, and both in one model.
FAMILIES = ("llama", "mistral", "gemma2", "gemma3_text")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "llama", "llama", tokenizer_dir)


@pytest.fixture
def local(model_dir: Path) -> Iterator[LocalEngine]:
    with local_engine(model_dir, kv={"block_size": 4, "max_blocks": 120}) as local:
        yield local
        assert local.kv.num_used == 0


def tree(count: int, seed: int) -> list[list[int]]:
    """Prompts that begin like others, with whole blocks of 4 or less in common, up to being the same."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(3, VOCAB) for _ in range(rng.randint(5, 40))]]
    while len(prompts) < count:
        common = rng.choice(prompts)
        common = common[: rng.randint(0, len(common))]
        prompts.append(common + [rng.randrange(3, VOCAB) for _ in range(rng.randint(0 if common else 1, 20))])
    return prompts


@pytest.mark.parametrize("blocks", [500, 24])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_that_begin_alike(family: str, blocks: int, make_model: MakeModel) -> None:
    """With plenty of blocks, and with so few that sequences are preempted and cached blocks given up."""
    model_dir = make_model(family)
    prompts = tree(14, seed=3)
    wanted = transformers_greedy(model_dir, prompts, COUNT)
    settings = {"max_num_seqs": 5 if blocks == 24 else 16, "max_num_batched_tokens": 13}
    with local_engine(model_dir, kv={"block_size": 4, "max_blocks": blocks}, scheduler=settings) as local:
        for round_ in range(2):
            outputs = local.engine.generate(prompts, GREEDY)
            assert [list(o.token_ids) for o in outputs] == wanted, f"round {round_}"
        stats = local.engine.stats()
        assert stats.kv.hits > 0 and stats.kv_blocks_used == 0
        if blocks == 500:
            found = [o.cached_tokens for o in outputs]
            assert stats.preemptions == 0
            assert found == [(len(p) - 1) // 4 * 4 for p in prompts], "all whole blocks but the last token's"
        else:
            assert stats.kv_evictions > 0 and (stats.preemptions > 0 or family == "mistral")


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_hold_no_more_than_they_see(family: str, make_model: MakeModel) -> None:
    """A window of 8 tokens and steps of 8: at most 5 blocks of 4 at a time, whatever the length."""
    model_dir = make_model(family)
    [prompt] = random_prompts(100)
    most = [0, 0]
    with local_engine(model_dir, kv={"block_size": 4}, scheduler={"max_num_batched_tokens": 8}) as local:
        pools = local.kv.pools

        def watch(_: object) -> None:
            for group, pool in enumerate(pools):
                most[group] = max(most[group], pool.num_used)

        local.engine.observe(watch)
        outputs = local.engine.generate([prompt], GREEDY)
        assert [list(o.token_ids) for o in outputs] == transformers_greedy(model_dir, [prompt], COUNT)
    expected = {"llama": [28, 0], "mistral": [3, 0], "gemma2": [28, 3], "gemma3_text": [28, 3]}[family]
    assert most == expected, "between steps: the window's blocks, and all that full attention needs"


def test_samples_share_the_prompt(local: LocalEngine, model_dir: Path) -> None:
    """16 samples of one prompt take its blocks once and a tail each (issue item 6), and are what they are alone."""
    [prompt] = random_prompts(90)
    params = replace(GREEDY, temperature=1.0, seed=5, max_tokens=6)
    alone = local.engine.generate([prompt], replace(params, n=2))
    local.kv.clear()
    most = 0

    def watch(_: object) -> None:
        nonlocal most
        most = max(most, local.kv.num_used)

    local.engine.observe(watch)
    before = local.engine.stats()
    outputs = local.engine.generate([prompt], replace(params, n=16))
    stats = local.engine.stats()
    assert [o.token_ids for o in outputs[:2]] == [o.token_ids for o in alone]
    assert len({o.token_ids for o in outputs}) > 10
    assert 22 + 16 <= most <= 1.2 * (22 + 2 * 16)
    assert stats.kv.forks - before.kv.forks == 15
    assert stats.kv.copies - before.kv.copies == 15, "who is left alone on the block writes in place"
    assert stats.total.num_tokens - before.total.num_tokens == 90 + 15 + 16 * 5
    greedy = local.engine.generate([prompt], replace(GREEDY, n=4))
    assert {tuple(o.token_ids) for o in greedy} == {tuple(transformers_greedy(model_dir, [prompt], COUNT)[0])}


@pytest.mark.parametrize("off", ["sharing", "prefix_caching"])
def test_what_is_switched_off_changes_no_token(off: str, local: LocalEngine, model_dir: Path) -> None:
    prompts = random_prompts(30, 30, 9)
    params = replace(GREEDY, temperature=1.0, seed=5, n=3)
    wanted = [o.token_ids for o in local.engine.generate(prompts, params)]
    with local_engine(model_dir, kv={"block_size": 4, "max_blocks": 120, off: False}) as without:
        for _ in range(2):
            assert [o.token_ids for o in without.engine.generate(prompts, params)] == wanted
        counts = without.engine.stats().kv
        assert (counts.forks > 0) == (off != "sharing")
        assert (counts.hits > 0) == (off != "prefix_caching")


def test_logprobs_of_a_prompt_are_computed_though_its_kv_is_there(local: LocalEngine) -> None:
    [prompt] = random_prompts(40)
    params = replace(GREEDY, logprobs=1, prompt_logprobs=2)
    [first] = local.engine.generate([prompt], params)
    [second] = local.engine.generate([prompt], params)
    assert first.cached_tokens == second.cached_tokens == 0
    assert second.prompt_logprobs is not None and first.prompt_logprobs is not None
    assert [e and e.token_id for e in second.prompt_logprobs] == [e and e.token_id for e in first.prompt_logprobs]
    [third] = local.engine.generate([prompt], replace(params, prompt_logprobs=None))
    assert third.cached_tokens == 36 and third.token_ids == first.token_ids


def test_a_conversation_goes_on_where_it_was(local: LocalEngine, model_dir: Path) -> None:
    """What was generated is found like what was asked."""
    [prompt] = random_prompts(21)
    for turn in range(4):
        [output] = local.engine.generate([prompt], GREEDY)
        assert output.cached_tokens == (0 if turn == 0 else (len(prompt) - 1) // 4 * 4)
        assert [list(output.token_ids)] == transformers_greedy(model_dir, [prompt], COUNT)
        prompt = [*prompt, *output.token_ids]
