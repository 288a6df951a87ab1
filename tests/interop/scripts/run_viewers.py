"""Run where automated-interpretability and circuit-tracer are: python run_viewers.py WORK.

WORK/openai/resid_post.1/neurons    read by `load_neuron`; what it says goes to WORK/neurons.json
WORK/circuit/index.json.gz          features, checked by circuit-tracer's own Model, which
                                    writes them to WORK/features.json
"""

import gzip
import json
import struct
import sys
from pathlib import Path

from circuit_tracer.frontend.feature_models import Model
from neuron_explainer.activations.activation_records import calculate_max_activation
from neuron_explainer.activations.activations import (
    ActivationRecord,
    ActivationRecordSliceParams,
    NeuronId,
    NeuronRecord,
    load_neuron,
)

work = Path(sys.argv[1])
neurons = work / "openai" / "resid_post.1" / "neurons"
found = {}
for path in (neurons / "1").iterdir():
    record = load_neuron(1, path.stem, neurons.as_uri())
    assert isinstance(record, NeuronRecord)
    assert record.neuron_id == NeuronId(1, int(path.stem))
    kinds = [record.random_sample, record.most_positive_activation_records]
    for records in [*kinds, *record.random_sample_by_quantile]:
        assert all(isinstance(r, ActivationRecord) for r in records)
        assert all(len(r.tokens) == len(r.activations) for r in records)
    if record.most_positive_activation_records:
        train = record.train_activation_records(ActivationRecordSliceParams(1))
        found[path.stem] = {
            "max_activation": record.max_activation,
            "of_train": calculate_max_activation(train),
            "tokens": train[0].tokens,
            "mean": record.mean,
        }
(work / "neurons.json").write_text(json.dumps(found))

index = json.loads(gzip.decompress((work / "circuit" / "index.json.gz").read_bytes()))
features = {}
for layer, place in index.items():
    data = (work / "circuit" / place["filename"]).read_bytes()
    for latent, start in enumerate(place["offsets"][:-1]):
        (length,) = struct.unpack_from("<I", data, start)
        said = gzip.decompress(data[start + 4 : start + 4 + length])
        feature = Model.model_validate_json(said, strict=True)
        assert set(json.loads(said)) == set(Model.model_fields)
        assert feature.index == latent
        features[f"{layer}/{latent}"] = feature.model_dump()
(work / "features.json").write_text(json.dumps(features))
