import math,sys,warnings
from collections import deque
from functools import lru_cache,partial
import torch, torch.nn.functional as F
from torch import nn, Tensor
from torch.amp import GradScaler
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm
from fastai_runbn.moments import SampleWindow,at_most_1,auto_momentum,lesson10_weight,trust,window_weight
from fastai_runbn.formulas import State,Step,changed,seed
from fastai_runbn.functional import Call,LossScale,backends,choose,is_traced,own_window,running_norm

# %%
default_window = SampleWindow(60, few=10)

def runbn_settings(
    window=default_window, # What training normalises with: a window of so many samples; or a function of batch size and values per channel that gives the weight of a batch, in (0,1]
    running_grad:float=1., # Share of the statistics' gradient taken from a running average, in [0,1]; in full from 32 values per channel and batch on
    momentum:float|None=auto_momentum, # As BatchNorm's: weight of a batch in `running_mean` and `running_var`, in [0,1], or `None` for a cumulative average; by default by `eval_window`
    eval_window:int|None=200, # Samples that `running_mean` and `running_var` average over; `None`: they are the window's
    clamp=(0.01,)*20, # Least variance after 0, 1, 2, … samples, a sequence of floats; none from its end on
    clamp_inclusive:bool=False, # Count this batch's samples before looking up `clamp`?
    persistent_window:bool=False, # Save the window in the `state_dict` too?
    backend:str='auto', # How it is computed: 'auto' by kernels, where there are some; 'formulas' by PyTorch's operators
)->dict: # All settings, checked
    "All settings of a running norm, the defaults filled in; `ValueError` for one out of range"
    def check(ok, what):
        if not ok: raise ValueError(what)
    if callable(window):
        for bs in (1,2,64):
            check(0<(a:=window(bs, 49*bs))<=1, f"window={window!r} gives {a!r} for a batch of {bs}; a weight in (0,1] was expected.")
    else:
        check(isinstance(window, (int,float)) and not isinstance(window, bool) and window>0,
            f"window={window!r}: a number of samples over 0 was expected, or a function of batch size and values per channel.")
    check(0<=running_grad<=1, f"running_grad={running_grad!r}: a number in [0,1] was expected; 0 is lesson 10, 1 gives a batch its full gradient.")
    check(momentum is None or isinstance(momentum, (int,float)) and 0<=momentum<=1,
        f"momentum={momentum!r}: BatchNorm's was expected, a number in [0,1] or None. What training normalises with is `window`.")
    check(eval_window is None or eval_window>=1, f"eval_window={eval_window!r}: a number of samples, 1 or more, or None was expected.")
    clamp = tuple(float(o) for o in clamp or ())
    check(all(0<=o<math.inf for o in clamp), f"clamp={clamp!r}: variances, 0 or more, were expected.")
    check(backend in backends, f"backend={backend!r}: one of {', '.join(backends)} was expected.")
    return dict(window=window, running_grad=running_grad, momentum=momentum, eval_window=eval_window, clamp=clamp,
        clamp_inclusive=clamp_inclusive, persistent_window=persistent_window, backend=backend)

# %%
LESSON10 = dict(window=lesson10_weight, running_grad=0., eval_window=None, clamp=(0.01,)*20, clamp_inclusive=True)

# %%
class RecentBatches:
    "What the last batches were normalised with, for activation checkpointing, which does a forward again"
    kept = 8 # Two or three would do for most models
    looks = True # On the CPU, where nobody waits for a value
    def __init__(self): self.saved = deque(maxlen=self.kept)
    def __reduce__(self): return RecentBatches,() # a copy of a layer has nothing to do again
    def add(self, saved): self.saved.appendleft(saved)

    def is_asked(self):
        "Is this forward done again, within a backward?"
        if torch._C._current_graph_task_id()!=-1: return len(self.saved)>0
        LossScale.end() # where a backward ended in an error
        return False

    def recall(self,
        m:Tensor, # Mean of the batch, `(C,)`
        v:Tensor, # Its biased variance
    )->tuple: # Of `Saved`, `(7,C)`, and what to do once its backward has paid, or `None`
        "What the batch most like this was normalised with, and what is owed for it"
        there = torch.stack([*[s[4:6] for s in self.saved], torch.stack((m, v))])
        there = there.nan_to_num(1e30, 2e30, -2e30) # not finite is near to none but itself
        nearest = (there[:-1]-there[-1]).abs().sum((1,2)).argmin(0, keepdim=True)
        if self.looks and m.is_cpu and not is_traced(): return self.saved[nearest.item()],None
        saved = tuple(self.saved)
        def paid():
            for i,s in enumerate(saved): s.data[-1].mul_(nearest!=i)
        return torch.stack(saved).index_select(0, nearest)[0],paid

