//! A dialogue through a listener whose plaintext server is put off (`--lazy`): the puppet is first learned of, by probes that are
//! answered as the dialogue's own child would answer, and started when the script's child is told what cannot be learned. The client
//! must hear, octet for octet, what the script says that it hears of the server itself.
//!
//! Which dialogues that can be: those whose child greets with 220 and gives each command that can be learned one good reply, always the
//! same. How it is told what is not the server's own to know: [`Script::of`].

use std::collections::{HashMap, VecDeque};
use std::os::unix::net::UnixListener;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use starttls_wrapper::session::Way;

use crate::child::Child;
use crate::dialogue::{Deed, Dialogue, Side};
use crate::door::{Door, Shape, Start};
use crate::playing::{finish, perform};
use crate::wire::PATIENCE;

/// What a probe is called by the server that it comes to.
const PROBES: [&str; 2] = ["TCPREMOTEIP=192.0.2.25", "TCPREMOTEIP=198.51.100.25"];

/// What a dialogue's child answers, by verb; the greeting is that of none.
#[derive(Debug)]
struct Script(HashMap<String, Vec<u8>>);

impl Script {
    /// `None`: it can't be learned, or the dialogue is about when the snooping ends.
    fn of(dialogue: &Dialogue) -> Option<Self> {
        if !matches!(dialogue.way, Way::Tls | Way::Plain | Way::Raw)
            || dialogue.options.iter().any(|option| option.starts_with("--cutoff"))
        {
            return None;
        }
        let (mut script, mut asked, mut heard) = (HashMap::new(), VecDeque::from([Vec::new()]), Vec::new());
        'steps: for step in &dialogue.steps {
            match &step.deed {
                Deed::Gets(Side::Child, octets) => {
                    for line in octets.split_inclusive(|octet| *octet == b'\n') {
                        if !is_learnable(line) {
                            break 'steps;
                        }
                        asked.push_back(line.to_vec());
                    }
                }
                Deed::Sends(Side::Child, octets) => {
                    heard.extend_from_slice(octets);
                    while let Some(length) = reply_length(&heard) {
                        let reply: Vec<u8> = heard.drain(..length).collect();
                        let command = asked.pop_front()?;
                        let good: &[u8] = if command.is_empty() { b"220" } else { b"2" };
                        let known = script.entry(verb(&command)).or_insert_with(|| reply.clone());
                        if *known != reply || !reply.starts_with(good) || !is_one_reply(&reply) {
                            return None;
                        }
                    }
                }
                // It would have to be there, or time is what the dialogue is about.
                Deed::Ends(Side::Child) | Deed::Waits(_) => return None,
                // What it is told from here on is a farewell.
                Deed::Gets(Side::Client, octets) if octets.starts_with(b"220 2.0.0 ") => break,
                _ => {}
            }
        }
        let is_answered = asked.is_empty() && heard.is_empty() && script.contains_key("");
        is_answered.then_some(Self(script))
    }

    /// Its part of a probe.
    fn answer(&self, probe: &mut Child) -> Result<(), String> {
        probe.send(&self.0[""]);
        while let Ok(line) = probe.line() {
            let reply = self.0.get(&verb(&line)).map_or(&b"502 5.5.1 Not learned\r\n"[..], Vec::as_slice);
            probe.send(reply);
            if line.starts_with(b"QUIT") {
                break;
            }
        }
        probe.exit(0);
        Ok(())
    }
}

/// Whether the answer to this line can be learned: EHLO and HELO with a name, and three commands alone.
fn is_learnable(line: &[u8]) -> bool {
    let text = String::from_utf8_lossy(line);
    let Some(text) = text.strip_suffix("\r\n") else { return false };
    match text.split_once(' ') {
        None => ["NOOP", "RSET", "QUIT"].iter().any(|known| text.eq_ignore_ascii_case(known)),
        Some((word, name)) => {
            let is_name =
                name.split('.').all(|label| !label.is_empty() && label.bytes().all(|o| o.is_ascii_alphanumeric()));
            is_name && ["EHLO", "HELO"].iter().any(|known| word.eq_ignore_ascii_case(known))
        }
    }
}

fn verb(line: &[u8]) -> String {
    String::from_utf8_lossy(line).split_whitespace().next().unwrap_or_default().to_uppercase()
}

/// The length of the first whole reply.
fn reply_length(octets: &[u8]) -> Option<usize> {
    let mut length = 0;
    for line in octets.split_inclusive(|octet| *octet == b'\n') {
        length += line.len();
        if line.ends_with(b"\n") && line.get(3) != Some(&b'-') {
            return Some(length);
        }
    }
    None
}

