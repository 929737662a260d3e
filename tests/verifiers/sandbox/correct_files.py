# ruff: noqa: E501
"""Correct programs that use files, modules of their own and databases."""

PROGRAMS = {
    "sqlite": "import sqlite3; print(sqlite3.connect(':memory:').execute('select 1+2').fetchone()[0])",
    "cwd and env": "import os,pathlib; os.environ.get('HOME'); os.getcwd(); pathlib.Path('a').write_text('3'); print(pathlib.Path('a').read_text())",
    "open('/dev/stdin')": "print(sum(map(int, open('/dev/stdin').read().split())))",
    "write a file": "open('note', 'w').write('3'); print(open('note').read())",
    "temporary file": "import tempfile\nwith tempfile.TemporaryFile('w+') as f: f.write('3'); f.seek(0); print(f.read())",
    "sqlite file": "import sqlite3\nc=sqlite3.connect('x.db'); c.execute('create table t(a)'); c.execute('insert into t values(3)'); c.commit(); c.close()\nprint(sqlite3.connect('x.db').execute('select a from t').fetchone()[0])",
    "shelve": "import shelve\nwith shelve.open('d') as d: d['x']=3\nwith shelve.open('d') as d: print(d['x'])",
    "importlib": "import importlib; m=importlib.import_module('math'); print(m.floor(3.7))",
    "tempfile": "import tempfile,os\nwith tempfile.TemporaryDirectory() as d:\n    p=os.path.join(d,'x'); open(p,'w').write('3'); print(open(p).read())",
    "zipfile": "import zipfile,io\nb=io.BytesIO(); z=zipfile.ZipFile(b,'w'); z.writestr('a','3'); print(z.read('a').decode())",
    "open /dev/fd/0": "try: s=open('/dev/fd/0').read()\nexcept OSError: s=input()\nprint(sum(map(int,s.split())))",
    "open /proc/self/fd/0 fallback": "import sys\ntry: s=open('/proc/self/fd/0').read()\nexcept OSError: s=sys.stdin.read()\nprint(sum(map(int,s.split())))",
    "copyfileobj": "import io,shutil,sys\nb=io.StringIO(); shutil.copyfileobj(sys.stdin,b); print(sum(map(int,b.getvalue().split())))",
    "write helper import": "open('helper_mod.py','w').write('X=3')\nimport sys; sys.path.insert(0,'.')\nimport helper_mod; print(helper_mod.X)",
    "runpy": "import runpy\nopen('m.py','w').write('print(3)')\nrunpy.run_path('m.py')",
    "execfile": "open('m.py','w').write('print(3)')\nexec(open('m.py').read())",
    "stdin closed twice": "import sys\ns=sys.stdin.read(); sys.stdin.close(); sys.stdin=open('/dev/null'); print(sum(map(int,s.split())))",
    "NamedTemporaryFile": "import tempfile\nwith tempfile.NamedTemporaryFile('w+') as f:\n    f.write('3'); f.flush(); print(open(f.name).read())",
    "mkstemp": "import tempfile,os\nfd,p=tempfile.mkstemp(); os.write(fd,b'3'); os.close(fd); print(open(p).read()); os.unlink(p)",
    "SpooledTemp": "import tempfile\nf=tempfile.SpooledTemporaryFile(); f.write(b'3'); f.seek(0); print(f.read().decode())",
    "pathlib mkdir": "import pathlib,shutil\np=pathlib.Path('d/e'); p.mkdir(parents=True); (p/'f').write_text('3'); print((p/'f').read_text()); shutil.rmtree('d')",
    "10MB file": "open('f','wb').write(bytes(10<<20)); import os; print(os.path.getsize('f')//(10<<20)*3)",
}
