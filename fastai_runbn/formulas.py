import math
from typing import NamedTuple
import torch
from torch import Tensor
from fastai_runbn.moments import (AutoMomentum,auto_momentum,average_share,batch_moments,head_start,
    merge_moments,window_share)

# %%
class State(NamedTuple):
    "What a layer keeps from batch to batch; all updated in place"
    mean:Tensor     # Mean of the window `(C,)`
    var:Tensor      # Its biased variance `(C,)`
    count:Tensor    # Its count $n$ `(C,)`; 0: an empty window, less: a full one
    avg_mean:Tensor # Mean for evaluation `(C,)`
    avg_var:Tensor  # Its variance `(C,)`
    steps:Tensor    # $t+k$ of `average_share` `(C,)`
    batches:Tensor  # Batches, an integer scalar
    seen:Tensor     # Samples, an integer `(1,)`
    skipped:Tensor  # Batches that were left out of a channel, an integer scalar
    floors:Tensor   # Least variance by samples seen, the last one for ever, `(n+1,)`, or of each channel `(n+1,C)`
    grad:Tensor=None       # Running gradient $\\bar g$ `(2,C)`, of a loss that is not scaled
    known_mean:Tensor=None # `avg_mean` as last written, `(C,)`, where that is kept
    known_var:Tensor=None  # `avg_var` as last written

class Step(NamedTuple):
    "The numbers of one call; equal only to itself, for tensors among them may change"
    samples:int              # Samples in the batch
    weight:float|Tensor      # Weight $a$ of the batch in the window, in (0,1], a number, scalar or `(C,)`
    average:float|Tensor|None=None # Its weight in the full average; `None`: the average is the window
    momentum:float|None=auto_momentum # BatchNorm's own, where it was set; `None`: a cumulative average
    running_grad:float|Tensor=0. # Share of the running gradient that is paid, in [0,1]; 0: lesson 10
    eps:float=1e-5           # Added to the variance
    clamped:bool=True        # Is there a floor under the variance?
    inclusive:bool=False     # Look the floor up with this batch's samples counted in?
    update:bool=True         # Update the state?
    act:str=None             # Activation of the result: 'relu', 'silu' or none
    clip:float=4.            # A batch pays `clip` over the mean square of its normalised values …
    clip_max:float=1.        # … of what is owed in the scale, and this at most
    def __eq__(self, other): return self is other
    def __ne__(self, other): return self is not other
    def __hash__(self): return id(self)

class Saved(NamedTuple):
    "What a forward leaves to its backward, `(C,)` each: rows of one tensor `(7,C)`"
    mean:Tensor       # Normalised with: mean of the window, with the batch in it
    var:Tensor        # Its biased variance, or the floor
    share:Tensor      # Share $\\rho$ of the batch in the window
    factor:Tensor     # 0 where the variance is at its floor, else the batch's clip factor
    batch_mean:Tensor # Mean of the batch
    batch_var:Tensor  # Its biased variance
    unpaid:Tensor     # 1 until the first backward, then 0

# %%
def changed(
    state:State, # Of a layer
)->Tensor: # A boolean scalar
    "Has somebody else written the statistics for evaluation since the layer did?"
    pairs = (state.avg_mean,state.known_mean),(state.avg_var,state.known_var)
    return torch.stack([(now!=known).any() for now,known in pairs]).any()

full_steps = 2.**24 # As many as float32 counts

@torch.no_grad()
def seed(
    state:State, # Updated in place
    where:Tensor=True, # Only if this is true, a boolean scalar
):
    "Start the window from the statistics for evaluation: full if they were trained, empty if not"
    s = state
    trained = (s.batches>0) | (s.avg_mean!=0).any() | (s.avg_var!=1).any()
    steps = torch.where(s.batches>0, s.batches, torch.where(trained, full_steps, 0.))+head_start
    seeds = ((s.mean,s.avg_mean), (s.var,s.avg_var), (s.known_mean,s.avg_mean),
        (s.known_var,s.avg_var), (s.count,torch.where(trained, -1., 0.)), (s.steps,steps),
        (s.seen,torch.where(trained, 2**40, 0)), (s.skipped,0), (s.grad.data,0.))
    for old,new in seeds:
        if where is not True: new = torch.where(where, new, old)
        old.copy_(new) if torch.is_tensor(new) else old.fill_(new)

# %%
def clip_factor(
    saved:Saved, # With a variance that is not below the floor
    step:Step, # With `clip` and `clip_max`
)->Tensor: # In (0,`clip_max`], `(C,)`
    r"What a batch pays of what is owed in the scale: $\min(1, 4/\overline{\hat x^2})$ by default"
    d = saved.batch_mean-saved.mean
    mean_square = torch.addcmul(saved.batch_var, d, d)/(saved.var+step.eps)
    return (step.clip/mean_square).clamp(max=step.clip_max)

