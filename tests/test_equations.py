"""One test an equation of the design, named after it; numbers that can be checked by hand,
or formulas written out in numpy, float64"""
import math
import numpy as np,pytest,torch
from torch.autograd import gradcheck
from fastai_runbn.functional import running_batch_norm
from fastai_runbn.layers import RunningBatchNorm1d,RunningBatchNorm2d,LESSON10
from fastai_runbn.moments import (AdaptiveWindow,average_share,lesson10_weight,merge_moments,
    window_share,window_weight)
from fastai_runbn.reference import ReferenceRunningBatchNorm
from oracle import Oracle,channels

pytestmark = pytest.mark.usefixtures('each_path')

def t(*v): return torch.tensor(v, dtype=torch.float64)
def normal(*shape): return torch.randn(shape).double()
def window(c, count=0.):
    count = torch.full((c,), count).double()
    mean = torch.zeros(c).double()
    return [mean,torch.ones(c).double(),count]
def warm_window(count):
    "Of three channels, with statistics that are drawn"
    count = torch.full((3,), count).double()
    mean = normal(3)
    var = torch.rand(3).double()+.5
    return [mean,var,count]
tight = dict(rtol=1e-12, atol=1e-12)

def test_a_is_1_minus_1_minus_mom_over_sqrt_bs_minus_1():
    for bs in range(2,65):
        assert lesson10_weight(bs, mom=.1) == 1-.9/math.sqrt(bs-1)
    assert lesson10_weight(2, mom=.1) == pytest.approx(.1)

def test_a_at_bs_1_is_mom():
    for mom in (.1,.25): assert lesson10_weight(1, mom=mom) == mom

@pytest.mark.parametrize('window', [4,t(4.)[0],AdaptiveWindow(4)],
    ids=['number','tensor','adaptive'])
def test_a_is_1_where_the_window_is_shorter_than_the_batch(window):
    assert [float(window_weight(window, bs, 9*bs)) for bs in (1,4,5,100)]==[.25,1,1,1]

def test_S_Q_n_are_moving_averages():
    ref = ReferenceRunningBatchNorm(2).double()
    S,Q,n = 0,0,0
    for bs in (3,1,2,8):
        x,a = normal(bs,2,3),lesson10_weight(bs)
        ref(x)
        c = channels(x)
        S = S+a*(c.sum(1)-S)
        Q = Q+a*((c**2).sum(1)-Q)
        n = n+a*(bs*3-n)
        pairs = zip((ref.sums,ref.sqrs,ref.count), (S,Q,n))
        for have,want in pairs:
            want = torch.as_tensor(want, dtype=torch.float64)
            torch.testing.assert_close(have, want, **tight)

def test_dbias_cancels():
    """Division by dbias leaves S/n and Q/n, so the layer, which has none,
    agrees with the reference in its first 100 steps and after"""
    ref = ReferenceRunningBatchNorm(2).double()
    ours = RunningBatchNorm1d(2, dtype=torch.float64, **LESSON10)
    for step in range(105):
        x = normal(4,2)
        torch.testing.assert_close(ours(x), ref(x), **tight)
    assert ref.step == 105

def test_n_is_1_minus_a_times_n_plus_a_times_M():
    n,_ = window_share(t(10.)[0], 4, .25)
    assert n.item() == .75*10+.25*4

def test_rho_is_a_times_M_over_n():
    def rho(n):
        return window_share(t(n)[0], 4, .25)[1].item()
    assert rho(10.) == pytest.approx(1/8.5)
    assert rho(0.) == 1               # 1 on the first batch
    assert rho(-1.) == .25       # a full window gives the batch its weight

def merged(*moments):
    "Means and variances, of the window and of a batch, the latter with the share 1/4"
    mean,var = merge_moments(*map(t, moments), .25)
    return mean.item(),var.item()

def test_mu_is_mu_plus_rho_delta():
    assert merged(2., 1., 6., 1.)[0] == 2+.25*4

def test_sigma2_has_the_spread_between():
    "σ² + ρ(v−σ²) + ρ(1−ρ)δ²"
    assert merged(2., 1., 6., 3.)[1] == 1+.25*2+.25*.75*16

def test_sigma2_is_never_negative():
    mean,var = torch.zeros(1000),torch.zeros(1000)
    for _ in range(200):
        batch = 1e4+1e-3*torch.randn(1000)
        zeros,share = torch.zeros(1000),torch.rand(())
        mean,var = merge_moments(mean, var, batch, zeros, share)
        assert (var>=0).all()

