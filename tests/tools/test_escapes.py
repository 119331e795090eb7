"""Programs that try to get out, or at what is outside: each attempt is refused, and the host is as it was."""

import pytest

from cpm_jax.tools.limits import Limits

# Each line is an attempt, and each must be refused.
ESCAPES = {
    "tcp": ["socket.create_connection(TCP, 1)", "socket.create_connection(('1.1.1.1', 53), 1)"],
    "udp": [
        "[s := socket.socket(type=socket.SOCK_DGRAM), s.connect(UDP), s.send(b'x'), s.settimeout(0.2), s.recv(1)]",
        "socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('1.1.1.1', 53))",
    ],
    "raw and packet sockets": [
        "socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)",
        "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    ],
    "sockets that no network namespace holds": [
        "socket.socket(40, socket.SOCK_STREAM)",  # AF_VSOCK: the host of a virtual machine, and its other guests
        "socket.socket(40, socket.SOCK_DGRAM)",
        "syscall(41, 198, ctypes.c_long(0x1_0000_0028), 1, 0)",  # of which the kernel reads the lower half
        "socket.socketpair(30, socket.SOCK_STREAM)",  # AF_TIPC
        "socket.socket(38, socket.SOCK_SEQPACKET)",  # AF_ALG
        "socket.socket(31, socket.SOCK_RAW, 1)",  # AF_BLUETOOTH
    ],
    "name server": ["socket.getaddrinfo('example.com', 80)"],
    "unix socket": ["socket.socket(socket.AF_UNIX).connect(UNIX)"],
    "abstract unix socket": ["socket.socket(socket.AF_UNIX).connect('\\0' + TOKEN)"],
    "signals to the host": ["os.kill(CANARY, 9)", "os.kill(PARENT, 9)", "os.killpg(PARENT, 9)"],
    "other processes' memory": [
        "call(libc.ptrace(16, CANARY, 0, 0))",
        "call(libc.ptrace(16, 1, 0, 0))",
        "open('/proc/1/mem', 'r+b')",
        "open(f'/proc/{CANARY}/mem', 'rb')",
        "open('/proc/1/environ', 'rb').read()",
        "call(libc.process_vm_readv(1, None, 0, None, 0, 0))",
        "os.readlink('/proc/1/root')",
        "open('/proc/1/task/1/mem', 'r+b')",
        "open('/proc/kcore', 'rb').read(1)",
    ],
    "secret files": [
        "open(SECRET_FILE).read()",
        "open('/etc/shadow').read()",
        "open('/etc/hostname').read()",
        "os.listdir('/home')",
        "os.listdir('/var')",
        "os.listdir('/run')",
        "os.listdir('/sys')",
        "open(REPOSITORY + '/setup.cfg').read()",
        "open(os.path.join(os.path.dirname(SECRET_FILE), '..', '..', 'x')).read()",
    ],
    "links to secrets": [
        "[os.symlink('/etc/shadow', 'a'), open('a').read()]",
        "[os.symlink(SECRET_FILE, 'b'), open('b').read()]",
        "[os.symlink('/proc/1/root', 'c'), open('c/etc/shadow').read()]",
        "[os.symlink('/proc/self/root', 'd'), open('d' + SECRET_FILE).read()]",
        "open('../../../../..' + SECRET_FILE).read()",
        "open('/proc/self/cwd/../..' + SECRET_FILE).read()",
        "os.link('/usr/bin/env', 'e')",
        "os.link('/proc/self/exe', 'f')",
        "os.link('/etc/passwd', '/tmp/passwd')",
    ],
    "writing outside": [
        *(f"open({folder!r} + TOKEN, 'w')" for folder in ("/", "/etc/", "/usr/", "/usr/bin/", "/dev/", "/proc/")),
        "open(os.path.join(sys.prefix, 'lib', TOKEN), 'w')",
        "open(SECRET_FILE, 'w')",
        "os.mkdir('/new')",
        "os.mkdir('/home')",
        "os.unlink('/usr/bin/env')",
        "os.unlink(sys.executable)",
        "os.rename('/usr', '/user')",
        "os.chmod('/usr/bin/env', 0o777)",
        "os.utime('/usr/bin/env')",
        "open('/etc/passwd', 'a')",
        "open(f'/proc/1/{TOKEN}', 'w')",
        "os.chmod('/proc/1', 0o777)",
    ],
    "kernel settings": [
        "put('/proc/sys/kernel/hostname', b'x')",
        "put('/proc/sys/kernel/core_pattern', b'|/tmp/x')",
        "put('/proc/sys/vm/drop_caches', b'1')",
        "put('/proc/sysrq-trigger', b'h')",
        "put('/proc/self/oom_score_adj', b'-1000')",
        "put('/sys/kernel/mm/transparent_hugepage/enabled', b'never')",
        "put('/sys/fs/cgroup/cgroup.procs', b'0')",
        "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "resource.setrlimit(resource.RLIMIT_NPROC, (10_000, 10_000))",
        "os.setpriority(os.PRIO_PROCESS, 0, -20)",
        "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))",
    ],
    "namespaces and mounts": [
        *(f"call(libc.unshare({flag:#x}))" for flag in (0x10000000, 0x20000, 0x40000000, 0x20000000, 0x08000000)),
        "syscall(56, 220, 0x10000000 | 17, 0, 0, 0, 0)",
        "syscall(435, 435, 0, 0)",
        "call(libc.setns(os.open('/proc/self/ns/mnt', os.O_RDONLY), 0))",
        "call(libc.mount(b'none', b'/tmp', b'tmpfs', 0, None))",
        "call(libc.mount(b'none', b'/', None, 32, None))",
        "call(libc.umount2(b'/proc/1', 2))",
        "call(libc.umount2(b'/usr', 2))",
        "os.chroot('/tmp')",
        "syscall(155, 41, b'/tmp', b'/tmp')",
        "syscall(428, 428, -100, b'/', 1)",
    ],
    "devices": [
        "os.mknod('disk', stat.S_IFBLK | 0o600, os.makedev(254, 0))",
        "os.mknod('memory', stat.S_IFCHR | 0o600, os.makedev(1, 1))",
        *(f"open('/dev/{name}', 'rb')" for name in ("mem", "kmsg", "sda", "vda", "kvm", "fuse", "net/tun", "port")),
        "open('/dev/tty', 'r+b', buffering=0)",
    ],
    "becoming root": [
        "os.setuid(0)",
        "os.seteuid(0)",
        "os.setresuid(0, 0, 0)",
        "os.setgid(0)",
        "os.setgroups([0])",
        "os.chown('hostile.py', 0, 0)",
        "call(libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(*[0xFFFFFFFF] * 6)))",
    ],
    "keyring": [
        "syscall(248, 217, b'user', b'name', b'value', 5, -3)",
        "syscall(250, 219, 0, -4, 1)",
    ],
    "the machine": [
        "syscall(169, 142, 0xFEE1DEAD, 672274793, 0, 0)",  # keeps Ctrl-Alt-Del as it is
        "time.clock_settime(time.CLOCK_REALTIME, time.time())",
        "call(libc.settimeofday(ctypes.byref((ctypes.c_long * 2)(int(time.time()), 0)), None))",
        "call(libc.sethostname(b'x', 1))",
        "call(libc.swapon(b'/tmp/x', 0))",
        "syscall(175, 105, None, 0, b'')",
        "syscall(103, 116, 3, None, 0)",
        "call(libc.acct(None))",
        "call(libc.personality(0x0040000))",
    ],
    "doors of the kernel": [
        "syscall(425, 425, 8, None)",
        "syscall(321, 280, 0, None, 0)",
        "syscall(298, 241, None, 0, -1, -1, 0)",
        "syscall(323, 282, 0)",
    ],
    "memory that belongs to no process": [
        "call(libc.shmget(0, 4096, 0o1600))",
        "call(libc.msgget(0, 0o1600))",
        "call(libc.semget(0, 1, 0o1600))",
        "os.memfd_create('x')",
        "mmap.mmap(-1, 4096)",  # shared by default
        "mmap.mmap(-1, 4096, mmap.MAP_SHARED | 2 | mmap.MAP_ANONYMOUS)",  # MAP_SHARED_VALIDATE
        "mmap.mmap(os.open('/dev/zero', os.O_RDWR), 4096)",
        "syscall(278, 75, os.pipe()[1], (ctypes.c_size_t * 2)(id(libc), 1), 1, 0)",
    ],
    "typing into the terminal": [
        "fcntl.ioctl(0, 0x5412, b'x')",
        "fcntl.ioctl(os.openpty()[1], 0x5412, b'x')",
        "fcntl.ioctl(os.openpty()[1], 0x541C, b'\\x03')",
    ],
}


@pytest.mark.parametrize("name", ESCAPES)
def test_escapes_are_refused(host, name):
    lines = "".join(f"attempt(lambda: {attempt})\n" for attempt in ESCAPES[name])
    result = host.attack(lines + "say('end')", Limits(memory_bytes=128 << 20, max_processes=12))
    assert (result.status, result.stderr) == ("ok", "")
    *said, end = result.stdout.splitlines()
    assert end == "end"
    assert [line for line in said if not line.startswith("refused:")] == []
    assert len(said) == len(ESCAPES[name])
