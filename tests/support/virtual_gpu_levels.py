"""Run the deeply supervised loss as compiled, on the virtual GPU, in each type, and print that it was sound.

Runs in a process of its own, without TRITON_INTERPRET, as an interpreted kernel cannot be compiled.
"""

from __future__ import annotations

import torch

from trifuse.kernels import backend
from trifuse.kernels.ops._deep_supervision_loss import deep_supervision_loss
from trifuse.kernels.testing import poisoned_empty, virtual_gpu

SHARES = [0.5, 0.25, 0.25]
OPTIONS = {"batch_dice": True, "w_ce": 0.7, "w_dice": 1.3, "ignore_index": 2, "sample_weight": torch.tensor([1.0, 0.5])}


def levels(dtype):
    """Return maps of which one is a line of pixels, and targets that are views of one of them."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 3, (2, 44, 140), generator=generator)
    targets = [target[:, ::step, ::step] for step in (1, 2, 4)]
    return [torch.randn(2, 3, *t.shape[1:], generator=generator).to(dtype).requires_grad_() for t in targets], targets


def outcome(maps, targets):
    loss = deep_supervision_loss(maps, targets, SHARES, **OPTIONS)
    return loss, torch.autograd.grad(loss, maps)


def main() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        maps, targets = levels(dtype)
        with virtual_gpu() as gpu, poisoned_empty():
            found = outcome(maps, targets)
        assert len(gpu.launches) == 4, gpu.launches
        with backend("torch"):
            expected = outcome(maps, targets)
        torch.testing.assert_close(found[0], expected[0])
        for got, truth in zip(found[1], expected[1], strict=True):
            torch.testing.assert_close(got, truth, rtol=2 * torch.finfo(dtype).eps + 1e-5, atol=1e-7)
        print(f"{str(dtype).removeprefix('torch.')}: sound", flush=True)


if __name__ == "__main__":
    main()
