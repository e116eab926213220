//! The steps of an ordinary session, and every phase that a session can be brought to and left in.

use std::net::{SocketAddr, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use starttls_wrapper::session::Way;

use crate::child::Child;
use crate::door::{Door, Start, tls_client};
use crate::stream::wait_until;
use crate::wire::{End, PATIENCE};

/// A state of the session that lasts until somebody does something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum At {
    /// The child has not greeted.
    Ungreeted,
    /// EHLO is answered.
    Snoop,
    /// The client has sent half a line.
    HalfLine,
    /// The child owes a reply.
    Owed,
    /// The backend's host does not answer the dial.
    Dial,
    /// The backend has accepted, and says nothing.
    BackendHandshake,
    /// The backend's TLS stands, and it does not greet.
    Greeting,
    /// The backend does not answer the replayed EHLO.
    Replay,
    /// The 220 is out.
    ClientHandshake,
    /// The client's TLS stands, and it has not said EHLO.
    Gate,
    /// Client and child, after MAIL.
    RelayPlain,
    /// Client and backend, after MAIL.
    RelayTls,
}

impl At {
    /// All of them.
    pub(crate) const ALL: [Self; 12] = [
        Self::Ungreeted,
        Self::Snoop,
        Self::HalfLine,
        Self::Owed,
        Self::Dial,
        Self::BackendHandshake,
        Self::Greeting,
        Self::Replay,
        Self::ClientHandshake,
        Self::Gate,
        Self::RelayPlain,
        Self::RelayTls,
    ];

    /// All of them that a way has.
    pub(crate) fn of(way: Way) -> Vec<(Way, Self)> {
        let has = |at: &Self| match at {
            // Its client has been greeted elsewhere.
            Self::Ungreeted | Self::Snoop | Self::HalfLine | Self::Owed | Self::RelayPlain => way != Way::Mute,
            Self::Dial => way.dials(),
            Self::BackendHandshake => way.secures_host(),
            Self::Greeting => !way.keeps() && way != Way::Raw,
            Self::ClientHandshake => !matches!(way, Way::Raw | Way::Mute),
            // Behind the 220 it is between client and HOST.
            Self::Replay | Self::Gate | Self::RelayTls => way != Way::Raw,
        };
        Self::ALL.into_iter().filter(has).map(|at| (way, at)).collect()
    }

    /// All of them that each way has.
    pub(crate) fn everywhere() -> Vec<(Way, Self)> {
        Way::EVERY.into_iter().flat_map(Self::of).collect()
    }

    /// Whether the client's TLS stands.
    pub(crate) fn is_secure(self, way: Way) -> bool {
        matches!(self, Self::Gate | Self::RelayTls) || self.is_late(way)
    }

    /// Whether the 220 is out.
    pub(crate) fn is_announced(self, way: Way) -> bool {
        self == Self::ClientHandshake || self.is_secure(way)
    }

    /// Whether it is a step towards the server behind TLS, inside TLS.
    pub(crate) fn is_late(self, way: Way) -> bool {
        let is_late = way.respawns() || way.is_late() || way == Way::Mute;
        is_late && matches!(self, Self::BackendHandshake | Self::Greeting | Self::Replay)
    }

    /// Whether the client's TLS stands, and is somebody else's: to us any end of it is an end.
    pub(crate) fn is_in_their_tls(self, way: Way) -> bool {
        self.is_secure(way) && !way.ends_tls()
    }

    /// Whether the backend's connection stands.
    pub(crate) fn has_backend(self, way: Way) -> bool {
        matches!(self, Self::BackendHandshake | Self::Greeting | Self::Replay) || self.is_announced(way)
    }

    /// Whether a failure is answered 454 and the plaintext session goes on.
    pub(crate) fn is_handover(self, way: Way) -> bool {
        matches!(self, Self::Dial | Self::BackendHandshake | Self::Greeting | Self::Replay) && !self.is_late(way)
    }
}

/// A session that stands somewhere.
pub(crate) struct Standing {
    pub(crate) child: Child,
    pub(crate) door: Door,
    /// When the last thing was brought about: no timer that runs now has begun before.
    pub(crate) since: Instant,
    way: Way,
    _full: Vec<TcpStream>,
}

impl Standing {
    /// Starts the program and brings it there. A child that was dismissed has ended.
    pub(crate) fn at(at: At, start: &Start<'_>) -> Self {
        let mut door = Door::open(start);
        let child = Child::accept(&door.puppets).unwrap_or_else(|why| panic!("{at:?}: {why}: {}", door.said()));
        let full = if at == At::Dial { door.backend.listen_but_never_accept() } else { Vec::new() };
        let mut standing = Self { child, door, since: Instant::now(), way: start.way, _full: full };
        standing.go(at).unwrap_or_else(|why| panic!("{at:?}: {why}\nstderr: {}", standing.door.said()));
        standing
    }

