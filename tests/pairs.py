"Kernels and formulas, the latter in float64, in lockstep: what they get, how near they have to be"
import pytest,torch
from hypothesis import strategies as st
from fastai_runbn.formulas import Formulas,State,Step
from fastai_runbn.kernels.cpu import Kernels
from fastai_runbn.moments import auto_momentum

T32,T64 = torch.float32,torch.float64
B16,H16 = torch.bfloat16,torch.float16
tols = {T64:1e-11, T32:3e-5, B16:3e-5, H16:3e-5} # of 1 and the largest value of a tensor
saved_tols = {T64:1e-11, T32:3e-6, B16:3e-6, H16:3e-6} # the same, of what a backward is given
halves = {T64:0., T32:0., B16:2.**-8, H16:2.**-10} # and of each value, in results that are rounded

# ------------------------------------------------------------------------------ what they get
def laid_out(x, layout):
    "The values of `x` in another place in memory"
    if layout=='last': return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout=='strided': return torch.stack((x, x+1), -1)[...,0]
    if layout=='transposed': return x.transpose(0, -1).contiguous().transpose(0, -1)
    return x.contiguous()

def of_channels(t, x):
    "`t`, a value a channel, to go with `x`"
    space = [1]*(x.ndim-2)
    return t.view(1, -1, *space)
def coarse(*size): return torch.randn(size).bfloat16().double() # the same in all dtypes

def activations(shape, dtype, layout='contiguous'):
    "With a mean and a scale of their own in each channel"
    x = torch.randn(shape)
    scale = torch.rand(shape[1])*2.7+.3
    mean = torch.randn(shape[1])
    x = x*of_channels(scale, x)+of_channels(mean, x)
    return laid_out(x.to(dtype), layout)

def gradients(x, layout='contiguous'):
    dy = torch.randn(x.shape)+.2
    return laid_out(dy.to(x.dtype), layout)

def new_state(C, trained=0, floors=(), known=True, alike=False):
    "In float64, of values that float32 has too; `alike`: the average is the window"
    mean = coarse(C)*trained
    var = torch.ones(C).double()
    zeros = torch.zeros(C).double()
    if trained: var = coarse(C).abs()+.5
    if alike: avg = [mean.clone(),var.clone()]
    else: avg = [mean+coarse(C)*trained,var+trained*.5]
    kept = [t.clone() for t in avg] if known else [None,None]
    innovations = torch.stack((zeros+16, zeros+40,
        coarse(C)**2, coarse(C)))*trained
    return State(mean, var, zeros-trained, *avg,
        steps=zeros+9+7*trained, batches=torch.tensor(7*trained),
        seen=torch.tensor([2*trained]), skipped=torch.tensor(0),
        floors=torch.tensor((*floors,0.)).double(),
        grad=coarse(2,C)*trained, known_mean=kept[0], known_var=kept[1],
        innovations=innovations)

def narrow(state, T):
    "A copy in dtype `T`"
    def copied(t):
        dtype = T if t.is_floating_point() else t.dtype
        return t.to(dtype, copy=True)
    return State(*[None if t is None else copied(t) for t in state])

def statistics_dtype(dtype): return torch.promote_types(dtype, T32)

def near(have, want, tol, what, half=0.):
    "Finite in the same places, and there as near as that"
    assert have.shape==want.shape, what
    have,want = have.double(),want.double()
    good = want.isfinite()
    assert torch.equal(have.isfinite(), good), f'{what}: other values are finite'
    have,want = have[good],want[good]
    if not len(want): return
    off = (have-want).abs()-half*want.abs()
    largest = want.abs().max()
    worst = (off.max()/(1+largest)).item()
    assert worst<=tol, f'{what}: off by {worst:.1e} (bound {tol:.0e})'

def same(have, want, what):
    "To the bit; NaN is NaN"
    if want is None: assert have is None, what
    else: torch.testing.assert_close(have, want, rtol=0, atol=0,
        equal_nan=True, msg=lambda m: f'{what}: {m}')

