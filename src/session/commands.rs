//! Both sides of a dialogue: the client's commands are taken, the server's replies heard, each in its order.

use std::time::Instant;

use crate::smtp::command::Verb;
use crate::smtp::ehlo::Edit;
use crate::smtp::line::Peek;
use crate::smtp::reply::Ours;

use super::dialogue::{Asked, Heard};
use super::end::{BackendEnd, ChildEnd, ClientEnd, EndReason};
use super::limits;
use super::phase::{Cause, Phase};
use super::snoop::Verdict;
use super::transcript;
use super::{Note, Session};

impl Session {
    /// Takes commands as long as they are whole and their replies can be owed; says what is ours when it is its turn.
    pub(super) fn take_commands(&mut self, now: Instant) {
        loop {
            if let Some(reason) = self.dialogue.settle(&mut self.to_client) {
                return self.finish(reason, now);
            }
            let waiting = self.to_child.len().max(self.to_backend.len());
            let unread = self.to_client.len();
            if !self.dialogue.may_take() || waiting > limits::TO_SERVER || unread > limits::TO_CLIENT {
                return;
            }
            let (lines, policy) = (&mut self.dialogue.lines, &self.policy);
            let verdict = match self.phase {
                Phase::Snoop => self.snooper.judge(lines, policy),
                Phase::Gate => self.snooper.judge_at_gate(lines),
                Phase::Summon
                | Phase::Brief
                | Phase::Dial
                | Phase::SecureBackend
                | Phase::Start
                | Phase::Tell
                | Phase::Greeting
                | Phase::Replay
                | Phase::Commit
                | Phase::Announce
                | Phase::SecureClient
                | Phase::RelayPlain
                | Phase::RelayTls
                | Phase::Close => return,
            };
            // What it has begun would pass for the answer, or be the first that is heard behind the EHLO.
            let passes = matches!(verdict, Verdict::Forward(_) | Verdict::Cutoff);
            if self.phase == Phase::Gate && passes && self.dialogue.is_quiet() && self.dialogue.is_inside_code() {
                return self.finish(EndReason::Backend(BackendEnd::Unasked), now);
            }
            let in_turn = matches!(verdict, Verdict::Starttls | Verdict::Cutoff | Verdict::Alone);
            if in_turn && !self.dialogue.is_quiet() {
                return;
            }
            match verdict {
                // Nobody else is there who could end it.
                Verdict::Wait if self.client_eof && self.is_alone() && self.dialogue.is_quiet() => {
                    return self.finish(self.client_gone(), now);
                }
                Verdict::Wait => return,
                verdict if self.stand_in.is_some() && self.needs_server(&verdict) => {
                    return self.step(Cause::Wanted, now);
                }
                Verdict::Forward(verb) if self.stand_in.is_some() => self.answer_for_server(verb, now),
                Verdict::Forward(verb) => self.forward(verb, now),
                Verdict::Alone => {
                    self.timers.sent_unknown(now);
                    self.forward(Verb::Unknown, now);
                }
                Verdict::Answer(reply) => {
                    self.dialogue.lines.consume();
                    self.timers.touch(now);
                    if reply.is_error() && self.is_one_error_too_many() {
                        self.dialogue.end_in_turn(EndReason::Client(ClientEnd::Errors));
                    } else {
                        self.dialogue.answer(reply);
                    }
                }
                Verdict::Starttls => self.starttls(now),
                Verdict::Cutoff if self.phase == Phase::Gate => return self.open(now),
                Verdict::Cutoff => return self.cut_off(now),
                Verdict::End(reason) => {
                    self.dialogue.lines.consume();
                    self.dialogue.end_in_turn(reason);
                }
            }
        }
    }

    /// The line in front goes to the server, with CRLF, so that both read the same line.
    pub(super) fn forward(&mut self, verb: Verb, now: Instant) {
        let out = if self.phase == Phase::Gate { &mut self.to_backend } else { &mut self.to_child };
        let mut asked = Asked::Unknown;
        if let Peek::Line(line) = self.dialogue.lines.peek() {
            out.push(line);
            out.push(b"\r\n");
            if verb != Verb::Unknown {
                // Nothing is recorded at the gate: what it lets through goes to the backend itself.
                let at_gate = self.phase == Phase::Gate;
                let number = if at_gate { transcript::NONE } else { self.transcript.record(verb, line) };
                asked = if verb == Verb::Ehlo { Asked::Ehlo(number) } else { Asked::Recorded(number) };
            }
        }
        self.quit_seen |= verb == Verb::Quit;
        self.dialogue.lines.consume();
        self.dialogue.ask(asked);
        self.snooper.count();
        self.timers.touch(now);
    }

