//! Every `unsafe` block of the program: system calls that have no safe wrapper in rustix or nix, each with the reason why
//! it is sound.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::libc;
use nix::sys::signal::{SigHandler, Signal};
use rustix::process::{Pid, Resource, Rlimit, setrlimit};

/// Descriptors 0 and 1 as values that close them. To be called once, at the start.
pub(super) fn take_stdin_and_stdout() -> (OwnedFd, OwnedFd) {
    // SAFETY: std's runtime has opened /dev/null in place of descriptors 0 to 2 that were closed, so both are open. Nothing
    // else in this process owns them: std::io::stdin and stdout are handles by number, and this program uses neither.
    unsafe { (OwnedFd::from_raw_fd(0), OwnedFd::from_raw_fd(1)) }
}

/// Marks every descriptor above 2 close-on-exec, so that nothing the UCSPI server left open reaches the child.
pub(super) fn close_on_exec_above_stderr() -> io::Result<()> {
    let flags = libc::CLOSE_RANGE_CLOEXEC;
    // SAFETY: close_range(2) with this flag closes nothing and touches no memory of ours.
    let done = unsafe { libc::syscall(libc::SYS_close_range, 3_u32, u32::MAX, flags) };
    if done == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    // Before Linux 5.11, or where a filter forbids it: one by one.
    if !matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EINVAL | libc::EPERM)) {
        return Err(error);
    }
    for descriptor in 3..ONE_BY_ONE {
        // SAFETY: sets a flag of a descriptor, or fails with EBADF where there is none.
        unsafe { libc::fcntl(descriptor, libc::F_SETFD, libc::FD_CLOEXEC) };
    }
    Ok(())
}

/// Forks. `None`: this is the new process.
pub(super) fn fork() -> io::Result<Option<Pid>> {
    // SAFETY: only another thread could hold a lock that the new process waits for in vain, and there is none: all callers run before
    // any thread is started.
    match unsafe { libc::fork() } {
        0 => Ok(None),
        pid @ 1.. => Ok(Pid::from_raw(pid)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Closes all descriptors above 2 but these. For a new process that owns nothing else.
pub(super) fn keep_only(kept: &[BorrowedFd<'_>]) {
    let mut numbers: Vec<u32> = kept.iter().map(|descriptor| descriptor.as_raw_fd().cast_unsigned()).collect();
    numbers.sort_unstable();
    let mut first = 3;
    for number in numbers.iter().copied().filter(|number| *number > 2).chain([u32::MAX]) {
        // SAFETY: whoever else owned one of these numbers does so in the process that this one was forked from.
        if first < number && unsafe { libc::syscall(libc::SYS_close_range, first, number - 1, 0_u32) } != 0 {
            // Before Linux 5.9, or where a filter forbids it: one by one.
            for other in (first..number).take_while(|other| *other < ONE_BY_ONE.cast_unsigned()) {
                // SAFETY: as above.
                unsafe { libc::close(other.cast_signed()) };
            }
        }
        first = number.saturating_add(1);
    }
}

/// A descriptor that was left open for us under this number, if it is open. To be called once for each, before any other is opened.
pub(super) fn take_inherited(number: i32) -> io::Result<OwnedFd> {
    // SAFETY: asks for a flag of a descriptor, or fails with EBADF where there is none.
    if unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, and whoever left it named it to us by its number: nobody else in this process knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Descriptors that are looked at where close_range(2) is not to be had: the usual limit of a process.
const ONE_BY_ONE: i32 = 1024;

/// Gives an inherited "ignore" back its default (protocol.md: PROG has default dispositions), for every signal but SIGPIPE, which
/// std ignores in us and resets in the child.
///
/// SIGXFSZ gets a handler that does nothing: where the log is a file that has reached its limit (`softlimit -f`) a line is lost, and
/// not the session. The child has the default again, as it would not if we ignored it.
pub(super) fn default_dispositions() -> nix::Result<()> {
    use Signal::{SIGBUS, SIGKILL, SIGPIPE, SIGSEGV, SIGSTOP, SIGXFSZ};
    for signal in Signal::iterator() {
        // std's own handlers of SIGSEGV and SIGBUS, which report a stack overflow, stay.
        if !matches!(signal, SIGKILL | SIGSTOP | SIGPIPE | SIGSEGV | SIGBUS | SIGXFSZ) {
            // SAFETY: the default disposition runs no code of ours, and no handler is installed for these.
            unsafe { nix::sys::signal::signal(signal, SigHandler::SigDfl) }?;
        }
    }
    // SAFETY: the handler touches nothing.
    unsafe { nix::sys::signal::signal(Signal::SIGXFSZ, SigHandler::Handler(on_nothing)) }?;
    Ok(())
}

/// Has this process go on at a signal that is meant for its forebear, and reaches the whole group or control group. What it starts has
/// the defaults again, as it would not if it ignored them.
pub(super) fn outlive_terminations() -> nix::Result<()> {
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        // SAFETY: the handler touches nothing.
        unsafe { nix::sys::signal::signal(signal, SigHandler::Handler(on_nothing)) }?;
    }
    Ok(())
}

/// Gives what `command` starts this limit of open descriptors. That costs a fork: std has only a vfork(2) otherwise.
pub(super) fn limit_descriptors(command: &mut Command, limit: Rlimit) {
    // SAFETY: what is done between fork and exec is one system call; it allocates nothing and takes no lock.
    unsafe { command.pre_exec(move || Ok(setrlimit(Resource::Nofile, limit)?)) };
}

extern "C" fn on_nothing(_: libc::c_int) {}

/// Sets how many octets make a socket readable (SO_RCVLOWAT). A refusal leaves it as it is.
pub(super) fn wake_for(socket: BorrowedFd<'_>, octets: i32) {
    // SAFETY: the pointer is to an i32 of ours that outlives the call, and the length is its size.
    unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVLOWAT,
            (&raw const octets).cast(),
            size_of::<i32>() as libc::socklen_t,
        );
    }
}

/// Has the kernel ask `program` about every system call of this thread, and of those that it starts, from now on.
///
/// # Errors
/// The system call's; ENOSYS, EINVAL: the kernel has no filters.
pub(super) fn filter_calls(program: &[libc::sock_filter]) -> io::Result<()> {
    let len = u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let program = libc::sock_fprog { len, filter: program.as_ptr().cast_mut() };
    // SAFETY: the kernel reads so many instructions, which outlive the call, and writes none; it keeps a copy.
    done(unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0_u32, &raw const program) })
}

