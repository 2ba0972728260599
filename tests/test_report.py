"What a surgery report and surgery's errors say, to the letter: a person reads them"
import pytest
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d
from fastai_runbn.layers import RunningBatchNorm2d
from fastai_runbn.surgery import NormRow,SurgeryReport,register_norm,surgery_report,to_bn,to_runbn

rows = [
    NormRow('', 'BatchNorm2d', 'RunningBatchNorm2d', 16, 'running', '', skipped=1, points=8, samples=1),
    NormRow('body.1', 'BatchNorm1d', 'RunningBatchNorm1d', 128, 'running', "excluded by 'body.*'",
        skipped=3, points=1, samples=2),
    NormRow('head', 'FrozenBatchNorm2d', '', None, 'left alone', "it is frozen")]
report = SurgeryReport(rows, {'GroupNorm':2,'LayerNorm':1}, 'Filters: none')
head = ('2 running norms, 0 convertible, 1 left alone, 2 with skipped batches; '
    'also 2 GroupNorm, 1 LayerNorm', 'Filters: none')
cells = [
    ['layer', 'from', 'to', 'channels', 'status', 'why'],
    ['(the model)', 'BatchNorm2d', 'RunningBatchNorm2d', '16', 'running',
        '8 rows, counted as 1 sample, skipped 1 batch with NaN or infinity'],
    ['body.1', 'BatchNorm1d', 'RunningBatchNorm1d', '128', 'running',
        "excluded by 'body.*', 1 row, counted as 2 samples, skipped 3 batches with NaN or infinity"],
    ['head', 'FrozenBatchNorm2d', '', '', 'left alone', 'it is frozen']]

@pytest.fixture(autouse=True)
def kernels_are_there(monkeypatch):
    "A line says where they are not, which is not what these tests are about"
    monkeypatch.setattr('fastai_runbn.surgery.cpu.kernels', 'there')

def test_a_report_in_a_terminal():
    "Columns begin below each other, two spaces apart"
    first,second,*table = repr(report).split('\n')
    assert (first,second)==head
    starts = 0,13,32,52,62,74
    for line,want in zip(table, cells, strict=True):
        ends = *starts[1:],None
        assert [line[a:b].rstrip() for a,b in zip(starts, ends)]==want
        assert line==line.rstrip()

def test_a_report_in_a_notebook():
    said = report._repr_markdown_().split('\n')
    assert said[:4]==[head[0],'',head[1],'']
    rule = ['---']*6
    table = [cells[0],rule,*cells[1:]]
    assert said[4:]==[f"|{'|'.join(row)}|" for row in table]
    page = report._repr_html_()
    assert page.startswith(f'<p>{head[0]}</p>\n<p>{head[1]}</p>\n<table')
    for row in cells:
        for cell in row: assert f'>{cell}<' in page.replace('&#x27;', "'")

def test_a_report_without_norms_is_a_line():
    assert repr(surgery_report(nn.Linear(2,2)))=='0 running norms, 0 convertible, 0 left alone'

def test_one_is_singular():
    said = repr(surgery_report(to_runbn(nn.BatchNorm2d(3))))
    assert said.startswith('1 running norm, 0 convertible')

def test_a_layer_that_keeps_no_count_of_channels():
    row, = surgery_report(FrozenBatchNorm2d(4)).rows
    assert row.channels is None and row.cells()[3]==''

@pytest.mark.parametrize('n,said', [(8,"'7'; a container"),(9,"'7', …; a container")])
def test_an_error_names_eight_layers(n, said):
    model = nn.Sequential(*[nn.BatchNorm2d(2) for _ in range(n)])
    with pytest.raises(ValueError) as e: to_runbn(model, include='body')
    assert f"Their names are '0', '1', '2', '3', '4', '5', '6', {said}'s layers are 'body.*'." in str(e.value)

def test_a_running_norm_of_a_class_without_a_twin():
    class Mine(RunningBatchNorm2d): pass
    model = nn.Sequential(Mine(3))
    said = r'^Mine has no BatchNorm to go back to: name its twin with `register_norm`\.$'
    with pytest.raises(TypeError, match=said): to_bn(model)
    assert type(model[0]) is Mine

def test_twins_that_cannot_be():
    class Old(nn.BatchNorm2d): pass
    class Other(nn.BatchNorm2d): pass
    class NotRunning(Old): pass
    class Running(Old, Other, RunningBatchNorm2d): pass
    with pytest.raises(TypeError, match='has to be a subclass of Old and of a running norm'):
        register_norm(Old, NotRunning)
    register_norm(Old, Running)
    register_norm(Old, Running) # once more is the same
    said = '^register_norm: Running is the twin of Old already; make another class.$'
    with pytest.raises(ValueError, match=said): register_norm(Other, Running)
