//! One loop of a listener: accepts, has a PROG started for each client, and drives their sessions. It shares with the others
//! the places that sessions take, and what a session begins by: the TLS set-up and what was learned of the plaintext server.
//!
//! A client's session begins at once, and says when it wants its plaintext server. Who can't be served hears 421, for the
//! price of an accept and a write.
//!
//! The end comes in one step or two: [`Stage::Drain`], nobody new; [`Stage::End`], nobody at all.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use log::error;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};

use crate::cli::Network;
use crate::client_info::ClientInfo;
use crate::engine::meter::{Meter, Refused};
use crate::engine::{Asking, CLIENT_IN, Crowd, Ends, Front, OTHERS, Parts, Source};
use crate::proxy::{Header, Version};
use crate::session::policy::RelayMode;
use crate::session::{Policy, StandIn};
use crate::smtp::reply::Ours;
use crate::sys::dial::Target;
use crate::sys::end::End;
use crate::sys::listener::{self, Accepted, Listening};
use crate::sys::spawner::{self, Spawner};

use super::addresses::Refusal;
use super::admission::{Admission, Place};
use super::lobby::{self, Lobby};
use super::probe::Shared;
use super::renewal::Current;
use super::sparing::Sparing;

/// What all loops of a listener serve by.
#[derive(Debug)]
pub(super) struct House {
    pub(super) policy: Arc<Policy>,
    /// The same for a session without a usable certificate.
    pub(super) bare: Arc<Policy>,
    /// Both where places are scarce.
    pub(super) brief: [Arc<Policy>; 2],
    pub(super) setups: Arc<Current>,
    pub(super) target: Option<Arc<Target>>,
    pub(super) send_proxy: Option<Version>,
    pub(super) relay: RelayMode,
    /// Where the plaintext server is, if it is none that is started.
    pub(super) plain: Option<Arc<Target>>,
    /// What is said in its place as long as it need not be there.
    pub(super) learned: Arc<Shared>,
    /// PROG, for the log.
    pub(super) program: String,
    pub(super) admission: Arc<Admission>,
    /// Who may say, and must, whose connection it is.
    pub(super) proxies: Option<Vec<Network>>,
    /// The present [`Stage`].
    pub(super) stage: Arc<AtomicU8>,
}

/// What the loops are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Stage {
    /// Serve all who come.
    Serve,
    /// Serve nobody new.
    Drain,
    /// Tell everybody that it is over.
    End,
}

const SPAWNER: Token = Token(0);
const STOP: Token = Token(1);
/// The listening sockets are called from here on.
const LISTENERS: usize = 2;

/// Connections taken before the sessions have their turn.
const AT_ONCE: usize = 64;

/// PROGs that the spawner is asked for at a time: what its socket holds, many times over.
const ORDERED: usize = 64;

/// How long the spawner may take for a PROG.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long nothing is accepted from a socket where descriptors or memory are short, or it is of no use any more.
const PAUSE: Duration = Duration::from_millis(100);

/// How often it is said what the plaintext server does wrong, which goes on until somebody mends it.
const FAILED: Duration = Duration::from_secs(60);

/// One loop.
pub(super) struct Worker {
    house: Arc<House>,
    poll: Poll,
    ears: Vec<Ear>,
    /// Readable when the stage has changed.
    pub(super) stop: OwnedFd,
    /// Who starts PROG, where it is one that is started.
    spawner: Option<Spawner>,
    /// Whom the spawner is to answer, in turn, and since when.
    ordered: VecDeque<(Option<Asking>, Instant)>,
    crowd: Crowd<Place>,
    lobby: Lobby,
    /// What is said of those who are over a limit, and of those without a PROXY header that counts: neither hides the other.
    refusals: Sparing,
    strangers: Sparing,
    /// And of sockets that nobody can be accepted from.
    pauses: Sparing,
    /// And of sessions that their plaintext server has failed.
    failed: Sparing,
    pub(super) meter: Arc<Meter>,
    /// Nobody new but these, who may be in a queue that goes with its socket.
    promised: Option<usize>,
    is_ending: bool,
    is_lost: bool,
    /// Has the loop panic.
    #[cfg(test)]
    pub(super) bug: Arc<std::sync::atomic::AtomicBool>,
}

/// A socket that listens, and what the loop knows of it.
struct Ear {
    listening: Listening,
    token: Token,
    is_ready: bool,
    /// Nobody is taken from it until then.
    paused: Option<Instant>,
}

