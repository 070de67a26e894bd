"""Train DE-GRAD from masked images alone, by deepinv's equivariant imaging: python deepinv_equivariant.py [EPOCHS]"""

import sys

import deepinv
import skimage.data
import torch

import jfbfast

image = (
    torch.from_numpy(skimage.data.astronaut()[::2, ::2]).permute(2, 0, 1) / 255
)  # on [0, 1], as deepinv's images are
crops = image.unfold(1, 64, 64).unfold(2, 64, 64).permute(1, 2, 0, 3, 4).reshape(-1, 3, 64, 64)
physics = deepinv.physics.Inpainting((3, 64, 64), mask=0.7)
pairs = [{"x": x, "y": y} for x, y in zip(crops, physics(crops), strict=True)]
loader = torch.utils.data.DataLoader(pairs, batch_size=8, shuffle=True)
losses = [deepinv.loss.MCLoss(), deepinv.loss.EILoss(deepinv.transform.Shift())]  # which see no original
options = {"device": "cpu", "non_blocking_transfers": False, "show_progress_bar": False}

red = jfbfast.RED(jfbfast.UNet(channels=3, injection=True), filter_damping="weight")
model = jfbfast.DEGrad(None, red, preconditioner="exact")  # A is the physics of each call
optimizer, epochs = torch.optim.Adam(model.parameters(), lr=1e-3), int(sys.argv[1]) if len(sys.argv) > 1 else 100
deepinv.Trainer(model, physics, optimizer, loader, epochs, losses=losses, save_path=None, **options).train()
print(deepinv.test(model, loader, physics, verbose=False, **options))
