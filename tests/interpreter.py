"Triton's kernels on the CPU, in Triton's interpreter: fast enough, and with other grids"
import math
from contextlib import contextmanager
from unittest.mock import patch
import torch, triton
from torch.utils._python_dispatch import _disable_current_modes
from fastai_runbn import functional
from fastai_runbn.kernels import cuda
import triton.runtime.interpreter as interpreter

class _Nothing:
    def restore(self): pass

_seen,_patch_lang = set(),interpreter._patch_lang
def patch_once(fn):
    "The interpreter patches Triton's language at each call, in 10 ms; once is enough"
    new = ({'tl','core'} & fn.__globals__.keys())-_seen
    if new: _patch_lang(fn)
    _seen.update(new)
    return _Nothing()
interpreter._patch_lang = patch_once

def smaller(b, block, chunks):
    "Blocks with `block` values a program, and as many chunks"
    b = b._replace(block=block, channels=2 if b.last else 1)
    b = b._replace(one=b.M<=block and chunks==1)
    if chunks==1: return b._replace(chunk=b.M, chunks=1)
    blocks = math.ceil(math.ceil(b.M/chunks)/block) # of a chunk
    chunk = blocks*block
    return b._replace(chunk=chunk, chunks=math.ceil(b.M/chunk))

def part_of(b, n):
    "One of `n` parts of a channel's values, as a block"
    return triton.next_power_of_2(max(2, b.M//n))
plans = {'as planned':lambda b: b,
    'loop':lambda b: smaller(b, part_of(b, 3), 1),
    'split':lambda b: smaller(b, part_of(b, 6), 3),
    'small blocks':lambda b: smaller(b, 4, 1)}

@contextmanager
def planned(how):
    "Blocks as one of `plans` has them"
    own = cuda.blocks
    def blocks(*args): return plans[how](own(*args))
    cuda.plan_of.cache_clear()
    with patch.object(cuda, 'blocks', blocks): yield
    cuda.plan_of.cache_clear()

@contextmanager
def on_the_cpu():
    "Let layers take the kernels on the CPU"
    kernels = cuda.TritonKernels
    def fits(cls, x, state):
        known = x.dtype in cuda.dtypes and state.mean.dtype is torch.float32
        one_floor = state.floors.ndim==1 # for all channels
        return known and not cls.broken and one_floor and x.numel()>0
    def implementation(x, state, backend='auto'):
        return kernels if kernels.fits(x, state) else functional.Formulas
    with (patch.object(kernels, 'fits', classmethod(fits)),
          patch.object(functional, 'implementation', implementation)): yield

@contextmanager
def launches():
    "Names of the kernels that are launched"
    names,launch = [],cuda.Plan.launch
    def noted(self, kernel, *args):
        names.append(kernel.__name__)
        with _disable_current_modes(): # the interpreter's own operators
            return launch(self, kernel, *args)
    with patch.object(cuda.Plan, 'launch', noted): yield names

@contextmanager
def last_first():
    "Programs of a launch run in the opposite order"
    builder = interpreter.interpreter_builder
    run = builder.set_grid_idx
    def opposite(*idx):
        return run(*[n-1-i for n,i in zip(builder.grid_dim, idx)])
    with patch.object(builder, 'set_grid_idx', opposite): yield
