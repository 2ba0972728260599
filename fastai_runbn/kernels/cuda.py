"""A running norm in Triton: one launch forward, one backward; two each for large maps"""

#CELL imports
import math,warnings
from functools import lru_cache,wraps
from typing import NamedTuple
import torch, triton, triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version
from ..formulas import Formulas,KeptStep,full_samples,full_steps
from ..moments import head_start
from . import cpu
from .cpu import flags_of,layout,like,written

if tuple(int(o) for o in triton.__version__.split('.')[:2])<(3,3):
    raise ImportError(f'Triton {triton.__version__}; 3.3 or later is needed')

#CELL constants
MERGE,NORMALIZE,REACT,DX = map(tl.constexpr, (cpu.MERGE,cpu.NORMALIZE,cpu.REACT,cpu.DX))
UPDATE,INCLUSIVE,CLIPPED = map(tl.constexpr, (cpu.UPDATE,cpu.INCLUSIVE,cpu.CLIPPED))
OWN_AVERAGE,SET,CUMULATIVE = map(tl.constexpr, (cpu.OWN_AVERAGE,cpu.SET,cpu.CUMULATIVE))
CLAMPED,RUNNING = map(tl.constexpr, (cpu.CLAMPED,cpu.RUNNING))
WEIGHT,WEIGHTS,AVERAGE,PAYS,SCALE = map(tl.constexpr, (1,2,4,8,16)) # which numbers are in memory
LEFT_OUT,BY_OTHERS,TRAINED = map(tl.constexpr, (1,2,4)) # what a program tells of its channels
HEAD,FULL_STEPS,FULL_SAMPLES = map(tl.constexpr, (head_start,full_steps,full_samples))
INF = tl.constexpr(math.inf)

# Read a channel at a time: where they are aligned is no reason to compile again
unaligned = ('saved weight bias mean var count avg_mean avg_var steps batches seen skipped floors '
    'grad known_mean known_var part tickets a average pays scale G dbias dweight').split()

