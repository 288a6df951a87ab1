"""Run by delphi's own interpreter: python run_delphi.py WORK.

WORK/out/latents                 a cache we wrote; what LatentDataset makes of it goes to
WORK/read.safetensors            locations, activations, tokens; what its records say
WORK/dense.safetensors           activations [contexts, context length, n_latents], tokens
WORK/theirs/HOOKPOINT            the cache that delphi writes of them, in 3 files
"""

import sys
from pathlib import Path

import torch
from delphi.config import CacheConfig, ConstructorConfig, SamplerConfig
from delphi.latents import LatentCache, LatentDataset
from safetensors.torch import load_file, save_file

work = Path(sys.argv[1])
chosen = torch.tensor([3, 20, 21])
settings = {
    "sampler_cfg": SamplerConfig(n_examples_train=2, n_examples_test=2, n_quantiles=2),
    "constructor_cfg": ConstructorConfig(example_ctx_len=16, min_examples=4, n_non_activating=4),
}


def read(dataset):
    """All that its buffers yield."""
    data = [data for buffer in dataset.buffers for data in buffer]
    parts = [
        torch.cat([d.activation_data.locations for d in data]),
        torch.cat([d.activation_data.activations for d in data]).float(),
        torch.cat(
            [
                torch.full_like(d.activation_data.locations[:, 0], d.latent.latent_index)
                for d in data
            ]
        ),
    ]
    assert all((d.activation_data.locations[:, 2] == d.latent.latent_index).all() for d in data)
    return dict(zip(("locations", "activations", "latents"), parts, strict=True))


dataset = LatentDataset(work / "out" / "latents", **settings)
(hookpoint,) = dataset.modules
tensors = {f"all.{name}": tensor for name, tensor in read(dataset).items()}
some = LatentDataset(work / "out" / "latents", **settings, latents={hookpoint: chosen})
tensors |= {f"some.{name}": tensor for name, tensor in read(some).items()}
tensors["tokens"] = dataset.tokens
records = [record for record in dataset if record.examples]
tensors["explained"] = torch.tensor([record.latent.latent_index for record in records])
tensors["frequency"] = torch.tensor([record.per_token_frequency for record in records])
largest = [float(record.examples[0].activations.max()) for record in records]
tensors["largest"] = torch.tensor(largest)
save_file({name: t.contiguous() for name, t in tensors.items()}, work / "read.safetensors")

given = load_file(work / "dense.safetensors")
cache = LatentCache(torch.nn.Module(), {"layers.3": lambda x: x}, batch_size=4)
cache.width = given["activations"].shape[2]
for number, batch in enumerate(given["activations"].split(4)):
    cache.cache.add(batch, given["tokens"][4 * number : 4 * number + 4], number, "layers.3")
cache.cache.save()
cache.save_splits(3, work / "theirs")
cache.save_config(work / "theirs", CacheConfig(), "a-model")
