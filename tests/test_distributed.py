"""Several processes train the dictionary that one process trains."""

from __future__ import annotations

import errno
import os
import signal
import time
from datetime import timedelta

import pytest
import torch

import sae_harvest.train.parallel.distributed
from sae_harvest.common.errors import SaeHarvestError
from sae_harvest.train.parallel.distributed import group_of
from sae_harvest.train.parallel.process_group import ProcessGroup
from sae_harvest.train.run.exit_codes import may_pass
from sae_harvest.train.step.learner import Learner
from tests.processes import CPU, answers, start, together
from tests.test_learner import MODEL, config_of, data, predicted

STEPS = 50
WAYS = [("data", 2), ("data", 4), ("latents", 2), ("latents", 4)]
every_way = pytest.mark.parametrize(("parallel", "world"), WAYS)
OBJECTIVES = {
    "multi-topk": {"k": 4, "multi_topk": 0.125},
    "nested": {"k": 4, "matryoshka": (8, 32, 100, 192)},
    "batchtopk": {"k": 4, "activation": "batchtopk"},
    "jumprelu": {"k": 4, "activation": "jumprelu"},
    "relu_l1": {"activation": "relu_l1"},
    "relu_kl": {"k": 4, "activation": "relu_kl"},
    "gated": {"activation": "gated"},
    "transcoder": {"k": 4, "target_site": "mlp_out.1"},
    "unit_norm": {"k": 4, "normalization": "unit_norm"},
    "parts with fewer than k": {"k": 4, "n_latents": 7, "k_aux": 5},
}


def trained(config, group):
    """The learner after all steps, and its metrics."""
    sample = data(2000, seed=99)
    target = predicted(sample) if config.target_site else None
    learner = Learner.begin(config, "resid_post.1", sample, target, CPU, MODEL, group)
    share = config.batch_rows // group.row_parts
    first = share * (group.rank % group.row_parts)
    own = slice(first, first + share)
    lines = []
    for number in range(config.steps):
        x = data(config.batch_rows, seed=number)
        target = predicted(x)[own] if config.target_site else None
        lines.append(learner.advance(x[own].clone(), target))
    return learner, lines


def everything(learner):
    """All tensors of a learner by name."""
    found = {**learner.sae.tensors(), **learner.tensors()}
    return {name: tensor.clone() for name, tensor in found.items()}


def train_together(parallel, configs):
    """Of each configuration: all tensors, and metrics. Run in every process of a group."""
    found = []
    for config in configs:
        group = group_of(parallel, config.n_latents, config.batch_rows, CPU)
        learner, lines = trained(config, group)
        found.append(({k: v.numpy() for k, v in everything(learner).items()}, lines))
    return found


def joined(parts, parallel, n_latents):
    """Tensors of the whole from those of the processes, which agree on what they share."""
    whole = {}
    for name in parts[0]:
        tensors = [torch.from_numpy(part[name]) for part in parts]
        divided = parallel == "latents" and not name.endswith(("b_dec", "b_in"))
        if divided:
            whole[name] = torch.cat(tensors)
            assert len(whole[name]) == n_latents
        else:
            assert all(torch.equal(tensor, tensors[0]) for tensor in tensors), name
            whole[name] = tensors[0]
    return whole


def assert_equal(found, config, parallel, weights=1e-5):
    """What processes found is what one process finds."""
    alone, lines = trained(config, ProcessGroup())
    assert all(part[1] == found[0][1] for part in found)  # metrics: the same in all
    for here, there in zip(lines, found[0][1], strict=True):
        assert here == pytest.approx(there, rel=1e-4, abs=1e-6)
    whole = joined([part[0] for part in found], parallel, config.n_latents)
    expected = everything(alone)
    assert whole.keys() == expected.keys()
    assert torch.equal(whole["last_fired"], expected["last_fired"])
    differences = {
        name: float((whole[name] - tensor).abs().max()) for name, tensor in expected.items()
    }
    for name in alone.sae.tensors():
        assert differences[name] <= weights, (name, differences)
        assert differences.get(f"average.{name}", 0) <= weights, (name, differences)
    return lines


@pytest.mark.slow
@every_way
def test_fifty_steps_end_with_the_weights_of_one_process(parallel, world):
    config = config_of(steps=STEPS, k=4)
    parts = [part[0] for part in together(train_together, world, parallel, [config])]
    lines = assert_equal(parts, config, parallel)
    dead = [line["dead_share"] for line in lines if line["auxk"] > 0]
    assert len(dead) > STEPS / 2
    assert max(dead) > 0.05


@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "world"), [("data", 2), ("latents", 3)])
def test_every_objective_takes_the_steps_of_one_process(parallel, world):
    configs = [config_of(steps=4, **fields) for fields in OBJECTIVES.values()]
    parts = together(train_together, world, parallel, configs)
    for number, config in enumerate(configs):
        assert_equal([part[number] for part in parts], config, parallel)


def kept(values, n_latents, k, block_keys):
    """Of this process's part of pairs [rows, n_latents], those that are kept, by whole number."""
    sae_harvest.train.parallel.distributed.BLOCK_KEYS = block_keys
    group = group_of("latents", n_latents, 1, CPU)
    first, last = group.latents(n_latents)
    own = values[:, first:last].sort(dim=1, descending=True, stable=True)
    here = torch.arange(last - first).expand(len(values), -1).gather(1, own.indices).int()
    here, found = group.keep_top(here, own.values.clone(), k)
    assert ((here >= 0) | (found == 0)).all()
    return [sorted(row[row >= 0] + first) for row in here.numpy()]


@pytest.mark.parametrize("block_keys", [1 << 26, 16], ids=["at once", "in blocks"])
def test_the_largest_of_all_parts_are_kept_and_of_equals_the_lower(block_keys):
    n_latents, k = 11, 4
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-2, 3, (20, n_latents), generator=generator) * 0.5  # many are equal
    values[0, 9] = torch.inf
    values[1] = -0.0
    values[1, 5] = 0.0
    order = values.sort(dim=1, descending=True, stable=True).indices[:, :k]
    parts = together(kept, 3, values, n_latents, k, block_keys)
    for row, expected in enumerate(order.tolist()):
        assert sorted(latent for part in parts for latent in part[row]) == sorted(expected)


def wait_for_all():
    group = group_of("latents", 4, 4, CPU)
    group.anywhere(False)
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    began = time.monotonic()
    try:
        group.anywhere(False)
    except SaeHarvestError as error:
        return str(error), time.monotonic() - began


def test_a_process_that_hangs_ends_the_others():
    started = start(wait_for_all, 3, timeout=timedelta(seconds=4))
    found = answers([started[0], started[2]])
    started[1][0].kill()
    for sentence, seconds in found:
        assert "no longer answers; the same command continues" in sentence
        assert 3 < seconds < 60


def fail_in(rank, parallel):
    group = group_of(parallel, 4, 6, CPU)

    def work():
        if group.rank == rank:
            raise OSError(errno.ENOSPC, "No space left on device")
        return group.rank

    try:
        return group.together(work)
    except (OSError, SaeHarvestError) as error:
        return type(error).__name__, str(error), may_pass(error)


def test_what_fails_in_one_process_fails_in_all_with_its_sentence():
    found = together(fail_in, 3, 1, "latents")
    full = f"[Errno {errno.ENOSPC}] No space left on device"
    assert found == [("PeerFailed", full, True), ("OSError", full, True), found[0]]
    assert together(fail_in, 3, None, "data") == [0, 1, 2]
