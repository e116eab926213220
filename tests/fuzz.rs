//! The fuzz targets of tests/fuzz without their fuzzer: every seed, every input that ever found a fault, and for a few seconds each
//! random changes to them. What libFuzzer does better, and for longer: `scripts/fuzz`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test fails by panicking
#![allow(dead_code, unreachable_pub, missing_docs)] // tests/fuzz/src is a crate of its own

#[path = "fuzz/src/lib.rs"]
mod targets;
#[path = "support/ways.rs"]
mod ways;

use std::fs;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use starttls_wrapper::session::{Phase, Way};
use starttls_wrapper::smtp::command::Verb;
use targets::dialogue::{self, Backend, Deed, Dialogue, Side};
use targets::session::Outcome;

/// How long each target is tried with random changes.
const TIME: Duration = Duration::from_secs(6);

type Run = fn(&[u8]);

/// Name, `run`, what it is seeded with, and how many changed inputs [`TIME`] must allow on a busy machine: fewer are no test.
type Target = (&'static str, Run, fn() -> Vec<Vec<u8>>, usize);

const TARGETS: [Target; 7] = [
    ("snoop", targets::snoop::run, client_streams, 2000),
    ("ehlo", targets::ehlo::run, child_replies, 2000),
    ("session", targets::session::run, scripts, 2000),
    ("learned", targets::learned::run, servers, 2000),
    ("facts", targets::facts::run, clients, 2000),
    ("proxy", targets::proxy::run, headers, 2000),
    ("tls", targets::tls::run, conversations, 100),
];

/// Each dialogue's octets of one side, in a row.
fn said_by(side: Side) -> impl Iterator<Item = Vec<u8>> {
    let dialogues = dialogue::all().unwrap_or_else(|why| panic!("{why}"));
    dialogues.into_iter().map(move |dialogue| {
        let deeds = dialogue.steps.into_iter().map(|step| step.deed);
        let octets = deeds.filter_map(|deed| match deed {
            Deed::Sends(who, octets) if who == side => Some(octets),
            _ => None,
        });
        octets.flatten().take(12_000).collect()
    })
}

fn client_streams() -> Vec<Vec<u8>> {
    let choices = [[0, 255], [0, 0], [1, 2], [2 + 64, 40], [4 + 8, 9], [16, 200]];
    said_by(Side::Client).zip(choices.iter().cycle()).map(|(said, choice)| [&choice[..], &said].concat()).collect()
}

fn child_replies() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for (said, choice) in said_by(Side::Child).zip([1, 3, 0, 9, 35, 255].iter().cycle()) {
        // The greeting was said before.
        let replies = said.iter().position(|o| *o == b'\n').map_or(&[][..], |lf| &said[lf + 1..]);
        seeds.push([&[*choice], replies].concat());
    }
    seeds
}

/// What probes could hear, and the texts of what is learned of it.
fn servers() -> Vec<Vec<u8>> {
    let replies: [&[u8]; 4] = [
        b"220 mx ESMTP\r\n\x00250-mx hello p.invalid [192.0.2.25]\r\n250-STARTTLS\r\n250 SIZE 9\r\n\x00250 ok\r\n\x00250 ok\r\n\x00250 mx\r\n\x00221 bye\r\n",
        b"220-mx\n220 caf\xe9 100%\n\x00250 mx\n\x00250 2.0.0 p.invalid\n\x00500 no\n\x00250 mx p.invalid at 2001:db8::25\n\x00221\n",
        b"220 \xc3\xa9\r\n\x00502 no\r\n\x00250 a\rb\r\n\0\0\x00221-a\r\n221 %a%h%%\r\n",
        b"554 no\r\n",
    ];
    let mut seeds: Vec<Vec<u8>> = replies.iter().map(|said| [b"\0", *said].concat()).collect();
    seeds.extend(replies.iter().map(|said| [b"\x01", *said].concat()));
    seeds.push(
        STOOD_IN_FOR
            .split(|o| *o == b'\n')
            .filter_map(|line| line.strip_prefix(b"learned: "))
            .collect::<Vec<_>>()
            .join(&b'\n'),
    );
    seeds.push(b"# x\n\ngreeting 220-%h %a\ngreeting 220 100%% %C3%BC%e9\nehlo 250 mx".to_vec());
    seeds
}

