"The implementations of a running norm that this machine has: their `backend` settings and names"
import pytest
from fastai_runbn.kernels.cpu import kernels

needs_kernels = pytest.mark.skipif(kernels is None,
    reason='pip found no C compiler when it installed fastai_runbn')
backends = [pytest.param('formulas', id='formulas'),
    pytest.param('auto', id='cpu', marks=needs_kernels)]
names = {'formulas':'formulas', 'auto':'formulas' if kernels is None else 'cpu'}
