//! `--metrics`: a thread that answers `GET /metrics` and `GET /healthz`, for whoever may reach its socket. It knows no secret of a session,
//! and its sandbox lets it accept, read and write, and connect to nothing.
//!
//! One request for each connection, then it is closed. A few at a time, each within a few seconds: whoever is slow, or sends what is no
//! request, costs the others no more than that.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use log::error;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::Shutdown;

use crate::error::Fatal;
use crate::sys::listener;

use super::again;
use super::metrics::{self, Figures};
use super::sparing::Sparing;

/// Connections at a time.
const AT_ONCE: usize = 16;

/// A request, headers and all. Prometheus sends some 300 octets.
const REQUEST: usize = 4096;

/// Its headers. Prometheus sends 6.
const HEADERS: usize = 32;

/// A connection, from its first octet to its last.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long nothing is accepted where descriptors or memory are short.
const PAUSE: Duration = Duration::from_millis(100);

/// The socket.
pub(super) fn open(address: SocketAddr) -> Result<OwnedFd, Fatal> {
    listener::open(address).map_err(|error| Fatal::Listen(address, error))
}

/// Starts the thread; `confine` is what it does first.
///
/// # Errors
/// There is none to be had.
pub(super) fn start(socket: OwnedFd, figures: Arc<Figures>, confine: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let thread = thread::Builder::new().name("metrics".to_owned());
    thread.spawn(move || {
        confine();
        if let Err(error) = again::serve("who answers for metrics", (), |()| serve(&socket, &figures), Ok) {
            error!("no metrics any more: {error}");
        }
    })?;
    Ok(())
}

fn serve(socket: &OwnedFd, figures: &Figures) -> io::Result<()> {
    let mut visitors: Vec<Visitor> = Vec::with_capacity(AT_ONCE);
    let (mut paused, mut pauses): (Option<Instant>, _) = (None, Sparing::default());
    loop {
        let now = Instant::now();
        paused = paused.filter(|until| now < *until);
        while visitors.len() < AT_ONCE && paused.is_none() {
            match listener::accept(socket) {
                Ok(Some(accepted)) => visitors.push(Visitor::new(accepted.socket, now)),
                Ok(None) => break,
                Err(error) => {
                    pauses.say(&format!("can't accept who asks for metrics: {error}"), now);
                    paused = Some(now + PAUSE);
                }
            }
        }
        pauses.tend(now);
        visitors.retain_mut(|visitor| visitor.go_on(figures, now));
        let due = visitors.iter().map(|visitor| visitor.due).chain(paused).chain(pauses.deadline()).min();
        let patience =
            due.map(|due| due.saturating_duration_since(now)).map(|time| Timespec::try_from(time).unwrap_or_default());
        let mut all: Vec<PollFd<'_>> = visitors.iter().map(Visitor::wait).collect();
        if all.len() < AT_ONCE && paused.is_none() {
            all.push(PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::IN));
        }
        match poll(&mut all, patience.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// A connection.
struct Visitor {
    socket: OwnedFd,
    heard: Vec<u8>,
    /// What it is told, once that is known, and how much of it has left.
    reply: Option<(Vec<u8>, usize)>,
    due: Instant,
}

impl Visitor {
    fn new(socket: OwnedFd, now: Instant) -> Self {
        Self { socket, heard: Vec::new(), reply: None, due: now + PATIENCE }
    }

    fn wait(&self) -> PollFd<'_> {
        let wanted = if self.reply.is_some() { PollFlags::OUT } else { PollFlags::IN };
        PollFd::from_borrowed_fd(self.socket.as_fd(), wanted)
    }

    /// Does what can be done. False: it is over.
    fn go_on(&mut self, figures: &Figures, now: Instant) -> bool {
        if now >= self.due {
            return false;
        }
        while self.reply.is_none() {
            let mut room = [0; 1024];
            match rustix::io::read(&self.socket, &mut room) {
                Ok(count) if count > 0 => self.heard.extend_from_slice(&room[..count]),
                Err(Errno::AGAIN) => return true,
                Err(Errno::INTR) => continue,
                Ok(_) | Err(_) => return false,
            }
            self.reply = answer(&self.heard, figures).map(|reply| (reply, 0));
        }
        while let Some((reply, sent)) = self.reply.as_mut().filter(|(reply, sent)| *sent < reply.len()) {
            match rustix::io::write(&self.socket, &reply[*sent..]) {
                Ok(count) => *sent += count,
                Err(Errno::AGAIN) => return true,
                Err(Errno::INTR) => {}
                Err(_) => return false,
            }
        }
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Write);
        false
    }
}

/// What a request is answered with; `None`: it is not whole.
fn answer(heard: &[u8], figures: &Figures) -> Option<Vec<u8>> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let parsed = request.parse(heard);
    let is_head = request.method == Some("HEAD");
    let path = request.path.map(|path| path.split_once('?').map_or(path, |(path, _)| path));
    let (status, body) = match (parsed, request.method, path) {
        (Ok(httparse::Status::Partial), ..) if heard.len() < REQUEST => return None,
        (Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders), ..) => {
            ("431 Request Header Fields Too Large", "too long\n".to_owned())
        }
        (Err(_), ..) => ("400 Bad Request", "no request\n".to_owned()),
        (Ok(_), Some("GET" | "HEAD"), Some("/metrics")) => ("200 OK", metrics::text(figures)),
        (Ok(_), Some("GET" | "HEAD"), Some("/healthz")) if figures.is_serving() => ("200 OK", "serving\n".to_owned()),
        (Ok(_), Some("GET" | "HEAD"), Some("/healthz")) => ("503 Service Unavailable", "not serving\n".to_owned()),
        (Ok(_), Some("GET" | "HEAD"), _) => ("404 Not Found", "/metrics, /healthz\n".to_owned()),
        (Ok(_), ..) => ("405 Method Not Allowed\r\nAllow: GET, HEAD", "GET, HEAD\n".to_owned()),
    };
    let length = body.len();
    let body = if is_head { "" } else { &body };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {length}\r\n\
         Cache-Control: no-store\r\nConnection: close\r\n\r\n"
    );
    Some([head.as_bytes(), body.as_bytes()].concat())
}