/// Each family and version, with details and without; and variables.
fn clients() -> Vec<Vec<u8>> {
    let ends: Vec<u8> =
        (0..36).map(|n| [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 192, 0, 2, 1, 9, n][usize::from(n % 18)]).collect();
    let words = b"TLSv1.2\0TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256\0mx.example\0smtp";
    let mut seeds: Vec<Vec<u8>> = (0..32).map(|choice| [&[choice], &ends[..], words].concat()).collect();
    seeds.push(
        b"SSL_PROTOCOL=TLSv1.3\0SSL_CIPHER=x\0SSL_CERT_FILE=/x\0SSL_=\0PATH=/\0SSL_TLS_SNI_SERVERNAME=a\nb\0\0"
            .to_vec(),
    );
    seeds.push(b"SSL_A=".repeat(900));
    seeds
}

/// What load balancers send, at its limits and beyond them, each with a client behind it; and what we say ourselves.
fn headers() -> Vec<Vec<u8>> {
    let lines = [
        "TCP4 192.0.2.1 198.51.100.2 4711 25",
        "TCP6 2001:db8::1 ::ffff:192.0.2.1 65535 0",
        "TCP4 2001:db8::1 192.0.2.01 +1 01",
        "UNKNOWN",
        "UNKNOWN ffff:f...f:ffff ffff:f...f:ffff 65535 65535",
        "UDP4 192.0.2.1 198.51.100.2 4711 25",
    ];
    let longest = [format!("UNKNOWN {}", "f".repeat(91)), format!("UNKNOWN {}", "f".repeat(92))];
    let lines = lines.into_iter().map(str::to_owned).chain(longest);
    let mut seeds: Vec<Vec<u8>> =
        lines.map(|line| format!("PROXY {line}\r\nEHLO c.example\r\n").into_bytes()).collect();
    for (command, family, length) in [
        (0x21, 0x11, 12),
        (0x21, 0x11, 40),
        (0x21, 0x11, 11),
        (0x21, 0x21, 36),
        (0x21, 0x21, 4080),
        (0x21, 0x21, 4081),
        (0x21, 0x31, 216),
        (0x20, 0, 0),
        (0x20, 0x11, 12),
        (0x20, 0, 300),
        (0x31, 0x11, 12),
    ] {
        let body: Vec<u8> = [192, 0, 2, 1, 198, 51, 100, 2, 18, 103, 0, 25].into_iter().cycle().take(length).collect();
        let length = u16::try_from(length).unwrap().to_be_bytes();
        let said = [b"\r\n\r\n\0\r\nQUIT\n", &[command, family][..], &length, &body, b"EHLO c.example\r\n"].concat();
        seeds.push(said);
    }
    seeds.extend(clients());
    seeds
}

/// The dialogues as they stand, and as every other way has them.
fn scripts() -> Vec<Vec<u8>> {
    let dialogues = dialogue::all().unwrap_or_else(|why| panic!("{why}"));
    let mut seeds: Vec<Vec<u8>> = dialogues.iter().map(|dialogue| fs::read(&dialogue.path).unwrap()).collect();
    let (played, _) = ways::all(&dialogues);
    let written_otherwise = |dialogue: &&Dialogue| dialogue.way != Way::Tls;
    seeds.extend(played.iter().filter(written_otherwise).filter_map(as_script));
    // The TLS of somebody else makes no other steps.
    let by = |way, dialogue: &Dialogue| as_script(&Dialogue { way, ..dialogue.clone() });
    for dialogue in &played {
        seeds.extend(match dialogue.way {
            Way::Keep => by(Way::UcspiTls, dialogue),
            Way::Respawn => by(Way::UcspiRespawn, dialogue),
            _ => None,
        });
    }
    seeds.extend(played.iter().filter_map(behind_raw));
    let from_the_start: Vec<_> = played.iter().filter_map(as_script).collect();
    seeds.extend(from_the_start.iter().map(|script| [STOOD_IN_FOR, script].concat()));
    seeds.extend(from_the_start.iter().step_by(8).map(|script| [b"unlearned\n", &script[..]].concat()));
    seeds
}

