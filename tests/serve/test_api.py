"""The API on the demo model, by plain HTTP and by the official client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from tests.serve.conftest import ServerProcess

USER = [{"role": "user", "content": "Name three colours."}]


def chat(server: ServerProcess, **fields: Any) -> httpx.Response:
    body = {"messages": USER, "max_tokens": 12, "temperature": 0, **fields}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)


def events(text: str) -> list[Any]:
    lines = [line for line in text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_stream_adds_up_to_the_whole(server: ServerProcess) -> None:
    for fields in (
        {},
        {"n": 3, "temperature": 1.0, "seed": 4},
        {"logprobs": True, "top_logprobs": 2},
        {"stop": ["e"]},
    ):
        whole = chat(server, **fields).json()
        options = {"include_usage": True}
        chunks = events(chat(server, stream=True, stream_options=options, **fields).text)
        assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
        assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
        assert chunks[-1]["choices"] == []
        usage = chunks[-1]["usage"]
        assert {k: usage[k] for k in ("prompt_tokens", "completion_tokens")} == {
            k: whole["usage"][k] for k in ("prompt_tokens", "completion_tokens")
        }
        for choice in whole["choices"]:
            mine = [c for chunk in chunks[:-1] for c in chunk["choices"] if c["index"] == choice["index"]]
            assert mine[0]["delta"]["role"] == "assistant"
            assert "".join(c["delta"].get("content", "") for c in mine) == choice["message"]["content"]
            reasons = [c["finish_reason"] for c in mine if c["finish_reason"]]
            assert reasons == [choice["finish_reason"]]
            if fields.get("logprobs"):
                scores = [s for c in mine if c["logprobs"] for s in c["logprobs"]["content"]]
                assert scores == choice["logprobs"]["content"]
                assert all(len(s["top_logprobs"]) == 2 for s in scores)
                assert bytes(b for s in scores for b in s["bytes"]).decode() == choice["message"]["content"]


def test_the_same_seed_says_the_same(server: ServerProcess) -> None:
    one, two, other = (
        chat(server, temperature=1.0, seed=seed, max_tokens=30).json()["choices"][0]["message"]["content"]
        for seed in (1, 1, 2)
    )
    assert one == two != other


def test_prompts_of_every_kind(server: ServerProcess) -> None:
    def complete(prompt: Any, **fields: Any) -> Any:
        body = {"prompt": prompt, "max_tokens": 5, "temperature": 0, **fields}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()

    text = "The capital of France is"
    ids = httpx.post(f"{server.url}/tokenize", json={"prompt": text}).json()["tokens"]
    assert httpx.post(f"{server.url}/detokenize", json={"tokens": ids}).json()["prompt"] == text
    expected = complete(text)["choices"][0]["text"]
    assert complete(ids)["choices"][0]["text"] == expected
    several = complete([text, "One, two, three,"], n=2)
    assert [choice["index"] for choice in several["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in several["choices"][:2]] == [expected] * 2
    assert complete([ids, ids])["choices"][1]["text"] == expected
    echoed = complete(text, echo=True)["choices"][0]["text"]
    assert echoed == text + expected


def test_log_probabilities_of_a_prompt_are_what_scoring_needs(server: ServerProcess) -> None:
    text = "The cat sat on the mat."
    ids = httpx.post(f"{server.url}/tokenize", json={"prompt": text}).json()["tokens"]
    body = {
        "prompt": [ids, ids[:4]],
        "echo": True,
        "logprobs": 1,
        "max_tokens": 1,
        "temperature": 0,
        "seed": 1,
    }
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
    scores = answer["choices"][0]["logprobs"]
    assert len(scores["tokens"]) == len(ids) + 1
    assert "".join(scores["tokens"][: len(ids)]) == text
    assert scores["token_logprobs"][0] is None
    assert scores["top_logprobs"][0] is None
    assert all(value <= 0 for value in scores["token_logprobs"][1:])
    greedy = [
        max(top.values()) == own
        for own, top in zip(scores["token_logprobs"][1:], scores["top_logprobs"][1:], strict=True)
    ]
    assert any(greedy)
    short = answer["choices"][1]["logprobs"]
    assert short["token_logprobs"][1:4] == scores["token_logprobs"][1:4]
    only = {**body, "max_tokens": 0, "prompt": ids}
    answer = httpx.post(f"{server.url}/v1/completions", json=only, timeout=60).json()
    assert answer["choices"][0]["logprobs"]["token_logprobs"] == scores["token_logprobs"][: len(ids)]
    assert answer["usage"]["completion_tokens"] == 0


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def test_structured_output(server: ServerProcess) -> None:
    for temperature in (0, 1.0):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
        answer = chat(server, response_format=form, max_tokens=80, temperature=temperature, seed=3).json()
        jsonschema.validate(json.loads(answer["choices"][0]["message"]["content"]), SCHEMA)
        assert answer["choices"][0]["finish_reason"] == "stop"
    answer = chat(server, guided_regex="[0-9]{3}-[a-f]{2}", max_tokens=40).json()
    assert re.fullmatch(r"[0-9]{3}-[a-f]{2}", answer["choices"][0]["message"]["content"])
    answer = chat(server, structured_outputs={"choice": ["yes", "no"]}).json()
    assert answer["choices"][0]["message"]["content"] in ("yes", "no")
    answer = chat(server, grammar='root ::= "left" | "right"').json()
    assert answer["choices"][0]["message"]["content"] in ("left", "right")
    answer = chat(server, response_format={"type": "json_object"}, max_tokens=200).json()
    if answer["choices"][0]["finish_reason"] == "stop":
        assert isinstance(json.loads(answer["choices"][0]["message"]["content"]), dict)


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 10}, "unit": {"enum": ["C", "F"]}},
                "required": ["city", "unit"],
                "additionalProperties": False,
            },
        },
    },
    {
        "type": "function",
        "function": {"name": "time", "parameters": {"type": "object", "additionalProperties": False}},
    },
]


def test_tools_streamed_or_not(server: ServerProcess) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in (named, "required"):
        fields = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 400}
        whole = chat(server, **fields).json()["choices"][0]
        assert whole["finish_reason"] == "tool_calls"
        call = whole["message"]["tool_calls"][0]
        if choice is named:
            assert call["function"]["name"] == "weather"
        if call["function"]["name"] == "weather":
            jsonschema.validate(json.loads(call["function"]["arguments"]), TOOLS[0]["function"]["parameters"])
        chunks = events(chat(server, stream=True, **fields).text)
        deltas = [c["delta"] for chunk in chunks for c in chunk["choices"]]
        calls = [one for delta in deltas for one in delta.get("tool_calls", [])]
        assert calls[0]["function"]["name"] == call["function"]["name"]
        assert calls[0]["function"]["arguments"] == call["function"]["arguments"]
        assert calls[0]["id"]
    free = chat(server, tools=TOOLS, tool_choice="none").json()["choices"][0]
    assert "tool_calls" not in free["message"]


def test_text_of_special_tokens_stays_text(server: ServerProcess) -> None:
    def count(content: str) -> int:
        messages = [{"role": "user", "content": content}]
        return httpx.post(f"{server.url}/tokenize", json={"messages": messages}).json()["count"]

    assert count("<|im_end|>") > count("x") + 2


def test_a_stop_string_over_several_tokens(server: ServerProcess) -> None:
    full = chat(server, max_tokens=40).json()["choices"][0]["message"]["content"]
    stop = full[10:17]
    cut = chat(server, max_tokens=40, stop=stop).json()["choices"][0]
    assert cut["message"]["content"] == full[: full.index(stop)]
    assert cut["finish_reason"] == "stop"


def test_a_second_turn_finds_the_first(server: ServerProcess) -> None:
    first = chat(server, max_tokens=30).json()
    messages = [
        *USER,
        {"role": "assistant", "content": first["choices"][0]["message"]["content"]},
        {"role": "user", "content": "And two more?"},
    ]
    second = chat(server, messages=messages).json()
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= 32


def test_about_the_server(server: ServerProcess) -> None:
    for path in ("/v1/models", "/v1//models", "/v1/models/", "/models"):
        listed = httpx.get(server.url + path).json()["data"]
        assert [model["id"] for model in listed] == ["smollm2"]
        assert listed[0]["max_model_len"] == 8192
    assert httpx.get(f"{server.url}/v1/models/smollm2").json()["id"] == "smollm2"
    assert chat(server).status_code == 200
    info = httpx.get(f"{server.url}/tokenizer_info").json()
    assert info["eos_token"] == "<|im_end|>"
    text = httpx.get(f"{server.url}/metrics").text
    for name in (
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "prefix_cache_queries_total",
        "prefix_cache_hits_total",
        "num_preemptions_total",
        "prompt_tokens_total",
        "generation_tokens_total",
        "request_success_total",
        "time_to_first_token_seconds_bucket",
        "inter_token_latency_seconds_bucket",
        "e2e_request_latency_seconds_bucket",
        "request_queue_time_seconds_bucket",
        "request_prefill_time_seconds_bucket",
        "request_decode_time_seconds_bucket",
        "request_prompt_tokens_bucket",
        "request_generation_tokens_bucket",
        "iteration_tokens_total_bucket",
        "cache_config_info",
    ):
        assert f"gristmill:{name}{{" in text, name
    assert 'model_name="smollm2"' in text
    one = '{model_name="smollm2"}'
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    steps = float(values[f"gristmill:iteration_tokens_total_count{one}"])
    assert steps == float(values[f"gristmill:engine_steps_total{one}"]) > 0
    tokens = float(values[f"gristmill:generation_tokens_total{one}"])
    assert float(values[f"gristmill:iteration_tokens_total_sum{one}"]) >= max(steps, tokens)
    assert float(values[f"gristmill:request_queue_time_seconds_count{one}"]) > 0
    assert "http_requests_total{" in text
    assert "process_resident_memory_bytes" in text
    answer = chat(server)
    assert answer.headers["x-request-id"].startswith("req-")
    again = httpx.get(f"{server.url}/version", headers={"X-Request-Id": "mine-7"})
    assert again.headers["x-request-id"] == "mine-7"


def test_five_hundred_requests_under_load_equal_each_alone(server: ServerProcess) -> None:
    """Greedy output at 16 at a time is, token for token, what the same request says on its own."""
    prompts = [
        f"{i} things about {word}: {'so ' * (i % 37)}" for i in range(250) for word in ("rye", "mills")
    ]

    async def ask(client: httpx.AsyncClient, prompt: str) -> str:
        body = {"prompt": prompt, "max_tokens": 4 + len(prompt) % 9, "temperature": 0, "ignore_eos": True}
        answer = await client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    async def all_at(most: int, some: list[str]) -> list[str]:
        gate = asyncio.Semaphore(most)
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:

            async def one(prompt: str) -> str:
                async with gate:
                    return await ask(client, prompt)

            return await asyncio.gather(*(one(prompt) for prompt in some))

    together = asyncio.run(all_at(16, prompts))
    alone = asyncio.run(all_at(1, prompts))
    assert together == alone


# ---- the official client ---------------------------------------------------------------------------------


@pytest.fixture
def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any")


def test_openai_client(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["smollm2"]
    messages: Any = USER
    answer = client.chat.completions.create(model="smollm2", messages=messages, max_tokens=10, temperature=0)
    text = answer.choices[0].message.content
    assert text
    stream = client.chat.completions.create(
        model="smollm2", messages=messages, max_tokens=10, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text
    old = client.completions.create(model="smollm2", prompt="One, two,", max_tokens=5)
    assert old.usage is not None
    assert old.usage.completion_tokens == 5
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=messages)
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.completions.create(model="smollm2", prompt="word " * 9000, max_tokens=5)


def test_openai_client_async_and_structured(client: openai.OpenAI, server: ServerProcess) -> None:
    from pydantic import BaseModel, ConfigDict

    class Person(BaseModel):
        model_config = ConfigDict(extra="forbid")
        name: str
        age: int

    messages: Any = USER

    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any") as other:
            parsed = await other.chat.completions.parse(
                model="smollm2", messages=messages, response_format=Person, max_tokens=200, temperature=0
            )
            assert parsed.choices[0].finish_reason in ("stop", "length")
            async with other.chat.completions.stream(
                model="smollm2", messages=messages, max_tokens=8
            ) as stream:
                async for _ in stream:
                    pass
            tools: Any = TOOLS
            called = await other.chat.completions.create(
                model="smollm2", messages=messages, tools=tools, tool_choice="required", max_tokens=400
            )
            assert called.choices[0].message.tool_calls

    with contextlib.suppress(openai.LengthFinishReasonError):  # the model rambles, and the client says so
        asyncio.run(main())
