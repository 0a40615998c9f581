import pytest
import torch
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sae_accel.ops import Selection, sparse, sparse_decode, sparse_encode


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def draw_whole_numbers(*shape, seed=0):
    """Products and sums of these are exact, so that results can be compared to the last bit whatever the order."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randint(-10_000, 10_000, shape, generator=generator).double().requires_grad_()


def draw_indices(tokens, k, num_latents):
    """With repetitions, also for one token, as AuxK makes them."""
    return torch.randint(num_latents, (tokens, k), generator=torch.Generator().manual_seed(3))


def top(k):
    return lambda pre_activations: tuple(pre_activations.topk(k, dim=-1))


def fixed(indices):
    return lambda pre_activations: (pre_activations.gather(-1, indices), indices)


def encode_and_decode(x, weight, bias, shift, decoder, select):
    values, selection = sparse_encode(x, weight, bias, shift, select)
    return sparse_decode(values.relu(), selection, decoder)


def relative_error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("with_shift", [True, False])
def test_sparse_encode_gives_the_selected_pre_activations(with_shift):
    x, weight, bias, shift = draw(9, 5), draw(12, 5), draw(12), draw(5) if with_shift else None
    values, selection = sparse_encode(x, weight, bias, shift, top(4))
    expected = ((x - shift if with_shift else x) @ weight.T + bias).topk(4)
    torch.testing.assert_close(values, expected.values)
    assert torch.equal(selection.indices, expected.indices)


@pytest.mark.parametrize("with_shift", [True, False])
@pytest.mark.parametrize("select", [top(4), fixed(draw_indices(9, 4, 12))], ids=["topk", "repeated indices"])
def test_sparse_encode_passes_gradcheck(with_shift, select):
    x, weight, bias, shift = draw(9, 5), draw(12, 5), draw(12), draw(5) if with_shift else None
    assert gradcheck(lambda *inputs: sparse_encode(*inputs, select)[0], (x, weight, bias, shift))


def test_sparse_decode_gives_the_sum_of_the_selected_rows():
    acts, weight, indices = draw(9, 4), draw(12, 7), draw_indices(9, 4, 12)
    expected = (acts[..., None] * weight[indices]).sum(1)
    torch.testing.assert_close(sparse_decode(acts, Selection(indices, 12), weight), expected)


def test_sparse_decode_passes_gradcheck():
    selection = Selection(draw_indices(9, 4, 12), 12)
    assert gradcheck(lambda acts, weight: sparse_decode(acts, selection, weight), (draw(9, 4), draw(12, 7)))


def test_gradients_through_encoder_and_decoder_are_those_of_dense_autograd():
    inputs = draw(30, 5), draw(64, 5), draw(64), draw(5), draw(64, 7)
    x, weight, bias, shift, decoder = inputs
    best = ((x - shift) @ weight.T + bias).topk(6)
    dense = torch.zeros(30, 64, dtype=torch.float64).scatter(-1, best.indices, best.values.relu()) @ decoder
    found = encode_and_decode(*inputs, top(6))
    torch.testing.assert_close(found, dense)
    upstream = draw(30, 7, seed=9).detach()
    for grad, expected in zip(
        torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(dense, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("threshold", [0.5, 7.0, 1e9], ids=["many", "few", "none"])
def test_where_tokens_use_different_numbers_only_uses_are_worked_on(threshold):
    def select(pre_activations):
        values, indices = pre_activations.topk(40, dim=-1)
        return values.masked_fill(values < threshold, -torch.inf), indices

    inputs = draw(30, 5), draw(64, 5), draw(64), draw(5), draw(64, 7)
    x, weight, bias, shift, decoder = inputs
    pre_activations = (x - shift) @ weight.T + bias
    active = pre_activations >= threshold
    assert active.sum(-1).max() <= 40 and (active.sum(-1) == 0).any() == (threshold > 1)
    values, selection = sparse_encode(*inputs[:4], select, is_ragged=True)
    assert selection.latents.shape == selection.tokens.shape == (active.sum(),)
    assert torch.equal(selection.by_token(selection.flat(values)), values.masked_fill(values == -torch.inf, 0))
    acts = selection.by_token(selection.flat(values).pow(2))
    found = (sparse_decode(acts, selection, decoder), selection.scatter(acts))
    dense = pre_activations.masked_fill(~active, 0).pow(2)
    torch.testing.assert_close(found, (dense @ decoder, dense.sum(0)))
    upstream = draw(30, 7, seed=9).detach()
    pair = [torch.autograd.grad(result, inputs, upstream) for result in (found[0], dense @ decoder)]
    for grad, expected in zip(*pair, strict=True):
        torch.testing.assert_close(grad, expected)
    narrow = selection.columns(0, 3)
    assert torch.equal(narrow.latents, narrow.indices[values[:, :3] > -torch.inf])


def test_an_inputs_gradient_does_not_depend_on_which_others_need_one():
    inputs = [draw(*shape) for shape in ((9, 5), (12, 5), (12,), (5,), (12, 7))]
    expected = torch.autograd.grad(encode_and_decode(*inputs, top(4)).pow(2).sum(), inputs)
    for i, whole in enumerate(expected):
        alone = [tensor.detach().requires_grad_(i == j) for j, tensor in enumerate(inputs)]
        found = torch.autograd.grad(encode_and_decode(*alone, top(4)).pow(2).sum(), alone[i])[0]
        assert torch.equal(found, whole)


def test_latents_that_no_token_uses_get_zero_gradient():
    weight, decoder = draw(64, 5), draw(64, 7)
    indices = draw_indices(9, 4, 12) + 20
    result = encode_and_decode(draw(9, 5), weight, draw(64), draw(5), decoder, fixed(indices))
    unused = torch.ones(64, dtype=torch.bool)
    unused[indices] = False
    assert unused[0] and unused[-1]
    for grad in torch.autograd.grad(result.sum(), (weight, decoder)):
        assert (grad[unused] == 0).all() and (grad[~unused] != 0).any()


def test_the_shift_takes_minus_the_gradient_of_the_input():
    x, shift = draw(9, 5), draw(5)
    values, _ = sparse_encode(x, draw(12, 5), draw(12), shift, top(4))
    grad_x, grad_shift = torch.autograd.grad(values.pow(2).sum(), (x, shift))
    torch.testing.assert_close(grad_shift, -grad_x.sum(0))


# Of a head whose pre-activations of one token are too many, a piece is still one token.
@pytest.mark.parametrize("rows", [0, 1, 3, 10, 11])
def test_pieces_give_the_same_bits_as_one_piece(monkeypatch, rows):
    inputs = [draw_whole_numbers(*shape) for shape in ((10, 5), (12, 5), (12,), (5,), (12, 7))]
    upstream = draw_whole_numbers(10, 7, seed=9).detach()
    whole = encode_and_decode(*inputs, top(4))
    expected = torch.autograd.grad(whole, inputs, upstream)

    seen = []

    def select(pre_activations):
        seen.append(len(pre_activations))
        result = top(4)(pre_activations)
        # A selection may overwrite what it reads, as AuxK's does.
        pre_activations.fill_(torch.nan)
        return result

    monkeypatch.setattr(sparse, "MAX_PRE_ACTIVATIONS", rows * 12)
    found = encode_and_decode(*inputs, select)
    assert max(seen) == min(max(rows, 1), 10) and sum(seen) == 10
    assert torch.equal(found, whole)
    for grad, wanted in zip(torch.autograd.grad(found, inputs, upstream), expected, strict=True):
        assert torch.equal(grad, wanted)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operator gives."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        tensors = filter(torch.is_tensor, tree_leaves(result))
        self.numel = max([self.numel, *(tensor.untyped_storage().nbytes() // tensor.itemsize for tensor in tensors)])
        return result


@pytest.mark.parametrize("max_pre_activations", [2**26, 1000])
def test_no_tensor_of_tokens_by_k_by_width_is_made(monkeypatch, max_pre_activations):
    monkeypatch.setattr(sparse, "MAX_PRE_ACTIVATIONS", max_pre_activations)
    tokens, d, k, num_latents = 64, 32, 16, 100
    inputs = [draw(*shape) for shape in ((tokens, d), (num_latents, d), (num_latents,), (d,), (num_latents, d))]
    with LargestTensor() as ours:
        encode_and_decode(*inputs, top(k)).pow(2).sum().backward()
    assert 1000 <= ours.numel <= max(min(tokens * num_latents, max_pre_activations), num_latents * d)

    with LargestTensor() as naive:
        best = (inputs[0] @ inputs[1].T).topk(k)
        (best.values[..., None] * inputs[4][best.indices]).sum(1).pow(2).sum().backward()
    assert naive.numel == tokens * k * d


def test_gradients_of_two_runs_are_identical():
    inputs = [draw(*shape, dtype=torch.float32) for shape in ((2000, 64), (128, 64), (128,), (64,), (128, 64))]
    first, second = (torch.autograd.grad(encode_and_decode(*inputs, top(16)).pow(2).sum(), inputs) for _ in range(2))
    assert all(torch.equal(*grads) for grads in zip(first, second, strict=True))


def test_by_latent_keeps_the_order_of_tokens():
    selection = Selection(torch.tensor([[3, 1], [1, 3], [0, 3]]), 5)
    order, starts = selection.by_latent
    assert order.tolist() == [4, 1, 2, 0, 3, 5]
    assert starts.tolist() == [0, 1, 3, 3, 6]


def test_columns_share_the_order_only_if_they_are_all():
    selection = Selection(draw_indices(9, 4, 12), 12)
    assert selection.columns(0, 4) is selection and selection.columns(0, None) is selection
    assert torch.equal(selection.columns(1, 3).indices, selection.indices[:, 1:3])


def test_scatter_sums_values_by_latent():
    indices = torch.tensor([[3, 1], [1, 3], [0, 3]])
    values = torch.tensor([[1.0, 2.0], [4.0, 8.0], [16.0, 32.0]])
    assert Selection(indices, 5).scatter(values).tolist() == [16, 6, 0, 41, 0]


def test_autocast_takes_the_product_in_bfloat16_and_gives_float32_gradients():
    # Fixed, so that rounding selects no other latents.
    select = fixed(draw_indices(64, 8, 100))
    inputs = [draw(*shape, dtype=torch.float32) for shape in ((64, 32), (100, 32), (100,), (32,), (100, 32))]
    upstream = draw(64, 32, seed=9, dtype=torch.float32).detach()
    exact = encode_and_decode(*inputs, select)
    expected = torch.autograd.grad(exact, inputs, upstream)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values, selection = sparse_encode(*inputs[:4], select)
        rounded = sparse_decode(values.relu(), selection, inputs[4])
    assert torch.equal(values, values.bfloat16().float())
    assert rounded.dtype == torch.float32 and 0 < relative_error(rounded, exact) < 0.01
    for grad, wanted in zip(torch.autograd.grad(rounded, inputs, upstream), expected, strict=True):
        assert grad.dtype == torch.float32
        # The sign of a pre-activation next to zero may turn, so a few uses of latents come and go.
        assert relative_error(grad, wanted) < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_run_forward_and_backward(dtype):
    select = fixed(draw_indices(64, 8, 100))
    inputs = [draw(*shape, dtype=dtype) for shape in ((64, 32), (100, 32), (100,), (32,), (100, 32))]
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    upstream = draw(64, 32, seed=9, dtype=dtype).detach()
    found, exact = encode_and_decode(*inputs, select), encode_and_decode(*wide, select)
    assert found.dtype == dtype and relative_error(found, exact) < 0.02
    expected = torch.autograd.grad(exact, wide, upstream.double())
    for grad, wanted in zip(torch.autograd.grad(found, inputs, upstream), expected, strict=True):
        assert grad.dtype == dtype and relative_error(grad, wanted) < 0.05
