"""A learner: learns, continues to the same bits, and leaves a dictionary that does what it did."""

from __future__ import annotations

import json

import pytest
import torch
from pydantic import ValidationError

from sae_harvest.common.errors import InputError, RunError
from sae_harvest.train.config import SAEConfig, TrainConfig
from sae_harvest.train.sae.sae import SAE
from sae_harvest.train.step.initialization import prepare, random_rows
from sae_harvest.train.step.learner import Learner

CPU = torch.device("cpu")
MODEL = {"name": "none", "weights": "none"}
N_LATENTS, D_IN, ROWS = 192, 16, 128
KINDS = {
    "topk": {"k": 4},
    "multi-topk": {"k": 4, "multi_topk": 0.125},
    "nested": {"k": 4, "matryoshka": (32, N_LATENTS)},
    "batchtopk": {"k": 4, "activation": "batchtopk"},
    "jumprelu": {"k": 4, "activation": "jumprelu"},
    "relu_l1": {"activation": "relu_l1"},
    "relu_kl": {"k": 4, "activation": "relu_kl"},
    "gated": {"activation": "gated"},
}
every_kind = pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS.keys())


def config_of(steps=12, **fields):
    known = {
        "n_latents": N_LATENTS,
        "batch_rows": ROWS,
        "tokens": steps * ROWS,
        "dead_after_tokens": 2 * ROWS,  # so few that AuxK takes part
        "lr": 3e-3,
        "warmup_tokens": 3 * ROWS,
        "decay_share": 0.3,
    }
    return TrainConfig.model_validate(known | fields)


def data(rows=ROWS, seed=0):
    """Rows with few causes each, out of 60, at an offset."""
    causes = random_rows(7, 0, 60, 60, D_IN)
    generator = torch.Generator().manual_seed(seed)
    strength = torch.randn(rows, 60, generator=generator).sub_(1.8).clamp_(min=0)
    return 4 * strength @ causes + 3 + 0.05 * torch.randn(rows, D_IN, generator=generator)


def predicted(x):
    """What transcoders are to predict, [rows, 5]."""
    return torch.relu(x[:, :5] - x[:, 5:10]) * 2


def begin(config):
    sample = data(2000, seed=99)
    target = predicted(sample) if config.target_site else None
    return Learner.begin(config, "resid_post.1", sample, target, CPU, MODEL)


def advance(learner, number):
    x = data(seed=number)
    return learner.advance(x, predicted(x) if learner.config.target_site else None)


def copied(learner):
    """A learner restored from copies of what a checkpoint keeps, numbers through JSON."""
    sae = learner.sae
    again = SAE(sae.config, **{name: tensor.clone() for name, tensor in sae.tensors().items()})
    tensors = {name: tensor.clone() for name, tensor in learner.tensors().items()}
    numbers = json.loads(json.dumps(learner.numbers()))
    return Learner.restore(learner.config, again, tensors, numbers, CPU)


def everything(learner):
    return {
        **learner.sae.tensors(),
        **learner.tensors(),
        **{f"result.{name}": tensor for name, tensor in learner.result().tensors().items()},
    }


@pytest.mark.parametrize("target", [None, "mlp_out.1"], ids=["sae", "transcoder"])
@every_kind
def test_restoring_at_any_step_ends_with_the_same_bits(fields, target):
    config = config_of(target_site=target, **fields)
    learner = begin(config)
    learner.sae.b_enc[:10] = -50.0  # dead, so that AuxK takes part
    saved = [copied(learner)]
    lines = []
    for number in range(config.steps):
        lines.append(json.dumps(advance(learner, number)))
        saved.append(copied(learner))
    assert any(json.loads(line)["auxk"] > 0 for line in lines)
    expected = everything(learner)
    for done, restored in enumerate(saved):
        assert restored.step == done
        again = [json.dumps(advance(restored, n)) for n in range(done, config.steps)]
        assert again == lines[done:]
        found = everything(restored)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), (done, name)


