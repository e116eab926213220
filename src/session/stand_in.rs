//! The stand-in: says what was learned of a plaintext server that is put off until it is needed.
//!
//! It knows the greeting, EHLO and HELO with a name, and NOOP, RSET and QUIT alone (where the reply names the client, only behind a hello);
//! of these only the hello leaves a trace in a server (RFC 5321 4.1.4, 4.1.1.5, 4.1.1.9), so that is what the server is told when it
//! comes. Whatever else a client says is the server's own to answer: it is summoned, and judges the same line itself. What it then says
//! to greeting and hello must be of the class that was learned; else the client has been told what is not so, and hears 421.

use core::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use crate::buffer::Buffer;
use crate::smtp::command::{self, Verb};
use crate::smtp::ehlo::{self, Edit};
use crate::smtp::line::Peek;

use super::end::{ChildEnd, EndReason};
use super::learned::{Asked, Learned};
use super::phase::{Cause, Phase};
use super::replay::{Progress, Run};
use super::snoop::Verdict;
use super::transcript::Entry;
use super::{Note, Session};

/// The longest name that is echoed (RFC 1035 2.3.4).
const NAME: usize = 255;

/// Says what was learned of a server, to one client.
#[derive(Debug)]
pub struct StandIn {
    learned: Arc<Learned>,
    address: Option<IpAddr>,
    /// The last hello that was answered, with CRLF.
    hello: Option<Vec<u8>>,
}

impl StandIn {
    /// One for a client of this address; `None`: it would have to name an address that nobody knows.
    #[must_use]
    pub fn new(learned: Arc<Learned>, address: Option<IpAddr>) -> Option<Self> {
        let is_enough = address.is_some() || !learned.names_address();
        is_enough.then_some(Self { learned, address, hello: None })
    }

    pub(super) fn greet(&mut self, out: &mut Buffer) {
        self.learned.say(Asked::Greeting, b"", self.address, out.as_mut_vec());
    }

    /// What this line is, where the answer to it is known.
    fn knows(&self, verb: Verb, line: &[u8]) -> Option<Asked> {
        let argument = command::argument(line);
        let is_plain = match verb {
            Verb::Ehlo | Verb::Helo => is_name(argument),
            _ => argument.is_empty(),
        };
        let asked = Asked::by(verb).filter(|asked| is_plain && self.learned.knows(*asked))?;
        let is_nameless = asked != Asked::Ehlo && asked != Asked::Helo && self.hello.is_none();
        (!is_nameless || !self.learned.names_client(asked)).then_some(asked)
    }

    /// What the client calls itself, in this line or in its last hello.
    fn name<'a>(&'a self, asked: Asked, line: &'a [u8]) -> &'a [u8] {
        let hello = if matches!(asked, Asked::Ehlo | Asked::Helo) { Some(line) } else { self.hello.as_deref() };
        hello.map(command::argument).unwrap_or_default()
    }

    fn steps(&self) -> impl Iterator<Item = Entry> {
        self.hello.clone().into_iter().map(Entry::answered_elsewhere)
    }
}

/// A domain name, as far as every server takes it for one. What else may stand there (a literal, an underscore), not all take.
fn is_name(argument: &[u8]) -> bool {
    let is_label = |label: &[u8]| {
        let is_inside = |octet: &u8| octet.is_ascii_alphanumeric() || *octet == b'-';
        label.iter().all(is_inside) && label.first().is_some_and(u8::is_ascii_alphanumeric) && !label.ends_with(b"-")
    };
    argument.len() <= NAME && argument.split(|octet| *octet == b'.').all(is_label)
}

impl Session {
    /// Whether the server is not there yet.
    #[must_use]
    pub fn is_lazy(&self) -> bool {
        self.stand_in.is_some()
    }

    /// Nobody stands behind the dialogue who would see its end.
    pub(super) fn is_alone(&self) -> bool {
        self.phase == Phase::Gate || self.stand_in.is_some()
    }

    /// Whether only the server itself can act on this.
    pub(super) fn needs_server(&mut self, verdict: &Verdict) -> bool {
        match verdict {
            Verdict::Forward(verb) => match (self.dialogue.lines.peek(), &self.stand_in) {
                (Peek::Line(line), Some(stand_in)) => stand_in.knows(*verb, line).is_none(),
                _ => true,
            },
            Verdict::Alone | Verdict::Cutoff => true,
            Verdict::Starttls => self.policy.way.keeps(),
            Verdict::Wait | Verdict::Answer(_) | Verdict::End(_) => false,
        }
    }

