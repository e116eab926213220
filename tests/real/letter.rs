//! The letters that are sent, and the queues in which they must be found again, byte for byte.

use std::fs;
use std::path::PathBuf;

use crate::stage::{Stage, wait_for};

pub(crate) const SENDER: &str = "sender@client.example";
pub(crate) const RECIPIENT: &str = "inbox@localhost";

/// A letter in the form in which it is kept: LF line ends, no dots doubled.
///
/// Its body has what transport damages first: dots at line starts, a lone dot, `From `, blanks at line ends, octets over 127, a command of
/// ours, a line of 998 octets.
pub(crate) fn letter(subject: &str) -> Vec<u8> {
    let mut text = format!(
        "From: <{SENDER}>\nTo: <{RECIPIENT}>\nSubject: {subject}\nDate: Mon, 23 Nov 2026 12:00:00 +0000\nMessage-ID: <{subject}@client.example>\n\
         MIME-Version: 1.0\nContent-Type: text/plain; charset=utf-8\nContent-Transfer-Encoding: 8bit\n\n\
         .\n..\n.dot\nFrom here\nblanks at the end  \t\nSTARTTLS\nQUIT\n\n\u{fc}ber \u{2713}\n"
    )
    .into_bytes();
    text.extend(std::iter::repeat_n(b'x', 998));
    text.extend(b"\n\nlast line\n");
    text
}

/// A letter of about `octets` octets, no two lines alike.
pub(crate) fn long_letter(subject: &str, octets: usize) -> Vec<u8> {
    let mut text = letter(subject);
    let mut seed: u64 = 0x9E37_79B9_7F4A_7C15;
    while text.len() < octets {
        for _ in 0..4 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            text.extend(format!("{seed:016x}").bytes());
        }
        text.push(b'\n');
    }
    text
}

/// The letter with CRLF line ends.
pub(crate) fn with_crlf(letter: &[u8]) -> Vec<u8> {
    letter.iter().flat_map(|&octet| if octet == b'\n' { vec![b'\r', b'\n'] } else { vec![octet] }).collect()
}

/// The letter as the DATA command sends it: CRLF line ends, dots doubled at line starts, the final dot.
pub(crate) fn on_the_wire(letter: &[u8]) -> Vec<u8> {
    let mut wire = Vec::new();
    for line in letter.split_inclusive(|&octet| octet == b'\n') {
        if line.starts_with(b".") {
            wire.push(b'.');
        }
        wire.extend(with_crlf(line));
    }
    wire.extend(b".\r\n");
    wire
}

/// A whole session that sends the letter without waiting for replies, as RFC 2920 allows.
pub(crate) fn pipelined_session(letter: &[u8]) -> Vec<u8> {
    let mut session =
        format!("EHLO client.example\r\nMAIL FROM:<{SENDER}>\r\nRCPT TO:<{RECIPIENT}>\r\nDATA\r\n").into_bytes();
    session.extend(on_the_wire(letter));
    session.extend(b"QUIT\r\n");
    session
}

/// Where mailfront's `queuedir` puts what it accepted: sender NUL (recipient NUL)* NUL letter.
pub(crate) struct Queue(PathBuf);

impl Queue {
    pub(crate) fn new(stage: &Stage, name: &str) -> Self {
        let folder = stage.path(name);
        for part in ["tmp", "new"] {
            fs::create_dir_all(folder.join(part)).expect("a queue");
        }
        Self(folder)
    }

    pub(crate) fn folder(&self) -> &PathBuf {
        &self.0
    }

    pub(crate) fn entries(&self) -> Vec<Vec<u8>> {
        files_in(&self.0.join("new"))
    }

    /// Waits for one entry and demands that it is this letter in the envelope all tests use.
    #[track_caller]
    pub(crate) fn holds(&self, letter: &[u8]) {
        let entry = wait_for("a letter in the queue", || self.entries().pop());
        let envelope = format!("{SENDER}\0{RECIPIENT}\0\0");
        let text = entry.strip_prefix(envelope.as_bytes());
        let text = text.unwrap_or_else(|| panic!("another envelope: {}", entry[..entry.len().min(200)].escape_ascii()));
        assert_same(text, letter);
        assert_eq!(self.entries().len(), 1, "one letter was sent");
    }

    #[track_caller]
    pub(crate) fn is_empty(&self) {
        assert!(self.entries().is_empty(), "a letter went the wrong way");
    }
}

/// A maildir's new letters, each with the headers that its server put before it.
#[track_caller]
pub(crate) fn maildir_holds(folder: PathBuf, letter: &[u8]) {
    let received = wait_for("a letter in the maildir", || files_in(&folder.join("new")).pop());
    assert!(received.len() >= letter.len(), "{}", received.escape_ascii());
    let (added, text) = received.split_at(received.len() - letter.len());
    assert_same(text, letter);
    assert!(added.is_empty() || added.ends_with(b"\n"), "{}", added.escape_ascii());
    for line in added.split(|&octet| octet == b'\n').filter(|line| !line.is_empty()) {
        let is_header = line.starts_with(b"\t") || line.starts_with(b" ") || line.contains(&b':');
        assert!(is_header, "not a header: {}", line.escape_ascii());
    }
}

/// Equal, or a failure that shows the first difference instead of both letters.
#[track_caller]
pub(crate) fn assert_same(received: &[u8], sent: &[u8]) {
    if received != sent {
        let at = received.iter().zip(sent).take_while(|(a, b)| a == b).count();
        let around = |text: &[u8]| text[at.saturating_sub(40)..(at + 40).min(text.len())].escape_ascii().to_string();
        panic!(
            "{} octets received, {} sent, different at {at}:\n received {}\n sent     {}",
            received.len(),
            sent.len(),
            around(received),
            around(sent)
        );
    }
}

fn files_in(folder: &std::path::Path) -> Vec<Vec<u8>> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    entries.map(|entry| fs::read(entry.expect("an entry").path()).expect("a letter")).collect()
}
