"""The C kernels beside the formulas in float64: whole calls and parts of them, any form and memory
layout of what comes in, threads, forks, instruction sets, and that they write where they may"""
import copy,ctypes,os,shutil,subprocess,sys,threading
from pathlib import Path
import pytest,torch
from hypothesis import given
from torch import randn
from fastai_runbn.formulas import Formulas,KeptStep,State,Step
from fastai_runbn.kernels import cpu
from fastai_runbn.kernels.cpu import Kernels
from fastai_runbn.layers import RunningBatchNorm2d
from fastai_runbn.moments import AdaptiveWindow
from impls import backends,names,needs_kernels
from pairs import (B16,H16,Pair,T32,T64,activations,calls,check_calls,check_overflow,
    check_overflow_of_the_average,check_parts,check_what_others_write,each_edge,gradients,halves,
    laid_out,narrow,near,new_state,same,statistics_dtype,tols)

parametrize = pytest.mark.parametrize
root = Path(cpu.__file__).resolve().parent
each_layout = parametrize('layout', ['contiguous','last'])
each_dtype = parametrize('dtype', list(tols), ids=str)
each_type = parametrize('dtype', [T64,T32,B16], ids=str) # of the kernels: no float16

@needs_kernels
@given(**calls)
def test_every_call_is_the_formulas(**kw): check_calls(Kernels, **kw)

@needs_kernels
@parametrize('form,layout', [((8,9,9),'contiguous'), ((8,37),'last')], ids=str)
@each_type
@parametrize('longest', [None,60.])
def test_300_steps(longest, dtype, layout, form):
    "Settings as a layer's, batch sizes that change, the floor from over to under the variance"
    floors = [.5]*20+[.01]*40
    pair = Pair(form[0], dtype, floors=floors)
    sizes = torch.randint(1, 9, (300,)).tolist()
    for i,bs in enumerate(sizes):
        weight,average = [min(1., bs/n) for n in (60,200)]
        step = Step(bs, weight, average,
            running_grad=1., eps=1e-3, longest=longest)
        x = activations((bs,*form), dtype, layout)
        pair.step(x, step, layout, at=f'step {i}')

@needs_kernels
@each_layout
def test_what_others_write(layout): check_what_others_write(Kernels, layout)

each_implementation = parametrize('implementation',
    [Formulas,pytest.param(Kernels, marks=needs_kernels)])
@each_implementation
def test_a_variance_that_overflows(implementation):
    check_overflow(implementation)
    check_overflow_of_the_average(implementation)

@each_edge
@each_implementation
def test_edges(implementation, check): check(implementation)

@each_implementation
@each_type
def test_results_have_the_inputs_dtype(implementation, dtype):
    "And parameters' gradients that of the statistics"
    x,T = activations((2,3,4), dtype),statistics_dtype(dtype)
    state,step = narrow(new_state(3), T),Step(2, .3, .1)
    y,saved = implementation.forward(x, None, None, state, step)
    dx,dw,db = implementation.backward(gradients(x), x, None, None, saved, state.grad, step=step)
    assert [t.dtype for t in (y,dx,dw,db)]==[dtype,dtype,T,T]

@pytest.fixture(params=[0,1,2], ids=['base','avx2','avx512'])
def instruction_set(request, monkeypatch):
    "Kernels use this one, where the processor has it"
    if request.param>cpu.instruction_set: pytest.skip('this processor does not have it')
    monkeypatch.setattr(cpu, 'instruction_set', request.param)
    return request.param

forms = [(3,5,7,7), (2,130,5,4),
    (4,6), (1,300,2,2),
    (2,64,16,16), (2,3,100,90),
    (2,33,31), (5,7,9,8,2)]

@needs_kernels
@each_layout
@each_type
def test_every_instruction_set(instruction_set, dtype, layout):
    for form in forms:
        for act in (None,'relu','silu'):
            pair = Pair(form[1], dtype, floors=[.5]*8)
            for i in range(2):
                x = activations(form, dtype, layout)
                if i: # one batch, though its channels are worked on apart
                    for c in (1,-1):
                        x[0,c].view(-1)[0] = float('nan')
                step = Step(form[0], .3, .02,
                    running_grad=1., eps=1e-3, act=act)
                pair.step(x, step, layout, 2, scale=2., at=f'{form}, {act}, step {i}')

@needs_kernels
@each_layout
@parametrize('act', [None,'relu','silu'])
def test_bfloat16_is_float32_rounded_to_the_nearest(act, layout):
    "To the bit: both are computed alike, and rounded once"
    a,b = [narrow(new_state(67, trained=1), T32) for _ in range(2)]
    b = State(*[t.clone() for t in a])
    affine = randn(67),randn(67)
    x = activations((4,67,9,11), B16, layout)
    x[0,3,0,0] = float('nan')
    x[1,5,2,2] = float('inf')
    dy = gradients(x, layout)
    step = Step(4, .3, running_grad=1., act=act)
    y,saved = Kernels.forward(x, *affine, a, step)
    dx,*sums = Kernels.backward(dy, x, *affine, saved, a.grad, step)
    x32,dy32 = x.float(),dy.float()
    y32,saved32 = Kernels.forward(x32, *affine, b, step)
    dx32,*sums32 = Kernels.backward(dy32, x32, *affine, saved32, b.grad, step)
    same(y, y32.bfloat16(), 'y')
    same(dx, dx32.bfloat16(), 'dx')
    same(saved, saved32, 'saved')
    assert y.isnan().any()
    assert (dx32.bfloat16().float()!=dx32).any() # something was rounded
    for have,want in zip((*sums,*a), (*sums32,*b)):
        same(have, want, 'sums and state')