    /// The line in front is answered by the stand-in, which knows it.
    pub(super) fn answer_for_server(&mut self, verb: Verb, now: Instant) {
        let (Peek::Line(line), Some(stand_in)) = (self.dialogue.lines.peek(), &mut self.stand_in) else { return };
        let Some(asked) = stand_in.knows(verb, line) else { return };
        let number = self.transcript.record(verb, line);
        self.transcript.answered(number, b'2');
        let out = self.to_client.as_mut_vec();
        let mut offers = false;
        if asked == Asked::Ehlo {
            let mut reply = Vec::new();
            stand_in.learned.say(asked, stand_in.name(asked, line), stand_in.address, &mut reply);
            let is_edited = ehlo::is_all_250(&reply);
            self.starttls.is_offered |= is_edited && self.policy.offer_tls;
            offers = is_edited && ehlo::offers(&reply, "STARTTLS");
            let edit = Edit { offer_starttls: self.policy.offer_tls, hide_auth: self.policy.require_tls };
            ehlo::edit(&reply, edit, out);
        } else {
            stand_in.learned.say(asked, stand_in.name(asked, line), stand_in.address, out);
        }
        if matches!(asked, Asked::Ehlo | Asked::Helo) {
            stand_in.hello = Some([line, b"\r\n"].concat());
        }
        self.dialogue.lines.consume();
        self.snooper.count();
        self.timers.touch(now);
        if offers {
            self.note_once(Note::ChildOffersStarttls);
        }
        if asked == Asked::Quit {
            self.quit_seen = true;
            self.finish(EndReason::Over, now);
        }
    }

    /// The server is there: it has been started, or its connection stands.
    pub fn handle_summoned(&mut self, now: Instant) {
        self.step(Cause::Summoned, now);
    }

    /// In `Brief`: one that nobody has answered for greets the client itself.
    pub(super) fn begin_briefing(&mut self, now: Instant) {
        match &self.stand_in {
            Some(stand_in) => self.replay = Some(Run::new(stand_in.steps().collect())),
            None => self.end_briefing(now),
        }
    }

    /// In `Brief`: the server speaks.
    pub(super) fn brief(&mut self, octets: &[u8], now: Instant) {
        let Some(run) = &mut self.replay else { return };
        match run.hear(octets, &mut self.to_child) {
            Ok(Progress::Waiting | Progress::Greeted) => {}
            Ok(Progress::Done) => self.end_briefing(now),
            Err(why) => self.finish(EndReason::Child(ChildEnd::Differs(why)), now),
        }
    }

