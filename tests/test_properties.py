"""Random shapes, layouts, dtypes, batch sizes and settings, a few steps each, against the oracle
and against the reference; the nightly profile takes ten times as many"""
from functools import partial
import numpy as np,torch
from hypothesis import given,strategies as st
from fastai_runbn.layers import LESSON10,RunningBatchNorm1d,RunningBatchNorm2d,RunningBatchNorm3d
from fastai_runbn.moments import AdaptiveWindow,auto_momentum,lesson10_weight
from fastai_runbn.reference import ReferenceRunningBatchNorm
from oracle import Oracle,channels

layers = {2:RunningBatchNorm1d, 3:RunningBatchNorm1d, 4:RunningBatchNorm2d, 5:RunningBatchNorm3d}
tols = {torch.float64:1e-9, torch.float32:2e-4,
    torch.bfloat16:2e-2, torch.float16:4e-3} # of the largest value of a tensor

def by_values(bs, M): return M/(M+20)
lengths = st.floats(1,40)
windows = st.one_of(lengths, lengths.map(AdaptiveWindow),
    st.just(by_values), st.just(lesson10_weight))
momenta = st.one_of(st.just(auto_momentum), st.just(auto_momentum),
    st.just(None), st.floats(0,1))
floors = st.lists(st.floats(0,.5), max_size=30)
settings = st.fixed_dictionaries(dict(window=windows, momentum=momenta,
    running_grad=st.sampled_from([0.,.25,.5,1.]),
    eval_window=st.one_of(st.none(), st.integers(1,300)),
    clamp=st.one_of(st.none(), floors),
    clamp_inclusive=st.booleans(), persistent_window=st.booleans(),
    backend=st.sampled_from(['auto','formulas'])))
sizes = st.integers(1,4)
shapes = st.tuples(sizes, st.lists(sizes, max_size=3))
batches = st.lists(st.integers(1,9), min_size=1, max_size=6)
layouts = st.sampled_from(['contiguous','channels_last','strided','transposed'])
seeds = st.integers(0,2**31-1)

channels_last = {4:torch.channels_last, 5:torch.channels_last_3d} # by dimensions
def laid_out(x, layout):
    "The values of `x` in another place in memory"
    if layout=='channels_last' and x.ndim>3:
        return x.to(memory_format=channels_last[x.ndim])
    if layout=='strided': return torch.stack([x, x+1], -1)[...,0]
    if layout=='transposed':
        swapped = x.transpose(0,-1).contiguous()
        return swapped.transpose(0,-1)
    return x

def data(rng, bs, C, space, dtype, layout):
    "Activations with a mean and a scale of their own in each channel, and a gradient"
    shape = (bs,C,*space)
    one = (1,C)+(1,)*len(space)
    x = rng.normal(size=shape)*rng.uniform(.3,3,one)
    x += rng.normal(size=one)
    dy = rng.normal(size=shape)+.2
    x,dy = [laid_out(torch.tensor(a).to(dtype), layout) for a in (x,dy)]
    return x.requires_grad_(),dy

def near(have, want, tol, what):
    "Finite, and off by less than `tol` of the largest value, or of 1"
    have = channels(have) if have.ndim>1 else have.detach().double()
    have,want = have.numpy(),np.asarray(want)
    assert np.isfinite(have).all(), what
    largest = max(1, np.abs(want).max())
    err = np.abs(have-want).max()/largest
    assert err < tol, f'{what}: off by {err:.1e} (bound {tol:.0e})'

def equal(have, want, what):
    torch.testing.assert_close(have, want, rtol=0, atol=0, msg=what)

parameters = st.sampled_from(['both','weight','none'])
whose_gradients = st.tuples(st.booleans(), st.booleans()) # of x, of the weight

@given(settings=settings, shape=shapes, batches=batches,
    dtype=st.sampled_from(list(tols)), layout=layouts,
    affine=parameters, needs=whose_gradients, seed=seeds)