def test_floor_is_001_until_20_samples():
    """σ² ≥ 0.01 while fewer than 20 samples were seen:
    counting this batch's (lesson 10, nine batches of two) or not (ten)"""
    x = .01*torch.randn(2,1,4,4).double()
    def held(layer): return layer(x).std(correction=0).item() < .2
    def held_for(batches): return [True]*batches+[False]*(12-batches)
    for inclusive,batches in ((True,9),(False,10)):
        rbn = RunningBatchNorm2d(1, dtype=torch.float64, clamp_inclusive=inclusive)
        assert [held(rbn) for _ in range(12)] == held_for(batches)
    ref = ReferenceRunningBatchNorm(1).double()
    assert [held(ref) for _ in range(12)] == held_for(9)

def test_floor_divides_by_sqrt_001_plus_eps():
    def layer(): return RunningBatchNorm1d(1, dtype=torch.float64)
    std = math.sqrt(.01+1e-5)
    x = t(3.,3.2)[:,None] # their variance, .01, is no more than the floor
    same(layer()(x), (x-3.1)/std)
    x = t(3.,3.02)[:,None]
    same(layer()(x), (x-3.01)/std)

def test_y_is_gamma_xhat_plus_beta():
    x,w,b = normal(2,3,4),normal(3),normal(3)
    win = warm_window(8.)
    y = running_batch_norm(x, *win, w, b, a=.2, eps=1e-3)
    # the window is updated in place: with the merged ones
    mu,var,*_ = win
    mu,var,w,b = (o.view(3,1) for o in (mu,var,w,b))
    std = (var+1e-3).sqrt()
    want = w*(x-mu)/std+b
    torch.testing.assert_close(y, want, **tight)

def backward(running_grad, floor=None, grad=None, count=8., a=.2, far=0.):
    """One backward through a warm window, and everything that its formulas speak of, per channel;
    with `far`, of a batch far from it"""
    x = normal(2,3,4)+far
    w,b = (normal(3).requires_grad_() for _ in range(2))
    x.requires_grad_()
    win = warm_window(count)
    if grad is None: grad = torch.zeros(2,3).double()
    rho = window_share(win[2], 8, a)[1]
    y = running_batch_norm(x, *win, w, b, a=a,
        floor=floor, running_grad=running_grad, window_grad=grad)
    dy = torch.randn_like(y)
    y.backward(dy)
    var = win[1] if floor is None else torch.maximum(win[1], floor)
    rstd = (var+1e-5).rsqrt()
    away = channels(x)-win[0][:,None]
    xhat = away*rstd[:,None]
    dyc = channels(dy)
    g1,g2 = dyc.mean(1),(dyc*xhat).mean(1)
    return dict(x=x, w=w, b=b, rho=rho, xhat=xhat,
        f=w.detach()*rstd, dy=dyc, dx=channels(x.grad),
        g=torch.stack([g1,g2]), grad=grad)

def dx_with(o, G1, G2):
    "The formula of dx"
    bracket = o['dy']-G1[:,None]-o['xhat']*G2[:,None]
    return o['f'][:,None]*bracket
def same(a, b): torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)

def test_dgamma_is_sum_dy_xhat():
    o = backward(.5)
    product = o['dy']*o['xhat']
    same(o['w'].grad, product.sum(1))
def test_dbeta_is_sum_dy():
    o = backward(.5)
    same(o['b'].grad, o['dy'].sum(1))

def test_dx_of_lesson10_has_G_rho_g():
    o = backward(0.)
    G = o['rho']*o['g']
    same(o['dx'], dx_with(o, *G))

def test_dx_of_batch_norm_has_G_g():
    """weight 1 keeps nothing of the window, so ρ=1: G = g for every running_grad,
    and dx is F.batch_norm's"""
    for running_grad in (0.,.5,1.):
        o = backward(running_grad, a=1.)
        same(o['dx'], dx_with(o, *o['g']))
        x = o['x'].detach().clone().requires_grad_()
        w,b = o['w'].detach(),o['b'].detach()
        y = torch.nn.functional.batch_norm(x, None, None, w, b, training=True)
        dy = o['dy'].view(3,2,4)
        y.backward(dy.transpose(0,1))
        same(o['dx'], channels(x.grad))

def test_G2_is_0_at_the_floor():
    for running_grad in (0.,.5,1.):
        ones = torch.ones(2,3).double()
        o = backward(running_grad, floor=t(9.,0.,9.), grad=ones.clone())
        ema,free = ones,t(0.,1.,0.)
        g = o['g']*torch.stack([ones[0],free])
        ema = ema+o['rho']*(g-ema) if running_grad else ema
        G = running_grad*ema+(1-running_grad)*o['rho']*g
        same(o['dx'], dx_with(o, G[0], G[1]*free))
        same(o['grad'], ema)

