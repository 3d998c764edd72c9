"""Bad input, end to end: one line on stderr, nothing on stdout, an exit code that is not 0."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Gristmill
from tests.kits import files

HUGE = 1 << 42


def demo_file() -> Path:
    from gristmill.io.hub import demo_model_path

    return demo_model_path()


def gguf(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def pair(key: str, text: str) -> bytes:
    return files.gguf_pair(key, files.GGUF_NUMBERS["string"], files.gguf_string(text))


LLAMA = pair("general.architecture", "llama")


def missing(place: Path) -> Path:
    return place / "nothing.gguf"


def plain_text(place: Path) -> Path:
    return gguf(place / "notes.txt", b"This is no model.\n")


def named_gguf_only(place: Path) -> Path:
    return gguf(place / "notes.gguf", b"This is no model.\n")


def empty_file(place: Path) -> Path:
    return gguf(place / "empty.gguf", b"")


def empty_directory(place: Path) -> Path:
    return place


def truncated_gguf(place: Path) -> Path:
    with open(demo_file(), "rb") as file:
        return gguf(place / "cut.gguf", file.read(3 << 20))


def truncated_gguf_header(place: Path) -> Path:
    with open(demo_file(), "rb") as file:
        return gguf(place / "cut.gguf", file.read(1000))


def gguf_of_terabytes(place: Path) -> Path:
    info = files.gguf_info("token_embd.weight", (1 << 20, 1 << 20), 0, 0)
    return gguf(place / "big.gguf", files.gguf_bytes([LLAMA], [info], bytes(64)))


def gguf_counts_of_terabytes(place: Path) -> Path:
    return gguf(place / "big.gguf", files.gguf_bytes([LLAMA], [], counts=(HUGE, HUGE)))


def gguf_string_of_terabytes(place: Path) -> Path:
    value = files.gguf_string("x", HUGE)
    key = files.gguf_pair("general.name", files.GGUF_NUMBERS["string"], value)
    return gguf(place / "big.gguf", files.gguf_bytes([key], []))


def unknown_gguf_architecture(place: Path) -> Path:
    info = files.gguf_info("token_embd.weight", (32, 32), 0, 0)
    content = files.gguf_bytes([pair("general.architecture", "quetzal")], [info], bytes(4096))
    return gguf(place / "odd.gguf", content)


def unknown_tensor_type(place: Path) -> Path:
    info = files.gguf_info("token_embd.weight", (32, 32), 99, 0)
    return gguf(place / "odd.gguf", files.gguf_bytes([LLAMA], [info], bytes(4096)))


def unsupported_tensor_type(place: Path) -> Path:
    info = files.gguf_info("token_embd.weight", (256, 32), 16, 0)  # IQ2_XXS
    return gguf(place / "odd.gguf", files.gguf_bytes([LLAMA], [info], bytes(8192)))


def gguf_without_tensors(place: Path) -> Path:
    of = files.config()
    tensors = files.weights(of)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    return files.write_gguf(place / "holes.gguf", of, tensors)[0]


def gguf_of_wrong_shape(place: Path) -> Path:
    of = files.config()
    return files.write_gguf(place / "odd.gguf", of, files.weights(of | {"intermediate_size": 768}))[0]


def huggingface(place: Path, drop: str | None = None, **changes: Any) -> Path:
    of = files.config()
    tensors = files.weights(of)
    if drop is not None:
        del tensors[drop]
    return files.write_huggingface(place / "hf", of | changes, tensors)


def truncated_safetensors(place: Path) -> Path:
    path = huggingface(place)
    weights = path / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)
    return path


def safetensors_of_terabytes(place: Path) -> Path:
    path = huggingface(place)
    (path / "model.safetensors").write_bytes(HUGE.to_bytes(8, "little") + b"{}")
    return path


def tensor_of_terabytes(place: Path) -> Path:
    path = huggingface(place)
    entry = {"dtype": "F32", "shape": [HUGE, 1], "data_offsets": [0, 4 * HUGE]}
    (path / "model.safetensors").write_bytes(files.safetensors_bytes({"x": entry}, bytes(16)))
    return path


def unknown_architecture(place: Path) -> Path:
    return huggingface(place, architectures=["QuetzalForCausalLM"], model_type="quetzal")


def config_of_terabytes(place: Path) -> Path:
    return huggingface(place, hidden_size=1 << 40, vocab_size=1 << 40)


def config_is_not_json(place: Path) -> Path:
    path = huggingface(place)
    (path / "config.json").write_text("{")
    return path


def quantised_elsewhere(place: Path) -> Path:
    return huggingface(place, quantization_config={"quant_method": "bitsandbytes"})


def missing_tensor(place: Path) -> Path:
    return huggingface(place, drop="model.layers.0.self_attn.v_proj.weight")


def wrong_shape(place: Path) -> Path:
    return huggingface(place, intermediate_size=768)


def no_tokenizer(place: Path) -> Path:
    return huggingface(place)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (missing, "no such model"),
        (plain_text, "is not a model"),
        (named_gguf_only, "is not a GGUF file"),
        (empty_file, "is not a GGUF file"),
        (empty_directory, "no config.json"),
        (truncated_gguf, "truncated"),
        (truncated_gguf_header, "cannot fit"),
        (gguf_of_terabytes, "truncated"),
        (gguf_counts_of_terabytes, ""),
        (gguf_string_of_terabytes, "damaged"),
        (unknown_gguf_architecture, "quetzal"),
        (unknown_tensor_type, "99"),
        (unsupported_tensor_type, "IQ2_XXS"),
        (gguf_without_tensors, "up"),
        (gguf_of_wrong_shape, "512"),
        (truncated_safetensors, "truncated"),
        (safetensors_of_terabytes, "truncated"),
        (tensor_of_terabytes, "truncated"),
        (unknown_architecture, "Quetzal"),
        (config_of_terabytes, "hidden_size"),
        (config_is_not_json, "config.json"),
        (quantised_elsewhere, "bitsandbytes"),
        (missing_tensor, "v_proj"),
        (wrong_shape, "768"),
        (no_tokenizer, "tokenizer.json"),
    ],
)
def test_models_that_cannot_be_read(
    gristmill: Gristmill, tmp_path: Path, make: Callable[[Path], Path], says: str
) -> None:
    message = gristmill.refused(1, "generate", str(make(tmp_path)), "x", "--json")
    assert says.lower() in message.lower()


@pytest.mark.parametrize("verb", [("bench",), ("evaluate",), ("inspect",), ("pull",), ("chat",)])
def test_every_verb_refuses_a_truncated_model(
    gristmill: Gristmill, tmp_path: Path, verb: tuple[str, ...]
) -> None:
    assert "truncated" in gristmill.refused(1, *verb, str(truncated_gguf(tmp_path)))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--max-tokens", "0"), "max_tokens"),
        (("--max-tokens", "many"), "max-tokens"),
        (("--temperature", "-1"), "temperature"),
        (("--temperature", "nan"), "temperature"),
        (("--top-k", "-1"), "top_k"),
        (("--top-p", "0"), "top_p"),
        (("--min-p", "2"), "min_p"),
        (("--repetition-penalty", "0"), "repetition_penalty"),
        (("--presence-penalty", "3"), "presence_penalty"),
        (("--frequency-penalty", "inf"), "frequency_penalty"),
        (("--stop", ""), "stop"),
        (("--seed", "-1"), "seed"),
        (("--logprobs", "21", "--json"), "logprobs"),
        (("--logprobs", "2"), "--json"),
        (("--weights", "int3"), "int3"),
        (("--activations", "int1"), "int1"),
        (("--kv-dtype", "f8"), "f8"),
        (("--threads", "0"), "threads"),
        (("--context", "0"), "context"),
        (("--context", "9999999"), "context"),
        (("--trust-remote-code",), "--trust-remote-code"),
    ],
)
def test_options_out_of_range(gristmill: Gristmill, options: tuple[str, ...], says: str) -> None:
    assert says in gristmill.refused(2, "generate", "smollm2", "x", *options)


def test_a_wrong_option_is_found_before_the_model_is_looked_for(gristmill: Gristmill) -> None:
    assert "top_p" in gristmill.refused(2, "generate", "nothing", "x", "--top-p", "7")


def test_the_installed_command_is_this_program() -> None:
    from importlib.metadata import entry_points

    from gristmill import __main__

    (script,) = entry_points(group="console_scripts", name="gristmill")
    assert script.load() is __main__.main


def test_wrong_command_lines(gristmill: Gristmill) -> None:
    assert "no such command" in gristmill.refused(2, "grind", "smollm2").lower()
    assert "missing argument" in gristmill.refused(2, "generate", "smollm2").lower()
    done = gristmill.run()
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"Usage: gristmill" in done.stderr


def test_a_prompt_longer_than_the_context(gristmill: Gristmill) -> None:
    message = gristmill.refused(2, "generate", "smollm2", "-", "--raw", stdin=b"word " * 9000)
    assert "the context holds 8192" in message
    assert "64" in gristmill.refused(2, "generate", "smollm2", "word " * 80, "--context", "64")


def test_an_empty_prompt(gristmill: Gristmill) -> None:
    assert "empty" in gristmill.refused(2, "generate", "smollm2", "", "--raw")


def test_text_that_is_not_utf8(gristmill: Gristmill) -> None:
    assert "not UTF-8" in gristmill.refused(2, "generate", "smollm2", b"caf\xe9")
    assert "byte 4" in gristmill.refused(2, "generate", "smollm2", "-", stdin=b"caf\xe9")
    assert "--stop" in gristmill.refused(2, "generate", "smollm2", "x", "--stop", b"\xff")
    assert "not UTF-8" in gristmill.refused(2, "chat", "smollm2", stdin=b"caf\xe9\n")
    assert "not UTF-8" in gristmill.refused(2, "chat", "smollm2", "--system", b"\xff")
    assert "no such model" in gristmill.refused(1, "generate", b"/caf\xe9\x1b[2J", "x")


def test_a_text_to_evaluate_that_is_not_utf8(gristmill: Gristmill, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"caf\xe9")
    message = gristmill.refused(2, "evaluate", "smollm2", "--text", str(tmp_path / "text"))
    assert "not UTF-8" in message


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{{ unclosed",
        "{% for a in range(99999999) %}{% for b in range(99999999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 999999999999 }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{% include '/etc/passwd' %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_hostile_templates(gristmill: Gristmill, with_template: Callable[[str], str], template: str) -> None:
    gristmill.refused(1, "generate", with_template(template), "x")


def test_a_cache_that_cannot_be_written(gristmill: Gristmill, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    message = gristmill.refused(
        1, "generate", "smollm2", "x", GRISTMILL_CACHE=str(tmp_path / "file" / "cache")
    )
    assert "cache" in message


def test_a_chat_with_a_model_that_has_no_template(gristmill: Gristmill, tiny: Path) -> None:
    assert "no chat template" in gristmill.refused(2, "chat", str(tiny), stdin=b"hello\n")


def test_a_bug_is_one_line_too(gristmill: Gristmill, tmp_path: Path) -> None:
    """Not a model's fault, so nothing the command could expect: a module that fails."""
    broken = tmp_path / "gristmill_broken"
    broken.mkdir()
    (broken / "sitecustomize.py").write_text(
        "import sys\n"
        "class Failing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'gristmill.api':\n"
        "            raise RuntimeError('line one\\nline two')\n"
        "sys.meta_path.insert(0, Failing())\n"
    )
    message = gristmill.refused(1, "generate", "smollm2", "x", PYTHONPATH=str(broken))
    assert message.startswith("this is a bug in gristmill: RuntimeError: line one line two")
    done = gristmill.run("generate", "smollm2", "x", PYTHONPATH=str(broken), GRISTMILL_DEBUG="1")
    assert b"Traceback" in done.stderr


def test_errors_leave_nothing_in_the_cache(gristmill: Gristmill, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for make in (truncated_gguf, missing_tensor, no_tokenizer):
        place = tmp_path / make.__name__
        place.mkdir()
        gristmill.refused(1, "generate", str(make(place)), "x", GRISTMILL_CACHE=str(cache))
    listed = json.loads(gristmill.text("pull", "--list", "--json", GRISTMILL_CACHE=str(cache)))
    assert [entry["weights"] for entry in listed] in ([], ["stored"])
    assert not list((cache / "checkpoints").glob(".*"))