@needs_kernels
@each_layout
def test_bfloat16_ties_go_to_even_and_nan_stays_nan(instruction_set, layout):
    "Halfway between two values, which what is computed from random numbers never is"
    neighbours = (torch.arange(128)/128+1).bfloat16()
    # 120 values: vectors and a rest
    x = neighbours.repeat(3).view(1,3,16,8)[...,:15,:]
    if layout=='last':
        pixel = neighbours[:120].view(1,120,1,1)
        x = pixel.expand(1,120,3,1).clone()
    x,C = laid_out(x, layout),x.shape[1]
    step = Step(1, 1., eps=0.)
    saved = torch.tensor([0.,1,1,1,0,1,1])
    saved = saved.view(7,1).repeat(1,C)
    half = torch.full((C,), 2.**-8)
    want = (x.float()+2**-8).bfloat16()
    assert (want>x).any() and (want==x).any()
    y = Kernels.normalize(x, None, half, saved, step)
    same(y, want, 'y')
    G = torch.stack((-half, torch.zeros(C)))
    dx = Kernels.dx(x, x, None, None, saved, G, step=step)
    same(dx, want, 'dx')
    nan = torch.tensor([2**31-1]).int().view(T32) # rounds to -0, if up
    y = Kernels.normalize(x, None, nan.expand(C), saved, step)
    assert y.isnan().all()

# ------------------------------------------------------------------------------- parts of calls
@each_implementation
@each_layout
@each_dtype
@parametrize('act', [None,'relu','silu'])
def test_parts_are_the_whole(dtype, layout, act, implementation):
    for form in forms:
        C,T = form[1],statistics_dtype(dtype)
        a = narrow(new_state(C, floors=[.5]*99), T)
        affine = randn(2, C, dtype=T)
        b = narrow(a, T)
        step = Step(form[0], .3, .02, None, .5, act=act)
        for _ in range(2):
            x = activations(form, dtype, layout)
            dy = gradients(x, layout)
            check_parts(implementation, x, dy, affine, (a,b), step=step, equal=same)

# --------------------------------------------------------------------------- odd things that come
def dense(t): return t.detach().clone(memory_format=torch.contiguous_format)

def check_odd(x, dy, weight=None, bias=None):
    "Kernels with these against formulas in float64 with the same values"
    exact = new_state(x.shape[1], trained=1)
    step = Step(len(x), .3, .1, running_grad=1., eps=1e-3)
    state = narrow(exact, statistics_dtype(x.dtype))
    kept = dense(x),dense(dy)
    affine = weight,bias
    x64,dy64,*affine64 = [t if t is None else dense(t).double()
        for t in (x,dy,*affine)]
    y,saved = Kernels.forward(x, *affine, state, step)
    y64,saved64 = Formulas.forward(x64, *affine64, exact, step)
    grads = Kernels.backward(dy, x, *affine, saved, state.grad, step)
    grads64 = Formulas.backward(dy64, x64, *affine64, saved64, exact.grad, step)
    tol,half = tols[x.dtype],halves[x.dtype]
    near(y, y64, tol, 'y', half)
    for name,have,want in zip(('dx','dw','db'), grads, grads64):
        near(have, want, tol, name, half)
    for name,have,want in zip(State._fields, state, exact):
        near(have, want, tol, name)
    same(x, kept[0], 'x')
    same(dy, kept[1], 'dy')

def strided(n, size, stride):
    "Of `n` random values in memory"
    return lambda: randn(n).as_strided(size, stride)