    fn end_briefing(&mut self, now: Instant) {
        self.replay = None;
        self.stand_in = None;
        self.step(Cause::Briefed, now);
        self.take_commands(now);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::session::learned::{Heard, Prober};
    use crate::session::policy::Cutoff;
    use crate::session::{ClientEnd, Policy, Way, limits};
    use crate::smtp::reply::Ours;

    const SERVER: [(Asked, &[u8]); 6] = [
        (Asked::Greeting, b"220 mx\r\n"),
        (Asked::Ehlo, b"250-mx hello p.invalid\r\n250 SIZE 9\r\n"),
        (Asked::Helo, b"250 mx\r\n"),
        (Asked::Noop, b"250 ok\r\n"),
        (Asked::Rset, b"250 flushed\r\n"),
        (Asked::Quit, b"221 bye\r\n"),
    ];

    fn session(policy: Policy, now: Instant) -> Session {
        let mut heard = Heard::default();
        SERVER.iter().for_each(|(asked, reply)| heard.note(*asked, reply));
        let learned = Learned::from_probe(&heard, Prober { name: "p.invalid", address: None }).unwrap();
        Session::lazily(Arc::new(policy), StandIn::new(Arc::new(learned), None).unwrap(), now)
    }

    /// What the client hears of it, and nothing that anybody else does.
    fn says(session: &mut Session, line: &[u8], reply: &[u8]) {
        session.handle_client(line, Instant::now());
        let said = core::mem::take(session.to_client.as_mut_vec());
        assert_eq!(said.escape_ascii().to_string(), reply.escape_ascii().to_string());
        assert!(session.to_child.is_empty() && session.to_backend.is_empty());
    }

    #[test]
    fn what_is_learned_is_said_without_a_server() {
        let mut session = session(Policy::default(), Instant::now());
        let talk: [(&[u8], &[u8]); 5] = [
            (b"", b"220 mx\r\n"),
            (b"ehlo c.example\r\n", b"250-mx hello c.example\r\n250-STARTTLS\r\n250 SIZE 9\r\n"),
            (b"NOOP\r\nRSET\n", b"250 ok\r\n250 flushed\r\n"),
            (b"STARTTLS x\r\nHELO c.example\r\n", b"501 5.5.4 STARTTLS takes no parameter\r\n250 mx\r\n"),
            (b"QUIT\r\nNOOP\r\n", b"221 bye\r\n"),
        ];
        talk.iter().for_each(|(line, reply)| says(&mut session, line, reply));
        assert_eq!((session.end(), session.recorded()), (Some(&EndReason::Over), 5));
    }

    #[test]
    fn what_is_not_learned_is_the_servers_which_is_told_the_last_hello_first() {
        let odd: [&[u8]; 10] = [
            b"MAIL FROM:<a@b>\r\n",
            b"EHLO [192.0.2.1]\r\n",
            b"EHLO a_b\r\n",
            b"EHLO\r\n",
            b"HELO a b\r\n",
            b"NOOP x\r\n",
            b"RSET x\r\n",
            b"VRFY x\r\n",
            b"HELP\r\n",
            b"FROB\r\n",
        ];
        for line in odd {
            let now = Instant::now();
            let mut session = session(Policy::default(), now);
            says(&mut session, b"EHLO a.example\r\nEHLO c.example\r\n", &[&b"220 mx\r\n"[..], b"250-mx hello a.example\r\n250-STARTTLS\r\n250 SIZE 9\r\n250-mx hello c.example\r\n250-STARTTLS\r\n250 SIZE 9\r\n"].concat());
            says(&mut session, line, b"");
            assert_eq!(session.phase(), Phase::Summon, "{}", line.escape_ascii());
            session.handle_summoned(now);
            session.handle_child(b"220-other\r\n220 greeting\r\n", now);
            assert_eq!(core::mem::take(session.to_child.as_mut_vec()), b"EHLO c.example\r\n");
            session.handle_child(b"250 STARTTLS\r\n", now);
            let relayed = if line.starts_with(b"MAIL") { Phase::RelayPlain } else { Phase::Snoop };
            assert_eq!((session.phase(), session.is_lazy()), (relayed, false), "{}", line.escape_ascii());
            assert_eq!(session.to_child.as_slice(), line);
            assert!(session.to_client.is_empty(), "what it said to us is not for the client");
        }
    }

    #[test]
    fn another_server_than_was_learned_of_is_421() {
        let replies: [(&[u8], &str); 4] = [
            (b"554 go away\r\n", "it greeted with 554"),
            (b"220 mx\r\n550 no\r\n", "more octets behind its 220 reply"),
            (b"hello\r\n", "it speaks no SMTP"),
            (b"", "it closed"),
        ];
        for (reply, why) in replies {
            let now = Instant::now();
            let mut session = session(Policy::default(), now);
            says(&mut session, b"HELO c\r\n", b"220 mx\r\n250 mx\r\n");
            says(&mut session, b"MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\n", b"");
            session.handle_summoned(now);
            if reply.is_empty() {
                session.handle_child_eof(now)
            } else {
                session.handle_child(reply, now)
            }
            assert_eq!(session.end(), Some(&EndReason::Child(ChildEnd::Differs(why.to_owned()))));
            assert_eq!(session.to_client.as_slice(), Ours::NOT_AVAILABLE.octets());
        }
        let now = Instant::now();
        let mut session = session(Policy::default(), now);
        says(
            &mut session,
            b"EHLO c\r\nMAIL FROM:<>\r\n",
            b"220 mx\r\n250-mx hello c\r\n250-STARTTLS\r\n250 SIZE 9\r\n",
        );
        session.handle_summoned(now);
        session.handle_child(b"220 mx\r\n", now);
        session.handle_child(b"502 no EHLO\r\n", now);
        assert!(matches!(session.end(), Some(EndReason::Child(ChildEnd::Differs(_)))));
    }

    #[test]
    fn a_server_that_does_not_come_in_time_is_421() {
        for is_there in [false, true] {
            let now = Instant::now();
            let mut session = session(Policy::default(), now);
            says(&mut session, b"MAIL FROM:<>\r\n", b"220 mx\r\n");
            if is_there {
                session.handle_summoned(now);
            }
            session.handle_timeout(session.deadline().unwrap());
            let reason = session.end().unwrap().to_string();
            let wanted =
                if is_there { "child is not what was learned of it: time-out" } else { "child not started: time-out" };
            assert_eq!(reason, wanted);
            assert_eq!(session.to_client.as_slice(), Ours::NOT_AVAILABLE.octets());
        }
    }

    #[test]
    fn a_reply_that_names_the_client_names_it_as_it_was_said() {
        let text = "greeting 220 mx\nehlo 250 mx\nhelo 250 mx\nnoop 250 ok\nrset 250 flushed, %h\nquit 221 bye %h\n";
        let learned = Arc::new(Learned::parse(text).unwrap());
        let begin = || {
            let stand_in = StandIn::new(learned.clone(), None).unwrap();
            Session::lazily(Arc::new(Policy { offer_tls: false, ..Policy::default() }), stand_in, Instant::now())
        };
        let mut session = begin();
        says(&mut session, b"NOOP\r\nHELO a\r\nEHLO c.example \r\n", b"220 mx\r\n250 ok\r\n250 mx\r\n250 mx\r\n");
        says(&mut session, b"RSET\r\nQUIT\r\n", b"250 flushed, c.example\r\n221 bye c.example\r\n");
        // Nobody knows what it says to one without a name.
        let mut session = begin();
        says(&mut session, b"RSET\r\n", b"220 mx\r\n");
        assert_eq!(session.phase(), Phase::Summon);
    }

    #[test]
    fn starttls_needs_no_server_but_where_it_is_kept() {
        for (way, phase) in [(Way::Tls, Phase::Dial), (Way::Raw, Phase::Dial), (Way::Keep, Phase::Summon)] {
            let now = Instant::now();
            let mut session = session(Policy { way, ..Policy::default() }, now);
            says(&mut session, b"STARTTLS\r\n", b"220 mx\r\n");
            assert_eq!(session.phase(), phase, "{way}");
        }
    }

    #[test]
    fn starttls_is_offered_and_a_server_that_does_so_itself_is_noted() {
        for (own, noted) in [("", None), ("ehlo 250-STARTTLS\n", Some(Note::ChildOffersStarttls))] {
            let text = format!("greeting 220 mx\nehlo 250-mx\n{own}ehlo 250 SIZE 9\n");
            let stand_in = StandIn::new(Arc::new(Learned::parse(&text).unwrap()), None).unwrap();
            let mut session = Session::lazily(Arc::new(Policy::default()), stand_in, Instant::now());
            says(&mut session, b"EHLO c\r\n", b"220 mx\r\n250-mx\r\n250-STARTTLS\r\n250 SIZE 9\r\n");
            assert!(session.starttls_so_far().is_offered);
            assert_eq!(session.poll_note(), noted);
        }
        let mut session = session(Policy { offer_tls: false, ..Policy::default() }, Instant::now());
        says(&mut session, b"EHLO c\r\n", b"220 mx\r\n250-mx hello c\r\n250 SIZE 9\r\n");
        assert!(!session.starttls_so_far().is_offered);
    }

    #[test]
    fn a_failed_hand_over_leaves_the_stand_in_where_it_was() {
        let now = Instant::now();
        let mut session = session(Policy::default(), now);
        says(&mut session, b"STARTTLS\r\n", b"220 mx\r\n");
        session.handle_handover_failed("refused".to_owned(), now);
        assert!(session.to_client.as_slice().starts_with(b"454 "));
        session.to_client.clear();
        says(&mut session, b"NOOP\r\n", b"250 ok\r\n");
        assert!(session.is_lazy());
    }

    #[test]
    fn bytes_behind_starttls_are_refused_whoever_answers() {
        for way in [Way::Tls, Way::Keep] {
            let now = Instant::now();
            let mut session = session(Policy { way, ..Policy::default() }, now);
            session.to_client.clear();
            session.handle_client(b"STARTTLS\r\nMAIL FROM:<>\r\n", now);
            if way.keeps() {
                session.handle_summoned(now);
                session.handle_child(b"220 mx\r\n", now);
            }
            assert_eq!(session.end(), Some(&EndReason::Client(ClientEnd::BytesAfterStarttls)), "{way}");
            assert!(session.to_child.is_empty() && session.to_backend.is_empty());
        }
    }

    #[test]
    fn the_clients_end_is_the_sessions() {
        for (line, is_quiet) in [(&b"NOOP\r\n"[..], true), (b"NOOP", true), (b"HELP\r\n", false)] {
            let now = Instant::now();
            let mut session = session(Policy::default(), now);
            session.handle_client(line, now);
            session.handle_client_eof(now);
            let gone = EndReason::Client(ClientEnd::Gone);
            assert_eq!(session.end(), is_quiet.then_some(&gone), "{}", line.escape_ascii());
        }
    }

    #[test]
    fn a_cutoff_by_count_and_a_client_that_does_not_read_hold_here_too() {
        let now = Instant::now();
        let cutoff = Cutoff { commands: Some(2), ..Cutoff::default() };
        let mut session = session(Policy { cutoff, ..Policy::default() }, now);
        says(&mut session, b"NOOP\r\nNOOP\r\n", b"220 mx\r\n250 ok\r\n250 ok\r\n");
        says(&mut session, b"NOOP\r\n", b"");
        assert_eq!(session.phase(), Phase::Summon);

        let mut session = self::session(Policy::default(), now);
        while session.client_room() > 0 {
            session.handle_client(b"NOOP\r\n", now);
        }
        assert!(session.to_client.len() <= limits::TO_CLIENT + 64);
        session.to_client.clear();
        session.handle_written(now);
        assert!(session.client_room() > 0);
    }
}
