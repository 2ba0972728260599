"""Triton's kernels compiled for an A100 and an H100, which takes no GPU: registers, nothing spilt,
no sums whose order is chance"""
import json,os,subprocess,sys
from pathlib import Path
import pytest
pytest.importorskip('triton', reason='Triton comes with PyTorch on Linux')

root = Path(__file__).resolve().parents[1]
# shapes: a channel in one block, in a loop over blocks, split over programs
one,loop,split = [[2,64,n,n] for n in (16,56,224)]
def both(*shapes):
    "Cases, of shape, layout and call, in both layouts"
    return [(shape,layout,'default') for shape in shapes
        for layout in ('contiguous','last')]
def each(*calls): return [(one,'contiguous',c) for c in calls]
few = [(shape,'contiguous','default')
    for shape in ([1,3,1,1],[4,64],[1,1,5])]
settings = each('silu', 'lesson10', 'momentum', 'cumulative', 'held', 'adaptive')
calls = each('scheduled', 'each', 'no affine', 'no dx', 'unknown', 'parts')
groups = {
    'float32':('float32', both(one, loop, split)),
    'bfloat16':('bfloat16', both(one, loop)),
    'float16':('float16', both(one)),
    'odd sizes':('float32', both([2,512,7,7])+few),
    'settings':('float32', settings),
    'calls':('bfloat16', calls)}

@pytest.mark.parametrize('group', groups)
def test_compiled_for_sm_80_and_sm_90(group, tmp_path):
    dtype,cases = groups[group]
    env = dict(os.environ)
    env.pop('TRITON_INTERPRET', None)
    env |= {'PYTHONPATH':str(root), 'TRITON_CACHE_DIR':str(tmp_path)}
    program = [sys.executable,'tests/compile_triton.py',dtype]
    program += map(json.dumps, cases)
    p = subprocess.run(program, cwd=root, env=env, capture_output=True, text=True)
    assert p.returncode==0, p.stderr
    rows = [json.loads(l) for l in p.stdout.splitlines()]
    for r in rows: print(r)
    done = {(str(r['shape']),r['layout'],r['call'],r['arch']) for r in rows}
    assert done=={(str(shape),layout,call,arch)
        for shape,layout,call in cases for arch in (80,90)}
    for r in rows:
        assert r['spilt']==r['float_atomics']==0, r
        assert r['registers']*32*r['warps']<=65536, r
        assert r['shared']<=48*1024, r
        large = r['shape'] in (loop,split)
        reads_much = large and (r['layout'],r['dtype'])==('contiguous','fp32')
        assert r['wide_loads']>0 or not reads_much, r
