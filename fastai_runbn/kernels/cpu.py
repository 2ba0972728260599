import ctypes
from functools import lru_cache
from pathlib import Path
from struct import Struct
import torch
from torch import Tensor
from fastai_runbn.moments import AutoMomentum
from fastai_runbn.formulas import Formulas,State,Step,seed

# %%
MOMENTS,MERGE,NORMALIZE,SUMS,REACT,DX = (1<<i for i in range(6))
UPDATE,INCLUSIVE,CLIPPED,OWN_AVERAGE,SET,CUMULATIVE,CLAMPED,RUNNING = (1<<i for i in range(8))
DONE,CHANGED,NO_MEMORY = range(3)
pack_plan = Struct('9q7d').pack  # the two parts of `call` in cpu.c
pack_call = Struct('3qd24P').pack
threads = torch.get_num_threads

def load()->ctypes.CDLL: # `None` where there are none, or not for this platform
    "The kernels that pip has built"
    for path in Path(__file__).parent.glob('runbn_cpu*'):
        try: lib = ctypes.CDLL(str(path))
        except OSError: continue
        if not hasattr(lib, 'runbn_size'): continue
        if lib.runbn_size()!=Struct('9q7d3qd24P').size: continue
        for f in (lib.runbn_forward,lib.runbn_backward): f.argtypes = [ctypes.c_char_p]
        return lib

def pool()->int: # Address of `GOMP_parallel`; 0: one thread
    "Entry of the threads that PyTorch's own operators run on, where those are OpenMP's"
    try: return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError,OSError,TypeError): return 0

kernels,parallel = load(),pool()
instruction_set = {'AVX2':1, 'AVX512':2}.get(torch.backends.cpu.get_cpu_capability(), 0)

# %%
_channels_last = {4:torch.channels_last, 5:torch.channels_last_3d}

def layout(
    x:Tensor, # `(N,C,*)`
)->int|None: # 0: contiguous, 1: channels last, `None`: neither
    "How the kernels have to read `x`"
    if x.is_contiguous(): return int(x.shape[0]*x.shape[1]==x.numel())
    if x.ndim==3: return 1 if x.mT.is_contiguous() else None
    if x.ndim not in _channels_last: return None
    return 1 if x.is_contiguous(memory_format=_channels_last[x.ndim]) else None

def readable(x):
    "`x` as the kernels read it, and its layout; a copy where it is in neither, or float16"
    if x.dtype is torch.float16: x = x.float()
    last = layout(x)
    return (x,last) if last is not None else (x.contiguous(),layout(x.contiguous()))

def like(dy, x, last):
    "`dy` as the kernels read it beside `x`"
    if dy.dtype is x.dtype and (dy.stride()==x.stride() or layout(dy)==last): return dy
    return torch.empty_like(x).copy_(dy)

def as_statistics(t, T):
    "`t` in dtype `T`, contiguous"
    return t if t is None or t.dtype is T and t.is_contiguous() else t.to(T).contiguous()

# %%
_types = {torch.float32:0, torch.float64:1, torch.bfloat16:2}
_acts = {None:0, 'relu':1, 'silu':2}

@lru_cache(maxsize=4096)
def plan(step, N, C, size, last, dtype)->bytes:
    "The first part of `call` in cpu.c"
    auto,running = type(step.momentum) is AutoMomentum,float(step.running_grad)
    flags = (UPDATE*step.update | INCLUSIVE*step.inclusive | CLAMPED*step.clamped
        | OWN_AVERAGE*(step.average is not None or not auto) | SET*(not auto)
        | CUMULATIVE*(step.momentum is None)
        | (CLIPPED|RUNNING)*(torch.is_tensor(step.running_grad) or running>0))
    weight = 0. if torch.is_tensor(step.weight) and step.weight.ndim else float(step.weight)
    average = 0. if step.average is None else float(step.average)
    return pack_plan(_types[dtype], instruction_set, N, C, size//(N*C), last, _acts[step.act], step.samples, flags,
        weight, average, step.momentum or 0., step.eps, step.clip, step.clip_max, running)

