"""Batch renormalization and MABN against statements of their formulas of their own, in float64;
what the page says of checkpoints, of the way back to BatchNorm, and of limits"""
import copy,math
import numpy as np
import pytest,torch
from torch import fx,nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint
from fastai_runbn.peers import (BatchRenorm1d,BatchRenorm2d,BatchRenorm3d,BatchRenormMixin,
    CenConv1d,CenConv2d,CenConv3d,MABN1d,MABN2d,MABN3d,MABNMixin,centre_convs,centre_weight,
    peers_to_bn,use_norm)
from ranks import Ranks

f64 = dict(dtype=torch.float64)
shapes = pytest.mark.parametrize('dims',
    [(6,),(4,5),(3,4,5)], ids=['1d','2d','3d'])
kinds = {'1d':(BatchRenorm1d,MABN1d,nn.BatchNorm1d),
    '2d':(BatchRenorm2d,MABN2d,nn.BatchNorm2d),
    '3d':(BatchRenorm3d,MABN3d,nn.BatchNorm3d)}
def kind(dims): return kinds[f'{len(dims)}d']

def randomize(layer):
    "Scale and shift that are not 1 and 0"
    with torch.no_grad():
        layer.weight.uniform_(.5, 2)
        layer.bias.normal_()
    return layer

def batch(*dims, bs=2, scale=1., shift=0., C=3):
    x = torch.randn(bs,C,*dims, **f64)*scale+shift
    return x.requires_grad_()

def zeros(C): return torch.zeros(C, **f64)

def grads(layer, x, dy):
    "Output, and gradients of input, scale and shift"
    y = layer(x)
    wanted = x,layer.weight,layer.bias
    return (y, *torch.autograd.grad(y, wanted, dy))

def close(a, b, **kw): torch.testing.assert_close(a, b, **kw)

# Batch renormalization

class RenormStatement:
    "Ioffe's algorithm 1 by autograd, with everything that has no gradient detached by name"
    def __init__(self, C, eps=1e-5, alpha=.01):
        self.mean = zeros(C)
        self.sd = torch.ones(C, **f64).add(eps).sqrt()
        self.eps,self.alpha = eps,alpha
    def __call__(self, x, w, b, r_max, d_max):
        s = (1,-1)+(1,)*(x.ndim-2)
        dims = [0,*range(2,x.ndim)]
        mb = x.mean(dims)
        away = x-mb.view(s)
        var = (away**2).mean(dims)
        sb = (var+self.eps).sqrt()
        r = torch.clip(sb/self.sd, 1/r_max, r_max).detach()
        shift = (mb-self.mean)/self.sd
        d = torch.clip(shift, -d_max, d_max).detach()
        self.mean = self.mean+self.alpha*(mb.detach()-self.mean)
        self.sd = self.sd+self.alpha*(sb.detach()-self.sd)
        xhat = away/sb.view(s)*r.view(s)+d.view(s)
        return w.view(s)*xhat+b.view(s)

at_once = dict(start=0, r_end=0, d_end=0, **f64) # limits are those given from the first step on

@shapes
@pytest.mark.parametrize('r_max,d_max',
    [(1.,0.),(1.2,.3),(3.,5.),(1e9,1e9)])
def test_renorm_is_the_paper_over_several_steps(dims, r_max, d_max):
    cls = kind(dims)[0]
    layer = cls(3, momentum=.1, r_max=r_max, d_max=d_max, **at_once)
    randomize(layer)
    paper = RenormStatement(3, alpha=.1)
    for i in range(6):
        x = batch(*dims, scale=1+i, shift=i)
        dy = torch.randn_like(x)
        y = paper(x, layer.weight, layer.bias, r_max, d_max)
        params = x,layer.weight,layer.bias
        expected = y,*torch.autograd.grad(y, params, dy)
        got = grads(layer, x, dy)
        for a,b in zip(got, expected): close(a, b)
        close(layer.running_mean, paper.mean)
        close((layer.running_var+layer.eps).sqrt(), paper.sd)

@shapes
def test_renorm_is_batch_norm_at_first_with_its_gradients(dims):
    renorm,_,batch_norm = kind(dims)
    layer = randomize(renorm(3, **f64))
    bn = batch_norm(3, **f64)
    bn.load_state_dict(layer.state_dict())
    for _ in range(3):
        x = batch(*dims, scale=3, shift=2)
        dy = torch.randn_like(x)
        got,expected = grads(layer, x, dy),grads(bn, x, dy)
        for a,b in zip(got, expected): close(a, b)