    /// STARTTLS has its turn.
    pub(super) fn starttls(&mut self, now: Instant) {
        self.dialogue.lines.consume();
        self.snooper.count();
        self.timers.touch(now);
        self.starttls.asked += 1;
        if !self.dialogue.lines.is_empty() {
            self.dialogue.end_in_turn(EndReason::Client(ClientEnd::BytesAfterStarttls));
        } else if self.policy.max_starttls.is_some_and(|most| self.failed_starttls >= most) {
            self.dialogue.end_in_turn(EndReason::Client(ClientEnd::Starttls));
        } else if !self.policy.offer_tls {
            self.note_once(Note::NoCertificate);
            self.starttls.refused += 1;
            self.refuse_tls();
        } else if self.failed_handovers >= limits::HANDOVERS {
            self.note_once(Note::TooManyHandovers);
            self.starttls.refused += 1;
            self.refuse_tls();
        } else if self.client_eof {
            self.finish(EndReason::Client(ClientEnd::Gone), now);
        } else {
            self.step(Cause::Starttls, now);
        }
    }

    /// STARTTLS is answered 454.
    pub(super) fn refuse_tls(&mut self) {
        self.failed_starttls = self.failed_starttls.saturating_add(1);
        self.dialogue.answer(Ours::TLS_NOT_AVAILABLE);
    }

    /// Counts a command that is answered 5yz.
    fn is_one_error_too_many(&mut self) -> bool {
        self.errors = self.errors.saturating_add(1);
        self.policy.max_errors.is_some_and(|most| self.errors > most)
    }

    /// Snooping stops: what is held goes on as it came.
    pub(super) fn cut_off(&mut self, now: Instant) {
        let mut dialogue = core::mem::take(&mut self.dialogue);
        if let Some(reason) = dialogue.give_up(&mut self.to_client) {
            return self.finish(reason, now);
        }
        self.to_child.push(&dialogue.lines.into_held());
        self.transcript.forget();
        self.timers.touch(now);
        self.step(Cause::Cutoff, now);
    }

    /// EHLO inside TLS: it goes on, and everything behind it.
    pub(super) fn open(&mut self, now: Instant) {
        let dialogue = core::mem::take(&mut self.dialogue);
        self.to_backend.push(&dialogue.lines.into_held());
        self.transcript.forget();
        self.timers.touch(now);
        self.step(Cause::Opened, now);
    }

    /// The server of the present dialogue speaks.
    pub(super) fn hear(&mut self, octets: &[u8], edit: Option<Edit>, now: Instant) {
        let mut rest = octets;
        while !rest.is_empty() {
            match self.phase {
                Phase::Snoop | Phase::Gate => {}
                // In one read with the reply that let STARTTLS have its turn: unasked, and passed on.
                Phase::Dial
                | Phase::SecureBackend
                | Phase::Start
                | Phase::Tell
                | Phase::Greeting
                | Phase::Replay
                | Phase::Commit => {}
                Phase::Summon | Phase::Brief => return,
                // In one read with what ended the snooping.
                Phase::RelayPlain | Phase::RelayTls => return self.to_client.push(rest),
                Phase::Announce | Phase::SecureClient | Phase::Close => return,
            }
            let (used, heard) = self.dialogue.hear(rest, edit, &mut self.to_client);
            rest = &rest[used..];
            match heard {
                Heard::Part => {}
                // It would stand where the client expects the answer to its EHLO; only an end may be announced so.
                Heard::OutOfTurn => return self.finish(EndReason::Backend(BackendEnd::Unasked), now),
                Heard::Unasked => self.take_commands(now),
                Heard::Answer(asked, code) => {
                    self.timers.touch(now);
                    self.answered(asked, code.class(), now);
                }
                Heard::NotSmtp => self.no_smtp(now),
            }
        }
    }

    /// Has the operator told, but not again and again because a client asks again and again.
    pub(super) fn note_once(&mut self, note: Note) {
        if !self.noted.contains(&note) {
            self.noted.push(note.clone());
            self.notes.push(note);
        }
    }

    pub(super) fn answered(&mut self, asked: Asked, class: u8, now: Instant) {
        if self.policy.offer_tls && self.dialogue.take_edited() {
            self.starttls.is_offered = true;
        }
        if self.dialogue.take_own_starttls() {
            self.note_once(Note::ChildOffersStarttls);
        }
        // The server's own reply has gone out, and the 421 goes behind it.
        if class == b'5' && asked != Asked::Greeting && self.is_one_error_too_many() {
            return self.finish(EndReason::Client(ClientEnd::Errors), now);
        }
        match asked {
            Asked::Ehlo(number) | Asked::Recorded(number) => self.transcript.answered(number, class),
            Asked::Unknown if class != b'5' && self.phase == Phase::Snoop => return self.cut_off(now),
            Asked::Unknown | Asked::Greeting => {}
        }
        if class == b'3' && self.phase == Phase::Snoop {
            return self.no_smtp(now);
        }
        self.take_commands(now);
    }

