"Batch renormalization and MABN against statements of their formulas of their own, in float64"
import numpy as np
import pytest,torch
from torch import nn
from fastai_runbn.peers import (BatchRenorm1d,BatchRenorm2d,BatchRenorm3d,CenConv1d,
    CenConv2d,CenConv3d,MABN1d,MABN2d,MABN3d,MABNMixin,centre_convs,centre_weight,use_norm)

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