def test_unclipped_renorm_trains_as_it_evaluates():
    layer = randomize(BatchRenorm2d(3, r_max=1e9, d_max=1e9, **at_once))
    with torch.no_grad():
        layer.running_mean.normal_()
        layer.running_var.uniform_(.5, 2)
    x = batch(4,5, scale=2, shift=3)
    expected = layer.eval()(x)
    close(layer.train()(x), expected)
    # the step moved the averages
    assert not torch.allclose(layer.eval()(x), expected)

def test_renorm_gradient_stops_at_r_and_d():
    """Were r and d differentiated, the unclipped gradient would be that of evaluation, γ/σ·dy;
    stopped, it sums to zero over a channel"""
    layer = BatchRenorm2d(3, r_max=1e9, d_max=1e9, **at_once)
    x = batch(4,5, scale=2, shift=3)
    dx = grads(layer, x, torch.randn_like(x))[1]
    dims = 0,2,3
    close(dx.sum(dims), zeros(3), atol=1e-12, rtol=0)
    scale = (dx*x.detach()).sum(dims)
    close(scale, zeros(3), atol=1e-4, rtol=0) # but for eps

def limits(layer): return tuple(float(o) for o in layer.limits())

def test_renorm_limits_open_as_in_the_paper():
    layer = BatchRenorm2d(1)
    def at(t):
        layer.num_batches_tracked.fill_(t)
        return limits(layer)
    assert at(0)==at(5000)==(1,0)
    assert at(15_000)==pytest.approx((1+2*10/35,2.5))
    assert at(25_000)==pytest.approx((1+2*20/35,5))
    assert at(40_000)==at(10**6)==(3,5)

def test_renorm_limits_follow_the_steps():
    layer = BatchRenorm2d(1, start=2, r_end=4, d_end=3)
    seen = []
    for _ in range(5):
        layer(torch.randn(2,1,3,3)*5)
        seen.append(limits(layer))
    assert seen==[(1,0),(1,0),(2,5),(3,5),(3,5)]

def test_renorm_gradcheck_without_r_and_d():
    layer = randomize(BatchRenorm2d(2, momentum=0., r_max=1., d_max=0., **f64))
    assert torch.autograd.gradcheck(layer, (batch(3,2, C=2),))

# MABN

class MABNStatement:
    "MABN in numpy: lists of all batches so far, of which the last `window` are averaged"
    def __init__(self, C, window, warmup, r_start, lam, alpha, eps=1e-5):
        vars(self).update(window=window, warmup=warmup, r_start=r_start,
            lam=lam, alpha=alpha, eps=eps)
        self.chi2s,self.psis = [],[]
        self.ema,self.t = np.ones(C),0
    def average(self, values):
        if self.t<=max(self.window,self.warmup): return values[-1]
        return sum(values[-self.window:])/self.window
    def step(self, x, w, b, dy):
        "Arrays `(M,C)` and `(C,)`: y, dx, dw, db"
        self.t += 1
        self.chi2s.append((x**2).mean(0))
        chi2 = self.average(self.chi2s)
        chi = np.sqrt(chi2+self.eps)
        lam = self.lam if self.t>max(self.r_start,self.warmup) else 1
        ratio = chi/np.sqrt(self.ema+self.eps)
        r = np.clip(ratio, 1/lam, lam)
        self.ema = (1-self.alpha)*self.ema+self.alpha*chi2
        xhat = x/chi
        g = w*r*dy                                                      # of xhat
        self.psis.append((g*xhat).mean(0))
        dx = (g-xhat*self.average(self.psis))/chi
        dw = (dy*r*xhat).sum(0)
        return w*r*xhat+b,dx,dw,dy.sum(0)

def flat(t):
    "`(N,C,*)` as an array `(M,C)`"
    last = t.detach().movedim(1,-1)
    return last.flatten(0,-2).numpy()
def array(t): return t.detach().numpy()

@shapes
@pytest.mark.parametrize('window,warmup,r_start,lam',
    [(1,0,0,1.), (3,0,0,5.),
    (3,0,0,1.05), (2,5,7,2.),
    (4,0,100,5.)])