    fn go(&mut self, at: At) -> Result<(), String> {
        let (door, child) = (&mut self.door, &mut self.child);
        // Before that a signal has its default effect.
        if !wait_until(PATIENCE, || door.reads_signals()) {
            return Err("it never waits for signals".to_owned());
        }
        if at == At::Ungreeted {
            return Ok(());
        }
        if self.way == Way::Mute {
            return self.go_on_behind_the_220(at);
        }
        if !matches!(at, At::Snoop | At::Dial) {
            door.backend.listen();
        }
        self.since = Instant::now();
        greet(door, child)?;
        let client = door.client.as_mut().ok_or("no client")?;
        match at {
            At::Ungreeted | At::Snoop => return Ok(()),
            At::HalfLine => {
                client.send(b"NOO");
                return Ok(());
            }
            At::Owed => {
                client.send(b"NOOP\r\n");
                return child.get(b"NOOP\r\n");
            }
            At::RelayPlain => {
                client.send(b"MAIL FROM:<>\r\n");
                child.get(b"MAIL FROM:<>\r\n")?;
                self.since = Instant::now();
                child.send(b"250 2.1.0 Ok\r\n");
                return client.get(b"250 2.1.0 Ok\r\n");
            }
            _ => {
                self.since = Instant::now();
                client.send(b"STARTTLS\r\n");
            }
        }
        match at {
            At::Dial => return Ok(()),
            At::BackendHandshake if !at.is_late(self.way) => return door.backend.accept_only(),
            At::Greeting if !at.is_late(self.way) => return door.backend.wire().map(|_| ()),
            _ => {}
        }
        match self.way {
            Way::Tls | Way::Plain => {
                let backend = door.backend.wire()?;
                self.since = Instant::now();
                backend.send(b"220 secure.example ESMTP\r\n");
                backend.get(b"EHLO client.example\r\n")?;
            }
            Way::Keep | Way::UcspiTls => child.get(b"RSET\r\n")?,
            Way::TlsLate | Way::PlainLate => door.backend.accept_only()?,
            Way::Respawn | Way::UcspiRespawn | Way::Raw | Way::Mute => {}
        }
        if at == At::Replay && !at.is_late(self.way) {
            return Ok(());
        }
        if !At::Replay.is_late(self.way) {
            self.since = Instant::now();
            self.behind_says(b"250 secure.example\r\n")?;
        }
        let (door, child) = (&mut self.door, &mut self.child);
        let client = door.client.as_mut().ok_or("no client")?;
        client.get(b"220 2.0.0 Ready to start TLS\r\n")?;
        if !self.way.keeps() {
            child.get(b"QUIT\r\n")?;
            child.exit(0);
        }
        if at == At::ClientHandshake {
            return Ok(());
        }
        self.since = Instant::now();
        client.secure(tls_client())?;
        self.go_on_behind_the_220(at)
    }

    /// From where the client's TLS stands.
    pub(crate) fn go_on_behind_the_220(&mut self, at: At) -> Result<(), String> {
        if At::Replay.is_late(self.way) && self.come_to_the_server(at)? {
            return Ok(());
        }
        // Only its reply shows that our side of the handshake has arrived too.
        self.ask_behind("NOOP\r\n", "250 Ok\r\n")?;
        if at == At::Gate {
            return Ok(());
        }
        for (command, reply) in
            [("EHLO client.example\r\n", "250 secure.example\r\n"), ("MAIL FROM:<>\r\n", "250 Ok\r\n")]
        {
            self.ask_behind(command, reply)?;
        }
        Ok(())
    }

    /// From the client's handshake to the gate, where a server is come to there. Whether the session stands where it is to.
    fn come_to_the_server(&mut self, at: At) -> Result<bool, String> {
        if self.way == Way::Mute {
            // It is there from the start.
        } else if self.way.respawns() {
            self.door.fresh()?;
        } else if at == At::BackendHandshake {
            return self.door.backend.held().proxy_header().map(|_| true);
        } else {
            self.since = Instant::now();
            self.door.backend.be_told()?;
        }
        if at == At::Greeting {
            return Ok(true);
        }
        self.since = Instant::now();
        self.behind_says(b"220 secure.example ESMTP\r\n")?;
        self.behind_gets(b"EHLO client.example\r\n")?;
        if at == At::Replay {
            return Ok(true);
        }
        self.behind_says(b"250 secure.example\r\n").map(|()| false)
    }

    /// What the server behind TLS says.
    pub(crate) fn behind_says(&mut self, octets: &[u8]) -> Result<(), String> {
        match self.way {
            Way::Tls | Way::Plain | Way::Raw | Way::TlsLate | Way::PlainLate => self.door.backend.wire()?.send(octets),
            Way::Keep | Way::UcspiTls | Way::Mute => self.child.send(octets),
            Way::Respawn | Way::UcspiRespawn => self.door.fresh()?.send(octets),
        }
        Ok(())
    }

    /// What it must get next.
    pub(crate) fn behind_gets(&mut self, octets: &[u8]) -> Result<(), String> {
        match self.way {
            Way::Tls | Way::Plain | Way::Raw | Way::TlsLate | Way::PlainLate => self.door.backend.wire()?.get(octets),
            Way::Keep | Way::UcspiTls | Way::Mute => self.child.get(octets),
            Way::Respawn | Way::UcspiRespawn => self.door.fresh()?.get(octets),
        }
    }

