//! A dialogue with one server that needs no loop, over whatever leads to it: one command, one whole reply, and every wait has an end.
//!
//! Contract: a reply is held up to the session's own limit ([`limits::BACKEND_REPLY`]); errors are a phrase for a reader, what the
//! server said in it escaped and cut.

use core::fmt;
use std::time::{Duration, Instant};

use super::backend::Backend;
use super::bridge::{Received, Trouble};
use crate::buffer::Buffer;
use crate::logging::escape;
use crate::session::limits;
use crate::session::replay::{Progress, Run};
use crate::smtp::ehlo;
use crate::smtp::reply::{Code, Scanned, Scanner};

/// How much is quoted of a reply.
const QUOTED: usize = 100;

/// One whole reply.
#[derive(Debug)]
pub(crate) struct Reply {
    /// Of its last line.
    pub(crate) code: Code,
    octets: Vec<u8>,
}

impl Reply {
    /// As it came.
    pub(crate) fn octets(&self) -> &[u8] {
        &self.octets
    }

    /// 2yz.
    pub(crate) fn is_good(&self) -> bool {
        self.code.class() == b'2'
    }

    /// Whether this reply to EHLO offers a keyword.
    pub(crate) fn offers(&self, keyword: &str) -> bool {
        ehlo::offers(&self.octets, keyword)
    }

    /// The subject of its enhanced code (RFC 3463): 1 an address, 7 a permission; if it has one.
    pub(crate) fn subject(&self) -> Option<&[u8]> {
        let word = self.lines().last()?.split(|octet| *octet == b' ').next()?;
        let mut parts = word.split(|octet| *octet == b'.');
        let (class, subject, detail) = (parts.next()?, parts.next()?, parts.next()?);
        let are_numbers = [class, subject, detail].iter().all(|part| part.iter().all(u8::is_ascii_digit));
        (are_numbers && class == [self.code.class()]).then_some(subject)
    }

    /// Its lines, without code and line end.
    fn lines(&self) -> impl Iterator<Item = &[u8]> {
        self.octets.split(|octet| *octet == b'\n').filter_map(|line| line.get(4..)).map(<[u8]>::trim_ascii)
    }

    /// What this reply to EHLO offers, as one line.
    pub(crate) fn offered(&self) -> String {
        let offers: Vec<&[u8]> = self.lines().skip(1).filter(|line| !line.is_empty()).collect();
        if offers.is_empty() {
            "no extensions".to_owned()
        } else {
            escape(&offers.join(&b", "[..]), 2 * QUOTED).to_string()
        }
    }

    /// The name that a greeting, or a reply to EHLO, begins with.
    pub(crate) fn name(&self) -> Option<&str> {
        let word = self.lines().next()?.split(|octet| *octet == b' ').next()?;
        core::str::from_utf8(word).ok().filter(|name| !name.is_empty())
    }
}

/// Its last line, quoted.
impl fmt::Display for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let octets = self.octets.trim_ascii_end();
        let start = octets.iter().rposition(|octet| *octet == b'\n').map_or(0, |at| at + 1);
        write!(f, "\"{}\"", escape(&octets[start..], QUOTED))
    }
}

/// What came of a greeting and a replay: all replies, and what was wrong.
pub(crate) struct Replayed {
    pub(crate) replies: Vec<Reply>,
    pub(crate) verdict: Result<(), String>,
}

/// A server that is being spoken to.
pub(crate) struct Talk {
    backend: Backend,
    /// What it has said and nobody has taken.
    heard: Vec<u8>,
}

impl Talk {
    pub(crate) fn new(backend: Backend) -> Self {
        Self { backend, heard: Vec::new() }
    }

    /// The connection, for what it knows.
    pub(crate) fn backend(&self) -> &Backend {
        &self.backend
    }

    /// Has its TLS stand, where there is any.
    pub(crate) fn secure(&mut self, patience: Duration) -> Result<(), String> {
        let due = Instant::now() + patience;
        while !self.backend.is_secure() {
            self.hear_more(due)?;
        }
        Ok(())
    }

