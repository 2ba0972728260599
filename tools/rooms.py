"""Draw the rooms of the library and who imports whom into CONTRIBUTING.md: `python tools/rooms.py`,
or `--check`"""
import ast,re,sys
from functools import cache
from pathlib import Path
import networkx

root = Path(__file__).resolve().parent.parent
package = root/'fastai_runbn'

@cache
def rooms():
    "Modules by name, and the number of the notebook that each is exported from"
    found = {}
    for p in sorted((root/'nbs').glob('*.ipynb')):
        name = re.search(r'#\| default_exp ([\w.]+)', p.read_text(encoding='utf-8'))
        if name: found[name[1]] = int(p.name[:2])
    return found

def imported(name):
    "`(module, names)` of each import of the library in the module `name`"
    path = package/(name.replace('.', '/')+'.py')
    known = rooms()
    tree = ast.parse(path.read_text(encoding='utf-8'))
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom): continue
        here = ['fastai_runbn',*name.split('.')]
        where = here[:-node.level] if node.level else []
        if node.module: where = [*where,*node.module.split('.')]
        if where[0]!='fastai_runbn': continue
        base = '.'.join(where[1:])
        names = [a.name for a in node.names]
        before = base+'.' if base else ''
        modules = {n:before+n for n in names if before+n in known}
        for m in modules.values(): yield m,[]
        others = [n for n in names if n not in modules]
        if others: yield base,others

def arrows():
    "Who imports whom, without what follows: where a imports b and b imports c, a needs no arrow to c"
    known = rooms()
    edges = {(a,b) for a in known
        for b,_ in imported(a) if b in known}
    return sorted(networkx.transitive_reduction(networkx.DiGraph(edges)).edges)

def diagram():
    """A Mermaid flowchart, which GitHub draws: a box a room, the number of its notebook, an arrow
    to what it imports"""
    def box(name): return 'room_'+name.replace('.', '_') # a name that is no word of Mermaid
    boxes = [f'    {box(name)}["{n:02} {name}"]' for name,n in rooms().items()]
    lines = [f'    {box(a)} --> {box(b)}' for a,b in arrows()]
    return '\n'.join(['```mermaid','flowchart TD',*boxes,*lines,'```'])

if __name__=='__main__':
    path = root/'CONTRIBUTING.md'
    text = path.read_text(encoding='utf-8')
    new = re.sub(r'```mermaid\n.*?\n```', lambda _: diagram(), text, flags=re.S)
    if '--check' not in sys.argv[1:]:
        path.write_text(new, encoding='utf-8')
    elif new!=text:
        raise SystemExit('CONTRIBUTING.md has another map than the imports make: '
            'run python tools/rooms.py')
