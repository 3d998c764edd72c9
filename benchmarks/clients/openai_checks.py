"""The `openai` package against a server: what programs built on it do."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Annotated, Literal

import openai
from checks import expect, run
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
    """What structured outputs are asked for."""

    name: Literal["Paris", "Rome"]
    large: bool
    number: Annotated[int, Field(ge=0, le=99)]


def client(address: str, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, timeout=120, max_retries=0)


def model(one: openai.OpenAI) -> str:
    return one.models.list().data[0].id


def models(address: str, key: str) -> str:
    one = client(address, key)
    name = model(one)
    expect(one.models.retrieve(name).id == name, "the model by its name")
    return name


def sync(address: str, key: str) -> None:
    one = client(address, key)
    answer = one.chat.completions.create(model=model(one), messages=HELLO, max_tokens=12, temperature=0)
    expect(answer.choices[0].message.content, "an answer")
    expect(answer.choices[0].message.role == "assistant", "the assistant's")
    expect(answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens, "usage")


def stream(address: str, key: str) -> None:
    one = client(address, key)
    asked = {"model": model(one), "messages": HELLO, "max_tokens": 12, "temperature": 0}
    whole = one.chat.completions.create(**asked).choices[0]
    chunks = list(one.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    expect(chunks[0].choices[0].delta.role == "assistant", "a role in the first piece")
    expect(chunks[-1].choices == [] and chunks[-1].usage, "usage at the end")
    pieces = [choice for chunk in chunks for choice in chunk.choices]
    expect("".join(piece.delta.content or "" for piece in pieces) == whole.message.content, "the same text")
    ends = [piece.finish_reason for piece in pieces if piece.finish_reason]
    expect(ends == [whole.finish_reason], "one finish_reason")
    expect(len({chunk.id for chunk in chunks}) == 1, "one id")


def asynchronous(address: str, key: str) -> str:
    async def main() -> int:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0) as one:
            name = (await one.models.list()).data[0].id

            async def ask(index: int) -> str:
                text = ""
                answer = await one.chat.completions.create(
                    model=name,
                    messages=[{"role": "user", "content": f"Count from {index}."}],
                    max_tokens=16,
                    temperature=0,
                    stream=True,
                )
                async for chunk in answer:
                    text += chunk.choices[0].delta.content or ""
                return text

            texts = await asyncio.gather(*(ask(index) for index in range(8)))
            expect(all(texts), "eight answers")
            return len(texts)

    return f"{asyncio.run(main())} at a time"


def left(address: str, key: str) -> None:
    one = client(address, key)
    with one.chat.completions.create(
        model=model(one), messages=HELLO, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    ) as answer:
        next(iter(answer))


def completions(address: str, key: str) -> None:
    one = client(address, key)
    answer = one.completions.create(
        model=model(one), prompt=["One, two,", "A, B,"], max_tokens=6, n=2, seed=5, logprobs=2, echo=True
    )
    expect([choice.index for choice in answer.choices] == [0, 1, 2, 3], "choices in order")
    expect(answer.choices[0].text.startswith("One, two,"), "the prompt echoed")
    found = answer.choices[0].logprobs
    expect(found.token_logprobs[0] is None, "nothing of the first token")
    expect(all(value <= 0 for value in found.token_logprobs[1:]), "log probabilities")


def logprobs(address: str, key: str) -> None:
    one = client(address, key)
    answer = one.chat.completions.create(
        model=model(one), messages=HELLO, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3
    )
    found = answer.choices[0].logprobs.content
    expect(len(found) == answer.usage.completion_tokens, "one for each token")
    for token in found:
        expect(math.isclose(token.logprob, max(top.logprob for top in token.top_logprobs)), "greedy is best")


def json_object(address: str, key: str) -> None:
    one = client(address, key)
    answer = one.chat.completions.create(
        model=model(one),
        messages=[{"role": "user", "content": "Give a JSON object with the key a and the value 1."}],
        max_tokens=200,
        temperature=0,
        response_format={"type": "json_object"},
    )
    if answer.choices[0].finish_reason == "stop":
        expect(isinstance(json.loads(answer.choices[0].message.content), dict), "an object")
    else:
        expect(answer.choices[0].message.content.lstrip().startswith("{"), "the beginning of an object")


def parse(address: str, key: str) -> str:
    one = client(address, key)
    answer = one.chat.completions.parse(
        model=model(one),
        messages=[{"role": "user", "content": "Describe a city."}],
        max_tokens=100,
        response_format=City,
    )
    expect(isinstance(answer.choices[0].message.parsed, City), "an object of the class")
    return str(answer.choices[0].message.parsed)


def parse_stream(address: str, key: str) -> None:
    one = client(address, key)
    with one.chat.completions.stream(
        model=model(one),
        messages=[{"role": "user", "content": "Describe a city."}],
        max_tokens=100,
        response_format=City,
    ) as answer:
        for _ in answer:
            pass
        expect(isinstance(answer.get_final_completion().choices[0].message.parsed, City), "an object")


def tools(address: str, key: str) -> str:
    one = client(address, key)
    asked = {
        "model": model(one),
        "messages": [{"role": "user", "content": "What is the weather in Rome for 3 days?"}],
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "max_tokens": 200,
        "temperature": 0,
    }
    answer = one.chat.completions.create(**asked).choices[0]
    (call,) = answer.message.tool_calls
    expect(call.function.name == "weather", "the function")
    expect(json.loads(call.function.arguments)["city"] in ("Paris", "Rome"), "arguments of its schema")
    with one.chat.completions.stream(**asked) as events:
        for _ in events:
            pass
        streamed = events.get_final_completion().choices[0]
    expect(streamed.message.tool_calls[0].function.arguments == call.function.arguments, "the same streamed")
    expect(streamed.finish_reason == answer.finish_reason, "the same end")
    again = one.chat.completions.create(
        model=asked["model"],
        messages=[
            *asked["messages"],
            answer.message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
        ],
        tools=[TOOL],
        max_tokens=20,
    )
    expect(again.choices[0].message is not None, "an answer to the tool's result")
    return call.function.arguments


def errors(address: str, key: str) -> None:
    one = client(address, key)
    name = model(one)
    try:
        one.completions.create(model=name, prompt=[5] * 100_000, max_tokens=1)
        expect(False, "an error for a long prompt")
    except openai.BadRequestError as error:
        expect(error.code == "context_length_exceeded", f"its code, not {error.code}")
        expect("maximum context length" in str(error), "its words")
    try:
        one.chat.completions.create(model="no-such-model", messages=HELLO)
        expect(False, "an error for an unknown model")
    except openai.NotFoundError:
        pass
    try:
        one.chat.completions.create(model=name, messages=HELLO, temperature=-1)
        expect(False, "an error for a negative temperature")
    except openai.BadRequestError as error:
        expect(error.param == "temperature", f"its name, not {error.param}")
    try:
        openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0).models.list()
        expect(False, "an error for a wrong key")
    except openai.AuthenticationError:
        pass


if __name__ == "__main__":
    run(
        "openai",
        {
            "models": models,
            "chat": sync,
            "chat, streamed, with usage": stream,
            "async, streamed, 8 at a time": asynchronous,
            "leaving a stream": left,
            "completions: list, n, echo, logprobs": completions,
            "chat logprobs": logprobs,
            "response_format json_object": json_object,
            "structured outputs: parse": parse,
            "structured outputs: stream": parse_stream,
            "tools: called, streamed, answered": tools,
            "errors: 400, 401, 404": errors,
        },
    )
