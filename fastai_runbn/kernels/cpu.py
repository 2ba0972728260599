import ctypes
from pathlib import Path
import torch
from torch import Tensor
from fastai_runbn.moments import AutoMomentum
from fastai_runbn.formulas import Formulas,State,Step,seed

# %%
_int,_pointer,_double = ctypes.c_int64,ctypes.c_void_p,ctypes.c_double
class Call(ctypes.Structure):
    "One call, as `call` in cpu.c"
    _fields_ = [
        *((n,_int) for n in 'type isa N C S last threads phases act'.split()),
        *((n,_pointer) for n in 'parallel x dy gamma beta y'.split()),
        *((n,_pointer) for n in State._fields), ('n_floors',_int), ('weights',_pointer),
        *((n,_double) for n in 'weight average momentum eps clip clip_max pays scale'.split()),
        ('samples',_int), ('flags',_int), *((n,_pointer) for n in 'saved sums G'.split()),
        ('made_in_c',_int*13)]

MOMENTS,MERGE,NORMALIZE,SUMS,REACT,DX = (1<<i for i in range(6))
UPDATE,INCLUSIVE,CLIPPED,OWN_AVERAGE,SET,CUMULATIVE = (1<<i for i in range(6))
DONE,CHANGED,NO_MEMORY = range(3)

# %%
def load()->ctypes.CDLL: # `None` where there are none, or not for this platform
    "The kernels that pip has built"
    for path in Path(__file__).parent.glob('runbn_cpu*'):
        try: lib = ctypes.CDLL(str(path))
        except OSError: continue
        if not hasattr(lib, 'runbn_size') or lib.runbn_size()!=ctypes.sizeof(Call): continue
        for f in (lib.runbn_forward,lib.runbn_backward): f.argtypes = [_pointer]
        return lib

def pool()->int: # Address of `GOMP_parallel`; `None`: one thread
    "Entry of the threads that PyTorch's own operators run on, where those are OpenMP's"
    try: return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, _pointer).value
    except (AttributeError,OSError,TypeError): return None

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
    "`x` as the kernels read it, and its layout; a copy where it is neither, or float16"
    if x.dtype==torch.float16: x = x.float()
    last = layout(x)
    return (x,last) if last is not None else (x.contiguous(),layout(x.contiguous()))

def like(dy, x, last):
    "`dy` as the kernels read it beside `x`"
    if dy.dtype==x.dtype and layout(dy)==last: return dy
    return torch.empty_like(x).copy_(dy)

def _flags(step):
    "The flags of cpu.c"
    auto = type(step.momentum) is AutoMomentum
    clipped = torch.is_tensor(step.running_grad) or step.running_grad>0
    return (UPDATE*step.update | INCLUSIVE*step.inclusive | CLIPPED*clipped
        | OWN_AVERAGE*(step.average is not None or not auto) | SET*(not auto)
        | CUMULATIVE*(step.momentum is None))

def _address(t): return None if t is None else t.data_ptr()
_no_state = State(*[None]*len(State._fields))
_types = {torch.float32:0, torch.float64:1, torch.bfloat16:2}
_acts = {None:0, 'relu':1, 'silu':2}

# %%
def call(
    f, # `kernels.runbn_forward` or `kernels.runbn_backward`
    phases:int, # What to do of it
    x:Tensor, # Activations, `readable`
    last:int, # Their `layout`
    weight:Tensor|None, # As the statistics
    bias:Tensor|None, # The same
    y:Tensor|None, # Result, laid out as `x`, or memory for `dx`
    saved:Tensor, # `(7,C)`
    step:Step, # Numbers of the call
    state:State=_no_state, # All of the dtype of the statistics, contiguous
    dy:Tensor=None, # Gradient, laid out as `x`
    sums:Tensor=None, # `(2,C)`
    G:Tensor=None, # `(2,C)`
    scale:Tensor|float=None, # Loss scale
)->bool: # Done? Else the statistics were changed by others
    "Call a kernel"
    N,C = x.shape[:2]
    weights,running_grad = None,float(step.running_grad)
    if torch.is_tensor(step.weight) and step.weight.ndim: weights = step.weight.to(saved.dtype).contiguous()
    floors,grad = state.floors if step.clamped else None,state.grad if running_grad else None
    c = Call(_types[x.dtype], instruction_set, N, C, x.numel()//(N*C), last, torch.get_num_threads(),
        phases, _acts[step.act], parallel, x.data_ptr(), _address(dy), _address(weight),
        _address(bias), _address(y), *map(_address, state[:9]), _address(floors), _address(grad),
        _address(state.known_mean), _address(state.known_var), 0 if floors is None else len(floors),
        _address(weights), 0. if weights is not None else step.weight,
        0. if step.average is None else step.average, step.momentum or 0., step.eps, step.clip,
        step.clip_max, running_grad, 1. if scale is None else scale, step.samples, _flags(step),
        saved.data_ptr(), _address(sums), _address(G))
    res = f(ctypes.addressof(c))
    if res==NO_MEMORY: raise MemoryError(f"running batch norm: no memory for sums of {C} channels")
    return res==DONE

