"""The ways to compute a running norm: which is taken, that all agree, what they cost in operators
and memory; CUDA's kernels stood in for on the CPU"""
import pytest,torch
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from fastai.torch_core import TensorImage
from fastai_runbn import layers
from fastai_runbn.formulas import Formulas
from fastai_runbn.kernels.aten import SyncBatchNormParts
from fastai_runbn.layers import LESSON10,RunningBatchNorm1d,RunningBatchNorm2d,RunningBatchNorm3d
from fastai_runbn.moments import AdaptiveWindow
from fastai_runbn.kernels import cpu
from fastai_runbn.surgery import surgery_report,to_runbn
from impls import names,needs_kernels
from test_no_sync import NoCalls,NoReads

parametrize = pytest.mark.parametrize
formats = {'contiguous':torch.contiguous_format, 'channels_last':torch.channels_last}

# CUDA's kernels, written out after the formulas of their use in torch/nn/modules/_functions.py
def of_channels(t, x): return t.view(1, -1, *[1]*(x.ndim-2))
def centred(x, mean): return x.to(mean.dtype)-of_channels(mean, x)
def scaled(invstd, weight): return invstd if weight is None else invstd*weight
def are_contiguous(*ts): return all(t.is_contiguous() for t in ts)
def elemt(x, weight, bias, mean, invstd, eps):
    y = centred(x, mean)*of_channels(scaled(invstd, weight), x)
    if bias is not None: y = y+of_channels(bias, x)
    return y.to(x.dtype)
def backward_reduce(dy, x, mean, invstd, weight, input_g, weight_g, bias_g):
    assert mean.dtype==invstd.dtype and are_contiguous(mean, invstd)
    dims = [d for d in range(x.ndim) if d!=1]
    dy = dy.to(mean.dtype)
    sum_dy,sum_dy_xmu = dy.sum(dims),(dy*centred(x, mean)).sum(dims)
    sums = (sum_dy,sum_dy_xmu) if input_g else (None,None)
    dweight = sum_dy_xmu*invstd if weight_g else None
    return *sums,dweight,sum_dy if bias_g else None
def backward_elemt(dy, x, mean, invstd, weight, sum_dy, sum_dy_xmu, count):
    assert count.dtype==torch.int32 and are_contiguous(sum_dy, sum_dy_xmu)
    n = count.sum()
    slope = sum_dy_xmu/n*invstd**2
    dx = centred(dy, sum_dy/n)-centred(x, mean)*of_channels(slope, x)
    dx = dx*of_channels(scaled(invstd, weight), x)
    return dx.to(x.dtype)
stand_ins = dict(batch_norm_elemt=elemt, batch_norm_backward_reduce=backward_reduce,
    batch_norm_backward_elemt=backward_elemt)

@pytest.fixture
def cuda_kernels(monkeypatch):
    "Layers take them, on the CPU, unless they are told to take formulas"
    for name,f in stand_ins.items(): monkeypatch.setattr(torch, name, f)
    def choose(x, state, backend='auto'):
        return Formulas if backend=='formulas' else SyncBatchNormParts
    monkeypatch.setattr(layers, 'choose', choose)

def steps(layers, n=30, C=5, space=(6,4), dtype=torch.float64, fmt=torch.contiguous_format):
    "Some steps of the same batches; all results and buffers, a list a layer"
    res = [[] for _ in layers]
    for i in range(n):
        x = torch.randn(i%4+1,C,*space)*2+1
        x = x.to(dtype).to(memory_format=fmt)
        dy = torch.randn_like(x)
        for l,r in zip(layers, res):
            xr = x.clone().requires_grad_()
            l.zero_grad()
            y = l(xr)
            y.backward(dy)
            r += [y.detach(), xr.grad]
            r += [p.grad for p in l.parameters()]
            r += [b.clone() for b in l.buffers()]
    return res

def same(a, b, tol=1e-9):
    for p,q in zip(a, b, strict=True):
        assert_close(p, q, rtol=tol, atol=tol)

def plain_and_cuda(**settings):
    "Layers in float64 that are alike, of the formulas and of CUDA's kernels"
    return [RunningBatchNorm2d(5, dtype=torch.float64, backend=b, **settings)
        for b in ('formulas','auto')]

kinds = dict(default={}, adaptive=dict(window=AdaptiveWindow(30)),
    lesson10=LESSON10,
    cumulative=dict(momentum=None, running_grad=1., clamp=None))
all_settings = parametrize('settings', kinds.values(), ids=kinds)

@all_settings
@parametrize('fmt', formats)
def test_the_kernels_of_cuda_stood_in_for(settings, fmt, cuda_kernels):
    plain,cuda = plain_and_cuda(**settings)
    a,b = steps([plain,cuda], fmt=formats[fmt])
    same(a, b)
    assert (plain.path,cuda.path) == ('formulas','aten')

@all_settings
def test_nothing_is_read_with_the_kernels_of_cuda(settings, cuda_kernels):
    "The stand-ins are all that is not CUDA's own"
    layer = RunningBatchNorm2d(3, **settings)
    for bs in (1,2,5):
        x = torch.randn(bs,3,4,4, requires_grad=True)
        dy = torch.randn(bs,3,4,4)
        with NoCalls(),NoReads(): layer(x).backward(dy)

