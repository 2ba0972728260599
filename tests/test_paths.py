"The ways to compute a running norm: which is taken, that all agree, what they cost in operators and memory; CUDA's kernels stood in for on the CPU"
import pytest,torch
from torch import nn
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

formats = {'contiguous':torch.contiguous_format, 'channels_last':torch.channels_last}

# CUDA's kernels, written out after the formulas of their use in torch/nn/modules/_functions.py
def one(t, x): return t.view(1,-1,*[1]*(x.ndim-2))
def elemt(x, weight, bias, mean, invstd, eps):
    y = (x.to(mean.dtype)-one(mean,x))*one(invstd if weight is None else invstd*weight,x)
    return (y if bias is None else y+one(bias,x)).to(x.dtype)
def backward_reduce(dy, x, mean, invstd, weight, input_g, weight_g, bias_g):
    assert mean.dtype==invstd.dtype and all(o.is_contiguous() for o in (mean,invstd))
    dims,dy = [d for d in range(x.ndim) if d!=1],dy.to(mean.dtype)
    sum_dy,sum_dy_xmu = dy.sum(dims),(dy*(x.to(mean.dtype)-one(mean,x))).sum(dims)
    return sum_dy if input_g else None,sum_dy_xmu if input_g else None,sum_dy_xmu*invstd if weight_g else None,sum_dy if bias_g else None
def backward_elemt(dy, x, mean, invstd, weight, sum_dy, sum_dy_xmu, count):
    assert count.dtype==torch.int32 and all(o.is_contiguous() for o in (sum_dy,sum_dy_xmu))
    n,scale = count.sum(),invstd if weight is None else invstd*weight
    dx = (dy.to(mean.dtype) - one(sum_dy/n,x) - (x.to(mean.dtype)-one(mean,x))*one(sum_dy_xmu/n*invstd**2,x))*one(scale,x)
    return dx.to(x.dtype)

@pytest.fixture
def cuda_kernels(monkeypatch):
    for name,f in (('batch_norm_elemt',elemt), ('batch_norm_backward_reduce',backward_reduce), ('batch_norm_backward_elemt',backward_elemt)): monkeypatch.setattr(torch, name, f)
    def choose(x, state, backend='auto'): return Formulas if backend=='formulas' else SyncBatchNormParts
    monkeypatch.setattr(layers, 'choose', choose)

def steps(layers, n=30, C=5, space=(6,4), dtype=torch.float64, fmt=torch.contiguous_format):
    "Some steps of the same batches; all results and buffers, a list a layer"
    res = [[] for _ in layers]
    for i in range(n):
        x = (torch.randn(i%4+1,C,*space)*2+1).to(dtype).to(memory_format=fmt)
        dy = torch.randn_like(x)
        for l,r in zip(layers, res):
            xr = x.clone().requires_grad_()
            l.zero_grad()
            y = l(xr)
            y.backward(dy)
            r += [y.detach(), xr.grad, *[p.grad for p in l.parameters()], *[b.clone() for b in l.buffers()]]
    return res

def same(a, b, tol=1e-9):
    for p,q in zip(a, b, strict=True): torch.testing.assert_close(p, q, rtol=tol, atol=tol)

kinds = {'default':{}, 'adaptive':dict(window=AdaptiveWindow(30)), 'lesson10':LESSON10,
    'cumulative':dict(momentum=None, running_grad=1., clamp=None)}
all_settings = pytest.mark.parametrize('settings', kinds.values(), ids=kinds)

@all_settings
@pytest.mark.parametrize('fmt', formats)
def test_the_kernels_of_cuda_stood_in_for(settings, fmt, cuda_kernels):
    plain,cuda = [RunningBatchNorm2d(5, dtype=torch.float64, backend=b, **settings) for b in ('formulas','auto')]
    same(*steps([plain,cuda], fmt=formats[fmt]))
    assert (plain.path,cuda.path) == ('formulas','aten')

@all_settings
def test_nothing_is_read_with_the_kernels_of_cuda(settings, cuda_kernels):
    "The stand-ins are all that is not CUDA's own"
    layer = RunningBatchNorm2d(3, **settings)
    for bs in (1,2,5):
        x,dy = torch.randn(bs,3,4,4, requires_grad=True),torch.randn(bs,3,4,4)
        with NoCalls(),NoReads(): layer(x).backward(dy)

def test_the_kernels_of_cuda_in_half_precision(cuda_kernels):
    half,exact = RunningBatchNorm2d(5),RunningBatchNorm2d(5).double()
    for _ in range(5):
        x,dy = torch.randn(4,5,8,8).bfloat16(),torch.randn(4,5,8,8).bfloat16()
        xs = [x.clone().requires_grad_(),x.double().requires_grad_()]
        for l,o in zip((half,exact), xs): l(o).backward(dy.to(o.dtype))
        assert xs[0].grad.dtype==torch.bfloat16 and half.window_mean.dtype==torch.float32
        torch.testing.assert_close(xs[0].grad.double(), xs[1].grad, rtol=2e-2, atol=2e-2)

