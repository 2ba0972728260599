"""Triton's kernels without a GPU, in Triton's interpreter, beside the formulas in float64; where there
is one, test_cuda.py runs them on it. What the compiler makes of them: test_triton_compiled.py"""
import copy,sys,warnings
import pytest,torch
from hypothesis import given,settings,strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
pytest.importorskip('triton', reason='Triton comes with PyTorch on Linux')
if torch.cuda.is_available():
    pytest.skip('there is a GPU: see test_cuda.py', allow_module_level=True)
from fastai_runbn import functional
from fastai_runbn.formulas import Formulas,KeptStep,State,Step
from fastai_runbn.kernels import cuda
from fastai_runbn.kernels.cuda import TritonKernels
from fastai_runbn.layers import RunningBatchNorm2d
from fastai_runbn.twins import RunningBatchNormAct2d
from interpreter import last_first,launches,on_the_cpu,planned,plans
from pairs import (B16,H16,T32,Pair,activations,calls,check_calls,check_overflow,
    check_what_others_write,gradients,halves,laid_out,narrow,near,new_state,same,small)

halves[B16] = 2.**-7 # the interpreter does not round, it cuts off
each_plan = pytest.mark.parametrize('plan', plans)
dtypes_and_plans = [(d,p) for d in cuda.dtypes for p in plans if d==T32 or p!='small blocks']
both_kernels,all_four = ['runbn_forward','runbn_backward'],[
    'runbn_forward','runbn_normalize','runbn_backward','runbn_input_gradient']
each_layout = pytest.mark.parametrize('layout', ['contiguous','last'])

# --------------------------------------------------------------------------------- lockstep
# a program takes 20 ms and more
calls_here = calls | dict(shape=small, dtype=st.sampled_from(cuda.dtypes))
@settings(max_examples=40, deadline=None)
@given(**calls_here)
def test_every_call_is_the_formulas(**kw): check_calls(TritonKernels, **kw)

@each_layout
@pytest.mark.parametrize('dtype,plan', dtypes_and_plans, ids=str)
@pytest.mark.parametrize('shape', [(2,3,7,7),(3,2,17),(4,5),(2,3,3,5,4),(1,2,1,1)], ids=str)
def test_every_form_and_grid(shape, dtype, layout, plan):
    pair = Pair(shape[1], dtype, kernels=TritonKernels, floors=(.5,.3))
    with planned(plan):
        for i in range(2):
            step = Step(shape[0], .3, .1, running_grad=1., act='silu' if i else 'relu')
            pair.step(activations(shape, dtype, layout), step, layout, 2, at=f'step {i}')

@each_layout
@pytest.mark.parametrize('plan', ['as planned','split'])
@pytest.mark.parametrize('longest', [None,60.])
def test_30_steps(longest, layout, plan):
    "Settings as a layer's, batch sizes that change, the floor from over to under the variance"
    pair = Pair(3, T32, kernels=TritonKernels, floors=[.5]*20+[.01]*40)
    with planned(plan):
        for i,bs in enumerate(torch.randint(1, 9, (30,)).tolist()):
            step = Step(bs, min(1., bs/60), min(1., bs/200), running_grad=1., eps=1e-3,
                        longest=longest)
            pair.step(activations((bs,3,4,3), T32, layout), step, layout, at=f'step {i}')

@pytest.mark.parametrize('plan', ['as planned','split'])
@pytest.mark.parametrize('where', [0,1,-1])
@pytest.mark.parametrize('value', ['nan','inf','-inf'])
def test_what_is_not_finite_stays_out(value, where, plan):
    "In one channel; the others, and the state of that one, are as without it"
    pair = Pair(3, T32, kernels=TritonKernels, trained=1)
    with planned(plan):
        for i in range(3):
            x = activations((2,3,5,4), T32)
            if i==1: x[0,1].view(-1)[where] = float(value)
            pair.step(x, Step(2, .3, .1, running_grad=1.), backwards=2, at=f'step {i}')
    assert pair.state.skipped==1