def test_layer_is_the_oracle(settings, shape, batches, dtype, layout, affine, needs, seed):
    "Outputs, gradients and all state after each step"
    (C,space),tol = shape,tols[dtype]
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    kw = {} if affine=='both' else dict(affine=affine!='none')
    if dtype==torch.float64: kw['dtype'] = dtype
    layer = layers[2+len(space)](C, eps=1e-3, **kw, **settings)
    if affine=='weight': layer.bias = None
    weight,bias = layer.weight,layer.bias
    if weight is not None:
        torch.nn.init.uniform_(weight, .5, 2).requires_grad_(needs[1])
    scale_and_shift = [1. if weight is None else weight, 0. if bias is None else bias]
    oracle = Oracle(C, eps=1e-3, **settings)
    for i,bs in enumerate(batches):
        x,dy = data(rng, bs, C, space, dtype, layout)
        x.requires_grad_(needs[0])
        layer.zero_grad()
        y = layer(x)
        anyones = any(t.requires_grad for t in (x,*layer.parameters()))
        assert (y.dtype,y.shape,y.requires_grad) == (x.dtype,x.shape,anyones)
        if y.requires_grad: y.backward(dy)
        else: oracle.running_grad = 0. # no backward, no running gradient
        y64,*grads = oracle.step(x, dy, *scale_and_shift)
        at = f'step {i}, bs {bs}'
        near(y, y64, tol, f'y, {at}')
        for t,want,what in zip((x,weight,bias), grads, ('dx','dw','db')):
            if t is None or not t.requires_grad: continue
            near(t.grad, want, tol, f'{what}, {at}')
        mean,var = oracle.statistics()
        state = dict(window_mean=mean, window_var=var, window_count=oracle.n,
            running_mean=oracle.rm, running_var=oracle.rv)
        state_tol = max(1e-9, min(tol, 1e-4))
        for k,want in state.items():
            near(getattr(layer, k), want, state_tol, f'{k}, {at}')
        if layer.running_grad:
            grad = layer.window_grad.flatten()
            near(grad, oracle.gbar.flatten(), tol, f'window_grad, {at}')
        known = layer.window_innovations.flatten()
        near(known, oracle.known.flatten(), tol, f'innovations, {at}')
    assert layer.samples_seen.item() == oracle.seen
    assert layer.num_batches_tracked.item() == oracle.steps
    assert layer.skipped_batches.item() == 0

@given(mom=st.floats(.02,1), shape=shapes, batches=batches,
    layout=layouts, affine=st.booleans(), seed=seeds)
def test_layer_is_lesson_10s(mom, shape, batches, layout, affine, seed):
    "Outputs and gradients of each step, and outputs in evaluation"
    C,space = shape
    rng = np.random.default_rng(seed)
    settings = LESSON10 | dict(window=partial(lesson10_weight, mom=mom))
    kw = dict(eps=1e-3, affine=affine)
    layer = layers[2+len(space)](C, dtype=torch.float64, **kw, **settings)
    ref = ReferenceRunningBatchNorm(C, mom=mom, **kw).double()
    for i,bs in enumerate(batches):
        x,dy = data(rng, bs, C, space, torch.float64, layout)
        xr = x.detach().clone().requires_grad_()
        layer.zero_grad()
        ref.zero_grad()
        y,yr = layer(x),ref(xr)
        y.backward(dy)
        yr.backward(dy)
        at = f'step {i}, bs {bs}'
        near(y, channels(yr), 1e-9, f'y, {at}')
        near(x.grad, channels(xr.grad), 1e-9, f'dx, {at}')
        for p,r in zip(layer.parameters(), ref.parameters()):
            near(p.grad, r.grad.numpy(), 1e-9, f'parameter gradient, {at}')
    x = torch.tensor(rng.normal(size=(2,C,*space)))
    # in evaluation too the reference has its floor, we have none
    layer.running_var.clamp_(min=.01 if sum(batches)<20 else 0)
    y,yr = layer.eval()(x),ref.eval()(x)
    near(y, channels(yr), 1e-9, 'y in evaluation')

six_times = st.lists(st.booleans(), min_size=6, max_size=6)
not_finite = float('nan'),float('inf'),-float('inf'),3e38 # a variance of the last is not
written = ('window_mean','window_var','window_count','running_mean','running_var',
    'eval_steps','window_grad')

@given(batches=batches, bad=six_times, what=st.sampled_from(not_finite),
    running_grad=st.sampled_from([0.,.5]), seed=seeds)
def test_batches_that_are_not_finite_leave_no_trace(batches, bad, what, running_grad, seed):
    "A layer that sees them and one that does not, in channel 1; channel 0 sees only good ones"
    rng = np.random.default_rng(seed)
    layer,clean,both = [RunningBatchNorm2d(2, running_grad=running_grad, clamp=None)
        for _ in range(3)]
    for bs,is_bad in zip(batches, bad):
        x,dy = data(rng, bs, 2, (3,3), torch.float32, layout='contiguous')
        hurt = x.detach().clone()
        if is_bad:
            hurt[0,1,1,1] = what
            hurt[-1,1,0,0] = -what if what==3e38 else what
        hurt.requires_grad_()
        both(x).backward(dy)
        layer(hurt).backward(dy)
        if not is_bad:
            good = x.detach().clone().requires_grad_()
            clean(good).backward(dy)
    for k in written:
        have = getattr(layer, k)
        assert have.isfinite().all(), k
        equal(have[...,0], getattr(both, k)[...,0], f'{k} of the channel that is well')
        equal(have[...,1], getattr(clean, k)[...,1], f'{k} of the channel that had bad batches')
    assert layer.skipped_batches.item() == sum(bad[:len(batches)])
    assert layer.num_batches_tracked.item() == len(batches)
