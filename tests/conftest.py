"What every test shares: the `--slow` option and a fixed seed"
import os
os.environ.setdefault('MPLBACKEND', 'agg') # figures are drawn, never shown
if 'PYTEST_XDIST_WORKER' in os.environ: os.environ.setdefault('OMP_NUM_THREADS', '1') # there are others
import pytest,torch
# without a GPU, kernels run in Python; see test_triton.py
if not torch.cuda.is_available(): os.environ['TRITON_INTERPRET'] = '1'
from datetime import timedelta
from fastai.torch_core import default_device
from hypothesis import settings as profile
from fastai_runbn.kernels import cpu

# learners and notebooks are on the CPU, where there is a GPU too;
# test_cuda.py and cells with `#| cuda` are not
default_device(False)

common = dict(deadline=timedelta(seconds=5), print_blob=True, derandomize=False)
profile.register_profile('default', max_examples=200, **common)
profile.register_profile('nightly', max_examples=2000, **common) # pytest --hypothesis-profile=nightly
profile.load_profile('default')

def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help="also run the notebooks' slow cells")

imports = (r'ignore:.*torch\.jit\.script', "ignore:The 'mode.chained_assignment' option",
    'ignore:numpy.core is deprecated') # torch's and fastai's own
def pytest_configure(config):
    for w in imports: config.addinivalue_line('filterwarnings', w)

@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)

@pytest.fixture(params=['kernels','formulas'])
def each_path(request, monkeypatch):
    "The C kernels, and what computes where there are none"
    if request.param=='formulas': monkeypatch.setattr(cpu, 'kernels', None)
    elif cpu.kernels is None: pytest.skip('pip found no C compiler when it installed fastai_runbn')
