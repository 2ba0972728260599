"Dtypes, cancellation, odd inputs: what a float can do to a layer"
from copy import deepcopy
import pytest,torch
from torch import nn
from fastai_runbn.layers import LESSON10,RunningBatchNorm1d,RunningBatchNorm2d
from fastai_runbn.reference import ReferenceRunningBatchNorm
from fastai_runbn.surgery import surgery_report

pytestmark = pytest.mark.usefixtures('each_path')

parametrize = pytest.mark.parametrize

def relative(y, y64):
    return ((y-y64).norm()/y64.norm()).item()

@parametrize('dtype', [torch.bfloat16, torch.float16])
@parametrize('autocast', [True,False])
def test_half_precision_in_float32_statistics_and_half_out(dtype, autocast):
    "Under autocast the convolution's output is half; without it the input is"
    torch.manual_seed(0)
    conv,layer = nn.Conv2d(3,4,3),RunningBatchNorm2d(4)
    exact = RunningBatchNorm2d(4).double()
    tol = 4e-3 if dtype==torch.bfloat16 else 5e-4
    for _ in range(10):
        x = torch.randn(2,3,8,8)
        with torch.autocast('cpu', dtype, enabled=autocast):
            h = conv(x) if autocast else conv(x).to(dtype)
            h.retain_grad()
            y = layer(h)
        y64 = exact(h.detach().double())
        (y.float()**3).sum().backward()
        assert y.dtype == h.dtype == h.grad.dtype == dtype
        for t in (layer.window_mean,layer.window_grad,layer.running_mean):
            assert t.dtype == torch.float32
        want = exact.window_var.float()
        torch.testing.assert_close(layer.window_var, want, rtol=1e-5, atol=1e-6)
        assert relative(y.double(), y64) < tol
    assert layer.weight.grad.dtype == torch.float32
    assert h.grad.isfinite().all()

def test_half_sums_do_not_overflow():
    "Of 491,520 per channel; float16 ends at 65,504"
    x = torch.full((2,3,64,64), 60., dtype=torch.half)
    layer = RunningBatchNorm2d(3)
    assert layer(x).isfinite().all()
    assert (layer.window_mean==60).all() and layer.skipped_batches==0

@parametrize('bs', [1,2,8])
@parametrize('ratio', [1e1,1e2,1e3,1e4])
def test_large_means(bs, ratio):
    "|mean|/σ up to 1e4 in float32, 100 steps against float64 on the same numbers"
    torch.manual_seed(0)
    layer,exact = RunningBatchNorm2d(16),RunningBatchNorm2d(16).double()
    worst = 0
    for _ in range(100):
        x = torch.randn(bs,16,16,16)+ratio
        with torch.no_grad(): y,y64 = layer(x).double(),exact(x.double())
        worst = max(worst, relative(y, y64))
    # roundings of the mean add up over the window's batches, from ten of them on
    longer = max(1, (.1/layer.window(bs))**.5)
    assert worst < max(1e-6, 1e-7*ratio)*longer # 1e-3 at 1e4
    x = torch.randn(32,16,16,16)+ratio
    y,y64 = layer.eval()(x).double(),exact.eval()(x.double())
    assert relative(y, y64) < 1e-3*longer

def test_the_published_layer_cannot_do_that():
    x = torch.randn(32,16,16,16)+1e4
    y = ReferenceRunningBatchNorm(16)(x)
    exact = ReferenceRunningBatchNorm(16).double()
    assert not relative(y.double(), exact(x.double())) < 1e-1

settings = {'default':{}, 'lesson10':LESSON10, 'no clamp':dict(clamp=None)}
shapes = (1,3),(2,3),(1,3,1,1),(2,3,1,1),(1,3,7,7)
@parametrize('settings', settings.values(), ids=settings)
@parametrize('shape', shapes, ids=str)
def test_one_sample_one_pixel_constant_channels(shape, settings):
    "Finite; a constant channel comes out as 0, the others have a variance, and nothing is skipped"
    cls = RunningBatchNorm1d if len(shape)==2 else RunningBatchNorm2d
    layer = cls(3, **settings)
    def constant(t):
        "The channel that is, of values in any dimensions"
        return t.view(shape[0],3,-1)[:,1]
    for k in range(30):
        x = torch.randn(shape)
        constant(x).fill_(5.) # for ever
        x.requires_grad_()
        y = layer(x)
        (y**2).sum().backward()
        assert y.isfinite().all() and x.grad.isfinite().all()
        assert constant(y).abs().max() < 1e-3
    assert layer.window_var[1] < 1e-9
    assert (layer.window_var[::2] > .05).all()
    assert layer.skipped_batches==0

