"""`sync='step'` of several ranks written out in one process, every formula at full length:
what tests/test_distributed.py holds the library to"""
import torch
from torch import nn
from torch.autograd import Function
from fastai_runbn.moments import AdaptiveWindow,AutoMomentum

class _Fn(Function):
    "`batch`: its count and what normalises it; `own`: the window of the rank at work"
    @staticmethod
    def forward(ctx, x, weight, bias, batch, own, norm):
        rstd = (batch['var']+norm.eps)**-.5
        mean = norm.col(batch['mean'],x)
        xhat = (x-mean)*norm.col(rstd,x)
        ctx.saved = x,xhat,weight,rstd,batch,own,norm
        return xhat*norm.col(weight,x)+norm.col(bias,x)
    @staticmethod
    def backward(ctx, dy):
        x,xhat,weight,rstd,batch,own,norm = ctx.saved
        M,rho = batch['M'],batch['rho']
        clip,above = batch['clip'],batch['above']
        dims = [d for d in range(x.ndim) if d!=1]
        dbias = dy.sum(dims)
        dweight = (dy*xhat).sum(dims)
        g1,g2 = dbias/M,dweight*above/M
        if norm.running_grad:
            norm.grads.append((M,g1,g2))
            own['g1'] = own['g1']+rho*(g1-own['g1'])
            own['g2'] = own['g2']+rho*(g2-own['g2'])
        running_grad = norm.running_grad
        clipped = running_grad*clip
        G1 = running_grad*own['g1']+(1-running_grad)*rho*g1
        G2 = clipped*own['g2']+(1-clipped)*rho*g2
        scale,G1,G2 = (norm.col(t,x) for t in (weight*rstd,G1,G2))
        dx = scale*(dy-G1-xhat*G2)
        return dx,dweight,dbias,*[None]*3

def moved(mean, var, share, m, v):
    "Mean and variance, a batch with those of `m` and `v` merged into them with its share"
    d = m-mean
    between = share*(1-share)*d**2
    return mean+share*d,var+share*(v-var)+between

def pooled(batches, k):
    "Mean of what stands `k`th in each, weighted by the counts, which stand first"
    total = sum(o[0] for o in batches)
    return sum(o[0]*o[k] for o in batches)/total

