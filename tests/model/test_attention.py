"""Attention and its scores against transformers' own eager attention."""

import pytest
import torch
from transformers.models.bert.modeling_bert import eager_attention_forward

from model.attention import FEW_KEYS, WIDTH_STEP, attention

B, H, L, HEAD = 3, 2, 7, 4
MASK_BL = torch.arange(L) < torch.tensor([7, 4, 1])[:, None]


@pytest.fixture
def heads():
    """Query, key and value, (B, H, L, d) each."""
    generator = torch.Generator().manual_seed(0)
    return tuple(2 * torch.randn(B, H, L, HEAD, generator=generator) for _ in range(3))


def eager(heads, mask):
    """Context (B, H, L, d) and weights (B, H, L, L) as transformers computes them in the open."""
    bias = None if mask is None else torch.zeros(B, 1, 1, L).masked_fill(~mask[:, None, None, :], -1e9)
    context, weights = eager_attention_forward(torch.nn.Module().eval(), *heads, bias)
    return context.transpose(1, 2), weights


@pytest.mark.parametrize("with_scores", [False, True])
@pytest.mark.parametrize("mask", [None, MASK_BL], ids=["unpadded", "padded"])
def test_the_context_is_that_of_eager_attention(heads, mask, with_scores):
    context, score = attention(*heads, mask, 0.0, with_scores)
    torch.testing.assert_close(context, eager(heads, mask)[0])
    assert (score is not None) == with_scores


@pytest.mark.parametrize("mask", [None, MASK_BL], ids=["unpadded", "padded"])
def test_a_score_sums_what_the_real_queries_of_all_heads_attend(heads, mask):
    _, score = attention(*heads, mask, 0.0, with_scores=True)
    _, weights = eager(heads, mask)
    for sequence in range(B):
        real = L if mask is None else int(mask[sequence].sum())
        for token in range(real):
            received = sum(weights[sequence, head, query, token].item() for head in range(H) for query in range(real))
            assert score[sequence, token].item() == pytest.approx(received, rel=1e-5)


@pytest.mark.parametrize("mask", [None, MASK_BL], ids=["unpadded", "padded"])
def test_a_score_by_value_weighs_each_head_by_the_norm_of_its_value(heads, mask):
    context, score = attention(*heads, mask, 0.0, with_scores=True, by_value=True)
    plain, _ = attention(*heads, mask, 0.0, with_scores=True)
    torch.testing.assert_close(context, plain, rtol=0, atol=0)
    _, weights = eager(heads, mask)
    value = heads[2]
    for sequence in range(B):
        real = L if mask is None else int(mask[sequence].sum())
        for token in range(real):
            received = sum(
                weights[sequence, head, query, token].item() * value[sequence, head, token].norm().item()
                for head in range(H)
                for query in range(real)
            )
            assert score[sequence, token].item() == pytest.approx(received, rel=1e-5)


def test_dropout_thins_the_context_but_not_the_scores(heads):
    plain, score = attention(*heads, MASK_BL, 0.0, with_scores=True)
    torch.manual_seed(0)
    thinned, same_score = attention(*heads, MASK_BL, 0.5, with_scores=True)
    torch.testing.assert_close(same_score, score, rtol=0, atol=0)
    assert not torch.allclose(thinned, plain)


def test_scores_select_and_carry_no_gradient(heads):
    query, key, value = (part.requires_grad_() for part in heads)
    context, score = attention(query, key, value, MASK_BL, 0.0, with_scores=True)
    assert context.requires_grad
    assert not score.requires_grad


