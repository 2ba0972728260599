"""The layer once more, with every setting, written out in numpy and float64
over sums, squares and counts: what other tests compare with"""
import numpy as np
from fastai_runbn.layers import runbn_settings
from fastai_runbn.moments import AdaptiveWindow,AutoMomentum

def channels(x):
    "`(N,C,*)` as `(C,M)`, float64, without its graph"
    return x.detach().double().transpose(0,1).flatten(1)

class Oracle:
    "A running norm of `C` channels; `step` is one forward and one backward"
    def __init__(self, C, eps=1e-5, **settings):
        vars(self).update(runbn_settings(**settings))
        self.eps,self.steps,self.seen,self.skipped = eps,0,0,0
        self.S,self.Q,self.n,self.t = (
            np.zeros(C) for _ in range(4))
        self.rm,self.rv,self.gbar = (
            np.zeros(C),np.ones(C),np.zeros((2,C)))
        self.known = np.zeros((4,C)) # length, innovations so far, their mean square, their trace

    def weight(self, bs, M, m):
        "Of a batch with the means `m` in the window; an adaptive window learns from it"
        if isinstance(self.window, AdaptiveWindow): return self.adaptive_weight(bs, M, m)
        return np.full_like(self.t,
            self.window(bs, M) if callable(self.window)
            else min(1, bs/self.window))

    def adaptive_weight(self, bs, M, m):
        (mean,var),most = self.statistics(),self.window.samples
        n,t,square,trace = self.known
        n = np.minimum(np.where(t>0, n, max(bs, 16*bs/M)), most)
        a = np.minimum(1, bs/n)
        e,t = (m-mean)/np.sqrt(var+self.eps),t+1
        square = square+np.maximum(1/32, 1/t)*(e*e-square)
        step = (np.clip(e*trace*np.sqrt(a*(2-a))/(square+1e-12), -1, 1)
            *np.maximum(.01, (t+100)**-.5))
        new = (
            np.minimum(np.maximum(n*(1-step+step**2/2), bs), most),
            t,square,(1-a)*trace+e)
        if not self.held:
            self.known = np.where((self.n>0) & np.isfinite(m), new, self.known)
        return a

    def average_share(self, bs, rho):
        "Of a batch in `running_mean` and `running_var`: as BatchNorm's momentum says, if it was set"
        if self.momentum is None: return 1/(self.t+1)
        if not isinstance(self.momentum, AutoMomentum): return np.full_like(rho, self.momentum)
        return rho if self.eval_window is None else np.minimum(
            np.maximum(min(1, bs/self.eval_window), 10/(self.t+10)),
            rho)

    def statistics(self):
        "The window's mean and biased variance; 0 and 1 where it is empty"
        n = np.where(self.n>0, self.n, 1)
        mean = self.S/n
        return mean,np.where(self.n>0, self.Q/n-mean**2, 1)

    def step(self, x, dy, w=1., b=0.):
        "`x` and `dy` tensors `(N,C,*)`; y, dx, dw and db, `(C,M)` and `(C,)`"
        bs,x,dy = len(x),channels(x).numpy(),channels(dy).numpy()
        w,b = (
            np.broadcast_to(o if np.isscalar(o) else o.detach().double().numpy(), len(x))
            for o in (w,b))
        M = x.shape[1]
        with np.errstate(all='ignore'):
            before,self.held = (self.S,self.Q,self.n),self.momentum==0
            ok = np.isfinite(x.sum(1)) & np.isfinite((x*x).sum(1))
            xs = np.where(ok[:,None], x, 0)
            a = np.where(ok, self.weight(bs, M, np.where(ok, xs.mean(1), np.nan)), 0)
            self.S,self.Q,self.n = (
                self.S+a*(xs.sum(1)-self.S),
                self.Q+a*((xs**2).sum(1)-self.Q),
                self.n+a*(M-self.n))
            rho = np.where(ok, a*M/self.n, 0)
            mean,var = self.statistics()
            seen = self.seen+bs*self.clamp_inclusive
            floor = self.clamp[seen] if seen<len(self.clamp) else 0
            free = var>=floor
            rstd = 1/np.sqrt(np.where(free, var, floor)+self.eps)
            xhat = (x-mean[:,None])*rstd[:,None]
            clip = np.minimum(1, 4/(xhat**2).mean(1))
            share = self.average_share(bs, rho)
            # the averages for evaluation
            if not self.held:
                self.t,self.steps,self.seen,self.skipped = (
                    self.t+ok,self.steps+1,self.seen+bs,
                    self.skipped+(not ok.all()))
                m,v,share = xs.mean(1),xs.var(1),share*ok
                d = m-self.rm
                # as BatchNorm has it: unbiased, and without the spread between batches
                set_ = not isinstance(self.momentum, AutoMomentum)
                self.rm,self.rv = (
                    self.rm+share*d,
                    self.rv+share*((v*M/max(1, M-1) if set_ else v)-self.rv)
                        +(0 if set_ else share*(1-share)*d*d))
            # backward
            dw,db = (dy*xhat).sum(1),dy.sum(1)
            g = np.stack([db, dw*free])/M
            G = (rho*g
                +self.running_grad*np.stack([np.ones_like(clip), clip])*(1-rho)*self.gbar)
            if self.running_grad and not self.held:
                self.gbar = self.gbar+rho*(
                    np.where(np.isfinite(g), g, self.gbar)-self.gbar)
            if self.held: self.S,self.Q,self.n = before
            dx = (w*rstd)[:,None]*(
                dy-G[0][:,None]
                -xhat*(G[1]*free)[:,None])
        return w[:,None]*xhat+b[:,None],dx,dw,db
