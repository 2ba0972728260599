"""Make the site in _docs, without quarto and without the net: `python tools/docs.py`, or `--check`
to make it elsewhere and only look for dead links. Needs smalldocs and Python 3.11"""
import argparse,os,re,shutil,sys,tempfile
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote,urlsplit
os.environ.setdefault('MPLBACKEND', 'agg')
import yaml
from latex2mathml.converter import convert
from nbdev.config import get_config
from nbdev.frontmatter import nb_frontmatter
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs
from fastcore.nbio import read_nb,write_nb

root = Path(__file__).resolve().parent.parent
# what notebooks read, and no page links to
repo_only = 'speed.json','speed_cuda.json','quality.jsonl','quality_ranks.jsonl'

def rename(
    path:Path, # A notebook, as nbdev wrote it for quarto
)->Path: # `layers.ipynb` for 05_layers.ipynb
    """Give a notebook its page's name: quarto reads that from `output-file`, smalldocs takes the
    file's own"""
    nb = read_nb(path)
    head = nb.cells[0]
    found = re.search(r'^output-file: (.+)\.html\n', head.source, re.M)
    if not found: return path
    head.source = head.source.replace(found[0], '')
    write_nb(nb, path)
    return path.rename(path.with_name(f'{found[1]}.ipynb'))

def relink(
    path:Path, # A staged notebook
    names:dict, # Notebooks and their staged names, from the folder of pages
):
    """Change the names of notebooks in links: quarto knows what pages they make, smalldocs goes by
    their names"""
    files = {Path(n).name:Path(staged).name for n,staged in names.items()}
    def renamed(m): return m[1]+files.get(m[2], m[2])
    nb = read_nb(path)
    for c in nb.cells:
        if c.cell_type=='markdown':
            c.source = re.sub(r'(\]\((?:[\w.]+/)*)([\w.]+\.ipynb)(?=[)#])', renamed, c.source)
    write_nb(nb, path)

def stage(
    processed:Path, # nbdev's folder of notebooks for quarto
    to:Path, # A new folder
):
    "Copy what nbdev processed, each notebook under the name that its page has, in links too"
    ignore = shutil.ignore_patterns('_docs', '.*', *repo_only)
    shutil.copytree(processed, to, ignore=ignore)
    names = {}
    for nb in [*to.rglob('*.ipynb')]:
        name = nb.relative_to(to).as_posix()
        names[name] = rename(nb).relative_to(to).as_posix()
    for page in names.values(): relink(to/page, names)
    side = to/'sidebar.yml'
    text = side.read_text()
    listed = re.findall(r'\S+\.ipynb', text)
    missing = set(names)-set(listed)
    unknown = set(listed)-set(names)
    if missing or unknown:
        raise SystemExit(f'nbs/sidebar.yml: without {sorted(missing)}; '
            f'no such notebook: {sorted(unknown)}')
    side.write_text(re.sub(r'\S+\.ipynb', lambda m: names[m[0]], text))
    for name in ('_quarto.yml','nbdev.yml'): # smalldocs makes no Markdown
        cfg = yaml.safe_load((to/name).read_text())
        cfg.pop('format-links', None)
        if 'format' in cfg:
            html = cfg['format']['html']
            cfg['format'] = {'html':{k:v for k,v in html.items() if k!='keep-md'}}
        (to/name).write_text(yaml.safe_dump(cfg, sort_keys=False))

class Links(HTMLParser):
    "Where a page links to, and the names it can be linked by"
    def __init__(self, page):
        super().__init__()
        self.to,self.ids = [],set()
        self.feed(page.read_text(encoding='utf-8'))
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if a.get('id'): self.ids.add(a['id'])
        if tag=='a' and a.get('name'): self.ids.add(a['name'])
        for k in ('href','src'):
            if a.get(k): self.to.append(a[k])

def _target(page, path, site):
    "The file that a link with this path leads to, from a page of the site"
    if not path: return page
    if path.startswith('/'): return (site.resolve()/path.lstrip('/')).resolve()
    return (page.parent/unquote(path)).resolve()

def dead_links(
    site:Path, # The site's folder
)->list: # A line for each
    "Links that lead nowhere: no such file, or no such anchor on its page"
    pages = {p.resolve():Links(p) for p in site.rglob('*.html')}
    dead = []
    for p,links in pages.items():
        for href in dict.fromkeys(links.to):
            u = urlsplit(href)
            if u.scheme or u.netloc: continue
            target = _target(p, u.path, site)
            if target.is_dir(): target = target/'index.html'
            where = p.relative_to(site.resolve()).as_posix()
            if not target.is_file(): dead.append(f'{where}: {href}: no such file')
            elif u.fragment and target in pages:
                known = unquote(u.fragment) in pages[target].ids
                if not known: dead.append(f'{where}: {href}: no such anchor')
    return dead

def unlink(
    site:Path, # The site's folder
):
    """Link to tests where the repository has them, and take away links of nbdev's own to exported
    names that no page documents"""
    repo = get_config(root).git_url
    ids = {p.resolve():Links(p).ids for p in site.rglob('*.html')}
    for p in ids:
        def kept(m):
            page,name = m[1],m[2]
            target = (p.parent/page).resolve()
            return m[0] if name in ids.get(target, [name]) else m[3]
        text = re.sub(r'(?<=<a href=")(?:\.\./)+(?=tests/)', f'{repo}/blob/main/',
            p.read_text(encoding='utf-8'))
        text = re.sub(r'<a href="([\w./]+\.html)#(\w+)">(<code>\2</code>)</a>', kept, text)
        p.write_text(text, encoding='utf-8')

def render_math(
    site:Path, # The site's folder
):
    "TeX as MathML, which browsers show by themselves; smalldocs leaves it to KaTeX from the net"
    def mathml(m):
        display = 'block' if m[1]=='display' else 'inline'
        return convert(unescape(m[2]), display=display)
    math = r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>'
    for p in site.rglob('*.html'):
        text = p.read_text(encoding='utf-8')
        text = re.sub(math, mathml, text, flags=re.S)
        p.write_text(text, encoding='utf-8')

def make(
    to:Path, # The site's folder, made anew
    n_workers:int=2, # Processes
)->list: # Complaints
    "Make the site; smalldocs' warnings and the dead links"
    from smalldocs.config import load
    from smalldocs.site import Site
    os.chdir(root)
    refresh_quarto_yml()
    processed = proc_nbs(n_workers=n_workers)
    with tempfile.TemporaryDirectory() as d:
        stage(processed, Path(d)/'site')
        site = Site(load(Path(d)/'site'), quiet=True)
        site.out = to.resolve()
        site.build()
        unlink(to)
        render_math(to)
        warnings = [w for w in site.warnings if 'broken link' not in w]
        return [*warnings, *dead_links(to)]

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--check', action='store_true',
        help='make it in a temporary folder, and only tell what is wrong')
    check = p.parse_args().check
    with tempfile.TemporaryDirectory() as d:
        to = Path(d)/'docs' if check else get_config(root).doc_path
        wrong = make(to)
        n = len([*to.rglob('*.html')])
    print(f'{n} pages{"" if check else f" in {os.path.relpath(to)}"}, {len(wrong)} complaints')
    if wrong: sys.exit('\n'.join(wrong))

if __name__=='__main__': main()
