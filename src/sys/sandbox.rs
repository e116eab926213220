//! The sandbox: once the child runs, the key is read and the ids are dropped, this process gives up what it will not need, before
//! it reads the client's first octet. An intruder inside it holds this session, and nothing else.
//!
//! What is left (Landlock for paths and ports, a seccomp filter for everything else; each holds where the kernel lacks the other):
//!
//! | for | what |
//! |---|---|
//! | the session | reading, writing, splicing, polling and closing what is open; memory that is never executable; time and random octets |
//! | PROG, once or twice | signals to it, its end, its reaping |
//! | HOST PORT, a listener's `--plain` | TCP to these ports and to no other; with `unix:PATH` a UNIX socket instead; without either none |
//! | a HOST that is a name | a thread, the resolver's files, UDP, TCP to port 53 |
//! | a folder of roots | reading beneath [`Needs::files`] |
//!
//! Contract: single-threaded until here; PROG was started before and inherits nothing of it. What only an intruder asks for (a
//! program, a process, another process's memory, executable memory) kills us with SIGSYS, seen by the supervisor. All else that is
//! not listed fails with EPERM (beneath Landlock with EACCES), as it might on any system: what a library tries in a corner that no
//! test has been in becomes a clean 4yz and a line in the log.
//!
//! Rejected: killing for every unlisted call. It protects no better, since the call is not made either way, and turns what we
//! forgot into sessions cut without a word. Rejected: EPERM alone. It would hide an intruder from the supervisor.
//!
//! Rejected: the crate landlock. It needs a procedural macro, which cannot be built where the host's own target is linked
//! statically (`cargo build` on glibc), and two fstat(2) more for each path.
//!
//! Known holes: Landlock knows TCP's ports and not its addresses, so HOST's port can be reached on any host; pathname UNIX sockets
//! can't be told apart (`unix:PATH` only); UDP goes anywhere where HOST is a name; the system's files that roots and resolver need
//! can be read. A static glibc looks names up with shared libraries, so there its folders can be read and memory can be executable.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::path::PathBuf;

use nix::libc;
use rustix::fs::{FileType, Mode, OFlags};
use rustix::process::Pid;

use super::dial::{Place, Target};
use super::filter::{Otherwise, Rule, Test, program};
use super::raw;

/// What will be needed after [`confine`].
#[derive(Clone, Debug, Default)]
pub struct Needs {
    /// Whom we may signal.
    pub children: Vec<Pid>,
    /// Whom we may dial.
    pub targets: Vec<Target>,
    /// What we may read, files and all beneath folders.
    pub files: Vec<PathBuf>,
    /// Whether we accept connections, and have a spawner start PROGs.
    pub listens: bool,
    /// Whether we look at what has come and let it lie.
    pub peeks: bool,
}

/// What [`confine`] came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Confined {
    /// Both hold.
    Wholly,
    /// Both hold, but the kernel's Landlock is too old for all of it: abstract UNIX sockets (Linux 6.12), or TCP (6.7) where the filter lets
    /// no such socket be made anyway.
    OlderLandlock,
    /// What does not hold, and why: one of the two, or of Landlock only its TCP ports.
    Without(String),
}

/// Where systems keep their roots, which the links in a folder of roots may lead to.
#[must_use]
pub fn system_roots() -> Vec<PathBuf> {
    const PLACES: [&str; 9] = [
        "/etc/ssl/certs",
        "/etc/ssl/cert.pem",
        "/etc/ssl/ca-bundle.pem",
        "/etc/pki/tls",
        "/etc/pki/ca-trust",
        "/etc/ca-certificates",
        "/usr/share/ca-certificates",
        "/usr/local/share/ca-certificates",
        "/var/lib/ca-certificates",
    ];
    PLACES.map(PathBuf::from).into()
}

/// What the system's resolver reads; of a static glibc also the libraries that it loads for that.
const RESOLVER: &[&str] = &[
    "/etc/hosts",
    "/etc/resolv.conf",
    "/etc/nsswitch.conf",
    "/etc/host.conf",
    "/etc/gai.conf",
    #[cfg(target_env = "gnu")]
    "/etc/ld.so.cache",
    #[cfg(target_env = "gnu")]
    "/usr/lib",
    #[cfg(target_env = "gnu")]
    "/lib64",
];