_nowhere = [0]*13

def call(
    f, # `kernels.runbn_forward` or `kernels.runbn_backward`
    phases:int, # What to do of it
    step:Step, # Numbers of the call
    x:Tensor, # Activations, `readable`
    last:int, # Their `layout`
    weight:Tensor|None, # As the statistics, as all that follows
    bias:Tensor|None, # The same
    y:Tensor|None, # Result, laid out as `x`, or memory for `dx`
    saved:Tensor, # `(7,C)`
    state:list=_nowhere, # Addresses of a `State`
    floors:int=0, # How many there are
    dy:Tensor=None, # Gradient, laid out as `x`
    dbias:Tensor=None, # Sums, in the backward
    dweight:Tensor=None, # The same
    G:Tensor=None, # `(2,C)`
    scale:float=1., # Loss scale
)->int: # `DONE`, or `CHANGED`: others have written the statistics
    "Call a kernel"
    C,weights = saved.shape[1],step.weight
    weights = as_statistics(weights, saved.dtype) if type(weights) is not float and torch.is_tensor(weights) and weights.ndim else None
    res = f(plan(step, x.shape[0], C, x.numel(), last, x.dtype)+pack_call(
        phases, threads(), floors, scale, parallel, x.data_ptr(),
        0 if dy is None else dy.data_ptr(), 0 if weight is None else weight.data_ptr(),
        0 if bias is None else bias.data_ptr(), 0 if y is None else y.data_ptr(), *state,
        0 if weights is None else weights.data_ptr(), saved.data_ptr(),
        0 if dbias is None else dbias.data_ptr(), 0 if dweight is None else dweight.data_ptr(),
        0 if G is None else G.data_ptr()))
    if res==NO_MEMORY: raise MemoryError(f'running batch norm: no memory for sums of {C} channels')
    return res

# %%
def addresses(
    state:State,
)->list: # `None`, where a tensor is not as the kernels want it
    "Addresses of a state that is of the dtype of its window, and contiguous"
    T,integer = state.mean.dtype,torch.int64
    res = [t.data_ptr() for t in state if t is not None and t.is_contiguous() and (t.dtype is T or t.dtype is integer)]
    if len(res)==13: return res
    return res+[0,0] if len(res)==11 and state.known_mean is None else None

def merge(phases, step, x, last, weight, bias, y, saved, state):
    "A forward, or part of it, that writes the state"
    where,wide = addresses(state),state
    if where is None: # statistics in half precision, as parameters are
        T = state.mean.dtype
        wide = State(*[t if t is None or not t.is_floating_point() else as_statistics(t, T) for t in state])
        where = addresses(wide)
    args = phases,step,x,last,weight,bias,y,saved,where,len(state.floors)
    if call(kernels.runbn_forward, *args)==CHANGED:
        seed(wide)
        call(kernels.runbn_forward, *args)
    if wide is not state:
        for t,new in zip(state, wide):
            if t is not new: t.copy_(new)
    if step.update: torch.autograd.graph.increment_version((state.avg_mean,state.avg_var))

def react(phases, step, x, last, weight, bias, dx, saved, dy, running, G, scale):
    "A backward, or part of it, that writes the running gradient: gradients of weight and bias"
    T,C = saved.dtype,saved.shape[1]
    dbias,dweight = torch.empty(C, dtype=T),torch.empty(C, dtype=T)
    weight,bias,grad = as_statistics(weight, T),as_statistics(bias, T),as_statistics(running, T)
    state = 0,0,0,0,0,0,0,0,0,0,grad.data_ptr(),0,0
    call(kernels.runbn_backward, phases, step, x, last, weight, bias, dx, saved, state, 0, dy,
        dbias, dweight, G, 1. if scale is None else float(scale))
    if grad is not running: running.copy_(grad)
    return dweight,dbias

