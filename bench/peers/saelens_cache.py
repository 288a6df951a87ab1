"""Tokens per second of SAELens's CacheActivationsRunner, run by its own interpreter.

    peer/bin/python bench/peers/saelens_cache.py MODEL HOOK WIDTH CONTEXT CORPUS FOLDER TOKENS HOW

MODEL is a folder written by save_pretrained, HOOK the name of the block's module in it, WIDTH what
it gives per token, CONTEXT tokens per context, CORPUS a folder of JSON lines, FOLDER an empty one
to write to. The model is loaded as AutoModelForCausalLM, which takes a folder and stops after the
hooked block; HookedTransformer knows only models of its list, and is no faster. HOW is one of

    default   float32, computed and stored, as its configuration has it
    autocast  the same under its `autocast_lm`
    bfloat16  weights in bfloat16, stored as float16: the precision of our own harvest

It writes one buffer of TOKENS tokens. Prints one JSON object: tokens_per_second of `run`, which
tokenizes, runs the model and writes; loading comes before.
"""

from __future__ import annotations

import json
import os
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"

from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig

BATCH_PROMPTS = 32  # has no default here; that of its trainer's store
BYTES = {"float32": 4, "float16": 2}
SETTINGS = {
    "default": {},
    "autocast": {"autocast_lm": True},
    "bfloat16": {"model_from_pretrained_kwargs": {"dtype": "bfloat16"}, "dtype": "float16"},
}


def main() -> None:
    model, hook, width, context, corpus, folder, tokens, how = sys.argv[1:]
    settings = SETTINGS[how]
    n_bytes = int(tokens) * int(width) * BYTES[settings.get("dtype", "float32")]
    config = CacheActivationsRunnerConfig(
        dataset_path=corpus,
        model_name=model,
        model_class_name="AutoModelForCausalLM",
        model_batch_size=BATCH_PROMPTS,
        hook_name=hook,
        d_in=int(width),
        training_tokens=int(tokens),
        context_size=int(context),
        prepend_bos=False,
        device="cpu",
        new_cached_activations_path=folder,
        buffer_size_gb=(n_bytes + 1) / 1e9,
        **settings,
    )
    runner = CacheActivationsRunner(config)
    start = time.perf_counter()
    cached = runner.run()
    seconds = time.perf_counter() - start
    rows = len(cached) * int(context)
    if rows != int(tokens):
        raise SystemExit(f"SAELens wrote {rows} rows, {tokens} were asked for")
    print(json.dumps({"tokens_per_second": rows / seconds}))


if __name__ == "__main__":
    main()