    /// What the server speaks can't be followed any more.
    pub(super) fn no_smtp(&mut self, now: Instant) {
        if self.phase == Phase::Gate {
            return self.finish(EndReason::Backend(BackendEnd::Gone), now);
        }
        if self.is_handover() {
            self.handle_handover_failed("the child speaks no SMTP".to_owned(), now);
        }
        self.notes.push(Note::ChildNotSmtp);
        // Of a faulty line a part is thrown away already: the child would take its rest for a command.
        if self.policy.require_tls || self.dialogue.lines.is_faulty() {
            self.finish(EndReason::Child(ChildEnd::NotSmtp), now);
        } else {
            self.cut_off(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::Policy;
    use std::sync::Arc;

    fn greeted(now: Instant) -> Session {
        let mut session = Session::new(Arc::new(Policy::default()), now);
        session.handle_child(b"220 h\r\n", now);
        session.to_client.clear();
        session
    }

    fn replies(policy: Policy, lines: &[u8], now: Instant) -> (String, Session) {
        let mut session = Session::new(Arc::new(policy), now);
        session.handle_child(b"220 h\r\n", now);
        session.to_client.clear();
        session.handle_client(lines, now);
        (String::from_utf8(session.to_client.as_slice().to_vec()).unwrap_or_default(), session)
    }

    #[test]
    fn a_ucspi_child_has_no_limit_of_errors_but_that_of_bad_lines_and_no_end_of_454() {
        let (said, session) = replies(Policy::default(), &b"XCLIENT x\r\n".repeat(100), Instant::now());
        assert_eq!((said.matches("550 ").count(), session.end()), (100, None));
        let without = Policy { offer_tls: false, ..Policy::default() };
        let now = Instant::now();
        let (_, mut session) = replies(without, b"", now);
        for _ in 0..100 {
            session.to_client.clear();
            session.handle_client(b"STARTTLS\r\n", now);
            assert_eq!((session.to_client.as_slice(), session.end()), (Ours::TLS_NOT_AVAILABLE.octets(), None));
        }
    }

    #[test]
    fn no_error_at_all_is_borne_where_the_limit_is_0() {
        let none = Policy { max_errors: Some(0), max_starttls: Some(0), ..Policy::default() };
        let (said, session) = replies(none.clone(), b"XCLIENT x\r\n", Instant::now());
        assert_eq!(
            (said.as_bytes(), session.end()),
            (Ours::TOO_MANY_ERRORS.octets(), Some(&EndReason::Client(ClientEnd::Errors)))
        );
        let (said, session) = replies(none, b"STARTTLS\r\n", Instant::now());
        assert_eq!(
            (said.as_bytes(), session.end()),
            (Ours::TOO_MANY_STARTTLS.octets(), Some(&EndReason::Client(ClientEnd::Starttls)))
        );
    }

    #[test]
    fn commands_wait_while_the_child_takes_nothing() {
        let now = Instant::now();
        let mut session = greeted(now);
        let line = [b"NOOP ", &[b'a'; 4000][..], b"\r\n"].concat();
        for _ in 0..4 {
            session.handle_client(&line, now);
        }
        assert!(session.to_child.len() <= limits::TO_SERVER && session.client_room() > 0);
        session.handle_client(&[&line[..], &line].concat(), now);
        assert_eq!(session.to_child.len(), 5 * line.len(), "the sixth waits");
        assert_eq!(session.client_room(), 0);
        session.to_child.clear();
        session.handle_written(now);
        assert_eq!(session.to_child.as_slice(), line);
        assert!(session.client_room() > 0);
    }

    #[test]
    fn commands_and_the_child_wait_while_the_client_takes_nothing() {
        let now = Instant::now();
        let mut session = greeted(now);
        session.handle_client(b"HELP\r\n", now);
        session.to_child.clear();
        while session.wants_child() {
            session.handle_child(&b"214-help\r\n".repeat(800), now);
        }
        assert!(session.to_client.len() > limits::TO_CLIENT && session.client_room() == 0);
        session.handle_client(b"NOOP\r\n", now);
        assert!(session.to_child.is_empty());
        session.to_client.clear();
        session.handle_written(now);
        assert_eq!(session.to_child.as_slice(), b"NOOP\r\n");
        assert!(session.wants_child() && session.client_room() > 0);
    }
}
