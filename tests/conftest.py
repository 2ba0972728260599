"What every test shares: the `--slow` option and a fixed seed"
import os
os.environ.setdefault('MPLBACKEND', 'agg') # figures are drawn, never shown
import pytest,torch

def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help="also run the notebooks' slow cells")

def pytest_configure(config):
    config.addinivalue_line('filterwarnings', 'ignore:.*torch.jit.script:FutureWarning') # torch's own, on every import of fastai

@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)
