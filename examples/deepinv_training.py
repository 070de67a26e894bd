"""Train DE-GRAD with deepinv's Trainer on motion blurs, one for each sample: python deepinv_training.py [EPOCHS]"""

import sys

import deepinv
import skimage.data
import torch

import jfbfast

image = (
    torch.from_numpy(skimage.data.astronaut()[::2, ::2]).permute(2, 0, 1) / 255
)  # on [0, 1], as deepinv's images are
crops = image.unfold(1, 64, 64).unfold(2, 64, 64).permute(1, 2, 0, 3, 4).reshape(-1, 3, 64, 64)
loader = torch.utils.data.DataLoader([{"x": x} for x in crops], batch_size=8, shuffle=True)
physics = deepinv.physics.BlurFFT((3, 64, 64), torch.ones(1, 1, 1, 1), noise_model=deepinv.physics.GaussianNoise(0.01))
blurs = deepinv.physics.generator.MotionBlurGenerator((9, 9))
options = {"physics_generator": blurs, "online_measurements": True, "device": "cpu", "non_blocking_transfers": False}

red = jfbfast.RED(jfbfast.UNet(channels=3, injection=True), filter_damping="weight")
model = jfbfast.DEGrad(None, red, preconditioner="exact")  # A is the physics of each call
optimizer, epochs = torch.optim.Adam(model.parameters(), lr=1e-3), int(sys.argv[1]) if len(sys.argv) > 1 else 100
deepinv.Trainer(model, physics, optimizer, loader, epochs, save_path=None, show_progress_bar=False, **options).train()
print(deepinv.test(model, loader, physics, verbose=False, **options))
