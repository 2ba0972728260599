"A processor of nbdev-docs (`doc_procs` in pyproject.toml)"
import re

def hide_directives(cell):
    """Take nbdev's directives off a markdown cell: those in its metadata (`export`, which makes it
    a part of the module's docstring and of llms.txt) come into its text, as they do for quarto's
    code cells"""
    if cell.cell_type=='markdown': cell.source = re.sub(r'\A(#\|.*\n)+', '', cell.source)
