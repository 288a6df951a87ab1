"""The Triton kernels against dense float64 formulas and the processor's kernels.

Not collected by itself: `test_triton.py` runs it in a process of its own, because Triton decides
when it is first imported whether kernels are interpreted. Under the interpreter all tensors are
on the processor, otherwise on the GPU.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from sae_harvest.train.config import TrainConfig
from sae_harvest.train.sae.kernels import AdamNumbers, Gradients, Pairs, triton_scores
from sae_harvest.train.sae.kernels import triton_gradients as by_latent
from sae_harvest.train.sae.kernels.cpu import CpuKernels
from sae_harvest.train.sae.kernels.triton_low import GroupedLow, shorten
from sae_harvest.train.sae.kernels.triton_ops import FP8_CAPABILITY, TritonKernels
from sae_harvest.train.sae.kernels.triton_select import group_choice_pays
from sae_harvest.train.sae.sae import SAE
from sae_harvest.train.step.learner import Learner
from tests.kernel_oracle import pair_gradients

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
HAS_FP8 = DEVICE.type == "cpu" or torch.cuda.get_device_capability() >= FP8_CAPABILITY


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def on(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Copies of the tensors on the device, not views of one memory."""
    return tuple(tensor.to(DEVICE, copy=True) for tensor in tensors)


def low_scores(centred: Tensor, low: GroupedLow, bias: Tensor) -> Tensor:
    """What the short numbers give in float64: [batch, n_latents]."""
    short, scale = shorten(centred, low.fp8)
    weight = low.values.double() * low.scales.double().unsqueeze(1)
    scores = (short.double() * scale.double().unsqueeze(1)) @ weight.T
    latents = low.latents()
    there = latents < low.n_latents
    out = torch.empty(len(centred), low.n_latents, dtype=torch.float64, device=centred.device)
    out[:, latents[there]] = scores[:, there]
    return out + bias.double()


def assert_largest(chosen: Tensor, scores: Tensor) -> None:
    """Each row's chosen latents are distinct and have its largest scores, up to rounding."""
    count = chosen.shape[1]
    assert chosen.dtype == torch.int32
    assert all(len(set(row)) == count for row in chosen.tolist())
    got = scores.gather(1, chosen.long()).sort(dim=1, descending=True).values
    best = scores.topk(count, dim=1).values
    torch.testing.assert_close(got, best, rtol=1e-4, atol=1e-4)  # keys drop five bits


@pytest.fixture(params=[False, True] if HAS_FP8 else [False], ids=["bf16", "fp8"][: 1 + HAS_FP8])
def kernels(request: pytest.FixtureRequest) -> TritonKernels:
    return TritonKernels(DEVICE, fp8=request.param)


@pytest.fixture
def plain() -> TritonKernels:
    return TritonKernels(DEVICE, fp8=False)


def test_chosen_are_the_largest_though_many_share_a_group(kernels):
    n_latents, count = 2050, 7
    weight, x, bias = (
        normal(n_latents, 40, seed=0),
        normal(9, 40, seed=1),
        normal(n_latents, seed=2),
    )
    groups = GroupedLow(n_latents, 40, False, torch.device("cpu")).groups
    weight[5::groups] = weight[5] + 0.05 * weight[5::groups]  # all the members of group 5
    x[:4] = 2 * weight[5] + 0.1 * x[:4]
    weight, x, bias = on(weight, x, 0.1 * bias)
    low = kernels.low_precision(weight)
    assert group_choice_pays(low, count)
    chosen = kernels.choose(x, low, bias, count)
    assert (chosen[:4] % groups == 5).float().mean() > 0.9
    assert_largest(chosen, low_scores(x, low, bias))


