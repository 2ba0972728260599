"""Triton's kernels without a GPU, in Triton's interpreter, beside the formulas in float64. On a GPU
test_cuda.py runs them; what the compiler makes of them: test_triton_compiled.py"""
import copy,sys,warnings
from itertools import product
import pytest,torch
from hypothesis import given,settings,strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
pytest.importorskip('triton', reason='Triton comes with PyTorch on Linux')
if torch.cuda.is_available():
    pytest.skip('there is a GPU: see test_cuda.py', allow_module_level=True)
from fastai_runbn import functional
from fastai_runbn.formulas import Formulas,KeptStep,Step
from fastai_runbn.kernels import cuda
from fastai_runbn.kernels.cuda import TritonKernels
from fastai_runbn.layers import RunningBatchNorm2d
from fastai_runbn.twins import RunningBatchNormAct2d
from interpreter import last_first,launches,on_the_cpu,planned,plans
from pairs import (B16,H16,Pair,T32,activations,calls,check_calls,check_overflow,
    check_overflow_of_the_average,check_parts,check_what_others_write,each_edge,gradients,halves,
    laid_out,narrow,near,new_state,same,small)

parametrize = pytest.mark.parametrize
halves[B16] = 2.**-7 # the interpreter does not round, it cuts off
each_plan = parametrize('plan', plans)
dtypes_and_plans = [(d,p) for d in cuda.dtypes for p in plans
    if d==T32 or p!='small blocks']
both_kernels = ['runbn_forward','runbn_backward']
all_four = ['runbn_forward','runbn_normalize','runbn_backward','runbn_input_gradient']
each_layout = parametrize('layout', ['contiguous','last'])

# --------------------------------------------------------------------------------- lockstep
# a program takes 20 ms and more
calls_here = calls | dict(shape=small, dtype=st.sampled_from(cuda.dtypes))
@settings(max_examples=40, deadline=None)
@given(**calls_here)
def test_every_call_is_the_formulas(**kw): check_calls(TritonKernels, **kw)

shapes = [(2,3,7,7), (3,2,17),
    (4,5), (2,3,3,5,4), (1,2,1,1)]

@each_layout
@parametrize('dtype,plan', dtypes_and_plans, ids=str)
@parametrize('shape', shapes, ids=str)
def test_every_form_and_grid(shape, dtype, layout, plan):
    N,C = shape[:2]
    pair = Pair(C, dtype, kernels=TritonKernels, floors=(.5,.3))
    with planned(plan):
        for i,act in enumerate(('relu','silu')):
            step = Step(N, .3, .1, running_grad=1., act=act)
            x = activations(shape, dtype, layout)
            pair.step(x, step, layout, backwards=2, at=f'step {i}')

@each_layout
@parametrize('plan', ['as planned','split'])
@parametrize('longest', [None,60.])
def test_30_steps(longest, layout, plan):
    "Settings as a layer's, batch sizes that change, the floor from over to under the variance"
    floors = [.5]*20+[.01]*40
    pair = Pair(3, T32, kernels=TritonKernels, floors=floors)
    sizes = torch.randint(1, 9, (30,)).tolist()
    with planned(plan):
        for i,bs in enumerate(sizes):
            weight,average = [min(1., bs/n) for n in (60,200)]
            step = Step(bs, weight, average,
                running_grad=1., eps=1e-3, longest=longest)
            x = activations((bs,3,4,3), T32, layout)
            pair.step(x, step, layout, at=f'step {i}')

@parametrize('plan', ['as planned','split'])
@parametrize('where', [0,1,-1])
@parametrize('value', ['nan','inf','-inf'])
def test_what_is_not_finite_stays_out(value, where, plan):
    "In one channel; the others, and the state of that one, are as without it"
    pair = Pair(3, T32, kernels=TritonKernels, trained=1)
    step = Step(2, .3, .1, running_grad=1.)
    with planned(plan):
        for i in range(3):
            x = activations((2,3,5,4), T32)
            if i==1: x[0,1].view(-1)[where] = float(value)
            pair.step(x, step, backwards=2, at=f'step {i}')
    assert pair.state.skipped==1

@each_layout
@parametrize('plan', ['as planned','split'])
def test_what_others_write(layout, plan):
    with planned(plan): check_what_others_write(TritonKernels, layout)