def to_save(
    mean:Tensor, # Mean of the window, with the batch in it `(C,)`
    var:Tensor, # Its biased variance
    share:Tensor, # Share of the batch in it
    m:Tensor, # Mean of the batch
    v:Tensor, # Its biased variance
    floor:Tensor|None, # Least variance to normalise with
    step:Step, # Numbers of this call
)->Tensor: # A `Saved` as one tensor `(7,C)`
    "What to normalise with, and what the backward needs"
    above = torch.ones_like(var)
    if floor is not None:
        above = (var>=floor).to(var.dtype)
        var = torch.maximum(var, floor)
    res = Saved(mean, var, share, above, m, v, torch.ones_like(var))
    if torch.is_tensor(step.running_grad) or step.running_grad:
        res = res._replace(factor=clip_factor(res, step)*above)
    return torch.stack(res)

def merge(
    m:Tensor, # Mean of the batch `(C,)`
    v:Tensor, # Its biased variance `(C,)`
    M:int|Tensor, # Values per channel in it
    state:State, # Updated in place
    step:Step, # Numbers of this call
)->Tensor: # What to normalise with, a `Saved` as one tensor `(7,C)`
    "Merge a batch into window and average; channels that are not finite stay out, with a share of 0"
    s,own = state,step.average is not None or type(step.momentum) is not AutoMomentum
    m,v,old_mean,old_var = [t.to(s.mean.dtype) for t in (m,v,s.avg_mean,s.avg_var)]
    count,share = window_share(s.count, M, step.weight)
    mean,var = merge_moments(s.mean, s.var, m, v, share)
    ok = var<math.inf
    mean,var = torch.where(ok, mean, s.mean),torch.where(ok, var, s.var)
    avg_mean,avg_var,avg_ok = _average(m, v, M, old_mean, old_var, share, s, step) if own else (mean,var,ok)
    floor = None
    if step.clamped:
        seen = s.seen+step.samples if step.inclusive else s.seen
        floor = s.floors.index_select(0, seen.clamp(max=len(s.floors)-1))[0]
    if step.update:
        s.skipped.add_((ok&avg_ok).all().logical_not())
        s.batches.add_(1)
        s.seen.add_(step.samples)
        s.mean.copy_(mean)
        s.var.copy_(var)
        s.count.copy_(torch.where(ok, count, s.count))
        s.avg_mean.copy_(torch.where(avg_ok, avg_mean, old_mean))
        s.avg_var.copy_(torch.where(avg_ok, avg_var, old_var))
        s.steps.add_(avg_ok)
        if s.known_mean is not None:
            s.known_mean.copy_(s.avg_mean)
            s.known_var.copy_(s.avg_var)
    return to_save(mean, var, share*ok, m, v, floor, step)

def _average(m, v, M, mean, var, share, s, step):
    "Mean and variance for evaluation with a batch merged in, and where they are finite"
    momentum = step.momentum
    if type(momentum) is AutoMomentum: share = average_share(s.steps+1-head_start, step.average, share)
    elif momentum is None: share = 1/torch.minimum(s.steps+1-head_start, s.batches+1)
    else: share = torch.full_like(share, momentum)
    new_mean,new_var = merge_moments(mean, var, m, v, share)
    if type(momentum) is not AutoMomentum: # BatchNorm's: unbiased, without the spread between batches
        unbiased = v*(M/(M-1).clamp(min=1) if torch.is_tensor(M) else M/max(1, M-1))
        new_var = torch.lerp(var, unbiased, share)
    return new_mean,new_var,new_var<math.inf

# %%
def react(
    sums:Tensor, # Sums of $dz$ and of $dz\\cdot\\hat x$, `(2,C)`
    M:int|Tensor, # Over so many values per channel
    saved:Tensor, # Of the forward; its row `unpaid` is set to 0
    running:Tensor, # Running gradient $\\bar g$ `(2,C)`, updated in place
    step:Step, # Numbers of the forward
    scale:Tensor|float=None, # The loss was multiplied with this; default: with nothing
)->Tensor: # $G$ `(2,C)`
    r"Pay $(1-\rho)\bar g$ in the first backward of a forward, add $\rho g$ in each, to $G$ and $\bar g$"
    s = Saved(*saved)
    g = torch.stack((sums[0], sums[1]*(s.factor>0)))/M # at the floor a variance does not react
    own = s.share*g
    if not torch.is_tensor(step.running_grad) and step.running_grad==0: return own
    left = running*(1-s.share*s.unpaid)
    owed = left*(s.unpaid*step.running_grad)*torch.stack((torch.ones_like(s.factor), s.factor))
    G = own+(owed if scale is None else owed*scale)
    if step.update:
        new = left+(own if scale is None else own/scale)
        running.copy_(torch.where(g.abs()<math.inf, new, running))
    saved.data[-1] = 0. # not by autograd's count of changes, which would refuse a second backward
    return G

