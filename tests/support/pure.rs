//! The session's owner without descriptors, TLS or time: plays a dialogue against the pure session in simulated time,
//! each segment cut as a test asks. What the owner does by contract (`src/session/mod.rs`) is done here in a few lines;
//! what only an owner can do wrong (TLS, fds, signals) is the program's tests' business.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use starttls_wrapper::session::{BackendEnd, ChildEnd, ClientEnd, EndReason, Phase, Policy, Session, Way};

use super::dialogue::{Backend, Deed, Dialogue, Side};
use super::policy::policy;

/// How the segments of one run are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    /// Not at all.
    Whole,
    /// Octet by octet.
    Octets,
    /// Segment number `segment` of the script in two, behind `at` octets.
    InTwo { segment: usize, at: usize },
    /// All of them at random, by this seed.
    Random(u64),
}

impl Cut {
    /// The lengths of the pieces of segment number `index`, which has `length` octets.
    fn pieces(self, index: usize, length: usize) -> Vec<usize> {
        match self {
            Self::Whole => vec![length],
            Self::Octets => vec![1; length],
            Self::InTwo { segment, at } if segment == index && at < length => vec![at, length - at],
            Self::InTwo { .. } => vec![length],
            Self::Random(seed) => {
                // xorshift64: the same cuts for the same seed, for ever.
                let mut state = (seed ^ (index as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15)) | 1;
                let (mut pieces, mut left) = (Vec::new(), length);
                while left > 0 {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    let most = if state & 1 == 0 { 8 } else { 2000 };
                    let piece = (1 + (state >> 8) as usize % most).min(left);
                    pieces.push(piece);
                    left -= piece;
                }
                pieces
            }
        }
    }
}

/// How a side has seen the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    No,
    Clean,
    Cut,
}

/// One of the three others, as far as the owner knows it.
#[derive(Debug)]
struct Peer {
    /// Sent by it and not yet read.
    waiting: VecDeque<Vec<u8>>,
    /// It has ended, behind what is waiting.
    closed: bool,
    /// The session knows of that.
    closed_told: bool,
    /// Received by it and not yet looked at.
    seen: Vec<u8>,
    /// What it has seen of our end.
    ended: Ended,
}

impl Default for Peer {
    fn default() -> Self {
        Self { waiting: VecDeque::new(), closed: false, closed_told: false, seen: Vec::new(), ended: Ended::No }
    }
}

struct Owner {
    session: Session,
    way: Way,
    now: Instant,
    client: Peer,
    child: Peer,
    backend: Peer,
    mode: Backend,
    inside_tls: bool,
    client_reset: bool,
    /// A relay was reached: nobody knows where a reply ends.
    relayed: bool,
    /// The client's pieces of one segment are under way: the dial takes longer than they do.
    dial_waits: bool,
    closed: bool,
}

/// Plays `dialogue`, its segments cut as `cut` says. The message of a failure begins with `file:line`.
pub(crate) fn play(dialogue: &Dialogue, cut: Cut) -> Result<(), String> {
    let mut owner = Owner::new(policy(dialogue)?, dialogue.way);
    owner.act();
    let mut segment = 0;
    for step in &dialogue.steps {
        owner
            .perform(&step.deed, cut, &mut segment)
            .map_err(|why| format!("{}: {cut:?}: {why}", dialogue.place(step.line)))?;
    }
    owner.finish(dialogue)
}

impl Owner {
    fn new(policy: Policy, way: Way) -> Self {
        let now = Instant::now();
        Self {
            session: Session::new(Arc::new(policy), now),
            way,
            now,
            client: Peer::default(),
            child: Peer::default(),
            backend: Peer::default(),
            mode: Backend::Accepts,
            inside_tls: false,
            client_reset: false,
            relayed: false,
            dial_waits: false,
            closed: false,
        }
    }

    /// Who goes on behind TLS.
    fn behind(&self) -> Side {
        if self.is_by_child() { Side::Child } else { Side::Backend }
    }

    /// Whether that is the child that was there from the start.
    fn is_by_child(&self) -> bool {
        self.way.keeps() || self.way == Way::Mute
    }

