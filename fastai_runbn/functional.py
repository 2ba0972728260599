import warnings
from functools import lru_cache,partial,wraps
from typing import NamedTuple
import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.autograd import Function,Variable
from torch.utils._pytree import tree_leaves
from fastai_runbn.moments import AutoMomentum,auto_momentum
from fastai_runbn.formulas import Formulas,State,Step
from fastai_runbn.kernels.cpu import Kernels
from fastai_runbn.kernels.cuda import SyncBatchNormParts

# %%
backends = 'auto','formulas'

def implementation(
    x:Tensor, # Activations
    state:State, # Of the layer
    backend:str='auto', # 'formulas' for PyTorch's operators in any case
):
    "Who computes a running norm of `x`, where nobody traces it"
    if backend=='formulas' or type(x).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:
        return Formulas
    if Kernels.fits(x, state): return Kernels
    return SyncBatchNormParts if SyncBatchNormParts.fits(x, state) else Formulas

def is_traced()->bool:
    "Is somebody recording operators?"
    return (torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()>0
        or torch._C._get_tracing_state() is not None)

def choose(
    x:Tensor, # Activations
    state:State, # Of the layer
    backend:str='auto', # 'formulas' for PyTorch's operators in any case
):
    "How to compute a running norm of `x` here and now"
    if torch.compiler.is_compiling() or is_traced() and backend=='auto': return Operators
    return implementation(x, state, backend)

# %%
_no_recompute = ("A compiled running batch norm is being computed again in the backward: activation "
    "checkpointing and torch.compile do not go together here. Leave one of them out, or the norm "
    "layers out of one of them: `norm.forward = torch.compiler.disable(norm.forward)`.")

_step_schema = ('SymInt samples, Tensor step_weight, Tensor? average, float? momentum, bool auto, '
    'Tensor? running_grad, float eps, bool clamped, bool inclusive, bool update, float clip, float clip_max')
_state_schema = ', '.join(f'Tensor({n}!) {n}' for n in State._fields[:9])+(', Tensor floors, Tensor grad, '
    'Tensor(known_mean!)? known_mean, Tensor(known_var!)? known_var')
_schemas = dict(
    statistics=f'(Tensor x, {_state_schema}, {_step_schema}) -> Tensor',
    reaction='(Tensor dy, Tensor x, Tensor saved, Tensor(running!) running, Tensor? scale, '
        f'{_step_schema}) -> (Tensor, Tensor)')

def _to_operator(step, like):
    "A `Step` as the operators take it"
    def tensor(o): return o if o is None or torch.is_tensor(o) else like.new_full((), o)
    auto,paid = type(step.momentum) is AutoMomentum,step.running_grad
    momentum = None if auto or step.momentum is None else float(step.momentum)
    return (step.samples, tensor(step.weight), tensor(step.average), momentum, auto,
        tensor(paid) if torch.is_tensor(paid) or paid else None, step.eps, step.clamped, step.inclusive,
        step.update, step.clip, step.clip_max)

def _from_operator(samples, weight, average, momentum, auto, paid, eps, clamped, inclusive, update, *clip):
    return Step(samples, weight, average, auto_momentum if auto else momentum, 0. if paid is None else paid,
        eps, clamped, inclusive, update, None, *clip)

def _statistics(x, *args):
    if torch._C._current_graph_task_id()!=-1: raise RuntimeError(_no_recompute)
    state = State(*args[:13])
    return implementation(x, state).statistics(x, state, _from_operator(*args[13:]))

def _reaction(dy, x, saved, running, scale, *step):
    state = State(*[running]*9, running[0], running)
    return implementation(x, state).reaction(dy, x, None, None, saved, running, _from_operator(*step), scale)

def _statistics_meta(x, mean, *_): return mean.new_empty((7,x.shape[1]))
def _reaction_meta(dy, x, saved, *_): return [saved.new_empty((2,x.shape[1])) for _ in range(2)]

library = torch.library.Library('fastai_runbn', 'FRAGMENT') # `custom_op` adds 80 ms to an import
_tags = [getattr(torch.Tag, n) for n in ('pt2_compliant_tag','flexible_layout') if hasattr(torch.Tag, n)]
def define_operators():
    "The operators that tracers and compilers see; once a process"
    if hasattr(torch.ops.fastai_runbn, 'statistics'): return
    for name,kernel,meta in (('statistics',_statistics,_statistics_meta), ('reaction',_reaction,_reaction_meta)):
        library.define(name+_schemas[name], tags=_tags)
        library.impl(name, kernel, 'CompositeExplicitAutograd')
        library.impl(name, meta, 'Meta')