@each_layout
@pytest.mark.parametrize('plan', ['as planned','split'])
def test_what_others_write(layout, plan):
    with planned(plan): check_what_others_write(TritonKernels, layout)

@pytest.mark.parametrize('plan', ['as planned','split'])
def test_a_variance_that_overflows(plan):
    with planned(plan): check_overflow(TritonKernels)

@each_layout
@pytest.mark.parametrize('plan', plans)
def test_variance_beside_a_large_mean(layout, plan):
    x64 = torch.randn(2,4,31,9).double()*.01+100
    x64[0,0,0,0] += 30. # a first value far from the others
    with planned(plan): mean,var = TritonKernels.moments(laid_out(x64.float(), layout))
    want = Formulas.moments(x64.float().double())
    assert ((mean-want[0])/want[0]).abs().max()<1e-6
    assert ((var-want[1])/want[1]).abs().max()<1e-4

@each_plan
@each_layout
@pytest.mark.parametrize('act', [None,'silu'])
def test_parts_are_the_whole(layout, act, plan):
    torch.manual_seed(0)
    x,step = activations((3,5,6,4), T32, layout),Step(3, .3, .1, running_grad=1., act=act)
    dy,affine = gradients(x, layout),(torch.randn(5),torch.randn(5))
    a,b = [narrow(new_state(5, trained=1), T32) for _ in range(2)]
    b = State(*[t if t is None else t.clone() for t in a])
    with planned(plan):
        y,saved = TritonKernels.forward(x, *affine, a, step)
        saved2 = TritonKernels.statistics(x, b, step)
        near(saved2, saved.double(), 1e-6, 'saved')
        near(TritonKernels.normalize(x, *affine, saved2, step), y.double(), 1e-6, 'y')
        for have,want in zip(TritonKernels.moments(x), saved[4:6]):
            near(have, want.double(), 1e-6, 'moments')
        dx,dw,db = TritonKernels.backward(dy, x, *affine, saved, a.grad, step, 2.)
        want = torch.stack((db, dw)).double()
        near(TritonKernels.sums(dy, x, *affine, saved2, step), want, 1e-6, 'sums')
        G,sums = TritonKernels.reaction(dy, x, *affine, saved2, b.grad, step, 2.)
        near(sums, want, 1e-6, 'sums of the reaction')
        near(TritonKernels.dx(dy, x, *affine, saved2, G, step), dx.double(), 1e-6, 'dx')
    near(saved2, saved.double(), 1e-6, 'saved after the backward')
    for name,have,want in zip(State._fields, b, a): near(have, want.double(), 1e-6, name)

# ------------------------------------------------------------------- programs and their order
@each_layout
@pytest.mark.parametrize('plan', plans)
def test_results_do_not_depend_on_who_is_last(layout, plan):
    "To the bit; and the integers by which programs find out who is last are 0 again"
    def run():
        torch.manual_seed(0)
        state = narrow(new_state(5, trained=1, floors=[.1]*9), T32)
        step = Step(2, .3, .1, running_grad=1.)
        state.avg_mean[1] += 1                          # others have written
        got = []
        for i in range(3):
            x = activations((2,5,3,4), T32, layout)
            if i==1: x[0,2,0,0] = float('inf')
            y,saved = TritonKernels.forward(x, None, None, state, step)
            dy = gradients(x, layout)
            grads = TritonKernels.backward(dy, x, None, None, saved, state.grad, step)
            got += [y,saved,*grads]
        return [*got, *[t.clone() for t in state]]
    with planned(plan):
        one = run()
        with last_first(): other = run()
    for i,(a,b) in enumerate(zip(one, other)): same(a, b, i)
    assert all((t==0).all() for t in cuda._tickets.values())

class Operators(TorchDispatchMode):
    "What PyTorch itself is asked to do"
    def __init__(self): super().__init__(); self.names = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name.split('::')[1])
        return func(*args, **(kwargs or {}))