def test_mabn_is_the_paper_over_several_steps(dims, window, warmup, r_start, lam):
    cls = kind(dims)[1]
    layer = randomize(cls(3, momentum=.1, window=window, warmup=warmup,
        r_start=r_start, r_max=lam, **f64))
    paper = MABNStatement(3, window, warmup, r_start, lam, alpha=.1)
    for i in range(12):
        x = batch(*dims, scale=1+i%4, shift=.3)
        dy = torch.randn_like(x)
        got = grads(layer, x, dy)
        w,b = array(layer.weight),array(layer.bias)
        expected = paper.step(flat(x), w, b, flat(dy))
        for name,a,b in zip(('y','dx','dw','db'), got, expected):
            a = flat(a) if a.ndim>1 else array(a)
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12,
                err_msg=f'{name} of step {i}')
        np.testing.assert_allclose(layer.running_var.numpy(), paper.ema)

def test_mabn_gradcheck_with_the_batch_alone():
    layer = randomize(MABN2d(2, warmup=1000, **f64))
    def f(x, w, b):
        params = dict(weight=w, bias=b)
        return torch.func.functional_call(layer, params, (x,))
    x = batch(3,2, C=2)
    w,b = [p.detach().clone() for p in layer.parameters()]
    inputs = x,w.requires_grad_(),b.requires_grad_()
    assert torch.autograd.gradcheck(f, inputs)

def test_mabn_gradient_is_another_with_averages():
    layer = MABN2d(2, window=2, warmup=0, r_start=0, **f64)
    for _ in range(5):
        x = batch(3,2, C=2)
        dx = grads(layer, x, torch.randn_like(x))[1]
    # of the batch alone it would be 0 but for eps
    assert (dx*x.detach()).sum().abs()>1e-3

@pytest.mark.parametrize('make', [BatchRenorm2d,MABN2d])
def test_evaluation_uses_running_statistics_alone(make):
    layer = randomize(make(3, **f64))
    for _ in range(5): layer(batch(4,5, scale=2))
    before = {k:v.clone() for k,v in layer.state_dict().items()}
    x = batch(4,5, scale=7, shift=1)
    y = layer.eval()(x)
    s = (1,-1,1,1)
    std = (layer.running_var+layer.eps).sqrt()
    mean,std = layer.running_mean.view(s),std.view(s)
    w,b = layer.weight.view(s),layer.bias.view(s)
    expected = (x-mean)/std*w+b
    close(y, expected)
    close(y[:1], layer(x[:1])) # whatever else is in the batch
    for k,v in layer.state_dict().items():
        assert torch.equal(v, before[k]), k

def test_mabn_leaves_the_mean_alone():
    layer = MABN2d(3)
    for _ in range(3):
        layer(torch.randn(2,3,4,4)+5)
    assert not layer.running_mean.any()

# both

makes = pytest.mark.parametrize('make,dims',
    [(BatchRenorm1d,(6,)),(MABN1d,(6,)),
    (BatchRenorm2d,(4,5)),(MABN2d,(4,5)),
    (BatchRenorm3d,(3,4,5)),(MABN3d,(3,4,5))],
    ids=lambda o: getattr(o, '__name__', ''))

@makes
def test_state_resumes_to_the_bit(make, dims):
    kw = dict(start=0, r_end=5, d_end=5)
    if issubclass(make, MABNMixin):
        kw = dict(window=2, warmup=0, r_start=0)
    a,b = make(3, **kw),make(3, **kw)
    for _ in range(4):
        x = torch.randn(2,3,*dims, requires_grad=True)
        grads(a, x, torch.randn_like(x))
    b.load_state_dict(a.state_dict())
    x = torch.randn(2,3,*dims, requires_grad=True)
    dy = torch.ones_like(x)
    for u,v in zip(grads(a, x, dy), grads(b, x, dy)):
        assert torch.equal(u, v)

@makes
def test_autocast_and_channels_last(make, dims):
    layer,plain = make(3),make(3)
    forms = torch.contiguous_format,torch.channels_last,torch.channels_last_3d
    form = forms[len(dims)-1]
    x = torch.randn(2,3,*dims).to(memory_format=form)
    close(layer(x), plain(x.contiguous()))
    half = x.bfloat16().requires_grad_()
    with torch.autocast('cpu', torch.bfloat16): y = layer(half)
    y.sum().backward()
    assert y.dtype==half.grad.dtype==torch.bfloat16
    assert layer.running_var.dtype==torch.float32
    assert y.is_contiguous(memory_format=form)

@makes
def test_without_affine(make, dims):
    layer = make(3, affine=False)
    x = torch.randn(2,3,*dims, requires_grad=True)
    y = layer(x)
    y.backward(torch.randn_like(y))
    close(y, make(3)(x))
    assert x.grad is not None and not list(layer.parameters())

