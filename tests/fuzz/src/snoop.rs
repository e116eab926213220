//! Target: the line splitter and the snooper. A client's stream, cut as the input says, to a session whose child answers each
//! line it gets. What child and client get must be what [`expect`] says, which reads protocol.md on its own and sees the whole
//! stream at once: so nothing depends on the cuts, replies come in order, one for each command, and after the cutoff octets
//! are as they were given.

use std::sync::Arc;
use std::time::Instant;

use starttls_wrapper::session::policy::Cutoff;
use starttls_wrapper::session::{Phase, Policy, Session, StandIn, limits};
use starttls_wrapper::smtp::command::{Kind, Verb, argument};
use starttls_wrapper::smtp::line::Fault;

use super::lines::{Line, lines};

/// What the first two octets choose.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    pub require_tls: bool,
    pub commands: Option<u32>,
    pub helo_is_cutoff: bool,
    /// The child refuses unknown verbs, as all do.
    pub refuses_unknown: bool,
    /// The child answers only when the client can say no more.
    pub lazy_child: bool,
    /// Octets in a piece.
    pub piece: usize,
    /// No piece goes beyond the end of a line.
    pub by_line: bool,
}

impl Setting {
    /// The setting that these two octets choose.
    #[must_use]
    pub fn of(choice: [u8; 2]) -> Self {
        let [flags, piece] = choice;
        Self {
            require_tls: flags & 1 != 0,
            commands: (flags & 2 != 0).then_some(u32::from(flags >> 6)),
            helo_is_cutoff: flags & 4 != 0,
            refuses_unknown: flags & 8 == 0,
            lazy_child: flags & 16 != 0,
            piece: match piece {
                0..=200 => usize::from(piece) + 1,
                _ => 1000 + 50 * usize::from(piece),
            },
            by_line: false,
        }
    }

    /// As the session has it.
    #[must_use]
    pub fn policy(&self) -> Policy {
        let mut cutoff = Cutoff { commands: self.commands, ..Cutoff::default() };
        if self.helo_is_cutoff {
            cutoff.verbs.push(Verb::Helo);
        }
        Policy { require_tls: self.require_tls, cutoff, ..Policy::default() }
    }
}

/// What has become of a stream.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// All that the child got.
    pub child: Vec<u8>,
    /// All that the client got.
    pub client: Vec<u8>,
    /// The relay was reached.
    pub relayed: bool,
    /// How much of `child` was sent before that, line by line; less, were lines to go on in the call that is the cutoff, but for pieces
    /// that end where lines do.
    pub snooped: usize,
}

/// One input.
pub fn run(octets: &[u8]) {
    let Some((choice, stream)) = octets.split_first_chunk::<2>() else { return };
    let setting = Setting::of(*choice);
    let expected = expect(stream, &setting);
    let seen = play(stream, &setting, &mut |line, number| answer(line, number, &setting));
    assert!(
        expected == seen,
        "{setting:?}\nstream   \"{}\"\nexpected {}\nseen     {}",
        stream.escape_ascii(),
        shown(&expected),
        shown(&seen)
    );
}

fn shown(outcome: &Outcome) -> String {
    let (child, client) = (outcome.child.escape_ascii(), outcome.client.escape_ascii());
    format!("child \"{child}\"\n         client \"{client}\"\n         relayed {}", outcome.relayed)
}

/// The child's answer to its line number `number`.
fn answer(line: &[u8], number: usize, setting: &Setting) -> String {
    match Verb::of(line) {
        Verb::Ehlo => format!("250-{number}\r\n250 X\r\n"),
        Verb::Quit => format!("221 {number}\r\n"),
        Verb::Unknown if setting.refuses_unknown => format!("500 {number}\r\n"),
        _ => format!("250 {number}\r\n"),
    }
}

const GREETING: &[u8] = b"220 0\r\n";

/// Plays the stream to a session, in pieces; `answer` is the child: its reply to each line, with the line's number.
#[must_use]
pub fn play(stream: &[u8], setting: &Setting, answer: &mut dyn FnMut(&[u8], usize) -> String) -> Outcome {
    let mut session = Session::new(Arc::new(setting.policy()), Instant::now());
    session.handle_child(GREETING, Instant::now());
    go_on(session, stream, setting, answer)
}

/// The same before a child that comes only when it is needed.
#[must_use]
pub fn play_lazily(
    stream: &[u8],
    setting: &Setting,
    stand_in: StandIn,
    answer: &mut dyn FnMut(&[u8], usize) -> String,
) -> Outcome {
    go_on(Session::lazily(Arc::new(setting.policy()), stand_in, Instant::now()), stream, setting, answer)
}