    fn peer(&mut self, side: Side) -> &mut Peer {
        match side {
            Side::Client => &mut self.client,
            Side::Child => &mut self.child,
            Side::Backend => &mut self.backend,
        }
    }

    fn perform(&mut self, deed: &Deed, cut: Cut, segment: &mut usize) -> Result<(), String> {
        match deed {
            Deed::Sends(side, octets) => {
                let mut rest = &octets[..];
                self.dial_waits = *side == Side::Client;
                for length in cut.pieces(*segment, octets.len()) {
                    let (piece, tail) = rest.split_at(length);
                    rest = tail;
                    self.peer(*side).waiting.push_back(piece.to_vec());
                    self.act();
                }
                *segment += 1;
                self.dial_waits = false;
            }
            Deed::Gets(side, octets) => {
                let peer = self.peer(*side);
                if !peer.seen.starts_with(octets) {
                    let seen = peer.seen.escape_ascii().to_string();
                    let expected = octets.escape_ascii();
                    return Err(format!(
                        "{side:?} expected \"{expected}\"\n    got \"{seen}\" (phase {:?})",
                        self.session.phase()
                    ));
                }
                peer.seen.drain(..octets.len());
                if *side == Side::Client && octets.starts_with(b"454 4.7.0 TLS not available") {
                    nothing(Side::Backend, &self.backend.seen)?;
                    self.backend = Peer::default();
                }
            }
            Deed::Ends(side) => self.peer(*side).closed = true,
            Deed::ClientResets => {
                self.client_reset = true;
                self.session.handle_end(EndReason::Client(ClientEnd::BrokeOff), self.now);
            }
            Deed::BackendDies => {
                let phase = self.session.phase();
                if phase == Phase::RelayTls {
                    self.session.handle_end(EndReason::Backend(BackendEnd::Truncated), self.now);
                } else {
                    self.session.handle_backend_eof(false, self.now);
                }
            }
            Deed::Backend(mode) => self.mode = *mode,
            Deed::ClientTls => {
                if self.session.phase() != Phase::SecureClient {
                    return Err(format!("the client's handshake in {:?}", self.session.phase()));
                }
                nothing(Side::Client, &self.client.seen)?;
                self.inside_tls = true;
                self.session.handle_client_secured(self.now);
            }
            Deed::Waits(time) => self.wait(*time)?,
            Deed::Terminates => self.session.handle_terminate(self.now),
            Deed::SeesEnd(side) => self.expect_end(*side, Ended::Clean)?,
            Deed::SeesAbort(side) => self.expect_end(*side, Ended::Cut)?,
            Deed::ClientSeesAlert => return Err("only the program has alerts".to_owned()),
        }
        self.act();
        Ok(())
    }

    fn expect_end(&mut self, side: Side, expected: Ended) -> Result<(), String> {
        let phase = self.session.phase();
        let peer = self.peer(side);
        nothing(side, &peer.seen)?;
        if peer.ended == expected {
            return Ok(());
        }
        Err(format!("{side:?} expected the end: {expected:?}; it is {:?} (phase {phase:?})", peer.ended))
    }

    fn wait(&mut self, time: Duration) -> Result<(), String> {
        let until = self.now + time;
        for _ in 0..1000 {
            match self.session.deadline() {
                Some(deadline) if deadline <= until => {
                    self.now = self.now.max(deadline);
                    self.session.handle_timeout(self.now);
                    self.act();
                }
                _ => {
                    self.now = until;
                    return Ok(());
                }
            }
        }
        Err("the deadline never moves: a busy loop".to_owned())
    }

    /// Does everything that can be done without time or a stranger.
    fn act(&mut self) {
        // Every turn but the last does something, and there is only so much to do.
        while self.write() | self.take() | self.move_on() {}
    }

