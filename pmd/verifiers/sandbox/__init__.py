"""Run untrusted Python programs: source, input and limits enter; bytes and how the program ended leave.

Threat model. The program is written by a model that is trained on the verdict, so it is treated as an attacker who
wants a verdict it has not earned, more machine than it was given, or a way out. It may run any Python, load any
library, call the kernel directly, and crash or hang wherever that helps it.

It must not: see an expected output; write its own verdict; read or write files of the host; reach any network; see,
signal or trace another process; outlive its run; leave a file, shared memory or a process behind; use more time,
memory, output or processes than its limits; stop the trainer from seeing that it ended.

How that is held:
- Expected outputs never enter the sandbox. The trainer compares, outside, bytes that it parses with suspicion.
- `pool.py` (in the trainer) talks to a supervisor that is exec'd fresh; a single-threaded zygote under it forks one
  confined child per run (`supervisor.py`, `zygote.py`, `child.py`). Nothing a child says is taken for anything but
  the program's output, except a byte that it writes before the program starts.
- Level `namespaces`: own user (when not root), mount, pid, network, IPC and host name spaces; a root directory that
  holds only Python and shared libraries, on read-only mounts, and a small tmpfs, where alone modes and times of files
  can be set; Landlock; seccomp; resource limits; no capabilities.
- Level `bubblewrap`: the same with bubblewrap's namespaces, for hosts that allow them to it alone.
- Level `landlock`: the same without the namespaces. Level `rlimits`: resource limits and what else the kernel offers;
  it does not hold against an attacker and is never chosen unless asked for by name.
- A zygote ends with its trainer, however that ends: the supervisor watches a pidfd of the trainer, the kernel kills
  the zygote with the supervisor and the child with the zygote.

Not held: attacks on the kernel itself, timing side channels, and a program that computes the right answer in a way
that one does not like. The machine's other users are as safe as from any unprivileged user.

Depends on the standard library and the Linux kernel (5.13 for Landlock) alone.
"""
