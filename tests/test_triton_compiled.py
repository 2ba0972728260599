"""Triton's kernels compiled for an A100 and an H100, which takes no GPU: registers, nothing spilt, no
sums whose order is chance"""
import json,os,subprocess,sys
from pathlib import Path
import pytest
pytest.importorskip('triton', reason='Triton comes with PyTorch on Linux')

root = Path(__file__).resolve().parents[1]
one,loop,split = [2,64,16,16],[2,64,56,56],[2,64,224,224]
def both(*shapes): return [(s,l,'default') for s in shapes for l in ('contiguous','last')]
def each(*calls): return [(one,'contiguous',c) for c in calls]
few = [(s,'contiguous','default') for s in ([1,3,1,1],[4,64],[1,1,5])]
groups = {
    'float32':('float32', both(one, loop, split)),
    'bfloat16':('bfloat16', both(one, loop)),
    'float16':('float16', both(one)),
    'odd sizes':('float32', both([2,512,7,7])+few),
    'settings':('float32', each('silu', 'lesson10', 'momentum', 'cumulative', 'held', 'adaptive')),
    'calls':('bfloat16', each('scheduled', 'each', 'no affine', 'no dx', 'unknown', 'parts'))}

@pytest.mark.parametrize('group', groups)
def test_compiled_for_sm_80_and_sm_90(group, tmp_path):
    dtype,calls = groups[group]
    env = {k:v for k,v in os.environ.items() if k!='TRITON_INTERPRET'}
    env |= {'PYTHONPATH':str(root), 'TRITON_CACHE_DIR':str(tmp_path)}
    program = [sys.executable,'tests/compile_triton.py',dtype,*map(json.dumps, calls)]
    p = subprocess.run(program, cwd=root, env=env, capture_output=True, text=True)
    assert p.returncode==0, p.stderr
    rows = [json.loads(l) for l in p.stdout.splitlines()]
    for r in rows: print(r)
    done = {(tuple(r['shape']),r['layout'],r['call'],r['arch']) for r in rows}
    assert done=={(tuple(s),l,c,a) for s,l,c in calls for a in (80,90)}
    for r in rows:
        assert r['spilt']==r['float_atomics']==0, r
        assert r['registers']*32*r['warps']<=65536 and r['shared']<=48*1024, r
        reads_much = r['shape'] in (loop,split) and (r['layout'],r['dtype'])==('contiguous','fp32')
        assert r['wide_loads']>0 or not reads_much, r