settled = {'BatchRenorm':dict(start=0, r_end=0, d_end=0),
    'MABN':dict(window=2, warmup=0, r_start=0)} # all that comes with time is there at once
def at_work(make, C=3, **kw):
    "A layer that corrects from its first steps on"
    return make(C, **settled[make.__name__[:-2]], **kw)

def steps(layer, n, dims, size=1., **kw):
    "Train `layer` for `n` batches of two"
    for _ in range(n):
        x = (torch.randn(2,3,*dims, **kw)*size).requires_grad_()
        layer(x).square().sum().backward()

last_dims = {3:torch.contiguous_format, 4:torch.channels_last, 5:torch.channels_last_3d}
def channels_last(x): return x.to(memory_format=last_dims[x.ndim])

halves = pytest.mark.parametrize('dtype', [torch.bfloat16,torch.float16], ids=str)

@makes
@pytest.mark.parametrize('dtype',
    [torch.float32,torch.float64,torch.bfloat16,torch.float16], ids=str)
def test_evaluation_is_batch_norm_to_the_bit(make, dims, dtype):
    kept = torch.promote_types(dtype, torch.float32)
    layer = randomize(at_work(make, dtype=kept))
    steps(layer, 5, dims, dtype=dtype)
    bn = kind(dims)[2](3, dtype=kept)
    bn.load_state_dict(layer.state_dict(), strict=False)
    for form in (lambda x: x, channels_last):
        x = form(torch.randn(2,3,*dims, dtype=dtype)*3+1)
        assert torch.equal(layer.eval()(x), bn.eval()(x))

@makes
@halves
def test_activations_in_half_precision(make, dims, dtype):
    "Statistics are those of float32 to the bit, output and gradient are rounded"
    layer = randomize(at_work(make))
    exact = copy.deepcopy(layer)
    eps = torch.finfo(dtype).eps
    for i in range(8):
        x = channels_last((torch.randn(2,3,*dims)*(1+i)).to(dtype))
        dy = torch.randn_like(x)
        got = grads(layer, x.requires_grad_(), dy)
        expected = grads(exact, x.detach().float().requires_grad_(), dy.float())
        assert got[0].dtype==got[1].dtype==dtype
        assert got[2].dtype==torch.float32
        close([o.float() for o in got], [*expected], atol=16*eps, rtol=8*eps)
        for name in ('running_mean','running_var'): same(layer, exact, name)

@makes
def test_a_training_goes_on_from_its_checkpoint(make, dims):
    "20 steps are 10, a checkpoint and 10, to the bit; with them the limits and the windows' turns"
    kw = dict(start=4, r_end=16, d_end=12)
    if issubclass(make, MABNMixin): kw = dict(window=3, warmup=5, r_start=12)
    def train(layer, batches):
        outs = []
        for x,dy in batches: outs += grads(layer, x.clone().requires_grad_(), dy)
        return outs
    batches = [torch.randn(2,2,3,*dims).unbind() for _ in range(20)]
    first,second = make(3, **kw),make(3, **kw)
    whole = train(first, batches)
    parts = train(second, batches[:10])
    third = make(3, **kw)
    third.load_state_dict(second.state_dict())
    parts += train(third, batches[10:])
    for a,b in zip(whole, parts): assert torch.equal(a, b)
    same(first, third, *first.state_dict())

@makes
def test_which_keys_differ_from_batch_norm(make, dims):
    layer,bn = make(3),kind(dims)[2](3)
    own = {'recent_chi2','recent_psi'} if issubclass(make, MABNMixin) else set()
    there = bn.load_state_dict(layer.state_dict(), strict=False)
    back = layer.load_state_dict(bn.state_dict(), strict=False)
    assert ({*there.unexpected_keys},there.missing_keys)==(own,[])
    assert ({*back.missing_keys},back.unexpected_keys)==(own,[])
    if own:
        with pytest.raises(RuntimeError, match='recent_chi2'):
            layer.load_state_dict(bn.state_dict())

@makes
@pytest.mark.parametrize('bad', [math.nan,math.inf])
def test_a_bad_batch_stays_in_its_channel_as_with_batch_norm(make, dims, bad):
    layer,bn = at_work(make),kind(dims)[2](3)
    batches = [torch.randn(2,3,*dims) for _ in range(9)]
    batches[3][0,1].view(-1)[0] = bad
    for x in batches:
        layer(x)
        bn(x)
    assert layer.running_var.isfinite().tolist()==[True,False,True]
    assert bn.running_var.isfinite().tolist()==[True,False,True]