define_operators()

class Operators(Formulas):
    "For who traces or compiles a model: what reduces or writes state is one operator a pass, the rest are formulas that fuse"
    name = 'operators'

    @classmethod
    def statistics(cls, x, state, step):
        return torch.ops.fastai_runbn.statistics(x, *state, *_to_operator(step, state.mean))

    @classmethod
    def reaction(cls, dy, x, weight, bias, saved, running, step, scale=None):
        return torch.ops.fastai_runbn.reaction(dy, x, saved, running, scale, *_to_operator(step, saved))

# %%
class LossScale:
    "What a GradScaler has multiplied the loss with whose backward is going on"
    now,watching = None,False
    @classmethod
    def begin(cls, scale, grad):
        "Hook of the scaled loss"
        cls.now = scale
        Variable._execution_engine.queue_callback(cls.end)
    @classmethod
    def end(cls): cls.now = None

    @classmethod
    def watch(cls):
        "Have `GradScaler.scale` leave a hook in each loss that it scales, from the first running norm on"
        if cls.watching: return
        cls.watching,scale = True,GradScaler.scale
        @wraps(scale)
        def scale_and_tell(self, outputs):
            res = scale(self, outputs)
            if self.is_enabled():
                for t in tree_leaves(res):
                    if torch.is_tensor(t) and t.requires_grad:
                        t.register_hook(partial(cls.begin, self._scale))
            return res
        GradScaler.scale = scale_and_tell

    @classmethod
    def of(cls,
        said:Tensor|bool|None, # Loss scale that was said; False: there is none; None: nothing was said
        x:Tensor, # Activations
        running:Tensor, # Running gradient
    )->Tensor|None: # `None`: the loss is not scaled
        "What the loss is scaled with, as its GradScaler told or as was said; a warning in float16, where neither is so"
        if torch.compiler.is_compiling(): return said if torch.is_tensor(said) else None
        if cls.now is not None or torch.is_tensor(said):
            scale = said if cls.now is None else cls.now
            return scale if scale.device==running.device else scale.to(running.device)
        if said is None and x.dtype==torch.float16: _warn_of_no_scale()
        return None

_no_scale = ("A backward in float16, and nothing tells by how much its loss is scaled: running "
    "gradients have to follow the scale. torch.amp.GradScaler tells by itself, but not within "
    "torch.compile, nor do other scalers: `follow_scaler(model, scaler)`, once, before the loop; "
    "`follow_scaler(model, None)`, where the loss is not scaled. bfloat16 needs nothing.")
@lru_cache(None)
def _warn_of_no_scale(): warnings.warn(_no_scale)

# %%
class OwnWindow:
    "Who keeps a layer's window, where it shares it with nobody: the layer itself"
    takes_empty = False # Does an empty batch take part?
    def __reduce__(self): return 'own_window'
    def __call__(self, layer, x, act=None): return layer.train_forward(x, act)
    def settle(self, drop=False): pass
    def detach(self): pass
    def state(self, layer): return layer.state()
    def pooled(self, M): return M # values per channel that are trusted in together
    def forward(self, layer, how, x, weight, bias, state, step):
        return how.forward(x, weight, bias, state, step)
    def backward(self, layer, how, *args): return how.backward(*args)

own_window = OwnWindow()

class Call(NamedTuple):
    "What a forward leaves to its backward, beside tensors"
    how:type # Implementation
    step:Step
    running:Tensor # Running gradient
    keeper:object=own_window # Who keeps the window
    layer:object=None # Whose window
    loss_scale:Tensor|bool|None=False # As was said
    paid:object=None # What to do after a backward, if anything
    state:State=None # Of the window, where autograd's function is to run the forward

class RunningNorm(Function):
    "A normalised batch, with the gradient of a running norm"
    @staticmethod
    def forward(ctx, x, weight, bias, y, saved, call):
        ctx.call,ctx.bias_dtype = call,None if bias is None else bias.dtype
        if torch.compiler.is_compiling():
            y[0],saved = call.how.forward(x, weight, bias, call.state, call.step)
            ctx.save_for_backward(x, weight, None if call.step.act is None else bias, saved)
        else: # `saved` stays what it is, whatever hooks do to saved tensors: it says what is owed
            ctx.save_for_backward(x, weight, None if call.step.act is None else bias)
            ctx.saved = saved
        return y[0]

    @staticmethod
    def backward(ctx, dy):
        x,weight,bias,*rest = ctx.saved_tensors # once: under checkpointing asking does the forward again
        saved = rest[0] if rest else ctx.saved
        if not torch.is_grad_enabled(): grads = _gradients(ctx, dy, x, weight, bias, saved)
        else:
            with torch.no_grad(): grads = _gradients(ctx, dy, x, weight, bias, saved)
            if not torch.compiler.is_compiling(): grads = _Once.apply(x, dy, weight, *grads)
        return *grads,None,None,None

