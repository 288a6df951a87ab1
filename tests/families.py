"""Small models of many families, and where each family's own code computes the sites."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from sae_harvest.harvest.model.sites import SITE_KINDS, Site

LAYERS, WIDTH, NEURONS, VOCABULARY = 3, 32, 48, 97
BATCH, CONTEXT = 2, 12


@dataclass(frozen=True)
class Family:
    """How to build a small model of a family, and where its own code computes the sites."""

    config: Callable[[], Any]
    blocks: str
    attention: str
    mlp: str
    down: str
    parallel: bool = False


def llama_like(name: str, **more: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(
        hidden_size=WIDTH,
        intermediate_size=NEURONS,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        pad_token_id=None,
        bos_token_id=1,
        eos_token_id=2,
        **more,
    )


GROUPED = {"num_key_value_heads": 2}
_LLAMA_PLACES = ("model.layers", "self_attn", "mlp", "mlp.down_proj")
_NEOX_PLACES = ("gpt_neox.layers", "attention", "mlp", "mlp.dense_4h_to_h")
FAMILIES = {
    "gpt2": Family(
        lambda: transformers.GPT2Config(
            n_embd=WIDTH,
            n_inner=NEURONS,
            n_layer=LAYERS,
            n_head=4,
            vocab_size=VOCABULARY,
            n_positions=64,
            bos_token_id=1,
            eos_token_id=2,
        ),
        "transformer.h",
        "attn",
        "mlp",
        "mlp.c_proj",
    ),
    "llama": Family(llama_like("LlamaConfig", **GROUPED), *_LLAMA_PLACES),
    "qwen2": Family(llama_like("Qwen2Config", **GROUPED), *_LLAMA_PLACES),
    "qwen3": Family(llama_like("Qwen3Config", head_dim=8, **GROUPED), *_LLAMA_PLACES),
    "mistral": Family(llama_like("MistralConfig", sliding_window=4, **GROUPED), *_LLAMA_PLACES),
    "gpt_neox": Family(
        llama_like("GPTNeoXConfig", use_parallel_residual=True), *_NEOX_PLACES, parallel=True
    ),
    "gpt_neox_sequential": Family(
        llama_like("GPTNeoXConfig", use_parallel_residual=False), *_NEOX_PLACES
    ),
    "phi": Family(
        llama_like("PhiConfig"), "model.layers", "self_attn", "mlp", "mlp.fc2", parallel=True
    ),
    "gemma2": Family(
        llama_like("Gemma2Config", head_dim=8, query_pre_attn_scalar=8, **GROUPED),
        "model.layers",
        "post_attention_layernorm",
        "post_feedforward_layernorm",
        "mlp.down_proj",
    ),
    "opt": Family(
        lambda: transformers.OPTConfig(
            hidden_size=WIDTH,
            ffn_dim=NEURONS,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            vocab_size=VOCABULARY,
            max_position_embeddings=64,
            word_embed_proj_dim=WIDTH,
        ),
        "model.decoder.layers",
        "self_attn",
        "fc2",
        "fc2",
    ),
    "bloom": Family(
        lambda: transformers.BloomConfig(
            hidden_size=WIDTH, n_layer=LAYERS, n_head=4, vocab_size=VOCABULARY
        ),
        "transformer.h",
        "self_attention.dense",  # the attention module adds the residual itself
        "mlp.dense_4h_to_h",
        "mlp.dense_4h_to_h",
    ),
}
SEQUENTIAL = [name for name, family in FAMILIES.items() if not family.parallel]
PARALLEL = [name for name, family in FAMILIES.items() if family.parallel]


def build(config: Any) -> PreTrainedModel:
    """A model with weights large enough that every part of it changes the activations."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
            else:
                parameter.normal_(std=0.3).add_(float(name.endswith("weight")))
    return model


def token_ids() -> Tensor:
    """Random tokens [BATCH, CONTEXT], without the first three."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (BATCH, CONTEXT), generator=generator)


def sites(*names: str) -> list[Site]:
    return [Site.parse(name) for name in names]


def offered(name: str) -> list[Site]:
    kinds = [k for k in SITE_KINDS if k != "resid_mid" or not FAMILIES[name].parallel]
    return [Site(kind, layer) for layer in range(LAYERS) for kind in kinds]


def by_hand(name: str, model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Every site of the model, from hooks on the modules that the family's code names."""
    family = FAMILIES[name]
    seen: dict[str, Tensor] = {}
    handles: list[Any] = []

    def first(value: Any) -> Tensor:
        return (value[0] if isinstance(value, tuple) else value).clone().view(BATCH, CONTEXT, -1)

    def output_of(module: nn.Module, site: str) -> None:
        hook = lambda m, i, o: seen.__setitem__(site, first(o))  # noqa: E731
        handles.append(module.register_forward_hook(hook))

    def input_of(module: nn.Module, site: str) -> None:
        hook = lambda m, args: seen.__setitem__(site, first(args[0]))  # noqa: E731
        handles.append(module.register_forward_pre_hook(hook))

    for layer, block in enumerate(model.get_submodule(family.blocks)):
        output_of(block, f"resid_post.{layer}")
        output_of(block.get_submodule(family.attention), f"attn_out.{layer}")
        output_of(block.get_submodule(family.mlp), f"mlp_out.{layer}")
        input_of(block.get_submodule(family.down), f"mlp_act.{layer}")
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    for handle in handles:
        handle.remove()
    for layer in range(LAYERS):
        seen[f"resid_pre.{layer}"] = hidden[layer]
        seen[f"resid_mid.{layer}"] = hidden[layer] + seen[f"attn_out.{layer}"]
        if layer:  # the model's own account; its last entry is after the final norm
            torch.testing.assert_close(seen[f"resid_post.{layer - 1}"], hidden[layer])
    return seen


def relative_error(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    return float((got - wanted).norm() / wanted.norm())


def n_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
