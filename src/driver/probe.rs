//! Learning what the plaintext server says, so that a listener can put it off: one probing session at the start, a second one soon
//! after it, then one every few minutes, and one at once when a session has met another server than was learned of.
//!
//! The second probe is what finds a greeting that tells the time: from two that differ nothing is learned, and each client has a server of
//! its own from the start. A server that does not answer later leaves what is learned in force: its clients are told 421 when they want more.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use log::{debug, info, warn};
use mio::Token;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

use crate::engine::Backend;
use crate::engine::meter::Count;
use crate::engine::talk::Talk;
use crate::session::learned::{Asked, Heard, Learned, Prober as Name};
use crate::session::policy::Timeouts;
use crate::sys::child::Child;
use crate::sys::dial::{self, Target};
use crate::sys::end::End;
use crate::sys::spawner::Spawner;

use super::again;
use super::worker::variables;

/// The two that every probe is one of: TEST-NET-1 and TEST-NET-2 (RFC 5737), names that nobody has (RFC 6761 6.4).
pub(super) const NAMES: [(&str, Ipv4Addr); 2] = [
    ("probe-one.starttls-wrapper.invalid", Ipv4Addr::new(192, 0, 2, 25)),
    ("probe-two.starttls-wrapper.invalid", Ipv4Addr::new(198, 51, 100, 25)),
];

/// From the first probe to the second. More than the second that a clock in a greeting counts.
pub(super) const SECOND: Duration = Duration::from_millis(1100);

/// From one probe to the next where nothing is wrong.
const NEXT: Duration = Duration::from_secs(300);

/// From one that failed to the next, and at least between any two.
const AGAIN: Duration = Duration::from_secs(5);
const AT_LEAST: Duration = Duration::from_secs(1);

/// A failure that goes on is told so often.
const TOLD: Duration = Duration::from_secs(60);

/// What a probe came to: the server is as it was, or not, or does not answer.
pub(super) const PROBES: [&str; 3] = ["same", "changed", "failed"];

/// What is learned, for all loops.
#[derive(Debug)]
pub(super) struct Shared {
    learned: Mutex<Option<Arc<Learned>>>,
    /// Readable when somebody has doubted it.
    doubted: OwnedFd,
    /// It was the operator, who wants it learned anew whatever was found out.
    is_renewed: AtomicBool,
    /// How many probes came to each of [`PROBES`].
    pub(super) probes: [Count; PROBES.len()],
}

impl Shared {
    /// Nothing yet.
    pub(super) fn new() -> io::Result<Self> {
        let doubted = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { learned: Mutex::new(None), doubted, is_renewed: AtomicBool::new(false), probes: Default::default() })
    }

    /// What is learned at present.
    pub(super) fn get(&self) -> Option<Arc<Learned>> {
        self.learned.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, learned: Option<Learned>) {
        *self.learned.lock().unwrap_or_else(PoisonError::into_inner) = learned.map(Arc::new);
    }

    /// A session has met another server.
    pub(super) fn doubt(&self) {
        // It can't be full.
        let _ = rustix::io::write(&self.doubted, &1_u64.to_ne_bytes());
    }

    /// The operator wants the next probe at once.
    pub(super) fn renew(&self) {
        self.is_renewed.store(true, Ordering::Release);
        self.doubt();
    }

    fn take_doubt(&self) -> bool {
        rustix::io::read(&self.doubted, &mut [0; 8]).is_ok()
    }
}

impl AsFd for Shared {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.doubted.as_fd()
    }
}

/// Where the server is.
#[derive(Debug)]
pub(super) enum Server {
    /// PROG, called so in the log.
    Started(Spawner, String),
    /// A daemon.
    Daemon(Target),
}

/// How far it is certain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Certainty {
    /// One probe.
    Once,
    /// Two that agree.
    Twice,
    /// Two that do not: nothing more is asked.
    Never,
}

/// Whoever probes.
#[derive(Debug)]
pub(super) struct Prober {
    server: Server,
    /// The spawner has not answered the last probe in time: its answer is still to come, and no later probe's.
    is_owed: bool,
    times: Timeouts,
    shared: Arc<Shared>,
    certainty: Certainty,
    count: usize,
    last: Instant,
    due: Instant,
    told: Option<Instant>,
}

impl Prober {
    /// The first probe.
    ///
    /// # Errors
    /// Nothing can be learned: what is wrong with the server.
    pub(super) fn begin(server: Server, times: Timeouts, shared: Arc<Shared>) -> Result<Self, String> {
        let now = Instant::now();
        let mut prober = Self {
            server,
            is_owed: false,
            times,
            shared,
            certainty: Certainty::Once,
            count: 0,
            last: now,
            due: now + SECOND,
            told: None,
        };
        let learned = prober.learn().map_err(|why| format!("{}: {why}", prober.server.name()))?;
        prober.shared.probes[1].up();
        prober.shared.set(Some(learned));
        prober.due = Instant::now() + SECOND;
        Ok(prober)
    }