def test_scores_are_single_precision_whatever_the_vectors_are(heads):
    context, score = attention(*(part.bfloat16() for part in heads), None, 0.0, with_scores=True)
    assert (context.dtype, score.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("by_value", [False, True])
@pytest.mark.parametrize("mask", [None, MASK_BL], ids=["unpadded", "padded"])
@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("inferring", [False, True], ids=["learning", "inferring"])
def test_scores_of_a_few_sequences_at_a_time_are_those_of_all(heads, mask, by_value, together, inferring, monkeypatch):
    whole = attention(*heads, mask, 0.0, with_scores=True, by_value=by_value)
    monkeypatch.setattr("model.attention.WEIGHT_BYTES", together * H * L * L * 4)
    sizes = []
    owner, name, width = torch.Tensor, "softmax", L
    if inferring:
        owner, name, width = (torch.Tensor, "exp_", L) if mask is None else (torch, "softmax", WIDTH_STEP)
    weigh = getattr(owner, name)

    def noted(weights, *args, **kwargs):
        sizes.append(weights.numel())
        return weigh(weights, *args, **kwargs)

    monkeypatch.setattr(owner, name, noted)
    with torch.inference_mode(inferring):
        parts = attention(*heads, mask, 0.0, with_scores=True, by_value=by_value)
    assert sizes == [size * H * L * width for size in ([1, 1, 1] if together == 1 else [2, 1])]
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("with_scores", [False, True])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e-6])
@pytest.mark.parametrize("shift", [0.0, 200.0, -200.0], ids=["", "all high", "all low"])
def test_inference_is_exact_however_large_the_products_are(heads, scale, shift, with_scores):
    query, key, value = heads
    query, key = scale * query, scale * key
    query[..., 0], key[..., 0] = abs(shift) ** 0.5, shift / max(1.0, abs(shift) ** 0.5) * HEAD**0.5
    exact = attention(query.double(), key.double(), value.double(), None, 0.0, with_scores, by_value=True)
    with torch.inference_mode():
        inferring = attention(query, key, value, None, 0.0, with_scores, by_value=True)
    lost = torch.finfo(torch.float32).eps * abs(shift) * value.abs().max().item()  # with the products, before a softmax
    for one, other in zip(inferring, exact, strict=True):
        if other is None:
            assert one is None
            continue
        assert one.isfinite().all()
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-4, atol=1e-5 + lost)


LENGTHS = (1, 2, 12, 13, 16, 17, 28, 29, 40)
assert {*FEW_KEYS.values()} <= {*LENGTHS}


def of_length(tokens, mask, bias):
    """Queries, keys and values of 3 sequences, and of which tokens they are and what is added to their products."""
    draws = torch.Generator().manual_seed(tokens)
    real = torch.arange(tokens) < torch.tensor([tokens, 1, max(1, tokens - 3)])[:, None]
    bias_BHLL = torch.randn(3 if bias == "own" else 1, 1 if bias == "all heads" else H, tokens, tokens, generator=draws)
    bias_BHLL[..., 0, 1:] = torch.finfo(torch.float32).min
    return torch.randn(3, 3, H, tokens, HEAD, generator=draws), real if mask else None, bias_BHLL if bias else None


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("mask", [False, True], ids=["unpadded", "padded"])
@pytest.mark.parametrize("bias", [None, "own", "shared", "all heads"])
@pytest.mark.parametrize("with_scores", [False, True])
def test_inference_gives_what_learning_gives_however_long_the_sequences_are(tokens, mask, bias, with_scores):
    heads, real, bias_BHLL = of_length(tokens, mask, bias)
    learning = attention(*heads, real, 0.0, with_scores, by_value=True, bias_BHLL=bias_BHLL)
    with torch.inference_mode():
        inferring = attention(*heads, real, 0.0, with_scores, by_value=True, bias_BHLL=bias_BHLL)
    real = torch.ones(3, tokens, dtype=torch.bool) if real is None else real
    for one, other in zip(inferring, learning, strict=True):
        if other is None:
            assert one is None
            continue
        seen = real if other.dim() == 2 else real[:, None].expand(-1, H, -1)
        torch.testing.assert_close(one[seen], other[seen], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("mask", [False, True], ids=["unpadded", "padded"])
@pytest.mark.parametrize("rounded_from", [0, 10**9], ids=["rounded", "not worth it"])
def test_values_in_bf16_are_multiplied_with_weights_that_are_rounded_last(tokens, mask, rounded_from, monkeypatch):
    monkeypatch.setattr("model.attention.WORTH_ROUNDING", rounded_from)
    heads, real, _ = of_length(tokens, mask, None)
    heads = heads.bfloat16()
    exact, scores = attention(*heads.double(), real, 0.0, with_scores=True, by_value=True)
    with torch.inference_mode():
        context, received = attention(*heads, real, 0.0, with_scores=True, by_value=True)
    assert (context.dtype, received.dtype) == (torch.bfloat16, torch.float32)
    real = torch.ones(3, tokens, dtype=torch.bool) if real is None else real
    seen = real[:, None].expand(-1, H, -1)
    torch.testing.assert_close(context[seen].double(), exact[seen], rtol=0.01, atol=0.01)
    torch.testing.assert_close(received[real].double(), scores[real].double(), rtol=1e-4, atol=1e-5)


def test_inference_carries_what_is_not_a_number(heads):
    query, key, value = heads
    query[0, 0, 0, 0] = torch.nan
    with torch.inference_mode():
        context, score = attention(query, key, value, None, 0.0, with_scores=True)
    assert context[0, 0, 0].isnan().all()
    assert score[0].isnan().all()
    assert score[1:].isfinite().all()