/// What the children of the dialogues could have been learned to say.
const STOOD_IN_FOR: &[u8] = b"learned: greeting 220 mail.example ESMTP\n\
    learned: ehlo 250-mail.example hello %h [%a]\nlearned: ehlo 250 SIZE 9\n\
    learned: helo 250 mail.example\nlearned: noop 250 ok %h\nlearned: rset 250 ok\nlearned: quit 221 bye\n";

/// What `--mute` sees of a dialogue that a fresh child goes on with: the part inside TLS, and of the replay what it is told.
fn behind_raw(dialogue: &Dialogue) -> Option<Vec<u8>> {
    let secured = dialogue.steps.iter().position(|step| step.deed == Deed::ClientTls)?;
    if dialogue.way != Way::Respawn || !dialogue.options.is_empty() {
        return None;
    }
    let mut told = String::new();
    let mut steps = dialogue.steps[secured + 1..].to_vec();
    if let Some(Deed::Gets(Side::Backend, line)) = steps.iter().map(|step| &step.deed).nth(1) {
        told = format!("told: {}\n", String::from_utf8_lossy(line).trim_end());
    }
    for step in &mut steps {
        step.deed = match &step.deed {
            Deed::Sends(Side::Backend, octets) => Deed::Sends(Side::Child, octets.clone()),
            Deed::Ends(Side::Backend) => Deed::Ends(Side::Child),
            deed => deed.clone(),
        };
    }
    let muted = Dialogue { way: Way::Mute, certificate: true, steps, ..dialogue.clone() };
    as_script(&muted).map(|script| [told.as_bytes(), &script].concat())
}

/// The lines that do what this dialogue does. `None` where they would be too many.
fn as_script(dialogue: &Dialogue) -> Option<Vec<u8>> {
    let certificate = if dialogue.certificate { "" } else { "cert: none\n" };
    let mut script = format!("way: {}\noptions: {}\n{certificate}", dialogue.way, dialogue.options.join(" "));
    // A greeting, or a reply to a hello, may have been learned.
    let mut is_learnable = true;
    for (number, step) in dialogue.steps.iter().enumerate() {
        script += &match &step.deed {
            Deed::Sends(Side::Client, octets) => format!("C: {}\\c\n", escaped(octets)),
            Deed::Sends(side, octets) => {
                let octets = if is_learnable { octets.clone() } else { numbered(octets, number) };
                format!("{}: {}\\c\n", if *side == Side::Child { 'K' } else { 'B' }, escaped(&octets))
            }
            Deed::Gets(Side::Child | Side::Backend, line) => {
                is_learnable = matches!(Verb::of(line.trim_ascii_end()), Verb::Ehlo | Verb::Helo);
                continue;
            }
            Deed::Ends(Side::Client) => "! client-eof\n".to_owned(),
            Deed::Ends(Side::Child) => "! child-eof\n".to_owned(),
            Deed::Ends(Side::Backend) => "! backend-eof\n".to_owned(),
            Deed::ClientResets => "! client-reset\n".to_owned(),
            Deed::BackendDies => "! backend-dies\n".to_owned(),
            Deed::Backend(Backend::Refused) => "! backend refused\n".to_owned(),
            Deed::Backend(_) => "! backend accepts\n".to_owned(),
            Deed::ClientTls => "! client-tls\n".to_owned(),
            Deed::Waits(time) => format!("! wait {}\n", time.as_secs()),
            Deed::Terminates => "! terminate\n".to_owned(),
            Deed::Gets(..) | Deed::SeesEnd(_) | Deed::SeesAbort(_) | Deed::ClientSeesAlert => continue,
        };
    }
    (script.len() < 12_000).then(|| script.into_bytes())
}

