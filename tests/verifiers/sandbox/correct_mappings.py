"""Correct programs that lock, flush and map files and memory."""

PROGRAMS = {
    "lock an own file": "import fcntl\nf = open('x', 'w'); fcntl.flock(f, fcntl.LOCK_EX); f.write('3')\n"
    "fcntl.flock(f, 8); f.close()\nprint(open('x').read())",
    "lockf": "import fcntl\nf = open('x', 'w+'); fcntl.lockf(f, fcntl.LOCK_EX); fcntl.lockf(f, 8); print(3)",
    "fsync": "import os\nf = open('x', 'w'); f.write('3'); f.flush(); os.fsync(f.fileno())\nprint(open('x').read())",
    "map memory": "import mmap\nm = mmap.mmap(-1, 9); m[:1] = b'3'; print(m[:1].decode())",
    "map memory, named flags": "import mmap\nm = mmap.mmap(-1, 9, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, prot=3)\n"
    "m.write(b'3'); m.seek(0); print(m.read(1).decode())",
    "map memory, positional": "import mmap\nm = mmap.mmap(-1, 9, 1, 3); m.write(b'3')\n"
    "m.resize(9000); print(chr(m[0]))",
    "map memory, access": "import mmap\nm = mmap.mmap(-1, 9, access=mmap.ACCESS_WRITE); m[0] = 51; print(chr(m[0]))",
    "map memory, read only": "import mmap\nm = mmap.mmap(-1, 9, access=mmap.ACCESS_READ)\n"
    "try: m[0] = 1\nexcept TypeError: print(3)\nassert isinstance(m, mmap.mmap)",
    "map stdin": "import mmap\nm = mmap.mmap(0, 0, access=mmap.ACCESS_READ); print(sum(map(int, m[:].split())))",
    "map an own file": "import mmap\nopen('x', 'wb').write(b'2')\nwith open('x', 'r+b') as f:\n"
    "    m = mmap.mmap(f.fileno(), 0); m[0] = 51; m.flush(); m.close()\nprint(open('x').read())",
    "own clocks": "import time\nfor n in (0, 1, 2, 3, 7): time.clock_gettime(n); time.clock_getres(n)\n"
    "time.sleep(.01); print(3)",
    "own schedule": "import os\nos.getsid(0); os.getpgid(os.getpid()); os.getpriority(os.PRIO_PROCESS, 0)\n"
    "print(3 if os.sched_getaffinity(0) and os.sched_getaffinity(os.getpid()) else 0)",
}