odd = {
    '1x1 maps, channels last': lambda: laid_out(randn(2,8,1,1), 'last'),
    '1x1 maps, any stride there': strided(64, (2,8,1,1), (8,1,5,3)),
    '1x1 maps, channels apart': strided(200, (2,8,1,1), (80,9,1,1)),
    'one sample, any stride': strided(400, (1,8,5,5), (7,25,5,1)),
    'one sample, channels last': strided(400, (1,8,5,5), (3,1,40,8)),
    'one channel, channels last': lambda: laid_out(randn(3,1,5,5), 'last'),
    'one channel, any stride': strided(75, (3,1,5,5), (25,11,5,1)),
    'one row': lambda: randn(2,8,1,5).transpose(2,3),
    'one row, any stride': strided(80, (2,8,1,5), (40,5,99,1)),
    'one value': strided(9, (1,1,1,1), (4,3,2,9)),
    'one row of an array': strided(90, (1,8), (50,1)),
    'one column': strided(30, (7,1), (4,1)),
    'a column of length 1': strided(24, (3,8,1), (8,1,17)),
    'rows, channels last': lambda: randn(3,9,8).mT,
    'a map of rows': lambda: randn(1,8,9).mT.contiguous().mT,
    'every second pixel': lambda: randn(2,8,9,9)[...,::2,::2],
    'some channels': lambda: randn(2,12,5,5)[:,3:11],
    'some channels of channels last': lambda: laid_out(randn(2,12,5,5), 'last')[:,3:11],
    'a column of rows': lambda: randn(6,20)[:,5:13],
    'from the middle': lambda: randn(401)[1:].view(2,8,5,5),
    'expanded samples': lambda: randn(1,8,5,5).expand(3,-1,-1,-1),
    'expanded pixels': lambda: randn(3,8,1,1).expand(-1,-1,5,5),
    'overlapping': lambda: randn(2,8,30).unfold(2, 5, 2),
    'depth last': lambda: randn(2,4,5,3,8).permute(0,4,2,3,1),
    'channels last, 3-d': lambda: laid_out(randn(2,8,3,4,5), 'last'),
    'one slice, 3-d': lambda: laid_out(randn(2,8,1,4,1), 'last'),
    '6-d': lambda: randn(2,8,2,3,2,2),
    'negated, not yet computed': lambda: torch._neg_view(randn(2,8,5,5)),
    'imaginary, of a conjugate': lambda: randn(2,8,5,5, dtype=torch.cfloat).conj().imag}

def in_dtype(x, dtype):
    "With the same strides, where `to` would have others"
    if x.dtype==dtype or x.is_neg(): return x.to(dtype)
    whole = x.new_empty(0).set_(x.untyped_storage())
    whole = whole.to(dtype)
    return whole.as_strided(x.shape, x.stride(), x.storage_offset())

@needs_kernels
@parametrize('dtype', [T32,B16], ids=str)
@parametrize('kind', odd)
def test_activations_of_any_strides(kind, dtype):
    x,dy = [in_dtype(odd[kind](), dtype) for _ in range(2)]
    check_odd(x, dy)
    for way in ('contiguous','last'):
        check_odd(x, laid_out(dy, way))
        check_odd(laid_out(x, way), dy)

def expanded(x, *shape):
    return randn(shape).to(x.dtype).expand_as(x)
def negated(t): # a view's copy_ to float32 is wrong of float16
    return -t if t.dtype==H16 else torch._neg_view(t)
others = {
    'expanded from a scalar': lambda x: expanded(x),
    'expanded from channels': lambda x: expanded(x, 1, x.shape[1], 1, 1),
    'expanded from samples': lambda x: expanded(x, len(x), 1, 1, 1),
    'contiguous': lambda x: gradients(x),
    'channels last': lambda x: gradients(x, 'last'),
    'strided': lambda x: gradients(x, 'strided'),
    'transposed': lambda x: gradients(x, 'transposed'),
    'zeros without memory': lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    'negated, not yet computed': lambda x: negated(gradients(x)),
    'float64': lambda x: gradients(x).double(),
    'float32': lambda x: gradients(x).float(),
    'bfloat16': lambda x: laid_out(gradients(x).bfloat16(), 'last'),
    'float16': lambda x: gradients(x).half()}

few_forms = (3,8,5,7),(2,130,3,3),(1,1,4,4)

@needs_kernels
@parametrize('kind', others)
@each_layout
@each_dtype
def test_gradients_of_any_kind(dtype, layout, kind):
    for form in few_forms:
        x = activations(form, dtype, layout)
        dy,C = others[kind](x),form[1]
        check_odd(x, dy, weight=randn(C), bias=randn(C))

losses = dict(sum=torch.sum, mean=torch.mean,
    pooled=lambda y: y.mean((2,3)).square().sum(),
    some=lambda y: y.mT.flatten()[::3].sum(),
    double=lambda y: y.double().pow(2).sum())

@needs_kernels
@parametrize('loss', losses.values(), ids=losses)
@each_layout
def test_gradients_that_autograd_makes(layout, loss):
    "Of values that are expanded, strided, or of another dtype"
    a = RunningBatchNorm2d(6)
    b = RunningBatchNorm2d(6, backend='formulas').double()
    for _ in range(5):
        x = activations((3,6,7,5), T32, layout)
        x.requires_grad_()
        x64 = dense(x).double().requires_grad_()
        for layer,inp in ((a,x),(b,x64)):
            layer.zero_grad()
            loss(layer(inp)).backward()
        near(x.grad, x64.grad, 1e-5, 'dx')
        for (n,p),q in zip(a.named_parameters(), b.parameters()):
            near(p.grad, q.grad, 3e-5, n)
        near(a.window_grad, b.window_grad, 1e-5, 'running gradient')
    assert a.path=='cpu'

parameters = {
    'every second': lambda C: randn(2*C)[::2],
    'expanded': lambda C: torch.full((1,), 1.5).expand(C),
    'a column': lambda C: randn(C,3)[:,1],
    'from the middle': lambda C: randn(C+1)[1:],
    'float64': lambda C: randn(C).double(),
    'bfloat16': lambda C: randn(C).bfloat16(),
    'float16': lambda C: randn(2*C).half()[::2]}