# %%
def widened(
    state:State, # Statistics for evaluation may be in half precision, as parameters are
)->State: # `state` itself, if nothing is to do
    "The state in the dtype of the window"
    T = state.mean.dtype
    def fits(t): return t is None or (t.dtype==T or not t.is_floating_point()) and t.is_contiguous()
    if all(map(fits, state)): return state
    return State(*[t if fits(t) else t.to(T).contiguous() for t in state])

def written(
    state:State, # Was written by way of `wide`
    wide:State, # Of `widened`
):
    "Tell autograd that the statistics have changed, which it cannot see"
    if wide is not state:
        for t,new in zip(state, wide):
            if t is not new: t.copy_(new)
    torch.autograd.graph.increment_version((state.avg_mean,state.avg_var))

class Kernels(Formulas):
    "Forward and backward in C on the CPU: float32, float64, bfloat16; float16 by way of float32"
    name = 'cpu'

    @classmethod
    def fits(cls, x, state):
        "Are these what the kernels can compute with?"
        T = state.mean.dtype
        narrower = T==torch.float32 and x.dtype in (torch.bfloat16,torch.float16)
        return (kernels is not None and x.is_cpu and state.mean.is_cpu and x.numel()>0
            and (x.dtype==T or narrower) and (state.floors is None or state.floors.ndim==1))

    @classmethod
    def moments(cls, x):
        x,last = readable(x)
        T = torch.promote_types(x.dtype, torch.float32)
        saved = torch.empty((7,x.shape[1]), dtype=T)
        call(kernels.runbn_forward, MOMENTS, x, last, None, None, None, saved, Step(len(x), 1.))
        return saved[4],saved[5]

    @classmethod
    def normalize(cls, x, weight, bias, saved, step):
        x_,last = readable(x)
        y = torch.empty_like(x_)
        affine = [_as(t, saved) for t in (weight,bias)]
        call(kernels.runbn_forward, NORMALIZE, x_, last, *affine, y, saved, step)
        return y if y.dtype==x.dtype else y.to(x.dtype)

    @classmethod
    def forward(cls, x, weight, bias, state, step):
        x_,last = readable(x)
        y,saved = torch.empty_like(x_),torch.empty((7,x.shape[1]), dtype=state.mean.dtype)
        phases,affine,wide = MOMENTS|MERGE|NORMALIZE,[_as(t, saved) for t in (weight,bias)],widened(state)
        if not call(kernels.runbn_forward, phases, x_, last, *affine, y, saved, step, wide):
            seed(wide)
            call(kernels.runbn_forward, phases, x_, last, *affine, y, saved, step, wide)
        if step.update: written(state, wide)
        return y if y.dtype==x.dtype else y.to(x.dtype),saved

    @classmethod
    def sums(cls, dy, x, weight, bias, saved, step):
        x,last = readable(x)
        affine,sums = [_as(t, saved) for t in (weight,bias)],saved.new_empty((2,x.shape[1]))
        call(kernels.runbn_backward, SUMS, x, last, *affine, None, saved, step, dy=like(dy, x, last), sums=sums)
        return sums

    @classmethod
    def dx(cls, dy, x, weight, bias, saved, G, step):
        x_,last = readable(x)
        dx,affine = torch.empty_like(x_),[_as(t, saved) for t in (weight,bias)]
        call(kernels.runbn_backward, DX, x_, last, *affine, dx, saved, step, dy=like(dy, x_, last), G=G.contiguous())
        return dx if dx.dtype==x.dtype else dx.to(x.dtype)

    @classmethod
    def backward(cls, dy, x, weight, bias, saved, running, step, scale=None, need_dx=True):
        x_,last = readable(x)
        dx,affine = torch.empty_like(x_) if need_dx else None,[_as(t, saved) for t in (weight,bias)]
        sums,G = torch.empty((2,2,x.shape[1]), dtype=saved.dtype)
        phases = SUMS|REACT|DX if need_dx else SUMS|REACT
        grad = _as(running, saved)
        call(kernels.runbn_backward, phases, x_, last, *affine, dx, saved, step,
            _no_state._replace(grad=grad), like(dy, x_, last), sums, G, scale)
        if grad is not running: running.copy_(grad)
        return dx if dx is None or dx.dtype==x.dtype else dx.to(x.dtype),sums

def _as(t, like): return t if t is None or t.dtype==like.dtype and t.is_contiguous() else t.to(like.dtype).contiguous()