class DelayedNorm(nn.Module):
    "A running norm of `world` ranks, `rank` of which is at work"
    def __init__(self, layer, world):
        super().__init__()
        self.weight = nn.Parameter(layer.weight.detach().clone())
        self.bias = nn.Parameter(layer.bias.detach().clone())
        self.eps,self.world = layer.eps,world
        self.running_grad,self.momentum = layer.running_grad,layer.momentum
        self.rule,self.eval_window = layer.window,layer.eval_window
        self.inclusive = layer.clamp_inclusive
        self.clamp = layer.clamp_floor.tolist() # .01 as float32 has it, where the layer was made in that
        zeros = torch.zeros_like(self.weight.data)
        self.mean,self.var,self.n = zeros,zeros+1,zeros
        self.avg_mean,self.avg_var = zeros,zeros+1
        self.g1,self.g2 = zeros,zeros
        self.t,self.seen = 0,0
        self.known = [zeros]*4
        self.own,self.noted,self.grads = {},[],[]

    @staticmethod
    def col(t, x):
        "`t`, of channels, to go with `x`"
        space = [1]*(x.ndim-2)
        return t.view(1,-1,*space)
    def weight_of(self, bs, M, m, v, at):
        "Of a batch; `at`: mean, variance, count and `Innovations`, which this moves on"
        if not isinstance(self.rule, AdaptiveWindow):
            return self.rule(bs, M) if callable(self.rule) else min(1, bs/self.rule)
        mean,var,count = at['mean'],at['var'],at['n']
        n,t,square,trace = at['known']
        if t[0]==0:
            first = min(max(bs, 16*bs/M), self.rule.samples)
            n = torch.full_like(n, first)
        a = (bs/n).clamp(max=1)
        if count[0]>0:
            e = (m-mean)/(var+self.eps)**.5
            t = t+1
            share = max(1/32, 1/t[0])
            square = square+(e**2-square)*share
            product = e*trace*(a*(2-a))**.5
            lag = (product/(square+1e-12)).clamp(-1, 1)
            rate = max(.01, 1/(t[0]+100)**.5)
            step = rate*lag
            n = n*(1-step+step**2/2)
            n = n.clamp(bs, self.rule.samples)
            trace = (1-a)*trace+e
            at['known'] = [n,t,square,trace]
        return a
    def average_share(self, bs, rho):
        if self.momentum is None: return rho.new_tensor(1/self.t)
        if not isinstance(self.momentum, AutoMomentum): return rho.new_tensor(self.momentum)
        if self.eval_window is None: return rho
        share = min(1, bs/self.eval_window)
        most = max(share, 10/(self.t+9))
        return torch.minimum(rho, rho.new_tensor(most))

    def forward(self, x):
        dims = [d for d in range(x.ndim) if d!=1]
        bs,M = len(x),x.numel()//x.shape[1]
        z = x.detach()
        m = z.mean(dims)
        v = z.var(dims, correction=0)
        self.noted.append((M,m,v,bs))
        merged = dict(mean=self.mean, var=self.var,
            n=self.n/self.world, known=self.known,
            g1=self.g1, g2=self.g2, seen=self.seen)
        own = self.own.setdefault(self.rank, merged)
        a = self.weight_of(bs, M, m, v, own)
        own['n'] = (1-a)*own['n']+a*M
        rho = a*M/own['n']
        mean,var = moved(own['mean'], own['var'], rho, m, v)
        own.update(mean=mean, var=var)
        at = own['seen']+bs*self.inclusive
        own['seen'] += bs
        floor = self.clamp[at] if at<len(self.clamp) else 0.
        above = (own['var']>=floor).to(m)
        mean,var = own['mean'],own['var'].clamp(min=floor)
        square = v+(m-mean)**2
        clip = 4*(var+self.eps)/square
        clip = clip.clamp(max=1)*above
        batch = dict(M=M, mean=mean, var=var,
            rho=rho, clip=clip, above=above)
        return _Fn.apply(x, self.weight, self.bias, batch, own, self)

    def merge(self):
        "What the one collective of a step does"
        M = sum(o[0] for o in self.noted)
        bs = sum(o[3] for o in self.noted)
        m = pooled(self.noted, 1)
        squares = [n*(var+(mean-m)**2)
            for n,mean,var,_ in self.noted]
        v = sum(squares)/M
        self.t += 1
        at = dict(mean=self.mean, var=self.var,
            n=self.n, known=self.known)
        a = self.weight_of(bs, M, m, v, at)
        self.known = at['known']
        self.n = (1-a)*self.n+a*M
        rho = a*M/self.n
        self.mean,self.var = moved(self.mean, self.var, rho, m, v)
        s = self.average_share(bs, rho)
        mean,var = moved(self.avg_mean, self.avg_var, s, m, v)
        if not isinstance(self.momentum, AutoMomentum): # as BatchNorm has it
            var = self.avg_var+s*(v*M/(M-1)-self.avg_var)
        self.avg_mean,self.avg_var = mean,var
        if self.grads:
            g1,g2 = (pooled(self.grads, k) for k in (1,2))
            self.g1 = self.g1+rho*(g1-self.g1)
            self.g2 = self.g2+rho*(g2-self.g2)
        self.seen += bs
        self.own,self.noted,self.grads = {},[],[]

def delayed(model, world):
    "`model`, a Sequential, with its running norms written out"
    layers = [DelayedNorm(l, world) if hasattr(l, 'window_mean') else l
        for l in model]
    return nn.Sequential(*layers)

def train_delayed(model, steps, world, lr=.05):
    """Losses of each rank, a list a batch; `steps` of lists of micro-batches
    of lists of `(x, y, scale)`, one a rank"""
    opt = torch.optim.SGD(model.parameters(), lr)
    losses = [[] for _ in range(world)]
    ours = [l for l in model if isinstance(l, DelayedNorm)]
    for micros in steps:
        opt.zero_grad()
        for ranks in micros:
            for r,(x,y,scale) in enumerate(ranks):
                for l in ours: l.rank = r
                loss = nn.functional.cross_entropy(model(x), y, reduction='sum')*scale
                loss.backward()
                losses[r].append(loss.detach())
        for p in model.parameters(): p.grad /= world
        opt.step()
        for l in ours: l.merge()
    return [torch.stack(l) for l in losses]
