"Triton's kernels on the CPU, in Triton's interpreter: what that takes to be fast enough, and other grids"
import math
from contextlib import contextmanager
from unittest.mock import patch
from torch.utils._python_dispatch import _disable_current_modes
from fastai_runbn.kernels import cuda
import triton.runtime.interpreter as interpreter

class _Nothing:
    def restore(self): pass

_seen,_patch_lang = set(),interpreter._patch_lang
def patch_once(fn):
    "The interpreter patches Triton's language at each call of a function, 10 ms each; once is enough"
    new = {n for n in ('tl','core') if n in fn.__globals__}-_seen
    if new: _patch_lang(fn)
    _seen.update(new)
    return _Nothing()
interpreter._patch_lang = patch_once

def smaller(b, block, chunks):
    "Blocks with `block` values a program, and as many chunks"
    channels = 2 if b.last else 1
    chunk = math.ceil(math.ceil(b.M/chunks)/block)*block
    return b._replace(block=block, channels=channels, one=b.M<=block and chunks==1, chunk=chunk if chunks>1 else b.M,
                      chunks=math.ceil(b.M/chunk) if chunks>1 else 1)
plans = {'as planned':lambda b: b, 'loop':lambda b: smaller(b, cuda.power_of_2(max(2, b.M//3)), 1),
         'split':lambda b: smaller(b, cuda.power_of_2(max(2, b.M//6)), 3), 'small blocks':lambda b: smaller(b, 4, 1)}

@contextmanager
def planned(how):
    "Blocks as one of `plans` has them"
    own = cuda.blocks
    cuda.plan_of.cache_clear()
    with patch.object(cuda, 'blocks', lambda *args: plans[how](own(*args))): yield
    cuda.plan_of.cache_clear()

@contextmanager
def on_the_cpu():
    "Let layers take the kernels on the CPU"
    def fits(cls, x, state):
        T = state.mean.dtype
        return not cls.broken and T==cuda.torch.float32 and x.dtype in cuda.dtypes and state.floors.ndim==1 and x.numel()>0
    from fastai_runbn import functional
    with patch.object(cuda.TritonKernels, 'fits', classmethod(fits)), \
         patch.object(functional, 'implementation', lambda x, state, backend='auto': cuda.TritonKernels if cuda.TritonKernels.fits(x, state) else functional.Formulas): yield

@contextmanager
def launches():
    "Names of the kernels that are launched"
    names,launch = [],cuda.Plan.launch
    def noted(self, kernel, *args):
        names.append(kernel.__name__)
        with _disable_current_modes(): return launch(self, kernel, *args) # the interpreter's own operators
    with patch.object(cuda.Plan, 'launch', noted): yield names

@contextmanager
def last_first():
    "Programs of a launch run in the opposite order"
    run = interpreter.interpreter_builder.set_grid_idx
    def opposite(x, y, z):
        a,b,c = interpreter.interpreter_builder.grid_dim
        return run(a-1-x, b-1-y, c-1-z)
    with patch.object(interpreter.interpreter_builder, 'set_grid_idx', opposite): yield