/// A reply of one line that no other is like.
fn numbered(reply: &[u8], number: usize) -> Vec<u8> {
    match reply.strip_suffix(b"\r\n") {
        Some(text) if text.get(3) == Some(&b' ') && !text.contains(&b'\n') => {
            [text, format!(" #{number}\r\n").as_bytes()].concat()
        }
        _ => reply.to_vec(),
    }
}

fn escaped(octets: &[u8]) -> String {
    let shown = |octet: &u8| match octet {
        b'\\' | ..b' ' | 0x7f.. => format!("\\x{octet:02x}"),
        octet => char::from(*octet).to_string(),
    };
    octets.iter().map(shown).collect()
}

/// Both legs, each foreign client, each size of pieces, and one damage of each kind.
fn conversations() -> Vec<Vec<u8>> {
    let mut seeds: Vec<Vec<u8>> = (0..64_u8).map(|n| vec![2 + n % 6, n * 4, n * 3]).collect();
    seeds.extend((0..48_u8).map(|n| vec![2 + n % 6, n * 5, 30, n % 7, n, n.wrapping_mul(37), n.wrapping_mul(11)]));
    for choice in [0, 1] {
        seeds.push(vec![choice, 9, 22, 3, 1, 0, 4, 1, 0, 0, 0]);
        seeds.push([&[choice, 200][..], b"EHLO client.example\r\n"].concat());
    }
    seeds
}

/// Writes the seeds where `scripts/fuzz` wants them: into the folder `$SEEDS`.
#[test]
fn seeds() {
    let Ok(folder) = std::env::var("SEEDS") else { return };
    for (name, _, seeds, _) in TARGETS {
        let folder = Path::new(&folder).join(name);
        fs::create_dir_all(&folder).unwrap();
        for (number, seed) in seeds().iter().enumerate() {
            fs::write(folder.join(format!("{number:04}")), seed).unwrap();
        }
    }
}

/// The inputs that found a fault once, and the target of each.
fn found() -> Vec<(PathBuf, Run)> {
    let inside = |folder: &Path| {
        let entries = fs::read_dir(folder).unwrap_or_else(|why| panic!("{}: {why}", folder.display()));
        entries.map(|entry| entry.unwrap().path())
    };
    let mut found = Vec::new();
    for folder in inside(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/found")) {
        let target = TARGETS.iter().find(|(name, ..)| folder.ends_with(name));
        let &(_, run, ..) = target.unwrap_or_else(|| panic!("{} is no target's", folder.display()));
        found.extend(inside(&folder).map(|path| (path, run)));
    }
    found
}

#[test]
fn every_fault_ever_found_stays_mended() {
    let found = found();
    assert!(found.len() >= 3, "{found:?}");
    for (path, run) in found {
        let input = fs::read(&path).unwrap();
        assert!(catch_unwind(|| run(&input)).is_ok(), "{} fails again", path.display());
    }
}

/// A way whose scripts all fail before the 220 would be fuzzed in vain.
#[test]
fn the_scripts_come_through_tls_by_every_way() {
    let ends: Vec<_> = scripts().iter().filter_map(|script| targets::session::outcome(script)).collect();
    for way in Way::EVERY {
        for was_lazy in [false, true] {
            let of_it = |end: &&Outcome| end.way == way && end.was_lazy == was_lazy;
            let count = |phase| ends.iter().filter(of_it).filter(|end| end.ended_in == phase).count();
            // Under a UCSPI-TLS server and behind --mute nobody stands in for anyone, and here nobody is in clear either.
            if was_lazy && !Way::ALL.contains(&way) {
                continue;
            }
            let is_relayed = way == Way::Mute || count(Phase::RelayPlain) >= 3;
            assert!(count(Phase::RelayTls) >= 3 && is_relayed, "{way}, {was_lazy}: {ends:?}");
            let briefed = ends.iter().filter(of_it).filter(|end| end.was_briefed).count();
            assert!(!was_lazy || briefed >= 10, "{way}: {briefed} briefed");
        }
    }
}

