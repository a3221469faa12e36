"""Rotations of tensors with known results, for the kernel of the rotary embedding."""

import torch

# heads, elements of a head, rotated elements
SHAPES = [(3, 16, 16), (40, 64, 64), (2, 80, 20), (1, 96, 96), (5, 12, 6)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def cases():
    """Give (name, value, angles, interleaved) of each case; values are slices of a wider tensor, as in a model."""
    generator = torch.Generator().manual_seed(1)
    for heads, size, rotated in SHAPES:
        angles = torch.rand(7, rotated // 2, generator=generator) * 30
        values = torch.randn(7, heads, size + 24, generator=generator)[..., 8 : size + 8]
        for dtype in DTYPES:
            for interleaved in (False, True):
                yield f"{heads}x{size} {rotated} {dtype} {interleaved}", values.to(dtype), angles, interleaved


def expected(value, angles, interleaved):
    """Rotate as a multiplication of complex numbers in fp64."""
    rotated = 2 * angles.shape[-1]
    head = value[..., :rotated].double()
    pairs = head.unflatten(-1, (-1, 2)) if interleaved else head.unflatten(-1, (2, -1)).transpose(-1, -2)
    turned = torch.view_as_real(
        torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones(()).double(), angles.double())[:, None]
    )
    turned = turned if interleaved else turned.transpose(-1, -2)
    return torch.cat((turned.flatten(-2), value[..., rotated:].double()), -1)