fn go_on(
    mut session: Session,
    stream: &[u8],
    setting: &Setting,
    answer: &mut dyn FnMut(&[u8], usize) -> String,
) -> Outcome {
    let now = Instant::now();
    let (mut outcome, mut rest, mut answered) = (Outcome::default(), stream, 0);
    let mut numbered = 0;
    loop {
        assert!(session.to_child.len() <= limits::TO_SERVER + 3 * 4096, "{} for the child", session.to_child.len());
        outcome.client.extend_from_slice(session.to_client.as_slice());
        if session.phase() != Phase::RelayPlain {
            outcome.snooped += session.to_child.len();
        }
        outcome.child.extend_from_slice(session.to_child.as_slice());
        session.to_client.clear();
        session.to_child.clear();
        session.handle_written(now);
        if !session.to_client.is_empty() || !session.to_child.is_empty() {
            continue;
        }
        assert!(session.to_backend.is_empty(), "nobody has asked for the backend");
        let line = rest.iter().position(|o| *o == b'\n').filter(|_| setting.by_line).map_or(rest.len(), |lf| lf + 1);
        let room = session.client_room().min(line).min(setting.piece);
        let phase = session.phase();
        let waiting = &outcome.child[answered..];
        let speaks = matches!(phase, Phase::Snoop | Phase::Brief);
        let line_end = waiting.iter().position(|o| *o == b'\n').filter(|_| speaks);
        if phase == Phase::Summon && (!setting.lazy_child || room == 0) {
            session.handle_summoned(now);
            session.handle_child(GREETING, now);
        } else if let Some(lf) = line_end.filter(|_| !setting.lazy_child || room == 0 || !session.may_take()) {
            numbered += 1;
            let reply = answer(&waiting[..lf - 1], numbered);
            answered += lf + 1;
            session.handle_child(reply.as_bytes(), now);
        } else if room > 0 && phase != Phase::RelayPlain {
            session.handle_client(&rest[..room], now);
            rest = &rest[room..];
        } else if phase == Phase::Dial {
            session.handle_handover_failed("nobody there".to_owned(), now);
        } else {
            break;
        }
    }
    outcome.relayed = session.phase() == Phase::RelayPlain;
    if outcome.relayed {
        outcome.child.extend_from_slice(rest);
    } else if session.phase() == Phase::Snoop {
        assert!(rest.is_empty(), "{} octets are never taken", rest.len());
    } else {
        assert_eq!(session.phase(), Phase::Close);
    }
    outcome
}

/// What must become of it.
fn expect(stream: &[u8], setting: &Setting) -> Outcome {
    let mut outcome = Outcome { client: b"220 0\r\n".to_vec(), ..Outcome::default() };
    let (mut at, mut commands, mut forwarded, mut bad, mut refused) = (0, 0, 0, 0, 0);
    for line in lines(stream) {
        let rest = &stream[at..];
        at += line.raw.len();
        let by_count = setting.commands.is_some_and(|limit| commands >= limit);
        let reply = match step(line, setting, by_count) {
            Step::Wait => break,
            Step::Relay => {
                outcome.child.extend_from_slice(rest);
                outcome.relayed = true;
                break;
            }
            Step::Forward => {
                outcome.child.extend_from_slice(&line.normal());
                outcome.snooped = outcome.child.len();
                forwarded += 1;
                let reply = answer(line.text(), forwarded, setting);
                let held = Verb::of(line.text()) == Verb::Unknown && !setting.refuses_unknown;
                outcome.client.extend_from_slice(reply.replace("\r\n250 X", "\r\n250-STARTTLS\r\n250 X").as_bytes());
                if held {
                    outcome.child.extend_from_slice(&stream[at..]);
                    outcome.relayed = true;
                    break;
                }
                commands += 1;
                continue;
            }
            Step::Starttls if at < stream.len() => "421 4.7.0 Bytes after STARTTLS, closing connection",
            Step::Starttls => "454 4.7.0 TLS not available",
            Step::Foreign => "421 4.7.0 This is an SMTP server, closing connection",
            Step::Bad(fault) => {
                bad += 1;
                match fault {
                    _ if bad > 10 => "421 4.7.0 Too many bad lines, closing connection",
                    Fault::BadOctet => "500 5.5.2 Bad octet in line",
                    Fault::TooLong => "500 5.5.2 Line too long",
                }
            }
            Step::Refuse => {
                refused += 1;
                if refused > 1 {
                    "421 4.7.0 TLS required, closing connection"
                } else {
                    "530 5.7.0 Must issue a STARTTLS command first"
                }
            }
            Step::Say(reply) => reply,
        };
        commands += 1;
        outcome.client.extend_from_slice(format!("{reply}\r\n").as_bytes());
        if reply.starts_with("421") {
            break;
        }
    }
    outcome
}

enum Step {
    Wait,
    Relay,
    Forward,
    Starttls,
    Foreign,
    Bad(Fault),
    Refuse,
    Say(&'static str),
}

/// One line, by protocol.md.
fn step(line: Line<'_>, setting: &Setting, by_count: bool) -> Step {
    let is_cutoff = |verb: Verb| match verb {
        Verb::Xclient | Verb::Xforward | Verb::Foreign | Verb::Disguised | Verb::Starttls => false,
        Verb::Quit if setting.require_tls => false,
        Verb::Helo if setting.helo_is_cutoff => true,
        verb => by_count || verb.kind() == Kind::Cutoff,
    };
    let cut = || if setting.require_tls { Step::Refuse } else { Step::Relay };
    let head = line.head().map(Verb::of);
    if line.raw.first() == Some(&0x16) {
        return Step::Foreign;
    }
    if head.is_some_and(is_cutoff) && (line.whole || !setting.require_tls) {
        return cut();
    }
    if !line.whole {
        return Step::Wait;
    }
    if let Some(fault) = line.fault() {
        return Step::Bad(fault);
    }
    let verb = Verb::of(line.text());
    match verb {
        Verb::Foreign => Step::Foreign,
        Verb::Starttls if argument(line.text()).is_empty() => Step::Starttls,
        Verb::Starttls => Step::Say("501 5.5.4 STARTTLS takes no parameter"),
        verb if is_cutoff(verb) => cut(),
        Verb::Ehlo | Verb::Noop | Verb::Quit => Step::Forward,
        _ if setting.require_tls => Step::Refuse,
        Verb::Disguised => Step::Bad(Fault::BadOctet),
        Verb::Xclient | Verb::Xforward => Step::Say("550 5.7.0 Not for clients"),
        _ => Step::Forward,
    }
}
