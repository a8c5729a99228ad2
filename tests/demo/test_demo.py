"""The demo model: a reproducible corpus with an honest held-out split, and a checkpoint that answers the README."""

import itertools
import random
import subprocess
import sys
from collections.abc import Iterator

import pytest

from raytier.demo import model_path
from raytier.demo.corpus import README_QUESTIONS, Corpus, Message, normalise


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus()


def _documents(corpus: Corpus, number: int, seed: int = 0) -> Iterator[list[Message]]:
    return itertools.islice(corpus.documents(random.Random(seed)), number)


def test_corpus_is_deterministic(corpus: Corpus) -> None:
    again = Corpus()
    assert list(_documents(corpus, 500)) == list(_documents(again, 500))
    assert corpus.held_out(20) == again.held_out(20)
    assert list(_documents(corpus, 50)) != list(_documents(corpus, 50, seed=1))


def test_held_out_phrasings_are_never_trained_on(corpus: Corpus) -> None:
    trained = {normalise(phrasing) for _, phrasing in corpus.training_phrasings()}
    assert trained.isdisjoint(corpus.held_out_wordings)
    asked = {normalise(document[-2].content) for document in _documents(corpus, 5000) if len(document) == 2}
    assert len(asked) > 2000
    assert asked.isdisjoint(corpus.held_out_wordings)
    single = [question for question in corpus.held_out(50) if len(question.messages) == 1]
    assert {normalise(question.messages[0].content) for question in single} <= corpus.held_out_wordings


def test_share_held_out(corpus: Corpus) -> None:
    wordings = sum(len(intent.phrasings) for intent in corpus.intents)
    assert 0.15 < len(corpus.held_out_wordings) / wordings < 0.20
    trained = {phrasing for _, phrasing in corpus.training_phrasings()}
    assert trained.issuperset(README_QUESTIONS)


def test_no_wording_has_two_answers(corpus: Corpus) -> None:
    answers: dict[str, str] = {}
    for intent in corpus.intents:
        for phrasing in intent.phrasings:
            assert answers.setdefault(normalise(phrasing), intent.answer) == intent.answer, phrasing


def test_model_directory_is_complete_and_small() -> None:
    files = {file.name: file.stat().st_size for file in model_path().iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= files.keys()
    assert sum(files.values()) <= 16 * 2**20


def test_finding_the_model_imports_no_torch() -> None:
    code = "import sys, raytier.demo as demo; assert demo.model_path().is_dir(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_answers_readme_questions() -> None:
    from raytier.demo.evaluate import answers, load

    expected = {
        "What is raytier?": "raytier serves language models that are larger than the fastest memory of your machine.",
        "What is 7 + 5?": "7 + 5 = 12.",
        "Count from 1 to 10.": "1, 2, 3, 4, 5, 6, 7, 8, 9, 10.",
        "what is the capital of france": "The capital of France is Paris.",
        "How do I start the server?": "Run `make serve`, or `serve run serve_configs/llm.yaml`.",
        "Tell me a short story about a robot.": "Once upon a time there was a",
    }
    tokenizer, model = load(model_path())
    found = answers(tokenizer, model, [[Message("user", question)] for question in expected])
    for answer, (question, start) in zip(found, expected.items(), strict=True):
        assert answer.startswith(start), question
    story = found[-1]
    assert "robot" in story.split(".")[0]
    assert story.endswith("The end.")