    /// The next whole reply.
    pub(crate) fn hear(&mut self, patience: Duration) -> Result<Reply, String> {
        let due = Instant::now() + patience;
        let (mut scanner, mut at) = (Scanner::default(), 0);
        loop {
            while at < self.heard.len() {
                let (used, scanned) = scanner.scan(&self.heard[at..]);
                at += used;
                match scanned {
                    Scanned::Inside | Scanned::Line(_) => {}
                    Scanned::NotSmtp => return Err(format!("it speaks no SMTP: {}", quoted(&self.heard))),
                    Scanned::Final(code) => {
                        let rest = self.heard.split_off(at);
                        return Ok(Reply { code, octets: core::mem::replace(&mut self.heard, rest) });
                    }
                }
            }
            if at > limits::BACKEND_REPLY {
                return Err(format!("a reply of over {} octets", limits::BACKEND_REPLY));
            }
            self.hear_more(due)?;
        }
    }

    /// Says a line, without its line end; its reply.
    pub(crate) fn ask(&mut self, line: &str, patience: Duration) -> Result<Reply, String> {
        if !self.heard.is_empty() {
            return Err(format!("it spoke unasked: {}", quoted(&self.heard)));
        }
        self.say(line)?;
        self.hear(patience)
    }

    /// The session's own replay: greeting and steps, judged as a session does.
    pub(crate) fn replay(&mut self, mut run: Run, greeting: Duration, replay: Duration) -> Replayed {
        let (mut all, mut told) = (Vec::new(), Buffer::default());
        let mut due = Instant::now() + greeting;
        let verdict = loop {
            if let Err(why) = self.hear_more(due) {
                break Err(why);
            }
            let heard = core::mem::take(&mut self.heard);
            all.extend_from_slice(&heard);
            match run.hear(&heard, &mut told) {
                Err(why) => break Err(why),
                Ok(Progress::Done) => break Ok(()),
                Ok(Progress::Greeted) => due = Instant::now() + replay,
                Ok(Progress::Waiting) => {}
            }
            if let Err(error) = self.backend.send(told.as_slice()) {
                break Err(error.to_string());
            }
            told.clear();
        };
        Replayed { replies: replies(&all), verdict }
    }

    /// Tells it that no more will come.
    pub(crate) fn close(&mut self) {
        self.backend.close();
    }

    /// Says a line, without its line end.
    pub(crate) fn say(&mut self, line: &str) -> Result<(), String> {
        self.backend.send(format!("{line}\r\n").as_bytes()).map_err(|error| error.to_string())
    }

    /// Writes what waits, and waits until something came: octets of a reply, or of its TLS.
    fn hear_more(&mut self, due: Instant) -> Result<(), String> {
        loop {
            self.backend.transmit();
            // First of all: whoever sends what completes nothing, without end, is late as well.
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.ended("no answer in time"));
            }
            let heard = &mut self.heard;
            match self.backend.receive(&mut |octets| heard.extend_from_slice(octets)) {
                Ok(Received::Octets(_)) => {
                    self.backend.transmit();
                    return Ok(());
                }
                // All that it had said is heard, and it will answer nothing more.
                Ok(Received::Nothing) if self.backend.is_deaf => {
                    let why = self.backend.why_deaf();
                    return Err(self.ended(&why));
                }
                Ok(Received::Nothing) if !self.backend.has_ended_cleanly() => {}
                Ok(Received::Nothing | Received::End) => return Err(self.ended("it closed")),
                Err(Trouble::Broken(error)) => return Err(self.ended(&format!("the connection broke: {error}"))),
                Err(Trouble::Tls(error, _)) => {
                    // The alert that says why.
                    self.backend.transmit();
                    return Err(escape(error.to_string().as_bytes(), 2 * QUOTED).to_string());
                }
            }
            self.backend.wait(left).map_err(|error| format!("can't wait: {error}"))?;
        }
    }

    /// How it ended, and on which half reply.
    fn ended(&self, how: &str) -> String {
        if self.heard.is_empty() { how.to_owned() } else { format!("{how} after {}", quoted(&self.heard)) }
    }
}

fn quoted(octets: &[u8]) -> String {
    format!("\"{}\"", escape(octets, QUOTED))
}

/// The whole replies in these octets.
fn replies(octets: &[u8]) -> Vec<Reply> {
    let (mut scanner, mut at, mut start, mut found) = (Scanner::default(), 0, 0, Vec::new());
    while at < octets.len() {
        let (used, scanned) = scanner.scan(&octets[at..]);
        at += used;
        if let Scanned::Final(code) = scanned {
            found.push(Reply { code, octets: octets[start..at].to_vec() });
            start = at;
        }
    }
    found
}
