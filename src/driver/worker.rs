//! One loop of a listener: accepts, has a PROG started for each client, and drives their sessions. It shares nothing with the others
//! but how many sessions there are.
//!
//! A client's session begins when its PROG is there: until then it waits here, unread. Who can't be served hears 421 at once, for
//! the price of an accept and a write.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use log::{error, warn};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};

use crate::client_info::ClientInfo;
use crate::engine::{CLIENT_IN, CLIENT_OUT, Crowd, OTHERS, Parts, Secrets, Setups};
use crate::proxy::{Header, Version};
use crate::session::policy::RelayMode;
use crate::session::{ChildEnd, EndReason, Policy};
use crate::smtp::reply::Ours;
use crate::sys::child::Child;
use crate::sys::dial::Target;
use crate::sys::end::End;
use crate::sys::listener::{self, Accepted};
use crate::sys::spawner::Spawner;

/// What all loops of a listener serve by.
#[derive(Debug)]
pub(super) struct House {
    pub(super) policy: Arc<Policy>,
    pub(super) setups: Option<Setups>,
    pub(super) target: Option<Target>,
    pub(super) send_proxy: Option<Version>,
    pub(super) relay: RelayMode,
    /// PROG, for the log.
    pub(super) program: String,
    /// Sessions, and how many there may be.
    pub(super) sessions: AtomicUsize,
    pub(super) most: usize,
}

const SPAWNER: Token = Token(0);
const STOP: Token = Token(1);
/// The listening sockets are called from here on.
const LISTENERS: usize = 2;

/// Connections taken before the sessions have their turn.
const AT_ONCE: usize = 64;

/// PROGs that the spawner is asked for at a time: what its socket holds, many times over.
const ORDERED: usize = 64;

/// How long a client waits for its PROG.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long nothing is accepted where descriptors or memory are short.
const PAUSE: Duration = Duration::from_millis(100);

/// A client whose PROG is not there yet.
struct Waiting {
    client: Accepted,
    since: Instant,
}

/// One loop.
pub(super) struct Worker {
    house: Arc<House>,
    poll: Poll,
    listeners: Vec<(OwnedFd, bool)>,
    /// Kept open: the loop watches it.
    _stop: OwnedFd,
    spawner: Spawner,
    /// The first `ordered` of them have asked.
    waiting: VecDeque<Waiting>,
    ordered: usize,
    crowd: Crowd,
    paused: Option<Instant>,
    is_ending: bool,
    is_lost: bool,
}

impl Worker {
    /// Puts it together. `stop` becomes readable when it is to end.
    pub(super) fn new(house: Arc<House>, sockets: Vec<OwnedFd>, stop: OwnedFd, spawner: Spawner) -> io::Result<Self> {
        let poll = Poll::new()?;
        let watch =
            |descriptor: i32, token| poll.registry().register(&mut SourceFd(&descriptor), token, Interest::READABLE);
        for (number, socket) in sockets.iter().enumerate() {
            watch(socket.as_raw_fd(), Token(LISTENERS + number))?;
        }
        watch(stop.as_raw_fd(), STOP)?;
        watch(std::os::fd::AsFd::as_fd(&spawner).as_raw_fd(), SPAWNER)?;
        Ok(Self {
            house,
            poll,
            listeners: sockets.into_iter().map(|socket| (socket, false)).collect(),
            _stop: stop,
            spawner,
            waiting: VecDeque::new(),
            ordered: 0,
            crowd: Crowd::default(),
            paused: None,
            is_ending: false,
            is_lost: false,
        })
    }

    /// Serves until it is told to end, and all sessions have ended.
    ///
    /// # Errors
    /// It can't wait any more.
    pub(super) fn run(&mut self) -> io::Result<()> {
        let mut events = Events::with_capacity(1024);
        loop {
            let now = Instant::now();
            let accepted = self.accept(now);
            self.take_answers(now);
            self.look_at_the_spawner(now);
            let before = self.crowd.len();
            let wait = self.crowd.drive(self.poll.registry(), now);
            self.house.sessions.fetch_sub(before - self.crowd.len(), Ordering::Relaxed);
            if self.is_ending && self.crowd.is_empty() && self.waiting.is_empty() {
                return if self.is_lost { Err(io::Error::other("the spawner is lost")) } else { Ok(()) };
            }
            let until = |due: Instant| due.saturating_duration_since(now);
            let first = self.waiting.front().map(|waiting| until(waiting.since + PATIENCE));
            let again = accepted.then_some(Duration::ZERO);
            let timeout = [wait, first, again, self.paused.map(until)].into_iter().flatten().min();
            match self.poll.poll(&mut events, timeout) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
            for event in &events {
                match event.token() {
                    SPAWNER if event.is_read_closed() => self.lose_spawner(&io::ErrorKind::UnexpectedEof.into()),
                    SPAWNER => {}
                    STOP => self.end(),
                    Token(number) if number < OTHERS => {
                        if let Some((_, is_ready)) = self.listeners.get_mut(number - LISTENERS) {
                            *is_ready = true;
                        }
                    }
                    _ => self.crowd.note(event),
                }
            }
        }
    }