@needs_kernels
@pytest.mark.parametrize('what,path', [('float32','cpu'),('float64','formulas'),('half','cpu'),('tensor subclass','cpu'),('strided','cpu')])
def test_which_way_is_taken(what, path):
    "The formulas are for what the kernels do not know: statistics narrower than the activations, for one"
    layer,x = RunningBatchNorm2d(3),torch.randn(2,3,4,4)
    x = {'float32':x, 'float64':x.double(), 'half':x.half(), 'tensor subclass':TensorImage(x), 'strided':x.permute(0,1,3,2)}[what]
    y = layer(x)
    assert layer.path==path and type(y) is type(x) and y.dtype==x.dtype and y.shape==x.shape

@pytest.mark.parametrize('act', ['relu','silu'])
def test_an_activation_inside_of_the_kernels_of_cuda(act, cuda_kernels):
    "Which they do not know: formulas compute it"
    a,b = [RunningBatchNorm2d(5, dtype=torch.float64, backend=o) for o in ('formulas','auto')]
    for _ in range(4):
        x,dy = torch.randn(2,5,6,4).double(),torch.randn(2,5,6,4).double()
        xs = [x.clone().requires_grad_() for _ in range(2)]
        ys = [l.normalized(o, act) for l,o in zip((a,b), xs)]
        for y in ys: y.backward(dy)
        same([ys[0],xs[0].grad,*a.buffers()], [ys[1],xs[1].grad,*b.buffers()])

def test_triton_is_for_cuda():
    "The same settings train on a CPU, too"
    layer = RunningBatchNorm2d(3, backend='triton')
    layer(torch.randn(2,3,4,4)).sum().backward()
    assert layer.path==names['auto']

def test_a_setting_of_the_callback_and_of_surgery():
    net = to_runbn(nn.Sequential(nn.Conv2d(3,4,3), nn.BatchNorm2d(4)), backend='formulas')
    net(torch.randn(2,3,8,8))
    assert net[1].path=='formulas' and "backend=formulas" in repr(net[1])
    net[1].set_settings(backend='auto'); net(torch.randn(2,3,8,8))
    assert net[1].path==names['auto']

class Count(TorchDispatchMode):
    "Counts operators that make or change a tensor; those that only look at one in another way are free"
    views = {'view','_unsafe_view','expand','unsqueeze','unbind','select','slice','detach','alias','t','transpose','permute','as_strided','_reshape_alias','unfold'}
    def __init__(self): super().__init__(); self.names = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in self.views: self.names.append(name)
        return func(*args, **(kwargs or {}))

@pytest.mark.parametrize('fmt', formats)
@pytest.mark.parametrize('space', [(8,8),(200,200)], ids=str)
def test_one_operator_a_pass(space, fmt):
    "Who records operators sees one that writes in each pass, and formulas that Inductor fuses"
    layer = RunningBatchNorm2d(4)
    x = torch.randn(2,4,*space).to(memory_format=formats[fmt]).requires_grad_()
    dy = torch.randn_like(x)
    with Count() as count: layer(x).backward(dy)
    assert [n for n in count.names if n in ('statistics','reaction') or n.endswith('_')]==['statistics','reaction'], count.names
    assert len(count.names)<=30, count.names

@pytest.mark.parametrize('layer', [RunningBatchNorm2d(4),RunningBatchNorm2d(4, running_grad=0., affine=False)], ids=['default','lean'])
def test_saved_for_backward_are_x_and_numbers_per_channel(layer):
    saved = []
    x = torch.randn(2,4,32,32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t): layer(x)
    assert sum(t.numel()>4 for t in saved)==1 and any(t.data_ptr()==x.data_ptr() for t in saved)

@pytest.mark.parametrize('cls,space', [(RunningBatchNorm1d,()), (RunningBatchNorm1d,(300,)), (RunningBatchNorm2d,(80,80)), (RunningBatchNorm3d,(20,20,20))], ids=str)
def test_x_and_dy_are_left_alone(cls, space):
    layer,x = cls(6),torch.randn(4,6,*space)
    xr,dy = x.clone().requires_grad_(),torch.randn_like(x)
    kept = dy.clone()
    layer(xr).backward(dy)
    assert torch.equal(xr.detach(), x) and torch.equal(dy, kept)

def test_without_kernels_formulas_compute_and_the_report_says_so(monkeypatch):
    net = to_runbn(nn.Sequential(nn.Conv2d(3,4,3), nn.BatchNorm2d(4)))
    monkeypatch.setattr(cpu, 'kernels', None)
    net(torch.randn(2,3,8,8)).sum().backward()
    assert net[1].path=='formulas' and 'no C compiler' in repr(surgery_report(net))
    assert 'no C compiler' not in repr(surgery_report(nn.Sequential(nn.BatchNorm2d(4))))
