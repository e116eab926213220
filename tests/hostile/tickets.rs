//! Session tickets through the whole program: which processes take each other's, what a bad file of keys comes to, and who never sees
//! them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use rustix::process::Signal;
use rustls::{ClientConfig, ClientConnection, Connection, HandshakeKind};
use starttls_wrapper::session::Way;
use tempfile::TempDir;

use crate::child::Child;
use crate::door::{Door, Shape, Start, certificate, free_address, trusting};
use crate::page::Page;
use crate::stream::wait_until;
use crate::wire::PATIENCE;

const TLS12: &rustls::SupportedProtocolVersion = &rustls::version::TLS12;
const TLS13: &rustls::SupportedProtocolVersion = &rustls::version::TLS13;

/// A folder with key files.
struct Files(TempDir);

impl Files {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn write(&self, name: &str, text: &str, mode: u32) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    fn keys(&self, name: &str, digits: &[char]) -> String {
        let text: String = digits.iter().map(|digit| digit.to_string().repeat(64) + "\n").collect();
        self.write(name, &text, 0o600).to_str().unwrap().to_owned()
    }
}

/// A client that keeps its tickets.
fn client(version: &'static rustls::SupportedProtocolVersion) -> Arc<ClientConfig> {
    Arc::new(trusting(Some(&certificate()), &[version]))
}

const NAME: &str = "localhost";

/// A session with whoever is behind this door; the log has it as the client sees it.
fn session(door: &mut Door, client: &Arc<ClientConfig>) -> Outcome {
    let mut child = Child::accept(&door.puppets).unwrap_or_else(|why| panic!("{why}: {}", door.said()));
    let name = NAME.try_into().unwrap();
    let tls = Connection::Client(ClientConnection::new(Arc::clone(client), name).unwrap());
    let wire = door.client.as_mut().unwrap();
    child.send(b"220 p\r\n");
    wire.get(b"220 p\r\n").unwrap();
    wire.send(b"STARTTLS\r\n");
    child.get(b"RSET\r\n").unwrap();
    child.send(b"250 r\r\n");
    wire.get(b"220 2.0.0 Ready to start TLS\r\n").unwrap();
    wire.secure(tls).unwrap();
    wire.send(b"EHLO c\r\n");
    child.get(b"EHLO c\r\n").unwrap();
    child.send(b"250 p\r\n");
    wire.get(b"250 p\r\n").unwrap();
    let Some(Connection::Client(tls)) = wire.tls() else { panic!("no TLS") };
    let (resumed, given) = (tls.handshake_kind() == Some(HandshakeKind::Resumed), tls.tls13_tickets_received());
    let before = door.said().matches(" end=\"").count();
    door.client.take().unwrap().end();
    child.get_end().unwrap();
    child.exit(0);
    assert!(wait_until(PATIENCE, || door.said().matches(" end=\"").count() > before), "{}", door.said());
    let said = door.said();
    let summary = said.lines().rfind(|line| line.contains(" end=\"")).unwrap();
    assert!(summary.contains(if resumed { " resumed=yes " } else { " resumed=no " }), "{summary}");
    Outcome { resumed, given }
}

/// Whether a session was resumed, and the tickets of TLS 1.3 that came in it.
struct Outcome {
    resumed: bool,
    given: u32,
}

const KEEPS: Start<'_> = Start { way: Way::Keep, ..Start::USUAL };
const LISTENS: Start<'_> = Start { shape: Shape::Listener, ..KEEPS };

fn in_a_child(client: &Arc<ClientConfig>, options: &[&str]) -> Outcome {
    session(&mut Door::open(&Start { options, ..KEEPS }), client)
}

#[test]
fn one_child_resumes_what_another_began_by_the_same_file() {
    let files = Files::new();
    let (old, new) = (files.keys("old", &['a']), files.keys("new", &['c']));
    let rotated = files.keys("rotated", &['c', 'a']);
    for version in [TLS12, TLS13] {
        let client = client(version);
        assert!(!in_a_child(&client, &["--ticket-keys", &old]).resumed);
        assert!(in_a_child(&client, &["--ticket-keys", &old]).resumed);
        assert!(in_a_child(&client, &["--ticket-keys", &rotated]).resumed, "the old ticket, once more");
        assert!(in_a_child(&client, &["--ticket-keys", &new]).resumed, "its successor");
        assert!(!in_a_child(&client, &["--ticket-keys", &old]).resumed, "another key");
    }
}

#[test]
fn a_child_without_the_option_gives_no_ticket_and_takes_none() {
    let files = Files::new();
    let keys = files.keys("keys", &['a']);
    for version in [TLS12, TLS13] {
        let client = client(version);
        assert_eq!(in_a_child(&client, &[]).given, 0);
        let with = in_a_child(&client, &["--ticket-keys", &keys]);
        assert!(!with.resumed && with.given == u32::from(version == TLS13));
        let without = in_a_child(&client, &[]);
        assert!(!without.resumed && without.given == 0);
    }
}

