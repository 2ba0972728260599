"""Every notebook is a test; its slow and its CUDA cells are tests of their own,
which say so when they are skipped"""
from pathlib import Path
import nbdev.test as nbtest
import pytest,torch
from nbdev.config import get_config
from nbdev.doclinks import nbglob

root = Path(__file__).resolve().parent.parent
skip_flags = get_config(root).tst_flags
notebooks = sorted(Path(p).relative_to(root) for p in nbglob(root/'nbs'))

def flagged(nb, flag):
    "How many cells of `nb` only run with `flag`"
    def run_with(*flags):
        return len(nbtest.nb_test_cells(root/nb, skip_flags, *flags))
    return run_with([flag])-run_with()

def run(nb, flags=()):
    ok,_ = nbtest.test_nb(root/nb, skip_flags=skip_flags,
        force_flags=flags, basepath=str(root))
    assert ok, f"{nb} failed: its traceback is above"

def test_all_are_found():
    assert len(notebooks) >= 10 and Path('nbs/index.ipynb') in notebooks

@pytest.mark.parametrize('nb', notebooks, ids=str)
def test_notebook(nb): run(nb)

@pytest.mark.parametrize('nb,flag',
    [(nb,f) for nb in notebooks for f in ('slow','cuda')
        if flagged(nb, f)], ids=str)
def test_flagged_cells(nb, flag, request):
    n = flagged(nb, flag)
    if flag=='slow' and not request.config.getoption('--slow'):
        pytest.skip(f"{nb}: {n} slow cell(s), run with pytest --slow")
    if flag=='cuda' and not torch.cuda.is_available():
        pytest.skip(f"{nb}: {n} CUDA cell(s), and there is no CUDA here")
    run(nb, [flag])
