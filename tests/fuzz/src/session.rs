//! Target: the whole session. The input is a script; the owner here does what src/session/mod.rs asks of an owner, with
//! peers that stall, and a [`Witness`] looks at every call. When the script is over, time passes until the session has ended.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use starttls_wrapper::session::{BackendEnd, ChildEnd, ClientEnd, EndReason, Phase, Session, Way};

use super::dialogue::{self, Backend, Side};
use super::script::{Deed, Front, Script, Summon, parse};
use super::witness::{Given, Reached, Witness};

/// What the engine reads at once.
const READ: usize = 8 * 1024;

#[derive(Debug, Default)]
struct Peer {
    waiting: VecDeque<Vec<u8>>,
    closed: bool,
    told: bool,
    stalls: bool,
}

struct Owner {
    session: Session,
    witness: Witness,
    now: Instant,
    peers: [Peer; 3],
    mode: Backend,
    summon: Summon,
    /// The client sends, and the dial takes longer.
    busy: bool,
    piece: usize,
}

/// One input.
pub fn run(input: &[u8]) {
    outcome(input);
}

/// How a session has gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) way: Way,
    /// Somebody stood in for the child at the beginning.
    pub(crate) was_lazy: bool,
    /// And it was needed, and came.
    pub(crate) was_briefed: bool,
    pub(crate) ended_in: Phase,
    pub(crate) reached: Reached,
}

/// Plays one input. `None` where it is no script.
pub(crate) fn outcome(input: &[u8]) -> Option<Outcome> {
    Some(play(parse(input)?))
}

fn play(script: Script) -> Outcome {
    let now = Instant::now();
    let (witness, way) = (Witness::new(&script.policy), script.policy.way);
    let was_lazy = matches!(script.front, Front::StoodInFor(_));
    let policy = Arc::new(script.policy);
    let session = match script.front {
        Front::There => Session::new(policy, now),
        Front::Summoned => Session::summoning(policy, now),
        Front::StoodInFor(stand_in) => Session::lazily(policy, stand_in, now),
    };
    let mut owner = Owner {
        witness,
        session,
        now,
        peers: Default::default(),
        mode: Backend::Accepts,
        summon: Summon::Arrives,
        busy: false,
        piece: script.piece.min(READ),
    };
    owner.witness.begins(&owner.session);
    owner.act();
    for deed in &script.deeds {
        owner.perform(deed);
        owner.act();
        if owner.peers.iter().all(|peer| peer.waiting.is_empty() && !peer.stalls && !peer.closed) {
            owner.witness.quiescent(&owner.session);
        }
    }
    owner.outlast();
    let was_briefed = was_lazy && !owner.session.is_lazy() && owner.witness.is_briefed();
    Outcome { way, was_lazy, was_briefed, ended_in: owner.session.ended_in(), reached: owner.witness.reached() }
}

impl Owner {
    fn call(&mut self, given: Given<'_>, call: impl FnOnce(&mut Session, Instant)) {
        let (now, before) = (self.now, self.session.phase());
        self.witness.watch(&mut self.session, given, |session| call(session, now));
        if before.is_handover(self.witness.way) && self.session.phase() == Phase::Snoop {
            // The next dial is another connection. A child's end is seen again by whoever reads it next.
            *self.peer(Side::Backend) = Peer::default();
            self.peer(Side::Child).told = false;
        }
    }

    fn event(&mut self, call: impl FnOnce(&mut Session, Instant)) {
        self.call(Given::Event, call);
    }

    /// Who goes on behind TLS.
    fn behind(&self) -> Side {
        let is_child = self.witness.way.keeps() || self.witness.way == Way::Mute;
        if is_child { Side::Child } else { Side::Backend }
    }

    fn peer(&mut self, side: Side) -> &mut Peer {
        &mut self.peers[side as usize]
    }

    fn perform(&mut self, deed: &Deed) {
        match deed {
            Deed::Of(deed) => self.perform_of_dialogue(deed),
            Deed::Stalls(side) => self.peer(*side).stalls = true,
            Deed::Summons(how) => self.summon = *how,
            Deed::Flows => self.peers.iter_mut().for_each(|peer| peer.stalls = false),
        }
    }

