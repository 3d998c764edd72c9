"""The `openai` package, unchanged, against a real server with the real model."""

from __future__ import annotations

import asyncio
import json
from typing import Annotated, Literal

import openai
import pytest
from pydantic import BaseModel, Field

HELLO = [{"role": "user", "content": "Say hello."}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "enum": ["Paris", "Rome"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


class City(BaseModel):
    name: Literal["Paris", "Rome"]
    large: bool
    number: Annotated[int, Field(ge=0, le=99)]


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=120) as made:
        yield made


@pytest.fixture
def model(client):
    return client.models.list().data[0].id


def test_the_same_text_whole_and_streamed(client, model):
    asked = {"model": model, "messages": HELLO, "max_tokens": 16, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    pieces = [choice for chunk in chunks for choice in chunk.choices]
    assert whole.choices[0].message.content
    assert "".join(piece.delta.content or "" for piece in pieces) == whole.choices[0].message.content
    assert pieces[0].delta.role == "assistant"
    assert [p.finish_reason for p in pieces if p.finish_reason] == [whole.choices[0].finish_reason]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_async_streams_at_a_time_do_not_disturb_one_another(server, client, model):
    def asked(index):
        messages = [{"role": "user", "content": f"Count from {index}."}]
        return {"model": model, "messages": messages, "max_tokens": 16, "temperature": 0}

    async def main():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as several:

            async def ask(index):
                answer = await several.chat.completions.create(**asked(index), stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in answer])

            return await asyncio.gather(*(ask(index) for index in range(6)))

    alone = [client.chat.completions.create(**asked(i)).choices[0].message.content for i in range(6)]
    assert asyncio.run(main()) == alone
    assert len(set(alone)) > 1


def test_completions_of_several_prompts(client, model):
    answer = client.completions.create(
        model=model, prompt=["One, two,", "A, B,"], max_tokens=6, n=2, seed=5, logprobs=2, echo=True
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text[:3] for choice in answer.choices] == ["One", "One", "A, ", "A, "]
    assert answer.choices[0].logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in answer.choices[0].logprobs.token_logprobs[1:])


def test_chat_logprobs(client, model):
    answer = client.chat.completions.create(
        model=model, messages=HELLO, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3
    )
    found = answer.choices[0].logprobs.content
    assert len(found) == answer.usage.completion_tokens
    assert all(token.logprob == max(top.logprob for top in token.top_logprobs) for token in found)


@pytest.mark.parametrize("seed", range(3))
def test_structured_outputs(client, model, seed):
    asked = {
        "model": model,
        "messages": [{"role": "user", "content": "Describe a city."}],
        "max_tokens": 100,
        "temperature": 1,
        "seed": seed,
        "response_format": City,
    }
    whole = client.chat.completions.parse(**asked).choices[0].message
    assert isinstance(whole.parsed, City)
    with client.chat.completions.stream(**asked) as events:
        for _ in events:
            pass
        assert events.get_final_completion().choices[0].message.parsed == whole.parsed


def test_tools(client, model):
    asked = {
        "model": model,
        "messages": [{"role": "user", "content": "What is the weather in Rome for 3 days?"}],
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "max_tokens": 200,
        "temperature": 0,
    }
    choice = client.chat.completions.create(**asked).choices[0]
    (call,) = choice.message.tool_calls
    assert call.function.name == "weather"
    arguments = json.loads(call.function.arguments)
    assert arguments["city"] in ("Paris", "Rome")
    assert 1 <= arguments["days"] <= 9
    with client.chat.completions.stream(**asked) as events:
        for _ in events:
            pass
        streamed = events.get_final_completion().choices[0]
    (same,) = streamed.message.tool_calls
    assert (same.function.name, same.function.arguments) == (call.function.name, call.function.arguments)
    assert streamed.finish_reason == choice.finish_reason


def test_a_tool_s_result_is_taken(client, model):
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    answer = client.chat.completions.create(
        model=model,
        messages=[
            *HELLO,
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        ],
        tools=[TOOL],
        tool_choice="none",
        max_tokens=8,
    )
    assert answer.choices[0].message.content


def test_errors_are_the_package_s_own(client, model):
    with pytest.raises(openai.BadRequestError, match="maximum context length") as long:
        client.completions.create(model=model, prompt=[5] * 100_000, max_tokens=1)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="no-such-model", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model=model, messages=HELLO, temperature=-1)