    /// Everything queued reaches its side.
    fn write(&mut self) -> bool {
        let mut wrote = false;
        let session = &mut self.session;
        let queues = [&mut session.to_client, &mut session.to_child, &mut session.to_backend];
        let queued = queues.map(|queue| {
            let octets = queue.as_slice().to_vec();
            queue.clear();
            octets
        });
        for (octets, side) in queued.into_iter().zip([Side::Client, Side::Child, self.behind()]) {
            if !octets.is_empty() {
                let peer = self.peer(side);
                if peer.ended == Ended::No {
                    peer.seen.extend_from_slice(&octets);
                }
                wrote = true;
            }
        }
        if wrote {
            self.session.handle_written(self.now);
        }
        if self.session.wants_child_eof() && self.session.to_child.is_empty() && self.child.ended == Ended::No {
            self.child.ended = Ended::Clean;
        }
        wrote
    }

    /// Everything that may be read is read.
    fn take(&mut self) -> bool {
        let mut took = false;
        let phase = self.session.phase();
        match phase {
            Phase::RelayPlain => took |= self.relay(Side::Client, Side::Child) | self.relay(Side::Child, Side::Client),
            Phase::RelayTls => {
                let behind = self.behind();
                took |= self.relay(Side::Client, behind) | self.relay(behind, Side::Client);
            }
            _ => {
                took |= self.take_client();
                took |= self.take_server();
            }
        }
        took
    }

    fn take_client(&mut self) -> bool {
        if self.session.phase() == Phase::Close {
            self.client.waiting.clear();
            return false;
        }
        let Some(mut piece) = self.client.waiting.pop_front() else {
            if self.client.closed && !self.client.closed_told {
                self.client.closed_told = true;
                self.session.handle_client_eof(self.now);
                return true;
            }
            return false;
        };
        let room = self.session.client_room().min(piece.len());
        let rest = piece.split_off(room);
        if !rest.is_empty() {
            self.client.waiting.push_front(rest);
        }
        if room > 0 {
            self.session.handle_client(&piece, self.now);
        }
        room > 0
    }

    fn take_server(&mut self) -> bool {
        let phase = self.session.phase();
        let is_kept = self.is_by_child() && phase != Phase::Close;
        if !is_kept && matches!(phase, Phase::Announce | Phase::SecureClient | Phase::Gate | Phase::Close) {
            // Dismissed: nothing of it counts.
            self.child.waiting.clear();
        } else if self.session.wants_child() {
            if let Some(piece) = self.child.waiting.pop_front() {
                self.session.handle_child(&piece, self.now);
                return true;
            }
            if self.child.closed && !self.child.closed_told {
                self.child.closed_told = true;
                self.child.ended = Ended::Clean;
                self.session.handle_child_eof(self.now);
                return true;
            }
        }
        if (phase == Phase::Commit || self.session.wants_backend())
            && let Some(piece) = self.peer(self.behind()).waiting.pop_front()
        {
            self.session.handle_backend(&piece, self.now);
            return true;
        }
        let waits = matches!(phase, Phase::Snoop | Phase::Dial | Phase::Close);
        let behind = self.peer(self.behind());
        if behind.closed && !behind.closed_told && behind.waiting.is_empty() && !waits {
            behind.closed_told = true;
            self.session.handle_backend_eof(true, self.now);
            return true;
        }
        false
    }

    /// One direction of a relay: octets, then the end.
    fn relay(&mut self, from: Side, to: Side) -> bool {
        if let Some(piece) = self.peer(from).waiting.pop_front() {
            self.peer(to).seen.extend_from_slice(&piece);
            self.session.handle_relayed(self.now);
            return true;
        }
        if self.peer(from).closed && !self.peer(from).closed_told {
            self.peer(from).closed_told = true;
            self.peer(to).ended = Ended::Clean;
            if from != Side::Client {
                self.session.handle_server_finished(self.now);
            }
            if self.peer(to).closed {
                self.session.handle_end(EndReason::Over, self.now);
            }
            return true;
        }
        false
    }