def off_zero(dy, x, weight, bias, saved, step):
    "`dy`, but 0 where ReLU's argument is so near to 0 that rounding says whether it is open"
    if step.act!='relu': return dy
    without_act = step._replace(act=None)
    z = Formulas.normalize(x.double(), weight, bias, saved, without_act)
    return torch.where(z.abs()<1e-3, 0, dy)

# ---------------------------------------------------------------------------------- lockstep
class Pair:
    "A state for the formulas, in float64, and one for the kernels; `step` is a batch through both"
    def __init__(self, C, dtype, affine=True, kernels=Kernels, **state):
        self.kernels = kernels
        self.exact = new_state(C, **state)
        self.dtype,self.T = dtype,statistics_dtype(dtype)
        self.state = narrow(self.exact, self.T)
        self.tol,self.half = tols[dtype],halves[dtype]
        self.saved_tol = saved_tols[dtype]
        self.affine = [coarse(C),coarse(C)] if affine else [None,None]
        self.affine32 = [None if t is None else t.to(self.T)
            for t in self.affine]

    def states(self, at):
        for name,have,want in zip(State._fields, self.state, self.exact):
            if want is not None: near(have, want, self.tol, f'{name}, {at}')

    def others_write(self, some=False):
        "As a checkpoint does that is loaded; or in some channels, a few as if never trained"
        C = len(self.exact.mean)
        mean = coarse(C)
        var = coarse(C).abs()+.5
        where = torch.ones(C)>0
        if some:
            where = torch.rand(C)<.3
            mean[::3],var[::3] = 0.,1.
        for s in (self.exact,self.state):
            s.avg_mean.copy_(torch.where(where, mean, s.avg_mean))
            s.avg_var.copy_(torch.where(where, var, s.avg_var))

    def step(self, x, step, layout='contiguous', backwards=1,
        need_dx=True, scale=None, at=''):
        "A batch whose gradients are laid out as `layout`; `at` says in a failure where it was"
        x64,kept = x.double(),x.clone()
        y,saved = self.kernels.forward(x, *self.affine32, self.state, step)
        y64,saved64 = Formulas.forward(x64, *self.affine, self.exact, step)
        assert y.dtype==x.dtype and saved.dtype==self.T
        near(y, y64, self.tol, f'y, {at}', self.half)
        near(saved, saved64, self.saved_tol, f'saved, {at}')
        self.states(at)
        given = saved.to(T64, copy=True) # its rounding is no error of the backward
        for i in range(backwards):
            at_ = f'backward {i}, {at}'
            dy = off_zero(gradients(x), x, *self.affine, saved64, step)
            dy = laid_out(dy, layout)
            dx,*sums = self.kernels.backward(dy, x,
                *self.affine32, saved, self.state.grad, step, scale, need_dx)
            dx64,*sums64 = Formulas.backward(dy.double(), x64,
                *self.affine, given, self.exact.grad, step, scale, need_dx)
            assert (dx is None)==(dx64 is None)!=need_dx
            if need_dx:
                assert dx.dtype==x.dtype
                near(dx, dx64, self.tol, f'dx, {at_}', self.half)
            for n,have,want in zip(('dw','db'), sums, sums64):
                near(have, want, self.tol, f'{n}, {at_}')
            near(saved, given, self.tol, f'saved, {at_}')
            self.states(at_)
        same(x, kept, 'x')

sizes = st.integers(1,9)
small = st.tuples(sizes, st.lists(sizes, max_size=3))
large = st.sampled_from([
    (129,[3]), (130,[5,4]),
    (300,[]), (512,[1,2]),
    (1,[70,70]), (3,[61,67]),
    (5,[31,33,3]), (64,[16,16]),
    (67,[250]), (7,[4100]), (160,[13,11])])
layouts = st.sampled_from(['contiguous','contiguous','last','last','transposed','strided'])
weights = st.one_of(st.floats(.02,1),
    st.sampled_from([.3,1.,'scalar','channels']))
shares = st.one_of(st.just(0.), st.just(.5),
    st.just(1.), st.just('tensor'))