def _gradients(ctx, dy, x, weight, bias, saved):
    "Of `x`, weight and bias"
    how,step,running,keeper,layer,said,paid,_ = ctx.call
    need_x,need_w,need_b = ctx.needs_input_grad[:3]
    pays = torch.is_tensor(step.running_grad) or step.running_grad
    scale = LossScale.of(said, x, running) if pays else None
    dx,dweight,dbias = keeper.backward(layer, how, dy, x, weight, bias, saved, running, step, scale, need_x)
    if paid is not None: paid()
    return dx,_as(dweight, weight.dtype) if need_w else None,_as(dbias, ctx.bias_dtype) if need_b else None

def _as(t, dtype): return t if t.dtype is dtype else t.to(dtype)

# %%
class _Once(Function):
    "Hands on the gradients (the last three), and raises where they are differentiated"
    @staticmethod
    def forward(ctx, x, dy, weight, *grads): return tuple(None if o is None else o.view_as(o) for o in grads)
    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("Running batch norm cannot be differentiated twice: its gradient has an average over steps in it. "
                           "For a gradient penalty put the norms in evaluation mode, or make them BatchNorm again with `to_bn`.")

# %%
_apply = super(Function, RunningNorm).apply # without torch.func's part, which has no place here

def running_norm(
    x:Tensor, # Activations, `(N,C,*)`, not empty
    weight:Tensor|None, # Scale $\\gamma$ `(C,)`
    bias:Tensor|None, # Shift $\\beta$ `(C,)`
    state:State, # Updated in place
    call:Call, # How
    saved:Tensor=None, # Of an earlier forward of the same batch: only normalise
)->tuple: # $y$, as `x`, and a `Saved` as one tensor
    "Merge a batch into a window and normalise it with that; the gradient is that of a running norm"
    if torch.compiler.is_compiling(): # so that what follows may change the result in place
        return RunningNorm.apply(x, weight, bias, [None], None, call._replace(state=state)),None
    if saved is None: y,saved = call.keeper.forward(call.layer, call.how, x, weight, bias, state, call.step)
    else:
        with torch.no_grad(): y = call.how.normalize(x, weight, bias, saved, call.step)
    return _apply(x, weight, bias, [y], saved, call),saved

def running_batch_norm(
    x:Tensor, # Activations, `(N,C,*)`, not empty
    window_mean:Tensor, # Mean of the window `(C,)`, updated in place
    window_var:Tensor, # Biased variance of the window `(C,)`, updated in place
    window_count:Tensor, # Count $n$ of the window `(C,)`, updated in place; 0: empty, less: full
    weight:Tensor=None, # Scale $\\gamma$ `(C,)`
    bias:Tensor=None, # Shift $\\beta$ `(C,)`
    a:float|Tensor=0.1, # Weight of this batch in the window, in (0,1]
    running_grad:float|Tensor=0., # Share of the running gradient that is paid, in [0,1]; 0 is lesson 10
    window_grad:Tensor=None, # The running gradient, of $g_1$ and $g_2$, `(2,C)`, updated in place by backward; needed for `running_grad`
    floor:Tensor=None, # Least variance to normalise with, a scalar or `(C,)`
    eps:float=1e-5, # Added to the variance
)->Tensor: # $y$, as `x`
    "Normalise `x` with the window after merging it in, in training; design after fast.ai lesson 10 and MABN"
    C = len(window_mean)
    if x.shape[1]!=C: raise RuntimeError(f"running batch norm of {C} channels got {x.shape[1]}, in an input of shape {tuple(x.shape)}")
    window = window_mean,window_var,window_count
    counters = [torch.zeros(s, dtype=torch.long, device=x.device) for s in ((),(1,),())]
    floors = window_mean.new_zeros(1) if floor is None else floor.expand(C)[None]
    grad = torch.zeros_like(window_mean).expand(2, C).contiguous() if window_grad is None else window_grad
    state = State(*window, *[torch.empty_like(t) for t in window], *counters, floors, grad)
    step = Step(len(x), a, running_grad=running_grad, eps=eps, clamped=floor is not None)
    return running_norm(x, weight, bias, state, Call(choose(x, state), step, grad))[0]
