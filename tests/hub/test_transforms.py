"""Gradients of gradients and torch.func's transforms, against torch's own Linear of the same weights."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap

from hf_blockprune.hub.blockprune_linear import BlockSparseLinear
from hf_blockprune.hub.blockprune_ops import block_sparse_linear
from hf_blockprune.hub.blockprune_quantizer import sparsify
from tests.conftest import tiny_model

BLOCK = (4, 3)
X = torch.randn(5, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def layers(request):
    """A layer whose blocks do not divide it, with an empty block row, and the dense layer of its weights."""
    torch.manual_seed(0)
    mask = torch.rand(3, 5) < 0.6
    mask[1] = False
    sparse = BlockSparseLinear.from_dense(nn.Linear(14, 10, bias=request.param, dtype=torch.float64), mask, BLOCK)
    return sparse, sparse.to_dense()


def packed_like(sparse, weight):
    """A dense gradient as the block-sparse layer has it: its kept blocks, zeros past the edge."""
    filled = nn.functional.pad(weight, (0, 1, 0, 2)).view(3, 4, 5, 3)
    return filled.transpose(1, 2)[sparse.mask()]


@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh"])
def test_second_gradients_agree_with_finite_differences(layers, activation):
    sparse, _ = layers
    tensors = [t.detach().clone().requires_grad_() for t in (X, sparse.weight, sparse.bias) if t is not None]

    def call(x, weight, bias=None):
        pattern = sparse.crow_indices, sparse.col_indices
        options = {"out_features": 10, "activation": activation, "backend": "reference"}
        return block_sparse_linear(x, weight, *pattern, bias, **options)

    assert torch.autograd.gradgradcheck(call, tensors)


def penalty_gradients(layer):
    """Of a gradient penalty, by input and weight: all paths through the backward pass."""
    x = X.clone().requires_grad_()
    loss = layer(x).tanh().square().sum()
    first = torch.autograd.grad(loss, [x, layer.weight], create_graph=True)
    penalty = sum(each.pow(3).sum() for each in first)
    return torch.autograd.grad(penalty, [x, layer.weight])


def test_gradients_of_a_penalty_on_gradients(layers):
    sparse, dense = layers

    def masked(x):
        whole = sparse.mask().repeat_interleave(4, 0).repeat_interleave(3, 1)[:10, :14]
        return nn.functional.linear(x, dense.weight * whole, dense.bias)

    masked.weight = dense.weight
    (x, weight), (expected_x, expected_weight) = penalty_gradients(sparse), penalty_gradients(masked)
    torch.testing.assert_close(x, expected_x)
    torch.testing.assert_close(weight, packed_like(sparse, expected_weight))


def test_third_gradients(layers):
    results = []
    for layer in layers:
        x = X.clone().requires_grad_()
        y = layer(x).tanh().sum()
        for _ in range(3):
            (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        results.append(y)
    torch.testing.assert_close(*results)


def dual(layer):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(layer(forward_ad.make_dual(X, X.cos()))).tangent


TRANSFORMS = {
    "grad": lambda layer: grad(lambda x: layer(x).tanh().sum())(X),
    "vmap": lambda layer: vmap(layer)(X),
    "jacrev": lambda layer: jacrev(lambda x: layer(x).tanh())(X[0]),
    "hessian": lambda layer: hessian(lambda x: layer(x).tanh().sum())(X[0]),
    "jvp": lambda layer: jvp(layer, (X,), (X.cos(),)),
    "vjp": lambda layer: vjp(layer, X)[1](torch.ones(5, 10, dtype=torch.float64)),
    "dual numbers": dual,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("recording", [True, False])
def test_transforms(layers, transform, recording):
    with torch.set_grad_enabled(recording):
        found, expected = (TRANSFORMS[transform](layer) for layer in layers)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_compiled_transforms(layers, transform):
    torch._dynamo.reset()
    sparse, dense = layers
    found = torch.compile(lambda: TRANSFORMS[transform](sparse), backend="aot_eager")()
    torch.testing.assert_close(found, TRANSFORMS[transform](dense))


def test_gradients_of_each_sample(layers):
    def each(layer):
        def loss(parameters, x):
            return functional_call(layer, parameters, (x[None],)).tanh().sum()

        return vmap(grad(loss), (None, 0))({name: p.detach() for name, p in layer.named_parameters()}, X)

    found, expected = each(layers[0]), each(layers[1])
    weights = [packed_like(layers[0], weight) for weight in expected.pop("weight")]
    torch.testing.assert_close(found.pop("weight"), torch.stack(weights))
    torch.testing.assert_close(found, expected)


def test_a_whole_model_is_transformed():
    """With fused MLPs, and q, k and v that would share their inputs."""
    model = tiny_model()
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n]
    sizes = {n: model.get_submodule(n).weight.shape for n in names}
    masks = {n: torch.ones(rows // 16, cols // 16).tril().bool() for n, (rows, cols) in sizes.items()}
    model = sparsify(model, masks, (16, 16)).eval()
    model.set_attn_implementation("eager")  # torch has no forward-mode gradients of fused attention on CPUs
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def answer(x):
        return model(pixel_values=x).logits

    with torch.no_grad():
        _, found = jvp(answer, (pixels,), (pixels,))
        images = vmap(lambda x: answer(x[None])[0])(pixels)
        plain = answer(pixels)
    saliency = grad(lambda x: answer(x).square().sum())(pixels)
    model.dequantize()
    live = pixels.clone().requires_grad_()
    (expected,) = torch.autograd.grad(answer(live).square().sum(), live)
    torch.testing.assert_close(saliency, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found, jvp(answer, (pixels,), (pixels,))[1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(images, plain, rtol=1e-4, atol=1e-4)
