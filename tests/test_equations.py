"One test an equation of the design, named after it; numbers that can be checked by hand, or formulas written out in numpy, float64"
import math
import numpy as np,pytest,torch
from torch.autograd import gradcheck
from fastai_runbn.functional import running_batch_norm
from fastai_runbn.layers import RunningBatchNorm1d,RunningBatchNorm2d,LESSON10
from fastai_runbn.moments import average_share,lesson10_weight,merge_moments,window_share
from fastai_runbn.reference import ReferenceRunningBatchNorm
from oracle import Oracle,channels

def t(*v): return torch.tensor(v, dtype=torch.float64)
def window(c, count=0.): return [torch.zeros(c).double(), torch.ones(c).double(), torch.full((c,), count).double()]

def test_a_is_1_minus_1_minus_mom_over_sqrt_bs_minus_1():
    for bs in range(2,65): assert lesson10_weight(bs, mom=.1) == 1-.9/math.sqrt(bs-1)
    assert lesson10_weight(2, mom=.1) == pytest.approx(.1)

def test_a_at_bs_1_is_mom(): assert lesson10_weight(1, mom=.1) == .1 and lesson10_weight(1, mom=.25) == .25

def test_S_Q_n_are_moving_averages():
    ref,S,Q,n = ReferenceRunningBatchNorm(2).double(),0,0,0
    for bs in (3,1,2,8):
        x,a = torch.randn(bs,2,3).double(),lesson10_weight(bs)
        ref(x)
        S,Q,n = S+a*(channels(x).sum(1)-S),Q+a*((channels(x)**2).sum(1)-Q),n+a*(bs*3-n)
        for have,want in ((ref.sums,S),(ref.sqrs,Q),(ref.count,n)): torch.testing.assert_close(have, torch.as_tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-12)

def test_dbias_cancels():
    "Division by dbias leaves S/n and Q/n, so the layer, which has none, agrees with the reference in its first 100 steps and after"
    ref,ours = ReferenceRunningBatchNorm(2).double(),RunningBatchNorm1d(2, dtype=torch.float64, **LESSON10)
    for step in range(105):
        x = torch.randn(4,2).double()
        torch.testing.assert_close(ours(x), ref(x), rtol=1e-12, atol=1e-12)
    assert ref.step == 105

def test_n_is_1_minus_a_times_n_plus_a_times_M():
    n,_ = window_share(t(10.)[0], 4, .25)
    assert n.item() == .75*10+.25*4

def test_rho_is_a_times_M_over_n():
    assert window_share(t(10.)[0], 4, .25)[1].item() == pytest.approx(1/8.5)
    assert window_share(t(0.)[0], 4, .25)[1].item() == 1               # 1 on the first batch
    assert window_share(t(-1.)[0], 4, .25)[1].item() == .25       # a full window gives the batch its weight

def test_mu_is_mu_plus_rho_delta(): assert merge_moments(t(2.), t(1.), t(6.), t(1.), .25)[0].item() == 2+.25*4

def test_sigma2_has_the_spread_between():
    "σ² + ρ(v−σ²) + ρ(1−ρ)δ²"
    assert merge_moments(t(2.), t(1.), t(6.), t(3.), .25)[1].item() == 1+.25*2+.25*.75*16

def test_sigma2_is_never_negative():
    mean,var = torch.zeros(1000),torch.zeros(1000)
    for _ in range(200):
        mean,var = merge_moments(mean, var, 1e4+1e-3*torch.randn(1000), torch.zeros(1000), torch.rand(()))
        assert (var>=0).all()

def test_floor_is_001_until_20_samples():
    "σ² ≥ 0.01 while fewer than 20 samples were seen: counting this batch's (lesson 10, nine batches of two) or not (ten)"
    x = .01*torch.randn(2,1,4,4).double()
    for inclusive,batches in ((True,9),(False,10)):
        rbn = RunningBatchNorm2d(1, dtype=torch.float64, clamp_inclusive=inclusive)
        held = [rbn(x).std(correction=0).item() < .2 for _ in range(12)]
        assert held == [True]*batches+[False]*(12-batches)
    ref = ReferenceRunningBatchNorm(1).double()
    assert [ref(x).std(correction=0).item() < .2 for _ in range(12)] == [True]*9+[False]*3