@needs_kernels
@parametrize('kind', parameters)
@each_layout
@parametrize('dtype', [T32,T64,B16], ids=str)
def test_parameters_of_any_kind(dtype, layout, kind):
    for C in (1,7,130):
        x = activations((3,C,5,4), dtype, layout)
        make = parameters[kind]
        affines = (make(C),make(C)),(None,make(C)),(make(C),None)
        for affine in affines:
            check_odd(x, gradients(x, layout), *affine)

@needs_kernels
@each_layout
@parametrize('dtype', [B16,H16], ids=str)
def test_layers_in_half_precision(dtype, layout):
    "Parameters and running statistics are, the window is not; somebody writes the statistics"
    layers = [RunningBatchNorm2d(6, backend=n).to(dtype)
        for n in ('auto','formulas')]
    a,b = layers
    half = 2*halves[dtype]
    for i in range(20):
        if i==10:
            for layer in layers: layer.running_mean.fill_(.5)
        x = activations((3,6,7,5), dtype, layout)
        dy = gradients(x, layout)
        ys,dxs = [],[]
        for layer in layers:
            inp = x.clone().requires_grad_()
            layer.zero_grad()
            y = layer(inp)
            y.backward(dy)
            ys.append(y)
            dxs.append(inp.grad)
        assert a.path=='cpu'
        assert (a.running_var.dtype,a.window_var.dtype)==(dtype,T32)
        near(*ys, 1e-5, 'y', half)
        near(*dxs, 1e-5, 'dx', half)
        for (n,p),q in zip(a.named_parameters(), b.parameters()):
            near(p.grad, q.grad, 1e-5, n, half)
        for (n,p),q in zip(a.named_buffers(), b.buffers()):
            rounded = 0 if n.startswith('window') else half
            near(p, q, 1e-5, n, rounded)
        assert (a.samples_seen>2**40)==(i>=10)

# ------------------------------------------------------------------------------------- accuracy
def outlier(x, where):
    "`x` with values far from all others"
    if where=='first value': x[0,:,0,0] = 1e6
    if where=='first row': x[0,:,0] = 1e6
    if where=='first sample': x[0] = 1e6
    return x

def relative(have, want):
    return ((have-want)/want).abs().max().item()
def mean_and_var(x):
    "In float64, of each channel"
    var,mean = torch.var_mean(x.double(), (0,2,3), correction=0)
    return mean,var

large_and_small_maps = [(8,16,24,24),
    (2,3,150,150), (32,130,5,5)]

@needs_kernels
@each_layout
@parametrize('where', ['nowhere','first value','first row','first sample'])
@parametrize('ratio', [1e4,1e5])
@parametrize('form', large_and_small_maps, ids=str)
def test_variance_beside_a_large_mean(form, ratio, where, layout):
    x = outlier(randn(form)+ratio, where)
    x = laid_out(x, layout)
    mean,var = Kernels.moments(x)
    mean64,var64 = mean_and_var(x)
    assert relative(var.double(), var64)<1e-3
    bound = 6e-8*mean64.abs()+1e-5*var64.sqrt()
    assert ((mean.double()-mean64).abs()<bound).all()
    state = narrow(new_state(form[1]), T32)
    step = Step(form[0], .3, clamped=False)
    saved = Kernels.statistics(x, state, step)
    for have in (saved[1],state.var,state.avg_var):
        assert relative(have.double(), var64)<1e-3

@parametrize('backend', backends)
@parametrize('mean,sigma', [(1.,1e-4),(0.,1e-3)])
def test_small_variance_of_a_first_batch(mean, sigma, backend):
    "Window and average begin with a variance of 1, beside which it is next to nothing"
    layer = RunningBatchNorm2d(4, backend=backend)
    x = randn(8,4,16,16)*sigma+mean
    layer(x)
    _,var64 = mean_and_var(x)
    assert layer.path==names[backend]
    for var in (layer.window_var,layer.running_var):
        assert relative(var.double(), var64)<1e-3

# ----------------------------------------------------------------------- settings and statistics
@needs_kernels
@parametrize('what', ['weight','average','running_grad'])
def test_tensors_of_a_step_may_change(what):
    "One step, several calls"
    value = torch.tensor(.25)
    pair = Pair(8, T32)
    settings = dict(weight=.3, average=.1, running_grad=1.) | {what:value}
    step = Step(4, **settings)
    for _ in range(4):
        x = activations((4,8,5,5), T32)
        pair.step(x, step, backwards=2)
        value.add_(.125)

@needs_kernels
def test_weight_of_one_element():
    weight = torch.tensor([.25]+[.75]*63)[:1] # beyond its end is memory that may be read, here
    pair = Pair(8, T32)
    for _ in range(3):
        x = activations((4,8,5,5), T32)
        pair.step(x, Step(4, weight))

@needs_kernels
def test_statistics_with_nan_are_taken_over_once():
    pair = Pair(4, T64, trained=1)
    for s in (pair.exact,pair.state):
        s.avg_mean[1] = float('nan')
    for _ in range(3):
        x = activations((4,4,5,5), T64)
        pair.step(x, Step(4, .3, .1, running_grad=1.))

@needs_kernels
def test_a_bad_batch_where_the_average_is_to_be_the_window():
    "It was another one until now: settings have changed"
    pair = Pair(4, T64, trained=1)
    x = activations((4,4,5,5), T64)
    x[0,1,0,0] = float('nan')
    pair.step(x, Step(4, .3))

