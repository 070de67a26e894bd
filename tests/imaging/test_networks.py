"""The networks that restore tiles, and who watches their solves."""

import pytest
import torch

from jfbfast import RED, Broyden, DEGrad, GaussianBlur, UNet
from jfbfast.imaging.networks import ChannelWise


@pytest.mark.parametrize("options", [{"cuda_graph": True}, {"solve_dtype": torch.bfloat16}, {"solver": Broyden(1e-3)}])
def test_each_evaluation_is_watched_whatever_options_the_network_has(options):
    red = RED(UNet(3, features=(4,), blocks=(1,)), filter_damping="weight")
    model = DEGrad(GaussianBlur(5), red, preconditioner="exact", **options).eval()
    before, watched = (model.solver, model.cuda_graph), []
    restore = ChannelWise(model, 3, lambda *told: watched.append(told))
    restore(torch.rand(1, 3, 24, 24))
    (solve,) = restore.solves
    assert solve.evaluations == len(watched) == len(solve.residuals) - 1 > 0
    assert [residual for _, residual in watched] == list(solve.residuals[:-1])
    assert (model.solver, model.cuda_graph) == before