step_settings = st.fixed_dictionaries(dict(
    weight=weights, running_grad=shares,
    average=st.one_of(st.none(), st.floats(.005,1)),
    eps=st.sampled_from([1e-3,1e-2]),
    momentum=st.one_of(st.just(auto_momentum), st.none(), st.floats(.05,1)),
    clamped=st.booleans(), inclusive=st.booleans(),
    update=st.sampled_from([True,True,True,False]),
    act=st.sampled_from([None,'relu','silu']),
    clip=st.sampled_from([4.,4.,.5]),
    clip_max=st.sampled_from([1.,1.,.3,2.]),
    longest=st.sampled_from([None,3.,200.])))
floors = st.sampled_from([0.,1e-3,.01,.5,4.,100.])
states = st.fixed_dictionaries(dict(
    trained=st.integers(0,1),
    known=st.sampled_from([True,True,False]),
    floors=st.lists(floors, max_size=12)))
batch = st.fixed_dictionaries(dict(
    N=sizes, layout=layouts, dy=layouts,
    bad=st.sampled_from([None,None,None,'nan','inf','-inf']),
    need_dx=st.booleans(),
    others_write=st.sampled_from([None,None,None,'all','some']),
    backwards=st.integers(0,2),
    scale=st.sampled_from([None,8.,torch.tensor(.25)])))
batches = st.lists(batch, min_size=1, max_size=4)
calls = dict(
    shape=st.one_of(small, small, large), dtype=st.sampled_from(list(tols)),
    affine=st.booleans(), settings=step_settings, state=states, batches=batches,
    seed=st.integers(0,2**31-1))

def check_calls(kernels, shape, dtype, affine, settings, state, batches, seed):
    "Some batches, of any kind, through kernels and formulas"
    torch.manual_seed(seed)
    (C,space),settings = shape,dict(settings)
    tensors = {'scalar':torch.tensor(.375), 'tensor':torch.tensor(.75),
        'channels':torch.randint(1, 65, (C,)).double()/64}
    for k in ('weight','running_grad'):
        if isinstance(settings[k], str):
            settings[k] = tensors[settings[k]]
    alike = settings['average'] is None and settings['momentum'] is auto_momentum
    pair = Pair(C, dtype, affine, kernels, alike=alike, **state)
    for i,b in enumerate(batches):
        x = activations((b['N'],C,*space), dtype)
        if b['bad']:
            for c in torch.randint(C, (2,)):
                sample = x[-1,c].view(-1)
                sample[-1] = float(b['bad'])
        if b['others_write'] and state['known']:
            pair.others_write(b['others_write']=='some')
        x = laid_out(x, b['layout'])
        step = Step(b['N'], **settings)
        pair.step(x, step, layout=b['dy'],
            backwards=b['backwards'], need_dx=b['need_dx'],
            scale=b['scale'], at=f'batch {i}')

def check_what_others_write(kernels, layout):
    "All statistics, then those of some channels, under a floor; the loss is scaled"
    for seed in range(4):
        torch.manual_seed(seed)
        pair = Pair(5, T32, kernels=kernels, floors=[4.]*30)
        for i in range(4):
            if i: pair.others_write(some=i>1)
            longest = [None,60.][seed%2]
            step = Step(2, .3, .1,
                running_grad=1., eps=1e-3, longest=longest)
            x = activations((2,5,4,3), T32, layout)
            at = f'seed {seed}, step {i}'
            pair.step(x, step, layout, 2, scale=8., at=at)

def check_a_floor_by_channel(kernels):
    "Others write one channel of a new layer: that one is trained and has no floor, the next has"
    state = narrow(new_state(2, floors=[9.]*30), T32)
    state.avg_var[0] = .5
    x = activations((2,2,4,4), T32)
    _,saved = kernels.forward(x, None, None, state, Step(2, .3, .1))
    _,var,_,factor,*_ = saved
    assert var[0]<9 and factor[0]==1
    assert var[1]==9 and factor[1]==0

def check_overflow(kernels):
    "A variance that is infinite in float32 stays out, as a value that is"
    state = narrow(new_state(3, trained=1), T32)
    before = State(*[t.clone() for t in state])
    x = activations((2,3,4,4), T32)
    x[0,1] = 1e30
    step = Step(2, .3, .1, running_grad=1.)
    kernels.forward(x, None, None, state, step)
    for have,was in zip(state[:6], before):
        assert have.isfinite().all()
        assert have[1]==was[1] and have[0]!=was[0]
    assert state.skipped==1

