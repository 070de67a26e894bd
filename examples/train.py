"""DE-GRAD in a plain PyTorch training loop, on crops of two of scikit-image's photographs.

python examples/train.py [STEPS]
"""

import sys

import skimage.data
import torch
import torch.nn.functional as F

import jfbfast


def crops(photographs: list[torch.Tensor], count: int, size: int) -> torch.Tensor:
    """A batch (count, 3, size, size) of random crops of images (3, H, W)."""
    batch = []
    for i in torch.randint(len(photographs), (count,)):
        photograph = photographs[i]
        top, left = (int(torch.randint(n - size + 1, ())) for n in photograph.shape[1:])
        batch.append(photograph[:, top : top + size, left : left + size])
    return torch.stack(batch)


def main(steps: int) -> None:
    jfbfast.keep_freed_memory()  # worth 40% of a step where glibc's malloc is used
    torch.manual_seed(0)
    photographs = [
        torch.from_numpy(image).permute(2, 0, 1) / 127.5 - 1 for image in (skimage.data.astronaut(), skimage.data.cat())
    ]

    blur = jfbfast.GaussianBlur(kernel_size=5, sigma=1.0, padding_mode="reflect")  # A; blur.adjoint is Aᵀ
    denoiser = jfbfast.UNet(channels=3, injection=True)  # D(W x, z), z Tikhonov's restoration of d
    regularizer = jfbfast.RED(denoiser, filter_damping="weight")  # R(x; d) = λ(x − D(W x, z))
    model = jfbfast.DEGrad(blur, regularizer, preconditioner="exact")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    for step in range(1, steps + 1):
        x = crops(photographs, count=8, size=48)
        d = blur(x) + 0.01 * torch.randn_like(x)
        loss = F.mse_loss(model(d), x)  # forward: a solve without gradients, and one layer
        optimizer.zero_grad()
        loss.backward()  # backward: that one layer
        optimizer.step()
        if step % 20 == 0 or step == steps:
            evaluations = int(model.solution.iterations.max())
            blurred, restored = (10 * torch.log10(4 / error) for error in (F.mse_loss(d, x), loss.detach()))
            print(f"step {step}: {blurred:.2f} dB blurred, {restored:.2f} dB restored in {evaluations} evaluations")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