# -------------------------------------------------------------------------------------- threads
@pytest.fixture
def threads():
    "Sets their number; it is as before in the end"
    n = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(n)

def run_all(work):
    "Pairs of a function and its arguments, each in a thread of Python"
    ts = [threading.Thread(target=f, args=args) for f,args in work]
    for t in ts: t.start()
    for t in ts: t.join()

def some_steps(form, dtype, layout, act, steps=2):
    "Everything that comes out of a few batches"
    torch.manual_seed(0)
    C,T = form[1],statistics_dtype(dtype)
    state = narrow(new_state(C, floors=[.5]*5), T)
    affine = randn(2, C, dtype=T)
    step = Step(form[0], .3, .02, running_grad=1., act=act)
    res = []
    for i in range(steps):
        x = activations(form, dtype, layout)
        if i==1:
            x[0,1].view(-1)[3] = float('nan')
        y,saved = Kernels.forward(x, *affine, state, step)
        dy = gradients(x, layout)
        grads = Kernels.backward(dy, x, *affine, saved, state.grad, step)
        res += [y, saved, *grads]
        res += [t.clone() for t in state]
    return res

wide_forms = [ # over 16384 values
    (2,37,41,43), (3,130,17,19),
    (1,2,101,91), (2,515,5,7), (2,64,40,40)]

@needs_kernels
@each_layout
@each_type
def test_results_do_not_depend_on_the_number_of_threads(dtype, layout, threads):
    acts = None,'silu','relu','silu',None
    for form,act in zip(wide_forms, acts):
        threads(1)
        want = some_steps(form, dtype, layout, act)
        for n in (2,3):
            threads(n)
            have = some_steps(form, dtype, layout, act)
            for h,w in zip(have, want):
                same(h, w, f'{n} threads')

@needs_kernels
@each_layout
def test_work_of_any_number_of_threads_in_any_order(layout, threads, monkeypatch):
    "A pool that is not PyTorch's: of 1 to 7 threads, as many as were asked for or fewer"
    address,number = ctypes.c_void_p,ctypes.c_uint
    asked = []
    @ctypes.CFUNCTYPE(None, address, address, number, number)
    def pool(work, job, n, flags):
        asked.append(n)
        work = ctypes.CFUNCTYPE(None, address)(work)
        run_all([(work,(job,))]*max(1, n-1))
    form = (2,37,41,43)
    want = some_steps(form, T32, layout, 'silu')
    monkeypatch.setattr(cpu, 'parallel', ctypes.cast(pool, address).value)
    for n in range(1,8):
        monkeypatch.setattr(cpu, 'threads', lambda: n)
        asked.clear()
        have = some_steps(form, T32, layout, 'silu')
        for h,w in zip(have, want):
            same(h, w, f'{n} threads')
        assert set(asked)==({n} if n>1 else set())
    asked.clear()
    some_steps((2,5,9,9), T32, layout, None)
    assert not asked, 'threads for next to nothing'

def train(layer, dtype, layout, seed, steps=12):
    "Outputs and gradients of some batches, and what the layer is then"
    gen = torch.Generator().manual_seed(seed)
    res = []
    for _ in range(steps):
        x = randn(4,16,40,40, generator=gen)
        x = laid_out(x.to(dtype), layout).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        res += [y.detach(),x.grad]
    res += [p.grad for p in layer.parameters()]
    return res+[b.clone() for b in layer.buffers()]

@needs_kernels
@parametrize('n', [1,2])
def test_two_threads_at_once(n, threads):
    "Of Python, each with its own layer"
    threads(n)
    kinds = [(T32,'contiguous'), (B16,'last')]
    start = threading.Barrier(2)
    want = [train(RunningBatchNorm2d(16), *k, seed=i)
        for i,k in enumerate(kinds)]
    have = [None,None]
    def run(i):
        layer = RunningBatchNorm2d(16)
        start.wait(60)
        have[i] = train(layer, *kinds[i], seed=i)
        assert layer.path=='cpu'
    run_all([(run,(i,)) for i in range(2)])
    for h,w in zip(have, want):
        assert h is not None
        for a,b in zip(h, w, strict=True):
            same(a, b, 'two at once')

forked = '''
import os,signal,sys,time,torch
from fastai_runbn.layers import RunningBatchNorm2d
layer,bn = RunningBatchNorm2d(16),torch.nn.BatchNorm2d(16)
def use():
    for norm in (layer,bn):
        x = torch.randn(4,16,48,48, requires_grad=True)
        norm(x).square().sum().backward()
        assert x.grad.isfinite().all()
    assert layer.path=='cpu'
def child():
    try:
        torch.set_num_threads(1) # as workers of a DataLoader do
        use()
        os._exit(0)
    except BaseException as e: print(repr(e), file=sys.stderr, flush=True)
    os._exit(1)
def wait(pid):
    end = time.monotonic()+60
    while time.monotonic()<end:
        done,status = os.waitpid(pid, os.WNOHANG)
        if done: return os.waitstatus_to_exitcode(status)
        time.sleep(.05)
    os.kill(pid, signal.SIGKILL)
    return 'hangs'
for threads in (1,2):
    torch.set_num_threads(threads)
    use()
    pid = os.fork()
    if pid==0: child()
    print(threads, wait(pid))
    use()
'''

