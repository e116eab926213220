//! What must hold in every session, watched from outside: everything that was given to it, everything it queued, and its phases.
//!
//! 1. Nothing for the child is queued but while snooping, and nothing after the hand-over has begun; no client octet that came behind
//!    STARTTLS goes on: the session moves to `Dial` only when the client has said nothing behind the STARTTLS line, and an octet
//!    that comes during the hand-over ends it. Of what came in one call with STARTTLS nothing goes on either.
//! 2. The backend gets, before the gate, only lines that the child got before, or would have got, and then only what came inside TLS. In the way
//!    `keep` it is the child itself, which gets RSET then and nothing else; behind `--mute`, what it is told by the operator.
//! 3. What a server gets of a stream is some of its lines, in order and normal, none with a fault, and from a cutoff on all the
//!    octets as they were given.
//! 4. Replies: one for each command, in clear and at the gate, as long as the child, or the backend, gives one for each line: what that
//!    said to the line where it got it (of a reply to EHLO what is left of it), else a word of ours.
//! 5. The 220 is alone in the queue, and nothing is queued for the client between it and its TLS. Inside TLS the client hears nothing
//!    of a server's greeting and of its replies to a replay.
//! 6. Where somebody stands in for the child: nothing is queued for it until it is there; then, first of all, the last hello that was
//!    answered with 2yz, if there was one, and behind its reply what 3 says of the stream from the first line on that had no
//!    answer. Of what it says to greeting and hello the client hears nothing.
//! 7. The queues and the session's memory are capped; no bug of ours is reported; `Close` stays.

use starttls_wrapper::session::{ClientEnd, EndReason, Phase, Policy, Session, Way, limits};
use starttls_wrapper::smtp::command::{Kind, Verb, argument};
use starttls_wrapper::smtp::line::LIMIT;

use super::lines::{Line, accounts_for, lines};
use super::memory;

/// What we say inside TLS.
const OURS_INSIDE: [&[u8]; 4] = [b"421 4.", b"500 5.5.", b"503 5.5.1 Send EHLO first", b"550 5.5.1"];
/// What we say while the child is told what it must know.
const OURS_IN_CLEAR: [&[u8]; 7] =
    [b"421 4.", b"454 4.7.0", b"500 5.5.2", b"501 5.5.4", b"530 5.7.0", b"550 5.7.0 Not", b"503 5.5.1 "];
const READY: &[u8] = b"220 2.0.0 Ready to start TLS\r\n";
/// What one call may add to a queue: what it was given, what was held, one of our replies for each that is owed.
const CALL: usize = 8 * 1024 + limits::EHLO_REPLY + 2 * LIMIT + limits::REPLIES_OWED * 64;
/// What a session may hold in all: its three queues with their spare space, two lines, an EHLO reply, a transcript.
const MEMORY: isize = 1024 * 1024;

