"`sync='step'` of several ranks written out in one process, every formula at full length: what tests/test_distributed.py holds the library to"
import torch
from torch import nn
from torch.autograd import Function
from fastai_runbn.moments import AdaptiveWindow,AutoMomentum

class _Fn(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, rho, clip, above, own, norm, M):
        rstd = (var+norm.eps)**-.5
        xhat = (x-norm.col(mean,x))*norm.col(rstd,x)
        ctx.saved = x,xhat,weight,rstd,rho,clip,above,own,norm,M
        return xhat*norm.col(weight,x)+norm.col(bias,x)
    @staticmethod
    def backward(ctx, dy):
        x,xhat,weight,rstd,rho,clip,above,own,norm,M = ctx.saved
        dims = [d for d in range(x.ndim) if d!=1]
        dbias,dweight = dy.sum(dims),(dy*xhat).sum(dims)
        g1,g2 = dbias/M,dweight*above/M
        if norm.running_grad:
            norm.grads.append((M,g1,g2))
            own['g1'],own['g2'] = own['g1']+rho*(g1-own['g1']),own['g2']+rho*(g2-own['g2'])
        running_grad = norm.running_grad
        G1,G2 = running_grad*own['g1']+(1-running_grad)*rho*g1,running_grad*clip*own['g2']+(1-running_grad*clip)*rho*g2
        dx = norm.col(weight*rstd,x)*(dy-norm.col(G1,x)-xhat*norm.col(G2,x))
        return dx,dweight,dbias,*[None]*8

class DelayedNorm(nn.Module):
    "A running norm of `world` ranks, `rank` of which is at work"
    def __init__(self, layer, world):
        super().__init__()
        self.weight,self.bias,self.eps,self.running_grad,self.world = nn.Parameter(layer.weight.detach().clone()),nn.Parameter(layer.bias.detach().clone()),layer.eps,layer.running_grad,world
        self.rule,self.eval_window,self.inclusive = layer.window,layer.eval_window,layer.clamp_inclusive
        self.momentum = layer.momentum
        self.clamp = layer.clamp_floor.tolist() # .01 as float32 has it, where the layer was made in that
        zeros = torch.zeros_like(self.weight.data)
        self.mean,self.var,self.n,self.avg_mean,self.avg_var,self.g1,self.g2 = zeros,zeros+1,zeros,zeros,zeros+1,zeros,zeros
        self.t,self.seen,self.known = 0,0,[zeros]*4
        self.own,self.noted,self.grads = {},[],[]

    @staticmethod
    def col(t, x): return t.view(1,-1,*[1]*(x.ndim-2))
    def weight_of(self, bs, M, m, v, at):
        "Of a batch; `at`: mean, variance, count and `Innovations`, which this moves on"
        if not isinstance(self.rule, AdaptiveWindow):
            return self.rule(bs, M) if callable(self.rule) else min(1, bs/self.rule)
        mean,var,count,(n,t,square,trace) = at['mean'],at['var'],at['n'],at['known']
        if t[0]==0: n = torch.full_like(n, min(max(bs, 16*bs/M), self.rule.samples))
        a = (bs/n).clamp(max=1)
        if count[0]>0:
            e = (m-mean)/(var+self.eps)**.5
            t = t+1
            square = square+(e**2-square)*max(1/32, 1/t[0])
            lag = (e*trace*(a*(2-a))**.5/(square+1e-12)).clamp(-1, 1)
            step = max(.01, 1/(t[0]+100)**.5)*lag
            n = (n*(1-step+step**2/2)).clamp(bs, self.rule.samples)
            at['known'] = [n,t,square,(1-a)*trace+e]
        return a
    def average_share(self, bs, rho):
        if self.momentum is None: return rho.new_tensor(1/self.t)
        if not isinstance(self.momentum, AutoMomentum): return rho.new_tensor(self.momentum)
        return rho if self.eval_window is None else torch.minimum(rho, rho.new_tensor(max(min(1, bs/self.eval_window), 10/(self.t+9))))

    def forward(self, x):
        dims,bs,M = [d for d in range(x.ndim) if d!=1],len(x),x.numel()//x.shape[1]
        z = x.detach()
        m,v = z.mean(dims),z.var(dims, correction=0)
        self.noted.append((M,m,v,bs))
        own = self.own.setdefault(self.rank, dict(mean=self.mean, var=self.var,
            n=self.n/self.world, g1=self.g1, g2=self.g2, seen=self.seen, known=self.known))
        a = self.weight_of(bs, M, m, v, own)
        own['n'] = (1-a)*own['n']+a*M
        rho = a*M/own['n']
        d = m-own['mean']
        own['mean'],own['var'] = own['mean']+rho*d,own['var']+rho*(v-own['var'])+rho*(1-rho)*d**2
        at = own['seen']+bs*self.inclusive
        own['seen'] += bs
        floor = self.clamp[at] if at<len(self.clamp) else 0.
        above = (own['var']>=floor).to(m)
        mean,var = own['mean'],own['var'].clamp(min=floor)
        clip = (4*(var+self.eps)/(v+(m-mean)**2)).clamp(max=1)*above
        return _Fn.apply(x, self.weight, self.bias, mean, var, rho, clip, above, own, self, M)

    def merge(self):
        "What the one collective of a step does"
        M = sum(o[0] for o in self.noted)
        bs = sum(o[3] for o in self.noted)
        m = sum(o[0]*o[1] for o in self.noted)/M
        v = sum(o[0]*(o[2]+(o[1]-m)**2) for o in self.noted)/M
        self.t += 1
        at = dict(mean=self.mean, var=self.var, n=self.n, known=self.known)
        a = self.weight_of(bs, M, m, v, at)
        self.known = at['known']
        self.n = (1-a)*self.n+a*M
        rho = a*M/self.n
        d = m-self.mean
        self.mean,self.var = self.mean+rho*d,self.var+rho*(v-self.var)+rho*(1-rho)*d**2
        s = self.average_share(bs, rho)
        d = m-self.avg_mean
        if isinstance(self.momentum, AutoMomentum): self.avg_var = self.avg_var+s*(v-self.avg_var)+s*(1-s)*d**2
        else: self.avg_var = self.avg_var+s*(v*M/(M-1)-self.avg_var) # BatchNorm's
        self.avg_mean = self.avg_mean+s*d
        if self.grads:
            N = sum(o[0] for o in self.grads)
            self.g1,self.g2 = self.g1+rho*(sum(o[0]*o[1] for o in self.grads)/N-self.g1),self.g2+rho*(sum(o[0]*o[2] for o in self.grads)/N-self.g2)
        self.seen += bs
        self.own,self.noted,self.grads = {},[],[]

def delayed(model, world):
    "`model`, a Sequential, with its running norms written out"
    return nn.Sequential(*[DelayedNorm(l, world) if hasattr(l, 'window_mean') else l for l in model])

def train_delayed(model, steps, world, lr=.05):
    "Losses of each rank, a list a batch; `steps` of lists of micro-batches of lists of `(x, y, scale)`, one a rank"
    opt,losses,ours = torch.optim.SGD(model.parameters(), lr),[[] for _ in range(world)],[l for l in model if isinstance(l, DelayedNorm)]
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