# %%
window_buffers = ('window_mean','window_var','window_count','window_grad','eval_steps',
    'samples_seen','skipped_batches','known_mean','known_var')
state_buffers = ('window_mean','window_var','window_count','running_mean','running_var','eval_steps',
    'num_batches_tracked','samples_seen','skipped_batches','window_grad','known_mean','known_var') # as in `State`

@lru_cache(maxsize=256)
def _floors(clamp, dtype, device):
    with torch.inference_mode(False): return torch.tensor((*clamp,0.), dtype=dtype, device=device)

class WindowBuffers:
    "The window of a running norm, in buffers that follow a model wherever it goes; for `RunningBatchNormMixin`"
    keeper = own_window # Who keeps the window; of `distributed`, where several processes share it

    def make_window(self):
        "Add the buffers, where `running_mean` is"
        mean = self.running_mean
        dtype = torch.float64 if mean.dtype==torch.float64 else torch.float32
        C,new = len(mean),partial(torch.zeros, device=mean.device, dtype=dtype)
        values = (new(C), new(C), new(C), new(2,C), new(C), new(1).long(), new(()).long(),
            torch.zeros_like(mean), torch.zeros_like(mean))
        for name,value in zip(window_buffers, values): self.register_buffer(name, value, persistent=self.persistent_window)
        self.set_floors()
        self.seed_window()

    def drop_window(self):
        "Remove the buffers"
        self.keeper.detach()
        for name in window_buffers:
            self._buffers.pop(name, None)
            self._non_persistent_buffers_set.discard(name)
        for name in ('recent','clamp_floor'): vars(self).pop(name, None)

    def state(self)->State:
        "The buffers, and the floors of `clamp`"
        b = self._buffers
        return State(*[b[o] for o in state_buffers[:9]], self.clamp_floor, *[b[o] for o in state_buffers[9:]])

    @torch.no_grad()
    def seed_window(self,
        where:Tensor=None, # Only if this is true, a boolean scalar on the layer's device; default: in any case
    ):
        "Start the window from `running_mean` and `running_var`: full if they were trained, empty if not; forgets the running gradient"
        if where is None:
            self.keeper.settle(drop=True)
            self.recent = RecentBatches()
        seed(self.state(), True if where is None else where)

    def set_floors(self):
        "Make `clamp_floor` of `clamp`: no buffer, for it can be made again at any time"
        like = self.window_mean
        if type(like) is Tensor: self.clamp_floor = _floors(self.clamp, like.dtype, like.device)
        else: self.clamp_floor = like.new_tensor((*self.clamp,0.))

    def window_fits(self)->bool:
        "Are the window's buffers such as the statistics are?"
        b = self._buffers
        mean,var,known = b['running_mean'],b['running_var'],b['known_mean']
        if mean is None or var is None: return False
        return (mean.shape==known.shape==var.shape and mean.dtype is known.dtype is var.dtype
            and mean.device==known.device==var.device==self.clamp_floor.device)

    @torch.no_grad()
    def refresh_window(self):
        "Seed the window anew, at once, where `running_mean` or `running_var` are not what this layer last wrote: loaded, copied, averaged or set by others"
        if not self.window_fits(): self.make_window()
        else: seed(self.state(), changed(self.state()))

    def reset_running_stats(self):
        "Forget all statistics, as BatchNorm's method does, and the window with them"
        self.keeper.settle(drop=True)
        super().reset_running_stats()
        if 'window_mean' in self._buffers and self.running_mean is not None: self.seed_window()

    def _save_to_state_dict(self, *args, **kwargs):
        self.keeper.settle()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        self.keeper.settle(drop=True)
        stored,own = any(prefix+n in state_dict for n in window_buffers),set(self._non_persistent_buffers_set)
        self._non_persistent_buffers_set -= set(window_buffers)
        if not stored: self._non_persistent_buffers_set |= set(window_buffers)
        try: super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        finally: self._non_persistent_buffers_set = own
        if self.running_mean is not None and not self.window_fits(): self.make_window()

    def _apply(self, fn, recurse=True):
        self.keeper.settle(drop=True)
        old = {n:self._buffers[n] for n in window_buffers}
        super()._apply(fn, recurse)
        for n in old.keys()-{'known_mean','known_var'}:
            new = self._buffers[n]
            if new.is_floating_point() and new.itemsize<4: self._buffers[n] = old[n].to(new.device)
        filled = old['window_mean'].is_meta and not self.window_mean.is_meta
        if filled and self.running_mean is not None: self.make_window()
        self.set_floors()
        self.recent = RecentBatches()
        return self

    def __setstate__(self, state):
        super().__setstate__(state)
        watch()

    def __getstate__(self):
        self.keeper.settle()
        return {k:v for k,v in vars(self).items() if k not in ('loss_scale','scaler_tells')}

