"Compiled training is eager training: outputs, gradients and every buffer, float64, while the batch size changes"
import shutil
from copy import deepcopy
import pytest,torch
from torch import nn
from torch._dynamo.utils import counters
from fastai_runbn.layers import LESSON10,RunningBatchNorm2d

backends = ['aot_eager', pytest.param('inductor', marks=pytest.mark.skipif(not (shutil.which('g++') or shutil.which('clang++')), reason='Inductor needs a C++ compiler'))]

@pytest.mark.parametrize('backend', backends)
@pytest.mark.parametrize('settings', [{}, LESSON10], ids=['default','lesson10'])
def test_compiled_equals_eager(backend, settings):
    torch._dynamo.reset()
    counters.clear()
    eager = nn.Sequential(nn.Conv2d(3,4,3), RunningBatchNorm2d(4,**settings), nn.ReLU(), nn.Conv2d(4,4,3), RunningBatchNorm2d(4,**settings)).double()
    twin = deepcopy(eager)
    compiled = torch.compile(twin, fullgraph=True, backend=backend)
    for bs in (2,4,3,7,2,5,2,4,6,3):
        x,dy = torch.randn(bs,3,8,8).double(),torch.randn(bs,4,4,4).double()
        for net in (eager,compiled):
            net.zero_grad()
            y = net(x)
            y.backward(dy)
            if net is eager: want = y
        torch.testing.assert_close(y, want, rtol=1e-9, atol=1e-9)
        for (name,a),b in zip(eager.named_parameters(), twin.parameters()): torch.testing.assert_close(b.grad, a.grad, rtol=1e-9, atol=1e-9, msg=lambda m: f'{name}, bs {bs}: {m}')
        for (name,a),b in zip(eager.named_buffers(), twin.buffers()): torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9, msg=lambda m: f'{name}, bs {bs}: {m}')
    assert counters['stats']['unique_graphs'] <= 2                      # one for the first size, one for all others
