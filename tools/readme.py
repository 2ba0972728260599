"Make README.md from nbs/index.ipynb: `python tools/readme.py`, or `--check` to compare and change nothing"
import json,re,sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
note = '<!-- Made from nbs/index.ipynb by tools/readme.py: change it there -->'

def _link(m):
    "A link of the site as one into the repository: `layers.html` is `nbs/05_layers.ipynb`"
    page,anchor = m[1],m[2] or ''
    found = [p for p in (root/'nbs').rglob('*.ipynb') if re.sub(r'^\d+[a-z]*_', '', p.relative_to(root/'nbs').with_suffix('').as_posix())==page]
    if len(found)!=1: raise SystemExit(f"nbs/index.ipynb links to {page}.html, but {len(found)} notebooks make that page")
    return f'](nbs/{found[0].relative_to(root/"nbs").as_posix()}{anchor})'

def _markdown(src): return re.sub(r'\]\((\w[\w./]*)\.html(#[\w-]+)?\)', _link, src).replace('](images/', '](nbs/images/').replace('](../tests/', '](tests/')

def _text(out):
    "The text of one output, the richest that Markdown can hold"
    if out['output_type']=='error': raise SystemExit(f"nbs/index.ipynb has an error saved: {out['ename']}: {out['evalue']}")
    data = out.get('data', {})
    if 'text/markdown' in data: return ''.join(data['text/markdown'])
    text = ''.join(out.get('text', data.get('text/plain', []))).replace('\r\n', '\n').strip('\n')
    return f'```text\n{text}\n```'

def _code(cell):
    "A code cell and its outputs as Markdown, or '' for a hidden one"
    lines = ''.join(cell['source']).splitlines()
    flags = {l[2:].strip() for l in lines if l.startswith('#|')}
    if 'hide' in flags: return ''
    src = '\n'.join(l for l in lines if not l.startswith('#|'))
    lang,src = ('sh',src[1:].replace(' | cat','')) if src.startswith('!') else ('python',src)
    outs = [] if 'output: false' in flags else [_text(o) for o in cell['outputs']]
    return '\n\n'.join([f'```{lang}\n{src}\n```', *outs])

def readme():
    "README.md's text"
    cells = json.loads((root/'nbs/index.ipynb').read_text(encoding='utf-8'))['cells']
    parts = [_markdown(''.join(c['source'])) if c['cell_type']=='markdown' else _code(c) for c in cells]
    parts = [p for p in parts if p]
    return '\n\n'.join([parts[0], note, *parts[1:]]) + '\n'

if __name__=='__main__':
    path,text = root/'README.md',readme()
    if '--check' not in sys.argv[1:]: path.write_text(text, encoding='utf-8')
    elif path.read_text(encoding='utf-8')!=text: raise SystemExit('README.md is not what nbs/index.ipynb makes: run python tools/readme.py')
