//! The program as a supervisor starts it: with a socket that listens already as descriptor 3, and told about by a line feed on
//! descriptor 4 and over NOTIFY_SOCKET. A shell puts them there, which needs no unsafe code: they are its stdin and stdout.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::process::{Child, Command, ExitStatus};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::stream::{wait_readable, wait_until};
use crate::wire::PATIENCE;

/// What the shell does before it becomes the program.
pub(crate) const PASSES: &str = r#"exec "$@" 3<&0 4>&1 </dev/null >/dev/null"#;

/// The program, running; killed when this goes.
pub(crate) struct Supervised {
    program: Child,
    line: OwnedFd,
    notified: UnixDatagram,
    pub(crate) folder: TempDir,
}

/// Where no other test listens: a socket of the test's own, as an fd holder has it.
pub(crate) fn holder() -> TcpListener {
    static NEXT: AtomicU16 = AtomicU16::new(1);
    let [high, low] = NEXT.fetch_add(1, Ordering::Relaxed).to_be_bytes();
    TcpListener::bind((std::net::Ipv4Addr::new(127, 90 + high, low, 1), 0)).unwrap()
}

/// Whoever listens, told by its address.
pub(crate) fn address(holder: &TcpListener) -> SocketAddr {
    holder.local_addr().unwrap()
}

impl Supervised {
    /// Starts the program with these words (HOST, PORT and PROG among them), `passed` as its descriptor 3.
    pub(crate) fn start(script: &str, passed: impl Into<OwnedFd>, words: &[&str]) -> Self {
        let folder = TempDir::new().unwrap();
        let path = |name: &str| folder.path().join(name);
        let (line, told) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let notified = UnixDatagram::bind(path("notify")).unwrap();
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script, "sh", env!("CARGO_BIN_EXE_starttls-wrapper")]).args(words);
        command.env_clear().env("PATH", "/usr/bin:/bin").env("NOTIFY_SOCKET", path("notify"));
        command.stdin(passed.into()).stdout(told).stderr(fs::File::create(path("stderr")).unwrap());
        let program = command.spawn().unwrap();
        Self { program, line, notified, folder }
    }

    /// The same, once it is ready.
    pub(crate) fn ready(script: &str, passed: impl Into<OwnedFd>, words: &[&str]) -> Self {
        let mut this = Self::start(script, passed, words);
        assert_eq!(this.line(), Some(b'\n'), "{}", this.said());
        this
    }

    /// What comes on descriptor 4; `None`: its end.
    pub(crate) fn line(&mut self) -> Option<u8> {
        let mut octet = [0];
        wait_readable(&self.line, Instant::now() + PATIENCE).unwrap_or_else(|why| panic!("{why}: {}", self.said()));
        (rustix::io::read(&self.line, &mut octet).unwrap() == 1).then_some(octet[0])
    }

    /// Whether nothing has come there yet.
    pub(crate) fn is_silent(&self) -> bool {
        wait_readable(&self.line, Instant::now()).is_err() && self.notified().is_none()
    }

    /// The next message to NOTIFY_SOCKET that is there.
    pub(crate) fn notified(&self) -> Option<String> {
        let mut octets = [0; 512];
        self.notified.set_nonblocking(true).unwrap();
        let count = self.notified.recv(&mut octets).ok()?;
        Some(String::from_utf8_lossy(&octets[..count]).into_owned())
    }

    /// The next message to NOTIFY_SOCKET.
    pub(crate) fn next_notice(&self) -> String {
        let mut notice = None;
        wait_until(PATIENCE, || {
            notice = self.notified();
            notice.is_some()
        });
        notice.unwrap_or_else(|| panic!("no notice: {}", self.said()))
    }

    /// What it has said on stderr.
    pub(crate) fn said(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.folder.path().join("stderr")).unwrap_or_default()).into_owned()
    }

    /// Waits until it says so.
    pub(crate) fn says(&self, words: &str) {
        assert!(wait_until(PATIENCE, || self.said().contains(words)), "{words:?} is not said: {}", self.said());
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.program)
    }

    pub(crate) fn kill(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// Its end, within this time.
    pub(crate) fn end_within(&mut self, patience: Duration) -> ExitStatus {
        let mut ended = None;
        wait_until(patience, || {
            ended = self.program.try_wait().unwrap();
            ended.is_some()
        });
        ended.unwrap_or_else(|| panic!("it does not end: {}", self.said()))
    }

    /// Its exit code.
    pub(crate) fn code(&mut self) -> Option<i32> {
        self.end_within(PATIENCE).code()
    }

    /// The processes that it has forked and that live, by name.
    pub(crate) fn helpers(&self, name: &str) -> Vec<Pid> {
        children(self.pid(), name)
    }

    /// Whether all its threads wait for something (proc(5)).
    pub(crate) fn sleeps(&self) -> bool {
        let threads = fs::read_dir(format!("/proc/{}/task", self.program.id())).unwrap();
        let stats = threads.map(|thread| fs::read_to_string(thread.unwrap().path().join("stat")).unwrap_or_default());
        stats.into_iter().all(|stat| stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('S')))
    }

    /// How often its threads have waited for something.
    pub(crate) fn waits(&self) -> u64 {
        waits(self.pid())
    }
}

impl Drop for Supervised {
    fn drop(&mut self) {
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}

/// The children of a process that have this name.
pub(crate) fn children(of: Pid, name: &str) -> Vec<Pid> {
    let of = of.as_raw_nonzero();
    let list = fs::read_to_string(format!("/proc/{of}/task/{of}/children")).unwrap_or_default();
    let named = |pid: &&str| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim_end() == name);
    list.split_whitespace().filter(named).filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect()
}

/// How often the threads of a process have given up the processor to wait (proc(5): voluntary_ctxt_switches).
pub(crate) fn waits(of: Pid) -> u64 {
    let threads = fs::read_dir(format!("/proc/{}/task", of.as_raw_nonzero())).unwrap();
    let of_one = |status: String| {
        let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        line.and_then(|count| count.trim().parse::<u64>().ok()).unwrap_or_default()
    };
    threads.filter_map(|thread| fs::read_to_string(thread.ok()?.path().join("status")).ok()).map(of_one).sum()
}