def test_floor_divides_by_sqrt_001_plus_eps():
    x = t(3.,3.2)[:,None]
    same(RunningBatchNorm1d(1, dtype=torch.float64)(x), (x-3.1)/math.sqrt(.01+1e-5)) # their variance, .01, is no more than the floor
    x = t(3.,3.02)[:,None]
    same(RunningBatchNorm1d(1, dtype=torch.float64)(x), (x-3.01)/math.sqrt(.01+1e-5))

def test_y_is_gamma_xhat_plus_beta():
    x,w,b = torch.randn(2,3,4).double(),torch.randn(3).double(),torch.randn(3).double()
    win = [torch.randn(3).double(), torch.rand(3).double()+.5, torch.full((3,), 8.).double()]
    y = running_batch_norm(x, *win, w, b, a=.2, eps=1e-3)
    mu,var = (o.view(3,1) for o in win[:2])                            # updated in place: the merged ones
    torch.testing.assert_close(y, w.view(3,1)*(x-mu)/(var+1e-3).sqrt()+b.view(3,1), rtol=1e-12, atol=1e-12)

def backward(running_grad, floor=None, grad=None, count=8., a=.2, far=0.):
    "One backward through a warm window, and everything that its formulas speak of, per channel; with `far`, of a batch far from it"
    x,w,b = torch.randn(2,3,4).double()+far,*(torch.randn(3).double().requires_grad_() for _ in range(2))
    x.requires_grad_()
    win,grad = [torch.randn(3).double(), torch.rand(3).double()+.5, torch.full((3,), count).double()],torch.zeros(2,3).double() if grad is None else grad
    rho = window_share(win[2], 8, a)[1]
    y = running_batch_norm(x, *win, w, b, a=a, running_grad=running_grad, window_grad=grad, floor=floor)
    dy = torch.randn_like(y)
    y.backward(dy)
    var = win[1] if floor is None else torch.maximum(win[1], floor)
    rstd = (var+1e-5).rsqrt()
    xhat,dyc = (channels(x)-win[0][:,None])*rstd[:,None],channels(dy)
    return dict(x=x, w=w, b=b, rho=rho, f=w.detach()*rstd, xhat=xhat, dy=dyc, g=torch.stack([dyc.mean(1),(dyc*xhat).mean(1)]), dx=channels(x.grad), grad=grad)

def dx_with(o, G1, G2): return o['f'][:,None]*(o['dy']-G1[:,None]-o['xhat']*G2[:,None])
def same(a, b): torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)

def test_dgamma_is_sum_dy_xhat(): o = backward(.5); same(o['w'].grad, (o['dy']*o['xhat']).sum(1))
def test_dbeta_is_sum_dy(): o = backward(.5); same(o['b'].grad, o['dy'].sum(1))

def test_dx_of_lesson10_has_G_rho_g(): o = backward(0.); same(o['dx'], dx_with(o, *(o['rho']*o['g'])))

def test_dx_of_batch_norm_has_G_g():
    "weight 1 keeps nothing of the window, so ρ=1: G = g for every running_grad, and dx is F.batch_norm's"
    for running_grad in (0.,.5,1.):
        o = backward(running_grad, a=1.)
        same(o['dx'], dx_with(o, *o['g']))
        x = o['x'].detach().clone().requires_grad_()
        y = torch.nn.functional.batch_norm(x, None, None, o['w'].detach(), o['b'].detach(), training=True)
        y.backward(o['dy'].view(3,2,4).transpose(0,1))
        same(o['dx'], channels(x.grad))

def test_G2_is_0_at_the_floor():
    for running_grad in (0.,.5,1.):
        o = backward(running_grad, floor=t(9.,0.,9.), grad=torch.ones(2,3).double())
        ema = torch.ones(2,3).double()
        g = o['g']*torch.tensor([[1.,1,1],[0,1,0]]).double()
        ema = ema+o['rho']*(g-ema) if running_grad else ema
        G = running_grad*ema+(1-running_grad)*o['rho']*g
        same(o['dx'], dx_with(o, G[0], G[1]*t(0.,1.,0.)))
        same(o['grad'], ema)

