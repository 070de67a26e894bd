"""torch's compiler, imported after the library, does not trace solves."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys
import torch
import jfbfast
from jfbfast.backends.tracing import untraced

traced = []
@untraced
def body(x):
    traced.append(torch.compiler.is_compiling())
    return x.sin()

x = torch.rand(1, 1, 8, 8)
red = jfbfast.RED(jfbfast.NonexpansiveDenoiser(1, features=4, depth=2), filter_damping="weight")
model = jfbfast.DEGrad(jfbfast.GaussianBlur(3), red, preconditioner="exact").eval()
with torch.no_grad():
    eager = model(body(x))
assert "torch._dynamo" not in sys.modules

graphs = []
def backend(graph, _):
    graphs.append(graph)
    return graph

@torch.compile(backend=backend)
def step(x):
    return 3 * model(body(x + 1 - 1))

with torch.no_grad():
    torch.testing.assert_close(step(x), 3 * eager)
assert traced == [False, False] and len(graphs) == 2, (traced, graphs)
"""


@pytest.mark.slow
def test_a_compiler_that_is_imported_later_traces_no_solve(tmp_path):
    subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, check=True)