/// Gives up what is not needed, for good, in this thread and in those that it starts. What the kernel does not have is left out.
#[must_use]
pub fn confine(needs: &Needs) -> Confined {
    // Landlock's own calls are none that the filter would let pass.
    let landlock = restrict(needs);
    let seccomp =
        program(calls(needs)).ok_or(io::ErrorKind::InvalidInput.into()).and_then(|program| raw::filter_calls(&program));
    // Where the filter lets no such socket be made Landlock is not needed for them.
    let may_dial_tcp = seccomp.is_err() || !needs.targets.iter().all(is_unix);
    let without_landlock = match &landlock {
        Err(error) => Some(format!("Landlock ({error})")),
        Ok(version @ ..TCP) if may_dial_tcp => {
            Some(format!("Landlock's TCP ports (version {version} knows none: any can be connected to)"))
        }
        Ok(_) => None,
    };
    let without_seccomp = seccomp.err().map(|error: io::Error| format!("seccomp ({error})"));
    match (without_landlock, without_seccomp) {
        (Some(landlock), Some(seccomp)) => Confined::Without(format!("{landlock} and {seccomp}")),
        (Some(one), None) | (None, Some(one)) => Confined::Without(one),
        (None, None) if matches!(landlock, Ok(FULL..)) => Confined::Wholly,
        (None, None) => Confined::OlderLandlock,
    }
}

fn is_unix(target: &Target) -> bool {
    matches!(target.place, Place::Unix(_))
}

/// Whether a name has to be looked up for `target`.
fn is_named(target: &Target) -> bool {
    target.literal().is_none()
}

// linux/landlock.h: what each version of it knows.
const READ_FILE: u64 = 1 << 2;
const READ_DIR: u64 = 1 << 3;
const CONNECT_TCP: u64 = 1 << 1;
const ABSTRACT_UNIX_SOCKETS: u64 = 1;
/// The version from which on TCP is known.
const TCP: u32 = 4;
/// The version from which on all is known that we use.
const FULL: u32 = 6;

/// The version of Landlock that is in force.
fn restrict(needs: &Needs) -> io::Result<u32> {
    let version = raw::landlock_version()?;
    let files = match version {
        ..=1 => (1 << 13) - 1,
        2 => (1 << 14) - 1,
        3 | 4 => (1 << 15) - 1,
        5.. => (1 << 16) - 1,
    };
    let network = if version >= TCP { CONNECT_TCP } else { 0 };
    let scoped = if version >= FULL { ABSTRACT_UNIX_SOCKETS } else { 0 };
    let ruleset = raw::landlock_ruleset(&raw::Handled { files, network, scoped })?;
    let mut readable: Vec<PathBuf> = needs.files.clone();
    let mut ports = Vec::new();
    for target in &needs.targets {
        match &target.place {
            Place::Tcp(_, port) => ports.push(*port),
            Place::Found(_, found) => ports.extend(found.iter().map(SocketAddr::port)),
            Place::Unix(_) => {}
        }
        if is_named(target) {
            ports.push(DNS);
            readable.extend(RESOLVER.iter().map(PathBuf::from));
        }
    }
    for path in &readable {
        // What is not there now will not be read.
        let Ok(path) = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()) else { continue };
        let is_folder = FileType::from_raw_mode(rustix::fs::fstat(&path)?.st_mode) == FileType::Directory;
        let allowed = if is_folder { READ_FILE | READ_DIR } else { READ_FILE };
        raw::landlock_allow_path(ruleset.as_fd(), allowed, path.as_fd())?;
    }
    for port in ports.into_iter().filter(|_| network != 0) {
        raw::landlock_allow_port(ruleset.as_fd(), CONNECT_TCP, port)?;
    }
    raw::landlock_restrict(ruleset.as_fd())?;
    Ok(version)
}

const DNS: u16 = 53;