    /// What the phase asks of its owner.
    fn move_on(&mut self) -> bool {
        let before = self.session.phase();
        match before {
            Phase::Dial if self.dial_waits => {}
            Phase::Dial if self.mode == Backend::Refused => {
                self.session.handle_handover_failed("connection refused".to_owned(), self.now);
            }
            Phase::Dial => self.session.handle_dialled(self.now),
            Phase::SecureBackend => match self.mode {
                Backend::Accepts | Backend::Silent => self.session.handle_backend_secured(self.now),
                Backend::Untrusted | Backend::Plaintext => {
                    self.session.handle_handover_failed("not to be trusted".to_owned(), self.now);
                }
                Backend::NoHandshake | Backend::Refused => {}
            },
            Phase::Summon => self.session.handle_summoned(self.now),
            Phase::Start => self.session.handle_started(self.now),
            Phase::Tell => self.session.handle_told(self.now),
            Phase::Commit | Phase::Announce if self.dial_waits || !self.is_written() => {}
            Phase::Commit => self.session.handle_quiet(self.now),
            Phase::Announce => {
                self.session.handle_announced(self.now);
                if !self.is_by_child() {
                    self.dismiss(true);
                }
            }
            Phase::RelayPlain | Phase::RelayTls => self.relayed = true,
            Phase::Close if !self.closed && self.is_written() => {
                self.closed = true;
                self.close();
                return true;
            }
            Phase::Brief
            | Phase::Greeting
            | Phase::Replay
            | Phase::SecureClient
            | Phase::Gate
            | Phase::Close
            | Phase::Snoop => {}
        }
        self.session.phase() != before
    }

    fn is_written(&self) -> bool {
        let session = &self.session;
        session.to_client.is_empty() && session.to_child.is_empty() && session.to_backend.is_empty()
    }

    /// QUIT where the child still reads commands, and the end.
    fn dismiss(&mut self, politely: bool) {
        if self.child.ended == Ended::No && !self.child.closed {
            if politely {
                self.child.seen.extend_from_slice(b"QUIT\r\n");
            }
            self.child.ended = Ended::Clean;
        }
    }

    fn close(&mut self) {
        let reason = self.session.end().cloned();
        // A child that was to go on behind TLS is just closed.
        let lost_step = reason == Some(EndReason::Child(ChildEnd::LostStep));
        let was_reached = !matches!(self.session.ended_in(), Phase::Snoop | Phase::Dial);
        let was_behind = lost_step || self.is_by_child() && was_reached;
        self.dismiss(!self.relayed && !was_behind);
        let announced = !self.relayed && reason.as_ref().is_some_and(|r| r.farewell().is_some());
        // What a TLS server says of the end is always the same.
        let whole = !self.inside_tls || self.way.is_ucspi_tls() || announced || reason == Some(EndReason::Over);
        if self.client.ended == Ended::No && !self.client_reset {
            self.client.ended = if whole { Ended::Clean } else { Ended::Cut };
        }
        if self.backend.ended == Ended::No {
            // A pipe has but one end.
            let is_over = matches!(reason, Some(EndReason::Over | EndReason::Client(ClientEnd::Gone)));
            let is_clean = is_over || self.way.respawns();
            self.backend.ended = if is_clean { Ended::Clean } else { Ended::Cut };
        }
    }

    fn finish(mut self, dialogue: &Dialogue) -> Result<(), String> {
        let last = dialogue.exit.map_or_else(|| dialogue.steps.last().map_or(1, |s| s.line), |(line, _)| line);
        let at = |why: String| format!("{}: at the end: {why}", dialogue.place(last));
        for side in [Side::Client, Side::Child, Side::Backend] {
            let seen = std::mem::take(&mut self.peer(side).seen);
            nothing(side, &seen).map_err(at)?;
        }
        let Some((_, code)) = dialogue.exit else { return Ok(()) };
        self.client.closed = true;
        self.act();
        match self.session.end() {
            Some(reason) if i32::from(reason.exit_code()) == code => {}
            Some(reason) => return Err(at(format!("exit {} ({reason}), not {code}", reason.exit_code()))),
            None => return Err(at(format!("the session is still in {:?}", self.session.phase()))),
        }
        nothing(Side::Client, &self.client.seen).map_err(at)
    }
}

fn nothing(side: Side, seen: &[u8]) -> Result<(), String> {
    if seen.is_empty() { Ok(()) } else { Err(format!("{side:?} got \"{}\" unasked", seen.escape_ascii())) }
}