class Kernels(Formulas):
    "Forward and backward in C on the CPU: float32, float64, bfloat16; float16 by way of float32"
    name = 'cpu'

    @classmethod
    def fits(cls, x, state):
        "Are these what the kernels can compute with?"
        T,floors = state.mean.dtype,state.floors
        narrower = T is torch.float32 and x.dtype in (torch.bfloat16,torch.float16)
        return (kernels is not None and x.is_cpu and state.mean.is_cpu and x.numel()>0
            and (x.dtype is T or narrower) and floors.ndim==1)

    @classmethod
    def moments(cls, x):
        x,last = readable(x)
        saved = torch.empty((7,x.shape[1]), dtype=torch.promote_types(x.dtype, torch.float32))
        call(kernels.runbn_forward, MOMENTS, Step(len(x), 1.), x, last, None, None, None, saved)
        return saved[4],saved[5]

    @classmethod
    def normalize(cls, x, weight, bias, saved, step):
        x_,last = readable(x)
        y = torch.empty_like(x_)
        affine = [as_statistics(t, saved.dtype) for t in (weight,bias)]
        call(kernels.runbn_forward, NORMALIZE, step, x_, last, *affine, y, saved)
        return y if y.dtype is x.dtype else y.to(x.dtype)

    @classmethod
    def sums(cls, dy, x, weight, bias, saved, step):
        x,last = readable(x)
        affine = [as_statistics(t, saved.dtype) for t in (weight,bias)]
        sums = saved.new_empty((2,x.shape[1]))
        call(kernels.runbn_backward, SUMS, step, x, last, *affine, None, saved, dy=like(dy, x, last),
            dbias=sums[0], dweight=sums[1])
        return sums

    @classmethod
    def dx(cls, dy, x, weight, bias, saved, G, step):
        x_,last = readable(x)
        dx = torch.empty_like(x_)
        affine = [as_statistics(t, saved.dtype) for t in (weight,bias)]
        call(kernels.runbn_backward, DX, step, x_, last, *affine, dx, saved, dy=like(dy, x_, last),
            G=G.contiguous())
        return dx if dx.dtype is x.dtype else dx.to(x.dtype)

    @classmethod
    def forward(cls, x, weight, bias, state, step):
        T = state.mean.dtype
        x_,last = readable(x)
        y,saved = torch.empty_like(x_),torch.empty(7, x.shape[1], dtype=T)
        weight,bias = as_statistics(weight, T),as_statistics(bias, T)
        merge(MOMENTS|MERGE|NORMALIZE, step, x_, last, weight, bias, y, saved, state)
        return y if y.dtype is x.dtype else y.to(x.dtype),saved

    @classmethod
    def statistics(cls, x, state, step):
        saved = torch.empty(7, x.shape[1], dtype=state.mean.dtype)
        merge(MOMENTS|MERGE, step, *readable(x), None, None, None, saved, state)
        return saved

    @classmethod
    def backward(cls, dy, x, weight, bias, saved, running, step, scale=None, need_dx=True):
        x_,last = readable(x)
        dx = torch.empty_like(x_) if need_dx else None
        phases = SUMS|REACT|DX if need_dx else SUMS|REACT
        sums = react(phases, step, x_, last, weight, bias, dx, saved, like(dy, x_, last), running, None, scale)
        return dx if dx is None or dx.dtype is x.dtype else dx.to(x.dtype),*sums

    @classmethod
    def reaction(cls, dy, x, weight, bias, saved, running, step, scale=None):
        x,last = readable(x)
        G = torch.empty(2, x.shape[1], dtype=saved.dtype)
        dweight,dbias = react(SUMS|REACT, step, x, last, weight, bias, None, saved, like(dy, x, last), running, G, scale)
        return G,torch.stack((dbias, dweight))