def test_chosen_are_the_largest_among_few_latents(kernels):
    weight, x, bias = on(normal(70, 24, seed=0), normal(19, 24, seed=1), normal(70, seed=2))
    low = kernels.low_precision(weight)
    assert not group_choice_pays(low, 30)
    # products come in bfloat16, so ties are many
    scores = low_scores(x, low, bias)
    chosen = kernels.choose(x, low, bias, 30).long()
    best = scores.topk(22, dim=1).indices
    for row in range(19):
        assert len(set(chosen[row].tolist())) == 30
        assert set(best[row].tolist()) <= set(chosen[row].tolist())


def test_equal_scores_choose_the_lower_latent(plain):
    low = plain.low_precision(torch.zeros(2000, 8, device=DEVICE))
    bias = torch.zeros(2000, device=DEVICE)
    chosen = plain.choose(torch.ones(2, 8, device=DEVICE), low, bias, 5)
    assert chosen.sort(dim=1).values.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_what_is_not_finite_is_chosen_and_seen(plain):
    weight, x, bias = on(normal(2000, 8, seed=0), normal(3, 8, seed=1), torch.zeros(2000))
    weight[1234] = torch.nan
    x[1, 3] = torch.nan
    x[2, 0] = torch.inf
    low = plain.low_precision(weight)
    chosen = plain.choose(x, low, bias, 6)
    assert 1234 in chosen[0].tolist()
    assert bool(((chosen >= 0) & (chosen < 2000)).all())
    indices, values = plain.exact(x, weight, bias, chosen, 4, relu=True)
    assert bool(values[0].isnan().any())
    assert bool(values[1].isnan().all())
    assert bool(((indices >= 0) & (indices < 2000)).all())
    above = plain.choose_above(x, low, bias, torch.full((2000,), 50.0, device=DEVICE))
    assert above[:, 0].tolist() == [1234, 0, 0]
    assert (above[1:, 1:] == -1).all()


def test_neighbours_stand_in_different_groups():
    low = GroupedLow(1000, 8, False, torch.device("cpu"))
    place = low.positions(torch.arange(1000))
    assert len(set(place.tolist())) == 1000
    assert torch.equal(low.latents()[place], torch.arange(1000))
    group = place // 128 * 4 + place % 4
    assert len(set(group[: low.groups].tolist())) == low.groups
    assert torch.bincount(group).max() <= 32


def test_low_rows_are_those_of_the_latents(kernels):
    weight, x = on(normal(300, 20, seed=0), normal(6, 20, seed=1))
    latents = torch.arange(3, 300, 2, device=DEVICE)
    bias = torch.zeros(len(latents), device=DEVICE)
    some = kernels.low_precision(weight).rows(latents)
    fresh = kernels.low_precision(weight[latents])
    assert torch.equal(low_scores(x, some, bias), low_scores(x, fresh, bias))
    assert torch.equal(some.spread, fresh.spread)


def test_refreshed_low_is_that_of_the_new_weight(kernels):
    weight, new, x = on(normal(90, 20, seed=0), normal(90, 20, seed=1), normal(6, 20, seed=2))
    low = kernels.low_precision(weight)
    kernels.refresh(low, new)
    bias = torch.zeros(90, device=DEVICE)
    expected = low_scores(x, kernels.low_precision(new), bias)
    assert torch.equal(low_scores(x, low, bias), expected)


def test_candidates_cover_the_error_of_low_precision(kernels):
    weight, x = on(normal(3000, 48, seed=0), normal(64, 48, seed=1))
    low = kernels.low_precision(weight)
    count = low.candidates(8)
    best = (x.double() @ weight.double().T).topk(8, dim=1).indices
    bias = torch.zeros(3000, device=DEVICE)
    chosen = low_scores(x, low, bias).topk(count, dim=1).indices
    assert (best.unsqueeze(2) == chosen.unsqueeze(1)).any(2).all()
    assert low.candidates(2999) == 3000


