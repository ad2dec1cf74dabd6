"""The fused loss kernel, executed on the CPU, against the definition in float64: as near to it as plain torch is."""

from __future__ import annotations

import itertools

import emulated
import pytest
import torch
from test_loss import REDUCTIONS, SIBLINGS, dense, found, gradients, problem

import cascade_engine as ce
from cascade_engine import loss as losses
from cascade_engine.kernels.cuda import Engine


@pytest.fixture(scope="module")
def native():
    return emulated.emulated()


@pytest.fixture
def on_emulation(native, monkeypatch):
    """Let `multi_positive_nce` run the emulated kernel in the operator's place."""

    monkeypatch.setattr(losses, "nce_now", emulated.loss_operator(native))


# B, K, D, positives: several tiles of queries and of keys, rests in each, more columns than a block has threads
SHAPES = [(5, 40, 8, 3), (3, 1, 2, 2), (4, 0, 6, 2), (0, 7, 4, 2), (18, 300, 33, 0), (2, 130, 3, 90), (3, 260, 140, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("schedule", "blocks"), [(0, 1), (1, 2), (7, 528)])
def test_emulated_loss_and_gradients_equal_the_definition(native, monkeypatch, shape, schedule, blocks):
    monkeypatch.setattr(losses, "nce_now", emulated.loss_operator(native, blocks=blocks))
    emulated.schedule(native, schedule)
    options = list(itertools.product(REDUCTIONS, SIBLINGS, ("always", "never", 0.6)))
    for reduction, siblings, self_positive in options[schedule % 4 :: 4] if shape[1] > 64 else options:
        query, key, keys, index, own, other = problem(*shape)
        query, key = query.float(), key.float()
        drop = torch.rand(len(query), generator=torch.Generator().manual_seed(3)) < 0.6
        bank = ce.Bank({"rgb": keys}, video_id=other)
        for ids in (None, own):

            def mine(q, x, ids=ids, options=(reduction, siblings, self_positive), bank=bank, index=index):
                return ce.multi_positive_nce(
                    q, x, bank, found(index), reduction=options[0], siblings=options[1], self_positive=options[2],
                    query_video_id=ids, generator=torch.Generator().manual_seed(3),
                )  # fmt: skip

            def want(q, x, ids=ids, options=(reduction, siblings, self_positive), case=(keys, index, other, drop)):
                return dense(
                    q, x, case[0].double(), case[1], reduction=options[0], siblings=options[1],
                    drop=case[3] if options[2] == 0.6 else None, never=options[2] == "never",
                    own_video=None if ids is None else (ids, case[2]),
                )  # fmt: skip

            expected = gradients(want, query.double(), key.double())
            for got, right in zip(gradients(mine, query, key), expected, strict=True):
                torch.testing.assert_close(got.double(), right, rtol=2e-5, atol=2e-6)


def error(got, want) -> list[float]:
    return [float((g.double() - w).norm()) for g, w in zip(got, want, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", ["plain", "confident", "cold"])
def test_emulated_loss_is_at_most_twice_as_far_from_float64_as_plain_torch(
    native, on_emulation, dtype, reduction, case
):
    emulated.schedule(native, 3)
    ours, theirs, least = [0.0] * 3, [0.0] * 3, [0.0] * 3
    for seed in range(3):
        query, key, keys, index, _, _ = problem(6, 400, 64, 5, seed)
        if case == "confident":  # P holds nearly all of the mass: gradients nearly cancel
            query = keys[index[:, 0].clamp(min=0)].double()
        query, key, keys = query.float(), key.float(), keys.to(dtype)
        tau = 0.003 if case == "cold" else 0.07
        bank = ce.Bank({"rgb": keys})

        def mine(q, x, bank=bank, index=index, tau=tau):
            return ce.multi_positive_nce(q, x, bank, found(index), temperature=tau, reduction=reduction)

        def plain(q, x, keys=keys, index=index, tau=tau):
            return dense(q, x, keys.to(q.dtype), index, tau=tau, reduction=reduction)

        want = gradients(plain, query.double(), key.double())
        for each, got in ((ours, gradients(mine, query, key)), (theirs, gradients(plain, query, key))):
            each[:] = [sofar + more for sofar, more in zip(each, error(got, want), strict=True)]
        least[:] = [sofar + float(w.norm()) * 2.0**-24 for sofar, w in zip(least, want, strict=True)]
    for mine_off, their_off, ulp in zip(ours, theirs, least, strict=True):
        assert mine_off <= 2 * max(their_off, ulp)


def test_emulated_loss_takes_one_launch_and_wide_rows(native, on_emulation):
    emulated.schedule(native, 2)
    query, key, keys, index, _, _ = problem(2, 150, 600, 3)
    padded = torch.zeros(150, 608)
    padded[:, :600] = keys
    bank = ce.Bank({"rgb": padded[:, :600]})
    emulated.reset_counters(native)
    found_here = gradients(lambda q, x: ce.multi_positive_nce(q, x, bank, found(index)), query.float(), key.float())
    assert emulated.counters(native)["launches"] == 1
    want = gradients(lambda q, x: dense(q, x, keys, index), query, key)
    for got, right in zip(found_here, want, strict=True):
        torch.testing.assert_close(got.double(), right, rtol=1e-4, atol=1e-5)


def test_emulated_loss_without_gradients_has_none(native):
    query, own = torch.randn(3, 5), torch.zeros(3)
    none = torch.zeros(0, dtype=torch.int64)
    each, to_query, to_own, counted = Engine(native).contrast(
        query, own, torch.randn(9, 5), none.new_zeros(3, 0), none, none, 0, torch.zeros(3, dtype=torch.bool),
        temperature=0.1, own_positive=True, mean_log=False, differentiate=False,
    )  # fmt: skip
    assert counted.all()
    assert each.dtype == torch.float64
    assert bool((each > 0).all())
    assert len(to_query) == len(to_own) == 0


def test_emulated_loss_has_the_same_bits_whatever_the_order_of_threads(native, on_emulation):
    """Siblings are found in any order: both those that are listed, and those of a query that has too many."""
    query, key, keys, index, own, other = problem(20, 300, 21, 4, videos=9)
    other[:45] = 100
    own[3] = 100
    bank = ce.Bank({"rgb": keys}, video_id=other)
    found_here = []
    for schedule in (0, 1, 7, 8):
        emulated.schedule(native, schedule)
        found_here.append(
            gradients(
                lambda q, x: ce.multi_positive_nce(q, x, bank, found(index), query_video_id=own),
                query.float(),
                key.float(),
            )
        )
    for again in found_here[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found_here[0], again, strict=True))


@pytest.mark.parametrize("siblings", SIBLINGS)
def test_emulated_loss_is_a_mean_over_those_that_have_a_positive(native, on_emulation, siblings):
    emulated.schedule(native, 5)
    query, key, keys, index, own, other = problem(7, 90, 9, 2, seed=4)
    index[::2], own[:4] = -1, 77  # of four without a mined positive, two have no siblings either
    bank = ce.Bank({"rgb": keys}, video_id=other)

    def mine(q, x):
        return ce.multi_positive_nce(
            q, x, bank, found(index), query_video_id=own, self_positive="never", siblings=siblings
        )

    def want(q, x):
        return dense(q, x, keys.double(), index, never=True, own_video=(own, other), siblings=siblings)

    expected = gradients(want, query, key)
    for got, right in zip(gradients(mine, query.float(), key.float()), expected, strict=True):
        torch.testing.assert_close(got.double(), right, rtol=2e-5, atol=2e-6)