@needs_kernels
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork here')
def test_fork():
    "A child computes on one thread, as PyTorch's own operators do, though its parent had a pool"
    done = subprocess.run([sys.executable, '-c', forked], cwd=root.parent.parent,
        timeout=300, capture_output=True, text=True)
    assert (done.returncode,done.stdout)==(0,'1 0\n2 0\n'), done.stderr

# ------------------------------------------------------------------------------ version counters
@parametrize('dtype', [T32,B16], ids=str)
@parametrize('backend', backends)
def test_a_training_forward_between_an_evaluation_and_its_backward(backend, dtype):
    "Statistics that a backward needs are gone: an error (BatchNorm's CPU kernel says nothing)"
    norm = RunningBatchNorm2d(4, backend=backend).to(dtype)
    x = randn(2,4,3,3, dtype=dtype, requires_grad=True)
    norm(x)
    y = norm.eval()(x)
    y.sum().backward(retain_graph=True) # nothing has happened yet
    norm(x).sum().backward()
    norm.train()(x)
    assert norm.path==names[backend]
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        y.sum().backward()

@parametrize('backend', backends)
def test_version_counters_of_the_statistics(backend):
    "Up with each forward in training, by a view too; not in evaluation"
    norm = RunningBatchNorm2d(4, backend=backend)
    x = randn(2,4,3,3)
    def versions():
        return norm.running_mean._version,norm.running_var[1:]._version
    for training in (True,True,False):
        before = versions()
        norm.train(training)(x)
        for now,was in zip(versions(), before):
            assert (now>was)==training

@parametrize('backend', backends)
def test_version_counters_of_all_that_is_written(backend):
    "All buffers in the forward but the running gradient, which the backward writes; known_* follow"
    norm = RunningBatchNorm2d(4, backend=backend, window=AdaptiveWindow())
    x = randn(2,4,3,3)
    known = {'known_mean','known_var'}
    def versions(): return {n:b._version for n,b in norm.named_buffers()}
    def risen(do):
        "What it returns, and the buffers whose counters it has moved"
        before = versions()
        res = do()
        return res,{n for n,v in versions().items() if v>before[n]}-known
    y,forward = risen(lambda: norm(x))
    _,backward = risen(lambda: y.sum().backward())
    assert backward=={'window_grad'}
    assert forward==versions().keys()-{'window_grad'}-known

@needs_kernels
def test_version_counters_where_torch_takes_one_tensor_at_a_time(monkeypatch):
    "As torch 2.4 does"
    def one(t):
        if not isinstance(t, torch.Tensor): raise RuntimeError('increment_version expect a Tensor')
        torch.autograd.graph.increment_version(t)
    monkeypatch.setattr(cpu, 'increment_version', one)
    norm = RunningBatchNorm2d(4)
    def versions(): return norm.running_mean._version,norm.window_grad._version
    before = versions()
    norm(randn(2,4,3,3)).sum().backward()
    for now,was in zip(versions(), before): assert now>was

@needs_kernels
def test_plans_are_each_threads_own():
    "Two threads with batches of other sizes, and one step that is kept for both"
    xs = [randn(2,c,3,3) for c in (5,3000)]
    step = KeptStep(2, .1)
    def plan(step, x): return cpu.plan(step, x.shape, x.dtype, 0)
    wants = [plan(Step(*step), x) for x in xs]
    wrong = []
    def run(x, want):
        for _ in range(20_000):
            if plan(step, x)!=want: wrong.append(x.shape)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try: run_all([(run,args) for args in zip(xs, wants)])
    finally: sys.setswitchinterval(before)
    assert not wrong

@needs_kernels
def test_activations_without_memory_are_an_error():
    "Zeros that PyTorch keeps no memory for: an address that nothing may be read from"
    x = torch._efficientzerotensor((2,4,3,3), dtype=torch.float32)
    with pytest.raises(MemoryError, match='without memory'): Kernels.moments(x)

@needs_kernels
def test_float16_gradients_that_are_negated_but_not_yet_computed():
    "PyTorch's own `copy_` of them to float32 is wrong"
    x,dy = randn(2,2,4,3,3).half()
    norm = RunningBatchNorm2d(4)
    affine,step = (None,None),norm.step(x)
    _,saved = Kernels.forward(x, *affine, norm.state(), step)
    def backward(dy):
        running = norm.window_grad.clone()
        return Kernels.backward(dy, x, *affine, saved.clone(), running, step)
    noted,computed = backward(torch._neg_view(dy)),backward(-dy)
    for have,want in zip(noted, computed):
        assert torch.equal(have, want)

