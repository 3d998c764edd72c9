"""The layers that decoder-only transformers share: grouped-query attention and a gated feed-forward net."""

from __future__ import annotations

from gristmill.models.config import ModelConfig
from gristmill.program.builder import Builder
from gristmill.program.nodes import Program


def attention(
    b: Builder,
    c: ModelConfig,
    layer: int,
    x: str,
    *,
    head_norms: bool = False,
    norm_offset: float = 0.0,
) -> str:
    """Projections, optional norms of query and key heads, attention, output projection; x is normed."""
    module = f"model.layers.{layer}.self_attn"
    q = b.linear(x, f"{module}.q_proj", c.heads * c.head_dim, c.qkv_bias)
    k = b.linear(x, f"{module}.k_proj", c.kv_heads * c.head_dim, c.qkv_bias)
    v = b.linear(x, f"{module}.v_proj", c.kv_heads * c.head_dim, c.qkv_bias)
    if head_norms:
        q = b.head_rmsnorm(
            q, f"{module}.q_norm.weight", c.norm_eps, c.heads, c.head_dim, weight_offset=norm_offset
        )
        k = b.head_rmsnorm(
            k, f"{module}.k_norm.weight", c.norm_eps, c.kv_heads, c.head_dim, weight_offset=norm_offset
        )
    y = b.attention(
        f"layers.{layer}.self_attn.attention",
        q,
        k,
        v,
        heads=c.heads,
        kv_heads=c.kv_heads,
        head_dim=c.head_dim,
        scale=c.attention_scale,
        window=c.windows[layer],
        rope=c.ropes[layer],
    )
    return b.linear(y, f"{module}.o_proj", c.hidden_size, c.out_bias)


def feed_forward(b: Builder, c: ModelConfig, layer: int, x: str) -> str:
    """down(act(gate(x)) * up(x)); x is normed."""
    module = f"model.layers.{layer}.mlp"
    gate = b.linear(x, f"{module}.gate_proj", c.intermediate_size, c.mlp_bias)
    up = b.linear(x, f"{module}.up_proj", c.intermediate_size, c.mlp_bias)
    y = b.gated(f"layers.{layer}.mlp.gated", gate, up, c.activation)
    return b.linear(y, f"{module}.down_proj", c.hidden_size, c.mlp_bias)


def head(b: Builder, c: ModelConfig, x: str, norm_offset: float = 0.0) -> Program:
    """The wanted rows, the last norm and the logits; ends the program."""
    x = b.select_rows(x)
    x = b.rmsnorm(x, "model.norm.weight", c.norm_eps, norm_offset)
    module = "model.embed_tokens" if c.tied else "lm_head"
    return b.build(b.linear(x, module, c.vocab_size, name="lm_head"))


def pre_norm_program(c: ModelConfig, *, head_norms: bool = False) -> Program:
    """The Llama block in every layer: x += attention(norm(x)); x += feed_forward(norm(x))."""
    b = Builder(c.architecture)
    x = b.embedding("model.embed_tokens.weight", c.vocab_size, c.hidden_size, c.embedding_scale)
    for i in range(c.layers):
        y = b.rmsnorm(x, f"model.layers.{i}.input_layernorm.weight", c.norm_eps)
        x = b.add(f"layers.{i}.self_attn.residual", x, attention(b, c, i, y, head_norms=head_norms))
        y = b.rmsnorm(x, f"model.layers.{i}.post_attention_layernorm.weight", c.norm_eps)
        x = b.add(f"layers.{i}.mlp.residual", x, feed_forward(b, c, i, y))
    return head(b, c, x)
