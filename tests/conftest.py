"What every test shares: the `--slow` option and a fixed seed"
import os
os.environ.setdefault('MPLBACKEND', 'agg') # figures are drawn, never shown
import pytest,torch

def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help="also run the notebooks' slow cells")

imports = r'ignore:.*torch\.jit\.script', "ignore:The 'mode.chained_assignment' option", 'ignore:numpy.core is deprecated' # torch's and fastai's own
def pytest_configure(config):
    for w in imports: config.addinivalue_line('filterwarnings', w)

@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)
