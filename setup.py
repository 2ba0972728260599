"""What pyproject.toml cannot say: README.md for the package index, where links must be absolute"""
import re
from pathlib import Path
from setuptools import setup
try: import tomllib
except ImportError: import tomli as tomllib

root = Path(__file__).resolve().parent

def absolute(
    text:str, # Markdown, with links from the repository's root
    urls:dict, # `project.urls` of pyproject.toml
)->str:
    """Pictures as files of the repository, notebooks as pages of the documentation, the rest as the
    repository shows it"""
    repo,docs = urls['Repository'],urls['Documentation']
    def link(m):
        path,anchor = m[1],m[2] or ''
        if path.startswith('nbs/images/'): return f']({repo}/raw/main/{path})'
        page = re.fullmatch(r'nbs/(?:(tutorials/)|\d+[a-z]*_)?(.+)\.ipynb', path)
        if page: return f']({docs}/{page[1] or ""}{page[2]}.html{anchor})'
        return f']({repo}/blob/main/{path}{anchor})'
    return re.sub(r'\]\((?!\w+:|#)([^)#]+)(#[^)]*)?\)', link, text)

if __name__=='__main__':
    project = tomllib.loads((root/'pyproject.toml').read_text(encoding='utf-8'))['project']
    readme = (root/'README.md').read_text(encoding='utf-8')
    setup(long_description=absolute(readme, project['urls']),
        long_description_content_type='text/markdown')