/// An invariant whose conditions are never met would be watched in vain.
#[test]
fn the_scripts_come_to_where_replies_are_counted_by_every_way() {
    let ends: Vec<_> = scripts().iter().filter_map(|script| targets::session::outcome(script)).collect();
    for way in Way::EVERY {
        for was_lazy in [false, true] {
            if was_lazy && way == Way::Mute {
                continue;
            }
            let of_it = || ends.iter().filter(|end| end.way == way && end.was_lazy == was_lazy).map(|end| end.reached);
            let (alone, snooping) = (of_it().map(|end| end.alone).sum(), of_it().map(|end| end.snooping).sum());
            let (gate, behind) = (of_it().map(|end| end.gate).sum(), of_it().map(|end| end.behind_starttls).sum());
            let reached: [usize; 4] = [alone, snooping, gate, behind];
            let wanted = match (way, was_lazy) {
                (Way::Mute, _) => [0, 0, 100, 0],
                // Its gate is the server's own.
                (Way::Raw, false) => [0, 400, 0, 4],
                (Way::Raw, true) => [3, 20, 0, 4],
                (_, false) => [0, 400, 50, 4],
                (_, true) => [3, 20, 40, 4],
            };
            println!("{way}, {was_lazy}: {reached:?}");
            let is_enough = reached.iter().zip(&wanted).all(|(reached, wanted)| reached >= wanted);
            assert!(is_enough, "{way}, {was_lazy}: {reached:?}, not {wanted:?}");
        }
    }
}

/// xorshift64*: the same numbers for the same seed.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % bound.max(1)
    }
}

/// One to eight random changes, taken from what tends to matter.
fn change(input: &mut Vec<u8>, others: &[Vec<u8>], random: &mut Random) {
    for _ in 0..=random.below(7) {
        let at = random.below(input.len() + 1);
        match random.below(6) {
            0 if at < input.len() => input[at] ^= 1 << random.below(8),
            1 if at < input.len() => input[at] = b"\r\n\0 \t\x16\"\\:-2545"[random.below(14)],
            2 => drop(input.drain(at..(at + random.below(12)).min(input.len()))),
            3 => input.insert(at, b"\r\n\0 \t\x16\"\\:-2545"[random.below(14)]),
            4 => {
                let other = &others[random.below(others.len())];
                let from = random.below(other.len());
                let until = (from + random.below(60)).min(other.len());
                input.splice(at..at, other[from..until].iter().copied());
            }
            _ => {
                let from = random.below(input.len());
                let until = (from + random.below(40)).min(input.len());
                let piece = input[from..until].to_vec();
                input.splice(at..at, piece);
            }
        }
    }
}

fn brief(name: &str) {
    let &(_, run, seeds, fewest) = TARGETS.iter().find(|(known, ..)| *known == name).unwrap();
    let seeds = seeds();
    // The same changes each time, or the checks would fail at random.
    let mut random = Random(0x9E37_79B9_7F4A_7C15);
    let mut tries = 0;
    let attempt = |input: &[u8]| {
        if catch_unwind(|| run(input)).is_err() {
            let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id()));
            fs::write(&path, input).unwrap();
            panic!("the input is in {}: put it into tests/fuzz/found/{name}", path.display());
        }
    };
    seeds.iter().for_each(|seed| attempt(seed));
    let start = Instant::now();
    // A busy machine has more time, but not without end.
    while start.elapsed() < TIME || tries < fewest && start.elapsed() < 10 * TIME {
        let mut input = seeds[random.below(seeds.len())].clone();
        change(&mut input, &seeds, &mut random);
        attempt(&input);
        tries += 1;
    }
    println!("{name}: {} seeds and {tries} changed ones", seeds.len());
    assert!(tries >= fewest, "{tries} inputs in {TIME:?}, not {fewest}");
}

#[test]
fn snoop_holds_briefly() {
    brief("snoop");
}

#[test]
fn ehlo_holds_briefly() {
    brief("ehlo");
}

#[test]
fn session_holds_briefly() {
    brief("session");
}

#[test]
fn learned_holds_briefly() {
    brief("learned");
}

#[test]
fn facts_holds_briefly() {
    brief("facts");
}

#[test]
fn proxy_holds_briefly() {
    brief("proxy");
}

#[test]
fn tls_holds_briefly() {
    brief("tls");
}
