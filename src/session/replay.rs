//! The replay: the backend's greeting is swallowed, then it is told what was recorded, one command at a time, each reply
//! compared with what the child had said (protocol.md, STARTTLS 4 and 5). A child that is kept has greeted already and
//! knows what was said: it is told RSET.
//!
//! Rejected: pipelining the steps. There is one step by default, and a reply that answers the wrong step must be noticed.

use std::collections::VecDeque;

use crate::buffer::Buffer;
use crate::smtp::ehlo;
use crate::smtp::reply::{Scanned, Scanner};

use super::limits;
use super::transcript::Entry;

/// How far the replay has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// More must come.
    Waiting,
    /// The greeting is there, and a step was sent.
    Greeted,
    /// Everything is said and answered.
    Done,
}

/// One replay to one backend.
#[derive(Debug)]
pub struct Run {
    /// What is still to be said; the front was sent if `greeted`.
    steps: VecDeque<Entry>,
    greeted: bool,
    /// The last thing asked is answered, whole, and nothing was said behind it.
    is_in_step: bool,
    scanner: Scanner,
    reply: Vec<u8>,
}

impl Run {
    /// A replay of `steps`.
    #[must_use]
    pub fn new(steps: VecDeque<Entry>) -> Self {
        Self { steps, greeted: false, is_in_step: false, scanner: Scanner::default(), reply: Vec::new() }
    }

    /// RSET to a server that has greeted: what forgets the mail and nothing else (RFC 5321 4.1.1.5).
    pub fn reset(out: &mut Buffer) -> Self {
        let step = Entry::reset();
        out.push(&step.line);
        Self { greeted: true, ..Self::new([step].into()) }
    }

    /// Whether the server owes nothing: what it says next answers what it is asked next.
    pub(super) fn is_in_step(&self) -> bool {
        self.is_in_step
    }

    /// The server has said something that is lost.
    pub(super) fn lose_step(&mut self) {
        self.is_in_step = false;
    }

    /// Takes the backend's octets; what it is to be told next goes to `out`.
    ///
    /// # Errors
    /// What was wrong, in words.
    pub fn hear(&mut self, octets: &[u8], out: &mut Buffer) -> Result<Progress, String> {
        if self.reply.len() + octets.len() > limits::BACKEND_REPLY {
            return Err(format!("a reply of over {} octets", limits::BACKEND_REPLY));
        }
        let mut rest = octets;
        while !rest.is_empty() {
            let (used, scanned) = self.scanner.scan(rest);
            self.reply.extend_from_slice(&rest[..used]);
            rest = &rest[used..];
            match scanned {
                Scanned::Inside | Scanned::Line(_) => {}
                Scanned::NotSmtp => return Err("it speaks no SMTP".to_owned()),
                Scanned::Final(code) if !rest.is_empty() => return Err(format!("more octets behind its {code} reply")),
                Scanned::Final(code) => {
                    self.is_in_step = true;
                    self.judge(code)?;
                    self.reply.clear();
                    return Ok(self.next(out));
                }
            }
        }
        Ok(Progress::Waiting)
    }

    fn judge(&self, code: crate::smtp::reply::Code) -> Result<(), String> {
        if !self.greeted {
            return if code.is(b"220") { Ok(()) } else { Err(format!("it greeted with {code}")) };
        }
        let Some(step) = self.steps.front() else { return Ok(()) };
        if step.is_reset && code.class() != b'2' {
            return Err(format!("it answered {code} to RSET"));
        }
        if step.accepted && matches!(code.class(), b'4' | b'5') {
            return Err(format!("it answered {code} where the child had said 250"));
        }
        if code.class() == b'3' {
            return Err(format!("it answered {code}"));
        }
        if step.is_ehlo && ehlo::offers(&self.reply, "STARTTLS") {
            return Err("it offers STARTTLS inside TLS".to_owned());
        }
        Ok(())
    }

    fn next(&mut self, out: &mut Buffer) -> Progress {
        if self.greeted {
            self.steps.pop_front();
        }
        let first = !self.greeted;
        self.greeted = true;
        match self.steps.front() {
            None => Progress::Done,
            Some(step) => {
                out.push(&step.line);
                self.is_in_step = false;
                if first { Progress::Greeted } else { Progress::Waiting }
            }
        }
    }
}
