"""The figures of an SAE in the JSON layout of SAEBench's core evaluation, version 0.6."""

from __future__ import annotations

import uuid
from typing import Any

from sae_harvest.pipelines.evaluate.figures import SAE_ITSELF
from sae_harvest.pipelines.evaluate.report.measure import Evaluation
from sae_harvest.store.reader import ActivationStore

ROWS, TOKENS, WEIGHTS = "without outliers", "predicted tokens", "weights"
# category → name there → (metric, subject, part) here
LAYOUT: dict[str, dict[str, tuple[str, str, str]]] = {
    "model_behavior_preservation": {
        "kl_div_with_ablation": ("kl", "zero", TOKENS),
        "kl_div_with_sae": ("kl", SAE_ITSELF, TOKENS),
    },
    "model_performance_preservation": {
        "ce_loss_score": ("recovered_zero", SAE_ITSELF, TOKENS),
        "ce_loss_with_ablation": ("ce", "zero", TOKENS),
        "ce_loss_with_sae": ("ce", SAE_ITSELF, TOKENS),
    },
    "reconstruction_quality": {
        "explained_variance_legacy": ("explained_variance_legacy", SAE_ITSELF, ROWS),
        "mse": ("mse", SAE_ITSELF, ROWS),
        "cossim": ("cosine", SAE_ITSELF, ROWS),
    },
    "shrinkage": {
        "l2_norm_in": ("norm", SAE_ITSELF, ROWS),
        "l2_norm_out": ("norm_reconstructed", SAE_ITSELF, ROWS),
        "l2_ratio": ("norm_ratio", SAE_ITSELF, ROWS),
        "relative_reconstruction_bias": ("reconstruction_bias", SAE_ITSELF, ROWS),
    },
    "sparsity": {"l0": ("l0", SAE_ITSELF, ROWS), "l1": ("l1", SAE_ITSELF, ROWS)},
    "token_stats": {},
    "misc_metrics": {
        "freq_over_1_percent": ("frequent_1", SAE_ITSELF, ROWS),
        "freq_over_10_percent": ("frequent_10", SAE_ITSELF, ROWS),
        "normalized_freq_over_1_percent": ("firings_of_frequent_1", SAE_ITSELF, ROWS),
        "normalized_freq_over_10_percent": ("firings_of_frequent_10", SAE_ITSELF, ROWS),
        "average_max_encoder_cosine_sim": ("encoder_nearest_mean", SAE_ITSELF, WEIGHTS),
        "average_max_decoder_cosine_sim": ("decoder_nearest_mean", SAE_ITSELF, WEIGHTS),
    },
}


def saebench_core(evaluation: Evaluation, store: ActivationStore, millis: int) -> dict[str, Any]:
    """Return the content of a result file of SAEBench's core evaluation.

    A figure that is not defined, such as an average over no rows, is null.

    Args:
        evaluation: the measured parts of one SAE.
        store: the store that it was evaluated on.
        millis: time of the evaluation, in milliseconds since 1970.
    """
    figures = {
        (figure.metric, figure.subject, figure.part): figure
        for part in evaluation.parts.values()
        for figure in part.figures
    }
    metrics: dict[str, dict[str, Any]] = {
        category: {
            name: figures[key].value if key in figures else None for name, key in names.items()
        }
        for category, names in LAYOUT.items()
    }
    fvu = figures["fvu", SAE_ITSELF, ROWS]
    metrics["reconstruction_quality"]["explained_variance"] = _one_minus(fvu.value)
    behaviour = metrics["model_behavior_preservation"]
    ablated = behaviour["kl_div_with_ablation"]
    behaviour["kl_div_score"] = (ablated - behaviour["kl_div_with_sae"]) / ablated
    loss = figures["ce", SAE_ITSELF, TOKENS]
    increase = figures["delta_ce", SAE_ITSELF, TOKENS].value
    if loss.value is not None and increase is not None:
        metrics["model_performance_preservation"]["ce_loss_without_sae"] = loss.value - increase
    metrics["token_stats"] = {
        "total_tokens_eval_reconstruction": loss.count,
        "total_tokens_eval_sparsity_variance": fvu.count,
    }
    metrics["misc_metrics"]["frac_alive"] = _one_minus(
        figures["dead_share", SAE_ITSELF, ROWS].value
    )
    plan, [sae] = store.plan, evaluation.saes
    return {
        "eval_type_id": "core",
        "eval_config": {
            "model_name": sae.config.model or plan["model"]["name"],
            "llm_dtype": plan["compute_dtype"],
            "dataset": plan["corpus"]["name"],
            "context_size": store.context_length,
            **{
                f"compute_{name}": True
                for name in ("kl", "ce_loss", "l2_norms", "sparsity_metrics", "variance_metrics")
            },
        },
        "eval_id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{store.digest} {sae.digest}")),
        "datetime_epoch_millis": millis,
        "eval_result_metrics": metrics,
        "eval_result_details": [],
        "sae_bench_commit_hash": "",
        "sae_lens_id": None,
        "sae_lens_release_id": None,
        "sae_lens_version": None,
        "sae_cfg_dict": sae.config.model_dump(mode="json"),
    }


def _one_minus(value: float | None) -> float | None:
    return None if value is None else 1 - value