impl Worker {
    /// Puts it together. `stop` becomes readable when it is to end.
    pub(super) fn new(
        house: Arc<House>,
        sockets: Vec<Listening>,
        stop: OwnedFd,
        spawner: Option<Spawner>,
        meter: Arc<Meter>,
    ) -> io::Result<Self> {
        let poll = Poll::new()?;
        let watch =
            |descriptor: i32, token| poll.registry().register(&mut SourceFd(&descriptor), token, Interest::READABLE);
        let ears = sockets.into_iter().enumerate();
        let ear =
            |(number, listening)| Ear { listening, token: Token(LISTENERS + number), is_ready: false, paused: None };
        let ears: Vec<Ear> = ears.map(ear).collect();
        for ear in &ears {
            listener::hurry(&ear.listening.socket);
            listener::watch(&ear.listening, ear.token, poll.registry())?;
        }
        watch(stop.as_raw_fd(), STOP)?;
        if let Some(spawner) = &spawner {
            watch(spawner.as_fd().as_raw_fd(), SPAWNER)?;
        }
        Ok(Self {
            house,
            poll,
            ears,
            stop,
            spawner,
            ordered: VecDeque::new(),
            crowd: Crowd::default(),
            lobby: Lobby::default(),
            refusals: Sparing::default(),
            strangers: Sparing::default(),
            pauses: Sparing::default(),
            failed: Sparing::every(FAILED),
            meter,
            promised: None,
            is_ending: false,
            is_lost: false,
            #[cfg(test)]
            bug: Arc::default(),
        })
    }

    /// The same loop from its beginning: of the old one, which a bug has ended, the sockets are kept, and who is owed a PROG's
    /// answer is remembered, though it is gone.
    ///
    /// # Errors
    /// There is no descriptor left for it.
    pub(super) fn anew(self) -> io::Result<Self> {
        let Self { house, ears, stop, spawner, ordered, crowd, lobby, meter, promised, is_ending, is_lost, .. } = self;
        meter.restarts.up();
        // Whatever state they are in.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(crowd)));
        let _ = catch_unwind(AssertUnwindSafe(|| drop(lobby)));
        let sockets = ears.into_iter().map(|ear| ear.listening).collect();
        let new = Self::new(house, sockets, stop, spawner, meter)?;
        let ordered = ordered.into_iter().map(|(_, since)| (None, since)).collect();
        Ok(Self { ordered, promised, is_ending, is_lost, ..new })
    }

    /// Serves until it is told to end, and all sessions have ended.
    ///
    /// # Errors
    /// It can't wait any more.
    pub(super) fn run(&mut self) -> io::Result<()> {
        let mut events = Events::with_capacity(1024);
        loop {
            #[cfg(test)]
            assert!(!self.bug.swap(false, Ordering::Relaxed), "provoked");
            let now = Instant::now();
            let accepted = self.accept(now);
            self.call(now);
            self.take_answers(now);
            self.look_at_the_spawner(now);
            let wait = self.crowd.drive(self.poll.registry(), now);
            self.house.admission.tell(now);
            for why in self.crowd.take_failed() {
                self.failed.say(&why, now);
            }
            for lines in [&mut self.refusals, &mut self.strangers, &mut self.pauses, &mut self.failed] {
                lines.tend(now);
            }
            if self.crowd.take_differences() {
                self.house.learned.doubt();
            }
            self.order(now);
            if (self.is_ending || self.promised.is_some()) && self.ears.is_empty() && self.is_empty() {
                return if self.is_lost { Err(io::Error::other("the spawner is lost")) } else { Ok(()) };
            }
            let until = |due: Instant| due.saturating_duration_since(now);
            let first = self.ordered.front().map(|(_, since)| until(*since + PATIENCE));
            // One for whom no PROG can be asked is to hear it.
            let again = (accepted || self.crowd.is_awake()).then_some(Duration::ZERO);
            let lines = [&self.refusals, &self.strangers, &self.pauses, &self.failed];
            let lines = lines.into_iter().filter_map(Sparing::deadline);
            let paused = self.ears.iter().filter_map(|ear| ear.paused);
            let due = lines.chain(paused).chain(self.lobby.deadline()).map(until);
            let timeout = [wait, first, again].into_iter().flatten().chain(due).min();
            match self.poll.poll(&mut events, timeout) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
            for event in &events {
                match event.token() {
                    SPAWNER if event.is_read_closed() => self.lose_spawner(&io::ErrorKind::UnexpectedEof.into()),
                    SPAWNER => {}
                    STOP => self.obey(),
                    token if token.0 >= lobby::FIRST => self.lobby.note(event),
                    token if token.0 < OTHERS => {
                        self.ears.iter_mut().filter(|ear| ear.token == token).for_each(|ear| ear.is_ready = true);
                    }
                    _ => self.crowd.note(event),
                }
            }
        }
    }

    /// Whether nobody is here.
    fn is_empty(&self) -> bool {
        self.lobby.is_empty() && self.crowd.is_empty()
    }