/// Whether all its lines bear one code, and end as they should.
fn is_one_reply(reply: &[u8]) -> bool {
    reply.split_inclusive(|octet| *octet == b'\n').all(|line| {
        line.ends_with(b"\r\n") && line.get(..3) == reply.get(..3) && matches!(line.get(3), Some(b' ' | b'-'))
    })
}

/// Answers the probes, and passes on whoever else is started.
fn answer_probes(puppets: &UnixListener, script: &Script, others: &Sender<Child>) {
    while let Ok(mut child) = Child::accept(puppets) {
        if PROBES.iter().any(|probe| child.report.environment.iter().any(|line| line == probe)) {
            let _ = script.answer(&mut child);
        } else if others.send(child).is_err() {
            return;
        }
    }
}

/// The child, once it is there, and what it would have said before that.
struct Late {
    others: Receiver<Child>,
    child: Option<Child>,
    /// Replies that the stand-in gives, and the script still has in its child's mouth.
    given: usize,
    hello: Option<Vec<u8>>,
}

/// Plays `dialogue` so; `None`: it is none of those.
pub(crate) fn play(dialogue: &Dialogue) -> Option<Result<(), String>> {
    let script = Script::of(dialogue)?;
    let options: Vec<&str> = dialogue.options.iter().map(String::as_str).chain(["--lazy", "--drain", "0"]).collect();
    let start = Start {
        options: &options,
        certificate: dialogue.certificate,
        way: dialogue.way,
        shape: Shape::Listener,
        ..Start::default()
    };
    let (sender, others) = channel();
    let mut door = Door::start(&start);
    let puppets = door.puppets.try_clone().unwrap();
    Some(thread::scope(|scope| {
        scope.spawn(|| answer_probes(&puppets, &script, &sender));
        door.connect();
        if !dialogue.steps.iter().any(|s| s.deed == Deed::Backend(crate::dialogue::Backend::Refused)) {
            door.backend.listen();
        }
        let mut late = Late { others, child: None, given: 1, hello: None };
        let mut played = Ok(());
        for at in 0..dialogue.steps.len() {
            played = late.step(dialogue, at, &mut door, &script);
            if let Err(why) = &mut played {
                *why = format!("{} (lazily): {why}", dialogue.place(dialogue.steps[at].line));
                break;
            }
        }
        let played = played.and_then(|()| finish(dialogue, Shape::Listener, &mut door, late.child.as_mut()));
        let played = played
            .map_err(|why| format!("{why}\n    stderr: {}", door.said().trim_end().replace('\n', "\n            ")));
        drop(late);
        door.forget_puppets();
        played
    }))
}

impl Late {
    fn step(&mut self, dialogue: &Dialogue, at: usize, door: &mut Door, script: &Script) -> Result<(), String> {
        match (&dialogue.steps[at].deed, &mut self.child) {
            (Deed::Gets(Side::Child, octets), None) => {
                let mut rest = octets.as_slice();
                while let Some(end) =
                    rest.iter().position(|octet| *octet == b'\n').filter(|end| is_learnable(&rest[..=*end]))
                {
                    let (line, behind) = rest.split_at(end + 1);
                    if matches!(&*verb(line), "EHLO" | "HELO") {
                        self.hello = Some(line.to_vec());
                    }
                    self.given += 1;
                    rest = behind;
                }
                if rest.is_empty() { Ok(()) } else { self.summon(script)?.get(rest) }
            }
            (Deed::Sends(Side::Child, octets), child) => {
                let mut rest = octets.as_slice();
                while let Some(length) = reply_length(rest).filter(|_| self.given > 0) {
                    self.given -= 1;
                    rest = &rest[length..];
                }
                // Without it, of a reply that comes in pieces, a piece.
                if let Some(child) = child {
                    child.send(rest);
                }
                Ok(())
            }
            // It was never started, and nobody is there to be told of an end.
            (Deed::SeesEnd(Side::Child) | Deed::Ends(Side::Child), None) => Ok(()),
            (_, child) => perform(dialogue, at, door, child.as_mut()),
        }
    }

    /// The server is there now: it greets us, and hears the last hello again.
    fn summon(&mut self, script: &Script) -> Result<&mut Child, String> {
        let child = self.others.recv_timeout(PATIENCE).map_err(|_| "the child was not started".to_owned())?;
        let child = self.child.insert(child);
        child.send(&script.0[""]);
        if let Some(hello) = &self.hello {
            child.get(hello)?;
            child.send(&script.0[&verb(hello)]);
        }
        Ok(child)
    }
}