def test_g_bar_is_g_bar_plus_rho_g_minus_g_bar():
    start = torch.randn(2,3).double()
    o = backward(.5, grad=start.clone())
    same(o['grad'], start+o['rho']*(o['g']-start))

@pytest.mark.parametrize('running_grad', [.25,.5,1.])
def test_G_is_running_grad_g_bar_plus_rest_rho_g(running_grad):
    start = torch.randn(2,3).double()
    o = backward(running_grad, grad=start.clone())
    average = start+o['rho']*(o['g']-start)
    own = (1-running_grad)*o['rho']*o['g']
    G = running_grad*average+own
    assert ((o['xhat']**2).mean(1)<4).all()
    same(o['dx'], dx_with(o, *G))

@pytest.mark.parametrize('a', [.2,.01])
@pytest.mark.parametrize('running_grad', [.25,1.])
def test_the_running_term_of_the_scale_is_clipped_to_4_by_the_mean_square(running_grad, a):
    start = torch.randn(2,3).double()
    far = t(0.,3.,40.)[:,None]
    o = backward(running_grad, grad=start.clone(),
        far=far, a=a, count=1000.)
    square = (o['xhat']**2).mean(1)
    assert (square>4).tolist()==[False,True,True]
    clip = (4/square).clamp(max=1)
    clip = torch.stack([torch.ones(3),clip])
    running_term = running_grad*(1-o['rho'])*start*clip
    G = o['rho']*o['g']+running_term
    same(o['dx'], dx_with(o, *G))
    # what goes into the average is whole
    same(o['grad'], start+o['rho']*(o['g']-start))

@pytest.mark.parametrize('floored',
    [False,True], ids=['free','floored'])
@pytest.mark.parametrize('warm',
    [False,True], ids=['fresh','warm'])
@pytest.mark.parametrize('space',
    [(),(3,),(2,2)],
    ids=['(N,C)','(N,C,L)','(N,C,H,W)'])
def test_gradcheck_with_running_grad_0(space, warm, floored):
    state = warm_window(20.) if warm else window(3)
    floor = t(.01,9.,.01) if floored else None
    def f(x, w, b):
        win = [s.clone() for s in state]
        return running_batch_norm(x, *win, w, b, a=.3, floor=floor)
    inputs = normal(3,3,*space),normal(3),normal(3)
    assert gradcheck(f, [o.requires_grad_() for o in inputs])

@pytest.mark.parametrize('running_grad', [.3,.5,1.])
def test_running_grad_over_many_steps_against_numpy(running_grad):
    """60 steps with random batch sizes: forward, backward, window and running gradient
    as the oracle has them"""
    rng,C = np.random.default_rng(1),3
    layer = RunningBatchNorm1d(C, dtype=torch.float64, running_grad=running_grad)
    oracle = Oracle(C, running_grad=running_grad)
    for step,bs in enumerate(rng.integers(1, 17, 60).tolist()):
        x = rng.normal(1, [.05,1,3], (bs,C))
        x = torch.tensor(x, requires_grad=True)
        dy = torch.tensor(rng.normal(.2, 1, (bs,C)))
        y = layer(x)
        y.backward(dy)
        wy,wdx,*_ = oracle.step(x, dy)
        mean,var = oracle.statistics()
        pairs = {
            'y':(channels(y),wy), 'dx':(channels(x.grad),wdx),
            'mean':(layer.window_mean,mean), 'variance':(layer.window_var,var),
            'running gradient':(layer.window_grad,oracle.gbar),
            'running_mean':(layer.running_mean,oracle.rm),
            'running_var':(layer.running_var,oracle.rv)}
        for what,(have,want) in pairs.items():
            np.testing.assert_allclose(have.numpy(), want, rtol=1e-10, atol=1e-10,
                err_msg=f'{what}, step {step}, bs {bs}')

def test_eval_share_is_max_a_min_rho_10_over_t_plus_9():
    def share(v, *args):
        return average_share(t(v)[0], *args).item()
    shares = [share(v, .01) for v in (1.,11.,91.,1e6,math.inf)]
    assert shares == [1.,.5,.1,.01,.01]
    shares = [share(v, .01, .2) for v in (1.,11.,91.,1e6)]
    assert shares == [.2,.2,.1,.01]