wrong = [(BatchRenorm2d,'r_max',.9,'a number of 1 or more'),
    (BatchRenorm2d,'r_max',math.inf,'1e9 is no limit'),
    (BatchRenorm2d,'r_max','3','a number of 1 or more'),
    (BatchRenorm1d,'d_max',-.1,'a number of 0 or more'),
    (BatchRenorm1d,'d_max',math.nan,'a number of 0 or more'),
    (BatchRenorm3d,'start',-1,'in training steps'),
    (BatchRenorm3d,'r_end',4999,'a number of 5000 or more'),
    (BatchRenorm3d,'d_end',4999,'a number of 5000 or more'),
    (BatchRenorm2d,'momentum',1.1,r'a number in \[0,1\]'),
    (BatchRenorm2d,'momentum',None,'weight of a batch'),
    (BatchRenorm2d,'eps',-1e-5,'a number of 0 or more'),
    (MABN2d,'momentum',-.1,r'a number in \[0,1\]'),
    (MABN2d,'momentum',None,'weight of a batch'),
    (MABN2d,'eps',-1e-5,'a number of 0 or more'),
    (MABN1d,'window',0,'a whole number of 1 or more'),
    (MABN1d,'window',2.5,'it is in batches'),
    (MABN3d,'r_max',0,'a number of 1 or more'),
    (MABN3d,'warmup',-1,'in training steps'),
    (MABN3d,'r_start',None,'in training steps')]
@pytest.mark.parametrize('make,name,value,says', wrong, ids=str)
def test_an_argument_out_of_range_says_what_was_expected(make, name, value, says):
    with pytest.raises(ValueError, match=says) as e: make(3, **{name:value})
    assert f'{make.__name__}: {name}={value!r}, but' in str(e.value)

def test_the_ends_of_ranges_are_in_them():
    for r_max,d_max,momentum in ((1,0,0),(np.float32(2),np.int64(1),1)):
        BatchRenorm2d(3, r_max=r_max, d_max=d_max, momentum=momentum)
    BatchRenorm2d(3, start=7, r_end=7, d_end=7)
    MABN2d(3, window=np.int64(1), r_max=1, warmup=0, r_start=0, momentum=1)

def test_what_a_layer_shows():
    assert 'r_max=3.0, d_max=5.0, start=5000, r_end=40000, d_end=25000' in repr(BatchRenorm3d(2))
    assert 'window=16, r_max=5.0, warmup=100, r_start=1000' in repr(MABN1d(2))

@makes
def test_it_has_to_track(make, dims):
    with pytest.raises(ValueError, match='leave it True'):
        make(3, track_running_stats=False)
    x = torch.randn(2,3,*dims,1,1,1)
    with pytest.raises(ValueError, match='expected'): make(3)(x)

# convolutions and models

@pytest.mark.parametrize('cen,plain,dims',
    [(CenConv1d,nn.Conv1d,(6,)),
    (CenConv2d,nn.Conv2d,(5,5)),
    (CenConv3d,nn.Conv3d,(4,4,4))])
def test_centred_convolution(cen, plain, dims):
    a = cen(4,6,3, groups=2, **f64)
    b = plain(4,6,3, groups=2, **f64)
    with torch.no_grad():
        centred = [w-w.mean() for w in a.weight]
        b.weight.copy_(torch.stack(centred))
        b.bias.copy_(a.bias)
    x = torch.randn(2,4,*dims, **f64)
    close(a(x), b(x))
    close(a(x+3), a(x)) # a constant has no part in it
    (a(x)**2).sum().backward()
    means = a.weight.grad.flatten(1).sum(1)
    close(means, zeros(6), atol=1e-9, rtol=0)
    close(centre_weight(a.weight), b.weight)

def test_centre_convs_keeps_parameters_and_subclasses():
    class Own(nn.Conv2d): pass
    layers = nn.Conv2d(1,2,3),Own(2,2,3),nn.Linear(2,2)
    net = nn.Sequential(*layers)
    weight = net[0].weight
    assert centre_convs(net) is net
    assert [type(m) for m in net]==[CenConv2d,Own,nn.Linear]
    assert net[0].weight is weight