def check_overflow_of_the_average(kernels):
    "The window is near the batch; evaluation's mean is so far away that its variance is infinite"
    state = narrow(new_state(2, trained=1), T32)
    state.mean[1] = 4.5e19
    before = State(*[t.clone() for t in state])
    x = activations((2,2,4,4), T32)
    x[:,1] = 5e19
    kernels.forward(x, None, None, state, Step(2, .3, .1, running_grad=1.))
    for name in ('mean','var'): assert (getattr(state, name)!=getattr(before, name)).all(), name
    for name in ('avg_mean','avg_var','steps'):
        have,was = getattr(state, name),getattr(before, name)
        assert (have==was).tolist()==[False,True], name
    assert state.skipped==1

def check_what_counts_as_written(kernels):
    "In mean or variance a value that changed, a NaN that came or went; not a NaN that stays"
    nan = float('nan')
    cases = (1.,1.,False),(1.,2.,True),(1.,nan,True),(nan,1.,True),(nan,nan,False)
    was,now,written = zip(*cases)
    n = len(cases)
    state = narrow(new_state(2*n, trained=1, alike=True), T32)
    for where,name in ((slice(n),'mean'),(slice(n, None),'var')):
        getattr(state, f'known_{name}')[where] = torch.tensor(was)
        getattr(state, f'avg_{name}')[where] = torch.tensor(now)
    state.grad.fill_(1.)
    step = Step(2, .3, .1, running_grad=1.)
    kernels.forward(activations((2,2*n,3), T32), None, None, state, step)
    for row in state.grad: assert (row==0).tolist()==[*written,*written]

def check_a_variance_at_the_floor(kernels):
    "One that is just the floor reacts, as one above it does; one below does not"
    x = torch.tensor([[-.5,-.25,-1.],[.5,.25,1.]])
    state = narrow(new_state(3, floors=[.25]*9), T32)
    _,saved = kernels.forward(x, None, None, state, Step(2, .3, .1))
    _,var,_,factor,*_ = saved
    assert (var.tolist(),factor.tolist()) == ([.25,.25,1.],[1.,0.,1.])

def check_relu_at_zero(kernels):
    "A normalised value that is just 0 lets no gradient through, as PyTorch has it"
    x = torch.tensor([[-1.],[0.],[1.]])
    state,step = narrow(new_state(1), T32),Step(3, .3, .1, act='relu')
    y,saved = kernels.forward(x, None, None, state, step)
    dbias,_ = kernels.sums(torch.ones_like(x), x, None, None, saved, step)
    assert (y[:2]==0).all() and y[2]>1 and dbias==1

each_edge = pytest.mark.parametrize('check', [check_what_counts_as_written,
    check_a_variance_at_the_floor,check_a_floor_by_channel,check_relu_at_zero],
    ids=lambda f: f.__name__.removeprefix('check_'))

def check_parts(kernels, x, dy, affine, states, step, equal):
    """A forward and backward in one call, on the first of two equal states, and part by part,
    on the second; `equal(have, want, what)` compares"""
    a,b = states
    y,saved = kernels.forward(x, *affine, a, step)
    saved2 = kernels.statistics(x, b, step)
    equal(saved2, saved, 'saved')
    equal(kernels.normalize(x, *affine, saved2, step), y, 'y')
    for have,want in zip(kernels.moments(x), saved[4:6]):
        equal(have, want, 'moments')
    dx,dw,db = kernels.backward(dy, x, *affine, saved, a.grad, step, scale=2.)
    want = torch.stack((db, dw))
    equal(kernels.sums(dy, x, *affine, saved2, step), want, 'sums')
    G,sums = kernels.reaction(dy, x, *affine, saved2, b.grad, step, scale=2.)
    equal(sums, want, 'sums of the reaction')
    equal(kernels.dx(dy, x, *affine, saved2, G, step), dx, 'dx')
    equal(saved2, saved, 'saved after the backward')
    for name,have,want in zip(State._fields, b, a):
        equal(have, want, name)
