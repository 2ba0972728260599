"Random shapes, layouts, dtypes, batch sizes and settings, a few steps each, against the oracle and against the reference; the nightly profile takes ten times as many"
from functools import partial
import numpy as np,torch
from hypothesis import given,strategies as st
from fastai_runbn.layers import LESSON10,RunningBatchNorm1d,RunningBatchNorm2d,RunningBatchNorm3d
from fastai_runbn.moments import AdaptiveWindow,auto_momentum,lesson10_weight
from fastai_runbn.reference import ReferenceRunningBatchNorm
from oracle import Oracle,channels

layers = {2:RunningBatchNorm1d, 3:RunningBatchNorm1d, 4:RunningBatchNorm2d, 5:RunningBatchNorm3d}
tols = {torch.float64:1e-9, torch.float32:2e-4, torch.bfloat16:2e-2, torch.float16:4e-3} # of the largest value of a tensor

def by_values(bs, M): return M/(M+20)
lengths = st.floats(1,40)
windows = st.one_of(lengths, lengths.map(AdaptiveWindow),
    st.just(by_values), st.just(lesson10_weight))
momenta = st.one_of(st.just(auto_momentum), st.just(auto_momentum), st.just(None), st.floats(0,1))
settings = st.fixed_dictionaries(dict(window=windows, momentum=momenta, running_grad=st.sampled_from([0.,.25,.5,1.]), eval_window=st.one_of(st.none(), st.integers(1,300)),
    clamp=st.one_of(st.none(), st.lists(st.floats(0,.5), max_size=30)), clamp_inclusive=st.booleans(), persistent_window=st.booleans(),
    backend=st.sampled_from(['auto','formulas'])))
shapes = st.tuples(st.integers(1,4), st.lists(st.integers(1,4), max_size=3))
batches = st.lists(st.integers(1,9), min_size=1, max_size=6)
layouts = st.sampled_from(['contiguous','channels_last','strided','transposed'])
seeds = st.integers(0,2**31-1)

def laid_out(x, layout):
    "The values of `x` in another place in memory"
    if layout=='channels_last' and x.ndim>3: return x.to(memory_format=torch.channels_last if x.ndim==4 else torch.channels_last_3d)
    if layout=='strided': return torch.stack([x, x+1], -1)[...,0]
    if layout=='transposed': return x.transpose(0,-1).contiguous().transpose(0,-1)
    return x

def data(rng, bs, C, space, dtype, layout):
    "Activations with a mean and a scale of their own in each channel, and a gradient"
    shape = (bs,C,*space)
    one = (1,C)+(1,)*len(space)
    x = torch.tensor(rng.normal(size=shape)*rng.uniform(.3,3,one)+rng.normal(size=one)).to(dtype)
    dy = torch.tensor(rng.normal(size=shape)+.2).to(dtype)
    return laid_out(x, layout).requires_grad_(),laid_out(dy, layout)

def near(have, want, tol, what):
    have,want = (channels(have) if have.ndim>1 else have.detach().double()).numpy(),np.asarray(want)
    assert np.isfinite(have).all(), what
    err = np.abs(have-want).max()/max(1, np.abs(want).max())
    assert err < tol, f'{what}: off by {err:.1e} (bound {tol:.0e})'

@given(settings=settings, shape=shapes, batches=batches, dtype=st.sampled_from(list(tols)), layout=layouts,
       affine=st.sampled_from(['both','weight','none']), needs=st.tuples(st.booleans(), st.booleans()), seed=seeds)