def test_use_norm_replaces_exactly_batch_norm():
    class Own(nn.BatchNorm2d): pass
    shared = nn.BatchNorm2d(4)
    first = nn.Sequential(nn.Conv2d(3,4,1), shared)
    net = nn.ModuleDict(dict(
        a=first, b=nn.BatchNorm3d(5), c=Own(4),
        d=shared, e=nn.GroupNorm(2,4)))
    use_norm(net.eval(), BatchRenorm2d)
    types = [type(net[k]) for k in 'bcde']
    assert types==[BatchRenorm2d,Own,BatchRenorm2d,nn.GroupNorm]
    assert net['a'][1] is net['d']
    assert net['b'].num_features==5
    assert not net['d'].training
    with pytest.raises(ValueError, match='no norm to replace'): use_norm(net, MABN2d)

def same(a, b, *names):
    for n in names:
        assert torch.equal(getattr(a, n), getattr(b, n)), n

def test_use_norm_hands_over_what_it_is_told_to():
    def trained():
        bn = randomize(nn.BatchNorm2d(4))
        bn(torch.randn(3,4,2,2))
        return bn
    old = trained()
    new = use_norm(old, lambda C: nn.GroupNorm(2, C))
    same(new, old, 'weight', 'bias')
    assert new.weight is not old.weight
    old = trained()
    new = use_norm(old, BatchRenorm2d)
    same(new, old, 'weight')
    assert torch.equal(new.running_mean, torch.zeros(4))
    assert new.num_batches_tracked==0
    new = use_norm(old, BatchRenorm2d, keep=('weight','bias','running_mean','running_var'))
    same(new, old, 'running_mean', 'running_var')
    assert new.num_batches_tracked==0

def test_use_norm_keeps_the_activation_of_timm():
    timm = pytest.importorskip('timm')
    net = timm.create_model('efficientnet_b0', pretrained=False).eval()
    net = use_norm(net, lambda C: nn.GroupNorm(4, C))
    kinds = [type(m).__name__ for m in net.modules()]
    assert 'BatchNormAct2d' not in kinds and kinds.count('GroupNorm')==49
    assert type(net.bn1[2]) is nn.SiLU
    y = net(torch.randn(1,3,32,32))
    assert y.shape==(1,1000)

def test_depthwise_convolutions_are_not_centred():
    net = centre_convs(nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Conv2d(4, 4, 3, groups=2)))
    assert [type(m) for m in net]==[CenConv2d,nn.Conv2d,CenConv2d]

@pytest.mark.parametrize('make', [None,'BatchRenorm2d',BatchRenorm2d(3)])
def test_use_norm_wants_a_function(make):
    "A layer is one too, but of activations"
    net = nn.Sequential(nn.BatchNorm2d(3))
    error = AttributeError if isinstance(make, nn.Module) else TypeError
    with pytest.raises(error): use_norm(net, make)
    assert type(net[0]) is nn.BatchNorm2d

def test_use_norm_takes_one_class_for_those():
    net = nn.Sequential(BatchRenorm2d(3), nn.BatchNorm2d(3))
    use_norm(net, nn.InstanceNorm2d, old=BatchRenorm2d)
    assert [type(m) for m in net]==[nn.InstanceNorm2d,nn.BatchNorm2d]

# back to BatchNorm

convs = {'1d':nn.Conv1d, '2d':nn.Conv2d, '3d':nn.Conv3d}
def plain_net(dims, bias=True):
    bn,conv = kind(dims)[2],convs[f'{len(dims)}d']
    return nn.Sequential(conv(3,4,1, bias=bias), bn(4), nn.ReLU(), conv(4,3,1, bias=bias), bn(3))

@makes
@pytest.mark.parametrize('centred', [False,True])
def test_a_model_goes_back_to_batch_norm_to_the_bit(make, dims, centred):
    def norm(C): return at_work(make, C)
    net = plain_net(dims)
    if centred: centre_convs(net)
    use_norm(net, norm)
    steps(net, 6, dims)
    x = torch.randn(4,3,*dims)
    y = net.eval()(x)
    parameters = [*net.parameters()]
    assert peers_to_bn(net) is net
    assert [type(m) for m in net]==[type(m) for m in plain_net(dims)]
    assert torch.equal(net(x), y)
    assert all(a is b for a,b in zip(net.parameters(), parameters))
    other = plain_net(dims).eval()
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), y)
    assert [vars(m).keys() for m in net]==[vars(m).keys() for m in other]
    with pytest.raises(ValueError, match='Sequential has no BatchRenorm, MABN'): peers_to_bn(net)