@each_layout
@pytest.mark.parametrize('plan,each', [('as planned',1),('loop',1),('split',2)])
def test_one_launch_a_pass_or_two_and_nothing_else(layout, plan, each):
    "PyTorch only makes room, or views of it; with settings that are numbers, and with tensors"
    x,affine = activations((2,6,5,7), T32, layout),(torch.ones(6),torch.ones(6))
    def batch(state, step):
        _,saved = TritonKernels.forward(x, *affine, state, step)
        TritonKernels.backward(x, x, *affine, saved, state.grad, step)
    for w,share in ((.3,1.),(torch.tensor(.3),torch.tensor(.5))):
        state,step = narrow(new_state(6, trained=1), T32),KeptStep(2, w, .1, running_grad=share)
        with planned(plan):
            batch(state, step) # the integers are made
            with launches() as names, Operators() as ops: batch(state, step)
        assert names==(both_kernels if each==1 else all_four)
        room = {'empty','empty_like','new_empty','select','slice','detach','alias'}
        assert {*ops.names}<=room, ops.names

@each_layout
def test_a_kernel_is_compiled_for_each_kind_of_call(layout, monkeypatch):
    "Of what it was specialised for: which tensors are there, their dtypes, and where each begins"
    compiled = []
    def first_launch(self, kernel, args, constants):
        compiled.append(kernel.__name__)
        return (lambda *args: None),None,None
    monkeypatch.setattr(cuda.Plan, 'first_launch', first_launch)
    monkeypatch.setattr(cuda, 'current_stream', lambda index: 0)
    def begins(t, at):
        "The same tensor, `at` values after an address that is a multiple of 16"
        return torch.zeros(t.numel()+8)[at:at+t.numel()].as_strided(t.shape, t.stride())
    x,w = laid_out(torch.zeros(2,4,5,3), layout),torch.ones(4)
    saved,state,step = torch.zeros(7,4),narrow(new_state(4), T32),Step(2, .3, .1, running_grad=1.)
    with planned('as planned'):
        for a,b in [(0,0),(0,1),(1,0),(1,1)]*2:
            dy,x_ = begins(x, b),begins(x, a)
            TritonKernels.backward(dy, x_, w, w, saved, state.grad, step)
        assert compiled==['runbn_backward']*4
        for times in range(2):
            for weight in (None,w,w.bfloat16()):
                for a in (0,1): TritonKernels.forward(begins(x, a), weight, None, state, step)
        assert compiled[4:]==['runbn_forward']*6
        for share in (.5,torch.tensor(.5),torch.tensor(.5, dtype=torch.float64)):
            other = step._replace(weight=share)
            for times in range(2): TritonKernels.forward(x, w, None, state, other)
        assert len(compiled)==12 # a number is there already

# -------------------------------------------------------------------------------- as layers
def trained(layer, x, steps=3):
    "Outputs, gradients and state of some steps"
    torch.manual_seed(0)
    res = []
    for i in range(steps):
        a = (x*(1+i)).requires_grad_()
        y = layer(a)
        y.backward(gradients(x)) # of a fixed seed
        res += [y.detach(), a.grad, *[p.grad.clone() for p in layer.parameters()]]
        layer.zero_grad()
    return [*res, *[b.clone() for b in layer.buffers()]]

def are_those_of(exact, got, x):
    "Are `got` as `trained` has them of a layer in float64?"
    for i,(a,b) in enumerate(zip(got, trained(exact, x.double()), strict=True)):
        near(a, b.double(), 3e-5, f'value {i}')

@pytest.mark.parametrize('kw', [{}, dict(affine=False), dict(momentum=.1), dict(momentum=None),
    dict(window=8, running_grad=.5), dict(eval_window=None, clamp=None)], ids=str)
@pytest.mark.parametrize('layout', ['contiguous','last'])
def test_layers(kw, layout):
    x = activations((2,4,5,3), T32, layout)
    layer = RunningBatchNorm2d(4, backend='triton', **kw)
    with on_the_cpu(): got = trained(layer, x)
    assert layer.path=='triton'
    exact = RunningBatchNorm2d(4, backend='formulas', dtype=torch.float64, **kw)
    are_those_of(exact, got, x)