@parametrize('plan', ['as planned','split'])
def test_a_variance_that_overflows(plan):
    with planned(plan):
        check_overflow(TritonKernels)
        check_overflow_of_the_average(TritonKernels)

@each_edge
@parametrize('plan', ['as planned','split'])
def test_edges(plan, check):
    with planned(plan): check(TritonKernels)

@each_layout
@parametrize('plan', plans)
def test_variance_beside_a_large_mean(layout, plan):
    x = torch.randn(2,4,31,9).double()*.01+100
    x[0,0,0,0] += 30. # a first value far from the others
    x = x.float()
    with planned(plan): moments = TritonKernels.moments(laid_out(x, layout))
    wants = Formulas.moments(x.double())
    for have,want,tol in zip(moments, wants, (1e-6,1e-4)):
        assert ((have-want)/want).abs().max()<tol

@each_plan
@each_layout
@parametrize('act', [None,'silu'])
def test_parts_are_the_whole(layout, act, plan):
    torch.manual_seed(0)
    x = activations((3,5,6,4), T32, layout)
    step = Step(3, .3, .1, running_grad=1., act=act)
    dy = gradients(x, layout)
    affine = torch.randn(5),torch.randn(5)
    a = narrow(new_state(5, trained=1), T32)
    b = narrow(a, T32)
    def equal(have, want, what):
        near(have, want.double(), 1e-6, what)
    with planned(plan):
        check_parts(TritonKernels, x, dy, affine, (a,b), step=step, equal=equal)

# ------------------------------------------------------------------- programs and their order
@each_layout
@parametrize('plan', plans)
def test_results_do_not_depend_on_who_is_last(layout, plan):
    "To the bit; and the integers by which programs find out who is last are 0 again"
    def run():
        torch.manual_seed(0)
        state = new_state(5, trained=1, floors=[.1]*9)
        state = narrow(state, T32)
        step = Step(2, .3, .1, running_grad=1.)
        affine = None,None
        state.avg_mean[1] += 1 # others have written
        got = []
        for i in range(3):
            x = activations((2,5,3,4), T32, layout)
            if i==1: x[0,2,0,0] = float('inf')
            y,saved = TritonKernels.forward(x, *affine, state, step)
            dy = gradients(x, layout)
            grads = TritonKernels.backward(dy, x, *affine, saved, state.grad, step)
            got += [y,saved,*grads]
        return got+[t.clone() for t in state]
    with planned(plan):
        one = run()
        with last_first(): other = run()
    for i,(a,b) in enumerate(zip(one, other)):
        same(a, b, i)
    for t in cuda._tickets.values():
        assert (t==0).all()

class Operators(TorchDispatchMode):
    "What PyTorch itself is asked to do"
    def __init__(self):
        super().__init__()
        self.names = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name.split('::')[1])
        return func(*args, **(kwargs or {}))

@each_layout
@parametrize('plan,each', [('as planned',1), ('loop',1), ('split',2)])
def test_one_launch_a_pass_or_two_and_nothing_else(layout, plan, each):
    "PyTorch only makes room, or views of it; with settings that are numbers, and with tensors"
    x = activations((2,6,5,7), T32, layout)
    affine = torch.ones(6),torch.ones(6)
    numbers,tensors = (.3,1.),(torch.tensor(.3),torch.tensor(.5))
    def batch(state, step):
        _,saved = TritonKernels.forward(x, *affine, state, step)
        TritonKernels.backward(x, x, *affine, saved, state.grad, step)
    for weight,share in (numbers,tensors):
        state = narrow(new_state(6, trained=1), T32)
        step = KeptStep(2, weight, .1, running_grad=share)
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
        "Zeros laid out as `t`, `at` values after an address that is a multiple of 16"
        n = t.numel()
        room = torch.zeros(n+8)[at:at+n]
        return room.as_strided(t.shape, t.stride())
    x = laid_out(torch.zeros(2,4,5,3), layout)
    w,saved = torch.ones(4),torch.zeros(7,4)
    state = narrow(new_state(4), T32)
    step = Step(2, .3, .1, running_grad=1.)
    both = 0,1
    with planned('as planned'):
        for a,b in [*product(both, both)]*2:
            dy,x_ = begins(x, b),begins(x, a)
            TritonKernels.backward(dy, x_, w, w, saved, state.grad, step=step)
        assert compiled==['runbn_backward']*4
        for weight,a in [*product((None,w,w.bfloat16()), both)]*2:
            TritonKernels.forward(begins(x, a), weight, None, state, step)
        assert compiled[4:]==['runbn_forward']*6
        half = torch.tensor(.5)
        for share in (.5,half,half.double()):
            other = step._replace(weight=share)
            for _ in range(2): TritonKernels.forward(x, w, None, state, other)
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
        res += [y.detach(),a.grad]
        res += [p.grad.clone() for p in layer.parameters()]
        layer.zero_grad()
    return res+[b.clone() for b in layer.buffers()]

