"""Make README.md from nbs/index.ipynb: `python tools/readme.py`, or `--check` to compare and change
nothing"""
import json,re,sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
nbs = root/'nbs'
note = '<!-- Made from nbs/index.ipynb by tools/readme.py: change it there -->'

def _page(path):
    "The name of the page that a notebook makes: `layers` of `nbs/05_layers.ipynb`"
    name = path.relative_to(nbs).with_suffix('').as_posix()
    return re.sub(r'^\d+[a-z]*_', '', name)

def _link(m):
    "A link of the site as one into the repository: `layers.html` is `nbs/05_layers.ipynb`"
    page,anchor = m[1],m[2] or ''
    found = [p for p in nbs.rglob('*.ipynb') if _page(p)==page]
    if len(found)!=1:
        raise SystemExit(f"nbs/index.ipynb links to {page}.html, "
            f"but {len(found)} notebooks make that page")
    return f'](nbs/{found[0].relative_to(nbs).as_posix()}{anchor})'

def _markdown(src):
    src = re.sub(r'\]\((\w[\w./]*)\.html(#[\w-]+)?\)', _link, src)
    src = src.replace('](images/', '](nbs/images/')
    return src.replace('](../tests/', '](tests/')

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