/// Who gives octets, or that it is an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Given<'a> {
    Client(&'a [u8]),
    Child(&'a [u8]),
    Backend(&'a [u8]),
    Event,
}

/// All that was seen of one session.
#[derive(Debug, Default)]
pub struct Witness {
    /// The session's.
    pub way: Way,
    /// The client's octets in clear, and inside TLS.
    clear: Vec<u8>,
    inside: Vec<u8>,
    /// The child's, and the backend's at the gate.
    child_said: Vec<u8>,
    said_at_gate: Vec<u8>,
    /// Queued for each.
    to_client: Vec<u8>,
    to_child: Vec<u8>,
    to_backend: Vec<u8>,
    /// What the operator has the child told.
    told: Vec<u8>,
    /// Of `to_backend`, what was queued before the client's TLS.
    replayed: usize,
    inside_tls: bool,
    /// Of `clear`, what was answered before the child was there; of its lines those with 2yz; of `to_child`, the hello that it was told
    /// first.
    answered: usize,
    accepted: Vec<Vec<u8>>,
    hello: usize,
    briefed: bool,
    /// The child has given more replies than it got lines: nobody can tell which is which.
    spoke_unasked: bool,
    memory: isize,
    reached: Reached,
}

/// How often these were really asked, of one session or of many: invariants 1 and 4 have conditions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reached {
    /// Are there as many replies as commands, while nobody but a stand-in is there?
    pub alone: usize,
    /// While snooping, and each in its turn?
    pub snooping: usize,
    /// At the gate?
    pub gate: usize,
    /// Has nothing gone on of what came with STARTTLS?
    pub behind_starttls: usize,
}

fn shown(octets: &[u8]) -> String {
    let text = octets.escape_ascii().to_string();
    if text.len() > 2000 { format!("{}[...]{}", &text[..1000], &text[text.len() - 1000..]) } else { text }
}

/// The whole replies; `None` if that is no SMTP.
fn replies(octets: &[u8]) -> Option<Vec<&[u8]>> {
    let (mut whole, mut start, mut end) = (Vec::new(), 0, 0);
    for line in octets.split_inclusive(|o| *o == b'\n').filter(|line| line.ends_with(b"\n")) {
        end += line.len();
        match line {
            [b'2'..=b'5', b'0'..=b'5', b'0'..=b'9', b'-', ..] => {}
            [b'2'..=b'5', b'0'..=b'5', b'0'..=b'9', b' ' | b'\r' | b'\n', ..] => {
                whole.push(&octets[start..end]);
                start = end;
            }
            _ => return None,
        }
    }
    Some(whole)
}

/// Whether nothing stands behind the last whole reply.
fn ends_whole(said: &[u8]) -> bool {
    let last = said.split_inclusive(|o| *o == b'\n').next_back().unwrap_or_default();
    last.is_empty() || last.ends_with(b"\n") && last.get(3) != Some(&b'-')
}

/// Whether this is what was made of a reply to EHLO: less of what it offers, and of TLS what there is. However the lines are marked.
fn is_made_of(heard: &[u8], said: &[u8]) -> bool {
    fn text(line: Line<'_>) -> &[u8] {
        let text = line.raw.get(3..).unwrap_or_default();
        text.strip_prefix(b"-").unwrap_or(text).trim_ascii()
    }
    let mut said = lines(said).map(text);
    lines(heard)
        .map(text)
        .filter(|text| !text.eq_ignore_ascii_case(b"STARTTLS"))
        .all(|text| said.any(|said| said == text))
}

fn whole_lines(octets: &[u8]) -> usize {
    octets.iter().filter(|o| **o == b'\n').count()
}

impl Witness {
    /// A session with this policy begins.
    #[must_use]
    pub fn new(policy: &Policy) -> Self {
        let is_mute = policy.way == Way::Mute;
        let told = policy.told.iter().flat_map(|(_, line)| [line, &b"\r\n"[..]].concat());
        Self { way: policy.way, inside_tls: is_mute, told: told.collect(), ..Self::default() }
    }

    /// What the session says before anybody has said anything.
    pub fn begins(&mut self, session: &Session) {
        self.to_client.extend_from_slice(session.to_client.as_slice());
    }

    /// Whether the child was needed, and has been told what it must know.
    #[must_use]
    pub fn is_briefed(&self) -> bool {
        self.briefed
    }

    /// What could be asked.
    #[must_use]
    pub fn reached(&self) -> Reached {
        self.reached
    }

    /// Makes one call to the session and looks at what it did.
    pub fn watch(&mut self, session: &mut Session, given: Given<'_>, call: impl FnOnce(&mut Session)) {
        let before = session.phase();
        let queued = [session.to_client.len(), session.to_child.len(), session.to_backend.len()];
        match given {
            Given::Client(octets) if self.inside_tls => self.inside.extend_from_slice(octets),
            Given::Client(octets) => self.clear.extend_from_slice(octets),
            Given::Child(octets) => {
                self.child_said.extend_from_slice(octets);
                let asked = 1 + whole_lines(&self.to_child);
                // Its last octet belongs to a reply behind all those before.
                let earlier = self.child_said.split_last().map_or(&[][..], |(_, earlier)| earlier);
                self.spoke_unasked |= replies(earlier).is_none_or(|said| said.len() >= asked);
            }
            Given::Backend(octets) if before == Phase::Gate => self.said_at_gate.extend_from_slice(octets),
            Given::Backend(_) | Given::Event => {}
        }
        let was_alone = session.is_lazy();
        let held = memory::held();
        call(session);
        self.memory += memory::held() - held;
        let after = session.phase();
        let fresh = |queue: &[u8], before: usize| queue.get(before..).unwrap_or_default().to_vec();
        let for_client = fresh(session.to_client.as_slice(), queued[0]);
        let for_child = fresh(session.to_child.as_slice(), queued[1]);
        let for_backend = fresh(session.to_backend.as_slice(), queued[2]);
        if was_alone {
            self.stood_in(before, after, &for_child, &for_client);
        }
        self.child_side(before, after, &for_child);
        self.backend_side(before, after, &for_backend);
        let is_told_inside = after == Phase::Close && session.ended_in().is_inside(self.way);
        self.client_side(before, after, given, queued[0], &for_client, is_told_inside);
        self.hand_over(before, after, given, session);
        self.size(session);
        let took_commands = matches!(before, Phase::Snoop | Phase::Brief);
        if took_commands && session.end() == Some(&EndReason::Client(ClientEnd::BytesAfterStarttls)) {
            self.ended_behind_starttls();
        }
        if before == Phase::Close {
            assert_eq!(after, Phase::Close);
            assert!(for_client.is_empty(), "the end has an end: \"{}\"", shown(&for_client));
        }
        assert_eq!(session.end().is_some(), after == Phase::Close);
        assert_eq!(session.deadline().is_none(), after == Phase::Close);
        if let Some(EndReason::Bug(why)) = session.end() {
            panic!("bug: {why}");
        }
    }

    fn child_side(&mut self, before: Phase, after: Phase, fresh: &[u8]) {
        self.to_child.extend_from_slice(fresh);
        let is_briefed = before == Phase::Brief && after != Phase::Close;
        let snoops = before == Phase::Snoop || after == Phase::Snoop || is_briefed;
        assert!(fresh.is_empty() || snoops, "{before:?} -> {after:?}: the child gets \"{}\"", shown(fresh));
        let cut_off = after == Phase::RelayPlain && before != after;
        if !fresh.is_empty() || cut_off {
            self.accounts(&self.clear[self.answered..], &self.to_child[self.hello..], cut_off, "child");
        }
    }

    /// A call to a session whose child is stood in for.
    fn stood_in(&mut self, before: Phase, after: Phase, for_child: &[u8], for_client: &[u8]) {
        match (before, after) {
            (Phase::Snoop, Phase::Summon | Phase::Dial) => {
                let said = [&self.to_client, for_client].concat();
                let mut final_lines = lines(&said).filter(|line| line.raw.get(3) != Some(&b'-'));
                final_lines.next(); // the greeting
                (self.answered, self.accepted) = (0, Vec::new());
                for (line, reply) in lines(&self.clear).zip(final_lines) {
                    self.answered += line.raw.len();
                    if reply.raw.first() == Some(&b'2') {
                        self.accepted.push(line.normal());
                    }
                }
                assert!(for_child.is_empty(), "nobody is there who gets \"{}\"", shown(for_child));
            }
            (Phase::Brief, Phase::Brief) if !for_child.is_empty() => {
                assert_eq!(self.hello, 0, "a second hello: \"{}\"", shown(for_child));
                let hello = self.last_hello().unwrap_or_default();
                assert_eq!(shown(for_child), shown(&hello), "of \"{}\"", shown(&self.clear));
                self.hello = hello.len();
            }
            (Phase::Brief, Phase::Brief | Phase::Close) => assert!(for_child.is_empty(), "\"{}\"", shown(for_child)),
            (Phase::Brief, _) => {
                assert_eq!(self.hello, self.last_hello().unwrap_or_default().len(), "the hello is missing");
                self.briefed = true;
            }
            _ => assert!(for_child.is_empty(), "nobody is there who gets \"{}\"", shown(for_child)),
        }
        if before == Phase::Brief {
            let is_ours = |line: &[u8]| OURS_IN_CLEAR.iter().any(|ours| line.starts_with(ours));
            assert!(lines(for_client).all(|line| is_ours(line.raw)), "of a briefing: \"{}\"", shown(for_client));
        }
    }

    /// The last hello of those that were answered before the child was there, and with 2yz.
    fn last_hello(&self) -> Option<Vec<u8>> {
        let is_hello = |line: &&Vec<u8>| matches!(Verb::of(line.trim_ascii_end()), Verb::Ehlo | Verb::Helo);
        self.accepted.iter().rfind(is_hello).cloned()
    }

    fn backend_side(&mut self, before: Phase, after: Phase, fresh: &[u8]) {
        self.to_backend.extend_from_slice(fresh);
        // With the last answer of a replay inside TLS goes what the client did not wait to say.
        let is_replayed = before.is_inside(self.way) && !after.is_reaching();
        if before == Phase::Gate || is_replayed {
            let opened = after == Phase::RelayTls;
            if !fresh.is_empty() || opened {
                self.accounts(&self.inside, &self.to_backend[self.replayed..], opened, "backend");
            }
        } else if !fresh.is_empty() {
            assert!(
                before.is_handover(self.way) || before.is_inside(self.way),
                "{before:?}: the backend gets \"{}\"",
                shown(fresh)
            );
            if self.way.keeps() {
                assert!(fresh == b"RSET\r\n", "the child is asked \"{}\"", shown(fresh));
                return;
            }
            for line in lines(fresh) {
                assert!(
                    lines(&self.to_child).chain(lines(&self.told)).any(|said| said == line)
                        || self.accepted.iter().any(|accepted| accepted == line.raw),
                    "\"{}\" is new to the backend",
                    shown(line.raw)
                );
                assert!(Verb::of(line.text()).kind() != Kind::Cutoff, "\"{}\" is replayed", shown(line.raw));
            }
            self.replayed = self.to_backend.len();
        }
    }

    fn accounts(&self, stream: &[u8], got: &[u8], tail: bool, who: &str) {
        let is_so = accounts_for(stream, got, tail);
        assert!(is_so, "of \"{}\"\nthe {who} got \"{}\"\ntail: {tail}", shown(stream), shown(got));
    }

    fn client_side(
        &mut self,
        before: Phase,
        after: Phase,
        given: Given<'_>,
        queued: usize,
        fresh: &[u8],
        is_told_inside: bool,
    ) {
        self.to_client.extend_from_slice(fresh);
        if before == Phase::Commit && after == Phase::Announce {
            assert!(queued == 0 && fresh == READY, "the 220 in company: {queued} octets and \"{}\"", shown(fresh));
        } else if matches!(before, Phase::Announce | Phase::SecureClient) {
            // Of a server that was lost meanwhile it hears as soon as its TLS stands.
            let is_lost = is_told_inside && before == Phase::SecureClient && fresh.starts_with(b"421 4.3.0 ");
            assert!(fresh.is_empty() || is_lost, "behind the 220: \"{}\"", shown(fresh));
        }
        if let Given::Backend(octets) = given
            && before.is_handover(self.way)
        {
            let ours = fresh.is_empty() || fresh.starts_with(b"454 ") || fresh.starts_with(b"421 ");
            assert!(ours, "the backend said \"{}\" and the client got \"{}\"", shown(octets), shown(fresh));
        }
        if matches!(given, Given::Backend(_)) && before.is_inside(self.way) && before.is_reaching() {
            // With the last answer the gate opens its mouth.
            let is_ours = |line: &[u8]| OURS_INSIDE.iter().any(|ours| line.starts_with(ours));
            assert!(lines(fresh).all(|line| is_ours(line.raw)), "inside TLS, unasked: \"{}\"", shown(fresh));
        }
    }

    fn hand_over(&mut self, before: Phase, after: Phase, given: Given<'_>, session: &Session) {
        if matches!(before, Phase::Snoop | Phase::Brief) && after == Phase::Dial {
            let last = lines(&self.clear).last();
            let is_last = last.is_some_and(|line| {
                line.whole && Verb::of(line.text()) == Verb::Starttls && argument(line.text()).is_empty()
            });
            assert!(is_last, "the hand-over begins behind \"{}\"", shown(&self.clear));
        }
        if let (true, Given::Client(octets)) = (before.is_handover(self.way), given)
            && !octets.is_empty()
        {
            assert_eq!(session.end(), Some(&EndReason::Client(ClientEnd::BytesAfterStarttls)));
        }
        if before == Phase::SecureClient && after.is_inside(self.way) {
            self.inside_tls = true;
            self.replayed = self.to_backend.len();
            self.to_client.clear();
        }
    }

    fn size(&self, session: &Session) {
        let (client, child, backend) = (session.to_client.len(), session.to_child.len(), session.to_backend.len());
        assert!(client <= limits::TO_CLIENT + CALL, "{client} octets wait for the client");
        assert!(child <= limits::TO_SERVER + CALL, "{child} octets wait for the child");
        assert!(backend <= limits::TO_SERVER + CALL, "{backend} octets wait for the backend");
        assert!(session.client_room() <= 2 * LIMIT);
        assert!(self.memory <= MEMORY, "the session holds {} octets", self.memory);
    }

    /// Everything given is taken and everybody has answered: is there a reply for each command, and each in its turn?
    pub fn quiescent(&mut self, session: &Session) {
        match session.phase() {
            Phase::Snoop if session.is_lazy() => self.stood_in_for_each(),
            Phase::Snoop => self.snooped(),
            Phase::Gate => self.gate(),
            _ => {}
        }
    }

    fn stood_in_for_each(&mut self) {
        let (Some(heard), commands) = (replies(&self.to_client), whole_lines(&self.clear)) else { return };
        self.one_for_each(1 + commands, heard.len(), &self.clear);
        self.reached.alone += 1;
    }

    /// The child's greeting and replies go on, but for those to what it was told before anybody heard it.
    fn snooped(&mut self) {
        let (Some(said), Some(heard)) = (replies(&self.child_said), replies(&self.to_client)) else { return };
        if ends_whole(&self.child_said) && !self.spoke_unasked && said.len() == 1 + whole_lines(&self.to_child) {
            self.one_for_each(1 + whole_lines(&self.clear), heard.len(), &self.clear);
            assert!(self.briefed || said[0] == heard[0], "\"{}\" was the greeting", shown(heard[0]));
            let (told, got) = self.to_child.split_at(self.hello);
            let (answered, stream) = self.clear.split_at(self.answered);
            let (heard, said) = (&heard[1 + whole_lines(answered)..], &said[1 + whole_lines(told)..]);
            each_in_turn(stream, got, said, heard, &OURS_IN_CLEAR);
            self.reached.snooping += 1;
        }
    }

    /// What it says there is for the commands that it got there, if it gave one whole reply for each. Of a 421, which it may say unasked,
    /// nobody knows what it is for.
    fn gate(&mut self) {
        let got = &self.to_backend[self.replayed..];
        let (Some(said), Some(heard)) = (replies(&self.said_at_gate), replies(&self.to_client)) else { return };
        let is_bye = said.iter().any(|reply| reply.starts_with(b"421"));
        if ends_whole(&self.said_at_gate) && said.len() == whole_lines(got) && !is_bye {
            self.one_for_each(whole_lines(&self.inside), heard.len(), &self.inside);
            each_in_turn(&self.inside, got, &said, &heard, &OURS_INSIDE);
            self.reached.gate += 1;
        }
    }

    fn one_for_each(&self, expected: usize, heard: usize, stream: &[u8]) {
        assert!(
            heard == expected,
            "{heard} replies, not {expected}\nclient said \"{}\"\nand got \"{}\"",
            shown(stream),
            shown(&self.to_client)
        );
    }

    /// Nothing that came behind STARTTLS has gone on: the last reply is the one to the STARTTLS line, and the server got of the
    /// stream no more than what stands before it.
    fn ended_behind_starttls(&mut self) {
        let Some(heard) = replies(&self.to_client).filter(|_| !self.spoke_unasked) else { return };
        let (Some(last), Some(before)) = (heard.last(), heard.len().checked_sub(2)) else { return };
        assert!(last.starts_with(b"421 4.7.0 Bytes after STARTTLS"), "it ends with \"{}\"", shown(last));
        let Some(line) = lines(&self.clear).nth(before) else { return };
        let is_it = line.whole && Verb::of(line.text()) == Verb::Starttls && argument(line.text()).is_empty();
        assert!(is_it, "of \"{}\" the {before}th is no STARTTLS", shown(&self.clear));
        let until: usize = lines(&self.clear).take(before + 1).map(|line| line.raw.len()).sum();
        let stream = self.clear[..until].get(self.answered..).unwrap_or_default();
        self.accounts(stream, &self.to_child[self.hello..], false, "child");
        self.reached.behind_starttls += 1;
    }
}

/// Of each command in `stream` that the server got it was heard what the server said to it, of each other a word of ours.
fn each_in_turn(stream: &[u8], got: &[u8], said: &[&[u8]], heard: &[&[u8]], ours: &[&[u8]]) {
    let (mut got, mut said) = (lines(got).peekable(), said.iter());
    for (line, heard) in lines(stream).filter(|line| line.whole).zip(heard) {
        let went_on = line.fault().is_none() && got.next_if(|next| next.raw == line.normal()).is_some();
        let answer = if went_on { said.next() } else { None };
        let is_so = match answer {
            Some(said) if Verb::of(line.text()) == Verb::Ehlo => is_made_of(heard, said),
            Some(said) => said == heard,
            None => ours.iter().any(|ours| heard.starts_with(ours)),
        };
        assert!(
            is_so,
            "of \"{}\"\n\"{}\" was answered \"{}\"\nand not {:?}",
            shown(stream),
            shown(line.raw),
            shown(heard),
            answer.map(|said| shown(said))
        );
    }
}