@pytest.mark.parametrize("fp8", [False, True] if HAS_FP8 else [False])
def test_tiles_loaded_without_the_copy_engine_give_the_same_bits(monkeypatch, fp8):
    weight, x = on(normal(300, 40, seed=0), normal(19, 40, seed=1))
    low = TritonKernels(DEVICE, fp8).low_precision(weight)
    short, scale = shorten(x, fp8)
    offsets = low.by_position(torch.zeros(300, device=DEVICE), -torch.inf)
    results = []
    for engine in {False, triton_scores.has_copy_engine(DEVICE)}:
        monkeypatch.setattr(triton_scores, "has_copy_engine", lambda device, engine=engine: engine)
        results.append(triton_scores.group_maxima(short, 1 / scale, low, offsets)[:19])
    assert all(torch.equal(results[0], other) for other in results)


def test_above_are_all_that_reach_their_floor_and_few_more(kernels):
    weight, x, bias = on(normal(600, 40, seed=0), normal(19, 40, seed=1), normal(600, seed=2))
    floor = on(5 + normal(600, seed=3))[0]
    floor[::7] = torch.inf
    weight[11] = 0
    bias[11], floor[11] = 1.0, 0.5
    low = kernels.low_precision(weight)
    above = kernels.choose_above(x, low, bias, floor)
    exact = x.double() @ weight.double().T + bias
    doubt = low.doubt(x).unsqueeze(1).double() * low.spread
    scores = low_scores(x, low, bias)
    assert bool((((scores - exact).abs() < doubt) | (doubt == 0)).float().mean() > 0.999)
    for row in range(19):
        latents = above[row][above[row] >= 0].tolist()
        assert above[row].tolist() == latents + [-1] * (above.shape[1] - len(latents))
        assert latents == sorted(set(latents))
        assert set((exact[row] >= floor).nonzero().flatten().tolist()) <= set(latents)
        slack = doubt[row] + 1e-4
        assert (scores[row] + slack >= floor)[latents].all()
        assert 11 in latents
    assert above.shape[1] == int((above >= 0).sum(1).max())


def test_nothing_above_is_one_empty_place(plain):
    weight, x = on(normal(40, 8, seed=0), normal(3, 8, seed=1))
    low, bias = plain.low_precision(weight), torch.zeros(40, device=DEVICE)
    above = plain.choose_above(x, low, bias, torch.full((40,), 1e6, device=DEVICE))
    assert above.tolist() == [[-1]] * 3


@pytest.mark.parametrize("relu", [False, True])
def test_exact_values_are_the_largest_in_order(plain, relu):
    weight, x, bias = normal(50, 300, seed=0), normal(11, 300, seed=1), normal(50, seed=2)
    weight[7] = weight[30]
    bias[7] = bias[30]
    candidates = torch.stack([torch.randperm(50)[:40] for _ in range(11)]).int()
    candidates[:, :2] = torch.tensor([30, 7])
    candidates[:, 2:] = torch.tensor([c for c in range(50) if c not in (7, 30)][:38])
    indices, values = plain.exact(*on(x, weight, bias, candidates), 25, relu)
    expected, where = CpuKernels().exact(x, weight, bias, candidates.sort(dim=1).values, 25, relu)[
        ::-1
    ]
    torch.testing.assert_close(values.cpu(), expected, rtol=1e-5, atol=1e-4)
    dense = x.double() @ weight.double().T + bias
    got = dense.gather(1, indices.cpu().long())
    torch.testing.assert_close(
        got.clamp(min=0) if relu else got, values.cpu().double(), rtol=1e-5, atol=1e-4
    )
    assert (indices.cpu() == where).float().mean() > 0.99
    for row in indices.tolist():  # equal values: the lower latent first
        assert (7 in row) == (30 in row) or row[-1] == 7
        assert 30 not in row or row.index(30) == row.index(7) + 1


def test_preactivations_are_exact_and_none_is_minus_infinity(plain):
    weight, x, bias = normal(50, 300, seed=0), normal(11, 300, seed=1), normal(50, seed=2)
    indices = torch.randint(-1, 50, (11, 21), generator=torch.Generator().manual_seed(0)).int()
    indices[3] = -1
    got = plain.preactivations(*on(x, weight, bias, indices)).cpu()
    dense = (x.double() @ weight.double().T + bias).gather(1, indices.clamp(min=0).long())
    dense = dense.masked_fill(indices < 0, -torch.inf)
    torch.testing.assert_close(got.double(), dense, rtol=1e-5, atol=1e-4)


