"""A block of GPT-2 or Llama computed line by line, where a test sees and changes every site."""

from __future__ import annotations

from contextlib import contextmanager

LAYER = 1


@contextmanager
def block_by_hand(model, at):
    """The model with one block computed here, where `at(kind, tensor)` sees every site."""
    gpt2 = model.config.model_type == "gpt2"
    block = model.transformer.h[LAYER] if gpt2 else model.model.layers[LAYER]

    def of_gpt2(x, past_key_values=None, attention_mask=None, *_, **kwargs):
        x = at("resid_pre", x)
        attention = block.attn(block.ln_1(x), attention_mask=attention_mask)[0]
        middle = at("resid_mid", x + at("attn_out", attention))
        neurons = at("mlp_act", block.mlp.act(block.mlp.c_fc(block.ln_2(middle))))
        return at("resid_post", middle + at("mlp_out", block.mlp.c_proj(neurons)))

    def of_llama(x, **kwargs):
        x = at("resid_pre", x)
        attention = block.self_attn(hidden_states=block.input_layernorm(x), **kwargs)[0]
        middle = at("resid_mid", x + at("attn_out", attention))
        y, mlp = block.post_attention_layernorm(middle), block.mlp
        neurons = at("mlp_act", mlp.act_fn(mlp.gate_proj(y)) * mlp.up_proj(y))
        return at("resid_post", middle + at("mlp_out", mlp.down_proj(neurons)))

    block.forward = of_gpt2 if gpt2 else of_llama
    try:
        yield
    finally:
        del block.forward
