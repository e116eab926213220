//! A deterministic SMTP server: whatever it says depends on every octet it has heard. Alone, and as the child of a session.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use starttls_wrapper::session::learned::{Asked, Heard, Learned, Prober};
use starttls_wrapper::session::{Phase, Session, StandIn};

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
    /// Its replies to greeting, hello, NOOP, RSET and QUIT can be learned: they depend on who the client is, and else on nothing; all that it says later
    /// depends on the last hello, and on all other lines that it has heard.
    learnable: Option<IpAddr>,
    hello: String,
}

impl Server {
    pub(crate) fn new(style: u8) -> Self {
        Self {
            line: Vec::new(),
            sum: 0x811c_9dc5,
            inside_data: false,
            greeted: false,
            style,
            ehlos: 0,
            learnable: None,
            hello: String::new(),
        }
    }

    /// One that can be learned, for a client of this address.
    pub(crate) fn learnable(style: u8, client: IpAddr) -> Self {
        Self { learnable: Some(client), ..Self::new(style) }
    }

    /// What is learned of it by two probes.
    pub(crate) fn learn(style: u8) -> Learned {
        let [first, second] = [("one.invalid", 1), ("two.invalid", 2)].map(|(name, number)| {
            let prober = Prober { name, address: Some(IpAddr::from([192, 0, 2, number])) };
            let (mut server, mut heard) = (Self::learnable(style, IpAddr::from([192, 0, 2, number])), Heard::default());
            for asked in Asked::ALL {
                let line = asked.line(name).map(|line| line + "\r\n").unwrap_or_default();
                heard.note(asked, server.hear(line.as_bytes()).as_bytes());
            }
            Learned::from_probe(&heard, prober).unwrap()
        });
        first.agrees(&second).unwrap();
        first
    }

    /// Hears octets and says what there is to say; the greeting first.
    pub(crate) fn hear(&mut self, octets: &[u8]) -> String {
        let mut said = if self.greeted { String::new() } else { "220-hello\r\n220 there\r\n".to_owned() };
        self.greeted = true;
        for &octet in octets {
            self.line.push(octet);
            if octet == b'\n' {
                let line = std::mem::take(&mut self.line);
                let text = String::from_utf8_lossy(&line);
                said += &self.learnable_reply(&text).unwrap_or_else(|| {
                    self.sum = line
                        .iter()
                        .chain(self.hello.as_bytes())
                        .fold(self.sum, |sum, octet| (sum ^ u32::from(*octet)).wrapping_mul(0x0100_0193));
                    self.reply(&text)
                });
            }
        }
        said
    }

    /// What leaves no trace but in `hello`, and is not in the sum.
    fn learnable_reply(&mut self, line: &str) -> Option<String> {
        let client = self.learnable.filter(|_| !self.inside_data)?;
        let (verb, name) = line.trim_end().split_once(' ').unwrap_or((line.trim_end(), ""));
        let reply = match (verb.to_ascii_uppercase().as_str(), name) {
            ("EHLO", name) => {
                self.ehlos += 1;
                format!("250-many hello {name} [{client}]\r\n250-X\r\n250 SIZE 10\r\n")
            }
            ("HELO", name) => format!("250 hello {name}\r\n"),
            ("NOOP", "") => "250 ok\r\n".to_owned(),
            ("RSET", "") => format!("250 flushed, {}\r\n", self.hello.split(' ').nth(1).unwrap_or("stranger")),
            ("QUIT", "") => "221 bye\r\n".to_owned(),
            _ => return None,
        };
        if matches!(verb, "EHLO" | "HELO" | "ehlo" | "helo") {
            self.hello = line.trim_end().to_owned();
        }
        Some(reply)
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

/// Plays `stream` to a session with `child` behind it: both speak in pieces, as `random` has it. With a stand-in the child comes when it
/// is summoned.
pub(crate) fn play(
    stream: &[u8],
    setting: &Setting,
    stand_in: Option<StandIn>,
    child: &mut Server,
    random: &mut Random,
) -> Outcome {
    let (now, policy) = (Instant::now(), Arc::new(setting.policy()));
    let mut is_there = stand_in.is_none();
    let mut session = match stand_in {
        Some(stand_in) => Session::lazily(policy, stand_in, now),
        None => Session::new(policy, now),
    };
    let mut outcome = Outcome { child: Vec::new(), client: Vec::new(), relayed: false, ehlos: 0 };
    let (mut rest, mut said) = (stream, if is_there { child.hear(b"").into_bytes() } else { Vec::new() });
    loop {
        outcome.client.extend_from_slice(session.to_client.as_slice());
        outcome.child.extend_from_slice(session.to_child.as_slice());
        let heard = session.to_child.as_slice().to_vec();
        session.to_client.clear();
        session.to_child.clear();
        match session.phase() {
            Phase::Snoop | Phase::Summon | Phase::Brief => {
                assert!(is_there || heard.is_empty(), "nobody is there to hear {}", heard.escape_ascii());
                if is_there {
                    said.extend(child.hear(&heard).into_bytes());
                }
                outcome.ehlos = child.ehlos;
            }
            Phase::RelayPlain => {
                outcome.relayed = true;
                // Nobody stands between them any more.
                outcome.client.append(&mut said);
                outcome.client.extend(child.hear(&heard).into_bytes());
                outcome.client.extend(child.hear(rest).into_bytes());
                outcome.child.extend_from_slice(rest);
                return outcome;
            }
            // QUIT, which nobody was needed for.
            Phase::Close if !is_there => return outcome,
            phase => panic!("{phase:?}: {:?}", session.end()),
        }
        session.handle_written(now);
        if !session.to_client.is_empty() || !session.to_child.is_empty() {
            continue;
        }
        let room = session.client_room().min(rest.len()).min(setting.piece);
        let child_first = random.one_in(2) || room == 0;
        if child_first && session.phase() == Phase::Summon {
            session.handle_summoned(now);
            is_there = true;
            said = child.hear(b"").into_bytes();
        } else if child_first && !said.is_empty() {
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