def test_decode_adds_the_weighted_rows(plain):
    weight, out, values = normal(50, 300, seed=0), normal(7, 300, seed=1), normal(7, 21, seed=2)
    indices = torch.randint(-1, 50, (7, 21), generator=torch.Generator().manual_seed(0)).int()
    weight[13] = torch.nan  # multiplied by nothing, it must not matter
    values[indices == 13] = 0
    there = values.masked_fill(indices < 0, 0).double()
    rows = weight.nan_to_num().double()[indices.clamp(min=0).long()]
    expected = out.double() + (there.unsqueeze(2) * rows).sum(1)
    (here,) = on(out)
    plain.decode(*on(indices, values, weight), here)
    torch.testing.assert_close(here.cpu().double(), expected, rtol=1e-5, atol=1e-5)


def some_pairs(gain: bool, extra: bool) -> tuple[Pairs, Tensor, Tensor, Tensor]:
    """Pairs of 23 rows and 30 latents, one of them in every row; error, centred, weight_dec."""
    generator = torch.Generator().manual_seed(5)
    indices = torch.stack([torch.randperm(29, generator=generator)[:7] for _ in range(23)]).int()
    indices[:, 2] = 29
    indices[indices == 4] = -1  # a latent without pairs
    values = normal(23, 7, seed=6).clamp(min=0)
    rise = (normal(23, 7, seed=7) > 0).float() * 1.5 if gain else None
    penalty = normal(23, 7, seed=8) if extra else None
    weight_dec = torch.nn.functional.normalize(normal(30, 40, seed=9))
    pairs = Pairs(indices, values, rise, penalty)
    return pairs, normal(23, 40, seed=10), normal(23, 24, seed=11), weight_dec


@pytest.mark.parametrize(
    ("gain", "extra", "add", "decoder", "long"),
    [
        (False, False, False, True, 256),
        (True, False, False, True, 4),
        (True, True, True, True, 4),
        (False, True, True, False, 4),
        (True, True, False, False, 256),
    ],
)
def test_gradients_equal_autograd_through_dense_latents(
    plain, monkeypatch, gain, extra, add, decoder, long
):
    monkeypatch.setattr(by_latent, "LONG", long)
    pairs, error, centred, weight_dec = some_pairs(gain, extra)
    oracle = pair_gradients(pairs, error, centred, weight_dec)
    into = Gradients.like(*on(torch.zeros(30, 24), weight_dec))
    for buffer in (into.enc, into.dec, into.bias, into.squares):
        buffer.fill_(0.5 if add else torch.nan)
    slopes = torch.full((23, 7), torch.nan, device=DEVICE)
    here = Pairs(*(None if t is None else on(t)[0] for t in vars(pairs).values()))
    counts = plain.gradients(
        here, *on(error, centred, weight_dec), into, add=add, decoder=decoder, slopes=slopes
    )
    before = 0.5 if add else 0.0
    dec = oracle.dec if decoder else 0 * oracle.dec
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(into.enc.cpu().double(), oracle.enc + before, **close)
    torch.testing.assert_close(into.dec.cpu().double(), dec + before, **close)
    torch.testing.assert_close(into.bias.cpu().double(), oracle.bias + before, **close)
    torch.testing.assert_close(slopes.cpu().double(), oracle.slopes, **close)
    squares = into.enc.square().sum(1) + into.dec.square().sum(1)
    if add:
        squares[4] = 0.5  # left alone, as it was
    torch.testing.assert_close(into.squares, squares, **close)
    live = pairs.indices >= 0
    if pairs.gain is not None:
        live = live & ((pairs.values != 0) | (pairs.gain != 0))
    expected = torch.bincount(pairs.indices[live].long(), minlength=30)
    assert counts.dtype == torch.int64
    assert torch.equal(counts.cpu(), expected)


