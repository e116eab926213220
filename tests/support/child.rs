//! The child as a test plays it: the fds 0 and 1 of a puppet (`tests/parts/puppet.rs`), received over a UNIX socket.

use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use crate::stream::{Stream, wait_hangup, wait_readable, wait_until};
use crate::wire::{PATIENCE, Wire, shown};

/// Where cargo has put the puppet: beside the program.
pub(crate) fn puppet() -> PathBuf {
    let program = Path::new(env!("CARGO_BIN_EXE_starttls-wrapper"));
    let puppet = program.with_file_name("examples").join("puppet");
    assert!(puppet.exists(), "{} is missing: `cargo build --example puppet`", puppet.display());
    puppet
}

/// What a puppet said of itself.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) pid: u32,
    /// NAME=VALUE, as it was started.
    pub(crate) environment: Vec<String>,
    /// The numbers of its open fds, blanks between.
    pub(crate) fds: String,
    /// The SigBlk and SigIgn lines of its status.
    pub(crate) signals: String,
    /// Its arguments from the second on.
    pub(crate) arguments: String,
    /// Its working directory.
    pub(crate) folder: String,
}

/// A puppet whose fds we hold.
pub(crate) struct Child {
    pub(crate) report: Report,
    strings: UnixStream,
    stdin: Option<File>,
    stdout: Option<File>,
    received: Vec<u8>,
    ended: bool,
}

impl Child {
    /// Waits for the puppet that connects to `listener`.
    pub(crate) fn accept(listener: &UnixListener) -> Result<Self, String> {
        wait_readable(listener, Instant::now() + PATIENCE).map_err(|e| format!("the child was not started: {e}"))?;
        let (strings, _) = listener.accept().map_err(|e| e.to_string())?;
        strings.set_read_timeout(Some(PATIENCE)).map_err(|e| e.to_string())?;
        let (mut fds, report) = receive(&strings).map_err(|e| format!("the puppet's report: {e}"))?;
        let stdout = fds.pop().map(File::from);
        let stdin = fds.pop().map(File::from);
        if stdin.is_none() {
            return Err("the puppet sent no fds".to_owned());
        }
        Ok(Self { report, strings, stdin, stdout, received: Vec::new(), ended: false })
    }

    /// Writes to what was the child's fd 1.
    pub(crate) fn send(&mut self, octets: &[u8]) {
        if let Some(stdout) = &mut self.stdout {
            // A wrapper that is gone takes nothing, which later expectations will tell.
            let _ = stdout.write_all(octets);
        }
    }

    /// The next octets on what was the child's fd 0 must be `expected`.
    pub(crate) fn get(&mut self, expected: &[u8]) -> Result<(), String> {
        let deadline = Instant::now() + PATIENCE;
        while self.received.len() < expected.len() && expected.starts_with(&self.received) && !self.ended {
            if let Err(e) = self.receive(deadline) {
                return Err(format!("child expected {}\n    got {} ({e})", shown(expected), shown(&self.received)));
            }
        }
        if !self.received.starts_with(expected) {
            let state = if self.ended { "its input has ended" } else { "its input is open" };
            return Err(format!("child expected {}\n    got {} ({state})", shown(expected), shown(&self.received)));
        }
        self.received.drain(..expected.len());
        Ok(())
    }