def test_the_kernels_of_cuda_in_half_precision(cuda_kernels):
    half,exact = RunningBatchNorm2d(5),RunningBatchNorm2d(5).double()
    for _ in range(5):
        x,dy = [torch.randn(4,5,8,8).bfloat16() for _ in range(2)]
        x64 = x.double().requires_grad_()
        x.requires_grad_()
        half(x).backward(dy)
        exact(x64).backward(dy.double())
        assert x.grad.dtype==torch.bfloat16
        assert half.window_mean.dtype==torch.float32
        assert_close(x.grad.double(), x64.grad, rtol=2e-2, atol=2e-2)

inputs = {'float32':lambda x: x, 'float64':torch.Tensor.double, 'half':torch.Tensor.half,
    'tensor subclass':TensorImage, 'strided':lambda x: x.permute(0,1,3,2)}
ways = [(what,'formulas' if what=='float64' else 'cpu') for what in inputs]

@needs_kernels
@parametrize('what,path', ways)
def test_which_way_is_taken(what, path):
    """The formulas are for what the kernels do not know: statistics narrower than the activations,
    for one"""
    layer = RunningBatchNorm2d(3)
    x = inputs[what](torch.randn(2,3,4,4))
    y = layer(x)
    assert layer.path==path and type(y) is type(x)
    assert y.dtype==x.dtype and y.shape==x.shape

@parametrize('act', ['relu','silu'])
def test_an_activation_inside_of_the_kernels_of_cuda(act, cuda_kernels):
    "Which they do not know: formulas compute it"
    norms = plain_and_cuda()
    for _ in range(4):
        x,dy = [torch.randn(2,5,6,4).double() for _ in range(2)]
        results = []
        for l in norms:
            xr = x.clone().requires_grad_()
            y = l.normalized(xr, act)
            y.backward(dy)
            results.append([y, xr.grad, *l.buffers()])
        same(*results)

def test_triton_is_for_cuda():
    "The same settings train on a CPU, too"
    layer = RunningBatchNorm2d(3, backend='triton')
    layer(torch.randn(2,3,4,4)).sum().backward()
    assert layer.path==names['auto']

def conv_and_norm():
    return nn.Sequential(nn.Conv2d(3,4,3), nn.BatchNorm2d(4))

def test_a_setting_of_the_callback_and_of_surgery():
    net = to_runbn(conv_and_norm(), backend='formulas')
    net(torch.randn(2,3,8,8))
    assert net[1].path=='formulas' and "backend=formulas" in repr(net[1])
    net[1].set_settings(backend='auto')
    net(torch.randn(2,3,8,8))
    assert net[1].path==names['auto']

class Count(TorchDispatchMode):
    """Notes operators that make or change a tensor; those that only look at one in another way are
    free"""
    views = {'view','_unsafe_view','expand','unsqueeze','unbind','select',
        'slice','detach','alias','t','transpose','permute',
        'as_strided','_reshape_alias','unfold'}
    def __init__(self):
        super().__init__()
        self.names = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in self.views: self.names.append(name)
        return func(*args, **(kwargs or {}))

@parametrize('fmt', formats)
@parametrize('space', [(8,8), (200,200)], ids=str)
def test_one_operator_a_pass(space, fmt):
    "Who records operators sees one that writes in each pass, and formulas that Inductor fuses"
    layer = RunningBatchNorm2d(4)
    x = torch.randn(2,4,*space).to(memory_format=formats[fmt])
    x.requires_grad_()
    dy = torch.randn_like(x)
    with Count() as count: layer(x).backward(dy)
    passes = ['statistics','reaction']
    write = [n for n in count.names if n in passes or n.endswith('_')]
    assert write==passes, count.names
    assert len(count.names)<=30, count.names

lean = RunningBatchNorm2d(4, running_grad=0., affine=False)
@parametrize('layer', [RunningBatchNorm2d(4),lean], ids=['default','lean'])
def test_saved_for_backward_are_x_and_numbers_per_channel(layer):
    saved = []
    x = torch.randn(2,4,32,32, requires_grad=True)
    def pack(t):
        saved.append(t)
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): layer(x)
    assert sum(t.numel()>4 for t in saved)==1
    assert any(t.data_ptr()==x.data_ptr() for t in saved)

spaces = [(RunningBatchNorm1d,()), (RunningBatchNorm1d,(300,)),
    (RunningBatchNorm2d,(80,80)), (RunningBatchNorm3d,(20,20,20))]
@parametrize('cls,space', spaces, ids=str)
def test_x_and_dy_are_left_alone(cls, space):
    layer = cls(6)
    x = torch.randn(4,6,*space)
    dy = torch.randn_like(x)
    xr,kept = x.clone().requires_grad_(),dy.clone()
    layer(xr).backward(dy)
    assert torch.equal(xr.detach(), x)
    assert torch.equal(dy, kept)

def test_without_kernels_formulas_compute_and_the_report_says_so(monkeypatch):
    net = to_runbn(conv_and_norm())
    monkeypatch.setattr(cpu, 'kernels', None)
    net(torch.randn(2,3,8,8)).sum().backward()
    assert net[1].path=='formulas'
    assert 'no C compiler' in repr(surgery_report(net))
    plain = nn.Sequential(nn.BatchNorm2d(4))
    assert 'no C compiler' not in repr(surgery_report(plain))
