"""The sparse frontier: activation functions at five sparsities each, judged by every cheap metric.

docs/results/sparse-frontier.md has the figures and what they say.

    python -m bench.studies.frontier FOLDER

FOLDER/store    the model's activations on news
FOLDER/sweep    the SAEs, all trained on one stream of batches
FOLDER/texts    the model's activations on labelled texts, for probes
FOLDER/found    figures of each point of the frontier
FOLDER/metrics.parquet, FOLDER/frontier.md, FOLDER/frontier.svg

What is there is not made again, so the same command continues an interrupted study.
"""