@pytest.mark.parametrize('dtype', [B16,H16], ids=str)
def test_layers_in_half_precision(dtype):
    layer,x = RunningBatchNorm2d(4, backend='triton', dtype=dtype),activations((4,4,5,3), dtype)
    layer.loss_scale = False
    exact = copy.deepcopy(layer)
    exact.backend = 'formulas'
    with on_the_cpu(): got = trained(layer, x, 2)
    for i,(a,b) in enumerate(zip(got, trained(exact, x, 2))):
        assert a.dtype==b.dtype
        near(a, b.double(), .05, f'value {i}', 2**-6)

@pytest.mark.parametrize('reentrant', [True,False])
def test_checkpointing(reentrant):
    x = activations((2,4,5,3), T32)
    def norm(): return RunningBatchNorm2d(4, backend='triton')
    plain = nn.Sequential(nn.Conv2d(4,4,1), norm(), nn.ReLU(), norm())
    again = copy.deepcopy(plain)
    def checkpointed(m, x): return checkpoint(m, x, use_reentrant=reentrant)
    with on_the_cpu():
        for _ in range(2):
            got = []
            for m,f in ((plain,lambda m,x: m(x)),(again,checkpointed)):
                a = x.clone().requires_grad_()
                f(m, a).square().sum().backward()
                got.append([a.grad, *[p.grad for p in m.parameters()], *m.buffers()])
            for i,(a,b) in enumerate(zip(*got)): near(a, b.double(), 1e-6, f'value {i}')

def test_timms_activation_is_inside():
    pytest.importorskip('timm')
    from fastai_runbn.twins import RunningBatchNormAct2d
    x,layer = activations((2,4,5,3), T32),RunningBatchNormAct2d(4, act_layer=nn.SiLU)
    exact = copy.deepcopy(layer).double()
    layer.backend,exact.backend = 'triton','formulas'
    with on_the_cpu(), launches() as names: got = trained(layer, x)
    assert names==both_kernels*3
    are_those_of(exact, got, x)

def test_torch_compile():
    "One operator a pass, and in it one launch"
    x = activations((2,4,5,3), T32)
    layer = RunningBatchNorm2d(4, backend='triton')
    exact = RunningBatchNorm2d(4, backend='formulas', dtype=torch.float64)
    compiled = torch.compile(layer, backend='aot_eager', fullgraph=True)
    with on_the_cpu(), launches() as names: got = trained(compiled, x)
    assert names==both_kernels*3
    are_those_of(exact, got, x)

# ------------------------------------------------------------------- where they cannot be had
@pytest.mark.parametrize('plan', ['as planned','split'])
@pytest.mark.parametrize('fails', all_four)
def test_a_kernel_that_does_not_compile(fails, plan, monkeypatch):
    "One warning, then formulas; nothing is counted twice"
    if plan=='as planned' and fails not in both_kernels: pytest.skip('not launched')
    monkeypatch.setattr(TritonKernels, 'broken', False)
    monkeypatch.setattr(TritonKernels, 'name', 'triton')
    first = cuda.Plan.first_launch
    def broken(self, kernel, *args):
        if kernel.__name__==fails: raise cuda.NotCompiled('RuntimeError: no C compiler')
        return first(self, kernel, *args)
    monkeypatch.setattr(cuda.Plan, 'first_launch', broken)
    x,layer = activations((2,4,5,6), T32),RunningBatchNorm2d(4, backend='triton')
    exact = RunningBatchNorm2d(4, backend='formulas', dtype=torch.float64)
    with on_the_cpu(), planned(plan), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        got = trained(layer, x)
    assert [str(w.message) for w in said]==[cuda._failed.format('RuntimeError: no C compiler')]
    assert layer.path=='formulas' and layer.num_batches_tracked==3
    are_those_of(exact, got, x)

def test_without_triton(monkeypatch):
    functional.triton_kernels.cache_clear()
    monkeypatch.setitem(sys.modules, 'fastai_runbn.kernels.cuda', None)
    with pytest.warns(UserWarning, match="backend='triton': there is none here"):
        assert functional.triton_kernels() is Formulas
    functional.triton_kernels.cache_clear()