def test_a_weight_of_two_convolutions_is_centred_once():
    net = centre_convs(nn.Sequential(nn.Conv2d(3,3,3), nn.Conv2d(3,3,3)))
    with torch.no_grad(): net[0].weight.add_(100)
    net[1].weight = net[0].weight
    x = torch.randn(1,3,9,9)
    y = net(x)
    assert torch.equal(peers_to_bn(net)(x), y)

@pytest.mark.parametrize('base', [BatchRenorm2d,MABN2d,CenConv2d])
def test_a_subclass_does_not_go_back_and_nothing_else_does(base):
    class Own(base): pass
    net = nn.Sequential(BatchRenorm2d(3), Own(3,3,1) if base is CenConv2d else Own(3))
    with pytest.raises(TypeError, match='Own is a subclass'): peers_to_bn(net)
    assert type(net[0]) is BatchRenorm2d

@pytest.mark.parametrize('make', [BatchRenorm2d,MABN2d])
def test_tracing_and_update_bn_want_batch_norm(make):
    def model(): return use_norm(plain_net((4,5)), make).eval()
    net,x = model(),torch.randn(2,3,4,5)
    y = net(x)
    with pytest.raises(fx.proxy.TraceError): fx.symbolic_trace(net)
    assert torch.equal(fx.symbolic_trace(peers_to_bn(net))(x), y)
    with pytest.raises(ValueError, match='momentum=None, which `update_bn` sets too'):
        update_bn([x], model())
    net = peers_to_bn(model())
    update_bn([x], net)
    close(net[1].running_mean, net[0](x).mean((0,2,3)))

# limits that the page tells

def test_one_value_per_channel():
    x = torch.tensor([.1,-2.,30.]).view(1,3,1,1)
    with pytest.raises(ValueError, match='Expected more than 1 value'): BatchRenorm2d(3)(x)
    close(MABN2d(3)(x).flatten(), x.flatten().sign(), atol=1e-3, rtol=0)

def apart_and_together(make, dims):
    "A gradient of two losses, one backward each and one for both"
    layer = at_work(make, **f64)
    steps(layer, 6, dims, **f64)
    x,a,b = batch(*dims),batch(*dims),batch(*dims)
    def grad(dys):
        y = copy.deepcopy(layer)(x)
        parts = [torch.autograd.grad(y, x, dy, retain_graph=True)[0] for dy in dys]
        return sum(parts)
    return grad([a,b]),grad([a+b])

@makes
def test_several_backwards_add_up_but_for_mabn(make, dims):
    apart,together = apart_and_together(make, dims)
    if issubclass(make, BatchRenormMixin): close(apart, together)
    else: assert (apart-together).abs().max()>.01

def test_mabn_s_windows_have_a_row_a_batch():
    layer = MABN2d(1, window=3, warmup=0)
    def ring(name): return getattr(layer, name).flatten().tolist()
    for size in (1.,2.,3.,4.):
        x = torch.full((2,1,2,2), size, requires_grad=True)
        layer(x).sum().backward()
    assert ring('recent_chi2')==[9,16,4]
    before = ring('recent_psi')
    layer(x*0) # no backward: its turn is the last, of the second batch
    assert ring('recent_chi2')==[9,16,0]
    assert ring('recent_psi')==before

@pytest.mark.parametrize('make,wrong_for', [(BatchRenorm2d,0),(MABN2d,3)])
def test_a_loss_scale_that_changes(make, wrong_for):
    "Scaled down by half before the ninth step, gradients of MABN are off while its window has both"
    def unscaled(scales):
        torch.manual_seed(1)
        kw = dict(window=4, warmup=0, r_start=0) if make is MABN2d else at_once
        layer,got = make(3, **dict(f64, **kw)),[]
        for s in scales:
            x = batch(4,5)
            got.append(torch.autograd.grad(layer(x), x, torch.randn_like(x)*s)[0]/s)
        return got
    pairs = zip(unscaled([1.]*16), unscaled([8.]*8+[4.]*8))
    off = [not torch.allclose(a, b) for a,b in pairs]
    assert off==[False]*8+[True]*wrong_for+[False]*(8-wrong_for)