@parametrize('shape', [(0,3,4,4), (2,3,0,4)], ids=str)
def test_an_empty_batch_comes_out_empty_and_changes_nothing(shape):
    layer = RunningBatchNorm2d(3)
    layer(torch.randn(2,3,4,4))
    before = [b.clone() for b in layer.buffers()]
    x = torch.zeros(shape, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    for b,was in zip(layer.buffers(), before):
        assert torch.equal(b, was)
    assert (layer.weight.grad==0).all()

def test_a_nan_does_not_stay():
    torch.manual_seed(0)
    layer,bn = RunningBatchNorm2d(3, clamp=None),nn.BatchNorm2d(3)
    bad = torch.randn(2,3,4,4)
    bad[0,1,2,2] = float('nan')
    first,last = [torch.randn(2,3,4,4) for _ in range(2)]
    for x in (first,bad,last):
        y = layer(x)
        bn(x)
    assert y.isfinite().all()
    assert layer.eval()(x).isfinite().all()
    assert bn.eval()(x).isnan().any() # in evaluation BatchNorm keeps it for ever too
    assert layer.skipped_batches.item() == 1
    assert layer.num_batches_tracked.item() == 3
    report = surgery_report(layer)
    assert report.rows[0].skipped == 1 and 'skipped 1 batch' in repr(report)

def test_a_bad_batch_is_normalised_with_the_window():
    layer = RunningBatchNorm1d(1, clamp=None, dtype=torch.float64)
    def batch(*samples): return torch.tensor([[s] for s in samples]).double()
    layer(batch(0., 2.))
    y = layer(batch(float('inf'), 3.))
    assert y[0].isinf()
    assert y[1].item() == pytest.approx(2/(1+1e-5)**.5)

@parametrize('other', [1e25,-1e25])
def test_a_finite_batch_that_would_overflow_the_window_stays_out(other):
    """Values of 1e25 have a finite mean and no variance, but their distance squared is infinite in
    float32; of opposite signs they have a mean of 0 and an infinite variance"""
    layer = RunningBatchNorm1d(2)
    layer(torch.randn(4,2))
    before = deepcopy(layer)
    layer(torch.tensor([[1e25,0.],[other,1.]]))
    kept = 'window_mean','window_var','window_count','running_mean','running_var'
    for name in kept:
        was = getattr(before, name)
        assert (getattr(layer, name)==was).tolist()==[True,False], name
    learned = layer.window_innovations!=before.window_innovations
    assert learned.any(0).tolist()==[False,True]
    assert layer.skipped_batches == 1
    assert layer(torch.randn(4,2)).isfinite().all()
    assert layer.running_var.isfinite().all()

def test_a_bad_first_batch_leaves_an_empty_window():
    layer,fresh = RunningBatchNorm1d(2),RunningBatchNorm1d(2)
    layer(torch.full((2,2), float('nan')))
    x = torch.randn(4,2)
    layer.samples_seen.zero_()
    assert torch.equal(layer(x), fresh(x))
    assert torch.equal(layer.running_var, fresh.running_var)

def test_gradients_that_overflow_are_not_averaged():
    """A loss scaler's overflow reaches the layer as an infinite dy; the step is dropped, and the
    average must not keep it"""
    layer = RunningBatchNorm2d(3)
    def forward(): return layer(torch.randn(2,3,4,4, requires_grad=True))
    forward().sum().backward()
    before = layer.window_grad.clone()
    y = forward()
    dy = torch.zeros_like(y)
    dy[0,0,0,0] = float('inf')
    y.backward(dy)
    assert layer.window_grad.isfinite().all()
    assert torch.equal(layer.window_grad[:,0], before[:,0])
