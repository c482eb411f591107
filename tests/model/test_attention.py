"""Attention and its scores against transformers' own eager attention."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.bert.modeling_bert import eager_attention_forward

from model.attention import attention

pytestmark = pytest.mark.usefixtures("one_thread")

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
    name = "exp_" if inferring and mask is None else "softmax"
    method = getattr(torch.Tensor, name)
    monkeypatch.setattr(torch.Tensor, name, lambda self, *dim: sizes.append(self.numel()) or method(self, *dim))
    with torch.inference_mode(inferring):
        parts = attention(*heads, mask, 0.0, with_scores=True, by_value=by_value)
    assert sizes == [size * H * L * L for size in ([1, 1, 1] if together == 1 else [2, 1])]
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("with_scores", [False, True])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e-6])
@pytest.mark.parametrize("shift", [0.0, 200.0, -200.0], ids=["", "all high", "all low"])
def test_inference_gives_what_training_gives_however_large_the_products_are(heads, scale, shift, with_scores):
    query, key, value = heads
    query, key = scale * query, scale * key
    query[..., 0], key[..., 0] = abs(shift) ** 0.5, shift / max(1.0, abs(shift) ** 0.5) * HEAD**0.5
    learning = attention(query, key, value, None, 0.0, with_scores, by_value=True)
    with torch.inference_mode():
        inferring = attention(query, key, value, None, 0.0, with_scores, by_value=True)
    torch.testing.assert_close(inferring, learning, rtol=1e-4, atol=1e-5)
    assert all(torch.isfinite(part).all() for part in inferring if part is not None)


@pytest.mark.parametrize("tokens", [1, 2, 32, 33])
def test_inference_gives_the_context_of_fused_attention_however_long_the_sequences_are(tokens):
    heads = torch.randn(3, 2, 3, tokens, HEAD, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        context, _ = attention(*heads, None, 0.0, with_scores=False)
    torch.testing.assert_close(context, F.scaled_dot_product_attention(*heads))


def test_inference_carries_what_is_not_a_number(heads):
    query, key, value = heads
    query[0, 0, 0, 0] = torch.nan
    with torch.inference_mode():
        context, score = attention(query, key, value, None, 0.0, with_scores=True)
    assert context[0, 0, 0].isnan().all()
    assert score[0].isnan().all()
    assert score[1:].isfinite().all()