    fn perform_of_dialogue(&mut self, deed: &dialogue::Deed) {
        use dialogue::Deed;
        match deed {
            Deed::Sends(side, octets) => {
                self.busy = *side == Side::Client;
                let piece = self.piece;
                for piece in octets.chunks(piece) {
                    let peer = self.peer(*side);
                    if !peer.closed {
                        peer.waiting.push_back(piece.to_vec());
                    }
                    self.act();
                }
                self.busy = false;
            }
            Deed::Ends(side) => self.peer(*side).closed = true,
            Deed::ClientResets => self.event(|s, now| s.handle_end(EndReason::Client(ClientEnd::BrokeOff), now)),
            Deed::BackendDies if self.session.phase() == Phase::RelayTls => {
                self.event(|s, now| s.handle_end(EndReason::Backend(BackendEnd::Truncated), now));
            }
            Deed::BackendDies => self.event(|s, now| s.handle_backend_eof(false, now)),
            Deed::Backend(mode) => self.mode = *mode,
            Deed::ClientTls if self.session.phase() == Phase::SecureClient => {
                self.event(Session::handle_client_secured);
            }
            Deed::Waits(time) => self.wait(*time),
            Deed::Terminates => self.event(Session::handle_terminate),
            Deed::ClientTls | Deed::Gets(..) | Deed::SeesEnd(_) | Deed::SeesAbort(_) | Deed::ClientSeesAlert => {}
        }
    }

    /// Time passes, deadline by deadline.
    fn wait(&mut self, time: Duration) {
        let until = self.now + time;
        for _ in 0..1000 {
            let Some(deadline) = self.session.deadline().filter(|deadline| *deadline <= until) else {
                self.now = until;
                return;
            };
            self.now = self.now.max(deadline);
            self.event(Session::handle_timeout);
            self.act();
        }
        panic!("the deadline never moves: a busy loop");
    }

    /// Nobody does anything any more: the timers alone must end the session.
    fn outlast(&mut self) {
        for _ in 0..40 {
            let Some(deadline) = self.session.deadline() else {
                assert!(self.session.end().is_some());
                return;
            };
            self.now = self.now.max(deadline);
            self.event(Session::handle_timeout);
            self.act();
        }
        panic!("the session never ends: it is in {:?}", self.session.phase());
    }

    /// Everything that can be done without time.
    fn act(&mut self) {
        let mut turns = 0;
        while self.write() | self.take() | self.step() {
            turns += 1;
            assert!(turns < 1_000_000, "a busy loop in {:?}", self.session.phase());
        }
    }

    fn write(&mut self) -> bool {
        let mut wrote = false;
        let sides = [Side::Client, Side::Child, self.behind()];
        let queues = [&mut self.session.to_client, &mut self.session.to_child, &mut self.session.to_backend];
        for (queue, side) in queues.into_iter().zip(sides) {
            if !queue.is_empty() && !self.peers[side as usize].stalls {
                queue.clear();
                wrote = true;
            }
        }
        if wrote {
            self.event(Session::handle_written);
        }
        wrote
    }

    fn take(&mut self) -> bool {
        match self.session.phase() {
            Phase::RelayPlain => self.relay(Side::Client, Side::Child) | self.relay(Side::Child, Side::Client),
            Phase::RelayTls => self.relay(Side::Client, self.behind()) | self.relay(self.behind(), Side::Client),
            Phase::Close => {
                self.peers.iter_mut().for_each(|peer| peer.waiting.clear());
                false
            }
            _ => self.take_client() | self.take_child() | self.take_backend(),
        }
    }

    fn take_client(&mut self) -> bool {
        let room = self.session.client_room();
        let peer = self.peer(Side::Client);
        if let Some(mut piece) = peer.waiting.pop_front() {
            let rest = piece.split_off(room.min(piece.len()));
            if !rest.is_empty() {
                peer.waiting.push_front(rest);
            }
            if !piece.is_empty() {
                self.call(Given::Client(&piece), |s, now| s.handle_client(&piece, now));
            }
            return !piece.is_empty();
        }
        let ended = peer.closed && !std::mem::replace(&mut peer.told, peer.closed);
        if ended {
            self.event(Session::handle_client_eof);
        }
        ended
    }

