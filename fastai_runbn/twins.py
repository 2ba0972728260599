from importlib import import_module
from torch import nn
from torch.fx import Proxy
from fastai_runbn.moments import auto_momentum
from fastai_runbn.functional import is_traced
from fastai_runbn.layers import RunningBatchNorm1d,RunningBatchNorm2d,RunningSyncBatchNorm

# %%
_inside = {nn.ReLU:'relu', nn.SiLU:'silu'} # Activations that the norm computes itself

def act_inside(
    layer:nn.Module, # Of timm, with `drop` and `act`
    x, # Activations
)->str: # 'relu' or 'silu'; `None`: the norm is to leave it to the layer's own
    "The activation that a norm computes itself, one map of activations less"
    drop,act = layer.drop,layer.act
    if not layer.training or is_traced() or layer.running_mean is None or not x.is_cpu or type(drop) is not nn.Identity: return None
    if drop._forward_hooks or drop._forward_pre_hooks or act._forward_hooks or act._forward_pre_hooks: return None
    if act._backward_hooks or act._backward_pre_hooks: return None
    return _inside.get(type(act))

def _act_forward(self, x):
    "Normalise as a running norm does, then drop and activate as timm's layer does"
    if isinstance(x, Proxy): return self.as_leaf(x)
    self._check_input_dim(x)
    inside = act_inside(self, x)
    y = self.normalized(x, inside)
    return y if inside and x.numel() else self.act(self.drop(y))

def _act_init(self, num_features, eps=1e-5, momentum=auto_momentum, *args, **kwargs):
    "As timm's layer, whose default of .1 would be a momentum that somebody has set"
    original = import_module('timm.layers.norm_act').BatchNormAct2d
    original.__init__(self, num_features, eps, momentum, *args, **kwargs)

_members = dict(__init__=_act_init, forward=_act_forward)
_twins = dict(
    RunningBatchNormAct2d=('timm.layers.norm_act', 'BatchNormAct2d', RunningBatchNorm2d, _members),
    RunningSyncBatchNormAct=('timm.layers.norm_act', 'SyncBatchNormAct', RunningSyncBatchNorm, {}),
    RunningBatchNorm1dFlat=('fastai.layers', 'BatchNorm1dFlat', RunningBatchNorm1d, {}))

def __getattr__(name):
    "The twin of a layer of another library, made when it is first asked for"
    if name not in _twins: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module,old,running,members = _twins[name]
    bases = getattr(import_module(module), old),running
    doc = f"`{module}.{old}` as a running norm"
    globals()[name] = twin = type(name, bases, dict(members, __module__=__name__, __doc__=doc))
    return twin

def twin_of(
    cls:type, # A class of timm's or fastai's
)->type|None:
    "The twin made here of exactly the class `cls`"
    for name,(module,old,*_) in _twins.items():
        if (cls.__module__,cls.__qualname__)==(module,old): return globals().get(name) or __getattr__(name)