@every_kind
def test_training_learns(fields):
    config = config_of(steps=150, dead_after_tokens=20 * ROWS, **fields)
    learner = begin(config)
    first = advance(learner, 0)
    for number in range(1, config.steps):
        last = advance(learner, number)
    assert last["fvu"] < 0.6 * first["fvu"]
    sae, x = learner.result(), data(1000, seed=10**6)
    error = (sae.decode(*sae.encode(x)) - x).square().sum()
    assert error / (x - x.mean(0)).square().sum() < min(0.6, first["fvu"])
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(N_LATENTS))


@every_kind
def test_a_transcoder_predicts_another_site(fields):
    config = config_of(steps=150, target_site="mlp_out.1", dead_after_tokens=20 * ROWS, **fields)
    learner = begin(config)
    first = advance(learner, 0)
    for number in range(1, config.steps):
        advance(learner, number)
    sae, x = learner.result(), data(1000, seed=10**6)
    y = predicted(x)
    got = sae.decode(*sae.encode(x))
    assert got.shape == y.shape
    error = (got - y).square().sum() / (y - y.mean(0)).square().sum()
    assert error < min(0.7, first["fvu"])
    assert torch.equal(sae.extra["b_in"], begin(config).sae.extra["b_in"])


@every_kind
def test_the_first_batch_is_sparse_already(fields):
    line = advance(begin(config_of(**fields)), 0)
    assert 4 <= line["l0"] < N_LATENTS / 6


@every_kind
def test_use_chooses_what_training_chose(fields):
    config = config_of(**fields)
    learner = begin(config)
    for number in range(3):
        advance(learner, number)
    if config.activation == "batchtopk":  # training cuts by the batch, use by the threshold
        x = data(seed=3)
        pi = learner.sae.centre(x) @ learner.sae.W_enc.T + learner.sae.b_enc
        least = pi.flatten().sort(descending=True).values[ROWS * 4 - 1 : ROWS * 4 + 1].mean()
        learner.sae.extra["threshold"].fill_(least)
    indices, values = learner.sae.encode(data(seed=3))
    line = advance(learner, 3)
    assert line["l0"] == pytest.approx((values > 0).sum(1).double().mean().item())
    fired = learner.tensors()["last_fired"] == learner.tokens
    assert sorted(set(indices[values > 0].tolist())) == fired.nonzero().squeeze(1).tolist()


def test_batchtopk_threshold_follows_the_least_kept_value():
    config = config_of(steps=60, k=4, activation="batchtopk", lr=1e-6)
    learner = begin(config)
    for number in range(config.steps):
        learner.advance(data(10 * ROWS, seed=number))
    threshold = learner.sae.extra["threshold"]
    assert (threshold == threshold[0]).all()
    _, values = learner.result().encode(data(4000, seed=10**6))
    # weights hardly moved: the mean of least values keeps about k of other rows as well
    assert (values > 0).sum(1).double().mean().item() == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("activation", ["jumprelu", "relu_kl"])
def test_penalties_with_a_target_lead_towards_it(activation):
    weight = {"l0": 3.0} if activation == "jumprelu" else {"kl": 3.0}
    config = config_of(steps=300, k=6, activation=activation, dead_after_tokens=10**6, **weight)
    learner = begin(config)
    first = advance(learner, 0)["l0"]
    for number in range(1, config.steps):
        last = advance(learner, number)["l0"]
    assert abs(last / 6 - 1) < 0.4 < abs(first / 6 - 1)


@pytest.mark.parametrize("activation", ["relu_l1", "gated"])
def test_a_larger_l1_leaves_fewer_latents(activation):
    lasts = []
    for l1 in (0.01, 2.0):
        config = config_of(steps=100, activation=activation, l1=l1, dead_after_tokens=10**6)
        learner = begin(config)
        for number in range(config.steps):
            line = advance(learner, number)
        lasts.append(line["l0"])
    assert lasts[1] < 0.7 * lasts[0]