def test_g_bar_is_g_bar_plus_rho_g_minus_g_bar():
    start = torch.randn(2,3).double()
    o = backward(.5, grad=start.clone())
    same(o['grad'], start+o['rho']*(o['g']-start))

@pytest.mark.parametrize('running_grad', [.25,.5,1.])
def test_G_is_running_grad_g_bar_plus_rest_rho_g(running_grad):
    start = torch.randn(2,3).double()
    o = backward(running_grad, grad=start.clone())
    G = running_grad*(start+o['rho']*(o['g']-start)) + (1-running_grad)*o['rho']*o['g']
    assert ((o['xhat']**2).mean(1)<4).all()
    same(o['dx'], dx_with(o, *G))

@pytest.mark.parametrize('a', [.2,.01])
@pytest.mark.parametrize('running_grad', [.25,1.])
def test_what_is_owed_in_the_scale_is_clipped_to_4_by_the_mean_square(running_grad, a):
    start = torch.randn(2,3).double()
    o = backward(running_grad, grad=start.clone(), far=t(0.,3.,40.)[:,None], a=a, count=1000.)
    square = (o['xhat']**2).mean(1)
    assert (square>4).tolist()==[False,True,True]
    owed = running_grad*(1-o['rho'])*start*torch.stack([torch.ones(3),(4/square).clamp(max=1)])
    same(o['dx'], dx_with(o, *(o['rho']*o['g']+owed)))
    same(o['grad'], start+o['rho']*(o['g']-start))                     # what goes into the average is whole

@pytest.mark.parametrize('floored', [False,True], ids=['free','floored'])
@pytest.mark.parametrize('warm', [False,True], ids=['fresh','warm'])
@pytest.mark.parametrize('space', [(),(3,),(2,2)], ids=['(N,C)','(N,C,L)','(N,C,H,W)'])
def test_gradcheck_with_running_grad_0(space, warm, floored):
    state = [torch.randn(3).double(), torch.rand(3).double()+.5, torch.full((3,), 20.).double()] if warm else window(3)
    floor = t(.01,9.,.01) if floored else None
    def f(x, w, b): return running_batch_norm(x, *[s.clone() for s in state], w, b, a=.3, floor=floor)
    assert gradcheck(f, [torch.randn(s).double().requires_grad_() for s in ((3,3,*space),3,3)])

@pytest.mark.parametrize('running_grad', [.3,.5,1.])
def test_running_grad_over_many_steps_against_numpy(running_grad):
    "60 steps with random batch sizes: forward, backward, window and running gradient as the oracle has them"
    rng,C = np.random.default_rng(1),3
    layer,oracle = RunningBatchNorm1d(C, dtype=torch.float64, running_grad=running_grad),Oracle(C, running_grad=running_grad)
    for step,bs in enumerate(rng.integers(1, 17, 60).tolist()):
        x,dy = torch.tensor(rng.normal(1, [.05,1,3], (bs,C)), requires_grad=True),torch.tensor(rng.normal(.2, 1, (bs,C)))
        y = layer(x); y.backward(dy)
        wy,wdx,*_ = oracle.step(x, dy)
        for have,want,what in ((channels(y),wy,'y'), (channels(x.grad),wdx,'dx'), (layer.window_mean,oracle.statistics()[0],'mean'), (layer.window_var,oracle.statistics()[1],'variance'),
                               (layer.window_grad,oracle.gbar,'running gradient'), (layer.running_mean,oracle.rm,'running_mean'), (layer.running_var,oracle.rv,'running_var')):
            np.testing.assert_allclose(have.numpy(), want, rtol=1e-10, atol=1e-10, err_msg=f'{what}, step {step}, bs {bs}')

def test_eval_share_is_max_a_min_rho_10_over_t_plus_9():
    assert [average_share(t(v)[0], .01).item() for v in (1.,11.,91.,1e6,math.inf)] == [1.,.5,.1,.01,.01]
    assert [average_share(t(v)[0], .01, .2).item() for v in (1.,11.,91.,1e6)] == [.2,.2,.1,.01]