    fn take_child(&mut self) -> bool {
        let phase = self.session.phase();
        let is_there = phase == Phase::Brief || !self.session.is_lazy();
        let wanted = is_there && self.session.wants_child();
        let is_dismissed = matches!(phase, Phase::Announce | Phase::SecureClient | Phase::Gate);
        let is_kept = self.behind() == Side::Child;
        let peer = self.peer(Side::Child);
        if is_dismissed && !is_kept {
            peer.waiting.clear();
        }
        if !wanted {
            return false;
        }
        if let Some(piece) = peer.waiting.pop_front() {
            self.call(Given::Child(&piece), |s, now| s.handle_child(&piece, now));
            return true;
        }
        let ended = peer.closed && !std::mem::replace(&mut peer.told, peer.closed);
        if ended {
            self.event(Session::handle_child_eof);
        }
        // A child that got the end of its input may end itself; here it is up to the script.
        let _ = self.session.wants_child_eof();
        ended
    }

    fn take_backend(&mut self) -> bool {
        let phase = self.session.phase();
        let wanted = phase == Phase::Commit || self.session.wants_backend();
        let peer = self.peer(self.behind());
        if wanted && let Some(piece) = peer.waiting.pop_front() {
            self.call(Given::Backend(&piece), |s, now| s.handle_backend(&piece, now));
            return true;
        }
        let is_reached = !matches!(phase, Phase::Snoop | Phase::Summon | Phase::Brief | Phase::Dial);
        let told = peer.told || !peer.closed || !peer.waiting.is_empty() || !is_reached;
        if !told {
            peer.told = true;
            self.event(|s, now| s.handle_backend_eof(true, now));
        }
        !told
    }

    /// One direction of a relay: octets, then the end. The octets themselves pass the session by.
    fn relay(&mut self, from: Side, to: Side) -> bool {
        if self.peer(from).waiting.pop_front().is_some() {
            self.event(Session::handle_relayed);
            return true;
        }
        let peer = self.peer(from);
        let ended = peer.closed && !std::mem::replace(&mut peer.told, peer.closed);
        if ended && from != Side::Client {
            self.event(Session::handle_server_finished);
        }
        if ended && self.peer(to).closed {
            self.event(|s, now| s.handle_end(EndReason::Over, now));
        }
        ended
    }

    fn step(&mut self) -> bool {
        let before = self.session.phase();
        let session = &self.session;
        let written = session.to_client.is_empty() && session.to_child.is_empty() && session.to_backend.is_empty();
        match (before, self.mode) {
            (Phase::Summon | Phase::Dial | Phase::Commit | Phase::Announce, _) if self.busy => {}
            (Phase::Summon, _) => match self.summon {
                Summon::Arrives => self.event(Session::handle_summoned),
                Summon::Fails => {
                    let why = ChildEnd::NotStarted("no such program".to_owned());
                    self.event(|s, now| s.handle_end(EndReason::Child(why), now));
                }
                Summon::Never => {}
            },
            (Phase::Dial, Backend::Refused) => {
                self.event(|s, now| s.handle_handover_failed("connection refused".to_owned(), now));
            }
            (Phase::Dial, _) => self.event(Session::handle_dialled),
            (Phase::SecureBackend, Backend::Accepts | Backend::Silent) => self.event(Session::handle_backend_secured),
            (Phase::SecureBackend, Backend::Untrusted | Backend::Plaintext) => {
                self.event(|s, now| s.handle_handover_failed("not to be trusted".to_owned(), now));
            }
            (Phase::Start, _) => self.event(Session::handle_started),
            (Phase::Tell, _) => self.event(Session::handle_told),
            (Phase::Commit, _) if written && self.peer(Side::Client).waiting.is_empty() => {
                self.event(Session::handle_quiet);
            }
            (Phase::Announce, _) if written => self.event(Session::handle_announced),
            _ => {}
        }
        while self.session.poll_note().is_some() {}
        self.session.phase() != before
    }
}
