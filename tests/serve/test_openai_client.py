"""H2: what a user of the `openai` package sees."""

from __future__ import annotations

import asyncio

import openai
import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionMessageParam

from tests.serve.echo import MODEL, Served, die

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Grüße aus 東京 🙂"}]


async def test_chat(client: AsyncOpenAI, served: Served) -> None:
    answer = await client.chat.completions.create(model=MODEL, messages=HELLO)
    assert answer.choices[0].message.content == "Grüße aus 東京 🙂"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.object, answer.model) == ("chat.completion", MODEL)
    assert answer.id.startswith("chatcmpl-")
    assert answer.usage is not None
    prompt = len(served.only.tokenizer.encode("<|user|>Grüße aus 東京 🙂<|assistant|>"))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, prompt + 1)
    assert answer.usage.total_tokens == 2 * prompt + 1


async def test_an_answer_can_be_sent_back(client: AsyncOpenAI) -> None:
    """SDKs append the message object that they got, with its neutral fields."""
    answer = await client.chat.completions.create(model=MODEL, messages=HELLO)
    said = answer.choices[0].message
    history = [
        *HELLO,
        said,
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    second = await client.chat.completions.create(model=MODEL, messages=history)  # type: ignore[arg-type]
    assert second.choices[0].message.content == "Grüße aus 東京 🙂" * 2 + "a\nb"


async def test_developer_is_system(client: AsyncOpenAI, served: Served) -> None:
    message: ChatCompletionMessageParam = {"role": "developer", "content": "Be brief."}
    answer = await client.chat.completions.create(
        model=MODEL, messages=[message, *HELLO], extra_body={"skip_special_tokens": False}
    )
    text = answer.choices[0].message.content
    assert text is not None
    assert text.startswith("<|system|>Be brief.<|user|>")


async def test_template_switches(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        extra_body={
            "chat_template_kwargs": {"shout": True},
            "add_generation_prompt": False,
            "skip_special_tokens": False,
        },
    )
    assert answer.choices[0].message.content == "<|user|>Grüße aus 東京 🙂!"


async def test_chat_stream(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "Grüße aus 東京 🙂"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert len({(c.id, c.created, c.model, c.object) for c in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


async def test_usage_of_a_stream(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model=MODEL, messages=HELLO, stream=True, stream_options={"include_usage": True}, max_completion_tokens=3
    )
    *chunks, last = [chunk async for chunk in stream]
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 3
    assert last.usage.total_tokens == last.usage.prompt_tokens + 3


async def test_completion(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(model=MODEL, prompt="The quick brown fox", max_tokens=500)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("The quick brown fox", "stop")
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")


async def test_token_ids(client: AsyncOpenAI, served: Served) -> None:
    ids = served.only.tokenizer.encode("one two three")
    answer = await client.completions.create(model=MODEL, prompt=ids)
    assert answer.choices[0].text == "one two three"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(ids)


@pytest.mark.parametrize("as_ids", [False, True])
async def test_batch_of_prompts(client: AsyncOpenAI, served: Served, as_ids: bool) -> None:
    texts = ["one", "two three four", "dog", "The lazy fox"]
    ids = [served.only.tokenizer.encode(text) for text in texts]
    answer = await client.completions.create(model=MODEL, prompt=ids if as_ids else texts)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == texts
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(map(len, ids))
    assert answer.usage.completion_tokens == sum(len(each) + 1 for each in ids)


async def test_stream_of_a_batch(client: AsyncOpenAI, served: Served) -> None:
    texts = ["one", "two three four", "dog", "Köln 🙂"]
    stream = await client.completions.create(
        model=MODEL, prompt=texts, stream=True, stream_options={"include_usage": True}
    )
    got = [""] * 4
    reasons: list[str | None] = [None] * 4
    usage = None
    async for chunk in stream:
        usage = chunk.usage
        for choice in chunk.choices:
            assert reasons[choice.index] is None, "text after the end of a choice"
            got[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
    assert got == texts
    assert reasons == ["stop"] * 4
    assert usage is not None
    assert usage.prompt_tokens == sum(len(served.only.tokenizer.encode(text)) for text in texts)


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_strings(client: AsyncOpenAI, stream: bool) -> None:
    async def run(**extra: object) -> str:
        if not stream:
            whole = await client.completions.create(
                model=MODEL, prompt="one two three four", stop=[" three", "nowhere"], extra_body=extra
            )
            assert whole.choices[0].finish_reason == "stop"
            return whole.choices[0].text
        events = await client.completions.create(
            model=MODEL, prompt="one two three four", stop=" three", stream=True, extra_body=extra
        )
        return "".join([event.choices[0].text async for event in events])

    assert await run() == "one two"
    assert await run(include_stop_str_in_output=True) == "one two three"


async def test_stop_token_ids_and_ignore_eos(client: AsyncOpenAI, served: Served) -> None:
    two = served.only.tokenizer.encode("two three")[0]
    ids = [*served.only.tokenizer.encode("one "), two, *served.only.tokenizer.encode("four")]
    answer = await client.completions.create(model=MODEL, prompt=ids, extra_body={"stop_token_ids": [two]})
    assert answer.choices[0].text == "one "
    answer = await client.completions.create(model=MODEL, prompt="dog", max_tokens=20, extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (20, "length")


async def test_models(client: AsyncOpenAI) -> None:
    models = (await client.models.list()).data
    assert [(m.id, m.object, m.created, m.owned_by) for m in models] == [(MODEL, "model", 1_700_000_000, "raytier")]
    assert (await client.models.retrieve(MODEL)).id == MODEL


async def test_concurrent_streams(client: AsyncOpenAI, served: Served) -> None:
    async def one(number: int) -> str:
        text = f"stream {number} says 東京 {'x' * number}"
        stream = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": text}], stream=True, seed=number
        )
        got = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert got == text
        return got

    texts = await asyncio.gather(*(one(number) for number in range(16)))
    assert len(set(texts)) == 16
    await served.idle()
    assert served.only.stats().finished == {"stop": 16}


async def test_errors_are_the_exceptions_of_the_sdk(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as not_found:
        await client.chat.completions.create(model="gpt-5", messages=HELLO)
    assert not_found.value.code == "model_not_found"
    assert "gpt-5" in not_found.value.message
    assert MODEL in not_found.value.message
    with pytest.raises(openai.BadRequestError) as bad:
        await client.chat.completions.create(model=MODEL, messages=HELLO, temperature=3)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError, match="No model 'nope'"):
        await client.models.retrieve("nope")


async def test_death_in_mid_stream(client: AsyncOpenAI, served: Served) -> None:
    served.executor.before_step[5] = die
    stream = await client.completions.create(model=MODEL, prompt="one two three four " * 4, stream=True)
    with pytest.raises(openai.APIError, match=r"device actor died \(OOM\)"):
        async for _ in stream:
            pass
    with pytest.raises(openai.InternalServerError) as refused:
        await client.completions.create(model=MODEL, prompt="one")
    assert refused.value.status_code == 503
