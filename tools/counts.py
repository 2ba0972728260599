"""Count how dense the code is: `python tools/counts.py`; tests/test_sync.py holds the limits"""
import ast,sys,tokenize
from pathlib import Path
import pandas as pd

root = Path(__file__).resolve().parent.parent
limits = {'columns (p90)':100, 'tokens (p90)':20, '% over 100 columns':5, 'ternaries in 100 lines':3,
    'calls with over 6 positional arguments':0, 'private names imported':0}
_layout = (tokenize.NL,tokenize.NEWLINE,tokenize.COMMENT,
    tokenize.INDENT,tokenize.DEDENT,tokenize.ENDMARKER)

def files(folder):
    "Python of a folder, without what nbdev writes for itself"
    return [p for p in sorted((root/folder).rglob('*.py')) if p.name!='_modidx.py']

def tokens(path):
    "Numbers of tokens of its lines, without comments; lines without any are left out"
    with tokenize.open(path) as f: found = [*tokenize.generate_tokens(f.readline)]
    lines = pd.Series([t.start[0] for t in found if t.type not in _layout])
    return lines.value_counts()

def long_call(node):
    "A call with more than six positional arguments, none of which has a star?"
    return (isinstance(node, ast.Call) and len(node.args)>6
        and not any(isinstance(a, ast.Starred) for a in node.args))

def private_imports(node):
    "Names with an underscore that are imported from a module of the library"
    if not isinstance(node, ast.ImportFrom): return []
    if not (node.level or node.module.startswith('fastai_runbn')): return []
    return [a.name for a in node.names if a.name.startswith('_') and a.name!='__version__']

def counts(folder):
    "What `limits` are for, in the files of `folder`"
    texts = [p.read_text(encoding='utf-8') for p in files(folder)]
    lines = [l for text in texts for l in text.splitlines()]
    columns = pd.Series([len(l) for l in lines if l.strip() and l.strip()[0]!='#'])
    nodes = [n for text in texts for n in ast.walk(ast.parse(text))]
    per_line = pd.concat([tokens(p) for p in files(folder)])
    ternaries = sum(isinstance(n, ast.IfExp) for n in nodes)
    private = [name for n in nodes for name in private_imports(n)]
    values = (columns.quantile(.9), per_line.quantile(.9), 100*(columns>100).mean(),
        100*ternaries/len(columns), sum(map(long_call, nodes)), len(private))
    return dict(zip(limits, values))

if __name__=='__main__':
    folders = sys.argv[1:] or ['fastai_runbn','fastai_runbn/bench','tests','tools']
    table = pd.DataFrame({**{f:counts(f) for f in folders}, 'limit':limits})
    print(table.round(1).to_string())