def test_learning_rate_grows_stays_and_falls():
    config = config_of(steps=20, k=4)  # 3 steps of warm-up, 6 of decay
    rates = [config.learning_rate_at(step) / config.learning_rate for step in range(20)]
    assert rates[:4] == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1])
    assert rates[4:14] == [1.0] * 10
    assert rates[14:] == pytest.approx([6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7])
    learner = begin(config)
    assert advance(learner, 0)["lr"] == pytest.approx(config.learning_rate / 4)
    default = TrainConfig(n_latents=8, k=1, batch_rows=10, tokens=1000)  # 5 of 100 steps
    assert default.learning_rate_at(4) == pytest.approx(5 / 6 * default.learning_rate)
    assert default.learning_rate_at(5) == default.learning_rate
    plain = config_of(k=4, warmup_tokens=0, decay_share=0)
    assert {plain.learning_rate_at(step) for step in range(12)} == {plain.learning_rate}


def test_a_part_of_the_latents_begins_with_its_rows_of_the_whole():
    whole = random_rows(5, 0, 200_000, 200_000, 4)
    assert torch.equal(random_rows(5, 65_000, 140_001, 200_000, 4), whole[65_000:140_001])
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(200_000))
    assert not torch.equal(random_rows(6, 0, 10, 10, 4), whole[:10])


def test_divergence_is_reported():
    config = config_of(k=4).model_copy(update={"lr": 1e30})  # a copy isn't held to the bounds
    learner = begin(config)
    advance(learner, 0)
    with pytest.raises(RunError, match=r"diverged at step 2 .*lower --lr"):
        advance(learner, 1)


@pytest.mark.parametrize("normalization", ["unit_norm", "layer_norm"])
def test_scale_does_not_matter_where_rows_are_normalised(normalization):
    config = config_of(k=4, normalization=normalization)
    start = prepare(data(2000), normalization)
    assert start.input_scale == 1
    sae = begin(config).sae
    x = data(50, seed=3)
    indices, values = sae.encode(x)
    same_indices, same_values = sae.encode(1000 * x)
    assert torch.equal(indices, same_indices)
    torch.testing.assert_close(values, same_values, rtol=2e-3, atol=2e-3)
    larger = sae.decode(same_indices, same_values, 1000 * x)
    torch.testing.assert_close(larger, 1000 * sae.decode(indices, values, x), rtol=2e-3, atol=1)
    with pytest.raises(InputError, match=r"decoding needs the rows as well; give them as x"):
        sae.decode(indices, values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": None}, "topk needs k"),
        ({"activation": "gated"}, "k is only for topk, batchtopk"),
        ({"activation": "relu_l1", "k": None, "kl": 0.5}, "kl is only for relu_kl"),
        ({"multi_topk": 0.1, "activation": "batchtopk"}, "multi_topk is only for topk"),
        ({"bandwidth": 0.3}, "bandwidth is only for jumprelu, relu_kl"),
        ({"matryoshka": (8, 4, N_LATENTS)}, "must grow"),
        ({"matryoshka": (0, N_LATENTS)}, "must grow"),
        ({"matryoshka": (8, 16)}, "must grow"),
        ({"matryoshka": (8, N_LATENTS), "multi_topk": 0.1}, "use one"),
        ({"normalization": "unit_norm", "target_site": "mlp_out.1"}, "cannot be undone"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(change, message):
    with pytest.raises(ValidationError, match=message):
        config_of(**({"k": 4} | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, "relu has no k"),
        ({"k": None}, "topk needs a k"),
        ({"d_out": 4}, "come together"),
        ({"target_site": "mlp_out.1"}, "come together"),
        ({"output_scale": 2.0, "normalization": "scale"}, "only for transcoders"),
        ({"input_scale": 2.0}, "normalization none needs"),
    ],
)
def test_dictionaries_that_cannot_be_are_refused(change, message):
    known = {"d_in": 4, "n_latents": 8, "k": 2, "site": "resid_post.1"}
    SAEConfig.model_validate(known)
    with pytest.raises(ValidationError, match=message):
        SAEConfig.model_validate(known | change)