    /// Takes connections, some of each socket at a time. True: there may be more.
    fn accept(&mut self, now: Instant) -> bool {
        if self.promised == Some(0) {
            self.close(|_| true);
        }
        let mut is_more = false;
        for at in 0..self.ears.len() {
            let mut left = AT_ONCE;
            while let Some(ear) = self.ears.get_mut(at).filter(|ear| ear.is_ready) {
                if ear.paused.is_some_and(|until| now < until) {
                    break;
                }
                ear.paused = None;
                // The others have their turn too, or who floods one socket has all.
                if left == 0 {
                    is_more = true;
                    break;
                }
                left -= 1;
                match listener::accept(&ear.listening.socket) {
                    Ok(Some(client)) => self.admit(client, now),
                    Ok(None) => ear.is_ready = false,
                    Err(error) => {
                        ear.paused = Some(now + PAUSE);
                        self.pauses.say(&format!("can't accept for {} ms: {error}", PAUSE.as_millis()), now);
                        self.meter.pauses.up();
                    }
                }
            }
        }
        if self.promised.is_some() {
            self.close(|ear| !ear.is_ready);
        }
        is_more
    }

    fn admit(&mut self, client: Accepted, now: Instant) {
        if let Some(left) = &mut self.promised {
            *left = left.saturating_sub(1);
        }
        self.meter.accepted.up();
        let peer = client.ends[0];
        if let Some(proxies) = &self.house.proxies
            && !proxies.iter().any(|network| network.contains(peer.ip()))
        {
            self.meter.refuse(Refused::Proxy);
            return self.strangers.say(&format!("client={peer}: --proxy-from does not have it"), now);
        }
        match self.house.admission.enter() {
            Some(place) if self.house.proxies.is_some() => self.lobby.join(client, place, now),
            Some(place) => self.begin(client, place, now),
            None => {
                self.meter.refuse(Refused::Sessions);
                self.turn_away(&client, Ours::TOO_MANY_SESSIONS, "too many sessions", now);
            }
        }
    }

    /// Asks for PROGs, as many as may be asked for at a time.
    fn order(&mut self, now: Instant) {
        while self.ordered.len() < ORDERED
            && let Some(spawner) = &self.spawner
            && let Some(asking) = self.crowd.next_asking()
        {
            match spawner.ask(variables(asking.ends)) {
                Ok(()) => self.ordered.push_back((Some(asking), now)),
                // This client's loss alone.
                Err(error) if spawner::passes(&error) => {
                    let why = format!("{}: the spawner can't be asked: {error}", self.house.program);
                    self.crowd.hand_over(&asking, Err(why), self.poll.registry(), now);
                }
                Err(error) => return self.lose_spawner(&error),
            }
        }
    }

    /// Hands out the PROGs that have come.
    fn take_answers(&mut self, now: Instant) {
        while let Some(spawner) = self.spawner.as_ref().filter(|_| !self.ordered.is_empty()) {
            match spawner.answer() {
                Ok(None) => return,
                Ok(Some(child)) => {
                    // Whom a bug has taken nobody asks for; what was started for it ends when it is dropped.
                    if let Some((Some(asking), _)) = self.ordered.pop_front() {
                        let child = child.map_err(|why| format!("{}: {why}", self.house.program));
                        self.crowd.hand_over(&asking, child, self.poll.registry(), now);
                    }
                }
                Err(error) => self.lose_spawner(&error),
            }
        }
    }

    /// Begins the sessions of those whose PROXY header is there. Who has none is closed, without a word: it is no mail client's fault.
    fn call(&mut self, now: Instant) {
        for (client, found) in self.lobby.drive(self.poll.registry(), now) {
            match found {
                Ok(place) => self.begin(client, place, now),
                Err(why) => {
                    self.meter.refuse(Refused::Proxy);
                    self.strangers.say(&format!("client={}: {why}", client.ends[0]), now);
                }
            }
        }
    }

    fn begin(&mut self, accepted: Accepted, mut place: Place, now: Instant) {
        let (house, ends) = (self.house.clone(), accepted.ends);
        let [client, local] = ends;
        match place.belong_to(client.ip(), now) {
            Ok(()) => {}
            Err(Refusal::TooMany) => {
                self.meter.refuse(Refused::Address);
                return self.turn_away(&accepted, Ours::TOO_MANY_FROM_ADDRESS, "too many sessions of its address", now);
            }
            Err(Refusal::TooFast) => {
                self.meter.refuse(Refused::Rate);
                return self.turn_away(&accepted, Ours::TOO_FAST, "too many new sessions of its address", now);
            }
        }
        let (way, setups) = (house.policy.way, house.setups.get());
        let policy = match (setups.is_some() || !way.ends_tls(), house.admission.is_scarce()) {
            (true, false) => &house.policy,
            (false, false) => &house.bare,
            (true, true) => &house.brief[0],
            (false, true) => &house.brief[1],
        };
        let source = house.plain.clone().map_or(Source::Asked(ends), Source::Dialled);
        let stand_in = house.learned.get().and_then(|learned| StandIn::new(learned, Some(client.ip().to_canonical())));
        let parts = Parts {
            client: Ends::one(End::socket(accepted.socket, CLIENT_IN)),
            front: Front::Later(source, stand_in),
            holder: None,
            tls_server: None,
            info: ClientInfo::from(client),
            policy: policy.clone(),
            target: house.target.clone(),
            proxy: house.send_proxy.map(|version| Some(Header { version, client, local, tls: way.ends_tls() })),
            secrets: None,
            setups,
            relay: house.relay,
            terminations: None,
            started: now,
            meter: Some(self.meter.clone()),
        };
        self.crowd.join(parts, place, self.poll.registry());
    }

