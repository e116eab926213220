//! A deterministic SMTP server: whatever it says depends on every octet it has heard. Alone, and as the child of a session.

use std::sync::Arc;
use std::time::Instant;

use starttls_wrapper::session::{Phase, Session};

use super::snoop::Setting;
use super::streams::Random;

pub(crate) struct Server {
    line: Vec<u8>,
    /// FNV-1a of all that was heard.
    sum: u32,
    inside_data: bool,
    greeted: bool,
    /// Its manners: one EHLO line or several, bare LFs, unknown verbs accepted.
    style: u8,
    pub(crate) ehlos: usize,
}

impl Server {
    pub(crate) fn new(style: u8) -> Self {
        Self { line: Vec::new(), sum: 0x811c_9dc5, inside_data: false, greeted: false, style, ehlos: 0 }
    }

    /// Hears octets and says what there is to say; the greeting first.
    pub(crate) fn hear(&mut self, octets: &[u8]) -> String {
        let mut said = if self.greeted { String::new() } else { "220-hello\r\n220 there\r\n".to_owned() };
        self.greeted = true;
        for &octet in octets {
            self.sum = (self.sum ^ u32::from(octet)).wrapping_mul(0x0100_0193);
            self.line.push(octet);
            if octet == b'\n' {
                let line = std::mem::take(&mut self.line);
                said += &self.reply(&String::from_utf8_lossy(&line));
            }
        }
        said
    }

    fn reply(&mut self, line: &str) -> String {
        let sum = self.sum;
        if self.inside_data {
            if line != ".\r\n" {
                return String::new();
            }
            self.inside_data = false;
            return format!("250 taken {sum:08x}\r\n");
        }
        let end = if self.style & 1 == 0 { "\r\n" } else { "\n" };
        match line.split_ascii_whitespace().next().unwrap_or("").to_ascii_uppercase().as_str() {
            "EHLO" => {
                self.ehlos += 1;
                if self.style & 2 == 0 {
                    return "250 one\r\n".to_owned();
                }
                format!("250-many{end}250-X-{sum:08x}{end}250 SIZE 10{end}")
            }
            "DATA" => {
                self.inside_data = true;
                "354 go on\r\n".to_owned()
            }
            "QUIT" => format!("221 {sum:08x}\r\n"),
            "HELP" => format!("214-help{end}214 {sum:08x}{end}"),
            "HELO" | "NOOP" | "RSET" | "VRFY" | "MAIL" | "RCPT" => format!("250 ok {sum:08x}{end}"),
            "EXPN" => format!("550-no{end}550 {sum:08x}{end}"),
            "LHLO" if self.style & 4 != 0 => format!("250-LHLO{end}250 {sum:08x}{end}"),
            _ => format!("500 {sum:08x}{end}"),
        }
    }
}

/// What the others of such a session have got.
pub(crate) struct Outcome {
    pub(crate) child: Vec<u8>,
    pub(crate) client: Vec<u8>,
    pub(crate) relayed: bool,
    /// EHLO replies that came while snooping.
    pub(crate) ehlos: usize,
}

/// Plays `stream` to a session with `child` behind it: both speak in pieces, as `random` has it.
pub(crate) fn play(stream: &[u8], setting: &Setting, child: &mut Server, random: &mut Random) -> Outcome {
    let now = Instant::now();
    let mut session = Session::new(Arc::new(setting.policy()), now);
    let (mut outcome, mut rest, mut said) = (
        Outcome { child: Vec::new(), client: Vec::new(), relayed: false, ehlos: 0 },
        stream,
        child.hear(b"").into_bytes(),
    );
    loop {
        outcome.client.extend_from_slice(session.to_client.as_slice());
        outcome.child.extend_from_slice(session.to_child.as_slice());
        let heard = session.to_child.as_slice().to_vec();
        session.to_client.clear();
        session.to_child.clear();
        if session.phase() == Phase::Snoop {
            said.extend(child.hear(&heard).into_bytes());
            outcome.ehlos = child.ehlos;
        } else {
            outcome.relayed = true;
            // Nobody stands between them any more.
            outcome.client.append(&mut said);
            outcome.client.extend(child.hear(&heard).into_bytes());
            outcome.client.extend(child.hear(rest).into_bytes());
            outcome.child.extend_from_slice(rest);
            return outcome;
        }
        session.handle_written(now);
        if !session.to_client.is_empty() || !session.to_child.is_empty() {
            continue;
        }
        let room = session.client_room().min(rest.len()).min(setting.piece);
        let child_first = random.one_in(2) || room == 0;
        if child_first && !said.is_empty() {
            let piece: Vec<u8> = said.drain(..=random.below(said.len().min(40))).collect();
            session.handle_child(&piece, now);
        } else if room > 0 {
            session.handle_client(&rest[..room], now);
            rest = &rest[room..];
        } else if said.is_empty() {
            return outcome;
        }
    }
}