# %%
def per_channel(t, x): return t.view(1, -1, *[1]*(x.ndim-2))
def over_channel(t): return t.sum([d for d in range(t.ndim) if d!=1])

def active(z, act): return z if act is None else getattr(torch.nn.functional, act)(z)
def slope(dy, z, act):
    "Gradient of the normalised value `z`, before the activation"
    if act is None: return dy
    if act=='relu': return torch.where(z<=0, 0, dy)
    s = z.sigmoid()
    return dy*s*(1+z*(1-s))

class Formulas:
    "Forward and backward in PyTorch's operators: any device, layout and dtype"
    name = 'formulas'

    @classmethod
    def moments(cls, x): return batch_moments(x)[:2]

    @classmethod
    def normalize(cls, x, weight, bias, saved, step):
        z = cls._normal(x, saved, step)[0]
        if weight is not None: z = z*per_channel(weight, x)
        if bias is not None: z = z+per_channel(bias, x)
        z = active(z, step.act)
        return z if z.dtype==x.dtype else z.to(x.dtype)

    @classmethod
    def _normal(cls, x, saved, step):
        "The normalised values, and one over the deviation"
        rstd = (saved[1]+step.eps).rsqrt()
        return (x-per_channel(saved[0], x))*per_channel(rstd, x),rstd

    @classmethod
    def _before_act(cls, dy, xhat, weight, bias, step):
        dy = dy.to(xhat.dtype)
        if step.act is None: return dy
        z = xhat if weight is None else xhat*per_channel(weight, xhat)
        return slope(dy, z if bias is None else z+per_channel(bias, z), step.act)

    @classmethod
    def sums(cls, dy, x, weight, bias, saved, step):
        xhat,_ = cls._normal(x, saved, step)
        dz = cls._before_act(dy, xhat, weight, bias, step)
        return torch.stack((over_channel(dz), over_channel(dz*xhat)))

    @classmethod
    def dx(cls, dy, x, weight, bias, saved, G, step):
        xhat,rstd = cls._normal(x, saved, step)
        dz = cls._before_act(dy, xhat, weight, bias, step)
        scale = rstd if weight is None else rstd*weight
        dx = (dz-per_channel(G[0], x)-xhat*per_channel(G[1], x))*per_channel(scale, x)
        return dx if dx.dtype==x.dtype else dx.to(x.dtype)

    @classmethod
    @torch.no_grad()
    def forward(cls,
        x:Tensor, # Activations, `(N,C,*)`, not empty
        weight:Tensor|None, # Scale $\\gamma$ `(C,)`
        bias:Tensor|None, # Shift $\\beta$ `(C,)`
        state:State, # Updated in place
        step:Step, # Numbers of this call
    )->tuple: # $y$, as `x`, and a `Saved` as one tensor
        "Merge the batch into the window, and normalise it with that"
        saved = cls.statistics(x, state, step)
        return cls.normalize(x, weight, bias, saved, step),saved

    @classmethod
    def statistics(cls, x, state, step):
        "The first half of `forward`: what to normalise with, after the batch is merged in"
        if state.known_mean is not None: seed(state, changed(state))
        return merge(*cls.moments(x), x.numel()//x.shape[1], state, step)

    @classmethod
    @torch.no_grad()
    def backward(cls,
        dy:Tensor, # Gradient of $y$
        x:Tensor, # As in the forward, as the next two
        weight:Tensor|None,
        bias:Tensor|None,
        saved:Tensor, # From the forward
        running:Tensor, # Running gradient `(2,C)`, updated in place
        step:Step, # Numbers of the forward
        scale:Tensor|float=None, # The loss was multiplied with this
        need_dx:bool=True, # Is the gradient of `x` wanted?
    )->tuple: # That gradient or `None`, those of weight and bias
        "Gradients, through what is normalised with too; updates the running gradient"
        G,sums = cls.reaction(dy, x, weight, bias, saved, running, step, scale)
        dx = cls.dx(dy, x, weight, bias, saved, G, step) if need_dx else None
        return dx,sums[1],sums[0]

    @classmethod
    def reaction(cls, dy, x, weight, bias, saved, running, step, scale=None):
        "The first half of `backward`: how the statistics react, and gradients of bias and weight, `(2,C)` each"
        sums = cls.sums(dy, x, weight, bias, saved, step)
        return react(sums, x.numel()//x.shape[1], saved, running, step, scale),sums