@needs_kernels
def test_how_is_chosen_anew_where_something_has_changed():
    "Type of window, of activations, backend, a setting; size and layout of a batch"
    norm = RunningBatchNorm2d(4)
    x = randn(2,4,3,3)
    def path(x):
        norm(x)
        return norm.path
    assert path(x)==path(x)=='cpu'
    norm.double()
    assert path(x)=='formulas' # float32 beside statistics in float64
    assert path(x.double())=='cpu'
    norm.float()
    assert path(x.double())=='formulas' and path(x)=='cpu'
    norm.backend = 'formulas'
    assert path(x)=='formulas'
    norm.backend = 'auto'
    assert path(x)=='cpu'
    changes = dict(window=7., running_grad=.5, momentum=.1,
        clamp=None, eval_window=9)
    batches = (2,'contiguous'),(2,'last'),(3,'last'),(2,'contiguous')
    for name,value in changes.items():
        twin = copy.deepcopy(norm).requires_grad_(False)
        norm.set_settings(**{name:value})
        twin.set_settings(**{name:value})
        twin.backend = 'formulas'
        for n,form in batches:
            batch = laid_out(randn(n,4,3,3), form)
            torch.testing.assert_close(norm(batch), twin(batch))
        for a,b in zip(norm.buffers(), twin.buffers()):
            torch.testing.assert_close(a, b)

# --------------------------------------------------------------------------------------- memory
driver = r'''
#include "cpu.c"
#include <pthread.h>
#include <stdio.h>
typedef struct { void (*f)(void *); void *arg; } todo;
static void *one(void *t) { ((todo *)t)->f(((todo *)t)->arg); return 0; }
static void pool(void (*f)(void *), void *arg, unsigned n, unsigned flags) {
    pthread_t t[8];
    todo what = {f, arg};
    for (unsigned i = 1; i < n; i++) pthread_create(t + i, 0, one, &what);
    f(arg);
    for (unsigned i = 1; i < n; i++) pthread_join(t[i], 0);
}
static void *bufs[64];
static int made;
static void *get_off(i64 bytes, i64 off) { // exactly so many, of no number
    void *p;
    if (posix_memalign(&p, 64, bytes + off)) abort();
    bufs[made++] = p;
    return memset((char *)p + off, 0xff, bytes);
}
static void *get(i64 bytes) { return get_off(bytes, 0); } // as aligned as PyTorch's
static double rnd(void) {
    static uint32_t s = 1;
    s = s * 1664525u + 1013904223u;
    return (s >> 8) / 8388608. - 1;
}
static void set(void *p, i64 i, int type, double v) {
    float f = v;
    uint32_t u;
    memcpy(&u, &f, 4);
    if (type == 1) ((double *)p)[i] = v;
    else if (type == 0) ((float *)p)[i] = f;
    else ((uint16_t *)p)[i] = u >> 16;
}
static const int bytes[] = {4, 8, 2};
static void *some(i64 n, int type, double from, double spread) {
    void *p = get(n * bytes[type]);
    for (i64 i = 0; i < n; i++) set(p, i, type, from + spread * rnd());
    return p;
}
static void check(const void *p, i64 n, int type, const char *what, const call *c) {
    for (i64 i = 0; i < n; i++) {
        uint32_t u = type == 2 ? (uint32_t)((uint16_t *)p)[i] << 16 : 0;
        float f;
        memcpy(&f, &u, 4);
        double v = type == 1 ? ((double *)p)[i] : type == 0 ? ((float *)p)[i] : f;
        if (v - v == 0) continue;
        printf("%s[%d] is %g: isa %d type %d N %d C %d S %d last %d act %d\n", what, (int)i, v,
               (int)c->isa, (int)c->type, (int)c->N, (int)c->C, (int)c->S, (int)c->last,
               (int)c->act);
        exit(2);
    }
}
static void try(int isa, int type, i64 N, i64 C, i64 S, int last, int act, int split, int lean) {
    i64 n = N * C * S, counters[3] = {0, 9, 0}; // more samples seen than floors
    int wide = type == 1; // type of the statistics
    call c = {.type = type, .isa = isa, .N = N, .C = C, .S = S, .last = last, .act = act,
              .samples = N, .weight = .3, .average = .1, .momentum = .2, .eps = 1e-3, .clip = 4,
              .clip_max = 1, .pays = 1, .threads = 3, .scale = 1, .par = pool};
    c.flags = UPDATE | CLAMPED | CLIPPED | RUNNING | OWN_AVERAGE | (lean ? SET : 0);
    c.batches = counters; c.seen = counters + 1; c.skipped = counters + 2;
    c.x = some(n, type, 1, 2);
    c.y = get_off(n * bytes[type], lean * bytes[type]);
    if (!lean) { c.gamma = some(C, wide, 1, .5); c.beta = some(C, wide, 0, 1); }
    if (lean) c.weights = some(C, wide, .5, .4);
    void **zeros[] = {&c.mean, &c.count, &c.avg_mean, &c.steps};
    for (int i = 0; i < 4; i++) *zeros[i] = some(C, wide, i == 3 ? 9 : 0, 0);
    c.var = some(C, wide, 1, 0);
    c.avg_var = some(C, wide, 1, 0);
    if (!lean) { c.known_mean = some(C, wide, 0, 0); c.known_var = some(C, wide, 1, 0); }
    c.floors = some(c.n_floors = 4, wide, .01, 0);
    c.grad = some(2 * C, wide, 0, 1);
    c.saved = get(7 * C * bytes[wide]);
    int parts[2][4] = {{MOMENTS | MERGE | NORMALISE, 0}, {MOMENTS, MERGE, NORMALISE, 0}};
    if (split && !last) parts[1][0] = MOMENTS | MERGE, parts[1][1] = NORMALISE, parts[1][2] = 0;
    for (int *p = parts[split]; *p; p++) { c.phases = *p; if (runbn_forward(&c)) exit(3); }
    check(c.y, n, type, "y", &c);
    check(c.saved, 7 * C, wide, "saved", &c);
    c.dy = some(n, type, 0, 1);
    c.dbeta = get(C * bytes[wide]);
    c.dgamma = get(C * bytes[wide]);
    c.y = get_off(n * bytes[type], lean * bytes[type]);
    if (split) c.G = get(2 * C * bytes[wide]);
    int back[2][4] = {{SUMS | REACT | DX, 0}, {SUMS | REACT, SUMS, DX, 0}};
    for (int *p = back[split]; *p; p++) { c.phases = *p; if (runbn_backward(&c)) exit(3); }
    check(c.y, n, type, "dx", &c);
    check(c.dbeta, C, wide, "dbeta", &c);
    check(c.dgamma, C, wide, "dgamma", &c);
    check(c.grad, 2 * C, wide, "grad", &c);
    void *state[] = {c.mean, c.var, c.count, c.avg_mean, c.avg_var, c.steps};
    for (int i = 0; i < 6; i++) check(state[i], C, wide, "state", &c);
    if (counters[0] != 1 || counters[1] != 9 + N || counters[2]) exit(4);
    while (made) free(bufs[--made]);
}
int main(int argc, char **argv) {
    static const i64 shapes[][3] = {{1, 1, 1}, {2, 3, 1}, {1, 130, 1}, {7, 5, 3}, {3, 1, 17},
        {2, 4, 16}, {1, 3, 33}, {2, 7, 63}, {3, 33, 15}, {2, 129, 7}, {5, 9, 31}, {1, 2, 100},
        {2, 127, 9},
        {1, 128, 20}, {33, 64, 1}, {4, 100, 5}, {2, 16, 130}, {1, 5, 2049}, {3, 37, 200},
        {2, 513, 25}, {1, 1, 20011}, {9, 300, 8}, {2, 24, 777}, {500, 33, 1}, {3, 600, 16},
        {1, 64, 16384}, {4, 512, 256}, {1, 24, 44001}};
    int isas = atoi(argv[1]), n = atoi(argv[2]), tried = 0;
    for (int i = 0; i < least(n, sizeof shapes / sizeof *shapes); i++) {
        const i64 *s = shapes[i];
        int big = s[0] * s[1] * s[2] > 500000;
        for (int isa = 0; isa <= isas; isa++) for (int type = 0; type < 3; type++)
            for (int last = 0; last < 2; last++) for (int act = 0; act < 3; act++)
                for (int k = 0; k < 4; k++) {
                    if (big && (act || k & 1)) continue;
                    try(isa, type, s[0], s[1], s[2], last, act, k & 1, k >> 1);
                    tried++;
                }
    }
    printf("%d\n", tried);
    return 0;
}
'''
flags = '-std=gnu11 -g -fno-math-errno -fno-trapping-math -fopenmp-simd -pthread -Wno-psabi'.split()
sanitize = '-O1 -fsanitize=address,undefined -fno-sanitize-recover=all'.split()

