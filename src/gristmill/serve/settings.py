"""What can be set about a server. One table: flags, environment and file are all read through it.

A flag `--max-queue` is the variable GRISTMILL_MAX_QUEUE and the key `max-queue` (or `max_queue`) of the YAML
file. Flags go before variables, variables before the file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from gristmill.errors import UsageError

__all__ = ["Settings", "load_settings", "option_names"]


class Settings(BaseModel):
    """All settings with their defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port; 0 for a free one.")
    api_key: tuple[str, ...] = Field((), description="Key that clients must send; may be repeated.")
    allow_no_key: bool = Field(False, description="Listen beyond this machine without a key.")
    served_model_name: str | None = Field(None, description="Name of the model in the API.")
    allowed_origins: tuple[str, ...] = Field(
        (), description="Web pages' origins that may call the API; may be repeated, `*` for all."
    )
    allowed_hosts: tuple[str, ...] = Field(
        (), description="Further names in the Host header, where the server listens on this machine only."
    )
    ssl_keyfile: str | None = Field(None, description="TLS: the private key.")
    ssl_certfile: str | None = Field(None, description="TLS: the certificate.")

    weights: Literal["stored", "f32", "bf16", "int8", "int4"] = Field(
        "stored", description="Weights as the file stores them, or converted."
    )
    activations: Literal["exact", "bf16", "fast"] | None = Field(
        None, description="Arithmetic of the linear layers."
    )
    kv_dtype: Literal["f32", "bf16", "int4", "int4-channel"] | None = Field(
        None, description="Keys and values in the KV cache."
    )
    threads: int | None = Field(None, ge=1, le=1024, description="Threads to compute with.")
    context: int | None = Field(None, ge=1, description="Most tokens of prompt and answer.")

    max_num_seqs: int = Field(64, ge=1, le=240, description="Most sequences that run at a time.")
    max_num_batched_tokens: int = Field(256, ge=32, le=256, description="Most tokens of a step.")
    max_prompt_tokens: int | None = Field(
        None, ge=16, description="Most prompt tokens of a step while answers are being generated."
    )
    kv_memory: int | None = Field(
        None, ge=1, description="MiB for keys and values, cached prefixes included."
    )
    kv_placement: Literal["mapped", "table"] = Field("mapped", description="How sequences' memory is found.")
    prefix_caching: bool = Field(True, description="Keep what was computed for requests that begin alike.")

    max_queue: int = Field(256, ge=0, description="Requests that may wait for a place.")
    max_body_mb: float = Field(8, gt=0, le=1024, description="Largest body of a request, in MB.")
    max_connections: int = Field(2048, ge=1, description="Open connections.")
    request_timeout: float = Field(600, gt=0, description="Seconds that a request may take.")
    write_timeout: float = Field(30, gt=0, description="Seconds that a client may leave a stream unread.")
    header_timeout: float = Field(10, gt=0, description="Seconds in which a request's headers must come.")
    body_timeout: float = Field(30, gt=0, description="Seconds in which a request's body must come.")
    keep_alive_timeout: float = Field(30, gt=0, description="Seconds that an idle connection stays open.")
    drain_timeout: float = Field(60, ge=0, description="Seconds that SIGTERM leaves running requests.")
    engine_timeout: float = Field(
        30, gt=0, description="Seconds without a sign of life of the engine after which the server ends."
    )

    tool_parser: Literal["hermes", "none"] = Field("hermes", description="Form of tool calls in answers.")
    reasoning_parser: Literal["think", "none"] = Field(
        "think", description="Form of reasoning that is told apart from the answer."
    )
    helpers: int = Field(
        1, ge=1, le=16, description="Helpers for texts, besides one for short texts and one for grammars."
    )
    log_format: Literal["text", "json"] = Field("text", description="Form of the log on stderr.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="What is logged.")
    access_log: bool = Field(True, description="Log requests; /health, /ready and /metrics never are.")

    @field_validator("api_key", "allowed_origins", "allowed_hosts", mode="before")
    @classmethod
    def _several(cls, value: object) -> object:
        if value == "":
            raise ValueError("it is empty")
        parts = [value] if isinstance(value, str) else value
        if isinstance(parts, (list, tuple)) and all(isinstance(part, str) for part in parts):
            return tuple(one.strip() for part in parts for one in part.split(",") if one.strip())
        return value

    @field_validator("api_key")
    @classmethod
    def _keys(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any(not key or not key.isascii() or not key.isprintable() or " " in key for key in value):
            raise ValueError("a key must be printable ASCII without spaces")
        return value

    @model_validator(mode="after")
    def _safe(self) -> Settings:
        if not self.loopback and not self.api_key and not self.allow_no_key:
            raise ValueError(
                f"listening on {self.host} without --api-key lets everyone in who reaches it: "
                "give a key, or --allow-no-key"
            )
        if bool(self.ssl_keyfile) != bool(self.ssl_certfile):
            raise ValueError("ssl_keyfile and ssl_certfile go together")
        return self

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")


def option_names() -> dict[str, tuple[str, Any]]:
    """Field -> (description, kind): kind is "flag", "many" or a type."""
    result: dict[str, tuple[str, Any]] = {}
    for name, field in Settings.model_fields.items():
        kind: Any = str
        if field.annotation is bool:
            kind = "flag"
        elif get_origin(field.annotation) is tuple:
            kind = "many"
        elif get_origin(field.annotation) is Literal:
            kind = get_args(field.annotation)
        elif any(get_origin(one) is Literal for one in get_args(field.annotation)):
            kind = next(get_args(one) for one in get_args(field.annotation) if get_origin(one) is Literal)
        result[name] = (field.description or "", kind)
    return result


def load_settings(
    flags: Mapping[str, Any], config: str | Path | None = None, environment: Mapping[str, str] | None = None
) -> tuple[Settings, dict[str, Any]]:
    """Settings from flags (None: not given), the environment and a YAML file, and the file's `model`, if any.

    UsageError, in one line that says where, for unknown names and wrong values.
    """
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    rest: dict[str, Any] = {}
    if config is not None:
        for name, value in _read(config).items():
            key = name.replace("-", "_")
            if key == "model":
                rest[key] = value
                continue
            if key not in Settings.model_fields:
                raise UsageError(f"{config}: there is no setting {name!r}")
            values[key], origin[key] = value, f"{config}: {name}"
    for key in Settings.model_fields:
        name = f"GRISTMILL_{key.upper()}"
        text = (os.environ if environment is None else environment).get(name)
        if text:
            values[key], origin[key] = text, name
    for key, value in flags.items():
        if value is not None and value != ():
            values[key], origin[key] = value, "--" + key.replace("_", "-")
    try:
        return Settings.model_validate(values), rest
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        where = origin.get(str(first["loc"][0])) if first["loc"] else None
        raise UsageError(f"{where}: {message[:1].lower()}{message[1:]}" if where else message) from None


def _read(path: str | Path) -> dict[str, Any]:
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        value = yaml.safe_load(text) or {}
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        raise UsageError(f"{path} is not YAML") from None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UsageError(f"{path} must hold names and values")
    return value