# %%
_quantized = ("{} is quantized as a layer of its own, which is slower and less exact than one that is folded into the convolution before it: "
    "`to_bn(model)` first, then quantize.")
_no_functorch = ("{} in training mode updates its window, which `torch.func` transforms (vmap, grad, …) do not allow. Call `model.eval()` first, or take "
    "the gradient with `torch.autograd.grad`; for per-sample gradients use a norm without memory, such as nn.GroupNorm.")
_many_rows = 256
_rows_are_not_samples = ("{} got {} rows, `(N,C)` with C={}, which is taken for one sample with so many points. Where that is not so, say how many samples "
    "a batch has: `set_batch_size(model, n)`, or train with RunBNCallback, which knows.")

def _step(samples, bs, M, pooled, window, running_grad, momentum, eval_window, eps, clamped, inclusive, update, act):
    "A `Step` of settings and sizes; the running gradient trusts in the values of all processes together"
    average = None if eval_window is None else at_most_1(bs/eval_window)
    if torch.is_tensor(running_grad) or running_grad: running_grad = running_grad*trust(pooled)
    return Step(samples, window_weight(window, bs, M), average, momentum, running_grad, eps, clamped,
        inclusive, update, act)
_step_once = lru_cache(maxsize=1024, typed=True)(_step) # an `AutoMomentum` is not the number that it equals