/// What a Landlock ruleset forbids unless a rule allows it (linux/landlock.h). A kernel takes zeros for what it does not know.
#[repr(C)]
pub(super) struct Handled {
    pub(super) files: u64,
    pub(super) network: u64,
    pub(super) scoped: u64,
}

#[repr(C, packed)]
struct PathBeneath {
    allowed: u64,
    parent: i32,
}

#[repr(C)]
struct NetPort {
    allowed: u64,
    port: u64,
}

const CREATE_RULESET_VERSION: u32 = 1;
const RULE_PATH_BENEATH: u32 = 1;
const RULE_NET_PORT: u32 = 2;

/// The version of the kernel's Landlock.
///
/// # Errors
/// ENOSYS, EOPNOTSUPP: it has none.
pub(super) fn landlock_version() -> io::Result<u32> {
    let none = core::ptr::null::<Handled>();
    // SAFETY: with this flag the kernel reads no memory of ours.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, none, 0_usize, CREATE_RULESET_VERSION) };
    u32::try_from(version).map_err(|_| io::Error::last_os_error())
}

/// A ruleset without rules.
///
/// # Errors
/// The system call's.
pub(super) fn landlock_ruleset(handled: &Handled) -> io::Result<OwnedFd> {
    let size = size_of::<Handled>();
    // SAFETY: the kernel reads so many octets of a value that outlives the call.
    let made = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, &raw const *handled, size, 0_u32) };
    match i32::try_from(made) {
        // SAFETY: the descriptor is new, and nobody else's.
        Ok(descriptor) if descriptor >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(descriptor) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Allows this beneath a folder, or of a file.
///
/// # Errors
/// The system call's.
pub(super) fn landlock_allow_path(ruleset: BorrowedFd<'_>, allowed: u64, path: BorrowedFd<'_>) -> io::Result<()> {
    let rule = PathBeneath { allowed, parent: path.as_raw_fd() };
    landlock_allow(ruleset, RULE_PATH_BENEATH, (&raw const rule).cast())
}

/// Allows this for a TCP port.
///
/// # Errors
/// The system call's.
pub(super) fn landlock_allow_port(ruleset: BorrowedFd<'_>, allowed: u64, port: u16) -> io::Result<()> {
    let rule = NetPort { allowed, port: port.into() };
    landlock_allow(ruleset, RULE_NET_PORT, (&raw const rule).cast())
}

fn landlock_allow(ruleset: BorrowedFd<'_>, kind: u32, rule: *const libc::c_void) -> io::Result<()> {
    // SAFETY: the two callers pass a rule of this kind that outlives the call; the kernel only reads it.
    done(unsafe { libc::syscall(libc::SYS_landlock_add_rule, ruleset.as_raw_fd(), kind, rule, 0_u32) })
}

/// Puts this thread, and those that it starts, under the ruleset.
///
/// # Errors
/// The system call's.
pub(super) fn landlock_restrict(ruleset: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: a descriptor and a number.
    done(unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0_u32) })
}

fn done(result: libc::c_long) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Ends the process at once: no destructor, no exit handler.
pub fn exit_now(code: u8) -> ! {
    // SAFETY: _exit(2) does not return, and runs no code of this process.
    unsafe { libc::_exit(i32::from(code)) }
}
