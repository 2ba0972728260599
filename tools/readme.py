"""Make README.md from nbs/index.ipynb: `python tools/readme.py`, or `--check` to compare and change
nothing"""
import json,re,sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
nbs = root/'nbs'
note = '<!-- Made from nbs/index.ipynb by tools/readme.py: change it there -->'

def _markdown(src):
    "Links from the folder of notebooks as links from the repository's root"
    src = re.sub(r'\A#\|.*\n', '', src)
    src = re.sub(r'\]\((?=\w[\w./]*\.ipynb|images/)', '](nbs/', src)
    return src.replace('](../', '](')

def _text(out):
    "The text of one output, the richest that Markdown can hold"
    if out['output_type']=='error':
        raise SystemExit(f"nbs/index.ipynb has an error saved: {out['ename']}: {out['evalue']}")
    data = out.get('data', {})
    if 'text/markdown' in data: return ''.join(data['text/markdown'])
    plain = data.get('text/plain', [])
    text = ''.join(out.get('text', plain))
    text = text.replace('\r\n', '\n').strip('\n')
    return f'```text\n{text}\n```'

def _code(cell):
    "A code cell and its outputs as Markdown, or '' for a hidden one"
    lines = ''.join(cell['source']).splitlines()
    flags = {l[2:].strip() for l in lines if l.startswith('#|')}
    if 'hide' in flags: return ''
    src = '\n'.join(l for l in lines if not l.startswith('#|'))
    lang = 'python'
    if src.startswith('!'):
        lang = 'sh'
        src = src[1:].replace(' | cat', '')
    outs = [] if 'output: false' in flags else [_text(o) for o in cell['outputs']]
    return '\n\n'.join([f'```{lang}\n{src}\n```', *outs])

def _part(cell):
    "A cell as Markdown"
    if cell['cell_type']!='markdown': return _code(cell)
    return _markdown(''.join(cell['source']))

def readme():
    "README.md's text"
    index = (nbs/'index.ipynb').read_text(encoding='utf-8')
    parts = [_part(c) for c in json.loads(index)['cells']]
    parts = [p for p in parts if p]
    return '\n\n'.join([parts[0], note, *parts[1:]]) + '\n'

if __name__=='__main__':
    path,text = root/'README.md',readme()
    if '--check' not in sys.argv[1:]: path.write_text(text, encoding='utf-8')
    elif path.read_text(encoding='utf-8')!=text:
        raise SystemExit('README.md is not what nbs/index.ipynb makes: run python tools/readme.py')