def test_gradients_and_sums_are_the_same_bits_again(plain, monkeypatch):
    monkeypatch.setattr(by_latent, "LONG", 4)
    pairs, error, centred, weight_dec = some_pairs(False, False)
    here = Pairs(*on(pairs.indices, pairs.values))
    results = []
    for _ in range(2):
        into = Gradients.like(*on(torch.zeros(30, 24), weight_dec))
        plain.gradients(here, *on(error, centred, weight_dec), into, add=False)
        results.append((into.enc, into.dec, into.bias, into.squares))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_sums_by_latent(plain):
    pairs, *_ = some_pairs(False, False)
    terms = normal(23, 7, seed=3)
    there = pairs.indices >= 0
    expected = torch.zeros(30, dtype=torch.float64)
    expected.index_add_(0, pairs.indices[there].long(), terms[there].double())
    sums = plain.latent_sums(*on(pairs.indices, terms), 30)
    torch.testing.assert_close(sums.cpu().double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("unit_rows", [False, True])
def test_adam_equals_torch_adam(plain, unit_rows):
    weight = torch.nn.functional.normalize(normal(13, 24, seed=0))
    parameter = torch.nn.Parameter(weight.double().clone())
    adam = torch.optim.Adam([parameter], lr=0.01, betas=(0.9, 0.999), eps=6.25e-10)
    mine = on(weight, torch.zeros(13, 24), torch.zeros(13, 24), weight)
    expected = weight.double().clone()
    for step in range(1, 4):
        gradient = normal(13, 24, seed=step)
        parameter.grad = 0.25 * gradient.double()
        adam.step()
        if unit_rows:
            parameter.data /= parameter.data.norm(dim=1, keepdim=True)
        expected = 0.8 * expected + 0.2 * parameter.data
        numbers = AdamNumbers(
            scale=0.25,
            rate=0.01 / (1 - 0.9**step),
            beta1=0.9,
            beta2=0.999,
            root=(1 - 0.999**step) ** -0.5,
            eps=6.25e-10,
            keep=0.8,
        )
        plain.adam(mine[0], *on(gradient), *mine[1:], numbers, unit_rows)
    torch.testing.assert_close(mine[0].cpu().double(), parameter.data, rtol=0, atol=1e-6)
    torch.testing.assert_close(mine[3].cpu().double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "fp8"),
    [
        ({"k": 4}, False),
        ({"k": 4, "activation": "jumprelu"}, HAS_FP8),
        ({"activation": "gated", "l1": 0.1}, False),
    ],
    ids=["topk", "jumprelu", "gated"],
)
def test_training_goes_as_on_the_processor(fields, fp8):
    kernels = TritonKernels(DEVICE, fp8)
    config = TrainConfig(n_latents=40, tokens=100, batch_rows=12, k_aux=8, lr=0.01, **fields)
    x = 3 * normal(12, 20, seed=0) + 1
    model = {"name": "", "weights": ""}
    metrics, weights = [], []
    for chosen, device in ((CpuKernels(), torch.device("cpu")), (kernels, DEVICE)):
        begun = Learner.begin(config, "resid_post.1", x, None, torch.device("cpu"), model)
        tensors = {name: t.to(device, copy=True) for name, t in begun.sae.tensors().items()}
        sae = SAE(begun.sae.config, **tensors)
        sae.kernels = chosen
        learner = Learner(config, sae, begun.numbers()["total_variance"])
        learner.tensors()["last_fired"][:20] = -(10**9)  # dead: AuxK takes part
        metrics.append([learner.advance((x + step).to(device)) for step in range(2)])
        weights.append({name: t.cpu() for name, t in sae.tensors().items()})
    for ours, theirs in zip(*metrics, strict=True):
        for name in ("loss", "auxk", "l0", "fvu", "grad_norm"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-4), name
    for name in weights[0]:
        torch.testing.assert_close(weights[1][name], weights[0][name], rtol=1e-3, atol=1e-4)