    /// Probes whenever it is time to, for as long as the process lives.
    pub(super) fn serve(self) {
        let name = self.server.name().to_string();
        let what = format!("the probes of {name}");
        // What the bug has met with may still be there.
        let anew = |prober: Self| Ok(Self { due: Instant::now() + AGAIN, ..prober });
        if let Err(error) = again::serve(&what, self, Self::run, anew) {
            warn!("{name} is not probed any more: {error}");
        }
    }

    fn run(&mut self) -> io::Result<()> {
        loop {
            let is_due = (self.certainty != Certainty::Never).then_some(self.due);
            let left = is_due.map(|due| due.saturating_duration_since(Instant::now()));
            let left = left.map(|left| Timespec::try_from(left).unwrap_or_default());
            match poll(&mut [PollFd::new(&*self.shared, PollFlags::IN)], left.as_ref()) {
                Ok(_) | Err(Errno::INTR) => self.tend(),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Probes if it is time to, or if somebody doubts.
    fn tend(&mut self) {
        let is_doubted = self.shared.take_doubt();
        if self.shared.is_renewed.swap(false, Ordering::Acquire) {
            self.due = Instant::now();
            if self.certainty == Certainty::Never {
                self.certainty = Certainty::Once;
            }
        } else if is_doubted {
            self.due = self.due.min(self.last + AT_LEAST);
        }
        if self.certainty == Certainty::Never || Instant::now() < self.due {
            return;
        }
        let outcome = self.learn();
        let now = Instant::now();
        self.last = now;
        let found = match outcome {
            Ok(found) => found,
            Err(why) => {
                self.due = now + AGAIN;
                return self.say_unreached(&why, now);
            }
        };
        self.told = None;
        let known = self.shared.get();
        match (known.as_ref().map(|learned| learned.agrees(&found)), self.certainty) {
            (Some(Ok(())), _) => {
                self.shared.probes[0].up();
                if self.certainty == Certainty::Once {
                    info!("{} is started when a client needs it, and not before", self.server.name());
                }
                self.certainty = Certainty::Twice;
                self.due = now + NEXT;
            }
            (Some(Err(why)), Certainty::Once) => {
                self.shared.probes[1].up();
                warn!("{}: {why}: every client gets one of its own from the start (--lazy is off)", self.server.name());
                self.certainty = Certainty::Never;
                self.shared.set(None);
            }
            (Some(Err(_)) | None, _) => {
                self.shared.probes[1].up();
                info!("{} has changed: learned anew", self.server.name());
                self.shared.set(Some(found));
                self.certainty = Certainty::Once;
                self.due = now + SECOND;
            }
        }
    }

    fn say_unreached(&mut self, why: &str, now: Instant) {
        self.shared.probes[2].up();
        if self.told.is_none_or(|told| now >= told + TOLD) {
            self.told = Some(now);
            warn!("{}: {why}: who needs it hears 421", self.server.name());
        }
    }

    /// What one probing session learns. One that is not greeted with 220 has failed.
    fn learn(&mut self) -> Result<Learned, String> {
        let (heard, name) = self.probe()?;
        Learned::from_probe(&heard, name)
    }

    /// One probing session.
    fn probe(&mut self) -> Result<(Heard, Name<'static>), String> {
        let (name, address) = NAMES[self.count % NAMES.len()];
        self.count += 1;
        let patience = self.times.dial;
        let heard = match &self.server {
            Server::Started(spawner, _) => {
                let local = SocketAddr::from((Ipv4Addr::LOCALHOST, 25));
                if self.is_owed {
                    // It was started for the other address. Dropped, it ends.
                    drop(answer(spawner, patience)?);
                    self.is_owed = false;
                }
                let asked = spawner.ask(variables([SocketAddr::from((address, 25)), local]));
                asked.map_err(|error| format!("the spawner is lost: {error}"))?;
                self.is_owed = true;
                let child = answer(spawner, patience)?;
                self.is_owed = false;
                probe_child(child?, name, self.times)?
            }
            Server::Daemon(target) => probe_daemon(target, name, self.times)?,
        };
        // A daemon sees us, for every client.
        let address = matches!(self.server, Server::Started(..)).then_some(IpAddr::V4(address));
        debug!("{} was probed", self.server.name());
        Ok((heard, Name { name, address }))
    }
}

impl Server {
    fn name(&self) -> &dyn core::fmt::Display {
        match self {
            Self::Started(_, name) => name,
            Self::Daemon(target) => &target.place,
        }
    }
}

/// The next answer: PROG, or why it can't be started. An error: none has come.
fn answer(spawner: &Spawner, patience: Duration) -> Result<Result<Child, String>, String> {
    let due = Instant::now() + patience;
    loop {
        match spawner.answer() {
            Ok(Some(child)) => return Ok(child),
            Ok(None) => {}
            Err(error) => return Err(format!("the spawner is lost: {error}")),
        }
        let left = due.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err("it is not started in time".to_owned());
        }
        wait(spawner, PollFlags::IN, left).map_err(|error| error.to_string())?;
    }
}

/// Probes a PROG that was started for it, and sees to its end.
pub(super) fn probe_child(mut child: Child, name: &str, times: Timeouts) -> Result<Heard, String> {
    let pipe = |end: Option<OwnedFd>| end.map(|end| End::pipe(end, Token(0))).transpose();
    let ends = || Ok::<_, io::Error>((pipe(child.stdout.take())?, pipe(child.stdin.take())?));
    let (from, to) = {
        let mut ends = ends;
        ends().map_err(|error| error.to_string())?
    };
    let from = from.ok_or("it has no stdout")?;
    let mut talk = Talk::new(Backend::child(from, to));
    let heard = hear(&mut talk, name, times);
    talk.close();
    if let Ok(exit) = child.exit_event() {
        let _ = wait(&exit, PollFlags::IN, times.farewell);
    }
    // Who stays is killed when it is dropped.
    let _ = child.try_reap();
    heard
}

fn probe_daemon(target: &Target, name: &str, times: Timeouts) -> Result<Heard, String> {
    let mut why = "it has no usable address".to_owned();
    for address in target.usable(target.literal().unwrap_or_default()) {
        let connected = target.begin(&address).and_then(|socket| {
            wait(&socket, PollFlags::OUT, times.dial)?;
            dial::finish(&socket).map(|()| socket)
        });
        match connected {
            Ok(socket) => {
                let mut talk = Talk::new(Backend::socket(End::socket(socket, Token(0))));
                let heard = hear(&mut talk, name, times);
                talk.close();
                return heard;
            }
            Err(error) => why = format!("{address}: {error}"),
        }
    }
    Err(why)
}

/// What it answers, command by command.
fn hear(talk: &mut Talk, name: &str, times: Timeouts) -> Result<Heard, String> {
    let mut heard = Heard::default();
    for asked in Asked::ALL {
        let reply = match asked.line(name) {
            None => talk.hear(times.greeting)?,
            Some(line) => talk.ask(&line, times.replay)?,
        };
        heard.note(asked, reply.octets());
        if asked == Asked::Greeting && !reply.code.is(b"220") {
            break;
        }
    }
    Ok(heard)
}

fn wait(end: impl AsFd, wanted: PollFlags, patience: Duration) -> io::Result<()> {
    let patience = Timespec::try_from(patience).unwrap_or_default();
    match poll(&mut [PollFd::new(&end, wanted)], Some(&patience))? {
        0 => Err(io::Error::new(io::ErrorKind::TimedOut, "no answer")),
        _ => Ok(()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Write;
    use std::net::TcpListener;

    use super::*;
    use crate::sys::dial::Place;

    #[test]
    fn a_daemon_is_found_at_the_second_of_its_addresses() {
        let daemon = TcpListener::bind("127.0.0.1:0").unwrap();
        // No port can be listened at that has the number 0.
        let found = vec!["127.0.0.1:0".parse().unwrap(), daemon.local_addr().unwrap()];
        let target = Target { place: Place::Found("two".to_owned(), found), source: None, loopback_only: false };
        let refuses = std::thread::spawn(move || daemon.accept().unwrap().0.write_all(b"554 here\r\n"));
        let heard = probe_daemon(&target, "p.invalid", Timeouts::default()).unwrap();
        refuses.join().unwrap().unwrap();
        assert_eq!(Learned::from_probe(&heard, Name { name: "", address: None }).unwrap_err(), "it greeted with 554");
    }

    #[test]
    fn an_answer_that_comes_too_late_is_no_later_probes() {
        let (spawner, other) = Spawner::played().unwrap();
        let say = |why: &str| rustix::io::write(&other, &[&[0; 4], why.as_bytes()].concat()).unwrap();
        let now = Instant::now();
        let mut prober = Prober {
            server: Server::Started(spawner, "nobody".to_owned()),
            is_owed: false,
            times: Timeouts { dial: Duration::from_millis(10), ..Timeouts::default() },
            shared: Arc::new(Shared::new().unwrap()),
            certainty: Certainty::Twice,
            count: 0,
            last: now,
            due: now,
            told: None,
        };
        assert_eq!([(); 2].map(|()| prober.probe().unwrap_err()), ["no answer"; 2]);
        let mut request = [0; 1024];
        rustix::io::read(&other, &mut request).unwrap();
        assert_eq!(rustix::io::read(&other, &mut request), Err(Errno::AGAIN), "one is asked for at a time");
        say("the late one");
        say("the next one");
        assert_eq!(prober.probe().unwrap_err(), "the next one");
        say("the third");
        assert_eq!(prober.probe().unwrap_err(), "the third", "nothing is owed any more");
    }
}
