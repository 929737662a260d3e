# ruff: noqa: E501
"""Correct programs that use threads, asyncio, signals or `multiprocessing`."""

PROGRAMS = {
    "daemon thread": "import threading,time\nthreading.Thread(target=time.sleep,args=(99,),daemon=True).start(); print(3)",
    "exit in thread": "import threading,sys\nt=threading.Thread(target=sys.exit); t.start(); t.join(); print(3)",
    "100 threads": "import threading\nr=[]\nts=[threading.Thread(target=r.append,args=(1,)) for _ in range(100)]\n[t.start() for t in ts]; [t.join() for t in ts]; print(len(r)-97)",
    "async gen": "import asyncio\nasync def g():\n    for i in range(3): yield i\nasync def m(): return sum([i async for i in g()])\nprint(asyncio.run(m()))",
    "to_thread": "import asyncio\nprint(asyncio.run(asyncio.to_thread(lambda: 3)))",
    "thread": "import threading\nt = threading.Thread(target=lambda: print(3)); t.start(); t.join()",
    "thread not joined": "import threading, time\nthreading.Thread(target=lambda: (time.sleep(.1), print(3))).start()",
    "big stack thread": (
        "import sys, threading\nsys.setrecursionlimit(10**6); threading.stack_size(1 << 27)\n"
        "def f(n): return 3 if n == 0 else f(n - 1)\n"
        "t = threading.Thread(target=lambda: print(f(50000))); t.start(); t.join()"
    ),
    "huge stack thread": (
        "import threading; threading.stack_size(1 << 28)\n"
        "t = threading.Thread(target=lambda: print(3)); t.start(); t.join()"
    ),
    "thread pool": "from concurrent.futures import ThreadPoolExecutor as P\nwith P(4) as p: print(sum(p.map(int, input().split())))",
    "asyncio": "import asyncio\nasync def f(): await asyncio.sleep(.01); return 3\nprint(asyncio.run(f()))",
    "timer": "import signal, time\nsignal.signal(14, lambda *a: print(3)); signal.setitimer(0, .05); signal.pause()",
    "stack_size 2**29": "import threading,sys\nsys.setrecursionlimit(10**6); threading.stack_size(2**29)\ndef f(n): return 3 if n==0 else f(n-1)\nt=threading.Thread(target=lambda: print(f(40000))); t.start(); t.join()",
    "stack_size 512MB-1": "import threading\nthreading.stack_size(512*1024*1024-4096)\nt=threading.Thread(target=lambda: print(3)); t.start(); t.join()",
    "dfs closure in thread": "import sys,threading\ndef main():\n    a,b=map(int,input().split())\n    def d(n): return a+b if n==0 else d(n-1)\n    print(d(100000))\nsys.setrecursionlimit(1<<25); threading.stack_size(1<<26)\nt=threading.Thread(target=main); t.start(); t.join()",
    "signal pipe": "import signal; signal.signal(signal.SIGPIPE,signal.SIG_DFL); print(3)",
    "alarm guard": "import signal\ndef h(*a): raise TimeoutError\nsignal.signal(signal.SIGALRM,h); signal.alarm(5)\nprint(3); signal.alarm(0)",
    "asyncio gather": "import asyncio\nasync def f(x): await asyncio.sleep(0.001); return x\nasync def m(): print(sum(await asyncio.gather(*[f(int(x)) for x in input().split()])))\nasyncio.run(m())",
    "asyncio run_in_executor": "import asyncio\nasync def m():\n    l=asyncio.get_running_loop(); s=await l.run_in_executor(None,input); print(sum(map(int,s.split())))\nasyncio.run(m())",
    "asyncio stdin": "import asyncio,sys\nasync def m():\n    s=await asyncio.to_thread(sys.stdin.readline); print(sum(map(int,s.split())))\nasyncio.run(m())",
    "selectors": "import selectors,socket\ns=selectors.DefaultSelector(); a,b=socket.socketpair(); s.register(a,1); b.send(b'3'); s.select(1); print(a.recv(1).decode())",
    "main async gen": "import asyncio\nasync def g():\n    for i in (1,2): yield i\nasync def m():\n    t=0\n    async for x in g(): t+=x\n    print(t)\nasyncio.run(m())",
    "uncaught in thread": "import threading\ndef f(): raise ValueError\nt=threading.Thread(target=f); t.start(); t.join(); print(3)",
    "threads lock": "import threading\nl=threading.RLock(); c=[0]\ndef f():\n    for _ in range(1000):\n        with l: c[0]+=1\nts=[threading.Thread(target=f) for _ in range(3)]; [t.start() for t in ts]; [t.join() for t in ts]; print(c[0]//1000)",
    "threading.Timer": "import threading\nt=threading.Timer(.05,print,[3]); t.start(); t.join()",
    "queue": "import queue,threading\nq=queue.Queue(); threading.Thread(target=q.put,args=(3,)).start(); print(q.get())",
    "barrier": "import threading\nb=threading.Barrier(2); threading.Thread(target=b.wait).start(); b.wait(); print(3)",
    "mp.dummy": "from multiprocessing.dummy import Pool\nwith Pool(4) as p: print(sum(p.map(int,input().split())))",
    "ThreadPool": "from multiprocessing.pool import ThreadPool\nwith ThreadPool(4) as p: print(sum(p.map(int,input().split())))",
    "mp cpu_count": "import multiprocessing\nprint(3 if multiprocessing.cpu_count()>0 else 0)",
    "mp Lock": "import multiprocessing as m\nl=m.Lock()\nwith l: print(3)",
    "mp Queue": "import multiprocessing as m\nq=m.Queue(); q.put(3); print(q.get())",
    "mp Pipe": "import multiprocessing as m\na,b=m.Pipe(); a.send(3); print(b.recv())",
    "thread raises": "import threading\nthreading.Thread(target=lambda: 1/0).start()\nprint(3)",
    "print in thread at exit": "import threading,time\ndef f(): time.sleep(.2); print(3)\nthreading.Thread(target=f).start()",
    "timer at exit": "import threading\nthreading.Timer(.1,lambda: print(3)).start()",
    "executor not shut": "from concurrent.futures import ThreadPoolExecutor\nex=ThreadPoolExecutor(2)\nex.submit(print,3)",
    "executor submit from exit": "from concurrent.futures import ThreadPoolExecutor as P\np=P(1); f=p.submit(lambda:3); print(f.result())",
    "pthread_kill": "import signal,threading\nsignal.signal(signal.SIGUSR1,lambda *a: print(3))\nsignal.pthread_kill(threading.get_ident(),signal.SIGUSR1)",
    "raise_signal": "import signal\nsignal.signal(signal.SIGTERM,lambda *a: print(3))\nsignal.raise_signal(signal.SIGTERM)",
    "excepthook thread": "import threading,sys\nthreading.excepthook=lambda a: print(3)\nt=threading.Thread(target=lambda:1/0); t.start(); t.join()",
    "asyncio subtasks": "import asyncio\nasync def w(q):\n    while True:\n        x=await q.get(); q.task_done()\n        if x is None: return\nasync def m():\n    q=asyncio.Queue(); t=[asyncio.create_task(w(q)) for _ in range(3)]\n    for _ in t: q.put_nowait(None)\n    await asyncio.gather(*t); print(3)\nasyncio.run(m())",
    "asyncio timeout": "import asyncio\nasync def m():\n    try: await asyncio.wait_for(asyncio.sleep(9),.05)\n    except asyncio.TimeoutError: print(3)\nasyncio.run(m())",
    "asyncio signal handler": "import asyncio,signal,os\nasync def m():\n    e=asyncio.Event(); asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1,e.set); os.kill(os.getpid(),signal.SIGUSR1); await e.wait(); print(3)\nasyncio.run(m())",
    "asyncio connect stdin": "import asyncio,sys\nasync def m():\n    l=asyncio.get_running_loop(); s=await l.run_in_executor(None,sys.stdin.buffer.readline); print(sum(map(int,s.split())))\nasyncio.run(m())",
    "signal ignore pipe": "import signal; signal.signal(signal.SIGINT,signal.SIG_IGN); print(3)",
    "threading local": "import threading\nl=threading.local(); l.x=3; print(l.x)",
    "condition": "import threading\nc=threading.Condition()\ndef f():\n    with c: c.notify()\nwith c:\n    threading.Thread(target=f).start(); c.wait(2)\nprint(3)",
    "semaphore threads 60": "import threading\ns=threading.Semaphore(3); r=[]\ndef f():\n    with s: r.append(1)\nt=[threading.Thread(target=f) for _ in range(60)]\n[x.start() for x in t]; [x.join() for x in t]; print(len(r)-57)",
}
