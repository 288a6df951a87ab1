"""Names, units and sentences of all metrics, for the page and for docs/metrics.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Definition:
    """A metric in words."""

    title: str
    """Name on the page."""

    meaning: str
    """One or two sentences: what is measured, and how to read it."""

    better: Literal["lower", "higher", ""]
    """The direction of better values; empty if neither is better."""

    form: str = ".4f"
    """Format of a value."""

    unit: str = ""
    """Unit of the value."""


DEFINITIONS: dict[str, Definition] = {
    "fvu": Definition(
        "FVU",
        "Fraction of variance unexplained: the squared error of the reconstruction over the "
        "variance of the rows. 0 is a perfect reconstruction, 1 is as bad as saying the mean.",
        "lower",
    ),
    "l0": Definition(
        "L0", "Mean number of latents that are active on a row.", "", ".1f", "latents per row"
    ),
    "dead_share": Definition(
        "Dead share",
        "Share of latents that fire on none of the rows. It falls with more rows, so compare it "
        "only between SAEs that were evaluated on equally many.",
        "lower",
        ".2%",
    ),
    "frequent_10": Definition(
        "Frequent latents",
        "Share of latents that fire on more than 10 % of the rows. They are hard to interpret.",
        "lower",
        ".2%",
    ),
    "mse": Definition(
        "MSE", "Mean squared distance of a row and its reconstruction.", "lower", ",.4g"
    ),
    "explained_variance_legacy": Definition(
        "Legacy explained variance",
        "Mean over rows of 1 - squared error / squared distance from the mean row. Older versions "
        "of SAELens report it. A few rows near the mean dominate it.",
        "higher",
    ),
    "row_nmse": Definition(
        "NMSE by row",
        "Mean over rows of squared error / squared norm of the row, as in OpenAI's code. A large "
        "constant part of the rows makes it small without any merit of the SAE.",
        "lower",
    ),
    "paper_nmse": Definition(
        "NMSE of the paper",
        "FVU after each row is shifted to mean 0 and scaled to norm 1, as Gao et al. (2024) train.",
        "lower",
    ),
    "cosine": Definition("Cosine", "Mean cosine of a row and its reconstruction.", "higher"),
    "norm_ratio": Definition(
        "Norm ratio", "Mean norm of a reconstruction over the norm of its row.", ""
    ),
    "reconstruction_bias": Definition(
        "Reconstruction bias",
        "The factor by which reconstructions are too long: below 1 for an SAE that shrinks its "
        "activations, as an L1 penalty does. 1 is best.",
        "",
    ),
    "ce": Definition(
        "Loss",
        "Cross-entropy of the next token, with the replacement.",
        "lower",
        ".4f",
        "nats per token",
    ),
    "delta_ce": Definition(
        "ΔCE",
        "Increase of the model's loss when the output of the SAE replaces the activations. 0 means "
        "that the model predicts as well as without the SAE.",
        "lower",
        ".4f",
        "nats per token",
    ),
    "kl": Definition(
        "KL",
        "How far the predicted distribution of the next token moves from the plain model's.",
        "lower",
        ".4f",
        "nats per token",
    ),
    "recovered_zero": Definition(
        "Recovered, zeros",
        "Loss recovered: the share of the damage by zeros in place of the activations that the SAE "
        "avoids. It is near "
        "1 for poor SAEs too, since zeros destroy the model: quote ΔCE.",
        "higher",
        ".2%",
    ),
    "recovered_mean": Definition(
        "Recovered, mean",
        "Loss recovered: the share of the damage by the mean in place of the activations that the "
        "SAE avoids.",
        "higher",
        ".2%",
    ),
    "compute_share": Definition(
        "Compute-equivalent",
        "Share of the pretraining compute of a model that is as much worse as the spliced model. "
        "It depends on the table of compute and loss.",
        "higher",
        ".1%",
    ),
    "ablation_sparsity": Definition(
        "Ablation sparsity",
        "How many logits of the row and the tokens after it change when a latent that fires is "
        "ablated: 1 if all change alike, near 0 if a few tokens are affected. It depends on the "
        "size of the change, so compare with random directions.",
        "lower",
    ),
    "ablation_sparsity_difference": Definition(
        "Difference to random",
        "Ablation sparsity of the SAE minus that of random directions of the same size, pair by "
        "pair. Below 0, latents act on fewer tokens than chance.",
        "lower",
        "+.4f",
    ),
    "ablation_kl": Definition(
        "KL of ablations",
        "KL divergence that one ablated latent causes.",
        "",
        ".5f",
        "nats per token",
    ),
    "ablation_delta_ce": Definition(
        "ΔCE of ablations",
        "Increase of the loss that one ablated latent causes.",
        "",
        "+.5f",
        "nats per token",
    ),
    "program_precision": Definition(
        "Precision",
        "Share of the rows on which the program predicts a firing on which the latent fires.",
        "higher",
        ".3f",
    ),
    "program_recall": Definition(
        "Recall",
        "Share of the latent's firings that the program predicts.",
        "higher",
        ".3f",
    ),
    "program_f1": Definition(
        "F1",
        "Harmonic mean of precision and recall: how well tokens alone say where the latent fires.",
        "higher",
        ".3f",
    ),
    "program_auprc": Definition(
        "AUPRC",
        "Area under the precision-recall curve over all thresholds of the predicted activation.",
        "higher",
        ".3f",
    ),
    "program_pearson": Definition(
        "Pearson",
        "Correlation of predicted and true activation over all rows.",
        "higher",
        ".3f",
    ),
    "program_spearman": Definition(
        "Spearman",
        "Correlation of the ranks of predicted and true activation over all rows.",
        "higher",
        ".3f",
    ),
    "probe_loss_relative": Definition(
        "Probe loss, relative",
        "For each binary task the latent is chosen that predicts the label best with one weight "
        "and one bias; its loss over that of the best constant, averaged over tasks. 1 means that "
        "no latent knows anything. The choice among thousands of latents is too good by chance: "
        "shuffled labels show by how much.",
        "lower",
    ),
    "probe_loss_test_relative": Definition(
        "… on other documents",
        "The same, with latent, weight and bias chosen on half of the documents and the loss "
        "measured on the others.",
        "lower",
    ),
    "probe_loss": Definition(
        "Probe loss",
        "The loss itself, as in Gao et al. (2024).",
        "lower",
        ".4f",
        "nats per example",
    ),
    "probe_auc": Definition(
        "AUC",
        "Area under the ROC curve of a logistic regression on k features, chosen and fitted on "
        "half of the documents and scored on the others; 0.5 is chance.",
        "higher",
        ".3f",
    ),
    "probe_f1": Definition(
        "F1", "F1 of the same regressions, with both classes of equal weight.", "higher", ".3f"
    ),
    "probe_accuracy": Definition(
        "Accuracy", "Mean of the accuracies of the two classes; 0.5 is chance.", "higher", ".3f"
    ),
    "matched_cosine": Definition(
        "Matched cosine",
        "Every known feature is matched to one latent, so that the sum of the cosines of their "
        "directions is largest; this is the mean cosine.",
        "higher",
        ".3f",
    ),
    "found_share": Definition(
        "Features found", "Share of features whose cosine exceeds 0.9.", "higher", ".1%"
    ),
    "children_found": Definition(
        "Children found",
        "The same of features that fire only where their parent fires.",
        "higher",
        ".1%",
    ),
    "rare_found": Definition(
        "Rare found", "The same of the rarest quarter of features.", "higher", ".1%"
    ),
    "precision": Definition(
        "Precision of firings",
        "Share of the firings of a matched latent on rows on which its feature fires, averaged "
        "over features.",
        "higher",
        ".3f",
    ),
    "recall": Definition(
        "Recall of firings",
        "Share of the firings of a feature on rows on which its latent fires, averaged over "
        "features.",
        "higher",
        ".3f",
    ),
    "f1": Definition(
        "F1 of firings", "Harmonic mean of both, averaged over features.", "higher", ".3f"
    ),
    "absorption": Definition(
        "Absorption",
        "Of the rows on which a child and its latent fire, the share on which the latent of the "
        "parent is silent, although the parent fires.",
        "lower",
        ".3f",
    ),
    "parent_missed": Definition(
        "Parent missed",
        "Of the rows on which a parent fires without a child, the share on which its latent is "
        "silent. Only absorption beyond this is due to children.",
        "lower",
        ".3f",
    ),
    "encoder_norm_q50": Definition("Encoder norm, median", "Norm of a latent's encoder row.", ""),
    "decoder_norm_q50": Definition("Decoder norm, median", "Norm of a latent's decoder row.", ""),
    "encoder_bias_q50": Definition("Encoder bias, median", "Bias of a latent.", ""),
    "encoder_decoder_cosine_q50": Definition(
        "Encoder-decoder cosine, median", "Cosine of a latent's encoder row and decoder row.", ""
    ),
    "decoder_nearest_q50": Definition(
        "Nearest latent, median",
        "Cosine of a latent's decoder row and the most similar other one. Random directions have a "
        "low value; a high one shows families of similar latents.",
        "",
    ),
    "copy_share": Definition(
        "Copies",
        "Share of latents whose decoder row has a cosine above 0.9 with another's.",
        "lower",
        ".2%",
    ),
}

# sections of the page: title → metrics in order
SECTIONS: dict[str, tuple[str, ...]] = {
    "Reconstruction": ("fvu", "l0", "dead_share", "frequent_10", "cosine"),
    "Other definitions of the reconstruction error": (
        "mse",
        "paper_nmse",
        "row_nmse",
        "explained_variance_legacy",
        "norm_ratio",
        "reconstruction_bias",
    ),
    "Recovery of known features": (
        "matched_cosine",
        "found_share",
        "children_found",
        "rare_found",
        "f1",
        "precision",
        "recall",
        "absorption",
        "parent_missed",
    ),
    "Downstream loss": (
        "delta_ce",
        "kl",
        "recovered_zero",
        "recovered_mean",
        "ce",
        "compute_share",
    ),
    "Ablations": (
        "ablation_sparsity",
        "ablation_sparsity_difference",
        "ablation_kl",
        "ablation_delta_ce",
    ),
    "Probe loss": ("probe_loss_relative", "probe_loss_test_relative", "probe_loss"),
    "k-sparse probes": ("probe_auc", "probe_f1", "probe_accuracy"),
    "Programs": (
        "program_f1",
        "program_precision",
        "program_recall",
        "program_auprc",
        "program_pearson",
        "program_spearman",
    ),
    "Weights": (
        "decoder_norm_q50",
        "encoder_norm_q50",
        "encoder_bias_q50",
        "encoder_decoder_cosine_q50",
        "decoder_nearest_q50",
        "copy_share",
    ),
}