/// The system calls of the table above, and what becomes of each.
fn calls(needs: &Needs) -> Vec<(libc::c_long, Rule)> {
    let targets = &needs.targets;
    let is_named = targets.iter().any(is_named);
    let mut calls = Vec::with_capacity(128);
    let mut all =
        |numbers: &[libc::c_long], rule: &Rule| calls.extend(numbers.iter().map(|&number| (number, rule.clone())));

    all(ALWAYS, &Rule::Allow);
    all(INTRUDERS, &Rule::Kill);
    all(&[libc::SYS_fcntl], &one_of(1, FCNTL));
    all(&[libc::SYS_prctl], &one_of(0, &[libc::PR_SET_NAME]));
    all(&[libc::SYS_tgkill], &one_of(0, &[std::process::id().cast_signed()]));
    // musl's abort(3): refused this it would die of SIGSEGV instead, as a resolver's thread, whose number is not known yet, still does.
    let own = test(0, u32::MAX, &[rustix::thread::gettid().as_raw_nonzero().get()]);
    all(&[libc::SYS_tkill], &Rule::If(vec![own, test(1, u32::MAX, &[libc::SIGABRT])], Otherwise::Refuse));
    let children: Vec<i32> = needs.children.iter().map(|child| child.as_raw_nonzero().get()).collect();
    all(&[libc::SYS_kill, libc::SYS_pidfd_open], &one_of(0, &children));
    let memory =
        if is_named && cfg!(target_env = "gnu") { Rule::Allow } else { without(2, libc::PROT_EXEC, Otherwise::Kill) };
    all(&[libc::SYS_mmap, libc::SYS_mprotect], &memory);

    let looks = is_named || !needs.files.is_empty();
    if looks {
        all(LOOKING, &Rule::Allow);
        all(&[libc::SYS_openat], &without(2, WRITING, Otherwise::Refuse));
        #[cfg(target_arch = "x86_64")]
        all(&[libc::SYS_open], &without(1, WRITING, Otherwise::Refuse));
    }
    if !targets.is_empty() {
        let mut families = Vec::new();
        if !targets.iter().all(is_unix) {
            families.extend([libc::AF_INET, libc::AF_INET6]);
        }
        if targets.iter().any(is_unix) {
            families.push(libc::AF_UNIX);
        }
        let types = if is_named { &[libc::SOCK_STREAM, libc::SOCK_DGRAM][..] } else { &[libc::SOCK_STREAM] };
        // Protocol 0 is TCP, or UDP. MPTCP and SCTP would be streams whose ports Landlock does not know.
        let socket = [test(0, u32::MAX, &families), test(1, 0xf, types), test(2, u32::MAX, &[0, libc::IPPROTO_UDP])];
        all(&[libc::SYS_socket], &Rule::If(socket.into(), Otherwise::Refuse));
        all(&[libc::SYS_connect], &Rule::Allow);
        if targets.iter().any(|target| target.source.is_some()) || is_named {
            all(&[libc::SYS_bind], &Rule::Allow);
        }
    }
    if needs.listens {
        all(LISTENING, &Rule::Allow);
        if !looks {
            // Whether others may use a file of keys that is read again.
            all(&[libc::SYS_fstat], &Rule::Allow);
        }
    }
    if is_named || needs.listens {
        all(HEARING, &Rule::Allow);
    }
    if needs.peeks && !is_named {
        all(PEEKING, &one_of(3, &[libc::MSG_PEEK]));
    }
    if is_named {
        all(RESOLVING, &Rule::Allow);
        all(PEEKING, &Rule::Allow);
        // A connection that begins with its first octets passes Landlock unseen.
        all(&[libc::SYS_sendmsg], &without(2, libc::MSG_FASTOPEN, Otherwise::Refuse));
        all(&[libc::SYS_sendto, libc::SYS_sendmmsg], &without(3, libc::MSG_FASTOPEN, Otherwise::Refuse));
        all(&[libc::SYS_ioctl], &Rule::If(vec![test(1, u32::MAX, &[FIONREAD])], Otherwise::Refuse));
        let thread = test(0, libc::CLONE_THREAD.cast_unsigned(), &[libc::CLONE_THREAD]);
        all(&[libc::SYS_clone], &Rule::If(vec![thread], Otherwise::Kill));
        // What it is asked stands in memory, out of a filter's sight; glibc then takes clone.
        all(&[libc::SYS_clone3], &Rule::Refuse(libc::ENOSYS));
    } else {
        // To nobody but the other end: an address would be beyond Landlock's sight.
        let last_words = vec![test(3, u32::MAX, &[LAST_WORDS]), test(5, u32::MAX, &[0])];
        all(&[libc::SYS_sendto], &Rule::If(last_words, Otherwise::Refuse));
        all(&[libc::SYS_clone, libc::SYS_clone3], &Rule::Kill);
    }
    calls
}