    /// The next whole line on what was the child's fd 0.
    pub(crate) fn line(&mut self) -> Result<Vec<u8>, String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(end) = self.received.iter().position(|octet| *octet == b'\n') {
                return Ok(self.received.drain(..=end).collect());
            }
            if self.ended {
                return Err("its input has ended".to_owned());
            }
            self.receive(deadline)?;
        }
    }

    /// What was the child's fd 0 must end, with nothing before.
    pub(crate) fn get_end(&mut self) -> Result<(), String> {
        let deadline = Instant::now() + PATIENCE;
        while !self.ended && self.received.is_empty() {
            self.receive(deadline).map_err(|e| format!("child expected the end of its input: {e}"))?;
        }
        if self.received.is_empty() {
            return Ok(());
        }
        Err(format!("child expected the end of its input, got {}", shown(&self.received)))
    }

    /// What has arrived on fd 0 and was not asked for.
    pub(crate) fn left_over(&mut self) -> Vec<u8> {
        let soon = Instant::now() + Duration::from_millis(1);
        while !self.ended && self.receive(soon).is_ok() {}
        std::mem::take(&mut self.received)
    }

    /// The child ends: its fds are closed, the end of its output is there to be read, and the puppet exits with `code`. What
    /// lay unread on fd 0 stays here.
    pub(crate) fn exit(&mut self, code: u8) {
        let unread = self.left_over();
        self.received = unread;
        self.ended = true;
        let reader = self.stdout.as_ref().and_then(|stdout| other_end(stdout, OFlags::RDONLY));
        (self.stdin, self.stdout) = (None, None);
        // What another test forks holds our fds until its exec, so that closing them is not yet the end.
        let has_ended = reader.is_none_or(|pipe| wait_hangup(&pipe, Instant::now() + PATIENCE));
        assert!(has_ended, "somebody still holds the child's output");
        let _ = self.strings.write_all(&[code]);
    }

    /// Whether the process is gone from the process table within `patience`.
    pub(crate) fn is_gone(&self, patience: Duration) -> bool {
        let folder = format!("/proc/{}", self.report.pid);
        wait_until(patience, || !Path::new(&folder).exists())
    }

    /// Its fds 0 and 1 as one side of a session, for more than lines. Ours become non-blocking by that.
    pub(crate) fn wire(&self) -> Wire {
        let clone = |file: &Option<File>| OwnedFd::from(file.as_ref().unwrap().try_clone().unwrap());
        Wire::over(Stream::pipes(clone(&self.stdin), clone(&self.stdout)))
    }

    /// All that comes until what was its fd 0 ends.
    pub(crate) fn rest(&mut self) -> Result<Vec<u8>, String> {
        let deadline = Instant::now() + PATIENCE;
        while !self.ended {
            self.receive(deadline).map_err(|e| format!("child expected the end of its input: {e}"))?;
        }
        Ok(std::mem::take(&mut self.received))
    }

    /// Closes what was its fd 0, so that whoever writes there has EPIPE, and lives on.
    pub(crate) fn close_stdin(&mut self) {
        let writer = self.stdin.as_ref().and_then(|stdin| other_end(stdin, OFlags::WRONLY));
        self.stdin = None;
        let is_closed = writer.is_none_or(|pipe| wait_hangup(&pipe, Instant::now() + PATIENCE));
        assert!(is_closed, "somebody still holds the child's input");
    }

    /// Closes what was its fd 1, and lives on.
    pub(crate) fn close_stdout(&mut self) {
        self.stdout = None;
    }

    /// What was its fd 0 and its fd 1.
    pub(crate) fn fds(&self) -> [&File; 2] {
        [self.stdin.as_ref().unwrap(), self.stdout.as_ref().unwrap()]
    }

    fn receive(&mut self, deadline: Instant) -> Result<(), String> {
        let Some(stdin) = &mut self.stdin else {
            self.ended = true;
            return Ok(());
        };
        wait_readable(&*stdin, deadline)?;
        let mut piece = [0; 16 * 1024];
        let read = stdin.read(&mut piece).map_err(|e| e.to_string())?;
        self.received.extend_from_slice(&piece[..read]);
        self.ended = read == 0;
        Ok(())
    }
}

/// The other end of a pipe, anew, to read or write. None: it is none.
fn other_end(pipe: &File, which: OFlags) -> Option<File> {
    let flags = which | OFlags::NONBLOCK | OFlags::CLOEXEC;
    rustix::fs::open(format!("/proc/self/fd/{}", pipe.as_raw_fd()), flags, Mode::empty()).ok().map(File::from)
}

fn receive(strings: &UnixStream) -> Result<(Vec<OwnedFd>, Report), String> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut report = vec![0; 64 * 1024];
    let got =
        rustix::net::recvmsg(strings, &mut [IoSliceMut::new(&mut report)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)
            .map_err(|e| e.to_string())?;
    report.truncate(got.bytes);
    let mut fds = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    let mut strings = strings;
    strings.read_to_end(&mut report).map_err(|e| e.to_string())?;
    let mut sections = Vec::new();
    let mut rest = &report[..];
    while let Some((length, tail)) = rest.split_first_chunk::<4>() {
        let length = u32::from_le_bytes(*length) as usize;
        let (section, tail) = tail.split_at_checked(length).ok_or("it is cut")?;
        sections.push(String::from_utf8_lossy(section).into_owned());
        rest = tail;
    }
    let [pid, environment, fds_seen, signals, arguments, folder] =
        <[String; 6]>::try_from(sections).map_err(|s| format!("{} sections", s.len()))?;
    let report = Report {
        pid: pid.parse().map_err(|_| format!("no pid: {pid}"))?,
        environment: environment.split_terminator('\0').map(str::to_owned).collect(),
        fds: fds_seen,
        signals,
        arguments,
        folder,
    };
    Ok((fds, report))
}