#[test]
fn the_loops_of_a_listener_share_their_keys() {
    for (version, name) in [(TLS12, "TLSv1.2"), (TLS13, "TLSv1.3")] {
        let (client, metrics) = (client(version), free_address());
        let options = ["--workers", "3", "--metrics", &metrics.to_string()];
        let mut door = Door::open(&Start { options: &options, ..LISTENS });
        assert!(!session(&mut door, &client).resumed);
        for _ in 0..12 {
            door.connect();
            assert!(session(&mut door, &client).resumed);
        }
        let page = Page::of(metrics);
        let done =
            |kind| page.value(&format!("tls_handshakes_total{{leg=\"client\",version=\"{name}\",kind=\"{kind}\"}}"));
        assert_eq!([done("full"), done("resumed"), page.sum("tls_handshakes_total")], [1.0, 12.0, 13.0]);
    }
}

#[test]
fn two_listeners_and_a_child_share_the_keys_of_a_file_and_no_others() {
    let files = Files::new();
    let keys = files.keys("keys", &['a']);
    let options = ["--ticket-keys", keys.as_str()];
    let client = client(TLS13);
    let mut doors: Vec<Door> = [&options[..], &options[..], &[]]
        .into_iter()
        .map(|options| Door::open(&Start { options, ..LISTENS }))
        .collect();
    assert!(!session(&mut doors[0], &client).resumed);
    assert!(session(&mut doors[1], &client).resumed);
    assert!(in_a_child(&client, &options).resumed);
    assert!(!session(&mut doors[2], &client).resumed, "random keys");
}

#[test]
fn a_bad_file_costs_a_child_its_tickets_and_a_listener_its_start() {
    let files = Files::new();
    let good = "a".repeat(64);
    let cases = [
        (files.0.path().join("absent"), "can't read it: No such file"),
        (files.write("others", &good, 0o640), "others may use it (mode 0640): chmod 600"),
        (files.write("world", &good, 0o604), "others may use it (mode 0604): chmod 600"),
        (files.write("short", &good[..60], 0o600), "line 1: not 48 octets of base64"),
        (files.write("long", &"#".repeat(17_000), 0o600), "longer than 16384 octets"),
        (files.write("empty", "", 0o600), "no key in it"),
    ];
    for (path, why) in &cases {
        let path = path.to_str().unwrap();
        let why = format!("ticket keys {path}: {why}");
        let client = client(TLS13);
        let mut door = Door::open(&Start { options: &["--ticket-keys", path], ..KEEPS });
        assert!(!session(&mut door, &client).resumed);
        assert!(door.said().contains(&format!("clients get no session tickets: {why}")), "{}", door.said());
        assert!(!door.said().contains(&good), "{}", door.said());
        assert!(!in_a_child(&client, &["--ticket-keys", &files.keys("good", &['a'])]).resumed, "it was given one");

        let door = Door::open(&KEEPS);
        let (cert, key) = (door.path("cert.pem"), door.path("key.pem"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_starttls-wrapper"));
        command.arg("--cert").arg(cert).arg("--key").arg(key).args(["--ticket-keys", path, "--listen"]);
        let ended = command.args(["127.0.0.1:9", "--lazy=no", "--way", "keep", "true"]).output().unwrap();
        assert_eq!(ended.status.code(), Some(111), "{ended:?}");
        let said = String::from_utf8_lossy(&ended.stderr);
        assert!(said.contains(&format!("can't give session tickets: {why}")), "{said}");
    }
}

/// SIGHUP, and how a listener says what came of it.
fn renew(door: &Door, outcome: &str) {
    let before = door.said().matches(outcome).count();
    door.kill(Signal::HUP);
    assert!(wait_until(PATIENCE, || door.said().matches(outcome).count() > before), "{}", door.said());
}

#[test]
fn sighup_has_a_listener_take_the_keys_that_the_file_has_by_then() {
    let files = Files::new();
    let keys = files.keys("keys", &['a']);
    let new = files.keys("new", &['c']);
    let client = client(TLS13);
    let mut door = Door::open(&Start { options: &["--ticket-keys", &keys], ..LISTENS });
    assert!(!session(&mut door, &client).resumed);
    files.keys("keys", &['c', 'a']);
    renew(&door, "SIGHUP: certificate, keys and roots were read again");
    door.connect();
    assert!(session(&mut door, &client).resumed, "the old ticket");
    assert!(in_a_child(&client, &["--ticket-keys", &new]).resumed, "it got one of the new key");
    files.write("keys", "nonsense", 0o600);
    renew(&door, &format!("stays in force: ticket keys {keys}: line 1: not 48 octets"));
    door.connect();
    assert!(session(&mut door, &client).resumed, "the old keys stay");
}

#[test]
fn the_keys_that_a_listener_has_made_outlive_sighup() {
    let client = client(TLS13);
    let mut door = Door::open(&LISTENS);
    assert!(!session(&mut door, &client).resumed);
    renew(&door, "SIGHUP: certificate, keys and roots were read again");
    door.connect();
    assert!(session(&mut door, &client).resumed);
}
