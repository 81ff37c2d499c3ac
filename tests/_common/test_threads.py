"""Audits on threads: what they set for the whole process is as it was when all are done."""

import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fadiag_fast import diagnose
from fadiag_fast._common.process import eager, forked_generators, own_warnings, prompt_switches
from fadiag_fast.zoo import build_model

SIZES = {"input_shape": (1, 4, 4), "num_classes": 4, "d_hidden": 8, "num_blocks": 2}


def batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 16, generator=generator), torch.arange(8) % 4) for _ in range(8)]


def test_networks_are_drawn_and_audited_on_threads_as_one_after_another():
    torch.manual_seed(5)
    before = torch.get_rng_state(), list(warnings.filters)
    expected = {}

    def draw_and_audit(seed):
        model = build_model("resmlp", seed=seed, **SIZES)
        report = diagnose(model, batches(), 0.5)
        return model.state_dict(), report.figures

    for seed in range(4):
        expected[seed] = draw_and_audit(seed)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(draw_and_audit, [seed % 4 for seed in range(24)]))
    for number, (weights, figures) in enumerate(found):
        same, told = expected[number % 4]
        assert all(torch.equal(weights[name], same[name]) for name in same)
        assert figures == told
    assert torch.equal(torch.get_rng_state(), before[0])
    assert warnings.filters == before[1]
    assert torch.backends.mha.get_fastpath_enabled()


def overlapping(context, inside):
    """Enter in one thread, then in another, and leave in the same order."""
    first_in, second_in, first_out = (threading.Event() for _ in range(3))

    def first():
        with context():
            first_in.set()
            assert second_in.wait(5)
        first_out.set()

    def second():
        assert first_in.wait(5)
        with context():
            second_in.set()
            assert first_out.wait(5)
            inside()

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(first), pool.submit(second)]:
            future.result()


def test_short_cuts_stay_shut_until_the_last_thread_leaves():
    import torch._dynamo
    from torch._dynamo import eval_frame

    def inside():
        assert not torch.backends.mha.get_fastpath_enabled()
        assert eval_frame._stance.stance == "force_eager"

    before = eval_frame._stance
    overlapping(eager, inside)
    assert torch.backends.mha.get_fastpath_enabled()
    assert eval_frame._stance == before
    with eager(), eager():
        inside()
    assert eval_frame._stance == before


def test_an_exception_opens_the_short_cuts_again():
    with pytest.raises(KeyError), eager():
        raise KeyError
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(("before", "meanwhile"), [(5e-3, 1e-4), (1e-5, 1e-5)])
def test_the_interpreter_changes_hands_soon_until_the_last_thread_leaves(before, meanwhile):
    def inside():
        assert sys.getswitchinterval() == pytest.approx(meanwhile)

    usual = sys.getswitchinterval()
    sys.setswitchinterval(before)
    try:
        overlapping(prompt_switches, inside)
        assert sys.getswitchinterval() == pytest.approx(before)
    finally:
        sys.setswitchinterval(usual)


def test_generators_are_put_back_by_threads_that_overlap():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    overlapping(lambda: forked_generators(()), lambda: None)
    assert torch.equal(torch.get_rng_state(), before)


def test_filters_of_warnings_belong_to_one_thread_at_a_time():
    entered, order = threading.Event(), []

    def other():
        entered.wait(5)
        with own_warnings():
            order.append("other")

    thread = threading.Thread(target=other)
    thread.start()
    before = list(warnings.filters)
    with own_warnings():
        entered.set()
        thread.join(0.1)
        warnings.simplefilter("error")
        order.append("first")
    thread.join(5)
    assert order == ["first", "other"]
    assert warnings.filters == before