    /// A spawner that does not answer is as good as gone.
    fn look_at_the_spawner(&mut self, now: Instant) {
        if self.ordered.front().is_some_and(|(_, since)| now >= *since + PATIENCE) {
            self.lose_spawner(&io::ErrorKind::TimedOut.into());
        }
    }

    /// Without it nobody can be served: all is brought to an end, and the supervisor starts us anew.
    fn lose_spawner(&mut self, error: &io::Error) {
        error!("the spawner of {} is lost: {error}", self.house.program);
        self.is_lost = true;
        self.spawner = None;
        let now = Instant::now();
        for asking in core::mem::take(&mut self.ordered).into_iter().filter_map(|(asking, _)| asking) {
            self.crowd.hand_over(&asking, Err("the spawner is lost".to_owned()), self.poll.registry(), now);
        }
        self.end();
    }

    /// The last word to one who is not served. What its socket does not take at once is lost.
    fn turn_away(&mut self, client: &Accepted, reply: Ours, why: &str, now: Instant) {
        let _ = rustix::io::write(&client.socket, reply.octets());
        self.refusals.say(&format!("client={}: {why}", ClientInfo::from(client.ends[0])), now);
    }

    /// Does what the stage says.
    fn obey(&mut self) {
        let _ = rustix::io::read(&self.stop, &mut [0; 8]);
        match self.house.stage.load(Ordering::Acquire) {
            stage if stage == Stage::End as u8 => self.end(),
            stage if stage == Stage::Drain as u8 && self.promised.is_none() => {
                // A queue of our own would be reset with its socket: who waits in it is served. So is who waits in a shared one now, because
                // the kernel has woken us for them and nobody else; who comes later wakes others.
                self.leave_shared();
                self.promised = Some(self.ears.len() * listener::BACKLOG as usize);
                self.ears.iter_mut().for_each(|ear| ear.is_ready = true);
            }
            _ => {}
        }
    }

    fn end(&mut self) {
        if !core::mem::replace(&mut self.is_ending, true) {
            self.leave_shared();
            let now = Instant::now();
            for ear in core::mem::take(&mut self.ears) {
                // A queue of our own would be reset with its socket; for who waits in a shared one nobody else was woken.
                let most = if ear.listening.is_shared { AT_ONCE } else { listener::BACKLOG as usize };
                for client in core::iter::from_fn(|| listener::accept(&ear.listening.socket).ok()?).take(most) {
                    // Before its header nobody is spoken to: it goes as those in the lobby do.
                    if self.house.proxies.is_none() {
                        self.turn_away(&client, Ours::SHUTTING_DOWN, "the listener ends", now);
                    }
                }
            }
            self.lobby.close();
            self.crowd.terminate(now);
        }
    }

    /// No connection of a shared socket wakes us any more.
    fn leave_shared(&self) {
        for ear in self.ears.iter().filter(|ear| ear.listening.is_shared) {
            let _ = self.poll.registry().deregister(&mut SourceFd(&ear.listening.socket.as_raw_fd()));
        }
    }

    /// Closes these. A shared one stays open somewhere, and would be watched for ever.
    fn close(&mut self, which: impl Fn(&Ear) -> bool) {
        for ear in self.ears.extract_if(.., |ear| which(ear)) {
            let _ = self.poll.registry().deregister(&mut SourceFd(&ear.listening.socket.as_raw_fd()));
        }
    }
}

/// What a UCSPI server would say of this client (its end, and ours).
pub(super) fn variables([client, local]: [SocketAddr; 2]) -> impl Iterator<Item = (&'static str, String)> {
    let variables = [
        ("PROTO", "TCP".to_owned()),
        ("TCPREMOTEIP", client.ip().to_canonical().to_string()),
        ("TCPREMOTEPORT", client.port().to_string()),
        ("TCPLOCALIP", local.ip().to_canonical().to_string()),
        ("TCPLOCALPORT", local.port().to_string()),
    ];
    variables.into_iter()
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