    /// Takes connections, some at a time. True: there may be more.
    fn accept(&mut self, now: Instant) -> bool {
        if self.paused.is_some_and(|until| now < until) {
            return false;
        }
        self.paused = None;
        for at in 0..self.listeners.len() {
            let mut left = AT_ONCE;
            while let Some((listener, is_ready)) = self.listeners.get_mut(at).filter(|(_, is_ready)| *is_ready) {
                if left == 0 {
                    return true;
                }
                left -= 1;
                match listener::accept(&*listener) {
                    Ok(Some(client)) => self.admit(client, now),
                    Ok(None) => *is_ready = false,
                    Err(error) => {
                        warn!("can't accept for {} ms: {error}", PAUSE.as_millis());
                        self.paused = Some(now + PAUSE);
                        return false;
                    }
                }
            }
        }
        false
    }

    fn admit(&mut self, client: Accepted, now: Instant) {
        if self.house.sessions.fetch_add(1, Ordering::Relaxed) >= self.house.most {
            self.turn_away(&client, Ours::TOO_MANY_SESSIONS, "too many sessions");
            return;
        }
        self.waiting.push_back(Waiting { client, since: now });
        self.order();
    }

    /// Asks for PROGs, as many as may be asked for at a time.
    fn order(&mut self) {
        while self.ordered < ORDERED
            && let Some(waiting) = self.waiting.get(self.ordered)
        {
            let [client, local] = waiting.client.ends;
            let variables = [
                ("PROTO", "TCP".to_owned()),
                ("TCPREMOTEIP", client.ip().to_canonical().to_string()),
                ("TCPREMOTEPORT", client.port().to_string()),
                ("TCPLOCALIP", local.ip().to_canonical().to_string()),
                ("TCPLOCALPORT", local.port().to_string()),
            ];
            if let Err(error) = self.spawner.ask(variables.into_iter()) {
                self.lose_spawner(&error);
                return;
            }
            self.ordered += 1;
        }
    }

    /// Has the sessions begin whose PROGs have come.
    fn take_answers(&mut self, now: Instant) {
        while self.ordered > 0 {
            match self.spawner.answer() {
                Ok(None) => return,
                Ok(Some(child)) => {
                    self.ordered -= 1;
                    if let Some(waiting) = self.waiting.pop_front() {
                        self.begin(waiting, child, now);
                    }
                    self.order();
                }
                Err(error) => self.lose_spawner(&error),
            }
        }
    }

    fn begin(&mut self, waiting: Waiting, child: Result<Child, String>, now: Instant) {
        let (house, [client, local]) = (&self.house, waiting.client.ends);
        let output = End::socket(waiting.client.socket, CLIENT_OUT);
        let child = child.map_err(|why| EndReason::Child(ChildEnd::NotStarted(format!("{}: {why}", house.program))));
        let input = match output.again(CLIENT_IN) {
            Ok(input) => input,
            Err(error) => return self.give_back(&format!("can't serve {client}: {error}")),
        };
        let way = house.policy.way;
        let parts = Parts {
            client: (input, output),
            child,
            holder: None,
            tls_server: None,
            info: ClientInfo::from(client),
            policy: house.policy.clone(),
            target: house.target.clone(),
            proxy: house.send_proxy.map(|version| Some(Header { version, client, local, tls: way.ends_tls() })),
            secrets: Secrets { identity: None, peer: None },
            setups: house.setups.clone(),
            relay: house.relay,
            terminations: None,
            started: now,
        };
        self.crowd.join(parts, self.poll.registry());
    }

    /// A spawner that does not answer is as good as gone.
    fn look_at_the_spawner(&mut self, now: Instant) {
        if self.ordered > 0 && self.waiting.front().is_some_and(|waiting| now >= waiting.since + PATIENCE) {
            self.lose_spawner(&io::ErrorKind::TimedOut.into());
        }
    }

    /// Without it nobody can be served: all is brought to an end, and the supervisor starts us anew.
    fn lose_spawner(&mut self, error: &io::Error) {
        error!("the spawner of {} is lost: {error}", self.house.program);
        self.is_lost = true;
        self.ordered = 0;
        self.end();
        for waiting in core::mem::take(&mut self.waiting) {
            self.turn_away(&waiting.client, Ours::NOT_AVAILABLE, "no server can be started");
        }
    }

    /// The last word to one who is not served. What its socket does not take at once is lost.
    fn turn_away(&self, client: &Accepted, reply: Ours, why: &str) {
        let _ = rustix::io::write(&client.socket, reply.octets());
        self.give_back(&format!("client={}: {why}", ClientInfo::from(client.ends[0])));
    }

    /// A place is free again.
    fn give_back(&self, why: &str) {
        self.house.sessions.fetch_sub(1, Ordering::Relaxed);
        warn!("{why}");
    }

    fn end(&mut self) {
        if !core::mem::replace(&mut self.is_ending, true) {
            self.listeners.clear();
            self.crowd.terminate(Instant::now());
            for waiting in self.waiting.split_off(self.ordered) {
                self.turn_away(&waiting.client, Ours::SHUTTING_DOWN, "not served any more");
            }
        }
    }
}