    /// One command and its reply between the client, in TLS, and the server behind.
    pub(crate) fn ask_behind(&mut self, command: &str, reply: &str) -> Result<(), String> {
        self.door.client.as_mut().ok_or("no client")?.send(command.as_bytes());
        self.behind_gets(command.as_bytes())?;
        self.since = Instant::now();
        self.behind_says(reply.as_bytes())?;
        self.door.client.as_mut().ok_or("no client")?.get(reply.as_bytes())
    }

    /// Whether the child was dismissed when the session came to where it stands.
    pub(crate) fn is_dismissed(&self, at: At) -> bool {
        at.is_announced(self.way) && !self.way.keeps() && self.way != Way::Mute
    }

    /// The backend, where there is one, sees an end; in TLS and behind the 220 none that is clean. The end that the client of
    /// a child knows is the end of its input, which says nothing.
    pub(crate) fn backend_sees_an_abort(&mut self, at: At) {
        if at.has_backend(self.way) && self.way.dials() {
            let (octets, end) = self.door.backend.held().rest().unwrap_or_else(|why| panic!("backend: {why}"));
            // Behind a late header comes a ClientHello; before it nothing.
            let is_secure = self.way.secures_host() && (!self.way.is_late() || at.is_secure(self.way));
            if at.is_announced(self.way) && at != At::BackendHandshake {
                assert_eq!(octets, b"");
                assert!(!is_secure || end != End::Clean, "the backend takes an abort for a clean end");
            }
        }
    }

    /// The client closes, the child ends when its input has: what remains is the program's own end. Its exit code; and
    /// the child is gone from the process table.
    pub(crate) fn close(mut self) -> i32 {
        drop(self.door.client.take());
        for child in [Some(&mut self.child), self.door.fresh.as_mut()].into_iter().flatten() {
            let _ = child.rest();
            child.exit(0);
        }
        let code = self.door.code();
        self.must_be_gone();
        code
    }

    /// The child is not even a zombie.
    pub(crate) fn must_be_gone(&self) {
        for child in [Some(&self.child), self.door.fresh.as_ref()].into_iter().flatten() {
            let gone = child.is_gone(PATIENCE);
            assert!(gone, "the child {} is still there; stderr: {}", child.report.pid, self.door.said());
        }
    }
}

/// The child that is behind TLS, where it is one.
pub(crate) fn child_behind<'a>(way: Way, door: &'a mut Door, child: &'a mut Child) -> Option<&'a mut Child> {
    match way {
        Way::Tls | Way::Plain | Way::Raw | Way::TlsLate | Way::PlainLate => None,
        Way::Keep | Way::UcspiTls | Way::Mute => Some(child),
        Way::Respawn | Way::UcspiRespawn => door.fresh.as_mut(),
    }
}

/// Greeting and EHLO.
pub(crate) fn greet(door: &mut Door, child: &mut Child) -> Result<(), String> {
    child.send(b"220 mail.example ESMTP\r\n");
    let client = door.client.as_mut().ok_or("no client")?;
    client.get(b"220 mail.example ESMTP\r\n")?;
    client.send(b"EHLO client.example\r\n");
    child.get(b"EHLO client.example\r\n")?;
    child.send(b"250 mail.example\r\n");
    client.get(b"250-mail.example\r\n250 STARTTLS\r\n")
}

/// One command and its reply between client and child.
pub(crate) fn ask_child(door: &mut Door, child: &mut Child, command: &str, reply: &str) -> Result<(), String> {
    let client = door.client.as_mut().ok_or("no client")?;
    client.send(command.as_bytes());
    child.get(command.as_bytes())?;
    child.send(reply.as_bytes());
    client.get(reply.as_bytes())
}

/// How many cases [`all_of`] has at once: each is some processes.
const AT_ONCE: usize = 24;

/// Many cases at once, since most of their time is waiting; each failure is told with its case.
pub(crate) fn all_of<T: std::fmt::Debug + Sync>(cases: &[T], case: impl Fn(&T) + Sync) {
    let (next, failed) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let work = || {
        while let Some(one) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(why) = catch_unwind(AssertUnwindSafe(|| case(one))) {
                failed.lock().unwrap().push(format!("{:.200}: {}", format!("{one:?}"), words(&*why)));
            }
        }
    };
    std::thread::scope(|scope| (0..AT_ONCE.min(cases.len())).for_each(|_| drop(scope.spawn(work))));
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "{} of {} cases failed:\n{}", failed.len(), cases.len(), failed.join("\n"));
}

fn words(why: &(dyn std::any::Any + Send)) -> &str {
    why.downcast_ref::<String>().map(String::as_str).or_else(|| why.downcast_ref::<&str>().copied()).unwrap_or("panic")
}

/// A listener whose queue is full drops what comes: connections that fill it.
pub(crate) fn fill(address: SocketAddr) -> Vec<TcpStream> {
    let mut held = Vec::new();
    while let Ok(connection) = TcpStream::connect_timeout(&address, Duration::from_millis(100)) {
        held.push(connection);
        assert!(held.len() < 64, "the queue is never full");
    }
    held
}