def compiled(cc, d, *options, source=driver):
    "The driver, or `None`"
    (d/'driver.c').write_text(source)
    command = [cc, *flags, *options, f'-I{root}', 'driver.c', '-o', 'driver', '-lm']
    done = subprocess.run(command, cwd=d, capture_output=True, text=True)
    return d/'driver' if done.returncode==0 else print(done.stderr)

def test_nothing_is_written_out_of_bounds(request, tmp_path):
    "Buffers of exactly the size; all types, layouts, activations, instruction sets; threads too"
    if not request.config.getoption('--slow'): pytest.skip('takes a minute, run with pytest --slow')
    found = [os.environ.get('CC'), *map(shutil.which, ('gcc','clang','cc'))]
    cc = next(filter(None, found), None)
    if not cc: pytest.skip('no C compiler')
    exe,sets = None,cpu.instruction_set
    if compiled(cc, tmp_path, *sanitize, source='int main(void) { return 0; }'):
        exe,command,shapes = compiled(cc, tmp_path, *sanitize),[],99
    elif shutil.which('valgrind'): # which has no AVX-512, and takes its time
        exe,sets = compiled(cc, tmp_path, '-O2'),min(sets, 1)
        command,shapes = ['valgrind','-q','--error-exitcode=9','--leak-check=full'],20
    else: pytest.skip('neither AddressSanitizer nor valgrind')
    assert exe
    fill = 'max_malloc_fill_size=1000000000:malloc_fill_byte=255' # what is read is what was written
    command = [*command, exe, str(sets), str(shapes)]
    env = {**os.environ, 'ASAN_OPTIONS':fill}
    done = subprocess.run(command, env=env, timeout=900, capture_output=True, text=True)
    assert done.returncode==0, done.stdout+done.stderr[-3000:]
    assert int(done.stdout)>1000 and not done.stderr
