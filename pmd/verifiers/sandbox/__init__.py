"""Runs untrusted Python programs within limits; returns the bytes they wrote and how they ended.

Threat model. The program is written by a model that is trained on the verdict, so it is treated as an attacker who
wants a verdict it has not earned, more resources than it was given, or a way out. It may run any Python, load any
library, call the kernel directly, and crash or hang whenever that helps it.

It must not: see an expected output; forge its own verdict; read or write files of the host; reach any network; see,
signal or trace another process; outlive its run; leave a file, shared memory or a process behind; use more time,
memory, output or processes than its limits; hide from the trainer that it has ended.

How this is enforced:
- Expected outputs never enter the sandbox. The trainer compares outputs outside, and parses them as untrusted bytes.
- `pool.py` (in the trainer) talks to a freshly exec'd supervisor; below it a single-threaded zygote forks one
  confined child per run (`supervisor.py`, `zygote.py`, `child.py`). Whatever a child writes counts as the program's
  output, except for one byte that it writes before the program starts.
- Level `namespaces`: its own user (when not root), mount, pid, network, IPC and host name namespaces; a root directory
  that holds only Python and shared libraries, on read-only mounts, and a small tmpfs, the only place where modes and
  times of files can be set; Landlock; seccomp; resource limits; no capabilities.
- Level `bubblewrap`: the same with bubblewrap's namespaces, for hosts that allow namespaces only to bubblewrap.
- Level `landlock`: the same without namespaces. Level `rlimits`: resource limits and whatever else the kernel offers;
  it does not stop an attacker and is used only if requested by name.
- A zygote ends with its trainer, however the trainer ends: the supervisor watches a pidfd of the trainer,
  and the kernel kills the zygote with the supervisor and the child with the zygote.

Out of scope: attacks on the kernel itself, timing side channels, and programs that compute the right answer in an
unwanted way. Other users of the machine are as safe as from any unprivileged user.

Depends only on the standard library and the Linux kernel (5.13 for Landlock).
"""
