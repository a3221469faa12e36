"""Norms of tensors with known results, for the kernels of RMSNorm and layer norm."""

import torch

# size of a row, rows as in a model: of a stream, or of the heads of keys, which are slices of a wider tensor
SHAPES = [(48, (7, 1)), (128, (9, 1, 5)), (200, (50,)), (1030, (5,)), (6, (3,))]
# input, weight
DTYPES = [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float32, torch.bfloat16), (torch.float16,) * 2]
EPS = 1e-5


def cases():
    """Give (name, hidden, weight, bias or ``None`` for RMSNorm, gradient, shift) of each case."""
    generator = torch.Generator().manual_seed(1)
    for size, rows in SHAPES:
        spread = torch.rand(*rows, 1, generator=generator) * 9 + 0.1
        hidden = torch.randn(*rows, size + 8, generator=generator)[..., 3 : size + 3] * spread + spread
        gradient = torch.randn(*rows, size + 8, generator=generator)[..., :size]
        weight, bias = torch.rand(2, size, generator=generator) + 0.5
        for wide, narrow in DTYPES:
            for shift in (0.0, 1.0):
                for b in (None, bias.to(narrow)):
                    name = f"{size} {wide} {narrow} {shift} {'RMSNorm' if b is None else 'LayerNorm'}"
                    yield name, hidden.to(wide), weight.to(narrow), b, gradient.to(narrow), shift


def expected(hidden, weight, bias, gradient, shift):
    """Compute result and gradients of hidden, weight and bias in fp64, by the formula."""
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    centered = hidden if bias is None else hidden - hidden.mean(-1, keepdim=True)
    normed = centered / (centered.square().mean(-1, keepdim=True) + EPS).sqrt() * (weight + shift)
    trained = [hidden, weight]
    if bias is not None:
        trained.append(bias.detach().double().requires_grad_())
        normed = normed + trained[-1]
    return normed.detach(), *torch.autograd.grad(normed, trained, gradient.double())
