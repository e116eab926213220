//! A listener under load: Postfix's own load generator in clear, and many sessions at once with every letter compared. The long form of the
//! second is `scripts/load`.

use std::process::Command;

use crate::front::{Identity, MAILFRONT};
use crate::jail::Jail;
use crate::letter::{Queue, assert_same};
use crate::stage::{Stage, wait_for};

/// Postfix's smtp-source sends letters over several connections at a time, each in clear to a mailfront of its own.
#[test]
fn the_letters_of_smtp_source_all_arrive_through_a_listener() {
    const LETTERS: usize = 200;
    const LENGTH: usize = 20_000;
    let stage = Stage::new();
    let (identity, queue, jail) =
        (Identity::self_signed(&stage, "own"), Queue::new(&stage, "child"), Jail::new(&stage, "postfix"));
    let (at, nobody) = (stage.unused_port(), stage.unused_port());
    let mut command = stage.command([env!("CARGO_BIN_EXE_starttls-wrapper"), "--listen", &at.to_string()]);
    command.arg("--cert").arg(&identity.certificate).arg("--key").arg(&identity.key);
    command.args(["--trusted-loopback", &nobody.ip().to_string(), &nobody.port().to_string()]).args(MAILFRONT);
    command.env("QUEUEDIR", queue.folder());
    stage.start_until("listener", &mut command, "learn", || {
        stage.log("listener").contains("is started when a client needs it")
    });
    let [count, length] = [LETTERS, LENGTH].map(|number| number.to_string());
    let place = format!("inet:{}:{}", at.ip(), at.port());
    let words = ["/usr/sbin/smtp-source", "-s", "20", "-m", &count, "-l", &length, "-f", "a@client.example"];
    let mut source = jail.command(&words);
    source.args(["-t", "inbox@localhost", &place]).env("LD_LIBRARY_PATH", "/usr/lib/postfix");
    stage.run(&mut source, b"").succeeded("smtp-source");
    let entries = wait_for("all letters", || Some(queue.entries()).filter(|entries| entries.len() == LETTERS));
    let body = |entry: &[u8]| {
        assert!(entry.starts_with(b"a@client.example\0inbox@localhost\0\0"), "{}", entry.escape_ascii());
        let blank = entry.windows(2).position(|two| two == b"\n\n").expect("a blank line");
        entry[blank + 2..].to_vec()
    };
    // Its letters have the same body: a digit and X to the end of each line, CRLF when it counts, and a line end behind all that.
    let bodies: Vec<_> = entries.iter().map(|entry| body(entry)).collect();
    let lines = bodies[0].split_inclusive(|octet| *octet == b'\n');
    let octets: usize = lines.map(|line| line.len() + 1).sum();
    assert_eq!(octets, LENGTH + 2, "{}", bodies[0].escape_ascii());
    bodies.iter().for_each(|other| assert_same(other, &bodies[0]));
    let ended = || stage.log("listener").matches(" end=\"over\" mode=plain").count();
    wait_for("the sessions' ends", || (ended() >= LETTERS / 20).then_some(()));
    let log = stage.log("listener");
    // As root, which it says, since PROG writes into a folder of root's.
    assert!(!log.lines().any(|line| line.contains("warning") && !line.contains(" as root (")), "{log}");
}

/// Half of them in clear to a daemon, half by STARTTLS.
#[test]
fn many_sessions_at_once_lose_no_letter_and_idle_ones_sleep() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/rig/load.py");
    let mut command = Command::new("python3");
    command.args([script, "200", "150"]).env("PROGRAM", env!("CARGO_BIN_EXE_starttls-wrapper"));
    let ran = command.env("PYTHONDONTWRITEBYTECODE", "1").output().unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&[ran.stdout, ran.stderr].concat()));
}
