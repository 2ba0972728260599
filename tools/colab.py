"""Give each tutorial a badge that opens it in Colab, and a first cell that installs what it needs
there: `python tools/colab.py`, after a new tutorial or a new `Repository` in pyproject.toml;
`--check` only compares"""
import sys
from pathlib import Path
from uuid import uuid4
from fastcore.nbio import mk_cell,read_nb,write_nb
try: import tomllib
except ImportError: import tomli as tomllib

root = Path(__file__).resolve().parent.parent
repo = tomllib.loads((root/'pyproject.toml').read_text())['project']['urls']['Repository']
colab = 'https://colab.research.google.com'

# what a tutorial needs beside the package
extras = dict(boxes='[bench]', plain_pytorch='[lightning]',
    timm_torchvision='[bench]', volumes='[medical]')
packages = dict(plain_pytorch='accelerate', production='onnx onnxruntime onnxscript safetensors')
reads_study = 'boxes','how_well','related','segmentation','volumes'

def badge(
    path:Path, # A notebook of this repository
)->str: # Markdown
    "A picture that is a link to the notebook in Colab"
    where = path.relative_to(root).as_posix()
    there = repo.removeprefix('https://github.com/')
    picture = f'![Open in Colab]({colab}/assets/colab-badge.svg)'
    return f'[{picture}]({colab}/github/{there}/blob/main/{where})'

def installs(
    name:str, # Of a tutorial
)->str: # A code cell
    "The installation, which does nothing elsewhere than in Colab"
    what = f"'fastai_runbn{extras.get(name, '')}' {packages.get(name, '')}".rstrip()
    lines = ['#| hide', '#| eval: false', f'! [ -e /content ] && pip install -q {what} # on Colab']
    if name in reads_study:
        file = f'{repo}/raw/main/nbs/quality.jsonl'
        lines.append(f'! [ -e /content ] && wget -qP .. {file} # its figures')
    return '\n'.join(lines)

def _is_ours(cell): return colab in cell.source or '[ -e /content ]' in cell.source

def mark(
    path:Path, # A tutorial
    check:bool=False, # Only compare
):
    "Put badge and first cell behind the title, in the place of those there"
    nb = read_nb(path)
    want = [badge(path), installs(path.stem)]
    have = [c for c in nb.cells if _is_ours(c)]
    if [c.source for c in have]==want and nb.cells[1:3]==have: return
    if check: raise SystemExit(f'{path.relative_to(root)}: run python tools/colab.py')
    new = [mk_cell(text, kind) for text,kind in zip(want, ('markdown','code'))]
    for cell,old in zip(new, have+new): cell.id = old.get('id') or uuid4().hex[:8]
    rest = [c for c in nb.cells if not _is_ours(c)]
    nb.cells = [rest[0], *new, *rest[1:]]
    write_nb(nb, path)

if __name__=='__main__':
    check = '--check' in sys.argv[1:]
    for path in sorted((root/'nbs'/'tutorials').glob('*.ipynb')): mark(path, check)
