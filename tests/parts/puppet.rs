//! PROG in the tests: hands its own fds 0 and 1 to the test over the UNIX socket named by its first argument, so that
//! the test itself plays the child, and then only waits to be told how to exit.
//!
//! Sent: one message with the two fds, whose octets are six sections, each a little-endian u32 length and its octets: pid,
//! environment, open fds, SigBlk and SigIgn lines, arguments from the second on, working directory. Then one octet is
//! awaited: the exit code; the end of the socket means 0.
//! The second argument `ignore-term` makes SIGTERM wait for ever.

use std::env;
use std::fs;
use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::process;

use nix::sys::signal::{SigSet, Signal};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

fn main() -> io::Result<()> {
    let arguments: Vec<_> = env::args_os().skip(1).collect();
    let socket_path = arguments.first().ok_or_else(|| io::Error::other("usage: puppet SOCKET [ignore-term]"))?;
    // Looked at before any fd of ours is opened.
    let (fds, signals) = (open_fds()?, signal_lines()?);
    if arguments.get(1).is_some_and(|mode| mode == "ignore-term") {
        let mut term = SigSet::empty();
        term.add(Signal::SIGTERM);
        term.thread_block()?;
    }
    let mut socket = UnixStream::connect(socket_path)?;
    let rest: Vec<&[u8]> = arguments.iter().skip(1).map(|a| a.as_bytes()).collect();
    let mut report = Vec::new();
    for section in [
        process::id().to_string().into_bytes(),
        fs::read("/proc/self/environ")?,
        fds.into_bytes(),
        signals.into_bytes(),
        rest.join(&b' '),
        env::current_dir()?.as_os_str().as_bytes().to_vec(),
    ] {
        let length = u32::try_from(section.len()).map_err(io::Error::other)?;
        report.extend_from_slice(&length.to_le_bytes());
        report.extend_from_slice(&section);
    }
    hand_over(&socket, &report)?;
    let null = fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    // The report ends when nobody but the test holds the two.
    socket.shutdown(std::net::Shutdown::Write)?;
    let mut code = [0u8];
    match socket.read(&mut code) {
        Ok(1) => process::exit(i32::from(code[0])),
        _ => process::exit(0),
    }
}

/// Sends the report, the first octets with fds 0 and 1.
fn hand_over(socket: &UnixStream, report: &[u8]) -> io::Result<()> {
    let (stdin, stdout) = (io::stdin(), io::stdout());
    let fds = [stdin.as_fd(), stdout.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::Error::other("no room for two fds"));
    }
    let sent = rustix::net::sendmsg(socket, &[IoSlice::new(report)], &mut ancillary, SendFlags::empty())?;
    let mut socket = socket;
    socket.write_all(&report[sent..])
}

/// The numbers of the open fds, blanks between, without the one that reads the folder.
fn open_fds() -> io::Result<String> {
    let own = format!("/proc/{}/fd", process::id());
    let mut numbers = Vec::new();
    for entry in fs::read_dir("/proc/self/fd")? {
        let entry = entry?;
        match fs::read_link(entry.path()) {
            Ok(target) if target.to_string_lossy() == own => {}
            _ => numbers.push(entry.file_name().to_string_lossy().into_owned()),
        }
    }
    numbers.sort();
    Ok(numbers.join(" "))
}

/// The SigBlk and SigIgn lines. Rust's start-up ignores SIGPIPE in every program, so bit 12 of SigIgn says nothing here.
fn signal_lines() -> io::Result<String> {
    let status = fs::read_to_string("/proc/self/status")?;
    let lines: Vec<&str> = status.lines().filter(|l| l.starts_with("SigBlk") || l.starts_with("SigIgn")).collect();
    Ok(lines.join("\n"))
}