def are_those_of(exact, got, x):
    "Are `got` as `trained` has them of a layer in float64?"
    want = trained(exact, x.double())
    for i,(a,b) in enumerate(zip(got, want, strict=True)):
        near(a, b.double(), 3e-5, f'value {i}')

layer_settings = [{}, dict(affine=False), dict(momentum=.1), dict(momentum=None),
    dict(window=8, running_grad=.5), dict(eval_window=None, clamp=None)]

@parametrize('kw', layer_settings, ids=str)
@parametrize('layout', ['contiguous','last'])
def test_layers(kw, layout):
    x = activations((2,4,5,3), T32, layout)
    layer = RunningBatchNorm2d(4, backend='triton', **kw)
    with on_the_cpu(): got = trained(layer, x)
    assert layer.path=='triton'
    exact = RunningBatchNorm2d(4, backend='formulas', dtype=torch.float64, **kw)
    are_those_of(exact, got, x)

@parametrize('dtype', [B16,H16], ids=str)
def test_layers_in_half_precision(dtype):
    layer = RunningBatchNorm2d(4, backend='triton', dtype=dtype)
    x = activations((4,4,5,3), dtype)
    layer.loss_scale = False
    exact = copy.deepcopy(layer)
    exact.backend = 'formulas'
    with on_the_cpu(): got = trained(layer, x, 2)
    want = trained(exact, x, 2)
    for i,(a,b) in enumerate(zip(got, want)):
        assert a.dtype==b.dtype
        near(a, b.double(), .05, f'value {i}', 2**-6)

@parametrize('reentrant', [True,False])
def test_checkpointing(reentrant):
    x = activations((2,4,5,3), T32)
    first,second = [RunningBatchNorm2d(4, backend='triton') for _ in range(2)]
    plain = nn.Sequential(nn.Conv2d(4,4,1), first, nn.ReLU(), second)
    again = copy.deepcopy(plain)
    def checkpointed(x): return checkpoint(again, x, use_reentrant=reentrant)
    def step(model, forward):
        "Gradients and buffers after it"
        a = x.clone().requires_grad_()
        forward(a).square().sum().backward()
        grads = [p.grad for p in model.parameters()]
        return [a.grad, *grads, *model.buffers()]
    with on_the_cpu():
        for _ in range(2):
            want = step(plain, plain)
            got = step(again, checkpointed)
            for i,(a,b) in enumerate(zip(want, got)):
                near(a, b.double(), 1e-6, f'value {i}')

def test_timms_activation_is_inside():
    pytest.importorskip('timm')
    from fastai_runbn.twins import RunningBatchNormAct2d
    x = activations((2,4,5,3), T32)
    layer = RunningBatchNormAct2d(4, act_layer=nn.SiLU)
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
@parametrize('plan', ['as planned','split'])
@parametrize('fails', all_four)
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
    x = activations((2,4,5,6), T32)
    layer = RunningBatchNorm2d(4, backend='triton')
    exact = RunningBatchNorm2d(4, backend='formulas', dtype=torch.float64)
    with on_the_cpu(), planned(plan), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        got = trained(layer, x)
    failed = cuda._failed.format('RuntimeError: no C compiler')
    assert [str(w.message) for w in said]==[failed]
    assert layer.path=='formulas' and layer.num_batches_tracked==3
    are_those_of(exact, got, x)

def test_without_triton(monkeypatch):
    functional.triton_kernels.cache_clear()
    monkeypatch.setitem(sys.modules, 'fastai_runbn.kernels.cuda', None)
    with pytest.warns(UserWarning, match="backend='triton': there is none here"):
        assert functional.triton_kernels() is Formulas
    functional.triton_kernels.cache_clear()
