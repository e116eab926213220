//! Target: what is learned of a plaintext server, and said in its place. First octet: the address family; then the client's name up to an
//! LF, and the rest are the server's replies, up to a NUL each, in the order of a probe.
//!
//! A client of the probe's name and address hears what the probe has heard, octet for octet but for the line ends; any other the same
//! with its own name and address, read by replacing instead of templates; both hear whole replies, one for each command. The text of
//! what was learned says the same when it is read again. The same octets as such a text: what is read is a 220 and whole replies.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Instant;

use starttls_wrapper::session::learned::{Asked, Heard, Learned, Prober};
use starttls_wrapper::session::{Phase, Policy, Session, StandIn};
use starttls_wrapper::smtp::ehlo::{Edit, edit};
use starttls_wrapper::smtp::reply::{Scanned, Scanner};

/// Who probes, and who else may come: no name or address is a part of another.
const PROBER: &str = "p.invalid";
const PROBED: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(192, 0, 2, 25)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x25))];
const CLIENT: &str = "c.example";
const ADDRESS: IpAddr = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 9));
/// STARTTLS is not offered: what is said is what was heard.
const UNCHANGED: Edit = Edit { offer_starttls: false, hide_auth: false };

/// One input.
pub fn run(octets: &[u8]) {
    if let Ok(text) = core::str::from_utf8(octets) {
        read(text);
    }
    let Some((&family, said)) = octets.split_first() else { return };
    let prober = Prober { name: PROBER, address: Some(PROBED[usize::from(family & 1)]) };
    let mut heard = Heard::default();
    let mut replies: Vec<(Asked, Vec<u8>)> = Vec::new();
    // A probe takes whole replies and nothing else.
    for (asked, reply) in Asked::ALL.into_iter().zip(said.split(|octet| *octet == 0)).filter(|(_, reply)| is_one(reply))
    {
        heard.note(asked, reply);
        replies.push((asked, with_crlf(reply)));
    }
    let Ok(learned) = Learned::from_probe(&heard, prober) else {
        assert!(
            !replies.first().is_some_and(|(asked, reply)| *asked == Asked::Greeting && last(reply).starts_with(b"220"))
        );
        return;
    };
    assert_eq!(learned.is_true_of(&heard, prober), Ok(()));
    assert_eq!(Learned::parse(&learned.to_string()).as_ref(), Ok(&learned), "as text:\n{learned}");
    let learned = Arc::new(learned);
    for (name, address) in [(PROBER, prober.address), (CLIENT, Some(ADDRESS))] {
        let as_heard = |asked: Asked, reply: &[u8]| {
            // Nobody has said a name before the greeting.
            let said = if asked == Asked::Greeting { PROBER } else { name };
            let named = replace(reply, PROBER.as_bytes(), said.as_bytes());
            let from = prober.address.map(|known| known.to_string()).unwrap_or_default();
            replace(&named, from.as_bytes(), address.map(|known| known.to_string()).unwrap_or_default().as_bytes())
        };
        // Each behind an EHLO that is known, as the probe's was; and the first one by itself.
        let knows_ehlo = replies.iter().any(|(asked, reply)| *asked == Asked::Ehlo && last(reply).starts_with(b"2"));
        for (asked, reply) in replies.iter().filter(|(_, reply)| last(reply).starts_with(b"2")) {
            let mut session = begin(&learned, address);
            if *asked == Asked::Greeting {
                assert_eq!(shown(session.to_client.as_slice()), shown(&as_heard(*asked, reply)));
                continue;
            }
            session.to_client.clear();
            if knows_ehlo && !matches!(asked, Asked::Ehlo | Asked::Helo) {
                tell(&mut session, Asked::Ehlo, name);
            }
            let said = tell(&mut session, *asked, name);
            if session.phase() == Phase::Summon {
                // It names a client that has not said who it is.
                assert!(
                    !knows_ehlo && contains(reply, PROBER.as_bytes()),
                    "{asked:?} is not known: \"{}\"",
                    shown(reply)
                );
                continue;
            }
            let mut expected = Vec::new();
            match asked {
                Asked::Ehlo => edit(&as_heard(*asked, reply), UNCHANGED, &mut expected),
                _ => expected = as_heard(*asked, reply),
            }
            assert_eq!(shown(&said), shown(&expected), "{asked:?} of {name}");
            assert!(is_one(&said), "{asked:?} of {name}: \"{}\"", shown(&said));
        }
    }
}