@pytest.mark.parametrize('make,skipped', [(BatchRenorm2d,1),(MABN2d,4)])
def test_a_gradient_that_overflows(make, skipped):
    "is in MABN's average for a window, of which every step is skipped"
    kw = dict(window=4, warmup=0, r_start=0) if make is MABN2d else dict(start=0, r_end=0, d_end=0)
    net = nn.Sequential(nn.Conv2d(3,3,1), make(3, **kw))
    opt = torch.optim.SGD(net.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler('cpu', init_scale=2.**16)
    for i in range(16):
        loss = net(torch.randn(2,3,4,4)).square().mean()
        if i==8: loss = loss*math.inf
        opt.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
    assert scaler.get_scale()==2.**(16-skipped)

@makes
@pytest.mark.parametrize('reentrant', [False,True])
def test_a_checkpointed_batch_counts_twice_as_in_batch_norm(make, dims, reentrant):
    for layer in (make(3),kind(dims)[2](3)):
        x = torch.randn(2,3,*dims, requires_grad=True)
        checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
        assert layer.num_batches_tracked==2

@makes
def test_second_derivatives(make, dims):
    "Of batch renormalization they are those with r and d held; MABN says that it has none"
    layer = at_work(make, **f64)
    x = batch(*dims)
    if issubclass(make, BatchRenormMixin):
        layer.momentum = 0. # so that each call is the same
        layer.r_max,layer.d_max = 1.,0.
        assert torch.autograd.gradgradcheck(layer, (x,))
        return
    grad, = torch.autograd.grad(layer(x).exp().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'): grad.square().sum().backward()
    steps(layer, 3, dims, **f64) # nothing of that graph is left in the layer

@makes
def test_sync_batch_norm_takes_their_places_without_a_word(make, dims):
    net = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(make(3)))
    assert type(net[0]) is nn.SyncBatchNorm

@pytest.mark.parametrize('make', [BatchRenorm2d,MABN2d])
def test_statistics_of_a_model_in_bfloat16_are_rounded_away(make):
    layer = make(1, momentum=.01).bfloat16()
    for _ in range(50): layer((torch.randn(2,1,16,16)*1.1).bfloat16())
    assert layer.running_var==1

@makes
def test_compiled_is_eager(make, dims):
    "Output, gradients and state over 20 steps; aot_eager has the graphs without Inductor's code"
    torch.compiler.reset()
    eager = randomize(at_work(make))
    layer = copy.deepcopy(eager)
    compiled = torch.compile(layer, backend='aot_eager')
    for _ in range(20):
        x,dy = torch.randn(2,2,3,*dims).unbind()
        got = grads_of(compiled, layer, x.clone().requires_grad_(), dy)
        expected = grads(eager, x.clone().requires_grad_(), dy)
        for a,b in zip(got, expected): close(a, b)
    for k,v in layer.state_dict().items(): close(v, eager.state_dict()[k])

def test_mabn_refuses_to_be_one_graph():
    torch.compiler.reset()
    compiled = torch.compile(MABN2d(3), backend='aot_eager', fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match='graph_break'):
        compiled(torch.randn(2,3,4,5))

def grads_of(f, layer, x, dy):
    wanted = x,layer.weight,layer.bias
    y = f(x)
    return (y, *torch.autograd.grad(y, wanted, dy))

# several processes

def rank_batches(rank):
    gen = torch.Generator().manual_seed(rank)
    return torch.randn(4,2,3,4,4, generator=gen)*(1+rank)

def under_ddp(rank, world, make):
    "The layer's buffers after each step, as lists of numbers"
    net = DistributedDataParallel(at_work(make))
    kept = []
    for x in rank_batches(rank):
        net(x.clone().requires_grad_()).square().sum().backward()
        kept.append({k:v.tolist() for k,v in net.module.named_buffers()})
    return kept

@pytest.fixture(scope='module')
def two():
    ranks = Ranks(2)
    yield ranks
    ranks.stop()

def values(buffers): return {k:torch.tensor(v) for k,v in buffers.items()}

@pytest.mark.parametrize('make', [BatchRenorm2d,MABN2d])
def test_what_ddp_keeps(two, make):
    """Rank 0 has the statistics of its own batches alone; so has rank 1, but for the last batch,
    which is its own"""
    first,second = two(under_ddp, make)
    layer = at_work(make)
    for x,kept in zip(rank_batches(0), first):
        layer(x.clone().requires_grad_()).square().sum().backward()
        close(dict(layer.named_buffers()), values(kept))
    layer = at_work(make)
    layer.load_state_dict(values(first[-2]), strict=False)
    layer(rank_batches(1)[-1].clone().requires_grad_()).square().sum().backward()
    close(dict(layer.named_buffers()), values(second[-1]))
    assert first[-1]['running_var']!=second[-1]['running_var']
