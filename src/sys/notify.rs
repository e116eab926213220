//! Telling the supervisor how it goes: sd_notify(3), and the line feed of skarnet's programs.
//!
//! Contract: made before the sandbox, in which no socket can be had any more; the socket is connected, as Landlock lets nothing else reach
//! an abstract one. A supervisor that does not listen is nobody's trouble but its own: nothing here fails, and nothing waits for long.

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with, sockopt};
use rustix::time::{ClockId, clock_gettime};

/// How long the supervisor may take to make room for a message.
const PATIENCE: Duration = Duration::from_secs(5);

/// Who is told.
#[derive(Debug, Default)]
pub struct Supervisor {
    socket: Option<OwnedFd>,
    line: Option<OwnedFd>,
}

impl Supervisor {
    /// One who gets a line feed, if there is one.
    #[must_use]
    pub fn new(line: Option<OwnedFd>) -> Self {
        Self { socket: None, line }
    }

    /// Connects to systemd's socket: a path, or an abstract name behind an @.
    ///
    /// # Errors
    /// The system call's.
    pub fn connect(&mut self, place: &OsStr) -> io::Result<()> {
        let address = match place.as_bytes().strip_prefix(b"@") {
            Some(name) => SocketAddrUnix::new_abstract_name(name)?,
            None => SocketAddrUnix::new(place)?,
        };
        let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        connect(&socket, &address)?;
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(PATIENCE))?;
        self.socket = Some(socket);
        Ok(())
    }

    /// Clients are served, for the first time or again.
    pub fn ready(&mut self) {
        if let Some(line) = self.line.take() {
            let _ = rustix::io::write(line, b"\n");
        }
        self.say("READY=1");
    }

    /// Files are read again; [`Supervisor::ready`] is to follow. The time is what `Type=notify-reload` asks for.
    pub fn reloading(&self) {
        let now = clock_gettime(ClockId::Monotonic);
        self.say(&format!("RELOADING=1\nMONOTONIC_USEC={}", now.tv_sec * 1_000_000 + now.tv_nsec / 1000));
    }

    /// Nobody new is served.
    pub fn stopping(&self) {
        self.say("STOPPING=1");
    }

    fn say(&self, what: &str) {
        if let Some(socket) = &self.socket {
            let _ = rustix::io::write(socket, what.as_bytes());
        }
    }
}
