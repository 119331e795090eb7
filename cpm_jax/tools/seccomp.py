"""The system calls that a sandboxed program may not make, as a filter for the kernel (classic BPF).

The namespaces already take the power out of most of these calls. The filter takes the calls themselves away, which
keeps nested namespaces and the kernel's rarely used doors shut, shuts kinds of sockets that no network namespace holds
back (AF_VSOCK reaches the host of a virtual machine), and closes the ways to hold memory that belongs to no process and
that no watcher would see (System V segments, anonymous files, shared mappings without a file).
"""

import errno
import platform
import struct

# Number of the call on (x86-64, AArch64), from the kernel's asm/unistd.h; None where the machine lacks it.
_DENIED: dict[str, tuple[int | None, int | None]] = {
    # Other processes.
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    # Namespaces and mounts.
    "unshare": (272, 97),
    "setns": (308, 268),
    "chroot": (161, 51),
    "pivot_root": (155, 41),
    "mount": (165, 40),
    "umount2": (166, 39),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264),
    "fanotify_init": (300, 262),
    # The machine.
    "reboot": (169, 142),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "syslog": (103, 116),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "vhangup": (153, 58),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "personality": (135, 92),
    "move_pages": (279, 239),
    "migrate_pages": (256, 238),
    "mbind": (237, 235),
    "set_mempolicy": (238, 237),
    # Large and often broken parts of the kernel.
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # Memory that belongs to no process.
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "vmsplice": (278, 75),
}
_CLONE, _CLONE3, _IOCTL, _MMAP = (56, 220), (435, 435), (16, 29), (9, 222)
_SOCKET_CALLS = ((41, 198), (53, 199))  # socket, socketpair
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH_*

_NEW_NAMESPACES = 0x7E020000  # CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET}
_TERMINAL_INPUT = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX: type into the terminal of the caller
_SOCKETS = (1, 2, 10, 16)  # AF_UNIX, AF_INET, AF_INET6, AF_NETLINK: a network namespace has its own of each
_MAP_SHARED, _MAP_ANONYMOUS = 0x01, 0x20

# linux/bpf_common.h, linux/seccomp.h
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCH, _ARG0, _ARG1, _ARG3 = 0, 4, 16, 24, 40  # offsets in struct seccomp_data (low words: little endian)


def syscall_filter() -> bytes | None:
    """The filter for this machine's system calls.

    Denied calls fail with EPERM; `clone3`, whose flags no filter can read, with ENOSYS, so that the C library
    falls back to `clone`; sockets of other families with EAFNOSUPPORT, as where the kernel lacks them. A process that
    calls by another architecture's table is killed.

    Returns:
        The program as `bwrap --seccomp` reads it; None on a machine whose numbers are not known here.
    """
    if platform.machine() not in _ARCHITECTURES:
        return None
    column, arch = _ARCHITECTURES[platform.machine()]
    program: list[bytes] = []

    def add(code: int, value: int, if_true: int = 0, if_false: int = 0) -> None:
        program.append(struct.pack("=HBBI", code, if_true, if_false, value))

    add(_LOAD, _ARCH)
    add(_EQUAL, arch, 1, 0)
    add(_RETURN, _KILL)
    add(_LOAD, _NUMBER)
    add(_AT_LEAST, 0x40000000, 0, 1)  # the x32 table of x86-64
    add(_RETURN, _ERRNO | errno.ENOSYS)
    for numbers in _DENIED.values():
        number = numbers[column]
        if number is not None:
            add(_EQUAL, number, 0, 1)
            add(_RETURN, _ERRNO | errno.EPERM)
    add(_EQUAL, _CLONE3[column], 0, 1)
    add(_RETURN, _ERRNO | errno.ENOSYS)
    add(_EQUAL, _CLONE[column], 0, 4)
    add(_LOAD, _ARG0)
    add(_ANY_BIT, _NEW_NAMESPACES, 0, 1)
    add(_RETURN, _ERRNO | errno.EPERM)
    add(_RETURN, _ALLOW)
    add(_EQUAL, _MMAP[column], 0, 5)
    add(_LOAD, _ARG3)
    add(_ANY_BIT, _MAP_ANONYMOUS, 0, 2)
    add(_ANY_BIT, _MAP_SHARED, 0, 1)
    add(_RETURN, _ERRNO | errno.EPERM)
    add(_RETURN, _ALLOW)
    for numbers in _SOCKET_CALLS:
        add(_EQUAL, numbers[column], 0, 3 + len(_SOCKETS))
        add(_LOAD, _ARG0)
        for left, family in zip(range(len(_SOCKETS), 0, -1), _SOCKETS, strict=True):
            add(_EQUAL, family, left, 0)
        add(_RETURN, _ERRNO | errno.EAFNOSUPPORT)
        add(_RETURN, _ALLOW)
    add(_EQUAL, _IOCTL[column], 0, 1 + 2 * len(_TERMINAL_INPUT))
    add(_LOAD, _ARG1)
    for request in _TERMINAL_INPUT:
        add(_EQUAL, request, 0, 1)
        add(_RETURN, _ERRNO | errno.EPERM)
    add(_RETURN, _ALLOW)
    return b"".join(program)