/// What a session does, the loop, the allocator, the C library and a panic included.
const ALWAYS: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_splice,
    libc::SYS_pipe2,
    libc::SYS_close,
    libc::SYS_shutdown,
    libc::SYS_dup3,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_ppoll,
    libc::SYS_waitid,
    libc::SYS_wait4,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_clock_gettime,
    libc::SYS_gettimeofday,
    libc::SYS_getrandom,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_dup2,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_time,
];

/// What nothing in this process ever asks for, not even by mistake.
const INTRUDERS: &[libc::c_long] = &[
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_bpf,
    libc::SYS_userfaultfd,
    libc::SYS_perf_event_open,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_fork,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_vfork,
];

/// Flags and pipes; none of those that have signals sent to others.
const FCNTL: &[i32] =
    &[libc::F_GETFL, libc::F_SETFL, libc::F_GETFD, libc::F_SETFD, libc::F_DUPFD_CLOEXEC, libc::F_SETPIPE_SZ];

/// What reading files and folders takes besides opening them.
const LOOKING: &[libc::c_long] = &[
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_lseek,
    libc::SYS_getdents64,
    libc::SYS_readlinkat,
    libc::SYS_faccessat,
    libc::SYS_fadvise64,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_stat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_lstat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_access,
];

/// What the resolver's thread takes: its own start, and questions and answers.
const RESOLVING: &[libc::c_long] = &[
    libc::SYS_eventfd2,
    libc::SYS_set_tid_address,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_membarrier,
    libc::SYS_sched_getaffinity,
    libc::SYS_recvmmsg,
    libc::SYS_getpeername,
    libc::SYS_uname,
];

/// Connections.
const LISTENING: &[libc::c_long] = &[libc::SYS_accept4];

/// Whose they are, what a spawner answers, and a name server.
const HEARING: &[libc::c_long] = &[libc::SYS_recvmsg, libc::SYS_getsockname];

/// A PROXY header, and what a name server says.
const PEEKING: &[libc::c_long] = &[libc::SYS_recvfrom];

/// Opening for more than reading.
const WRITING: i32 = libc::O_WRONLY | libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC;

/// A reply behind which the connection ends: see `end`.
const LAST_WORDS: i32 = libc::MSG_MORE | libc::MSG_NOSIGNAL;

/// How much can be read (asm-generic/ioctls.h); libc has a type of its own for it on each target.
const FIONREAD: i32 = 0x541b;

fn test(argument: u8, mask: u32, values: &[i32]) -> Test {
    Test { argument, mask, values: values.iter().map(|value| value.cast_unsigned()).collect() }
}

fn one_of(argument: u8, values: &[i32]) -> Rule {
    Rule::If(vec![test(argument, u32::MAX, values)], Otherwise::Refuse)
}

fn without(argument: u8, bits: i32, otherwise: Otherwise) -> Rule {
    Rule::If(vec![test(argument, bits.cast_unsigned(), &[0])], otherwise)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_call_has_one_rule() {
        let tcp = |host: &str| Target { place: Place::Tcp(host.to_owned(), 465), source: None, loopback_only: false };
        let unix = Target { place: Place::Unix("/s".into()), source: None, loopback_only: false };
        let all = [vec![], vec![tcp("127.0.0.1")], vec![tcp("mx.example")], vec![unix.clone()], vec![tcp("::1"), unix]];
        for targets in all {
            for [listens, peeks] in [[false, false], [true, false], [true, true]] {
                let needs = Needs {
                    children: vec![Pid::INIT; 2],
                    targets: targets.clone(),
                    files: vec!["/etc/ssl".into()],
                    listens,
                    peeks,
                };
                let mut numbers: Vec<_> = calls(&needs).into_iter().map(|(number, _)| number).collect();
                numbers.sort_unstable();
                let count = numbers.len();
                numbers.dedup();
                assert_eq!(numbers.len(), count, "{needs:?}");
                let length = program(calls(&needs)).map(|program| program.len());
                assert!(length.is_some(), "{needs:?}");
                println!("{length:?} instructions: {needs:?}");
            }
        }
    }
}