class RunningBatchNormMixin(WindowBuffers):
    "What turns `nn.BatchNorm1d/2d/3d` into a running norm; the layers below inherit from it first"
    path = None # How the last training forward was computed: 'cpu', 'formulas', …
    last_batch = None # Rows, samples and values per channel of the last training batch
    batch_size = None # Samples in the batch, where rows are not samples; of `set_batch_size`
    loss_scale = None # What the loss is multiplied with, a scalar tensor; False: nothing; of `follow_scaler`
    scaler_tells = False # Does the scaler tell that by itself, but within torch.compile?
    unscheduled = None # Settings before a schedule took over, of `schedule`
    def __init__(self,
        num_features:int, # Channels C
        eps:float=1e-5, # Added to the variance
        momentum:float|None=auto_momentum, # As BatchNorm's: weight of a batch in `running_mean` and `running_var`; by default by `eval_window`
        affine:bool=True, # Learn a scale and a shift per channel?
        track_running_stats:bool=True, # A running norm has to: `False` is an error here; on a layer that is made it holds all statistics
        device=None, # Of parameters and buffers
        dtype=None, # Of parameters and running statistics; the window is float32, or float64 for float64
        **kwargs # `bias`, where PyTorch's own layer has it, and settings (of `runbn_settings`)
    ):
        bias = {k:kwargs.pop(k) for k in ('bias',) if k in kwargs}
        super().__init__(num_features, eps=eps, momentum=momentum, affine=affine, track_running_stats=track_running_stats, device=device, dtype=dtype, **bias)
        self.make_running(momentum=momentum, **kwargs)

    def make_running(self, **settings):
        "Set all `settings` (of `runbn_settings`) and add the buffers: an empty window or, from trained statistics, a full one"
        if self.running_mean is None:
            raise ValueError(f"{type(self).__name__}: track_running_stats=False, but a running norm has to track; leave it True, or take the nn.BatchNorm that it stands for.")
        vars(self).update(runbn_settings(**settings))
        self.make_window()
        watch()

    def make_plain(self):
        "Remove the settings and buffers that `make_running` added, but for `momentum`"
        self.drop_window()
        own = 'path','last_batch','batch_size','loss_scale','scaler_tells','unscheduled','_told_of_rows'
        for name in (*own,*runbn_settings().keys()-{'momentum'}): vars(self).pop(name, None)

    @torch.no_grad()
    def set_settings(self, **settings):
        "Change some settings (of `runbn_settings`); the others, the window and the statistics stay"
        vars(self).update(runbn_settings(**{**self.settings(), **settings}))
        self.set_floors()
        if self.persistent_window: self._non_persistent_buffers_set -= set(window_buffers)
        else:                      self._non_persistent_buffers_set |= set(window_buffers)

    def settings(self)->dict:
        "The layer's settings, as `runbn_settings` takes them"
        return {k:getattr(self, k) for k in runbn_settings()}

    def extra_repr(self):
        clamp = f'{self.clamp[0]:g} to {self.clamp[-1]:g} in {len(self.clamp)} samples' if self.clamp else None
        shown = {**self.settings(), 'clamp':clamp}
        return ', '.join([super().extra_repr(), *(f'{k}={v}' for k,v in shown.items() if k!='momentum')])

    def forward(self, x:Tensor)->Tensor:
        "Normalise `x`, `(N,C,*)`: with the window in training, which it updates, and with `running_mean`/`running_var` in evaluation"
        if isinstance(x, Proxy): return self.as_leaf(x)
        self._check_input_dim(x)
        return self.normalized(x)

    def normalized(self, x, act=None):
        "What `forward` returns, with the activation `act` ('relu', 'silu' or none) in training"
        mean,var = self._buffers['running_mean'],self._buffers['running_var']
        if mean is None and var is None: # taken away, as some test-time adaptation does
            return F.batch_norm(x, None, None, self.weight, self.bias, True, 0., self.eps)
        if self.training and (x.numel() or self.keeper.takes_empty): return self.keeper(self, x, act)
        return F.batch_norm(x, mean, var, self.weight, self.bias, False, 0., self.eps)

    def train_forward(self, x, act=None):
        "A forward in training, with the window that the keeper has"
        if x.shape[1]!=self.num_features: raise RuntimeError(f"{type(self).__name__} of {self.num_features} channels got {x.shape[1]}, in an input of shape {tuple(x.shape)}")
        if type(x) is Tensor: return self._train_forward(x, act)
        with torch._C.DisableTorchFunctionSubclass(): # a fastai TensorImage, for one, asks Python at every operator
            y = self._train_forward(x, act)
        return y if type(x) in (nn.Parameter,type(y)) else y.as_subclass(type(x))

    def _train_forward(self, x, act):
        compiling = torch.compiler.is_compiling()
        if not compiling and torch._C._are_functorch_transforms_active(): raise RuntimeError(_no_functorch.format(type(self).__name__))
        if not self.window_fits(): self.make_window()
        state,params = self.keeper.state(self),self._parameters
        how,step,saved,paid = choose(x, state, self.backend),self.step(x, act),None,None
        again = not compiling and self.recent.is_asked()
        if again:
            with torch.no_grad(): saved,paid = self.recent.recall(*how.moments(x))
        call = Call(how, step, state.grad, self.keeper, None if compiling else self, self._said_scale(x), paid)
        y,saved = running_norm(x, params['weight'], params['bias'], state, call, saved)
        if not compiling and not again:
            self.recent.add(saved)
            vars(self).update(path=how.name, last_batch=(x.shape[0],step.samples,x.numel()//x.shape[1]))
        return y

    def step(self, x, act=None)->Step:
        "The numbers of a call with `x`"
        bs,M,settings = self._samples(x),x.numel()//x.shape[1],(self.window,self.running_grad,self.momentum,
            self.eval_window,self.eps,bool(self.clamp),self.clamp_inclusive,not self.is_held(),act)
        pooled = self.keeper.pooled(M)
        if torch.compiler.is_compiling(): # numbers would be compiled in
            window,like = self.window,self.window_mean
            sizes = bs,M,pooled
            if not callable(window) or type(window) is SampleWindow or window is lesson10_weight:
                sizes = [like.new_full((), n) for n in sizes]
            return _step(bs, *sizes, *settings)
        constant = type(self.running_grad) in (int,float) and type(self.window) in (int,float,SampleWindow)
        return (_step_once if constant else _step)(bs, bs, M, pooled, *settings)

    def is_held(self)->bool:
        "Do training forwards leave statistics, window, counters and running gradient as they are? As in BatchNorm, by `momentum=0` or `track_running_stats=False`"
        return not self.track_running_stats or self.momentum is not None and self.momentum==0

    def _said_scale(self, x):
        "The loss scale: a tensor, False for none, None where somebody should have said it"
        if self.scaler_tells and not torch.compiler.is_compiling(): return False
        if self.loss_scale is not None: return self.loss_scale
        return None if x.dtype==torch.float16 and torch.is_autocast_enabled(x.device.type) else False

    def _samples(self, x):
        "Samples in `x`: its rows, unless something else was said, or rows are so many that they are points of one"
        rows = x.shape[0]
        if self.batch_size is not None: return min(rows, self.batch_size)
        if x.ndim!=2 or rows<=_many_rows: return rows
        if not vars(self).get('_told_of_rows') and not torch.compiler.is_compiling():
            self._told_of_rows = True
            warnings.warn(_rows_are_not_samples.format(type(self).__name__, rows, len(self.running_mean)), stacklevel=2)
        return 1

    def as_leaf(self, x):
        "What `forward` returns to a tracer of `torch.fx`, which is not to look into it, as into PyTorch's own"
        if type(x.tracer).__name__=='QuantizationTracer': warnings.warn(_quantized.format(type(self).__name__), stacklevel=2)
        return x.tracer.create_proxy('call_module', x.tracer.path_of_module(self), (x,), {})

    def __prepare_scriptable__(self):
        "What `torch.jit.script` calls first"
        raise RuntimeError(f"torch.jit.script of a {type(self).__name__}: `to_bn(model)` first; the BatchNorm model has the same evaluation. `torch.jit.trace` and torch.export take it as it is.")

# %%
def _keeps_statistics(m): return getattr(m, 'running_mean', None) is not None

def _on_replacement(parent, name, new):
    "Hook of module registration: what takes the place of a running norm, and what takes the place of that"
    old = parent._modules[name] if name in parent._modules else None
    if old is None or new is None or new is old: return None
    if isinstance(old, RunningBatchNormMixin) and not isinstance(new, RunningBatchNormMixin) and _keeps_statistics(new):
        if new.running_mean is old.running_mean: # a tool that makes other norms of all BatchNorms
            warnings.warn(f"`{name}`, a {type(old).__name__}, stays: it was to become a {type(new).__name__}. For one window on all processes say `sync_window(model)`; "
                "for BatchNorm, and whatever is made of that, `to_bn(model)` first.", stacklevel=3)
            return old
        if not isinstance(new, _BatchNorm): vars(new)['_was_running'] = type(old),old.settings() # frozen; for when it thaws
    cls,settings = getattr(old, '_was_running', (None,{}))
    if cls and isinstance(new, _BatchNorm) and type(new) in cls.__mro__:
        new._bn_momentum,new.__class__ = new.momentum,cls
        new.make_running(**settings)

def _not_fused(is_qat, *modules):
    "In the place of a fuser of torch.ao.quantization"
    norm = next(m for m in modules if isinstance(m, RunningBatchNormMixin))
    raise RuntimeError(f"fuse_modules: a {type(norm).__name__} is not fused. `to_bn(model)` first, then fuse and quantize.")

def _fusers():
    "What `fuse_modules` may be asked to fuse with a running norm, as its table has it"
    pairs = (nn.Conv1d,RunningBatchNorm1d),(nn.Conv2d,RunningBatchNorm2d),(nn.Conv3d,RunningBatchNorm3d),(nn.Linear,RunningBatchNorm1d)
    return [o for a,b in pairs for o in ((a,b),(a,b,nn.ReLU),(b,nn.ReLU))]

def watch():
    "What the first running norm of a process brings with it"
    watch_replacements()
    LossScale.watch()

_watching = []
def watch_replacements():
    "Have PyTorch ask `_on_replacement` about modules that are put into others, and its quantization say what to do, from the first running norm on"
    if _watching: return
    _watching.append(nn.modules.module.register_module_module_registration_hook(_on_replacement))
    table = getattr(sys.modules.get('torch.ao.quantization.fuser_method_mappings'), '_DEFAULT_OP_LIST_TO_FUSER_METHOD', None)
    if table is not None: table.update(dict.fromkeys(_fusers(), _not_fused))

# %%
class RunningBatchNorm1d(RunningBatchNormMixin, nn.BatchNorm1d): "Running batch norm for `(N,C)` and `(N,C,L)`; as `RunningBatchNorm2d`"
class RunningBatchNorm2d(RunningBatchNormMixin, nn.BatchNorm2d): "Running batch norm for `(N,C,H,W)`: `nn.BatchNorm2d` that normalises with a window of recent batches"
class RunningBatchNorm3d(RunningBatchNormMixin, nn.BatchNorm3d): "Running batch norm for `(N,C,D,H,W)`; as `RunningBatchNorm2d`"

# %%
class RunningSyncBatchNorm(RunningBatchNormMixin, nn.SyncBatchNorm): "Running batch norm in the place of `nn.SyncBatchNorm`, for `(N,C,*)`; the window is that of this process, unless `sync_window` has it shared"

# %%
def running_norms(
    model:nn.Module, # Any model
)->list: # Of `RunningBatchNormMixin`
    "The running norms in `model`"
    return [m for m in model.modules() if isinstance(m, RunningBatchNormMixin)]

def set_batch_size(
    model:nn.Module, # With running norms
    n:int|None, # Samples in the batches to come; `None`: as many as rows
)->nn.Module: # `model`
    "Say how many samples a batch has, where the rows that a norm sees are points, nodes, tokens or regions of them"
    if not (n is None or isinstance(n, int) and n>0): raise ValueError(f"set_batch_size: n={n!r}, a whole number, 1 or more, was expected, or None.")
    for m in running_norms(model): m.batch_size = n
    return model

def follow_scaler(
    model:nn.Module, # With running norms
    scaler, # A `torch.amp.GradScaler`; `None`: the loss is not scaled
)->nn.Module: # `model`
    "Have the running gradients follow the scale of the loss, where it does not tell them itself, as torch.amp.GradScaler does outside of torch.compile; once, before training"
    norms,scale = running_norms(model),False
    if scaler is not None and scaler.is_enabled() and norms:
        scaler.scale(torch.ones((), device=norms[0].window_mean.device)) # makes the scale, where it is not made yet
        if (scale := getattr(scaler, '_scale', None)) is None: raise TypeError(f"follow_scaler: {type(scaler).__name__} has no `_scale`, as torch.amp.GradScaler has.")
    tells = isinstance(scaler, GradScaler) and type(scaler).scale is GradScaler.scale
    for m in norms: m.loss_scale,m.scaler_tells = scale,tells
    return model