/// The text of what was learned, as anybody may have written it.
fn read(text: &str) {
    let Ok(learned) = Learned::parse(text) else { return };
    assert_eq!(Learned::parse(&learned.to_string()).as_ref(), Ok(&learned), "\"{text}\" became\n{learned}");
    let learned = Arc::new(learned);
    let mut session = begin(&learned, Some(ADDRESS));
    let greeting = session.to_client.as_slice().to_vec();
    assert!(is_one(&greeting) && last(&greeting).starts_with(b"220"), "\"{}\"", shown(&greeting));
    session.to_client.clear();
    for asked in Asked::ALL.into_iter().filter(|asked| *asked != Asked::Greeting) {
        let said = tell(&mut session, asked, CLIENT);
        if !matches!(session.phase(), Phase::Snoop | Phase::Close) {
            return;
        }
        assert!(is_one(&said) && last(&said).starts_with(b"2"), "{asked:?}: \"{}\"", shown(&said));
    }
}

fn begin(learned: &Arc<Learned>, address: Option<IpAddr>) -> Session {
    let policy = Policy { offer_tls: false, ..Policy::default() };
    let Some(stand_in) = StandIn::new(learned.clone(), address) else { panic!("an address is known") };
    Session::lazily(Arc::new(policy), stand_in, Instant::now())
}

/// What the client hears of this command.
fn tell(session: &mut Session, asked: Asked, name: &str) -> Vec<u8> {
    let line = asked.line(name).unwrap_or_default() + "\r\n";
    session.handle_client(line.as_bytes(), Instant::now());
    assert!(session.to_child.is_empty() && session.to_backend.is_empty());
    let said = session.to_client.as_slice().to_vec();
    session.to_client.clear();
    said
}

fn is_one(reply: &[u8]) -> bool {
    let (mut scanner, mut at) = (Scanner::default(), 0);
    while at < reply.len() {
        let (used, scanned) = scanner.scan(&reply[at..]);
        at += used;
        match scanned {
            Scanned::Final(_) => return at == reply.len(),
            Scanned::NotSmtp => return false,
            Scanned::Inside | Scanned::Line(_) => {}
        }
    }
    false
}

/// The line that has a reply's code.
fn last(reply: &[u8]) -> &[u8] {
    reply.split_inclusive(|octet| *octet == b'\n').next_back().unwrap_or_default()
}

fn with_crlf(reply: &[u8]) -> Vec<u8> {
    let mut all = Vec::new();
    for line in reply.split_inclusive(|octet| *octet == b'\n') {
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        all.extend_from_slice(line.strip_suffix(b"\r").unwrap_or(line));
        all.extend_from_slice(b"\r\n");
    }
    all
}

fn contains(octets: &[u8], what: &[u8]) -> bool {
    octets.windows(what.len()).any(|part| part == what)
}

fn replace(octets: &[u8], what: &[u8], by: &[u8]) -> Vec<u8> {
    let (mut replaced, mut rest) = (Vec::new(), octets);
    while let Some(at) = rest.windows(what.len()).position(|part| part == what) {
        replaced.extend_from_slice(&rest[..at]);
        replaced.extend_from_slice(by);
        rest = &rest[at + what.len()..];
    }
    [&replaced, rest].concat()
}

fn shown(octets: &[u8]) -> String {
    octets.escape_ascii().to_string()
}