def test_layer_is_the_oracle(settings, shape, batches, dtype, layout, affine, needs, seed):
    (C,space),rng,tol = shape,np.random.default_rng(seed),tols[dtype]
    torch.manual_seed(seed)
    kw = {} if affine=='both' else dict(affine=affine!='none')
    layer = layers[2+len(space)](C, dtype=torch.float64 if dtype==torch.float64 else None, eps=1e-3, **kw, **settings)
    if affine=='weight': layer.bias = None
    if layer.weight is not None: torch.nn.init.uniform_(layer.weight, .5, 2).requires_grad_(needs[1])
    oracle = Oracle(C, eps=1e-3, **settings)
    for i,bs in enumerate(batches):
        x,dy = data(rng, bs, C, space, dtype, layout)
        x.requires_grad_(needs[0])
        layer.zero_grad()
        y = layer(x)
        assert (y.dtype, y.shape, y.requires_grad) == (x.dtype, x.shape, x.requires_grad or any(p.requires_grad for p in layer.parameters()))
        if y.requires_grad: y.backward(dy)
        else: oracle.running_grad = 0.                                       # no backward, no running gradient
        want = oracle.step(x, dy, 1. if layer.weight is None else layer.weight, 0. if layer.bias is None else layer.bias)
        at = f'step {i}, bs {bs}'
        near(y, want[0], tol, f'y, {at}')
        for t,w,what in ((x,want[1],'dx'), (layer.weight,want[2],'dw'), (layer.bias,want[3],'db')):
            if t is not None and t.requires_grad: near(t.grad, w, tol, f'{what}, {at}')
        mean,var = oracle.statistics()
        state = dict(window_mean=mean, window_var=var, window_count=oracle.n, running_mean=oracle.rm, running_var=oracle.rv)
        for k,want in state.items(): near(getattr(layer, k), want, max(1e-9, min(tol, 1e-4)), f'{k}, {at}')
        if layer.running_grad: near(layer.window_grad.flatten(), oracle.gbar.flatten(), tol, f'window_grad, {at}')
        near(layer.window_innovations.flatten(), oracle.known.flatten(), tol, f'innovations, {at}')
    assert (layer.samples_seen.item(), layer.num_batches_tracked.item(), layer.skipped_batches.item()) == (oracle.seen, oracle.steps, 0)

@given(mom=st.floats(.02,1), shape=shapes, batches=batches, layout=layouts, affine=st.booleans(), seed=seeds)
def test_layer_is_lesson_10s(mom, shape, batches, layout, affine, seed):
    (C,space),rng = shape,np.random.default_rng(seed)
    layer = layers[2+len(space)](C, dtype=torch.float64, eps=1e-3, affine=affine, **{**LESSON10, 'window':partial(lesson10_weight, mom=mom)})
    ref = ReferenceRunningBatchNorm(C, mom=mom, eps=1e-3, affine=affine).double()
    for i,bs in enumerate(batches):
        x,dy = data(rng, bs, C, space, torch.float64, layout)
        xr = x.detach().clone().requires_grad_()
        layer.zero_grad(); ref.zero_grad()
        y,yr = layer(x),ref(xr)
        y.backward(dy); yr.backward(dy)
        at = f'step {i}, bs {bs}'
        near(y, channels(yr), 1e-9, f'y, {at}'); near(x.grad, channels(xr.grad), 1e-9, f'dx, {at}')
        for p,r in zip(layer.parameters(), ref.parameters()): near(p.grad, r.grad.numpy(), 1e-9, f'parameter gradient, {at}')
    x = torch.tensor(rng.normal(size=(2,C,*space)))
    layer.running_var.clamp_(min=.01 if sum(batches)<20 else 0)         # in evaluation too the reference has its floor, we have none
    near(layer.eval()(x), channels(ref.eval()(x)), 1e-9, 'y in evaluation')

@given(batches=batches, bad=st.lists(st.booleans(), min_size=6, max_size=6), what=st.sampled_from([float('nan'),float('inf'),-float('inf'),3e38]), running_grad=st.sampled_from([0.,.5]), seed=seeds)
def test_batches_that_are_not_finite_leave_no_trace(batches, bad, what, running_grad, seed):
    "A layer that sees them and one that does not, in channel 1; channel 0 sees only good ones"
    rng = np.random.default_rng(seed)
    layer,clean,both = (RunningBatchNorm2d(2, running_grad=running_grad, clamp=None) for _ in range(3))
    for bs,b in zip(batches, bad):
        x,dy = data(rng, bs, 2, (3,3), torch.float32, 'contiguous')
        hurt = x.detach().clone()
        if b: hurt[0,1,1,1] = what; hurt[-1,1,0,0] = -what if what==3e38 else what
        hurt.requires_grad_()
        both(x).backward(dy); layer(hurt).backward(dy)
        if not b: clean(x.detach().clone().requires_grad_()).backward(dy)
    for k in ('window_mean','window_var','window_count','running_mean','running_var','eval_steps','window_grad'):
        have = getattr(layer, k)
        assert have.isfinite().all(), k
        torch.testing.assert_close(have[...,0], getattr(both, k)[...,0], rtol=0, atol=0, msg=f'{k} of the channel that is well')
        torch.testing.assert_close(have[...,1], getattr(clean, k)[...,1], rtol=0, atol=0, msg=f'{k} of the channel that had bad batches')
    assert layer.skipped_batches.item() == sum(bad[:len(batches)]) and layer.num_batches_tracked.item() == len(batches)
