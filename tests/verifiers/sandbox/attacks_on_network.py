# ruff: noqa: E501
"""Programs that try to open sockets or reach a network."""

from attack import CALL, attack

#: Must end as a wrong answer or a runtime error.
PROGRAMS = {
    "tcp": attack("import socket", "socket.create_connection(('1.1.1.1', 80), 1)"),
    "udp": attack("import socket", "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))"),
    "listen": attack("import socket", "socket.create_server(('127.0.0.1', 0))"),
    "ipv6": attack("import socket", "socket.socket(socket.AF_INET6)"),
    "unix": attack("import socket", "socket.socket(socket.AF_UNIX)"),
    "netlink": attack("import socket", "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)"),
    "packet": attack("import socket", "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)"),
    "urllib": attack("import urllib.request", "urllib.request.urlopen('http://1.1.1.1', timeout=1)"),
    "pair with address": attack(
        "import socket", "a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)", "a.sendto(b'x', '/dev/log')"
    ),
    "send descriptors": attack("import socket", "a, b = socket.socketpair()", "socket.send_fds(a, [b'x'], [0])"),
    "name service": attack("import socket", "assert socket.getaddrinfo('localhost', 80) is None"),
    "dgram pair by name": "import socket\na,b=socket.socketpair(socket.AF_UNIX,socket.SOCK_DGRAM)\ntry: a.sendmsg([b'x'],[],0,'/run/systemd/journal/socket'); print(3)\nexcept OSError: print('no')",
    "bind pair": "import socket\na,b=socket.socketpair()\ntry: a.bind('\\0pmd_hostile'); print(3)\nexcept OSError: print('no')",
    "vsock": "import socket\ntry: socket.socket(40,1); print(3)\nexcept OSError: print('no')",
    "alg": "import socket\ntry: socket.socket(38,5); print(3)\nexcept OSError: print('no')",
    "dns": "import socket; print(socket.gethostbyname('example.com') and 3)",
    "http": "import http.client\nc=http.client.HTTPConnection('127.0.0.1',80,timeout=1); c.request('GET','/'); print(3)",
    "raw socket": "import ctypes,os\nL=ctypes.CDLL(None,use_errno=True)\nprint(3 if L.socket(2,3,1)>=0 else 4)",
    "socket netlink": "import ctypes,os\nL=ctypes.CDLL(None,use_errno=True)\nprint(3 if L.socket(16,3,0)>=0 else 4)",
    "connect pair abstract": "import socket\na,b=socket.socketpair(socket.AF_UNIX,socket.SOCK_DGRAM)\na.connect('\\0x'); print(3)",
    "socketpair inet": "import socket\nsocket.socketpair(socket.AF_INET); print(3)",
    "ssl": "import ssl,socket\nssl.create_default_context().wrap_socket(socket.create_connection(('1.1.1.1',443),1)); print(3)",
    "smtplib": "import smtplib; smtplib.SMTP('127.0.0.1',25,timeout=1); print(3)",
    "fiosetown": CALL
    + "import socket,struct\na,b=socket.socketpair()\nprint(3 if L.ioctl(a.fileno(),0x8901,struct.pack('i',os.getppid()))==0 else 4)",
    "siocgif": CALL
    + "import socket\na,b=socket.socketpair()\nprint(3 if L.ioctl(a.fileno(),0x8912,ctypes.create_string_buffer(64))==0 else 4)",
}
