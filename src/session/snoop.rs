//! The snooper's judgement: what is to be done with the line in front. It decides; the session acts.

use crate::smtp::command::{self, Kind, Verb};
use crate::smtp::line::{Fault, Lines, Peek};
use crate::smtp::reply::Ours;

use super::end::{ClientEnd, EndReason, PolicyEnd};
use super::limits;
use super::policy::Policy;

/// What to do with the line in front.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing is whole yet.
    Wait,
    /// Send it to the child and record it.
    Forward(Verb),
    /// Send it to the child when nothing else is owed, and hold what follows.
    Alone,
    /// Answer it ourselves.
    Answer(Ours),
    /// STARTTLS, when nothing else is owed.
    Starttls,
    /// Stop snooping, when nothing else is owed; the line and all behind it stay as they are.
    Cutoff,
    /// The session ends in turn.
    End(EndReason),
}

/// What the judgement depends on besides the line: counts of this session. Counting is done when a line is judged for
/// good, so `Wait`, `Alone`, `Starttls` and `Cutoff`, which may be judged again, count nothing.
#[derive(Debug, Default)]
pub(super) struct Snooper {
    commands: u32,
    bad_lines: u32,
    refusals: u32,
    /// The verb of the present line, once it was seen before its argument.
    head: Option<Verb>,
    /// `seconds=N` has passed.
    time_is_up: bool,
}

impl Snooper {
    /// `--cutoff seconds=N` has passed: the next command, whatever it is, is the cutoff.
    pub(super) fn time_is_up(&mut self) {
        self.time_is_up = true;
    }

    /// Whether that has happened already.
    pub(super) fn is_time_up(&self) -> bool {
        self.time_is_up
    }

    /// A line that was judged `Forward`, `Alone` or `Starttls` has been taken.
    pub(super) fn count(&mut self) {
        self.commands = self.commands.saturating_add(1);
    }

    /// Judges the line in front.
    pub(super) fn judge(&mut self, lines: &mut Lines, policy: &Policy) -> Verdict {
        if lines.first().is_some_and(command::is_tls_record) {
            return Verdict::End(EndReason::Client(ClientEnd::NotSmtp));
        }
        if let Peek::Head(head) = lines.peek() {
            let verb = Verb::of(head);
            if self.is_cutoff(verb, policy) && !policy.require_tls {
                return Verdict::Cutoff;
            }
            self.head = Some(verb);
            lines.pass_head();
        }
        match lines.peek() {
            Peek::Incomplete | Peek::Head(_) => Verdict::Wait,
            // Decided on the verb, whatever its argument is like.
            Peek::Faulty(fault) => match self.head.take() {
                Some(verb) if self.is_cutoff(verb, policy) => self.refuse(policy),
                Some(_) | None => self.bad_line(fault),
            },
            Peek::Line(line) => {
                self.head = None;
                let verb = Verb::of(line);
                let bare = command::argument(line).is_empty();
                self.command(verb, bare, policy)
            }
        }
    }

    fn command(&mut self, verb: Verb, bare: bool, policy: &Policy) -> Verdict {
        match verb.kind() {
            Kind::Foreign => Verdict::End(EndReason::Client(ClientEnd::NotSmtp)),
            Kind::Starttls if self.time_is_up => Verdict::Cutoff,
            Kind::Starttls if bare => Verdict::Starttls,
            Kind::Starttls => {
                self.count();
                Verdict::Answer(Ours::NO_PARAMETER)
            }
            _ if self.is_cutoff(verb, policy) => {
                if policy.require_tls {
                    self.refuse(policy)
                } else {
                    Verdict::Cutoff
                }
            }
            // RFC 3207 4: nothing else is served without TLS.
            _ if policy.require_tls && !matches!(verb, Verb::Ehlo | Verb::Noop | Verb::Quit) => self.refuse(policy),
            // The child must not start a TLS of its own.
            Kind::Disguised => self.bad_line(Fault::BadOctet),
            Kind::Hello | Kind::Harmless => Verdict::Forward(verb),
            Kind::Claim => {
                self.count();
                Verdict::Answer(Ours::NOT_FOR_CLIENTS)
            }
            Kind::Unknown | Kind::Cutoff => Verdict::Alone,
        }
    }

    /// Whether the verb ends the snooping: by name, or because so many commands or seconds have passed.
    fn is_cutoff(&self, verb: Verb, policy: &Policy) -> bool {
        let by_count = policy.cutoff.commands.is_some_and(|limit| self.commands >= limit);
        match verb.kind() {
            Kind::Claim | Kind::Foreign | Kind::Disguised => false,
            // The command after the last of N may still be STARTTLS; after N seconds it comes too late.
            Kind::Starttls => self.time_is_up,
            // Ending is always allowed, whatever is required.
            Kind::Harmless if policy.require_tls && verb == Verb::Quit => false,
            Kind::Hello | Kind::Harmless | Kind::Cutoff | Kind::Unknown => {
                policy.cutoff.verbs.contains(&verb) || by_count || self.time_is_up
            }
        }
    }

    fn bad_line(&mut self, fault: Fault) -> Verdict {
        self.count();
        self.bad_lines += 1;
        if self.bad_lines > limits::BAD_LINES {
            return Verdict::End(EndReason::Client(ClientEnd::BadLines));
        }
        Verdict::Answer(match fault {
            Fault::TooLong => Ours::LINE_TOO_LONG,
            Fault::BadOctet => Ours::BAD_OCTET,
        })
    }

    fn refuse(&mut self, policy: &Policy) -> Verdict {
        self.count();
        self.refusals = self.refusals.saturating_add(1);
        if self.refusals > policy.refusals {
            return Verdict::End(EndReason::Policy(PolicyEnd::TlsRequired));
        }
        Verdict::Answer(Ours::STARTTLS_FIRST)
    }

    /// The same judgement inside TLS (protocol.md, STARTTLS 5): EHLO or HELO is the cutoff that opens the gate.
    pub(super) fn judge_at_gate(&mut self, lines: &mut Lines) -> Verdict {
        if let Peek::Head(_) = lines.peek() {
            lines.pass_head();
        }
        match lines.peek() {
            Peek::Incomplete | Peek::Head(_) => Verdict::Wait,
            Peek::Faulty(fault) => self.bad_line(fault),
            Peek::Line(line) => {
                let verb = Verb::of(line);
                match verb.kind() {
                    Kind::Hello => Verdict::Cutoff,
                    Kind::Harmless => Verdict::Forward(verb),
                    Kind::Starttls | Kind::Cutoff | Kind::Claim | Kind::Foreign | Kind::Disguised | Kind::Unknown => {
                        self.count();
                        Verdict::Answer(Ours::HELLO_FIRST)
                    }
                }
            }
        }
    }
}