#CELL tile
@triton.jit
def tile(lo, hi, c, C, S, BLOCK:tl.constexpr, LAST:tl.constexpr):
    "Offsets of BLOCK values from `lo` on, a row each, of channels `c`, and which there are"
    l = lo+tl.arange(0, BLOCK)
    if LAST: at = l[:,None]*C + c[None,:]
    else: at = ((l//S)*(C*S) + l%S)[:,None] + (c*S)[None,:]
    return at, (l<hi)[:,None] & (c<C)[None,:]

@triton.jit
def read(x, at, ok): return tl.load(x+at, mask=ok, other=0.).to(tl.float32)

@triton.jit
def per_channel(p, c, C, default:tl.constexpr):
    "Numbers of channels `c`; `default` where there are none"
    if p is None: t = tl.full(c.shape, default, tl.float32)
    else: t = tl.load(p+c, mask=c<C, other=default).to(tl.float32)
    return t

@triton.jit
def put(p, c, C, t): tl.store(p+c, t, mask=c<C)

@triton.jit
def number(p, IN_MEMORY:tl.constexpr):
    if IN_MEMORY: t = tl.load(p).to(tl.float32)
    else: t = p
    return t

#CELL act
@triton.jit
def active(z, ACT:tl.constexpr):
    if ACT=='relu': z = tl.where(z<=0., 0., z) # NaN stays
    if ACT=='silu': z = z*tl.sigmoid(z)
    return z

@triton.jit
def slope(dy, z, ACT:tl.constexpr):
    "Gradient of `z`, before the activation"
    if ACT=='relu': dy = tl.where(z<=0., 0., dy)
    if ACT=='silu':
        s = tl.sigmoid(z)
        dy = dy*s*(1.+z*(1.-s))
    return dy

#CELL moments
@triton.jit
def in_registers(v, ok, M):
    "Mean, and sum of squares about it, of values that are all here"
    near = tl.sum(tl.where((tl.arange(0, v.shape[0])==0)[:,None], v, 0.), 0) # the first
    d = tl.where(ok, v-near[None,:], 0.)
    m = tl.sum(d, 0)/M
    d = tl.where(ok, d-m[None,:], 0.)
    return near+m,tl.sum(d*d, 0)

@triton.jit
def in_turns(x, lo, hi, c, C, S, BLOCK:tl.constexpr, LAST:tl.constexpr):
    "The same of values `lo` to `hi`: Welford's in each lane, and Chan's over the lanes"
    one,there = tile(lo, lo+1, c, C, S, 1, LAST)
    near = read(x, one, there) # the first
    mean = tl.zeros((BLOCK,c.shape[0]), tl.float32)
    squares = tl.zeros((BLOCK,c.shape[0]), tl.float32)
    turns = 0.
    for i in range(lo, hi, BLOCK):
        at,ok = tile(i, hi, c, C, S, BLOCK, LAST)
        v = read(x, at, ok)-near
        turns += 1.
        d = tl.where(ok, v-mean, 0.)
        mean += d*(1./turns)
        squares += tl.where(ok, d*(v-mean), 0.)
    n = tl.maximum((hi-lo-tl.arange(0, BLOCK)+BLOCK-1)//BLOCK, 0).to(tl.float32)[:,None]
    m = tl.sum(mean*n, 0)/(hi-lo)
    d = mean-m[None,:]
    return tl.sum(near, 0)+m, tl.sum(squares+tl.where(n>0., n*d*d, 0.), 0)

@triton.jit
def of_chunks(part, c, C, M, chunk, CHUNKS:tl.constexpr):
    "The same of all chunks, from what `part` has of each"
    j = tl.arange(0, CHUNKS)
    n = tl.maximum(tl.minimum(M-j*chunk, chunk), 0).to(tl.float32)[:,None]
    ok = (n>0.) & (c<C)[None,:]
    at = part + 2*j[:,None]*C + c[None,:]
    means = tl.load(at, mask=ok, other=0., cache_modifier='.cg') # others wrote it: not from L1
    squares = tl.load(at+C, mask=ok, other=0., cache_modifier='.cg')
    near = tl.sum(tl.where((j==0)[:,None], means, 0.), 0)
    d = tl.where(ok, means-near[None,:], 0.)
    m = tl.sum(d*n, 0)/M
    d = tl.where(ok, d-m[None,:], 0.)
    return near+m,tl.sum(squares+n*d*d, 0)

@triton.jit
def is_last(own, n):
    "Is this program the last of `n` to come here? What the others have written is there for it"
    tl.debug_barrier() # all of this program has written
    last = tl.atomic_add(own, 1)==n-1
    if last: tl.store(own, 0)
    return last

#CELL merge
@triton.jit
def between(a, b, t):
    "From a to b by the share t: from the nearer end, as torch.lerp does it"
    return tl.where(t<.5, a+t*(b-a), b-(1.-t)*(b-a))

@triton.jit
def differ(now, known): return (now!=known) & ((now==now)|(known==known))

@triton.jit
def follow(window, average, known, batches, seen, grad, c, C):
    "Channels whose average others have written start from that, as in `seed`; what to tell of it"
    mean,var,count = window
    avg_mean,avg_var,steps = average
    known_mean,known_var = per_channel(known[0], c, C, 0.),per_channel(known[1], c, C, 1.)
    new = (c<C) & (differ(avg_mean, known_mean)|differ(avg_var, known_var))
    trained = (batches>0.)|(avg_mean!=0.)|(avg_var!=1.)
    mean,var = tl.where(new, avg_mean, mean),tl.where(new, avg_var, var)
    count = tl.where(new, tl.where(trained, -1., 0.), count)
    start = tl.where(trained, FULL_STEPS, HEAD*1.)
    steps = tl.where(new, tl.where(batches>0., batches+HEAD, start), steps)
    seen = tl.where(new, tl.where(trained, FULL_SAMPLES, 0), seen)
    tl.store(grad+c, tl.zeros_like(mean), mask=new)
    tl.store(grad+C+c, tl.zeros_like(mean), mask=new)
    tell = tl.max(tl.where(new, tl.where(trained, BY_OTHERS|TRAINED, BY_OTHERS), 0), 0)
    return mean,var,count,steps,seen,tell

@triton.jit
def merge(m, v, c, C, M, saved, state, numbers, IN_MEMORY:tl.constexpr, FLAGS:tl.constexpr):
    "`merge` of formulas.py: what to normalise with, and what to tell of the channels"
    (to_mean,to_var,to_count,to_avg_mean,to_avg_var,to_steps,at_batches,at_seen,_,floors,grad,
        to_known_mean,to_known_var) = state
    a,average,momentum,eps,clip,clip_max,samples,last_floor = numbers
    mean,var = per_channel(to_mean, c, C, 0.),per_channel(to_var, c, C, 1.)
    avg_mean,avg_var = per_channel(to_avg_mean, c, C, 0.),per_channel(to_avg_var, c, C, 1.)
    count,steps = per_channel(to_count, c, C, -1.),per_channel(to_steps, c, C, 9.)
    batches,seen = tl.load(at_batches)+tl.zeros_like(mean),tl.load(at_seen)+tl.zeros_like(c)
    tell = 0
    if to_known_mean is not None:
        mean,var,count,steps,seen,tell = follow((mean,var,count), (avg_mean,avg_var,steps),
            (to_known_mean,to_known_var), batches, seen, grad, c, C)
    # the window
    if WEIGHTS & IN_MEMORY: a = per_channel(a, c, C, 1.)
    else: a = number(a, WEIGHT & IN_MEMORY)
    n = (1.-a)*tl.where(count<-.5, M*1., count)+a*M
    share = a*M/n
    d = m-mean
    go = share*d
    new_mean,new_var = mean+go,between(var, v, share)+go*(d-go)
    ok = new_var<INF
    # the average
    new_avg_mean,new_avg_var,avg_ok,t = new_mean,new_var,ok,steps+1.
    if OWN_AVERAGE & FLAGS:
        if CUMULATIVE & FLAGS: w = 1./tl.minimum(t-HEAD, batches+1.)
        elif SET & FLAGS: w = momentum+tl.zeros_like(share)
        else:
            w = tl.full(c.shape, HEAD+1., tl.float32)/t
            w = tl.minimum(tl.maximum(w, number(average, AVERAGE & IN_MEMORY)), share)
        d = m-avg_mean
        go = w*d
        new_avg_mean = avg_mean+go
        if SET & FLAGS: new_avg_var = between(avg_var, v*(M/tl.maximum(M-1., 1.)), w)
        else: new_avg_var = between(avg_var, v, w)+go*(d-go)
        avg_ok = new_avg_var<INF
    # what is not finite stays out
    share = tl.where(ok, share, 0.)
    new_mean,new_var = tl.where(ok, new_mean, mean),tl.where(ok, new_var, var)
    if UPDATE & FLAGS:
        mean,var,count = new_mean,new_var,tl.where(ok, n, count)
        avg_mean = tl.where(avg_ok, new_avg_mean, avg_mean)
        avg_var = tl.where(avg_ok, new_avg_var, avg_var)
        steps = tl.where(avg_ok, t, steps)
        tell |= tl.max(((c<C) & ~(ok&avg_ok)).to(tl.int32), 0)*LEFT_OUT
    put(to_mean, c, C, mean)
    put(to_var, c, C, var)
    put(to_count, c, C, count)
    put(to_avg_mean, c, C, avg_mean)
    put(to_avg_var, c, C, avg_var)
    put(to_steps, c, C, steps)
    if to_known_mean is not None:
        put(to_known_mean, c, C, avg_mean)
        put(to_known_var, c, C, avg_var)
    # the floor, and by what the batch is clipped
    factor = tl.full(c.shape, 1., tl.float32)
    above = factor
    if CLAMPED & FLAGS:
        if INCLUSIVE & FLAGS: seen += samples
        floor = tl.load(floors+tl.minimum(seen, last_floor)).to(tl.float32)
        above = (new_var>=floor).to(tl.float32)
        new_var = tl.where(new_var>=floor, new_var, floor)
    if CLIPPED & FLAGS:
        d = m-new_mean
        factor = clip*(new_var+eps)/(v+d*d)
        factor = tl.where(factor>clip_max, clip_max, factor)
    put(saved, c, C, new_mean)
    put(saved+C, c, C, new_var)
    put(saved+2*C, c, C, share)
    put(saved+3*C, c, C, factor*above)
    put(saved+6*C, c, C, tl.full(c.shape, 1., tl.float32))
    return new_mean,new_var,tell

@triton.jit
def count_batch(tell, tickets, state, samples, FLAGS:tl.constexpr):
    "When all programs have told of their channels, the last of them counts the batch"
    at_batches,at_seen,at_skipped = state[6],state[7],state[8]
    batches,seen,skipped = tl.load(at_batches),tl.load(at_seen),tl.load(at_skipped)
    if tell>0: tl.atomic_or(tickets+1, tell)
    if is_last(tickets, tl.num_programs(0)):
        tell = tl.atomic_xchg(tickets+1, 0)
        if (tell & BY_OTHERS)>0:
            skipped = skipped*0
            seen = tl.where((tell & TRAINED)>0, FULL_SAMPLES, seen*0)
        if UPDATE & FLAGS:
            skipped += (tell & LEFT_OUT).to(tl.int64)
            seen += samples
            batches += 1
        tl.store(at_skipped, skipped)
        tl.store(at_seen, seen)
        tl.store(at_batches, batches)

#CELL forward
@triton.jit
def write_y(x, y, k, lo, hi, c, C, S, BLOCK:tl.constexpr, LAST:tl.constexpr, ACT:tl.constexpr):
    "Normalise values `lo` to `hi`"
    mean,scale,shift = k
    for i in range(lo, hi, BLOCK):
        at,ok = tile(i, hi, c, C, S, BLOCK, LAST)
        z = (read(x, at, ok)-mean[None,:])*scale[None,:] + shift[None,:]
        tl.store(y+at, active(z, ACT), mask=ok)

@triton.jit
def finish(m, squares, c, C, M, saved, tickets, state, numbers, IN_MEMORY:tl.constexpr,
           PHASES:tl.constexpr, FLAGS:tl.constexpr):
    "With the moments of all values: merge them, if there is a state, and count the batch"
    v = squares/M
    put(saved+4*C, c, C, m)
    put(saved+5*C, c, C, v)
    mean,var = m,v
    if MERGE & PHASES:
        mean,var,tell = merge(m, v, c, C, M, saved, state, numbers, IN_MEMORY, FLAGS)
        count_batch(tell, tickets, state, numbers[6], FLAGS)
    return mean,var

@triton.jit(do_not_specialize_on_alignment=unaligned, do_not_specialize=['samples','last_floor'])
def forward(x, y, saved, weight, bias,
            mean, var, count, avg_mean, avg_var, steps, batches, seen, skipped, floors, grad,
            known_mean, known_var, part, tickets,
            a, average, momentum, eps, clip, clip_max, samples, last_floor, C, S, M, chunk,
            BLOCK:tl.constexpr, CHANNELS:tl.constexpr, CHUNKS:tl.constexpr, ONE:tl.constexpr,
            LAST:tl.constexpr, IN_MEMORY:tl.constexpr, PHASES:tl.constexpr, FLAGS:tl.constexpr,
            ACT:tl.constexpr):
    "Moments and merging; normalising, too, where a program has all values of its channels"
    c = tl.program_id(0)*CHANNELS + tl.arange(0, CHANNELS)
    k = tl.program_id(1)
    state = (mean,var,count,avg_mean,avg_var,steps,batches,seen,skipped,floors,grad,known_mean,
        known_var)
    numbers = a,average,momentum,eps,clip,clip_max,samples,last_floor
    lo,hi = k*chunk,tl.minimum(M, (k+1)*chunk)
    if ONE:
        at,ok = tile(0, M, c, C, S, BLOCK, LAST)
        values = read(x, at, ok)
        m,squares = in_registers(values, ok, M)
    else: m,squares = in_turns(x, lo, hi, c, C, S, BLOCK, LAST)
    if CHUNKS==1:
        used_mean,used_var = finish(m, squares, c, C, M, saved, tickets, state, numbers,
            IN_MEMORY, PHASES, FLAGS)
        if NORMALIZE & PHASES:
            scale = per_channel(weight, c, C, 1.)*tl.rsqrt(used_var+eps)
            shift = per_channel(bias, c, C, 0.)
            if ONE:
                z = (values-used_mean[None,:])*scale[None,:] + shift[None,:]
                tl.store(y+at, active(z, ACT), mask=ok)
            else: write_y(x, y, (used_mean,scale,shift), lo, hi, c, C, S, BLOCK, LAST, ACT)
    else:
        put(part+2*k*C, c, C, m)
        put(part+(2*k+1)*C, c, C, squares)
        if is_last(tickets+2+tl.program_id(0), tl.num_programs(1)):
            m,squares = of_chunks(part, c, C, M, chunk, CHUNKS)
            finish(m, squares, c, C, M, saved, tickets, state, numbers, IN_MEMORY, PHASES, FLAGS)

@triton.jit
def affine(saved, weight, bias, eps, c, C):
    "Mean, scale, shift and 1/deviation of channels `c`"
    rstd = tl.rsqrt(per_channel(saved+C, c, C, 1.)+eps)
    scale = rstd*per_channel(weight, c, C, 1.)
    return per_channel(saved, c, C, 0.),scale,per_channel(bias, c, C, 0.),rstd

@triton.jit(do_not_specialize_on_alignment=unaligned)
def normalize(x, y, saved, weight, bias, eps, C, S, M, chunk, BLOCK:tl.constexpr,
              CHANNELS:tl.constexpr, LAST:tl.constexpr, ACT:tl.constexpr):
    "Normalise a chunk of CHANNELS channels"
    c = tl.program_id(0)*CHANNELS + tl.arange(0, CHANNELS)
    k = tl.program_id(1)
    mean,scale,shift,_ = affine(saved, weight, bias, eps, c, C)
    hi = tl.minimum(M, (k+1)*chunk)
    write_y(x, y, (mean,scale,shift), k*chunk, hi, c, C, S, BLOCK, LAST, ACT)

#CELL backward
@triton.jit
def gradient(dy, x, at, ok, k, ACT:tl.constexpr):
    "Gradient of the normalised values dz, and x-mean; z is made again of x"
    mean,scale,shift,_ = k
    d = tl.where(ok, read(x, at, ok)-mean[None,:], 0.)
    dz = slope(read(dy, at, ok), d*scale[None,:]+shift[None,:], ACT)
    return tl.where(ok, dz, 0.),d

@triton.jit
def dx_of(dz, d, k, G1, G2):
    _,scale,_,rstd = k
    return dz*scale[None,:] - (d*(scale*rstd*G2)[None,:] + (scale*G1)[None,:])

@triton.jit
def write_dx(dy, x, dx, k, G1, G2, lo, hi, c, C, S, BLOCK:tl.constexpr, LAST:tl.constexpr,
             ACT:tl.constexpr):
    for i in range(lo, hi, BLOCK):
        at,ok = tile(i, hi, c, C, S, BLOCK, LAST)
        dz,d = gradient(dy, x, at, ok, k, ACT)
        tl.store(dx+at, dx_of(dz, d, k, G1, G2), mask=ok)

@triton.jit
def react(dbias, dweight, c, C, M, saved, grad, pays, scale, IN_MEMORY:tl.constexpr,
          FLAGS:tl.constexpr):
    "`react` of formulas.py: the reaction G of the statistics; the running gradient follows"
    share,factor = per_channel(saved+2*C, c, C, 0.),per_channel(saved+3*C, c, C, 1.)
    g1,g2 = dbias/M,dweight*(factor>0.).to(tl.float32)/M
    G1,G2 = share*g1,share*g2
    if RUNNING & FLAGS:
        unpaid,by = per_channel(saved+6*C, c, C, 0.),1.
        if scale is not None: by = number(scale, SCALE & IN_MEMORY)
        old1,old2 = per_channel(grad, c, C, 0.),per_channel(grad+C, c, C, 0.)
        left1,left2 = (1.-share*unpaid)*old1,(1.-share*unpaid)*old2
        if UPDATE & FLAGS:
            put(grad, c, C, tl.where(tl.abs(g1)<INF, left1+G1/by, old1))
            put(grad+C, c, C, tl.where(tl.abs(g2)<INF, left2+G2/by, old2))
        put(saved+6*C, c, C, tl.zeros_like(share))
        due = unpaid*number(pays, PAYS & IN_MEMORY)*by
        G1 += left1*due
        G2 += left2*(due*factor)
    return G1,G2

@triton.jit
def finish_backward(s1, s2, c, C, M, saved, grad, G, dbias, dweight, pays, scale,
                    IN_MEMORY:tl.constexpr, PHASES:tl.constexpr, FLAGS:tl.constexpr):
    "With the sums over all values: gradients of bias and weight, and G"
    put(dbias, c, C, s1)
    put(dweight, c, C, s2)
    G1,G2 = s1,s2
    if REACT & PHASES:
        G1,G2 = react(s1, s2, c, C, M, saved, grad, pays, scale, IN_MEMORY, FLAGS)
        if G is not None:
            put(G, c, C, G1)
            put(G+C, c, C, G2)
    return G1,G2

@triton.jit(do_not_specialize_on_alignment=unaligned)
def backward(dy, x, dx, saved, weight, bias, grad, G, dbias, dweight, part, tickets,
             pays, scale, eps, C, S, M, chunk,
             BLOCK:tl.constexpr, CHANNELS:tl.constexpr, CHUNKS:tl.constexpr, ONE:tl.constexpr,
             LAST:tl.constexpr, IN_MEMORY:tl.constexpr, PHASES:tl.constexpr, FLAGS:tl.constexpr,
             ACT:tl.constexpr):
    "Sums and reaction; dx, too, where a program has all values of its channels"
    c = tl.program_id(0)*CHANNELS + tl.arange(0, CHANNELS)
    k = tl.program_id(1)
    mean,own,shift,rstd = affine(saved, weight, bias, eps, c, C)
    how = mean,own,shift,rstd
    lo,hi = k*chunk,tl.minimum(M, (k+1)*chunk)
    if ONE:
        at,ok = tile(0, M, c, C, S, BLOCK, LAST)
        dz,d = gradient(dy, x, at, ok, how, ACT)
        s1,s2 = tl.sum(dz, 0),tl.sum(dz*d, 0)
    else:
        sum1 = tl.zeros((BLOCK,CHANNELS), tl.float32)
        sum2 = tl.zeros((BLOCK,CHANNELS), tl.float32)
        for i in range(lo, hi, BLOCK):
            at,ok = tile(i, hi, c, C, S, BLOCK, LAST)
            dz,d = gradient(dy, x, at, ok, how, ACT)
            sum1 += dz
            sum2 += dz*d
        s1,s2 = tl.sum(sum1, 0),tl.sum(sum2, 0)
    if CHUNKS==1:
        G1,G2 = finish_backward(s1, s2*rstd, c, C, M, saved, grad, G, dbias, dweight, pays, scale,
            IN_MEMORY, PHASES, FLAGS)
        if DX & PHASES:
            if ONE: tl.store(dx+at, dx_of(dz, d, how, G1, G2), mask=ok)
            else: write_dx(dy, x, dx, how, G1, G2, lo, hi, c, C, S, BLOCK, LAST, ACT)
    else:
        put(part+2*k*C, c, C, s1)
        put(part+(2*k+1)*C, c, C, s2)
        if is_last(tickets+2+tl.program_id(0), tl.num_programs(1)):
            j = tl.arange(0, CHUNKS)
            ok = (j<tl.num_programs(1))[:,None] & (c<C)[None,:]
            at = part + 2*j[:,None]*C + c[None,:]
            s1 = tl.sum(tl.load(at, mask=ok, other=0., cache_modifier='.cg'), 0)
            s2 = tl.sum(tl.load(at+C, mask=ok, other=0., cache_modifier='.cg'), 0)
            finish_backward(s1, s2*rstd, c, C, M, saved, grad, G, dbias, dweight, pays, scale,
                IN_MEMORY, PHASES, FLAGS)

@triton.jit(do_not_specialize_on_alignment=unaligned)
def input_gradient(dy, x, dx, saved, weight, bias, G, eps, C, S, M, chunk, BLOCK:tl.constexpr,
                   CHANNELS:tl.constexpr, LAST:tl.constexpr, ACT:tl.constexpr):
    "dx of a chunk of CHANNELS channels"
    c = tl.program_id(0)*CHANNELS + tl.arange(0, CHANNELS)
    k = tl.program_id(1)
    mean,scale,shift,rstd = affine(saved, weight, bias, eps, c, C)
    G1,G2,hi = per_channel(G, c, C, 0.),per_channel(G+C, c, C, 0.),tl.minimum(M, (k+1)*chunk)
    write_dx(dy, x, dx, (mean,scale,shift,rstd), G1, G2, k*chunk, hi, c, C, S, BLOCK, LAST, ACT)

#CELL blocks
class Blocks(NamedTuple):
    "How programs go over `(N,C,S)` values"
    M:int        # Values a channel
    S:int        # So many of them lie next to each other
    last:bool    # Channels last?
    block:int    # Values of a channel that a program has at a time, a power of 2
    channels:int # Channels of a program, a power of 2
    warps:int    # Warps of a program
    one:bool     # Does a program have all values of its channels at once?
    chunks:int   # Programs that share a channel
    chunk:int    # Values of each

def power_of_2(n): return 1<<max(0, int(n)-1).bit_length()

@lru_cache(maxsize=4096)
def blocks(
    N:int, # Samples
    C:int, # Channels
    S:int, # Values of each
    last:bool, # Channels last?
    itemsize:int, # Bytes of a value
    processors:int=132, # Multiprocessors of the GPU; default: of an H100
)->Blocks:
    "Blocks for activations of a size"
    M = N*S
    if S==1 or last: S,last = M,True
    if last:
        channels = min(power_of_2(C), 16 if itemsize==4 else 32) # 64 bytes of a row
        block = 4096//channels
        if M<=block//4: block //= 4
    else: channels,block = 1,next((n for n in (256,1024) if M<=n), 4096)
    warps = {1:1, 2:4, 3:4, 4:4}.get(block*channels//256, 8)
    one,programs = M<=block,triton.cdiv(C, channels)
    chunks,chunk = 1,M
    if not one and programs<2*processors and M*channels*4>2**18: # 256 KB a program are some 5 us
        chunks = min(64, triton.cdiv(4*processors, programs), triton.cdiv(M, 2*block))
        chunk = triton.cdiv(triton.cdiv(M, chunks), block)*block
        chunks = triton.cdiv(M, chunk)
    return Blocks(M, S, last, block, channels, warps, one, chunks, chunk)

@lru_cache(None)
def processors(device)->int:
    "Multiprocessors of a device"
    if device.type!='cuda': return 132
    return torch.cuda.get_device_properties(device).multi_processor_count

#CELL plan
class NotCompiled(Exception):
    "A kernel cannot be had here"

current_stream = getattr(torch._C, '_cuda_getCurrentRawStream', None)

class Plan:
    "How activations of a shape, dtype and layout go through the kernels; what was compiled for them"
    def __init__(self, shape, dtype, device, last, flags, act):
        N,C,*rest = shape
        b = blocks(N, C, math.prod(rest), last>0, dtype.itemsize, processors(device))
        self.device,self.warps,self.split,self.compiled = device,b.warps,b.chunks>1,{}
        self.grid,self.sizes = (triton.cdiv(C, b.channels),b.chunks,1),(C,b.S,b.M,b.chunk)
        self.whole = b.block,b.channels,power_of_2(b.chunks),b.one,b.last # constants of kernels
        self.part,self.options = (b.block,b.channels,b.last,act),(flags,act)

    def launch(self, kernel, key, args, constants):
        "Launch; from the second time on what was compiled, without asking Triton which that is"
        index = self.device.index
        if index is not None and index!=torch.cuda.current_device():
            with torch.cuda.device(index): return self.launch(kernel, key, args, constants)
        key = kernel,constants,key
        found = self.compiled.get(key)
        if found is None: self.compiled[key] = self.first_launch(kernel, args, constants)
        else:
            run,function,metadata = found
            run(*self.grid, current_stream(index), function, metadata, None, None, None,
                *args, *constants)

    def first_launch(self, kernel, args, constants):
        "Launch by Triton's own way, 40 to 70 us; what to launch the next time, in 5"
        try: res = kernel[self.grid](*args, *constants, num_warps=self.warps)
        except torch.OutOfMemoryError: raise
        except Exception as e: raise NotCompiled(f'{type(e).__name__}: {e}') from e
        return res and (res.run,res.function,res.packed_metadata) # nothing in the interpreter

plan_of = lru_cache(maxsize=4096)(Plan)

def plan(step, x, last):
    "The plan for `x`; numbers of a step, share of the running gradient, and which are in memory"
    key = x.shape,x.dtype,x.device,last
    made = getattr(step, 'plan', None) # read once: another thread may be here
    if made is not None and made[0]==key: return made[1]
    def number(o): return dense(o) if torch.is_tensor(o) else float(o or 0)
    a,average,pays = map(number, (step.weight,step.average,step.running_grad))
    numbers = a,average,float(step.momentum or 0),step.eps,step.clip,step.clip_max,step.samples
    where = ((WEIGHT,torch.is_tensor(a)), (WEIGHTS,torch.is_tensor(a) and a.numel()>1),
        (AVERAGE,torch.is_tensor(average)), (PAYS,torch.is_tensor(pays)))
    in_memory = sum(bit.value for bit,there in where if there)
    res = plan_of(*key, flags_of(step), step.act),numbers,pays,in_memory
    if type(step) is KeptStep: step.plan = key,res
    return res

def kind(t): return t.dtype if torch.is_tensor(t) else type(t)
def aligned(*tensors): return all(t.data_ptr()%16==0 for t in tensors)
def dense(t): return t if t is None or t.is_contiguous() else t.contiguous()

def as_read(x):
    "`x` as the kernels read it, and its layout; a copy where it is in neither"
    if x.is_neg(): x = x.resolve_neg()
    last = layout(x)
    return (x,last) if last is not None else (x.contiguous(),0)

_tickets = {}
def tickets(
    device, # Of the programs
    of:Tensor|None, # Of a layer: who runs on that in two streams at once has a race in any case
    n:int, # How many
)->Tensor: # `(n,)`
    "Integers that are 0 between launches, by which programs find out who is the last"
    if of is None: return torch.zeros(n, dtype=torch.int32, device=device)
    key = device,of.data_ptr(),n
    found = _tickets.get(key)
    if found is None:
        found = torch.zeros(n, dtype=torch.int32, device=device)
        if of.is_cuda and torch.cuda.is_current_stream_capturing(): return found # set in each replay
        _tickets[key] = found # for good: a CUDA graph may have its address
    return found

#CELL kernels
_failed = ("The Triton kernels do not compile here, and running norms are computed by PyTorch's "
    "operators from now on: right, but with many launches. The first reason: {}")

def or_formulas(method):
    "A class method that does what `Formulas` does once a kernel has failed to compile"
    name = method.__name__
    @wraps(method)
    def launch_or_compute(cls, *args, **kwargs):
        if not cls.broken:
            try: return method(cls, *args, **kwargs)
            except NotCompiled as e:
                cls.broken,cls.name = True,'formulas' # `layer.path` says so
                warnings.warn(_failed.format(e))
        return getattr(Formulas, name)(*args, **kwargs)
    return classmethod(launch_or_compute)

dtypes = torch.float32,torch.float16,torch.bfloat16

class TritonKernels(Formulas):
    "Forward and backward in Triton, on CUDA: float32, float16, bfloat16"
    name,broken = 'triton',False

    @classmethod
    def fits(cls, x, state):
        "Are these what the kernels can compute with?"
        mean = state.mean
        return (not cls.broken and x.is_cuda and mean.device==x.device and x.dtype in dtypes
            and mean.dtype is torch.float32 and state.floors.ndim==1 and 0<x.numel()<2**31
            and all(t is None or t.is_contiguous() for t in state))

    @classmethod
    def _forward(cls, phases, x, last, weight, bias, saved, step, state=(None,)*13):
        "A launch of `forward`, or two; returns y, if `phases` say so"
        (how,numbers,_,in_memory),first = plan(step, x, last),state[0]
        later = how.split and phases&cpu.NORMALIZE
        phases -= later
        y = torch.empty_like(x) if phases&cpu.NORMALIZE else None
        last_floor = 0 if first is None else len(state.floors)-1
        part,own = None,None
        if how.split: part = saved.new_empty((2*how.grid[1],x.shape[1]))
        if how.split or first is not None: own = tickets(x.device, first, 2+how.grid[0])
        args = (x, y, saved, dense(weight), dense(bias), *state, part, own, *numbers, last_floor,
            *how.sizes)
        kinds = map(kind, (weight,bias,state[3],state[11],*numbers[:2]))
        constants = *how.whole,in_memory,phases,*how.options
        how.launch(forward, (aligned(x),*kinds), args, constants)
        if first is not None and step.update: written(state[:9])
        return cls.normalize(x, weight, bias, saved, step) if later else y

    @classmethod
    def _backward(cls, phases, dy, x, last, weight, bias, saved, step, running=None, G=None,
                  scale=None, sums=None):
        "A launch of `backward`, or two; returns dx, if `phases` say so, gradients of weight and bias"
        (how,_,pays,in_memory),dy,C = plan(step, x, last),like(dy, x, last),x.shape[1]
        later = how.split and phases&cpu.DX
        phases -= later
        dx = torch.empty_like(x) if phases&cpu.DX else None
        dbias,dweight = (saved.new_empty(C),saved.new_empty(C)) if sums is None else sums.unbind()
        part,own = None,None
        if later: G = saved.new_empty((2,C))
        if how.split:
            part,own = saved.new_empty((2*how.grid[1],C)),tickets(x.device, running, 2+how.grid[0])
        if torch.is_tensor(scale): in_memory |= SCALE.value
        if step.act is None: bias = None
        args = (dy, x, dx, saved, dense(weight), dense(bias), running, G, dbias, dweight, part, own,
            pays, scale, step.eps, *how.sizes)
        kinds = map(kind, (dx,weight,bias,running,G,pays,scale))
        constants = *how.whole,in_memory,phases,*how.options
        how.launch(backward, (aligned(x, dy),*kinds), args, constants)
        if running is not None and step.update: increment_version(running)
        if later: dx = cls.dx(dy, x, weight, bias, saved, G, step)
        return dx,dweight,dbias

    @or_formulas
    def moments(cls, x):
        (x,last),saved = as_read(x),x.new_empty((7,x.shape[1]), dtype=torch.float32)
        cls._forward(cpu.MOMENTS, x, last, None, None, saved, _step)
        return saved[4],saved[5]

    @or_formulas
    def statistics(cls, x, state, step):
        (x,last),saved = as_read(x),x.new_empty((7,x.shape[1]), dtype=torch.float32)
        cls._forward(cpu.MOMENTS|cpu.MERGE, x, last, None, None, saved, step, state)
        return saved

    @or_formulas
    def normalize(cls, x, weight, bias, saved, step):
        x,last = as_read(x)
        how,y = plan(step, x, last)[0],torch.empty_like(x)
        args = x,y,saved,dense(weight),dense(bias),step.eps,*how.sizes
        how.launch(normalize, (aligned(x),kind(weight),kind(bias)), args, how.part)
        return y

    @or_formulas
    def forward(cls, x, weight, bias, state, step):
        (x,last),saved = as_read(x),x.new_empty((7,x.shape[1]), dtype=torch.float32)
        phases = cpu.MOMENTS|cpu.MERGE|cpu.NORMALIZE
        return cls._forward(phases, x, last, weight, bias, saved, step, state),saved

    @or_formulas
    def sums(cls, dy, x, weight, bias, saved, step):
        (x,last),sums = as_read(x),torch.empty_like(saved[:2])
        cls._backward(cpu.SUMS, dy, x, last, weight, bias, saved, step, sums=sums)
        return sums

    @or_formulas
    def reaction(cls, dy, x, weight, bias, saved, running, step, scale=None):
        (x,last),G,sums = as_read(x),torch.empty_like(saved[:2]),torch.empty_like(saved[:2])
        phases = cpu.SUMS|cpu.REACT
        cls._backward(phases, dy, x, last, weight, bias, saved, step, running, G, scale, sums)
        return G,sums

    @or_formulas
    def dx(cls, dy, x, weight, bias, saved, G, step):
        x,last = as_read(x)
        how,dy,dx = plan(step, x, last)[0],like(dy, x, last),torch.empty_like(x)
        if step.act is None: bias = None
        args = dy,x,dx,saved,dense(weight),dense(bias),dense(G),step.eps,*how.sizes
        how.launch(input_gradient, (aligned(x, dy),*map(kind, (weight,bias,G))), args, how.part)
        return dx

    @or_formulas
    def backward(cls, dy, x, weight, bias, saved, running, step, scale=None, need_dx=True):
        (x,last),phases = as_read(x),cpu.SUMS|cpu.REACT|cpu.DX*need_dx
        return cls._backward(phases, dy, x, last, weight, bias, saved, step, running, None, scale)

_step = KeptStep(1, 1.) # where its numbers do not matter
